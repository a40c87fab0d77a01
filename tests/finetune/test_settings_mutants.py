"""Whatever settings.json holds, `deltadiff finetune --resume` goes on or says why not."""

import json
import random
from dataclasses import asdict

import pytest
from command_mutants import attempt, no_training  # noqa: F401
from mutants import Mutants, mutate_json, write_json_mutant

from deltadiff.finetune.settings import make_settings, read_settings

pytest_plugins = ["tiny_models"]
CASES, RUNS = 50, 12  # for each seed
METHODS = ("lora", "delta-lora", "diffora-random", "dylora", "adalora", "full")


@pytest.mark.check(short=4, long=40)
def test_settings_are_read_or_refused(seed, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    right = json.dumps(asdict(make_settings({"model": "m", "data": "d.csv"}))).encode()
    for number in range(CASES):
        path = tmp_path / str(number) / "settings.json"
        path.parent.mkdir()
        what = write_json_mutant(path, right, random_)
        mutants.attempt(f"case {number}: {what}", lambda p=path.parent: read_settings(p).check())
    mutants.conclude(tally, "settings.json")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """Reviews so few that a run begins at once."""
    path = tmp_path_factory.mktemp("data") / "small.csv"
    path.write_text("text,label\n" + "great film,fun\ndull film,dull\n" * 8)
    return str(path)


@pytest.mark.check(short=1, long=25)
def test_runs_with_odd_settings(
    seed,
    bert,
    small,
    tmp_path,
    tally,
    one_thread,
    monkeypatch,
    no_training,  # noqa: F811
):
    """Values of the right types, which mean something or not."""
    monkeypatch.chdir(tmp_path)  # data may be ".", and a whole repository takes long to read
    random_ = random.Random(seed)
    mutants = Mutants()
    given = {"model": bert, "data": small, "label_column": "label", "device": "cpu", "steps": 2}
    for number in range(RUNS):
        folder = tmp_path / str(number)
        folder.mkdir()
        method = random_.choice(
            ["lora", "delta-lora", "diffora-random", "dylora", "adalora", "full"]
        )
        right = asdict(make_settings(given | {"method": method, "batch_size": 2}))
        changed = {k: v for k, v in right.items() if k not in ("model", "data")}
        changed = mutate_json({k: changed[k] for k in random_.sample(sorted(changed), 12)}, random_)
        if not isinstance(changed, dict):
            continue
        value = right | {k: v for k, v in changed.items() if k in right}
        if random_.random() < 0.1:
            value |= {
                random_.choice(["model", "data"]): random_.choice(["", ".", "/dev/null", "x\0"])
            }
        (folder / "settings.json").write_text(json.dumps(value))
        different = {k: v for k, v in value.items() if v != right[k]}
        attempt(mutants, f"case {number}: {method} {different}", ["finetune", "--resume", folder])
    mutants.conclude(tally, "settings of runs")
