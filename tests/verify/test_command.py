"""`deltadiff verify` as a command: its text, its JSON, its exit codes."""

import importlib
import json

import pytest
import torch
from commands import refused

from deltadiff.__main__ import main
from deltadiff.ops.dispatch import choose_path


def test_verify(capsys):
    assert main(["verify", "--op", "adamw_step", "--quick", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "verify on cpu, seed 3" in text
    assert "0 failed" in text and " NO" not in text
    assert "delta_update" not in text


def test_verify_as_json(capsys):
    assert (
        main(["verify", "--op", "adamw_step", "--quick", "--backend", "reference", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["device"] == "cpu"
    assert {row["seed"] for row in report["rows"]} == {report["seed"]}
    assert {row["path"] for row in report["rows"]} == {"reference"}
    assert {row["op"] for row in report["rows"]} == {"adamw_step"}


@pytest.mark.parametrize(
    "op, name", [("delta_update", "delta_update_"), ("adamw_step", "adamw_step_")]
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_verify_fails_with_a_wrong_operation(op, name, flags, monkeypatch, capsys):
    module = importlib.import_module(f"deltadiff.verify.{op}")
    real = getattr(module, name)

    def wrong(**call):
        real(**call)
        call.get("weight", call.get("params"))[0].view(-1)[0] = 3.0

    monkeypatch.setattr(module, name, wrong)
    assert main(["verify", "--op", op, "--quick", *flags]) == 1
    text = capsys.readouterr().out
    assert (json.loads(text)["ok"] is False) if flags else "  NO" in text


def test_verify_fails_with_a_wrong_kernel(monkeypatch, capsys):
    """Not the public function but the registered operation behind it."""
    if choose_path(torch.device("cpu"), torch.float32).backend != "cpp":
        pytest.skip("the C++ extension is not built")
    real = torch.ops.deltadiff.lora_linear

    def scaling_dropped(x, weight, lora_A, lora_B, scaling, *others):
        return real(x, weight, lora_A, lora_B, 1.0, *others)

    monkeypatch.setattr(torch.ops.deltadiff, "lora_linear", scaling_dropped)
    assert main(["verify", "--op", "lora_linear", "--quick"]) == 1
    wrong = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "  NO" in line]
    assert set(wrong) == {"y", "dx", "dA", "dB", "dgate"}


def test_verify_refuses(capsys, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    choose_path.cache_clear()
    assert "interpreter" in refused(capsys, "verify", "--backend", "triton")
    assert "NVIDIA GPUs" in refused(capsys, "verify", "--backend", "hopper")
    assert "one of cpu" in refused(capsys, "verify", "--device", "cuda:99")
