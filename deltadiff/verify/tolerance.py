"""How an output is held against the truth: the rule of `deltadiff verify`.

Close. The error of an output is the Frobenius norm of (output - truth) over that of the truth,
the truth being `deltadiff.ops.reference` in float64. It may be twice (gradients: three times) the
error of eager PyTorch in the same dtype, plus one rounding of the output: half an epsilon of its
dtype.
One wrong element in a million fails too: the largest error, over the largest element of the truth,
may be twice what the same rule makes of eager PyTorch's; ``worst`` is that error over its limit.

Equal. What has one right answer (two runs, what must not change, the random bits) is compared bit
by bit: the error is the share of elements that differ, the limit 0.

NaN never passes.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checks import DTYPES, HALF_DTYPES, dtype_name
from ..errors import BackendUnavailableError
from ..ops.dispatch import choose_path
from ..text import align_columns

FORWARD, GRADIENT = 2, 3  # how many times the error of eager PyTorch is accepted


@dataclass(frozen=True)
class Row:
    """One check. ``eager``, ``ratio`` and ``worst`` are None where bits are compared."""

    op: str
    output: str
    dtype: str
    shape: str
    path: str
    seed: int
    error: float | None = None
    eager: float | None = None
    limit: float | None = None
    worst: float | None = None
    ok: bool | None = None  # None: skipped, and `note` says why
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.error / self.eager if self.eager else None

    def as_dict(self) -> dict:
        """For JSON, which has no NaN: a number that is not finite becomes its name."""
        values = {**asdict(self), "ratio": self.ratio}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = str(value)
        return values


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, and a line that counts them."""
    head = ("operation", "output", "dtype", "shape", "path", "error", "eager", "ratio", "limit")
    table = [(*head, "worst", "ok")]
    for row in rows:
        numbers = (row.error, row.eager, row.ratio, row.limit, row.worst)
        texts = (
            "" if number is None else format(number, spec)
            for number, spec in zip(numbers, (".1e", ".1e", ".2f", ".1e", ".2f"), strict=True)
        )
        ok = {True: "yes", False: f"NO {row.note}", None: row.note}[row.ok]
        table.append((row.op, row.output, row.dtype, row.shape, row.path, *texts, ok))
    lines = [align_columns(table)]
    passed, failed, skipped = (sum(row.ok is ok for row in rows) for ok in (True, False, None))
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    lines.append(f"{passed} passed, {failed} failed, {skipped} skipped; seed {seeds}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Bench:
    """Where operations are checked, and how thoroughly."""

    device: torch.device
    backend: str | None
    quick: bool
    seed: int

    def case(
        self,
        op: str,
        dtypes: Sequence[torch.dtype],
        shape: str,
        layer: tuple[int, int, int] | None = None,
    ) -> "Case":
        """``layer``: as `choose_path` takes it."""
        # float64 is the reference's alone: there is no asking another backend for it.
        asked = None if dtypes[0] == torch.float64 else self.backend
        label = "/".join(dict.fromkeys(dtype_name(dtype) for dtype in dtypes))
        path, why_not = asked, ""
        try:
            path = choose_path(self.device, dtypes[0], asked, layer).backend
        except BackendUnavailableError as error:
            why_not = error.given
        return Case(op, label, shape, path, self.device, self.seed, why_not)

    def dtypes(self) -> list[tuple[torch.dtype, torch.dtype]]:
        """Of the large tensors and of what goes with them: the same, or float32 beside 16 bits."""
        mixed = [] if self.quick else [(dtype, torch.float32) for dtype in HALF_DTYPES]
        return [(dtype, dtype) for dtype in DTYPES] + mixed

    def shapes(self, quick: list, full: list, gpu: list, quick_gpu: Sequence = ()) -> list:
        on_gpu = self.device.type == "cuda"
        few = quick + (list(quick_gpu) if on_gpu else [])
        return few if self.quick else few + full + (gpu if on_gpu else [])


class Case:
    """Inputs, a function of the seed and the names of the case alone, and checks of outputs.

    ``why_not``: the reason for leaving the case out, where there is one.
    """

    def __init__(
        self, op: str, dtype: str, shape: str, path: str, device, seed: int, why_not: str = ""
    ):
        self.op, self.dtype, self.shape, self.seed = op, dtype, shape, seed
        self.path, self.device, self.why_not = path, device, why_not
        interpreted = path == "triton" and device.type == "cpu"
        if not why_not and interpreted and dtype.startswith("bfloat16"):
            self.why_not = "Triton's interpreter gets bfloat16 products and rounding wrong"
        self.random = random.Random(f"{seed} {op} {dtype} {shape}")
        self.generator = torch.Generator(device).manual_seed(self.random.getrandbits(63))

    @property
    def names(self) -> dict:
        """What the fields of a row have in common; ``path`` is what runs, and may be changed."""
        keys = ("op", "dtype", "shape", "path", "seed")
        return {key: getattr(self, key) for key in keys}

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype) -> Tensor:
        made = torch.randn(shape, **self._draw(dtype))
        return (made * std).to(dtype)

    def uniform(self, *shape: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
        made = torch.rand(shape, **self._draw(dtype))
        return (low + (high - low) * made).to(dtype)

    def integers(self, *shape: int, most: int, dtype: torch.dtype) -> Tensor:
        made = torch.randint(-most, most + 1, shape, **self._draw(torch.int64))
        return made.to(dtype)

    def _draw(self, dtype: torch.dtype) -> dict:
        dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
        return {"dtype": dtype, "device": self.device, "generator": self.generator}

    def close(
        self,
        output: str,
        ours: Sequence[Tensor],
        eager: Sequence[Tensor],
        truth: Sequence[Tensor],
        *,
        factor: int = FORWARD,
        floor: float | None = None,
        shape: str | None = None,
    ) -> Row:
        """Lists of tensors, measured as if each list were one tensor."""
        names = {**self.names, "output": output, "shape": shape or self.shape}
        if [(t.dtype, t.shape) for t in ours] != [(t.dtype, t.shape) for t in eager]:
            return Row(**names, error=math.inf, ok=False, note="wrong dtype or shape")
        if floor is None:
            floor = torch.finfo(eager[0].dtype).eps / 2
        error, worst = measure(ours, truth)
        eager_error, eager_worst = measure(eager, truth)
        limit, worst = factor * eager_error + floor, worst / (factor * eager_worst + floor) / 2
        figures = {"error": error, "eager": eager_error, "limit": limit, "worst": worst}
        if not limit < 0.1:
            return Row(
                **names, **figures, ok=False, note="eager PyTorch is too far off to judge by"
            )
        return Row(**names, **figures, ok=error <= limit and worst <= 1)

    def equal(self, output: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
        """Bit by bit, NaN included."""
        wrong = sum(differing(a, b) for a, b in zip(ours, expected, strict=True))
        total = sum(t.numel() for t in expected)
        error = wrong / total if total else math.nan
        return Row(**self.names, output=output, error=error, limit=0.0, ok=error == 0)

    def guard(
        self, rows: Callable[..., Iterable[Row]], *args, output: str = "all"
    ) -> Iterator[Row]:
        """``rows(self, *args)``; a failed row where the operation raises, or a skipped one."""
        if self.why_not:
            yield Row(**self.names, output=output, note=f"skipped: {self.why_not}")
            return
        try:
            yield from rows(self, *args)
        except Exception as error:  # whatever a backend raises is a failure of its operation
            text = " ".join(str(error).split())
            note = f"{type(error).__name__}: {text:.200}"
            yield Row(**self.names, output=output, ok=False, note=note)


def measure(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """(Frobenius norm of the error, its largest element), over the same two of the truth."""
    figures = []
    for output, true in zip(outputs, truth, strict=True):
        error = output.double() - true
        pair = (error.square().sum(), true.square().sum(), error.abs().max(), true.abs().max())
        figures.append(torch.stack(pair))
    figures = torch.stack(figures)  # on tensors NaN is kept; Python's max would lose it
    squares, largest = figures[:, :2].sum(0), figures[:, 2:].amax(0)
    return (squares[0] / squares[1]).sqrt().item(), (largest[0] / largest[1]).item()


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements differ in a bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return b.numel()
    as_bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return (a.contiguous().view(as_bits) != b.contiguous().view(as_bits)).sum().item()


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory allocated inside is filled with NaN, so that an element never written shows."""
    flags = torch.utils.deterministic
    fill, mode = flags.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operations that have no deterministic form
            torch.set_deterministic_debug_mode("warn")
            flags.fill_uninitialized_memory = True
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        flags.fill_uninitialized_memory = fill
