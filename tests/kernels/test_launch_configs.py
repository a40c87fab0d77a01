"""Every launch configuration that a kernel declares is known to tables."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import torch

from deltadiff import kernels
from deltadiff.kernels.launch_configs import LAUNCH_CONFIGS
from deltadiff.kernels.runtime import tuned
from deltadiff.kernels.runtime.tuned import LaunchConfig

CPU = torch.device("cpu")


def test_all_declared_configurations_are_listed():
    declared = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        try:
            names = vars(importlib.import_module(module.name))
        except ImportError as error:  # without Gluon, which no declaration may need
            assert "gluon" in str(error)
            continue
        declared |= {id(v): v for v in names.values() if isinstance(v, LaunchConfig)}
    assert set(map(id, LAUNCH_CONFIGS.values())) == set(declared)
    assert len(LAUNCH_CONFIGS) == len(declared)
    assert all(config.op == op for op, config in LAUNCH_CONFIGS.items())


def test_a_key_rounds_tokens_and_ranks_up():
    config = LaunchConfig(
        "double", lambda m, r: {"BLOCK_SIZE_M": 2 * m}, ("M", "rank"), ("BLOCK_SIZE_M",), []
    )
    key = tuned.Launch("double", (1024, 32))
    tuned.use(CPU, {key: {"BLOCK_SIZE_M": 64}})
    try:
        assert config.choose(CPU, (1000, 17)) == config.choose(CPU, (1024, 32)) == {
            "BLOCK_SIZE_M": 64
        }  # fmt: skip
        assert config.choose(CPU, (1025, 32)) == {"BLOCK_SIZE_M": 2050}
        assert config.choose(CPU, (1025, 32), (1000, 32)) == {"BLOCK_SIZE_M": 64}
    finally:
        tuned.use(CPU, None)


def test_combinations():
    assert tuned.combinations(a=(1, 2), b=(3, 4)) == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4},
    ]  # fmt: skip


WITHOUT_GLUON = """
import pathlib, sys
sys.modules["triton.experimental.gluon"] = None
from deltadiff.kernels.runtime import tuned
print(len(tuned.load(pathlib.Path(sys.argv[1]))))
try:
    import deltadiff.kernels.lora_linear.hopper
except ImportError:
    print("no Gluon")
"""


def row(config: LaunchConfig) -> dict:
    key = {name: "nearest" if name == "rounding" else 16 for name in config.keys}
    return {"op": config.op, "key": key, "config": {config.entries[0]: 16}}


def test_rows_of_all_kernels_load_without_gluon(tmp_path):
    rows = list(map(row, LAUNCH_CONFIGS.values()))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"version": tuned.VERSION, "gpu": "", "rows": rows}))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_GLUON, path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str(len(rows)), "no Gluon"], done.stderr
