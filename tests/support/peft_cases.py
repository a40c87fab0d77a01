"""LoRA in every form that PEFT's `LoraConfig` offers, as cases for the tests of `swap_`.

`FIELDS` has an entry for each field of `LoraConfig`: cases, or the words why it needs none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.tuners.lora.config import (
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft_models import input_of, make_model
from torch import nn

TARGETS = {
    "mlp": ["lin0", "lin1"],
    "mlp without bias": ["lin0", "lin1"],
    "deep": ["lin0", "lin1"],
    "conv1d stack": ["square", "wide"],
    "embedded": ["embed_tokens", "conv1d"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
}


@dataclass(frozen=True)
class Case:
    """A model with LoRA of PEFT.

    Attributes:
        model: its name in `peft_models.MODELS`.
        fused: how many of PEFT's layers are one call of `lora_linear` each, in a forward pass.
        own: how many run PEFT's own forward pass.
        options: of `LoraConfig`; ``target_modules`` is that of `TARGETS` where it is not given.
        before: is called with the base model and the configuration, before PEFT gets them.
        after: is called with PEFT's model.
    """

    model: str = "mlp"
    fused: int = 0
    own: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[nn.Module, peft.LoraConfig], Any] | None = None
    after: Callable[[nn.Module], Any] | None = None

    def __str__(self) -> str:
        return ", ".join([self.model, *(f"{k}={v!r}"[:50] for k, v in self.options.items())])

    def config(self) -> peft.LoraConfig:
        options = {"r": 2, "lora_alpha": 6, **self.options}
        if "target_modules" not in options and self.model in TARGETS:
            options["target_modules"] = list(TARGETS[self.model])
        return peft.LoraConfig(**options)

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """PEFT's model in training mode, with an adapter that changes the outputs."""
        model, config = make_model(self.model), self.config()
        if self.before is not None:
            self.before(model, config)
        model = peft.get_peft_model(model, config)
        if self.after is not None:
            self.after(model)
        return shake(model.to(dtype))


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Add small numbers to all that PEFT put into the model, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and "base_layer" not in name and "original_" not in name:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return model


def lora(model: str = "mlp", fused: int = 0, own: int = 0, before=None, after=None, **options):
    return Case(model, fused, own, options, before, after)


# ------------------------------------------------------------- initial values from data


def _gradients(model: nn.Module, config: peft.LoraConfig) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(input_of("mlp", torch.float32)).sum().backward())


