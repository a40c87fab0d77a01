"""Small models of every kind that PEFT adapts, for the tests of `swap_` on PEFT's layers."""

from collections.abc import Callable
from functools import partial

import torch
from small_models import build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BATCH = 3


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.lin0, self.norm = nn.Linear(8, 12, bias), nn.LayerNorm(12)
        self.lin1 = nn.Linear(12, 6, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm(self.lin0(x)).tanh())


class Deep(nn.Module):
    """Three blocks of two linear layers each, with what PEFT asks of a model that has layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))
        self.head = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.head(layer(x))
        return x


class Conv1DStack(nn.Module):
    """GPT-2's linear layer: a square one, whose shape cannot tell that it is transposed."""

    def __init__(self):
        super().__init__()
        self.square, self.wide = Conv1D(8, 8), Conv1D(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.square(x).tanh())


class Embedded(nn.Module):
    """An embedding, a Conv1D, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed_tokens, self.conv1d = nn.Embedding(20, 8), Conv1D(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.config = {"tie_word_embeddings": tied}
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
            self._tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.conv1d(self.embed_tokens(ids)).tanh())


class Convolution(nn.Module):
    """A convolution of so many dimensions and a linear layer."""

    def __init__(self, dimensions: int, groups: int = 1):
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.size = (4,) * dimensions
        self.conv = kind(4, 4, 3, groups=groups)
        self.lin0 = nn.Linear(4 * 2**dimensions, 6)

    def forward(self, x: Tensor) -> Tensor:
        image = x.repeat(1, 32).reshape(len(x), -1)[:, : 4 ** (len(self.size) + 1)]
        return self.lin0(self.conv(image.reshape(len(x), 4, *self.size)).flatten(1).tanh())


class Attention(nn.Module):
    """nn.MultiheadAttention, whose weights are read, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return self.lin0(self.mha(x, x, x)[0][:, 0])


class Stacked(nn.Module):
    """Weights of two experts in one parameter; each of them sees all rows."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.stack)


class Experts(nn.Module):
    """Stacked weights, which PEFT takes as ``target_parameters``, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.experts, self.lin0 = Stacked(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.experts(x).tanh())


_FLOATS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "mlp without bias": partial(Mlp, bias=False),
    "deep": Deep,
    "conv1d stack": Conv1DStack,
    "conv 1d": partial(Convolution, 1),
    "conv 2d": partial(Convolution, 2),
    "conv 2d in groups": partial(Convolution, 2, groups=2),
    "conv 3d": partial(Convolution, 3),
    "attention": Attention,
    "experts": Experts,
}
_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "embedded": Embedded,
    "tied": partial(Embedded, tied=True),
    **{name: partial(build, name) for name in ("llama", "gpt2", "bert")},
}
MODELS = _FLOATS | _TOKENS


def make_model(name: str, seed: int = 0) -> nn.Module:
    """The model of this name in training mode; the seed fixes its weights."""
    torch.manual_seed(seed)
    return MODELS[name]().train()


def input_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the model of this name takes: always the same numbers or tokens."""
    generator = torch.Generator().manual_seed(7)
    if name in _TOKENS:
        return torch.randint(3, 20, (BATCH, 5), generator=generator)
    return torch.randn(BATCH, 8, generator=generator, dtype=torch.float64).to(dtype)


def output_of(model: nn.Module, x: Tensor, **arguments) -> Tensor:
    """The output of a model, or its logits."""
    y = model(x, **arguments)
    return y if isinstance(y, Tensor) else y.logits
