"""What PEFT's calls do to Delta-LoRA's update of a layer: kept, refused, or said in a warning."""

import warnings

import torch
from torch import Tensor

from ...errors import SwapError
from ..lora_layers import LoraLayer
from ..pending_delta import PendingDelta


class LostUpdateWarning(UserWarning):
    """Delta-LoRA's update is missing from a file or was dropped from a model."""


def check_kept(call: str, adapters: list[str]) -> None:
    """Raise SwapError where ``call`` needs the base weights, which these ``adapters`` changed."""
    if adapters:
        given = f"weights that Delta-LoRA updated in place for adapter {adapters[0]!r}"
        accepted = "DeltaLoRA(w_update='factored'), which leaves them as they are"
        raise SwapError(call, given, accepted)


def warn_saved(deltas: dict[str, PendingDelta]) -> None:
    """Say that PEFT's files hold A and B alone, which are not all of the model."""
    if any(delta.changes_model() for delta in deltas.values()):
        warnings.warn(
            "PEFT's adapter files and its hot-swapping leave out what Delta-LoRA added to W; "
            "`deltadiff.export_peft(model, folder)` writes an adapter that holds it, and the "
            "state dicts of model and optimizer hold it",
            LostUpdateWarning, stacklevel=2,
        )  # fmt: skip


def warn_dropped(adapter: str, in_weight: bool) -> None:
    """Say what became of the update of an adapter whose A and B were loaded without one."""
    where = "stays in W" if in_weight else "was dropped"
    warnings.warn(
        f"adapter {adapter!r} was loaded from a file without Delta-LoRA's update; the update that "
        f"the model had {where}. `optimizer.load_state_dict` brings back the one that belongs to "
        "A and B; under a Trainer, `deltadiff.trainer.DeltaLoRACallback` does that",
        LostUpdateWarning, stacklevel=2,
    )  # fmt: skip


@torch.no_grad()
def keep_in_weight(delta: PendingDelta, layer: LoraLayer, lora_A: Tensor, lora_B: Tensor) -> None:
    """Make what W holds a past update, for A and B are about to be others (``lora_A``, ``lora_B``).

    W cannot be taken back, so the update by the old pair ends and one by the new pair begins.
    """
    if delta.started() and delta.past_updates is not None:
        delta.past_updates.append(delta.product(layer.lora_A, layer.lora_B))
    delta.anchor_A.copy_(lora_A)
    delta.anchor_B.copy_(lora_B)
