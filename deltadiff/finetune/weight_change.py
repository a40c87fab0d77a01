"""How far a run moved the weights: Delta-LoRA's update of W, and the similarity to the original."""

import copy
import re

import torch
from torch import nn

from ..layers.lora_layers import lora_layers


@torch.no_grad()
def weight_update(model: nn.Module, original: nn.Module) -> dict | None:
    """How much of the update that in-place Delta-LoRA wanted arrived in the weights.

    The wanted update is D = lambda s (B_T A_T - B_k A_k), over all layers. "share" is
    <W_T - W_0, D> / <D, D>, and "size" is |D| / |W_0|. None for other methods.
    """
    reached = wanted = before = 0.0
    for name, layer in lora_layers(model).items():
        delta = layer.delta
        if delta is None or not delta.in_weight or not delta.started():
            continue
        products = [p for p in delta.past_updates or () if p.in_weight]
        products.append(delta.product())
        d = sum(p.B.float() @ p.A.float() for p in products).double().cpu()
        w_0 = original.get_submodule(name).weight.double()
        w_0 = w_0.T if layer.transposed else w_0
        reached += ((layer.matrix.detach().double().cpu() - w_0) * d).sum().item()
        wanted += (d * d).sum().item()
        before += (w_0 * w_0).sum().item()
    if not wanted:
        return None
    return {"share": reached / wanted, "size": (wanted / before) ** 0.5}


@torch.no_grad()
def similarity(model: nn.Module, original: nn.Module) -> dict[str, dict[str, float]]:
    """Cosine similarity of fine-tuned and original weights (Delta-LoRA's figure 3).

    The keys are the place of a linear layer in its block, then the block. Places that no block
    changed are left out. The low-rank branch is in a fine-tuned weight, whatever its form.
    """
    found: dict[str, dict[str, float]] = {}
    changed = set()
    for name, layer in original.named_modules():
        place = re.fullmatch(r"\D*?\.(\d+)\.(.+)", name)
        weight = getattr(layer, "weight", None)
        if place is None or weight is None or weight.dim() != 2 or isinstance(layer, nn.Embedding):
            continue
        after = _matrix(model.get_submodule(name), layer)
        before = _matrix(layer, layer).to(after.device)
        if not torch.equal(after, before):
            changed.add(place[2])
        cosine = (after * before).sum() / (after.norm() * before.norm())
        found.setdefault(place[2], {})[place[1]] = cosine.item()
    return {place: blocks for place, blocks in found.items() if place in changed}


def _matrix(layer: nn.Module, original: nn.Module) -> torch.Tensor:
    """The weight (in, out) that a layer applies, in float64.

    It is what the layer, in float32 and without its bias, makes of the identity matrix. So it does
    not matter how the weight is stored: 4-bit numbers have another shape. ``original`` is the eager
    layer, which tells how many inputs there are.
    """
    now = copy.deepcopy(layer).float().eval()
    for parameter, p in now.named_parameters():
        if parameter.rpartition(".")[2] == "bias":
            p.zero_()
    width = getattr(original, "in_features", len(original.weight))  # GPT-2's Conv1D: (in, out)
    return now(torch.eye(width, device=next(now.parameters()).device)).double()
