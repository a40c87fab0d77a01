"""benchmarks/scaling.py: every way is measured, and what is measured is written."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.mark.long
def test_every_way_is_measured(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT, "--output", tmp_path]
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert len(records) == 6 and not any(r["note"] for r in records)
    for r in records:
        assert r["gpus"] == (1 if r["way"] == "one GPU" else 2)
        tokens = r["gpus"] * r["batch"] * r["sequence"]
        assert r["tokens_per_s"] == pytest.approx(tokens / r["p50_ms"] * 1e3, rel=1e-3)


def test_a_start_without_torchrun_says_so(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT))["main"]([])
    assert ended.value.code == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
