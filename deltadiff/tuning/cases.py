"""The calls that are tuned: forward or backward of a LoRA linear layer, and updates of W.

Each case makes its inputs, runs the kernels on them, and says whether two results agree.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bench.models import build_model, shape_of_file
from ..checks import REMAINDER_DTYPES, ROUNDINGS, dtype_name
from ..kernels import delta_update
from ..kernels.runtime.tuned import padded_rank
from ..ops.backends import LAUNCHERS
from ..ops.dispatch import Layer, choose_path, kernel_at, runs_of

LAYERS = 8  # of an update: more bytes than any cache holds
LAYER = 4096  # in and out of each of them
SCALING = 2.0

Call = Callable[[], list[Tensor]]


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
        """The same for all cases that run the same kernels, whatever their sizes."""
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
        # The product that it keeps for the backward pass has gone into y.
        return lambda: [kernels.lora_linear_fwd(*inputs, SCALING, None, None)[0]]

    def _kernels(self, device: torch.device):
        """The launchers of the kernel that runs this case; on the CPU, of the Triton kernel."""
        layer = self.n, self.k, self.r
        chosen = choose_path(device, self.dtype, layer=layer).backend
        backend = "hopper" if chosen == "hopper" else "triton"
        return LAUNCHERS[kernel_at(runs_of(backend, Layer(*layer, self.dtype)), self.m).name]

    def agree(self, found: list[Tensor], usual: list[Tensor]) -> bool:
        """Whether they differ by one rounding of the dtype at most: sums may be reordered."""
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
        remainders = []
        if self.rounding == "remainder":
            dtype = REMAINDER_DTYPES[self.dtype]
            remainders = [torch.zeros_like(w, dtype=dtype) for w in weights]
        scales, step = [SCALING] * LAYERS, torch.zeros_like(weights[0][0, 0], dtype=torch.int64)
        update = delta_update.DeltaUpdate(
            weights, *inputs[1:], scales, self.rounding, remainders, 0
        )

        def call() -> list[Tensor]:
            update(step, None)
            return weights + remainders

        return call

    def agree(self, found: list[Tensor], usual: list[Tensor]) -> bool:
        """Whether they are equal bit by bit: the blocks of a launch do not change this result."""
        return all(map(torch.equal, found, usual))


Case = Linear | Update


def cases_of(
    shapes: Iterable[tuple[int, int, int]], ranks: Iterable[int], dtype: torch.dtype
) -> list[Case]:
    """Forward and backward of every shape (tokens, in, out) and rank, and the updates of W.

    Ranks that share a row of the table are tuned once, with the last of them.
    """
    linears = [
        Linear(*shape, r, dtype, backward)
        for r in _distinct(ranks, 1)
        for shape in shapes
        for backward in (False, True)
    ]
    # W's update multiplies A and B beside their changes: two columns for each rank.
    updates = [Update(r, dtype, rounding) for r in _distinct(ranks, 2) for rounding in ROUNDINGS]
    return linears + updates


def _distinct(ranks: Iterable[int], columns: int) -> list[int]:
    """One of the ranks for each row, where a kernel's product has ``columns`` columns per rank."""
    return list({padded_rank(columns * r): r for r in ranks}.values())


def layer_sizes(config: Path) -> list[tuple[int, int]]:
    """(in, out) of a model's linear layers, once each, without its head, which is not adapted."""
    model = build_model(shape_of_file(config), torch.bfloat16, torch.device("meta"))
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return list(dict.fromkeys((m.in_features, m.out_features) for m in layers))
