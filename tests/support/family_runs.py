"""A family's model, swapped and with PEFT's layers, and what its runs give."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import peft
import torch
from families import Family
from torch import Tensor, nn

from deltadiff import swap_
from deltadiff.layers import fused_branch
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.peft.fuse import why_not_fusable
from deltadiff.layers.report import SwapReport
from deltadiff.layers.targets.choose import choose_modules
from deltadiff.layers.targets.weight_readers import find_readers

PREFIX = "base_model.model."  # of the names in PEFT's models
OPTIONS = {"r": 2, "lora_alpha": 6}
# PEFT refuses out_proj of the first three, and wraps the routers of the others, which then fail.
_PEFT_FAILS = ("mamba", "mamba2", "falcon_h1", "llama4_text", "phimoe")


class Bare(nn.Module):
    """A model without a ``config``, for which PEFT has no rules of the family."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


@cache
def targets(family: Family) -> list[str]:
    """The names of the linear layers that can have a pair."""
    names = choose_modules(family.build())
    return [name for name in names if not name_ends(name, family.no_pair)]


def name_ends(name: str, ends: Iterable[str]) -> bool:
    """Whether one of ``ends`` is the last part, or the last parts, of a name."""
    return any(f".{name}".endswith(f".{end}") for end in ends)


def swapped(family: Family, dtype: torch.dtype = torch.float64, random: bool = True) -> nn.Module:
    """The swapped model; with ``random``, its pairs are random and B is not 0."""
    model = family.build(dtype)
    swap_(model, target_modules=targets(family), seed=0, **OPTIONS)
    if random:
        randomise(model)
    return model


def with_peft(family: Family, dtype: torch.dtype = torch.float64) -> nn.Module:
    """PEFT's model with the pairs that `swapped` has, on the same layers."""
    model = Bare(family.build(dtype))
    names = [f"model.{name}" for name in targets(family)]
    model = _get_peft_model(model, names)
    randomise(model)
    return model


def all_linear(family: Family) -> nn.Module:
    """PEFT's model with "all-linear", or where PEFT cannot take all, with what `targets` says."""
    model = family.build()
    chosen = "all-linear" if peft_takes_all_linear(family) else targets(family)
    model = _get_peft_model(model, chosen)
    randomise(model)
    return model


def peft_takes_all_linear(family: Family) -> bool:
    """Whether a model with PEFT's layers on "all-linear" runs."""
    return family.name not in _PEFT_FAILS


def _get_peft_model(model: nn.Module, target_modules: str | list[str]) -> nn.Module:
    config = peft.LoraConfig(target_modules=target_modules, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which are not adapted here
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def pairs(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each layer, by its name in the family's model."""
    if not isinstance(model, peft.PeftModel):
        return {name: (pair.lora_A, pair.lora_B) for name, pair in lora_layers(model).items()}
    prefix = PREFIX + "model." * isinstance(model.base_model.model, Bare)
    return {
        name.removeprefix(prefix): (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random pairs; a layer's depend on its place among the sorted names alone."""
    generator = torch.Generator().manual_seed(2)
    for _, pair in sorted(pairs(model).items()):
        for p in pair:
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(values * 0.3)


@dataclass(frozen=True)
class Run:
    """What a forward and a backward pass gave.

    Attributes:
        outputs: the loss and all other tensors that the model returned, as one vector.
        gradients: of A and B of each layer; None for a layer that has none.
    """

    outputs: Tensor
    gradients: Mapping[str, Tensor | None]

    @property
    def gradient(self) -> Tensor:
        """All gradients as one vector."""
        return torch.cat([g for g in self.gradients.values() if g is not None])


def run(model: nn.Module, inputs: Mapping[str, Tensor], training: bool = False) -> Run:
    """A forward and a backward pass, always with the same random numbers."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(3)
    outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {}
    for name, pair in sorted(pairs(model).items()):
        found = [p.grad for p in pair]
        gradients[name] = None if None in found else torch.cat([g.flatten() for g in found])
    return Run(_as_vector(outputs), gradients)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss and all other tensors that the model returns in evaluation, as one vector."""
    return _as_vector(model.eval()(**inputs))


def _as_vector(outputs) -> Tensor:
    tensors = [t for t in outputs.to_tuple() if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.detach().flatten() for t in tensors])


# ---------------------------------------------------------------- what is fused


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[set[str]]:
    """The names of PEFT's layers that `lora_linear` computed inside."""
    names = {id(a): name for name, (a, _) in pairs(model).items()}
    found: set[str] = set()
    original = fused_branch.lora_linear

    def noting(x, weight, lora_A, *args, **kwargs):
        found.add(names[id(lora_A)])
        return original(x, weight, lora_A, *args, **kwargs)

    with patch.object(fused_branch, "lora_linear", noting):
        yield found


def why_not_fused(
    family: Family, model: nn.Module, report: SwapReport, fused: Collection[str]
) -> dict[str, str]:
    """For the other layers of a swapped PEFT model the reason, which the report must give."""
    rows = {row.module.removeprefix(PREFIX): row for row in report.rows}
    readers, reasons = find_readers(model), {}
    for name in pairs(model).keys() - fused:
        if name not in rows:
            reason = why_not_fusable(model.get_submodule(PREFIX + name))
            assert reason and reason in str(report), name
        elif rows[name].path == "peft":
            reason = rows[name].reason.removeprefix("PEFT's own forward: ")
        else:
            known = readers.get(model.get_submodule(PREFIX + name))
            assert known in str(report) if known else name_ends(name, family.no_pair), name
            reason = known or "the model reads its weight itself"
        reasons[name] = reason
    return reasons
