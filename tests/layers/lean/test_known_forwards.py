"""Which modules count as gated MLPs and RMSNorms."""

import functools

import pytest
import torch
from torch import nn
from transformers import activations
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.t5 import modeling_t5

from deltadiff.layers.lean.known_forwards import (
    activation_of,
    gated_mlp_form,
    rms_norm_form,
)

MLPS = [
    modeling_llama.LlamaMLP, modeling_qwen2.Qwen2MLP, modeling_qwen3.Qwen3MLP,
    modeling_mistral.MistralMLP, modeling_gemma2.Gemma2MLP, modeling_phi3.Phi3MLP,
]  # fmt: skip
NORMS = {
    modeling_llama.LlamaRMSNorm: "llama", modeling_qwen2.Qwen2RMSNorm: "llama",
    modeling_qwen3.Qwen3RMSNorm: "llama", modeling_mistral.MistralRMSNorm: "llama",
    modeling_phi3.Phi3RMSNorm: "llama", modeling_gemma2.Gemma2RMSNorm: "gemma",
    modeling_gemma3.Gemma3RMSNorm: "gemma",
}  # fmt: skip
ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": None, "quick_gelu": None, "gelu_fast": None,
}  # fmt: skip


def bare(kind: type[nn.Module]) -> nn.Module:
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


@pytest.mark.parametrize("kind", MLPS, ids=lambda k: k.__name__)
def test_the_mlps_of_transformers(kind):
    form = gated_mlp_form(bare(kind))
    joint = kind is modeling_phi3.Phi3MLP
    assert form.inner == (("gate_up_proj",) if joint else ("gate_proj", "up_proj"))
    assert form.outer == "down_proj" and rms_norm_form(bare(kind)) is None


@pytest.mark.parametrize("kind", NORMS, ids=lambda k: k.__name__)
def test_the_norms_of_transformers(kind):
    form = rms_norm_form(bare(kind))
    assert form.casting == NORMS[kind] and form.offset == (form.casting == "gemma")
    assert gated_mlp_form(bare(kind)) is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    module = bare(modeling_llama.LlamaMLP)
    module.act_fn = activations.ACT2FN[name]
    assert activation_of(module, gated_mlp_form(module)) == ACTIVATIONS[name]


def test_pytorchs_activations_and_those_of_others():
    module = bare(modeling_llama.LlamaMLP)
    form = gated_mlp_form(module)
    others = type("SiLU", (nn.SiLU,), {})
    for act, name in ((nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (others(), None), (nn.ReLU(), None),
                      (nn.GELU(approximate="tanh"), "gelu_tanh")):  # fmt: skip
        module.act_fn = act
        assert activation_of(module, form) == name


class Rewritten(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


class Renamed(modeling_llama.LlamaMLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Another spelling of the same."""
        result = self.down_proj(
            self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden),
        )
        return result


class Swapped(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Decorated(modeling_llama.LlamaMLP):
    @torch.no_grad()
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherNorm(modeling_gemma2.Gemma2RMSNorm):
    def _norm(self, x):
        return x / x.abs().mean(-1, keepdim=True)


def test_only_the_same_computation_counts():
    assert gated_mlp_form(bare(Renamed)) is not None
    for kind in (Rewritten, Swapped, Decorated, nn.Linear, modeling_t5.T5DenseGatedActDense):
        assert gated_mlp_form(bare(kind)) is None
    assert rms_norm_form(bare(OtherNorm)) is None


def test_a_forward_pass_of_the_instance_counts_instead_of_the_class():
    module = bare(Rewritten)
    module.forward = modeling_llama.LlamaMLP.forward.__get__(module)
    assert gated_mlp_form(module) is not None
    module = bare(modeling_llama.LlamaMLP)
    module.forward = functools.wraps(module.forward)(lambda x: 0 * x)
    assert gated_mlp_form(module) is None
    module.forward = functools.partial(modeling_llama.LlamaMLP.forward, module)
    assert gated_mlp_form(module) is None


def test_ligers_modules():
    modules = pytest.importorskip("liger_kernel.transformers")
    for name, activation in (("LigerSwiGLUMLP", "silu"), ("LigerGEGLUMLP", "gelu_tanh"),
                             ("LigerPhi3SwiGLUMLP", "silu")):  # fmt: skip
        module = bare(getattr(modules, name))
        assert activation_of(module, gated_mlp_form(module)) == activation
    assert rms_norm_form(modules.LigerRMSNorm(8)).offset == "offset"
