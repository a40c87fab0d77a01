"""What PEFT's calls do to Delta-LoRA's update of a layer: kept, refused, or said in a warning."""

import sys
import warnings
from collections.abc import Collection, Sequence
from types import FrameType

from ...errors import SwapError
from ..delta_state import LostUpdateWarning
from ..pending_delta import PendingDelta


def check_kept(call: str, changed: Sequence[str], in_use: Collection[str]) -> None:
    """Raise SwapError where ``call`` needs W without the update of an adapter.

    Args:
        changed: the adapters whose update W holds.
        in_use: the adapters that stay in use, so that W may hold theirs.
    """
    lost = [name for name in changed if name not in in_use]
    if lost:
        given = f"weights that Delta-LoRA updated in place for adapter {lost[0]!r}"
        accepted = "DeltaLoRA(w_update='factored'), which leaves them as they are"
        raise SwapError(call, given, accepted)


# Functions that read a model's state to compare it with what they load as another adapter, and the
# variable that is True where they hot-swap.
_LOADING = {
    ("peft.utils.save_and_load", "set_peft_model_state_dict"): None,
    ("transformers.integrations.peft", "load_adapter"): "hotswap",
}


def _is_loading() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        function = frame.f_globals.get("__name__"), frame.f_code.co_name
        if function in _LOADING:
            swaps = _LOADING[function]
            return swaps is None or frame.f_locals.get(swaps) is False
        frame = frame.f_back
    return False


def warn_saved(deltas: dict[str, PendingDelta]) -> None:
    """Say that PEFT's files hold A and B alone, which are not all of the model.

    A state cannot know what it is asked for. Only where it is known that nothing is written, or
    hot-swapped, nothing is said.
    """
    if any(delta.changes_model() for delta in deltas.values()) and not _is_loading():
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
