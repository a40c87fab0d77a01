"""Random calls of `gated_mlp`: behind an RMSNorm, over few bits, under checkpointing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops.gated_mlp import gated_mlp
from ...ops.reference_blocks import ACTIVATIONS, LowRankLinear, gated_mlp_ref, rms_norm_ref
from ...ops.rms_norm import rms_norm
from ..gated_mlp import EPS, Block, block_outputs
from ..tolerance import FORWARD, GRADIENT, Case, Row
from .compare import compare, same_bits, undisturbed
from .draws import Draw
from .lora_linear import OUTPUTS, Call, draw_call, numbers_of, repeats_of
from .memory import GuardedAllocations, Layout, Memory
from .quantised import Format, draw_four_bit, draw_fp8

FEWEST_NORMED = 8  # features; of one feature, an RMSNorm makes its sign


@dataclass(frozen=True)
class BlockCall:
    """What a call is, apart from its numbers.

    Attributes:
        layer: of the first inner layer; the other layers have the same ranks, gates, layouts.
        joint: whether one inner layer computes both outputs.
        normed: whether the block reads what `rms_norm` gives, and makes it again.
        stored: how the weights are stored; None is as matrices.
        n: out_features of the outer layer.
    """

    layer: Call
    activation: str
    joint: bool
    normed: bool
    checkpointed: bool
    stored: Format | None
    n: int

    def __str__(self) -> str:
        words = ("joint", "normed", "checkpointed")
        text = f"{self.activation} {self.layer} to {self.n}"
        text += "".join(f" {word}" for word in words if getattr(self, word))
        return text + (f" {self.stored}" if self.stored else "")

    def sizes(self) -> list[tuple[int, int]]:
        """(out, in) of each layer."""
        k, i = self.layer.k, self.layer.n
        return [*([(2 * i, k)] if self.joint else [(i, k)] * 2), (self.n, i)]

    def wanted(self) -> list[str]:
        """The names of what gets a gradient."""
        missing = {"gate"} if self.layer.gate is None else set()
        missing |= set() if self.layer.bias else {"bias"}
        return [name for name in self.layer.wanted if name not in missing] or ["x"]


def draw_block(draw: Draw, path: str, dtypes: tuple, device: torch.device) -> BlockCall:
    """A call whose first inner layer runs on ``path``."""
    kind, size = draw.kind, draw.size
    while True:
        layer = draw_call(draw, path, dtypes, device)
        # The block has no dropout; and calls without tokens, which cost least, come up too often.
        if not layer.dropout and (layer.tokens or kind.chance(0.2)):
            break
    return BlockCall(
        layer=layer,
        activation=kind.choice(ACTIVATIONS),
        joint=kind.chance(0.3),
        normed=kind.chance(0.5) and layer.k >= FEWEST_NORMED,
        checkpointed=kind.chance(0.4),
        stored=kind.choice((None, None, draw_four_bit(draw), draw_fp8(draw))),
        n=size.choice((layer.k, layer.n)),  # which are such as the path takes
    )


def gated_mlp_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case."""
    call = draw_block(draw, path, dtypes, case.device)
    case.shape += f" {call}"
    ours, again, eager, truth = [], [], [], []
    disturbed = 0
    for i in range(repeats_of(call.layer.tokens, call.layer.k, call.layer.n, call.layer)):
        memory = Memory(case.random.choice((math.nan, math.inf, -math.inf)))
        given = _arguments(case, call, dtypes, memory, odd=i == 0)
        with GuardedAllocations() as guard:
            ours.append(_by_gated_mlp(given, call, call.checkpointed))
        if not again:
            again.append(_by_gated_mlp(given, call, False))
        disturbed += memory.disturbed() + guard.overrun()
        eager.append(_by_formula(given, call, None))
        truth.append(_by_formula(given, call, torch.float64))
    for output in truth[0]:
        columns = ([t for one in side for t in one[output]] for side in (ours, eager, truth))
        yield compare(case, output, *columns, factor=FORWARD if output == "y" else GRADIENT)
    same = "checkpointed and not" if call.checkpointed else "run to run"
    sides = ([t for ts in side[0].values() for t in ts] for side in (ours, again))
    yield same_bits(case, same, *sides)
    yield undisturbed(case, disturbed)


