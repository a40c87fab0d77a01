"""Small models, trained by each method, whose adapters the tests of `export_peft` export.

A case is a function of nothing that returns the trained model, its base, and the model that the
adapter should give, merged in float64.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from shared_pairs import select
from small_models import build, loss_of
from torch import nn

from deltadiff import DeltaLoRA, FusedAdamW, diffora, swap_
from deltadiff.layers.flora import swap_flora_
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.merge import branch_products
from deltadiff.ops.reference import join_remainder
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA

STEPS = 5
IDS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(7))


@dataclass
class Case:
    """A trained model.

    Attributes:
        base: the model before training.
        model: the trained one.
        ranks: the ranks that its layers should be exported with.
        truth: the trained model, merged, in float64.
        export: in which context, and with which options, it is exported.
    """

    base: nn.Module
    model: nn.Module
    ranks: set[int]
    truth: nn.Module
    context: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext)
    options: dict = field(default_factory=dict)


def case(base, model, ranks, summed=False, **more) -> Case:
    return Case(base, model, ranks, merged(model, base, summed), **more)


@torch.no_grad()
def merged(model: nn.Module, base: nn.Module, summed: bool = False) -> nn.Module:
    """The trained model as a plain one in float64, its weights formed in float64.

    They come from what W holds now, with the remainder. With ``summed`` they come from the base's
    weights and the sum of the updates, as it should be where W was rounded.
    """
    truth = in_dtype(base, torch.float64)
    layers = lora_layers(model)
    for name, p in model.named_parameters():
        with contextlib.suppress(AttributeError):  # the pairs are not there
            truth.get_parameter(name).copy_(p.double())
    for name, layer in layers.items():
        low = layer.delta.remainder if layer.delta is not None else None
        w = layer.matrix.double() if low is None else join_remainder(layer.matrix, low).double()
        products = branch_products(layer)
        if summed:
            start = base.get_submodule(name).weight.double()
            w = start.T if layer.transposed else start
            products.append(layer.delta.product())
        w = w + sum(p.B.double() @ p.A.double() for p in products)
        truth.get_submodule(name).weight.copy_(w.T if layer.transposed else w)
    return truth


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with parameters of another dtype, while tables of frequencies keep theirs."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def train(model: nn.Module, optimizer, ratio_at=None, lr_at=None) -> nn.Module:
    for t in range(STEPS):
        for group in optimizer.param_groups:
            group |= {"update_ratio": ratio_at(t)} if ratio_at else {}
            group |= {"lr": lr_at(t)} if lr_at else {}
        optimizer.zero_grad()
        loss = loss_of(model, range(8 * t, 8 * t + 8))
        if isinstance(optimizer, AdaLoRA):
            loss = loss + optimizer.orthogonality()
        loss.backward()
        optimizer.step()
    return model


def _delta_lora(
    name="llama", dtype=torch.float32, ratio_at=None, lr_at=None, swap=None, prepare=None, **options
) -> tuple[nn.Module, nn.Module]:
    base = in_dtype(build(name), dtype)
    model = copy.deepcopy(base)
    swap_(model, **{"r": 2, "seed": 0, **(swap or {})})
    if prepare:
        prepare(model)
    given = {"lr": 1e-2, "update_ratio": 0.5, **options}
    return base, train(model, DeltaLoRA(model, **given), ratio_at, lr_at)


def lora() -> Case:
    return case(*_delta_lora(update_ratio=0, swap={"lora_alpha": 6}), {2})


def lora_bf16() -> Case:
    return case(*_delta_lora(dtype=torch.bfloat16, update_ratio=0), {2})


def rslora() -> Case:
    return case(*_delta_lora(update_ratio=0, swap={"r": 3, "use_rslora": True}), {3})


def factored() -> Case:
    return case(*_delta_lora(w_update="factored"), {4})


def inplace() -> Case:
    return case(*_delta_lora(start_step=2), {4})


def inplace_from_the_start() -> Case:
    return case(*_delta_lora(start_step=0), {4})


def first_step_without_lr() -> Case:
    """A schedule that starts at 0: B is still 0 when the updates of W start."""
    return case(*_delta_lora(lr_at=lambda t: 2e-3 * t, weight_decay=0), {2})


def remainder() -> Case:
    return case(*_delta_lora(dtype=torch.bfloat16, start_step=1), {4})


def float16() -> Case:
    return case(*_delta_lora(dtype=torch.float16, w_update="factored"), {4})


def stochastic() -> Case:
    trained = _delta_lora(dtype=torch.bfloat16, rounding="stochastic")
    return case(*trained, {4}, summed=True)


def nearest() -> Case:
    return case(*_delta_lora(dtype=torch.bfloat16, rounding="nearest"), {4}, summed=True)


def _changing(t: int) -> float:
    return 0.5 if t < 2 else 1.0 if t < 4 else 0.25


def changed_lambda() -> Case:
    """Three values of lambda: three anchors and the pair."""
    return case(*_delta_lora(ratio_at=_changing), {8})


def changed_lambda_factored() -> Case:
    return case(*_delta_lora(ratio_at=_changing, w_update="factored"), {8})


def conv1d() -> Case:
    return case(*_delta_lora("gpt2"), {4})


def classifier() -> Case:
    return case(*_delta_lora("bert", swap={"modules_to_save": ["classifier"]}), {4})


def classifier_in_parts() -> Case:
    """RoBERTa's head is two layers under one name."""
    swap = {"target_modules": ["value"], "modules_to_save": ["classifier"]}
    return case(*_delta_lora("roberta", swap=swap), {4})


