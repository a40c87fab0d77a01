"""Tables of launch configurations for a GPU that this machine need not have."""

import json
from pathlib import Path

import torch

from deltadiff.kernels.lora_linear.hopper_config import HOPPER as DECLARED
from deltadiff.kernels.runtime import tuned
from deltadiff.kernels.runtime.tuned import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAME = "NVIDIA Test-GPU 80GB"
ARGS = (8192, 4096, 16, 132)
KEY = (8192, 4096, 4096, 16, False)
HOPPER = Launch("lora_linear_hopper", KEY)
ROW = {"op": "lora_linear_hopper", "config": {"GROUP_SIZE_M": 4},
       "key": dict(zip(DECLARED.keys, KEY, strict=True))}  # fmt: skip


def move_tables(tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """(shipped, user's): where the tables of that GPU are from now on; neither is there yet."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: NAME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "shipped_path", lambda gpu: tmp_path / f"{tuned.slug(gpu)}.json")
    shipped, users = tuned.shipped_path(NAME), tuned.user_path(NAME)
    users.parent.mkdir(parents=True)
    return shipped, users


def read_files_again() -> None:
    """Forget the rows that a test used, so that the next one reads the files."""
    for device in (CPU, GPU):
        tuned.use(device, None)


def table(*rows, version=tuned.VERSION) -> str:
    """The text of a table."""
    return json.dumps({"version": version, "gpu": NAME, "rows": rows})


def chosen(device, key=KEY) -> dict:
    """The configuration of a launch under the tables in use."""
    return DECLARED.choose(device, ARGS, key)