@dataclass(frozen=True)
class _Arguments:
    """Of one call. ``matrices`` are the weights that those of the layers stand for."""

    x: Tensor
    norm: Tensor
    dy: Tensor
    layers: list[LowRankLinear]
    matrices: list[Tensor]


def _arguments(case: Case, call: BlockCall, dtypes: tuple, memory: Memory, odd: bool) -> _Arguments:
    """Random tensors; where the call asks for them and ``odd``, one of them has a NaN."""
    layer, layers, matrices = call.layer, [], []
    x = dy = case.normal(0, dtype=dtypes[0])
    for number, (n, k) in enumerate(call.sizes()):
        one = replace(layer, n=n, k=k)
        numbers = numbers_of(case, one, dtypes)
        if odd and layer.odd and number == 0 and (t := numbers[layer.odd]).numel():
            t.view(-1)[case.random.randrange(t.numel())] = math.nan
        placed: dict[str, Any] = {}
        for name, t in numbers.items():
            placed[name] = memory.place(t, layer.layouts[name])
        x, dy = (placed["x"] if number == 0 else x), placed["dy"]
        matrix = placed["weight"]
        if call.stored:
            placed["weight"], matrix = call.stored.weight(case, memory, n, k, dtypes[0])
        fields = (placed.get(name) for name in LowRankLinear._fields[:-1])
        layers.append(LowRankLinear(*fields, layer.scaling))
        matrices.append(matrix)
    offset = Layout(offset=layer.layouts["bias"].offset)
    norm = memory.place(case.uniform(layer.k, low=0.5, high=1.5, dtype=dtypes[0]), offset)
    return _Arguments(x, norm, dy, layers, matrices)


def _by_gated_mlp(
    given: _Arguments, call: BlockCall, checkpointed: bool
) -> dict[str, list[Tensor]]:
    backends = [call.layer.asked] * len(given.layers)

    def block(x: Tensor, layers: list[LowRankLinear]) -> Tensor:
        x = x.view(*call.layer.leading, call.layer.k)
        y = rms_norm(x, given.norm, EPS) if call.normed else x
        y = gated_mlp(y, layers[:-1], layers[-1], call.activation, backends)
        return y.view(-1, call.n) if y.numel() else y.reshape(given.dy.shape)

    def run(x: Tensor, layers: list[LowRankLinear]) -> Tensor:
        return (
            checkpoint(block, x, layers, use_reentrant=False) if checkpointed else block(x, layers)
        )

    return _outputs(run, given, given.layers, call)


def _by_formula(
    given: _Arguments, call: BlockCall, dtype: torch.dtype | None
) -> dict[str, list[Tensor]]:
    """By eager PyTorch, in ``dtype`` instead of that of each tensor."""

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None or dtype is not None:
            return t if t is None else t.to(dtype)
        # Dense, because PyTorch gets some products of others wrong in this dtype.
        return t.contiguous() if t.dtype == torch.bfloat16 else t

    def block(x: Tensor, layers: list[LowRankLinear]) -> Tensor:
        y = rms_norm_ref(x, cast(given.norm), EPS)[0] if call.normed else x
        return gated_mlp_ref(y, layers[:-1], layers[-1], call.activation)

    pairs = zip(given.layers, given.matrices, strict=True)
    layers = [LowRankLinear(*map(cast, (w, *q[1:5])), q.scaling) for q, w in pairs]
    wide = replace(given, x=cast(given.x), dy=cast(given.dy))
    return _outputs(block, wide, layers, call)


def _outputs(
    block: Block, given: _Arguments, layers: list[LowRankLinear], call: BlockCall
) -> dict[str, list[Tensor]]:
    trained = {name: OUTPUTS[name] for name in call.wanted()}
    return block_outputs(block, given.x, layers, given.dy, trained)
