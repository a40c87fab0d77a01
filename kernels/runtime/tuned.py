"""Launch configurations: each tunable kernel's default, and tables of faster ones for a GPU.

A launch configuration is a dict of block sizes, warps and stages. Beside its default, a kernel
declares a `LaunchConfig`; `kernels/launch_configs.py` lists all of them. A row of a table replaces
some entries of the default. It is found by the operation and by the launch's key, in which the
number of tokens (M) is rounded up to a power of two and the rank is padded. A launch without a row
gets the default.

There may be two tables for a GPU, found by its name: the one that is shipped in `kernels/tuned`,
and the user's, which `deltadiff tune` writes and whose rows come first.
"""

import functools
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton

VERSION = 2  # raised when a change of the kernels makes older rows worthless


POWERS_OF_TWO = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "BLOCK_SIZE_C", "num_warps")


@dataclass(frozen=True, eq=False)
class LaunchConfig:
    """What can be tuned about one kernel.

    Args:
        op: the kernel's name in tables.
        default: a pure function that returns the default configuration.
        keys: names of the values that a row is found by.
        entries: names of the entries that a row may replace. The number of parts that a sum is
            split into is never among them: results would differ between GPUs.
        candidates: configurations that `deltadiff tune` tries. One that does not fit the GPU or the
            rank is skipped when it is tried.
    """

    op: str
    default: Callable[..., dict]
    keys: tuple[str, ...]
    entries: tuple[str, ...]
    candidates: Sequence[dict[str, int]]

    def choose(self, device: torch.device, args: tuple, key: tuple | None = None) -> dict:
        """The configuration for one launch on ``device``, which the caller may change.

        Args:
            args: arguments of ``default``.
            key: values for ``keys``, in order; None if they are ``args``.
        """
        return _choose(self, device, args, args if key is None else key).copy()


def combinations(**values: Iterable[int]) -> list[dict[str, int]]:
    """Candidates: every combination of the entries' values."""
    products = itertools.product(*values.values())
    return [dict(zip(values, product, strict=True)) for product in products]


def padded_rank(r: int) -> int:
    """The rank in the key of a row, and the ranks of a block of a low-rank factor."""
    return max(16, triton.next_power_of_2(r))


class Launch(NamedTuple):
    """What a row is found by: an operation, and the values of its keys in order."""

    op: str
    key: tuple

    @classmethod
    def of(cls, config: LaunchConfig, key: tuple) -> "Launch":
        """The launch whose exact values are ``key``: M and rank are rounded up as in rows."""
        rounded = {"M": triton.next_power_of_2, "rank": padded_rank}
        values = zip(config.keys, key, strict=True)
        return cls(config.op, tuple(rounded.get(name, lambda v: v)(v) for name, v in values))


Rows = dict[Launch, dict[str, int]]


class TableError(ValueError):
    """A table that cannot be used; the message names the file and the row."""

    def __init__(self, path: Path, place: str, given: object, accepted: str):
        super().__init__(f"{path}, {place}: got {given}; accepted: {accepted}")


# ------------------------------------------------------------------------- look-up

_tables: dict[torch.device, Rows] = {}


_asked: dict[Launch, dict] = {}


@functools.lru_cache(maxsize=4096)
def _choose(config: LaunchConfig, device, args, key) -> dict:
    launch = Launch.of(config, key)
    _asked[launch] = {**config.default(*args), **rows(device).get(launch, {})}
    return _asked[launch]


def rows(device: torch.device) -> Rows:
    """The rows that launches on a device use."""
    if device not in _tables:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        _tables[device] = {**load(shipped_path(name)), **load(user_path(name))} if name else {}
    return _tables[device]


def use(device: torch.device, table: Rows | None) -> None:
    """Use these rows alone from now on; None goes back to those of the files."""
    _tables.pop(device, None)
    if table is not None:
        _tables[device] = table
    _choose.cache_clear()


def asked(call: Callable[[], object]) -> dict[Launch, dict]:
    """The launches that a call makes, each with its configuration."""
    _choose.cache_clear()
    _asked.clear()
    call()
    return dict(_asked)


def describe(device: torch.device) -> str:
    """How many rows a device uses and from which files, in words."""
    if device.type != "cuda":
        return "defaults"
    name = torch.cuda.get_device_name(device)
    files = {"shipped": shipped_path(name), "user's": user_path(name)}
    found = {words: (path, len(load(path))) for words, path in files.items()}
    texts = [f"{n} {words} ({path})" for words, (path, n) in found.items() if n]
    return f"defaults, rows: {', '.join(texts)}" if texts else "defaults"


# --------------------------------------------------------------------------- files


def slug(gpu: str) -> str:
    """A GPU's name in the form that file names have."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def shipped_path(gpu: str) -> Path:
    return Path(__file__).parents[1] / "tuned" / f"{slug(gpu)}.json"


def user_path(gpu: str) -> Path:
    """Where the user's table lies: in the cache folder, as it can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "deltadiff", "tuned", f"{slug(gpu)}.json")


def load(path: Path) -> Rows:
    """The rows of a file. There are none without a file, or if its version is not that of these
    kernels; the latter warns.

    Raises:
        TableError: not a table, or a row with unknown names or impossible values.
    """
    try:
        table = json.loads(path.read_bytes())
        version, listed = table["version"], list(table["rows"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        accepted = "a table that `deltadiff tune` wrote, or no file"
        raise TableError(path, "whole file", f"{type(error).__name__}: {error}", accepted) from None
    if version != VERSION:
        text = f"{path} is for version {version} of the kernels, these are {VERSION}: ignored"
        warnings.warn(f"{text}; `deltadiff tune` makes a new one", stacklevel=2)
        return {}
    return dict(_checked(path, f"row {i}", row) for i, row in enumerate(listed))


def _checked(path: Path, place: str, row) -> tuple[Launch, dict[str, int]]:
    """A row, after everything in it was checked."""
    from ..launch_configs import LAUNCH_CONFIGS  # not at the top: the kernels import this file

    if not isinstance(row, dict) or str(row.get("op")) not in LAUNCH_CONFIGS:
        raise TableError(path, place, row, f"an op of {', '.join(LAUNCH_CONFIGS)}")
    declared = LAUNCH_CONFIGS[row["op"]]
    keys, entries = declared.keys, declared.entries
    key, config = row.get("key"), row.get("config")
    if not isinstance(key, dict) or set(key) != set(keys):
        raise TableError(path, place, f"key {key}", f"values for {', '.join(keys)}")
    types = all(isinstance(key[k], str if k == "rounding" else int) for k in keys)
    if not types or any(isinstance(v, int) and not 0 <= v < 2**31 for v in key.values()):
        raise TableError(path, place, f"key {key}", "numbers, true, false, a rounding by name")
    values = tuple(key[k] for k in keys)
    launch = Launch.of(declared, values)
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
