"""Layers whose weight another module reads, found in the source of that module's forward pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltadiff import swap_
from deltadiff.errors import ArgumentError
from deltadiff.layers.targets.weight_readers import find_readers


def read_in(model: nn.Module) -> set[str]:
    found = find_readers(model)
    return {name for name, m in model.named_modules() if m in found and isinstance(m, nn.Linear)}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.pretraining_tp = 1

    def reset(self):
        nn.init.zeros_(self.b.weight)  # not in the forward pass

    def forward(self, x):
        return F.linear(x, self.a.weight)


class Direct(Base):
    pass


class Overridden(Base):
    def forward(self, x):
        return self.a(x)


class Inherited(Base):
    def forward(self, x):
        return super().forward(x) + self.b(x)


class Helper(Base):
    def forward(self, x):
        return self._product(x)

    def _product(self, x):
        return x @ self.w

    @property
    def w(self):
        return self.b.weight.T


class Alias(Base):
    def forward(self, x):
        layer = self.many[0]
        return F.linear(x, layer.weight)


class Loop(Base):
    def forward(self, x):
        for _, layer in enumerate(self.many):
            x = F.linear(x, layer.weight)
        return x


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return F.linear(x, self.a.weight)


class NoValues(Base):
    def forward(self, x):
        if isinstance(self.a.weight, torch.Tensor) and x.shape[0] < self.a.weight.shape[0]:
            x = x.to(self.a.weight.dtype)
        return self.a(x)


class Sliced(Base):
    def forward(self, x):
        if self.pretraining_tp > 1:
            return sum(F.linear(x, w) for w in self.a.weight.chunk(self.pretraining_tp))
        return self.a(x) if self.pretraining_tp == 1 else F.linear(x, self.b.weight)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (Direct, {"a"}), (Overridden, set()), (Inherited, {"a"}), (Helper, {"b"}),
        (Alias, {"many.0", "many.1"}), (Loop, {"many.0", "many.1"}), (Decorated, {"a"}),
        (NoValues, set()),
    ],
)  # fmt: skip
def test_weights_are_found_that_the_forward_pass_reads(kind, read):
    model = nn.ModuleDict({"in": kind()})
    assert read_in(model) == {f"in.{name}" for name in read}


def test_a_switch_of_the_model_decides_which_branch_counts():
    model = Sliced()
    assert read_in(model) == {"b"}
    model.pretraining_tp = 2
    assert read_in(model) == {"a", "b"}


def test_a_forward_pass_of_the_instance_counts():
    model = Overridden()
    model.forward = Base.forward.__get__(model)
    assert read_in(model) == {"a"}


def test_what_has_no_source_reads_nothing():
    space = {"nn": nn}
    exec("class Hidden(nn.Module):\n def forward(self, x): return x @ self.a.weight", space)
    model = space["Hidden"]()
    model.a = nn.Linear(2, 2)
    assert read_in(model) == set()


def test_attention_and_encoder_layers_of_pytorch():
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
    model = nn.Transformer(16, 2, 1, 1, 32)
    encoder, decoder = "encoder.layers.0", "decoder.layers.0"
    assert read_in(model) == {
        f"{encoder}.self_attn.out_proj", f"{encoder}.linear1", f"{encoder}.linear2",
        f"{decoder}.self_attn.out_proj", f"{decoder}.multihead_attn.out_proj",
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="linear1: TransformerEncoderLayer reads its weight"):
        swap_(nn.TransformerEncoderLayer(**layer), r=1, target_modules=["linear1"])
    with pytest.raises(ArgumentError, match="MultiheadAttention reads its weight"):
        swap_(nn.TransformerDecoderLayer(**layer), r=1, target_modules=["out_proj"])


def test_a_decoder_layer_computes_the_same_in_training_and_evaluation(randn):
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    assert [row.module for row in swap_(model, r=2).rows] == ["linear1", "linear2"]
    nn.init.normal_(model.linear1.lora_B)
    x, memory = randn(2, 5, 16), randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x, memory), model.eval()(x, memory))


def test_a_layer_that_was_compiled_alone_keeps_its_forward_pass():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 4))
    report = swap_(model, r=1)
    assert [row.module for row in report.rows] == ["1"]
    assert "torch.compile has compiled it alone" in report.coverage.left_out[0].reason
    whole = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), backend="eager")
    assert len(swap_(whole, r=1).rows) == 2


SPEECH = {
    "conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_attention_heads": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20}


@pytest.mark.parametrize(
    ("name", "options", "read"),
    [
        ("Mamba", {"state_size": 4}, {"x_proj", "dt_proj", "out_proj"}),
        ("Mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4}, {"out_proj"}),
        ("Rwkv", {}, {"output", "value"}),
        ("WavLM", SPEECH, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("Bloom", {"n_layer": 1, "n_head": 2}, set()),
        ("T5", {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}, set()),
    ],
)  # fmt: skip
def test_models_of_transformers(name, options, read):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    )
    assert {n.rpartition(".")[2] for n in read_in(model)} == read
