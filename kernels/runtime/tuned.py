"""Launch configurations: the default of each operation, and tables of what is faster on a GPU.

A row of a table stands in for some entries of the default. It is found by the operation and by what
the launch is about: sizes as they are, tokens (M) up to a power of two, ranks as a kernel pads
them. What has no row, or no table, gets the default.

There is a table for each GPU by name. First comes the user's, which `deltadiff tune` writes, then
the one that is shipped beside this file.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

VERSION = 2  # of the kernels: raised with changes that make older rows worthless


# Of each operation: what a launch is about, and the entries that a row may stand in for. The
# number of parts that a sum is split in is none of them: results would differ between GPUs.
OPS = {
    "lora_linear_down": (
        ("M", "K", "rank", "itemsize"),
        ("BLOCK_SIZE_M", "num_warps", "num_stages"),
    ),
    "lora_linear_fwd": (
        ("M", "N", "K", "rank", "itemsize", "transposed"),
        ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"),
    ),
    "lora_linear_few": (
        ("M", "N", "K", "rank", "transposed"),
        ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps", "num_stages"),
    ),
    "lora_linear_wgrad": (
        ("M", "K", "rank", "itemsize"),
        ("BLOCK_SIZE_C", "num_warps", "num_stages"),
    ),
    "lora_linear_hopper": (
        ("M", "N", "K", "rank", "backward"),
        ("BLOCK_SIZE_N", "STAGES", "GROUP_SIZE_M"),
    ),
    "delta_update": (
        ("rank", "itemsize", "rounding"),
        ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "TILES", "num_warps", "num_stages"),
    ),
}  # fmt: skip


POWERS_OF_TWO = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "BLOCK_SIZE_C", "num_warps")


def padded_rank(r: int) -> int:
    """As rows have it."""
    return max(16, triton.next_power_of_2(r))


class Launch(NamedTuple):
    """What rows are found by: an operation, and values for its keys in `OPS`, in order."""

    op: str
    key: tuple

    @classmethod
    def of(cls, op: str, key: tuple) -> "Launch":
        """Of exact values: with tokens and ranks as rows have them."""
        rounded = {"M": triton.next_power_of_2, "rank": padded_rank}
        names = OPS[op][0]
        return cls(
            op, tuple(rounded.get(n, lambda v: v)(v) for n, v in zip(names, key, strict=True))
        )


Rows = dict[Launch, dict[str, int]]


class TableError(ValueError):
    """A table that cannot be used; the message names the file and the row."""

    def __init__(self, path: Path, place: str, given: object, accepted: str):
        super().__init__(f"{path}, {place}: got {given}; accepted: {accepted}")


# ------------------------------------------------------------------------- look-up

_tables: dict[torch.device, Rows] = {}


_asked: dict[Launch, dict] = {}


def config(
    op: str,
    device: torch.device,
    default: Callable[..., dict],
    args: tuple,
    key: tuple | None = None,
) -> dict:
    """A configuration for one launch.

    Args:
        op: one of `OPS`.
        device: where.
        default: a pure function of ``args``.
        key: values for the keys of ``op``, in order; None is ``args``.
    """
    return _config(op, device, default, args, args if key is None else key).copy()


@functools.lru_cache(maxsize=4096)
def _config(op, device, default, args, key) -> dict:
    launch = Launch.of(op, key)
    _asked[launch] = {**default(*args), **rows(device).get(launch, {})}
    return _asked[launch]


def rows(device: torch.device) -> Rows:
    """The rows in use on a device."""
    if device not in _tables:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        _tables[device] = {**load(shipped_path(name)), **load(user_path(name))} if name else {}
    return _tables[device]


def use(device: torch.device, table: Rows | None) -> None:
    """From now on these rows alone; None is those of the files again."""
    _tables.pop(device, None)
    if table is not None:
        _tables[device] = table
    _config.cache_clear()


def asked(call: Callable[[], object]) -> dict[Launch, dict]:
    """The configurations that a call asks for."""
    _config.cache_clear()
    _asked.clear()
    call()
    return dict(_asked)


def describe(device: torch.device) -> str:
    """The rows in use on a device, in words: how many, and from which files."""
    if device.type != "cuda":
        return "defaults"
    name = torch.cuda.get_device_name(device)
    files = {"shipped": shipped_path(name), "user's": user_path(name)}
    found = {words: (path, len(load(path))) for words, path in files.items()}
    texts = [f"{n} {words} ({path})" for words, (path, n) in found.items() if n]
    return f"defaults, rows: {', '.join(texts)}" if texts else "defaults"


# --------------------------------------------------------------------------- files


def slug(gpu: str) -> str:
    """A GPU's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def shipped_path(gpu: str) -> Path:
    return Path(__file__).with_name(f"tuned-{slug(gpu)}.json")


def user_path(gpu: str) -> Path:
    """In the platform's folder for what can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "deltadiff", "tuned", f"{slug(gpu)}.json")


def load(path: Path) -> Rows:
    """The rows of a file; none where there is no file, or one for other kernels (this warns).

    Raises:
        TableError: not a table, or a row with unknown names or impossible values.
    """
    try:
        table = json.loads(path.read_bytes())
        version, listed = table["version"], list(table["rows"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        accepted = "a table that `deltadiff tune` wrote, or no file"
        raise TableError(path, "whole file", f"{type(error).__name__}: {error}", accepted) from None
    if version != VERSION:
        text = f"{path} is for version {version} of the kernels, these are {VERSION}: ignored"
        warnings.warn(f"{text}; `deltadiff tune` makes a new one", stacklevel=2)
        return {}
    return dict(_checked(path, f"row {i}", row) for i, row in enumerate(listed))


def _checked(path: Path, place: str, row) -> tuple[Launch, dict[str, int]]:
    """A row as it was read, once everything in it is known to be right."""
    if not isinstance(row, dict) or row.get("op") not in OPS:
        raise TableError(path, place, row, f"an op of {', '.join(OPS)}")
    keys, entries = OPS[row["op"]]
    key, config = row.get("key"), row.get("config")
    if not isinstance(key, dict) or set(key) != set(keys):
        raise TableError(path, place, f"key {key}", f"values for {', '.join(keys)}")
    if not all(isinstance(key[k], str if k == "rounding" else int) for k in keys):
        raise TableError(path, place, f"key {key}", "numbers, true, false, a rounding by name")
    values = tuple(key[k] for k in keys)
    launch = Launch.of(row["op"], values)
    if launch.key != values:
        raise TableError(path, place, f"key {key}", "M and rank powers of two, rank at least 16")
    if not isinstance(config, dict) or not set(config) <= set(entries):
        raise TableError(path, place, f"config {config}", f"some of {', '.join(entries)}")
    for name, value in config.items():
        if type(value) is not int or value < 1:
            raise TableError(path, place, f"{name} {value!r}", "a number of at least 1")
        if name in POWERS_OF_TWO and value & (value - 1):
            raise TableError(path, place, f"{name} {value}", "a power of two")
    return launch, config
