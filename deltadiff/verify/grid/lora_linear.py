"""Random calls of `lora_linear`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...ops import reference
from ...ops.dispatch import choose_path
from ...ops.lora_linear import lora_linear
from ...ops.quantised import Quantised
from ..tolerance import FORWARD, GRADIENT, Case, Row
from .compare import compare, same_bits, undisturbed
from .draws import RANKS, TOKENS, Dice, Draw
from .memory import DENSE, GuardedAllocations, Layout, Memory
from .paths import PACKED, backend_of, needs_packing

TRIES = 100_000  # a draw takes microseconds; most paths take one call in a few
NAMES = ("x", "weight", "lora_A", "lora_B", "gate", "bias", "dy")
# Gives W as the operation takes it, and as a matrix; the flag asks for values that are not finite.
Weights = Callable[[Case, Memory, "Call", bool], tuple[Quantised, Tensor]]
OUTPUTS = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "gate": "dgate", "bias": "dbias"}


@dataclass(frozen=True)
class Call:
    """What a call is, apart from its numbers.

    Attributes:
        asked: the backend that is asked for.
        divisor: of the numbers of features.
        range: the least and the largest number of tokens.
        gate: its shape; None is no gate.
        wanted: what gets a gradient.
        layouts: how each input lies in memory.
        odd: the input in which there are values that are not finite.
        leading: the leading dimensions of x.
    """

    asked: str
    divisor: int
    r: int
    range: tuple[int, int]
    gate: tuple[int, ...] | None
    gate_dtype: torch.dtype
    bias: bool
    dropout: float
    wanted: tuple[str, ...]
    layouts: dict[str, Layout]
    tokens: int = 0
    k: int = 1
    n: int = 1
    scaling: float = 1.7
    gate_values: str = "any"
    odd: str = ""
    leading: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        text = f"{list(self.leading)} tokens {self.k}x{self.n} r={self.r} s={self.scaling}"
        if self.gate is not None:
            text += f" gate={list(self.gate)} {self.gate_values} {str(self.gate_dtype)[6:]}"
        text += " bias" * self.bias + (f" p={self.dropout}" if self.dropout else "")
        text += f" odd {self.odd}" if self.odd else ""
        places = (f"{k}:{v}" for k, v in self.layouts.items() if v != DENSE)
        return " ".join((text, "for", *self.wanted, *places))


# ---------------------------------------------------------------------------- the draw


def draw_call(draw: Draw, path: str, dtypes: tuple, device: torch.device) -> Call:
    """A call that runs on ``path``."""
    for _ in range(TRIES):
        kind = _draw_kind(draw, path, dtypes)
        if _suits(_with_sizes(kind, draw.kind, draw), path, dtypes, draw, device):
            break
    for _ in range(TRIES):
        call = _with_sizes(kind, draw.size, draw)
        if _suits(call, path, dtypes, draw, device):
            return call
    raise RuntimeError(f"no call of lora_linear runs on {path}")


def _suits(call: Call, path: str, dtypes: tuple, draw: Draw, device: torch.device) -> bool:
    """Whether a call runs on ``path``, and costs no more than it may."""
    costs, repeats = draw.costs, repeats_of(call.tokens, call.k, call.n, call)
    products = repeats * call.tokens * call.k * call.n
    cheap = repeats <= costs.repeats and products <= 2 ** (costs.most_products + 1)
    return cheap and _path_of(call, dtypes, device) == path


def _draw_kind(draw: Draw, path: str, dtypes: tuple) -> Call:
    dice, backend = draw.kind, backend_of(path)
    r = dice.choice([r for r in RANKS if r <= draw.costs.rank])
    divisor = dice.choice((1, 1, 8, 16))
    aligned = dice.chance(0.6 if path == "hopper" else 0.3)
    layouts = {name: dice.layout(aligned or dice.chance(0.3)) for name in NAMES}
    if path == "reference" and dtypes[0] == torch.bfloat16:
        # PyTorch 2.13 itself takes the gaps between such rows for elements, on CPUs with AMX.
        layouts |= {name: DENSE for name in NAMES}
    for name in ("x", "dy"):
        if dice.chance(0.08):
            layouts[name] = layouts[name]._replace(transposed=False, expanded=True)
    gates = (None, (), (1,), (r,), (r,), (r,))
    wanted = tuple(name for name in OUTPUTS if dice.chance(0.9)) or ("x",)
    return Call(
        # The calls that the sm_90 kernel does not take go to the same kernels, by another way.
        asked=dice.choice(("triton", "hopper")) if backend == "triton" else backend,
        divisor=divisor,
        r=r,
        range=dice.choice(TOKENS),
        gate=dice.choice(gates),
        gate_dtype=dice.choice((dtypes[1], torch.float32)),
        bias=dice.chance(0.5),
        dropout=dice.choice((0.0, 0.0, 0.0, 0.1, 0.5, 0.9)),
        wanted=wanted,
        layouts=layouts,
    )


def _with_sizes(kind: Call, dice: Dice, draw: Draw) -> Call:
    costs = draw.costs
    tokens = min(costs.tokens, dice.between(*kind.range)) if kind.range[1] else 0
    k, n = dice.matrix(costs, tokens, kind.divisor)
    leading = dice.choice([(tokens,), _split(tokens, dice), (1, tokens), (tokens, 1)])
    odd = [name for name in NAMES if name != "gate" or kind.gate is not None]
    odd.remove("bias") if not kind.bias else None
    odd = dice.choice(odd) if dice.chance(0.12) else ""
    scalings = (1.7, 1.7, -0.6, 0.01) + ((0.0,) if not odd else ())  # 0 times NaN may be 0
    return replace(
        kind, tokens=tokens, k=k, n=n, leading=leading if tokens != 1 or dice.chance(0.5) else (),
        scaling=dice.choice(scalings),
        gate_values=dice.choice(("any", "any", "zero", "negative", "some zero")),
        odd=odd,
    )  # fmt: skip


def _split(tokens: int, dice: Dice) -> tuple[int, ...]:
    divisors = [d for d in range(1, tokens + 1) if tokens % d == 0] or [0]
    one = dice.choice(divisors)
    return one, (tokens // one if one else dice.choice((0, 3)))


def repeats_of(tokens: int, k: int, n: int, call: Call) -> int:
    """How often numbers are drawn: the error of few numbers is luck, so there should be 32."""
    fewest = min(n, k * call.r, tokens * min(n, k, call.r))
    if call.gate is not None:
        fewest = min(fewest, math.prod(call.gate))
    return math.ceil(32 / fewest) if tokens else 1


def _path_of(call: Call, dtypes: tuple, device: torch.device) -> str | None:
    """The path of a call; None for one that its backend does not take."""
    try:
        chosen = choose_path(
            device, dtypes[0], call.asked, (call.n, call.k, call.r), call.dropout > 0
        )
    except ValueError:
        return None
    label = chosen.at(call.tokens).label
    if label != "hopper":
        return label
    plain = all(call.layouts[name].fits_tma() for name in ("lora_A", "lora_B"))
    return label if dtypes[0] == dtypes[1] and plain and call.r % 8 == 0 else PACKED


# ---------------------------------------------------------------------------- the case


def lora_linear_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case."""
    call = draw_call(draw, path, dtypes, case.device)
    case.shape += f" {call}"
    yield from rows_of_call(case, call, path, dtypes)


