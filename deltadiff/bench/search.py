"""`deltadiff bench search`: a step of DiffoRA's search beside the same step in eager PyTorch.

The floor is the frozen model, forward and backward, once for each batch that the step takes. Its
backward pass goes to the embeddings, that of a step only to the first layer's pairs. `Search` also
looks at each loss and gradient for inf and NaN; the eager step does not.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import HALF_DTYPES, dtype_name
from ..diffora.bilevel import Search
from ..diffora.candidates import find_candidates
from ..errors import ArgumentError
from .model import LLAMA_7B, SMALL
from .timing import Case, Variant

VARIANTS = ("frozen", "deltadiff", "eager", "eager-cast")


MODES = ("gate", "inner", "search")  # a step on the logits, one on A and B, one on each


R, ALPHA = 4, 16.0


PAIRS = {"lr": 5e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}  # AdamW's, of A and B


GATES = {"lr": 1e-2, "betas": (0.5, 0.999), "weight_decay": 1e-3}  # Adam's, of the logits


@dataclass(frozen=True)
class Shape:
    """A model by its transformers config, and the batch that it takes.

    ``kind``: which of transformers' Auto classes makes it.
    """

    name: str
    kind: str
    config: dict
    batch: int
    sequence: int


BERT = Shape(
    "BERT-base", "AutoModelForSequenceClassification",
    {
        "model_type": "bert", "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,  # dropout of the model itself is the same for all
    },
    batch=32, sequence=128,
)  # fmt: skip


LLAMA_1B = Shape(
    "Llama 1B", "AutoModelForCausalLM",
    {
        **LLAMA_7B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "use_cache": False,
    },
    batch=4, sequence=1024,
)  # fmt: skip


LLAMA_SMALL = Shape(
    "Llama-2 small", "AutoModelForCausalLM", {**SMALL, "use_cache": False}, batch=2, sequence=64
)


def search_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The cases of the README's table; on a CPU a small model. ``quick``: one case."""
    gpu = device.type == "cuda"
    shapes = [BERT, LLAMA_1B] if gpu else [LLAMA_SMALL]
    dtype = torch.bfloat16 if gpu else torch.float32
    if quick:
        return [search_case(shapes[0], MODES[-1], dtype)]
    return [search_case(shape, mode, dtype) for shape, mode in itertools.product(shapes, MODES)]


def search_case(shape: Shape, mode: str, dtype: torch.dtype) -> Case:
    """One step, with float32 adapters; M is the tokens of a batch, of which "search" takes two."""
    fields = {
        "op": "search", "mode": mode, "graph": False, "model": shape.name,
        "shape": {"M": shape.batch * shape.sequence, "K": None, "N": None, "r": R},
        "rounding": None, "dtype": dtype_name(dtype),
        "batch": shape.batch, "sequence": shape.sequence,
    }  # fmt: skip
    return Case(fields, "frozen", functools.partial(_build, shape, mode, dtype))


def _build(shape, mode, dtype, device) -> dict[str, Variant]:
    model = build_model(shape, dtype, device)
    batches = random_batches(model, shape, device)
    own = {"adapter_dtype": "float32"}

    def floor() -> Callable:
        taken = batches if mode == "search" else batches[:1]
        inputs = [(embeds.clone().requires_grad_(), labels) for embeds, labels in taken]

        def step():
            for embeds, labels in inputs:
                embeds.grad = None
                loss_of(model, (embeds, labels)).backward()

        return step

    def stepper(make: Callable, autocast: torch.dtype | None = None) -> Callable:
        return search_step(make(sharing_weights(model), torch.float32), mode, batches, autocast)

    half = dtype in HALF_DTYPES
    found = {
        "frozen": Variant(floor, {"adapter_dtype": None}),
        "deltadiff": Variant(lambda: stepper(ours), own),
        "eager": Variant(lambda: stepper(EagerSearch, dtype if half else None), own),
    }
    if half:  # else it is "eager" itself
        found["eager-cast"] = Variant(lambda: stepper(EagerSearch), own)
    return found


# ------------------------------------------------------------- the model and its data