def biases() -> Case:
    def prepare(model):
        for layer in lora_layers(model).values():
            layer.bias.requires_grad_(True)

    swap = {"target_modules": ["value"], "modules_to_save": ["classifier"]}
    return case(*_delta_lora("bert", swap=swap, prepare=prepare), {4})


def padded() -> Case:
    return case(*_delta_lora(start_step=1), {8}, options={"pad_rank": True})


def shared_pairs() -> Case:
    base = build("bert")
    model = copy.deepcopy(base)
    names = [n for n, m in base.named_modules() if n.endswith(("query", "intermediate.dense"))]
    diffora.apply_(model, select(model, *names), r=4, share_r=2, modules_to_save=["classifier"])
    return case(base, train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5)), {8, 2})


def adalora() -> Case:
    base = build("llama")
    model = copy.deepcopy(base)
    swap_adalora_(model, init_r=4, target_modules=["q_proj", "v_proj"], seed=1)
    optimizer = AdaLoRA(model, lr=1e-2, total_step=STEPS, target_r=2, tinit=1, tfinal=1)
    train(model, optimizer)
    return case(base, model, {max(1, rank) for rank in optimizer.ranks().values()})


def flora() -> Case:
    base = build("llama")
    model = copy.deepcopy(base)
    swap_flora_(model, r=3, lora_alpha=6, seed=1)
    return case(base, train(model, FusedAdamW(model, lr=1e-2)), {3})


def dylora(rank=4) -> Case:
    base = build("llama")
    model = copy.deepcopy(base)
    swap_(model, r=4, seed=0)
    optimizer = DyLoRA(model, lr=1e-2)
    train(model.train(), optimizer)  # the drawn ranks hold in training mode alone
    model.eval()
    with optimizer.truncated(rank):
        return case(base, model, {rank}, context=optimizer.truncated(rank))


def dylora_at_rank_2() -> Case:
    return dylora(2)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        lora, lora_bf16, rslora, factored, inplace, inplace_from_the_start, first_step_without_lr,
        remainder, float16, stochastic, nearest, changed_lambda,
        changed_lambda_factored, conv1d, classifier, classifier_in_parts, biases, padded,
        shared_pairs, adalora, dylora, dylora_at_rank_2, flora,
    )
}  # fmt: skip
