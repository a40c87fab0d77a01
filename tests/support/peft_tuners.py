"""PEFT's tuners other than LoRA, each with the smallest arguments that make it run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_models import BATCH, make_model
from torch import nn

LIN0, VIRTUAL = {"target_modules": ["lin0"]}, {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}


@dataclass(frozen=True)
class Tuner:
    """How to make a model with this tuner.

    Attributes:
        options: of its configuration.
        model: the base model's name in `peft_models.MODELS`.
        arguments: of the forward pass, beside the input.
        adapters: how many adapters of LoRA are saved first, because it takes them from files.
    """

    options: dict[str, Any] = field(default_factory=lambda: LIN0)
    model: str = "mlp"
    arguments: dict[str, Any] = field(default_factory=dict)
    adapters: int = 0


def _with(**options) -> Tuner:
    return Tuner({**LIN0, **options})


def _on_llama(arguments: dict[str, Any] | None = None, **options) -> Tuner:
    return Tuner(options, "llama", arguments or {})


_TASKS = {"task_ids": torch.arange(BATCH) % 2}
TUNERS: dict[str, Tuner] = {
    "ADALORA": _with(total_step=10),
    "ADAMSS": _with(r=2, num_subspaces=2),
    "ADAPTION_PROMPT": _on_llama(
        task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1, target_modules="self_attn"
    ),
    "BEFT": _with(),
    "BOFT": _with(boft_block_size=2),
    "C3A": _with(block_size=2),
    "CARTRIDGE": _on_llama(**VIRTUAL),
    "CPT": _on_llama(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    ),
    "DEFT": _with(decomposition_method="qr"),
    "DELORA": _with(),
    "FOURIERFT": _with(n_frequency=4),
    "FROD": _with(),
    "GLORA": _with(),
    "GRALORA": _with(),
    "HIRA": _with(),
    "HRA": _with(),
    "IA3": _with(feedforward_modules=["lin0"]),
    "LILY": _with(r=2, stride_A=1, num_B=2),
    "LN_TUNING": Tuner({"target_modules": ["norm"]}),
    "LOHA": _with(),
    "LOKR": _with(),
    "MISS": _with(r=2),
    "MULTITASK_PROMPT_TUNING": _on_llama(_TASKS, **VIRTUAL, num_tasks=2),
    "OFT": _with(oft_block_size=2),
    "OSF": Tuner({}),
    "PEANUT": _with(r=2, depth=0, act_fn="relu"),
    "POLY": _on_llama(
        _TASKS, task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, n_skills=2, n_tasks=2,
        n_splits=2,
    ),
    "PREFIX_TUNING": _on_llama(**VIRTUAL),
    "PROMPT_TUNING": _on_llama(**VIRTUAL),
    "PSOFT": _with(r=2, psoft_alpha=2),
    "PVERA": _with(),
    "P_TUNING": _on_llama(**VIRTUAL, encoder_hidden_size=4),
    "RANDLORA": _with(randlora_alpha=1),
    "ROAD": _with(group_size=2),
    "SHADOW": _on_llama(task_type="CAUSAL_LM"),
    "SHIRA": _with(r=1),
    "SUPERTUNING": _with(sparsity=0.5, r=2),
    "TINYLORA": _with(),
    "TRAINABLE_TOKENS": _on_llama(token_indices=[4, 5]),
    "UNILORA": _with(theta_d_length=11),
    "VBLORA": _with(vector_length=2, num_vectors=4),
    "VERA": _with(),
    "WAVEFT": _with(n_frequency=4),
    "XLORA": Tuner({"task_type": "CAUSAL_LM", "hidden_size": 16, "xlora_depth": 1}, "llama", {}, 2),
}  # fmt: skip
# The same tuners on other layers than nn.Linear, and beside modules that are trained whole.
_SAVED, _CONV = {"modules_to_save": ["lin1"]}, {"target_modules": ["conv", "lin0"]}
ON_OTHER_LAYERS: list[tuple[str, Tuner]] = [
    ("IA3", Tuner({"target_modules": ["square"], "feedforward_modules": []}, "conv1d stack")),
    ("IA3", Tuner({**_CONV, "feedforward_modules": ["conv"]}, "conv 3d")),
    ("IA3", _with(feedforward_modules=[], **_SAVED)),
    ("LOHA", Tuner({**_CONV, "use_effective_conv2d": True, "r": 2}, "conv 2d")),
    ("LOHA", _with(**_SAVED)),
    ("LOKR", Tuner({**_CONV, "r": 2}, "conv 1d")),
    ("LOKR", Tuner(_CONV, "conv 2d in groups")),
    ("ADALORA", Tuner({**_CONV, "total_step": 10}, "conv 2d")),
    ("OFT", Tuner({"target_modules": ["conv"], "oft_block_size": 0, "r": 2}, "conv 2d")),
    ("BOFT", Tuner({"target_modules": ["conv"], "boft_block_size": 2}, "conv 2d")),
    ("HRA", Tuner({"target_modules": ["conv"]}, "conv 2d")),
    ("HIRA", Tuner({"target_modules": ["embed_tokens", "conv1d"]}, "embedded")),
    ("HIRA", Tuner(_CONV, "conv 3d")),
    ("DEFT", Tuner({"target_modules": ["square"], "decomposition_method": "qr"}, "conv1d stack")),
    ("VERA", Tuner({"target_modules": ["square"]}, "conv1d stack")),
    ("VBLORA", Tuner({"target_modules": ["wide"], "vector_length": 2}, "conv1d stack")),
    ("UNILORA", Tuner({"target_modules": ["wide"], "theta_d_length": 11}, "conv1d stack")),
    ("TRAINABLE_TOKENS", Tuner({"token_indices": [4]}, "embedded")),
    ("TRAINABLE_TOKENS", Tuner({"token_indices": [4]}, "tied")),
]


def build_tuner(kind: str, tuner: Tuner, folder: Path) -> nn.Module:
    """A model with this tuner; files that it needs are written into ``folder``."""
    options = dict(tuner.options)
    if tuner.adapters:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(make_model(tuner.model), config).save_pretrained(folder)
        options["adapters"] = {str(i): str(folder) for i in range(tuner.adapters)}
    base = make_model(tuner.model)
    if kind == "XLORA":
        base.config.use_cache = False  # X-LoRA asks for it
    return peft.get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options))
