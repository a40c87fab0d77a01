"""How an output is compared with the truth: the rule of `deltadiff verify`.

Close: the truth is `deltadiff.ops.reference` in float64. The error of an output is the Frobenius
norm of (output - truth) over that of the truth. It may be at most twice the error of eager PyTorch
in the same dtype (three times for gradients), plus one rounding of the output, which is half an
epsilon of its dtype. So that one wrong element in a million fails too, the largest error of an
element, over the largest element of the truth, has a limit as well: twice the limit that the same
rule derives from eager PyTorch's largest error. ``worst`` is that error over its limit.

Equal: results that have one right answer (two runs, what must not change, the random bits) are
compared bit by bit. The error is the share of elements that differ, and the limit is 0.

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
from ..ops.dispatch import FP8_PRODUCTS, choose_path
from ..text import align_columns

FORWARD, GRADIENT = 2, 3  # the accepted multiples of eager PyTorch's error
NO_MEASURE = "eager PyTorch is too far off to judge by"


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
    ok: bool | None = None  # None where the check was skipped; `note` says why
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.error / self.eager if self.eager else None

    def as_dict(self) -> dict:
        """The fields for JSON, which has no NaN: a number that is not finite becomes its name."""
        values = {**asdict(self), "ratio": self.ratio}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = str(value)
        return values


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a table, and a line that counts them."""
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
    """Where operations are checked, and how thoroughly.

    Attributes:
        backend: the backend that is asked for; None is the one that `choose_path` takes.
        quick: small shapes only, and no float32 beside 16-bit tensors.
        seed: of the inputs.
    """

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
        dropout: bool = False,
        tokens: int = 0,
        fp8_block: tuple[int, int] | None = None,
    ) -> "Case":
        """The case of these tensors, on the backend that `choose_path` takes for it.

        Args:
            dtypes: of the large tensors, and of those that go with them.
            layer, dropout: as `choose_path` takes them.
            tokens: of a call of `lora_linear`, which may run on another backend's kernel.
            fp8_block: of a weight whose case is about products in FP8.
        """
        # Only the reference takes float64, so no other backend is asked for it.
        asked = None if dtypes[0] == torch.float64 else self.backend
        label = "/".join(dict.fromkeys(dtype_name(dtype) for dtype in dtypes))
        if fp8_block is not None:
            asked = self.backend or "fp8"
            if asked not in FP8_PRODUCTS:
                why = f"{self.backend!r} was asked for"
                return Case(op, label, shape, asked, self.device, self.seed, why_not=why)
        try:
            chosen = choose_path(self.device, dtypes[0], asked, layer, dropout, fp8_block=fp8_block)
        except BackendUnavailableError as error:
            return Case(op, label, shape, asked, self.device, self.seed, why_not=error.given)
        path = chosen.at(tokens).backend if layer else chosen.backend
        return Case(op, label, shape, path, self.device, self.seed, backend=chosen.backend)

    def dtypes(self) -> list[tuple[torch.dtype, torch.dtype]]:
        """Pairs of dtypes, of the large tensors and of those that go with them.

        The two are the same, or float32 goes with 16-bit tensors.
        """
        mixed = [] if self.quick else [(dtype, torch.float32) for dtype in HALF_DTYPES]
        return [(dtype, dtype) for dtype in DTYPES] + mixed

    def shapes(self, quick: list, full: list, gpu: list, quick_gpu: Sequence = ()) -> list:
        on_gpu = self.device.type == "cuda"
        few = quick + (list(quick_gpu) if on_gpu else [])
        return few if self.quick else few + full + (gpu if on_gpu else [])


class Case:
    """Inputs, which are a function of the seed and the names of the case, and checks of outputs.

    Args:
        path: the backend whose kernel runs the case, which the rows name.
        why_not: the reason for skipping the case, where there is one.
        backend: what the operation is asked for; None is ``path``.
    """

    def __init__(
        self, op: str, dtype: str, shape: str, path: str, device: torch.device, seed: int,
        why_not: str = "", backend: str | None = None,
    ):  # fmt: skip
        self.op, self.dtype, self.shape, self.seed = op, dtype, shape, seed
        self.path, self.device, self.why_not = path, device, why_not
        self.backend = backend or path
        interpreted = path == "triton" and device.type == "cpu"
        if not why_not and interpreted and dtype.startswith("bfloat16"):
            self.why_not = "Triton's interpreter gets bfloat16 products and rounding wrong"
        self.random = random.Random(f"{seed} {op} {dtype} {shape}")
        self.generator = torch.Generator(device).manual_seed(self.random.getrandbits(63))

    @property
    def names(self) -> dict:
        """The fields that all rows of the case have in common."""
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
        """Compare lists of tensors, each measured as if it were one tensor, by the rule above.

        Args:
            ours, eager, truth: the outputs of the operation, of eager PyTorch, and in float64.
            factor: the accepted multiple of eager PyTorch's error.
            floor: what is accepted on top of that; None is one rounding of the output.
            shape: for the row; None is the case's.
        """
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
            return Row(**names, **figures, ok=False, note=NO_MEASURE)
        return Row(**names, **figures, ok=error <= limit and worst <= 1)

    def equal(self, output: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
        """Compare lists of tensors bit by bit, NaN included."""
        wrong = sum(differing(a, b) for a, b in zip(ours, expected, strict=True))
        total = sum(t.numel() for t in expected)
        error = wrong / total if total else math.nan
        return Row(**self.names, output=output, error=error, limit=0.0, ok=error == 0)

    def guard(
        self, rows: Callable[..., Iterable[Row]], *args, output: str = "all"
    ) -> Iterator[Row]:
        """The rows of ``rows(self, *args)``.

        One failed row takes their place where the operation raises, and one skipped row where the
        case has a reason to be skipped.
        """
        if self.why_not:
            yield Row(**self.names, output=output, note=f"skipped: {self.why_not}")
            return
        try:
            yield from rows(self, *args)
        except Exception as error:  # anything that a backend raises is a failure of its operation
            text = " ".join(str(error).split())
            note = f"{type(error).__name__}: {text:.200}"
            yield Row(**self.names, output=output, ok=False, note=note)


def measure(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """(Frobenius norm of the error, its largest element), each over the same of the truth."""
    figures = []
    for output, true in zip(outputs, truth, strict=True):
        error = output.double() - true
        pair = (error.square().sum(), true.square().sum(), error.abs().max(), true.abs().max())
        figures.append(torch.stack(pair))
    figures = torch.stack(figures)  # tensors keep NaN, which Python's max would lose
    squares, largest = figures[:, :2].sum(0), figures[:, 2:].amax(0)
    return (squares[0] / squares[1]).sqrt().item(), (largest[0] / largest[1]).item()


def differing(a: Tensor, b: Tensor) -> int:
    """The number of elements that differ in a bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return b.numel()
    as_bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return (a.contiguous().view(as_bits) != b.contiguous().view(as_bits)).sum().item()


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that is allocated inside with NaN, so that elements never written show."""
    flags = torch.utils.deterministic
    fill, mode = flags.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about operations without deterministic form
            torch.set_deterministic_debug_mode("warn")
            flags.fill_uninitialized_memory = True
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        flags.fill_uninitialized_memory = fill
