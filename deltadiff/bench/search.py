"""`deltadiff bench search`: a step of DiffoRA's search beside the same step in eager PyTorch.

The floor is the frozen model, forward and backward, once for each batch that the step takes. Its
backward pass reaches the embeddings; that of a step only reaches the first layer's pairs.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import HALF_DTYPES, dtype_name
from ..diffora.bilevel import Search
from .eager_search import ALPHA, GATE_OPTIONS, PAIR_OPTIONS, EagerSearch, R, randomise_pairs
from .models import BERT, LLAMA_1B, LLAMA_SMALL, Batch, ModelShape, build_model, random_batch
from .timing import Case, Variant

VARIANTS = ("frozen", "deltadiff", "eager", "eager-cast")
MODES = ("gate", "inner", "search")  # a step on the logits, one on A and B, one on each


@dataclass(frozen=True)
class SearchShape:
    """A model, and the size of the batches that it takes."""

    model: ModelShape
    batch: int
    sequence: int


GPU_SHAPES = (SearchShape(BERT, 32, 128), SearchShape(LLAMA_1B, 4, 1024))
CPU_SHAPES = (SearchShape(LLAMA_SMALL, 2, 64),)


def search_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """Each step for an encoder and a decoder, on a CPU for a small decoder; one if ``quick``."""
    gpu = device.type == "cuda"
    shapes = GPU_SHAPES if gpu else CPU_SHAPES
    dtype = torch.bfloat16 if gpu else torch.float32
    if quick:
        return [search_case(shapes[0], MODES[-1], dtype)]
    return [search_case(shape, mode, dtype) for shape, mode in itertools.product(shapes, MODES)]


def search_case(shape: SearchShape, mode: str, dtype: torch.dtype) -> Case:
    """One step with float32 adapters. M is the tokens of a batch; mode "search" takes two."""
    fields = {
        "op": "search", "mode": mode, "graph": False, "model": shape.model.name,
        "shape": {"M": shape.batch * shape.sequence, "K": None, "N": None, "r": R},
        "rounding": None, "dtype": dtype_name(dtype),
        "batch": shape.batch, "sequence": shape.sequence,
    }  # fmt: skip
    return Case(fields, "frozen", functools.partial(_build, shape, mode, dtype))


def _build(shape, mode, dtype, device) -> dict[str, Variant]:
    model = build_model(shape.model, dtype, device)
    batches = random_batches(model, shape, device)
    own = {"adapter_dtype": "float32"}

    def frozen() -> Callable:
        taken = batches if mode == "search" else batches[:1]
        inputs = [Batch(embeds.clone().requires_grad_(), labels) for embeds, labels in taken]

        def step() -> None:
            for batch in inputs:
                batch.embeds.grad = None
                loss_of(model, batch).backward()

        return step

    def step_of(make: Callable, autocast: torch.dtype | None = None) -> Callable:
        return search_step(make(sharing_weights(model), torch.float32), mode, batches, autocast)

    half = dtype in HALF_DTYPES
    variants = {
        "frozen": Variant(frozen, {"adapter_dtype": None}),
        "deltadiff": Variant(lambda: step_of(fused_search), own),
        "eager": Variant(lambda: step_of(EagerSearch, dtype if half else None), own),
    }
    if half:  # without autocast; in float32 "eager" has none either
        variants["eager-cast"] = Variant(lambda: step_of(EagerSearch), own)
    return variants


def random_batches(model: nn.Module, shape: SearchShape, device: torch.device) -> list[Batch]:
    """A batch of the validation data and one of the training data."""
    size = shape.batch, shape.sequence
    return [random_batch(model, shape.model, *size, device) for _ in range(2)]


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose modules a variant may replace, around the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(inputs_embeds=batch.embeds, labels=batch.labels).loss


def search_step(
    search: Search | EagerSearch,
    mode: str,
    batches: Sequence[Batch],
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """The call to time: a step of ``mode``, under autocast to a dtype or without."""
    valid, train = batches

    def loss(batch: Batch) -> Tensor:
        device = batch.labels.device.type
        with torch.autocast(device, autocast) if autocast else nullcontext():
            return loss_of(search.model, batch)

    def step() -> None:
        if mode != "inner":
            search.gate_step(lambda: loss(valid))
        if mode != "gate":
            search.inner_step(lambda: loss(train))

    return step


def fused_search(model: nn.Module, adapter_dtype: torch.dtype) -> Search:
    """deltadiff's search, with the rank, learning rates and pairs of `EagerSearch`."""
    options = {**PAIR_OPTIONS, **{f"gate_{name}": value for name, value in GATE_OPTIONS.items()}}
    search = Search(model, r=R, lora_alpha=ALPHA, adapter_dtype=adapter_dtype, **options)
    randomise_pairs(search.layers.values())
    return search
