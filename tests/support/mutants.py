"""Mutants: input as accidents, other programs and forgers leave it, and how a call takes it.

A call on a mutant has to succeed or to raise an error of deltadiff's, soon and within a bounded
amount of memory. `Mutants.attempt` makes the call, and notes all else as a failure.
"""

import contextlib
import copy
import json
import math
import random
import resource
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from damaged_files import damage
from torch import Tensor

from deltadiff.errors import ArgumentError, NonFiniteLossError

LIMIT_S = 20  # for one case; the slowest take a second on a busy machine
LIMIT_BYTES = 2**32  # of new memory


class Hang(BaseException):
    """The time of a case was over; no handler of ordinary exceptions stops it."""


@contextlib.contextmanager
def limits(seconds: int = LIMIT_S) -> Iterator[None]:
    """Raise Hang in a block that takes too long, and MemoryError where it takes too much."""

    def stop(*_):
        raise Hang(f"after {seconds} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, memory[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


class Mutants:
    """Counts cases, and notes what went wrong in which."""

    def __init__(self) -> None:
        self.cases = 0
        self.failures: list[str] = []

    def attempt(self, case: str, call: Callable[[], object]) -> bool:
        """Whether the call succeeded; what it may not raise is noted."""
        self.cases += 1
        try:
            with limits():
                call()
            return True
        except (ArgumentError, NonFiniteLossError) as error:
            self.check(case, str(error).strip(), f"an empty message: {error!r}")
        except (Exception, Hang) as error:
            self.failures.append(f"{case}: {self.describe(error)}")
        return False

    @staticmethod
    def describe(error: BaseException) -> str:
        """An error with the places that it came from."""
        places = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(p.filename).name}:{p.lineno}" for p in reversed(places))
        return f"{type(error).__name__}: {error!s:.200} ({where})"

    def check(self, case: str, holds: object, what: str) -> None:
        """Note ``what`` went wrong unless something holds."""
        if not holds:
            self.failures.append(f"{case}: {what}")

    def conclude(self, tally: Callable, op: str) -> None:
        """Count the cases in the table of checks, and fail if one of them did."""
        tally("mutants", op, self.cases, len(self.failures))
        assert not self.failures, "\n".join(["", *(ascii(line) for line in self.failures)])


# ------------------------------------------------------------------------------ values

VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1.5, 1e-300, 1e300, -0.0, math.nan, math.inf,
    -math.inf, 2**31, 2**31 - 1, 2**40, 2**63, 2**64, -(2**63), 10**30, 10**400, "", " ", "x", "0",
    "1", "0.5", "nan", "a\0b", "\ud800", "\udcff", "é", "日本", "a" * 5000, "../x", "/", "none",
    "a.b", "(", "(a+)+$", "\n", [], [None], [1], [[]], ["x", "x"], {}, {"a": 1}, {"": None},
    {"x": {"y": [1, {"z": None}]}}, [[[[[[[[0]]]]]]]],
)  # fmt: skip


def odd_value(random_: random.Random) -> object:
    """A value that JSON takes, as Python's reader understands JSON."""
    if random_.random() < 0.1:
        return [odd_value(random_) for _ in range(random_.randrange(4))]
    return copy.deepcopy(random_.choice(VALUES))  # which may be changed


def mutate_json(value: object, random_: random.Random) -> object:
    """A copy of a JSON value with one to three changes anywhere inside."""
    value = json.loads(json.dumps(value))
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        value = _mutate_once(value, random_)
    return value


def _mutate_once(value: object, random_: random.Random) -> object:
    places = list(_places(value))
    if not places or random_.random() < 0.02:
        return odd_value(random_)
    holder, key = random_.choice(places)
    match random_.randrange(8):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2:
            other, place = random_.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        case 3 if isinstance(holder, dict):
            holder[str(odd_value(random_))[:300]] = holder.pop(key)
        case 3 | 4 if isinstance(holder, dict):
            holder[str(odd_value(random_))[:300]] = odd_value(random_)
        case 5 if type(holder[key]) in (int, float) and abs(holder[key]) < 1e9:
            holder[key] += random_.choice([1, -1, 0.5, 2**31, 2**40])
        case _:
            holder[key] = odd_value(random_)
    return value


