"""benchmarks/scaling.py: every way is measured, and what is measured is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


def start(*args):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, args)], env=environment, capture_output=True, text=True
    )


@pytest.mark.long
def test_every_way_is_measured(tmp_path):
    done = start("-m", "torch.distributed.run", "--nproc-per-node", 2, SCRIPT, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert len(records) == 6 and not any(r["note"] for r in records)
    for r in records:
        assert r["gpus"] == (1 if r["way"] == "one GPU" else 2)
        tokens = r["gpus"] * r["batch"] * r["sequence"]
        assert r["tokens_per_s"] == pytest.approx(tokens / r["p50_ms"] * 1e3, rel=1e-3)


def test_a_start_without_torchrun_says_so():
    done = start(SCRIPT)
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stderr
