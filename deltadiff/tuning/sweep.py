"""Which launch configurations are faster than the defaults on a GPU.

A case is one call: forward or backward of a LoRA linear, or the update of a list of weights. For
each configuration that it asks for there is a short list of candidates. They are compiled in
parallel processes, where one that does not fit the GPU, crashes or hangs does no harm. What then
gives the default's result takes turns with it as CUDA graphs.
"""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bench.timing import failure, graphed, sample
from ..checks import dtype_name
from ..kernels import delta_update
from ..kernels.runtime import tuned
from ..kernels.runtime.tuned import Launch, Rows
from ..ops.dispatch import LAUNCHERS, Layer, choose_path, kernel_at, runs_of

MARGIN = 0.02  # a candidate that is faster by less could be one by chance


ROUNDS, CALLS = 7, 5


WORKERS = 8  # each holds a CUDA context


LAYERS = 8  # of an update: more bytes than any cache holds


LAYER = 4096


SCALING = 2.0


Call = Callable[[], list[Tensor]]


Entries = dict[str, int]


def _grid(**lists: Iterable[int]) -> list[Entries]:
    """Every combination of the entries' values."""
    combined: list[Entries] = [{}]
    for name, values in lists.items():
        combined = [{**entries, name: value} for entries in combined for value in values]
    return combined