def rows_of_call(
    case: Case, call: Call, path: str, dtypes: tuple, weights: Weights | None = None
) -> Iterator[Row]:
    """The rows of a call; ``weights`` draws W in a format of its own, and W as a matrix."""
    options = {"scaling": call.scaling, "dropout": call.dropout}
    wanted = [name for name in call.wanted if name in _present(call)] or ["x"]
    ours, again, eager, truth = [], [], [], []
    disturbed = 0
    for i in range(repeats_of(call.tokens, call.k, call.n, call)):
        memory = Memory(case.random.choice((math.nan, math.inf, -math.inf)))
        values = numbers_of(case, call, dtypes, odd=call.odd if i == 0 else "")
        given = {name: memory.place(t, call.layouts[name]) for name, t in values.items()}
        taken = given
        if weights is not None:
            weight, given["weight"] = weights(case, memory, call, i == 0 and call.odd == "weight")
            taken = {**given, "weight": weight}
        if path in ("hopper", PACKED):
            packed = needs_packing(given["lora_A"], given["lora_B"], dtypes[0])
            assert packed == (path == PACKED), "a case of another path"
        seed = {"seed": case.random.getrandbits(64) - 2**63}
        with GuardedAllocations() as guard:
            ours.append(
                outputs(lora_linear, taken, call, wanted, **options, **seed, backend=call.asked)
            )
        if not again:
            again.append(
                outputs(lora_linear, taken, call, wanted, **options, **seed, backend=call.asked)
            )
        disturbed += memory.disturbed() + guard.overrun()
        eager_given = given
        if dtypes[0] == torch.bfloat16:  # dense, because PyTorch gets some of its products wrong
            eager_given = {name: t.contiguous() for name, t in given.items()}
        eager.append(
            outputs(reference.lora_linear_ref, eager_given, call, wanted, **options, **seed)
        )
        doubles = {name: t.double() for name, t in given.items()}
        truth.append(outputs(reference.lora_linear_ref, doubles, call, wanted, **options, **seed))
    for output in truth[0]:
        columns = ([one[output] for one in side] for side in (ours, eager, truth))
        yield compare(case, output, *columns, factor=FORWARD if output == "y" else GRADIENT)
    yield same_bits(case, "run to run", *([t for d in side for t in d.values()]
                                          for side in (ours[:1], again)))  # fmt: skip
    yield undisturbed(case, disturbed)


