"""The table of all methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..inputs import RunInputs
from ..training_setup import FirstStage, TrainingSetup
from . import diffora, fused, libraries, whole_model

if TYPE_CHECKING:
    from ..settings import Settings


@dataclass(frozen=True)
class Method:
    """A value of `--method`.

    Attributes:
        text: what the method is called in tables.
        prepare: makes the setup of a run; it changes the model.
        fixes: the settings that the name stands for, which nobody may set otherwise.
        adapter_formats: the formats in which its result can be written, the default first; none
            for a method that trains parameters of the model itself.
        updates_weights: whether it is Delta-LoRA, which writes into W in place.
        control: the method that `compare` judges it by.
    """

    text: str
    prepare: Callable[[RunInputs, "Settings"], TrainingSetup | FirstStage]
    fixes: Mapping[str, object] = field(default_factory=dict)
    adapter_formats: tuple[str, ...] = ()
    updates_weights: bool = False
    control: str = "lora"


ADAPTER_FORMATS = ("deltadiff", "peft")


def _adapter(
    text: str, prepare: Callable, fixes: Mapping[str, object] | None = None, **more
) -> Method:
    """``more`` are other fields of `Method`."""
    return Method(text, prepare, fixes or {}, ADAPTER_FORMATS, **more)


def _delta(
    text: str,
    prepare: Callable,
    fixes: Mapping[str, object] | None = None,
    control: str = "lora-alpha-control",
) -> Method:
    return _adapter(text, prepare, fixes, updates_weights=True, control=control)


METHODS: dict[str, Method] = {
    "full": Method("Full fine-tuning", whole_model.full),
    "full-no-embeddings": Method("Full, embeddings frozen", whole_model.full_no_embeddings),
    "full-qv": Method("W_Q and W_V only", whole_model.full_qv),
    "bitfit": Method("BitFit: biases only", whole_model.bitfit),
    "houlsby": Method("Houlsby adapters", libraries.houlsby),
    "pfeiffer": Method("Pfeiffer adapters", libraries.pfeiffer),
    "lora-peft": Method("LoRA, PEFT eager", libraries.peft_lora, adapter_formats=("peft",)),
    "lora": _adapter("LoRA", fused.lora),
    "lora-alpha-control": _adapter("LoRA at alpha (1 + lambda)", fused.lora_alpha_control),
    "adalora": _adapter("AdaLoRA", fused.adalora),
    "dylora": _adapter("DyLoRA", fused.dylora),
    "flora": _adapter("FLoRA", fused.flora),
    "delta-lora": _delta("Delta-LoRA in place", fused.delta_lora),
    "delta-lora-nearest": _delta(
        "Delta-LoRA in place, nearest",
        fused.delta_lora,
        {"w_update": "inplace", "rounding": "nearest"},
    ),
    "delta-lora-factored": _delta(
        "Delta-LoRA factored", fused.delta_lora, {"w_update": "factored"}
    ),
    "diffora": _adapter("DiffoRA", diffora.search_and_train, control="diffora-random"),
    "diffora-no-sharing": _adapter(
        "DiffoRA without sharing", diffora.search_and_train, {"share_r": 0}, control="diffora"
    ),
    "diffora-random": _adapter("DiffoRA's control: modules at random", diffora.random_modules),
    "diffora-delta-lora": _delta(
        "DiffoRA + Delta-LoRA", diffora.search_and_train_weights, control="diffora"
    ),
}