def _covariances(model: nn.Module, config: peft.LoraConfig) -> None:
    """What PEFT's ``preprocess_corda``, which needs another package, leaves for PEFT's layers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            u, s, v = u[:, : config.r], s[: config.r], v.T[:, : config.r]
            module.eigens = SimpleNamespace(U_WC=u, S_WC=s, V_WC=v)


def _variances(model: nn.Module) -> None:
    ids = input_of("llama")
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    peft.initialize_lora_eva_weights(model, batches)


# What `init_lora_weights` may be: by the words of LoraConfig, and beside them "lora_ga".
INITS: dict[Any, list[Case]] = {
    True: [lora(fused=2, init_lora_weights=True)],
    False: [lora(fused=2, init_lora_weights=False)],
    "gaussian": [lora(fused=2, init_lora_weights="gaussian")],
    "eva": [
        lora(
            "llama",
            fused=6,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=1.0),
            after=_variances,
        ),
    ],
    "olora": [lora(fused=2, init_lora_weights="olora")],
    "pissa": [
        lora(fused=2, init_lora_weights="pissa"),
        lora("conv1d stack", fused=2, init_lora_weights="pissa"),
    ],
    "pissa_niter_[number of iters]": [lora(fused=2, init_lora_weights="pissa_niter_2")],
    "corda": [lora(fused=2, init_lora_weights="corda", before=_covariances)],
    "loftq": [],  # needs bitsandbytes; what it leaves are plain A and B
    "orthogonal": [lora(fused=2, init_lora_weights="orthogonal")],
    "mica": [lora(fused=2, init_lora_weights="mica")],
    "lora_ga": [
        lora(fused=2, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), before=_gradients)
    ],
}
_SEEN = "the cases of init_lora_weights have it"
_BLOCKS = BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2)
_FILE = "a note in the file that no layer reads"

FIELDS: dict[str, list[Case] | str] = {
    "task_type": [
        lora("llama", fused=6, task_type="CAUSAL_LM"), lora("bert", fused=6, task_type="SEQ_CLS"),
    ],
    "peft_type": "the class of the configuration",
    "auto_mapping": _FILE,
    "peft_version": _FILE,
    "base_model_name_or_path": _FILE,
    "revision": _FILE,
    "inference_mode": [lora(fused=2, inference_mode=True)],
    "r": [lora(fused=2, r=1), lora(fused=2, r=6), lora(fused=2, r=40)],
    "target_modules": [
        lora(fused=1, target_modules=["lin1"]), lora("deep", fused=3, target_modules=r".*\.lin0"),
        lora("llama", fused=21, target_modules="all-linear"),
        lora("gpt2", fused=9, fan_in_fan_out=True),
        lora("embedded", fused=1, own=1),
        lora("attention", fused=1, own=2, target_modules=["mha", "lin0"]),
        *(lora(f"conv {d}d", fused=1, own=1, target_modules=["conv", "lin0"]) for d in (1, 2, 3)),
        lora("conv 2d in groups", fused=1, own=1, target_modules=["conv", "lin0"]),
    ],
    "exclude_modules": [lora(fused=1, exclude_modules=["lin1"])],
    "lora_alpha": [lora(fused=2, lora_alpha=1)],
    "lora_dropout": "its masks are random, so test_dropout.py compares means",
    "fan_in_fan_out": [lora("conv1d stack", fused=2), lora(fused=2, fan_in_fan_out=True)],
    "bias": [lora(fused=2, bias="all"), lora(fused=2, bias="lora_only")],
    "use_rslora": [lora(fused=2, use_rslora=True)],
    "modules_to_save": [
        lora(fused=1, target_modules=["lin0"], modules_to_save=["lin1"]),
        lora(fused=1, modules_to_save=["lin1"]),
        lora("llama", fused=6, modules_to_save=["lm_head", "embed_tokens"]),
    ],
    "init_lora_weights": [case for cases in INITS.values() for case in cases],
    "layers_to_transform": [lora("llama", fused=4, layers_to_transform=[0, 2])],
    "layers_pattern": [lora("deep", fused=2, layers_to_transform=1, layers_pattern="layers")],
    "rank_pattern": [lora(fused=2, rank_pattern={"lin1": 5})],
    "alpha_pattern": [lora(fused=2, alpha_pattern={"lin1": 1})],
    "megatron_config": "Megatron's layers need Megatron",
    "megatron_core": "Megatron's layers need Megatron",
    "trainable_token_indices": [
        lora("embedded", fused=1, own=1, target_modules=["conv1d"], trainable_token_indices=[3, 5]),
        lora("llama", fused=6, own=1, trainable_token_indices={"embed_tokens": [4]}),
    ],
    "loftq_config": "LoftQ needs bitsandbytes; what it leaves are plain A and B",
    "eva_config": _SEEN,
    "corda_config": _SEEN,
    "lora_ga_config": _SEEN,
    "use_dora": [
        lora(own=2, use_dora=True), lora("conv1d stack", own=2, use_dora=True),
        lora("embedded", own=2, use_dora=True),
        lora("conv 2d", own=2, use_dora=True, target_modules=["conv", "lin0"]),
    ],
    "velora_config": [lora(own=2, velora_config=VeloraConfig(num_groups=2))],
    "alora_invocation_tokens": [
        lora("llama", own=6, task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    ],
    "use_qalora": "for layers of GPTQ alone",
    "qalora_group_size": "for layers of GPTQ alone",
    "monteclora_config": [lora(own=2, monteclora_config=MontecloraConfig(num_samples=2))],
    "layer_replication": [lora("llama", fused=8, layer_replication=[(0, 2), (1, 3)])],
    "runtime_config": [lora(fused=2, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))],
    "lora_bias": [lora(own=2, lora_bias=True)],
    "target_parameters": [
        lora(
            "experts", fused=1, own=1, target_modules=["lin0"], target_parameters=["experts.stack"]
        ),
        lora(fused=1, own=1, target_modules=["lin0"], target_parameters=["lin1.weight"]),
    ],
    "use_bdlora": [
        lora(own=2, use_bdlora=_BLOCKS),
        lora(own=2, use_bdlora=BdLoraConfig(["lin0"], nblocks=2, match_strict=False)),
    ],
    "arrow_config": "its adapters come from files, so test_several_adapters.py makes them",
    "kasa_config": [lora(own=2, kasa_config=KasaConfig())],
    "ensure_weight_tying": [
        lora(
            "tied", fused=1, own=1, target_modules=["lm_head", "embed_tokens"],
            ensure_weight_tying=True,
        ),
        lora(
            "tied", fused=1, target_modules=["conv1d"], modules_to_save=["lm_head"],
            ensure_weight_tying=True,
        ),
    ],
}  # fmt: skip
CASES = [case for cases in FIELDS.values() if not isinstance(cases, str) for case in cases]