def _places(value: object) -> Iterator[tuple]:
    """All (container, key) inside a value."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


OTHER_DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


# ------------------------------------------------------------------------------- bytes


def mutate_text(blob: bytes, random_: random.Random) -> bytes:
    """The bytes of a text file, damaged or written by another program."""
    text = blob.decode()
    cut = random_.randrange(len(text) + 1)
    return random_.choice(
        [
            lambda: damage(blob, random_),
            lambda: damage(damage(blob, random_) or blob, random_),
            lambda: b"",
            lambda: b"\xef\xbb\xbf" + blob,
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32"),
            lambda: text.encode("cp037"),
            lambda: b"\0" * 64,
            lambda: blob[:cut] + b"\0" + blob[cut:],
            lambda: blob[:cut] + random_.randbytes(300),
            lambda: b"[" * 100_000,
            lambda: b'{"a":' * 100_000,
            lambda: b"9" * 5000,
            lambda: blob[:cut] + b"9" * 5000 + blob[cut:],
            lambda: blob[:cut] + b"\xff\xfe" + blob[cut:],
            lambda: random_.choice([b"null", b"[]", b"{}", b'"x"', b"1", b"NaN", b"\n\n", b"<a/>"]),
            lambda: blob + blob,
            lambda: blob.replace(b"\n", b"\r"),
            lambda: blob.replace(b",", b";"),
        ]
    )()


def mutate_json_file(blob: bytes, random_: random.Random) -> bytes:
    """The bytes of a JSON file: a value inside is another, or `mutate_text`."""
    if random_.random() < 0.35:
        return mutate_text(blob, random_)
    text = json.dumps(mutate_json(json.loads(blob), random_))
    return text.encode("utf-8", "surrogatepass")


def write_json_mutant(path: Path, right: bytes, random_: random.Random) -> str:
    """Write `mutate_json_file` of ``right``, or rarely `spoil` the file; returns what is there."""
    path.write_bytes(mutate_json_file(right, random_))
    what = repr(path.read_bytes()[:300])
    return spoil(path, random_) if random_.random() < 0.05 else what


def mutate_safetensors(blob: bytes, random_: random.Random) -> bytes:
    """The bytes of a safetensors file: damaged, or with a header that tells something else."""
    if random_.random() < 0.3:
        return damage(blob, random_)
    (size,) = struct.unpack("<Q", blob[:8])
    header = mutate_json_file(blob[8 : 8 + size], random_)
    told = len(header) if random_.random() < 0.9 else random_.choice([0, 2**31, 2**40, 2**63])
    return struct.pack("<Q", told) + header + blob[8 + size :]


def mutate_tensors(tensors: dict[str, Tensor], random_: random.Random) -> dict[str, Tensor]:
    """Tensors by name, one to three of which are lost, new, renamed, or of other values."""
    tensors = dict(tensors)
    for _ in range(random_.choice([1, 1, 2, 3])):
        name = random_.choice(list(tensors) or ["x"])
        t = tensors.pop(name, torch.zeros(2, 2))
        match random_.randrange(9):
            case 0:
                continue
            case 1:
                tensors[random_.choice([f"{name}x", name[:-1], "", "a.b", name.upper()])] = t
            case 2:
                tensors |= {
                    name: t,
                    str(odd_value(random_))[:50].encode("ascii", "replace").decode(): t.clone(),
                }
            case 3:
                tensors[name] = t.to(random_.choice(OTHER_DTYPES))
            case 4:
                tensors[name] = t.reshape(-1)
            case 5:
                tensors[name] = t.reshape(*t.shape, 1)
            case 6:
                tensors[name] = torch.full_like(t, random_.choice([0, 1, 127]))
            case 7:
                tensors[name] = t.float() * random_.choice([math.nan, math.inf, 1e30, -1])
            case 8:
                tensors[name] = t.new_zeros(random_.choice([(0,), (), (1, 1), (3, 0), (2, 7)]))
    return tensors


def mutate_state(state: object, random_: random.Random) -> object:
    """A copy of a state as `torch.save` takes it, with one to three changes anywhere inside."""
    state = _as_lists(state)
    for _ in range(random_.choice([1, 1, 2, 3])):
        places = list(_places(state))
        if not places or random_.random() < 0.02:
            return odd_value(random_)
        holder, key = random_.choice(places)
        value = holder[key]
        if isinstance(value, Tensor) and random_.random() < 0.7:
            del holder[key]
            changed = list(mutate_tensors({"": value}, random_).values())
            if changed and isinstance(holder, dict):
                holder[key] = changed[0]
            continue
        match random_.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other, place = random_.choice(places)
                holder[key] = _as_lists(other.get(place) if isinstance(other, dict) else None)
            case 2 if isinstance(holder, dict):
                holder[odd_key(random_)] = holder.pop(key)
            case 3:
                holder[key] = random_.choice([torch.zeros(2), torch.tensor(1.5), torch.ones(0)])
            case _:
                holder[key] = odd_value(random_)
    return state


def odd_key(random_: random.Random) -> object:
    key = odd_value(random_)
    return str(key) if isinstance(key, (list, dict)) else key


def _as_lists(value: object) -> object:
    """A copy of nested containers, in which tuples are lists, around the same tensors."""
    if isinstance(value, dict):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------- files


def spoil(path: Path, random_: random.Random) -> str:
    """Put something else in a file's place, as no editor would; returns what."""
    kind = random_.choice(["missing", "folder", "loop", "dangling", "null", "not ours"])
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name("elsewhere"))
    else:
        path.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nothing-there")
        case "null":
            path.symlink_to("/dev/null")
        case "not ours":
            path.symlink_to("/proc/self/mem")  # opens, and cannot be read
    return kind
