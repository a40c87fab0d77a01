"""Small models: real architectures with random weights, and plain stacks of blocks."""

import torch
import transformers
from torch import Tensor, nn

_ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 2,
}
_DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_GPT2 = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BUILD = {
    "bert": ("BertConfig", "BertForSequenceClassification", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER),
    "deberta": ("DebertaV2Config", "DebertaV2ForSequenceClassification", _ENCODER),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
}
ARCHITECTURES = tuple(_BUILD)
ENCODER_TYPES = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
_DEBERTA_TYPES = tuple(
    t.replace("query", "query_proj").replace("key", "key_proj").replace("value", "value_proj")
    for t in ENCODER_TYPES
)
_LLAMA_TYPES = (
    *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)  # fmt: skip
TYPES = {
    "bert": ENCODER_TYPES,
    "roberta": ENCODER_TYPES,
    "deberta": _DEBERTA_TYPES,
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": _LLAMA_TYPES,
    "qwen": _LLAMA_TYPES,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model of this architecture, in evaluation mode; the seed fixes its weights."""
    config, model, settings = _BUILD[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def loss_of(model: nn.Module, indices) -> Tensor:
    """The model's own loss on the examples with these indices, which are always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (64, 8), generator=generator)[list(indices)]
    classifies = "SequenceClassification" in type(model).__name__
    labels = (ids.sum(1) % 2) if classifies else ids
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


class Block(nn.Module):
    """y = x + a(x) + b(x); a hidden module, where it is wanted, takes no part in it."""

    def __init__(self, names=("a", "b"), width=6, hidden=None):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(width, width))
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.names = names

    def forward(self, x):
        return x + sum(getattr(self, name)(x) for name in self.names)


class Stack(nn.Module):
    """Blocks one after the other, in an nn.ModuleList."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
