"""The command `deltadiff`: its help, its exit codes, one line for an error."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused

import deltadiff
from deltadiff.__main__ import COMMANDS, main
from deltadiff.verify import command as verify_command

ROOT = Path(deltadiff.__file__).resolve().parent.parent


def run_command(*argv, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deltadiff", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_module_is_the_command():
    done = run_command("--version")
    assert (done.returncode, done.stdout) == (0, f"deltadiff {deltadiff.__version__}\n")
    done = run_command("verify", "--device", "banana")
    assert done.returncode == 2
    assert done.stderr.startswith("deltadiff: device: got 'banana'; accepted: one of cpu")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_names_the_exit_codes(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text and "a check failed" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_all_commands_has_what_each_does(name, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f" {name} " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["serve"], ["verify", "--op", "lora"], ["merge", "model"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "compare"])
@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_training_names_the_extra_before_it_begins(command, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    words = ["some-model", "some-data.csv"] + ["--output", "out"] * (command == "compare")
    line = refused(capsys, command, *words)
    assert package in line and "pip install -e '.[finetune]'" in line


def test_finetune_without_arguments(capsys):
    assert "model" in refused(capsys, "finetune")


def test_presets(capsys):
    assert main(["presets"]) == 0
    assert "delta-lora/e2e" in capsys.readouterr().out
    assert main(["presets", "delta-lora/e2e"]) == 0
    assert "--lr" in capsys.readouterr().out
    assert "preset" in refused(capsys, "presets", "no-such")


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_command, "find_device", interrupt)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err == "deltadiff: interrupted\n"


def test_python_m_in_a_checkout(tmp_path):
    """There the folder `kernels` must not stand for the package that transformers looks for."""
    transformers = pytest.importorskip("transformers")
    assert (ROOT / "kernels").is_dir()
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    folder, data = tmp_path / "base", tmp_path / "data.txt"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    data.write_text("one\ntwo\nthree\nfour\n")
    words = [folder, data, "--heldout", "0.5", "--output", tmp_path / "out"]
    done = run_command("finetune", *words, cwd=ROOT)
    assert done.stderr.startswith("deltadiff finetune: model: got")  # its tokenizer is a dummy
    assert "kernels" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "model", "data.csv", "--output", ""],
        ["finetune", "--resume", ""],
        ["compare", "model", "data.csv", "--output", ""],
        ["merge", "model", "adapter", ""],
        ["merge", "model", "", "merged"],
        ["bench", "layer", "--device", "cpu", "--quick", "--output", ""],
    ],
)
def test_an_empty_name_is_not_the_current_folder(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "got ''; accepted: a folder; '.' is the current one" in refused(capsys, *words)
    assert not any(tmp_path.iterdir())