# What does not fit the GPU or the rank is left out when it is tried.
CANDIDATES = {
    "lora_linear_hopper": [
        {"BLOCK_SIZE_N": width, "STAGES": stages, "GROUP_SIZE_M": rows}
        for width, stages in ((256, 3), (128, 5), (128, 4))
        for rows in (4, 8, 16, 32)
    ],
    "lora_linear_fwd": [
        {"BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in (
            (32, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4), (128, 32, 4, 4),
            (128, 64, 8, 3), (128, 64, 8, 4), (256, 32, 8, 4), (256, 64, 8, 3),
        )
    ],
    "lora_linear_down": _grid(BLOCK_SIZE_M=(16, 32, 64), num_warps=(4, 8), num_stages=(3, 4)),
    "lora_linear_few": _grid(
        BLOCK_SIZE_N=(32, 64, 128), BLOCK_SIZE_K=(64, 128), num_warps=(4, 8), num_stages=(3, 4)
    ),
    "lora_linear_wgrad": _grid(BLOCK_SIZE_C=(64, 128), num_warps=(4, 8), num_stages=(3, 4)),
    "delta_update": [
        {"BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "TILES": 1024 // k, "num_stages": stages}
        for n, k in ((32, 64), (64, 64), (32, 128), (64, 128))
        for stages in (2, 3, 4)
    ],
}  # fmt: skip


# --------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Linear:
    """Forward or backward of a layer: M tokens, K in, N out, rank r."""

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype
    backward: bool

    def __str__(self) -> str:
        mode = "backward" if self.backward else "forward"
        return f"lora_linear {self.m}x{self.k}x{self.n} r{self.r} {dtype_name(self.dtype)} {mode}"

    @property
    def kind(self) -> tuple:
        """Cases of one kind have kernels in common, whatever their sizes."""
        few = min(self.m, 256)  # up to here, the default blocks depend on the number of tokens
        return Linear, few, self.r, self.dtype, self.backward

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        shapes = (self.m, self.k), (self.n, self.k), (self.r, self.k), (self.n, self.r)
        randn = functools.partial(torch.randn, device=device, dtype=self.dtype)
        x, weight, lora_A, lora_B = (randn(shape) for shape in shapes)
        layer = x, weight / self.k**0.5, lora_A / self.k**0.5, lora_B
        if not self.backward:
            return layer
        kept = self._kernels(device).lora_linear_fwd(*layer, SCALING, None, None)[1]
        return randn(self.m, self.n), *layer, kept

    def call(self, inputs: tuple) -> Call:
        kernels = self._kernels(inputs[0].device)
        if self.backward:
            needs = True, True, True, False
            return lambda: list(kernels.lora_linear_bwd(*inputs, SCALING, None, needs)[:3])
        # What else it keeps has gone into y.
        return lambda: [kernels.lora_linear_fwd(*inputs, SCALING, None, None)[0]]

    def _kernels(self, device: torch.device):
        """The launchers of the kernel that runs this case; on the CPU, of the Triton kernel."""
        layer = self.n, self.k, self.r
        chosen = choose_path(device, self.dtype, layer=layer).backend
        backend = "hopper" if chosen == "hopper" else "triton"
        return LAUNCHERS[kernel_at(runs_of(backend, Layer(*layer, self.dtype)), self.m).name]

    def agree(self, found: list[Tensor], usual: list[Tensor]) -> bool:
        """To one rounding of the dtype: sums may be in another order."""
        pairs = [(f.float(), u.float()) for f, u in zip(found, usual, strict=True)]
        limit = torch.finfo(self.dtype).eps / 2
        return all(((f - u).norm() <= limit * u.norm()).item() for f, u in pairs)


@dataclass(frozen=True)
class Update:
    """The update of W for a list of layers with adapters of rank r."""

    r: int
    dtype: torch.dtype
    rounding: str
    size: int = LAYER

    def __str__(self) -> str:
        shape = f"{LAYERS} x {self.size}x{self.size} r{self.r}"
        return f"delta_update {shape} {dtype_name(self.dtype)} {self.rounding}"

    @property
    def kind(self) -> tuple:
        return Update, self.r, self.dtype, self.rounding

    def inputs(self, device: torch.device) -> tuple[list[Tensor], ...]:
        torch.manual_seed(0)
        randn = functools.partial(torch.randn, device=device)
        size, r = self.size, self.r
        weights = [(randn(size, size) * 0.02).to(self.dtype) for _ in range(LAYERS)]
        factors = [(randn(r, size), randn(size, r)) for _ in range(2 * LAYERS)]
        As, Bs = zip(*factors[:LAYERS], strict=True)
        delta_As, delta_Bs = zip(*((a * 1e-3, b * 1e-3) for a, b in factors[LAYERS:]), strict=True)
        return weights, *map(list, (As, Bs, delta_As, delta_Bs))

    def call(self, inputs: tuple) -> Call:
        weights = [w.clone() for w in inputs[0]]
        low = []
        if self.rounding == "remainder":
            low_dtype = torch.int16 if self.dtype == torch.bfloat16 else self.dtype
            low = [torch.zeros_like(w, dtype=low_dtype) for w in weights]
        scales, step = [SCALING] * LAYERS, torch.zeros_like(weights[0][0, 0], dtype=torch.int64)
        update = delta_update.DeltaUpdate(weights, *inputs[1:], scales, self.rounding, low, 0)

        def call() -> list[Tensor]:
            update(step, None)
            return weights + low

        return call

    def agree(self, found: list[Tensor], usual: list[Tensor]) -> bool:
        """To the bit: blocks do not change this result."""
        return all(map(torch.equal, found, usual))


Case = Linear | Update


# ------------------------------------------------------------------------- compile


def _run_once(case: Case, device: torch.device, table: Rows) -> tuple[Launch, ...]:
    """Compile and run a case; the launches that it asks a configuration for."""
    tuned.use(device, {})
    inputs = case.inputs(device)
    tuned.use(device, table)
    launches = tuned.asked(lambda: case.call(inputs)())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tuple(launches)


Trial = tuple[tuple, str, frozenset]  # the kind of a case, an operation, entries


def _trial(case: Case, op: str, entries: Entries) -> Trial:
    return case.kind, op, frozenset(entries.items())


def try_out(
    cases: Iterable[Case], device: torch.device, until: float, workers: int = WORKERS
) -> tuple[set[Trial], list[str]]:
    """(what compiles and runs, why a default did not), one case of each kind standing for all.

    Args:
        until: by `time.monotonic`; what is not ready then does not count as running.
        workers: processes at most.
    """
    first = {case.kind: case for case in reversed(list(cases))}.values()
    workers = min(workers, len(os.sched_getaffinity(0)))
    good, notes, trials = set(), [], []
    # Leaving this block ends the processes, also one that hangs.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        defaults = [(case, pool.apply_async(_run_once, (case, device, {}))) for case in first]
        for case, default in defaults:
            try:
                launches = default.get(max(0.0, until - time.monotonic()))
            except Exception as error:
                notes.append(f"{case}: {failure(error)}")
                continue
            for op, launch in {launch.op: launch for launch in launches}.items():
                for entries in CANDIDATES[op]:
                    job = pool.apply_async(_run_once, (case, device, {launch: entries}))
                    trials.append((_trial(case, op, entries), job))
        for trial, job in trials:
            try:
                job.get(max(0.0, until - time.monotonic()))
                good.add(trial)
            except Exception:  # does not fit, or is not ready in time
                continue
    return good, notes


# ------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Clock:
    """How candidates are timed.

    ``freeze`` makes a call that keeps the configuration of now; ``times`` gives the seconds of each
    of some such calls, one number a round.
    """

    freeze: Callable[[Call], Call]
    times: Callable[[list[Call], torch.device], list[list[float]]]


def _times(calls: list[Call], device: torch.device) -> list[list[float]]:
    for call in calls:
        sample(call, 2, device)
    rounds = [
        [statistics.median(sample(call, CALLS, device)) for call in calls] for _ in range(ROUNDS)
    ]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


GPU_CLOCK = Clock(graphed, _times)


@dataclass(frozen=True)
class Finding:
    """What came of one launch of a case; ``entries``, where empty, are the default's."""

    launch: Launch
    default: dict
    entries: Entries
    default_s: float
    speedup: float
    tried: int


def sweep(
    case: Case, device: torch.device, good: Collection[Trial] | None = None, clock=GPU_CLOCK
) -> list[Finding]:
    """Each launch of a case in turn, those before it as they were found best.

    Args:
        good: the trials to take candidates from; None is all.
    """
    tuned.use(device, {})
    inputs, table, findings = case.inputs(device), {}, []
    try:
        usual = case.call(inputs)()
        for launch, default in tuned.asked(lambda: case.call(inputs)()).items():
            calls, tried = [_frozen(case, inputs, device, table, clock)], [{}]
            for entries in CANDIDATES[launch.op]:
                known = good is None or _trial(case, launch.op, entries) in good
                if not known or entries.items() <= default.items():
                    continue
                try:
                    changed = {**table, launch: entries}
                    call = _frozen(case, inputs, device, changed, clock, usual)
                except Exception:  # fits the case of its kind that was tried, but not this one
                    continue
                if call is not None:
                    calls.append(call)
                    tried.append(entries)
            found = clock.times(calls, device)
            best, speedup = max(range(len(calls)), key=lambda i: _speedup(found, i)), 1.0
            if best:  # the fastest of many is so by luck too: once more, alone with the default
                again = clock.times([calls[0], calls[best]], device)
                speedup = min(_speedup(found, best), _speedup(again, 1))
            entries = tried[best] if speedup > 1 + MARGIN else {}
            entries = {k: v for k, v in entries.items() if default[k] != v}
            if entries:
                table[launch] = entries
            seconds = statistics.median(found[0])
            findings.append(Finding(launch, default, entries, seconds, speedup, len(calls) - 1))
    finally:
        tuned.use(device, None)
    return findings


def _frozen(case, inputs, device, table, clock, usual=None) -> Call | None:
    """The call under ``table``; None where it does not give the ``usual`` result, twice over."""
    tuned.use(device, table)
    if usual is not None:
        found = case.call(inputs)()
        again = case.call(inputs)()
        if not case.agree(found, usual) or not all(map(torch.equal, found, again)):
            return None
    return clock.freeze(case.call(inputs))


def _speedup(found: list[list[float]], i: int) -> float:
    """Of call i over call 0: the median of the rounds' ratios, which drifting clocks leave."""
    return statistics.median(a / b for a, b in zip(found[0], found[i], strict=True))
