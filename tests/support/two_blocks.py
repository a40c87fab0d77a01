"""A model of two blocks and a head, plain or with PEFT's layers, for the tests of swapping."""

import torch
from torch import nn


class Block(nn.Module):
    """Two linear layers, the second without a bias."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.v_proj(self.norm(self.q_proj(x)))


class Model(nn.Module):
    """Two blocks side by side and an output head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.layers[0](x) + self.layers[1](x))


def peft_model(**options) -> nn.Module:
    """The model with PEFT's LoRA layers on both layers of each block, B not 0."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(Model(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model