def build_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """With random weights, frozen. Raises ArgumentError without transformers."""
    try:
        import transformers
    except ImportError as error:
        accepted = 'an installed transformers: pip install "deltadiff[finetune]"'
        raise ArgumentError("transformers", f"nothing ({error})", accepted) from error
    config = transformers.AutoConfig.for_model(**shape.config)
    torch.manual_seed(0)
    with device:
        model = getattr(transformers, shape.kind).from_config(config, dtype=dtype)
    return model.train().requires_grad_(False)


def random_batches(model: nn.Module, shape: Shape, device) -> list[tuple[Tensor, Tensor]]:
    """(embeddings, labels) of a validation and of a training batch."""
    found = []
    for _ in range(2):
        size = shape.batch, shape.sequence
        labels = tokens = torch.randint(model.config.vocab_size, size, device=device)
        if shape.kind == "AutoModelForSequenceClassification":
            labels = torch.randint(model.config.num_labels, (shape.batch,), device=device)
        found.append((model.get_input_embeddings()(tokens).detach(), labels))
    return found


def sharing_weights(model: nn.Module) -> nn.Module:
    """A model of its own modules, which a variant may exchange, around the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    embeds, labels = batch
    return model(inputs_embeds=embeds, labels=labels).loss


# ------------------------------------------------------------------------ variants


def search_step(search, mode: str, batches, autocast: torch.dtype | None = None) -> Callable:
    """The call to time, of a `Search` or an `EagerSearch`."""
    valid, train = batches

    def loss(batch) -> Tensor:
        device = batch[1].device.type
        with torch.autocast(device, autocast) if autocast else nullcontext():
            return loss_of(search.model, batch)

    def step():
        if mode != "inner":
            search.gate_step(lambda: loss(valid))
        if mode != "gate":
            search.inner_step(lambda: loss(train))

    return step


def ours(model: nn.Module, adapter_dtype: torch.dtype) -> Search:
    options = {**PAIRS, **{f"gate_{name}": value for name, value in GATES.items()}}
    search = Search(model, r=R, lora_alpha=ALPHA, adapter_dtype=adapter_dtype, **options)
    _fill(search.layers.values())
    return search


@torch.no_grad()
def _fill(layers) -> None:
    """The same A and B for all variants; none of them zero, for products with zeros are faster."""
    torch.manual_seed(0)
    for layer in layers:
        layer.lora_A.normal_(std=0.02)
        layer.lora_B.normal_(std=0.02)


class EagerLinear(nn.Module):
    """y = x W^T + bias + s g (x A^T) B^T (eq. 10) around a frozen linear layer.

    Computed from left to right, so that s and g scale the r columns of x A^T, not those of y.
    """

    def __init__(self, base: nn.Linear, adapter_dtype: torch.dtype):
        super().__init__()
        self.base, self.scaling, self.gate = base, ALPHA / R, None
        options = {"dtype": adapter_dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(R, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, R, **options))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.base(x) + self.scaling * self.gate * (x @ a.T) @ b.T


class EagerSearch:
    """`Search` as one writes it in PyTorch; its layers all have the same module types."""

    def __init__(self, model: nn.Module, adapter_dtype: torch.dtype):
        self.model, candidates = model, find_candidates(model)
        self.layers: dict[str, EagerLinear] = {}
        for name in candidates.places:
            self.layers[name] = EagerLinear(model.get_submodule(name), adapter_dtype)
            model.set_submodule(name, self.layers[name])
        _fill(self.layers.values())
        self.pairs = [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]
        shape = len(candidates.layers), len(candidates.types)
        self.logits = nn.Parameter(torch.zeros(shape, device=self.pairs[0].device))
        self.optimizer = torch.optim.AdamW(self.pairs, **PAIRS, fused=True)
        self.gate_optimizer = torch.optim.Adam([self.logits], **GATES, fused=True)

    def gate_step(self, loss: Callable[[], Tensor]) -> None:
        for p in self.pairs:
            p.requires_grad_(False)
        self._take(self.gate_optimizer, loss, self.logits.softmax(1))
        for p in self.pairs:
            p.requires_grad_(True)

    def inner_step(self, loss: Callable[[], Tensor]) -> None:
        self._take(self.optimizer, loss, self.logits.detach().softmax(1))

    def _take(self, optimizer, loss: Callable[[], Tensor], gates: Tensor) -> None:
        # One node for all entries: taking them one by one makes a gradient matrix for each.
        for layer, gate in zip(self.layers.values(), gates.flatten().unbind(), strict=True):
            layer.gate = gate
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
