"""How much of a model's weight is adapted, and why the rest is not."""

import re

import pytest
import torch
import transformers
from torch import nn
from two_blocks import peft_model

from deltadiff import swap_, swap_report, unswap_
from deltadiff.layers.coverage import Coverage, WeightGroup

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


def decoder(name: str, **options) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV3"])
def test_experts_are_listed_with_their_share(name):
    model = decoder(name)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    linear = [m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    report = swap_(model, r=1)
    coverage = report.coverage
    assert coverage.total == total and coverage.adapted == sum(m.weight.numel() for m in linear)
    experts = {g.name: g for g in coverage.left_out if "experts (" in g.reason}
    layers = 1 if name == "DeepseekV3" else 2
    index = "1" if layers == 1 else "*"
    assert set(experts) >= {
        f"model.layers.{index}.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")
    }
    up = experts[f"model.layers.{index}.mlp.experts.gate_up_proj"]
    shape = tuple(next(p.shape for n, p in model.named_parameters() if "gate_up_proj" in n))
    assert up.reason == f"experts {shape}, not an nn.Linear" and up.count == layers
    assert f"{100 * coverage.adapted / total:.1f} % of the model's weight is adapted" in str(report)
    assert coverage.adapted + sum(g.elements for g in coverage.left_out) == total


def test_each_weight_counts_once_by_its_logical_size():
    class FourBit(nn.Linear):
        def forward(self, x):
            return x

    class HQQLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.W_q = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)

    model = nn.ModuleDict({"packed": FourBit(8, 4), "embed": nn.Embedding(10, 8)})
    model["packed"].weight = nn.Parameter(
        torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False
    )
    model["head"] = nn.Linear(8, 10, bias=False)
    model["head"].weight = model["embed"].weight
    model["hqq"] = HQQLinear()
    coverage = swap_(model, r=1, target_modules=["packed"]).coverage
    assert (coverage.total, coverage.adapted) == (32 + 80 + 48, 32)
    assert coverage.left_out == (
        WeightGroup("embed", "an embedding, tied to head", 1, 80),
        WeightGroup("hqq", "HQQLinear, a quantised format that cannot be taken", 1, 48),
    )
    unswap_(model)
    assert swap_(model, r=1, target_modules=["head"]).coverage.adapted == 80  # the embedding, too


def test_the_other_reasons():
    model = nn.ModuleDict(
        {
            "conv": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
            "attention": nn.MultiheadAttention(8, 2),
            "rnn": nn.GRU(4, 4),
            "named": nn.Linear(4, 4),
            "other": nn.Linear(4, 4),
        }
    )
    coverage = swap_(model, r=1, target_modules=["named"]).coverage
    assert {g.name: g.reason for g in coverage.left_out} == {
        "conv.weight.original0": "a convolution",
        "conv.weight.original1": "a convolution",
        "attention.in_proj_weight": "attention's own projections, not an nn.Linear",
        "attention.out_proj": "MultiheadAttention reads its weight, past its forward pass",
        "rnn.weight_ih_l0": "(12, 4) of GRU, not an nn.Linear",
        "rnn.weight_hh_l0": "(12, 4) of GRU, not an nn.Linear",
        "other": "a linear layer that target_modules does not name",
    }


def below_the_table(report) -> list[str]:
    lines = str(report).splitlines()
    return lines[len(report.rows) + 1 :]


def test_the_report_of_many_layers_is_short_and_can_be_had_again():
    model = decoder("Qwen3Moe", num_hidden_layers=32)
    report = swap_(model, r=1, target_modules=["q_proj"])
    lines = below_the_table(report)
    assert len(report.rows) == 32 and len(lines) <= 12
    assert re.search(r"; \d+\.\d % of the model's weight is adapted$", lines[0])
    assert lines[-1].endswith("model.layers.*, model.embed_tokens, lm_head, model.norm")
    assert str(swap_report(model)) == str(report)
    full = Coverage(
        10**6, 1, *[tuple(WeightGroup(f"w{i}", "no reason", 1, i) for i in range(20))] * 3,
        ("a",), ("b",),
    )  # fmt: skip
    assert len(full.lines()) == 11


def test_what_stopped_training():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "b": nn.Linear(4, 4)})
    model["norm"].requires_grad_(False)
    report = swap_(model, r=1, target_modules=["a"], modules_to_save=["b"])
    assert report.coverage.stopped == (WeightGroup("a", "", 2, 20),)
    assert "20 parameters stopped training: a" in str(report)
    assert report.trainable == 8 + 20


def test_a_peft_model():
    """Its layers count as adapted; what PEFT added to them is none of the model's weight."""
    model = peft_model(modules_to_save=["head"])
    coverage = swap_(model).coverage
    assert (coverage.total, coverage.adapted) == (2 * (64 + 48) + 18, 2 * (64 + 48))
    assert coverage.whole == (WeightGroup("head", "", 1, 18),) and not coverage.left_out
    assert not coverage.stopped