def _present(call: Call) -> set[str]:
    missing = {"gate"} if call.gate is None else set()
    return set(NAMES) - missing - (set() if call.bias else {"bias"})


def numbers_of(case: Case, call: Call, dtypes: tuple, odd: str = "") -> dict[str, Tensor]:
    """The inputs as dense tensors, by name; only those that there are."""
    (dtype, adapter), tokens, k, n, r = dtypes, call.tokens, call.k, call.n, call.r
    numbers = {
        "x": case.normal(tokens, k, dtype=dtype),
        "weight": case.normal(n, k, std=k**-0.5, dtype=dtype),
        "lora_A": case.normal(r, k, std=k**-0.5, dtype=adapter),
        "lora_B": case.normal(n, r, std=r**-0.5, dtype=adapter),
        "dy": case.normal(tokens, n, std=n**-0.5, dtype=dtype),
    }
    if call.bias:
        numbers["bias"] = case.normal(n, dtype=dtype)
    if call.gate is not None:
        gate = case.uniform(*call.gate, low=0.5, high=1.5, dtype=call.gate_dtype)
        if call.gate_values == "zero":
            gate.zero_()
        elif call.gate_values == "negative":
            gate.neg_()
        elif call.gate_values == "some zero":
            gate.view(-1)[::2] = 0
        numbers["gate"] = gate
    if odd and numbers[odd].numel():
        flat = numbers[odd].view(-1)
        for value in (math.nan, math.inf, -math.inf)[: case.random.randint(1, 3)]:
            flat[case.random.randrange(flat.numel())] = value
    return numbers


def outputs(function, given: dict, call: Call, wanted: list[str], **options) -> dict[str, Tensor]:
    """y, and the gradients of all that is wanted, by name."""
    leaves = {name: given[name] for name in given if name != "dy"}
    leaves |= {name: leaves[name].detach().requires_grad_() for name in wanted}
    x = leaves.pop("x")
    with torch.enable_grad():
        y = function(x.view(*call.leading, call.k), **leaves, **options)
        dy = given["dy"].view(*call.leading, call.n)
        inputs = [x if name == "x" else leaves[name] for name in wanted]
        gradients = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach(), **dict(zip(map(OUTPUTS.get, wanted), gradients, strict=True))}
