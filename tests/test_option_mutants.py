"""Every option of every command with every kind of value: one line and exit code 2, or it runs.

What would train, measure or check stands still here: the tests are about words.
"""

import argparse
import importlib
import random

import pytest
from command_mutants import attempt, no_training  # noqa: F401
from mutants import Mutants

from deltadiff.__main__ import COMMANDS
from deltadiff.bench import command as bench
from deltadiff.diffora.theory import command as theory
from deltadiff.verify import command as verify

pytest_plugins = ["tiny_models"]
CASES = {"finetune": 40, "compare": 20, "bench": 6}  # for each seed; 15 of the others
WORDS = (
    "", " ", "0", "-1", "1", "2", "3", "0.5", "1e20", "1e400", "nan", "inf", "-inf", "10**9",
    "1000000000", "99999999999999999999", "9" * 5000, "٣", "1_000", "0x10", "true", "None",
    "x", "a\0b", "\udcff",
    "\ud800x", "é日本", "x" * 5000, "/" * 5000, "cpu", "cuda", "cuda:99", "cuda:-1", "meta", "mps",
    "cpu:1", "/", "/dev/null", "/proc/self/mem", ".", "..", "../x", "~", "-", "--", "%s",
    "%(prog)s",
    "{}", "\n", "a\nb", "none", "plain", "text", "label", ",", "tab", "utf-8", "utf-16", "base64",
    "idna", "all-linear", "qv", "query", "(", "[", "*", "lora", "delta-lora", "full*.lr=5e-5",
    "*.lr=nan", "*.r=0", "lora.=", "=", ".", "1x1x1", "8x8x8", "0x0x0", "1x1", "-1x1x1", "1e9x1x1",
    "delta-lora/e2e", "diffora/sst-2", "lambda", "k", "float16", "float32", "package:scattertext",
    "package:", "package:x", "json", "squad", "dataset", "peft", "bench", "@file", "--help", "-h",
)  # fmt: skip


def options(command: str) -> dict[str, argparse.Action]:
    """The options of a command by their first name."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"deltadiff.{COMMANDS[command][0]}").add_arguments(parser)
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    actions = [action for p in parsers for action in p._actions]
    return {a.option_strings[-1]: a for a in actions if a.option_strings and a.dest != "help"}


@pytest.fixture
def words(bert, tmp_path_factory) -> dict[str, list[str]]:
    """Words with which each command works."""
    data = tmp_path_factory.mktemp("data") / "small.csv"
    data.write_text("text,label\n" + "great film,fun\ndull film,dull\n" * 8)
    columns = ["--label-column", "label", "--device", "cpu"]
    return {
        "info": [], "verify": [], "presets": [], "tune": [], "theory": ["--draws", "1"],
        "merge": [bert, str(data.parent), "merged"],
        "finetune": [bert, str(data), *columns],
        "compare": [bert, str(data), *columns, "--methods", "lora", "--seeds", "1"],
        "bench": ["layer", "--device", "cpu", "--quick"],
    }  # fmt: skip


def mutate(command: str, right: list[str], known: dict, random_: random.Random) -> list[str]:
    """The words of a command, with some more or others."""
    found = list(right)
    if command == "bench":
        found[0] = random_.choice(["layer", "step", "model", "search"])
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        how = random_.randrange(8)
        if how < 6 and known:
            name = random_.choice(list(known))
            count = 0 if known[name].nargs == 0 else random_.choice([1, 1, 1, 1, 1, 0, 2])
            values = [random_.choice(WORDS) for _ in range(count)]
            if known[name].choices and random_.random() < 0.5:
                values = [str(random_.choice(list(known[name].choices)))]
            found += [f"{name}={values[0]}"] if count == 1 and how == 0 else [name, *values]
        elif how == 6 and found:
            found[random_.randrange(len(found))] = random_.choice(WORDS)
        else:
            found.append(random_.choice(WORDS))
    return found


@pytest.mark.check(short=1, long=30)
@pytest.mark.parametrize("command", COMMANDS)
def test_options(command, seed, words, tmp_path, monkeypatch, tally, one_thread, no_training):  # noqa: F811
    random_ = random.Random(f"{command} {seed}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "compare", lambda *_: [])
    monkeypatch.setattr(bench.model, "model_records", lambda *_: [])
    monkeypatch.setattr(verify, "run_checks", lambda *_: ([], True))
    monkeypatch.setattr(verify, "run_grid", lambda *_: [])
    monkeypatch.setattr(verify, "run_number", lambda *_: [])
    monkeypatch.setattr(theory, "SETTINGS", ())
    monkeypatch.setattr(theory, "plot_courses", lambda *_: None)
    known, mutants = options(command), Mutants()
    for _ in range(CASES.get(command, 15)):
        argv = mutate(command, words[command], known, random_)
        attempt(mutants, f"{command} {[word[:60] for word in argv]}", [command, *argv])
    mutants.conclude(tally, f"options of {command}")
