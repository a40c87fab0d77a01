"""What counts as a linear layer: each way in which a layer is more than a product is refused."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from deltadiff import LoraLinear, swap_
from deltadiff.errors import ArgumentError
from deltadiff.layers.targets.eligible import why_not_linear


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + 1


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(3))


class Renamed(nn.Linear):
    """It adds nothing to its kind."""


class Stored(torch.Tensor):
    """A stand-in for the tensors of torchao and quanto, whose dtype is the one they stand for."""


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def stored(weight: torch.Tensor) -> nn.Linear:
    layer = linear()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def hooked(register: str) -> nn.Linear:
    layer = linear()
    getattr(layer, register)(lambda *args: None)
    return layer


def without_parameter(name: str) -> nn.Linear:
    layer = linear()
    value = getattr(layer, name).detach()
    delattr(layer, name)
    setattr(layer, name, value)
    return layer


def with_forward() -> nn.Linear:
    layer = linear()
    layer.forward = lambda x: x
    return layer


def marked(**attributes: object) -> nn.Linear:
    layer = linear()
    for name, value in attributes.items():
        setattr(layer.weight, name, value)
    return layer


def with_accelerate() -> nn.Linear:
    accelerate = pytest.importorskip("accelerate")
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    return accelerate.hooks.add_hook_to_module(linear(), hook)


REFUSED = {
    "own forward": (lambda: Doubled(8, 8), "Doubled has a forward pass of its own"),
    "own call": (lambda: Shifted(8, 8), "Shifted has a forward pass of its own"),
    "forward of the instance": (with_forward, "forward pass of its own"),
    "accelerate": (with_accelerate, "accelerate's hook.*remove_hook_from_module"),
    "more parameters": (Scaled, "more than weight and bias: scale"),
    "weight_norm": (lambda: parametrizations.weight_norm(linear()), "parametrisation"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(linear()), "parametrisation"),
    "old weight_norm": (lambda: weight_norm(linear()), "computed"),
    "old spectral_norm": (lambda: spectral_norm(linear()), "computed"),
    "pruned weight": (lambda: prune.random_unstructured(linear(), "weight", 0.5), "computed"),
    "pruned bias": (lambda: prune.random_unstructured(linear(), "bias", 0.5), "computed"),
    "weight no parameter": (lambda: without_parameter("weight"), "no parameter"),
    "bias no parameter": (lambda: without_parameter("bias"), "no parameter"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "on meta"),
    "lazy": (lambda: nn.LazyLinear(8), "lazy"),
    "empty": (lambda: nn.Linear(0, 8), "0 elements"),
    "flat": (lambda: stored(torch.zeros(64)), r"shape \(64,\)"),
    "DTensor": (lambda: marked(device_mesh=None, placements=[Shard(0)]), "sharded.*fully_shard"),
    "by columns": (lambda: marked(device_mesh=None, placements=[Shard(1)]), "tensor parallelism"),
    "FSDP": (lambda: marked(_fsdp_flattened=True), "sharded.*FSDP"),
    "float8": (lambda: stored(torch.zeros(8, 8).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "int8": (lambda: stored(torch.zeros(8, 8, dtype=torch.int8)), "int8"),
    "complex": (lambda: stored(torch.zeros(8, 8, dtype=torch.complex64)), "complex64"),
    "sparse": (lambda: stored(torch.eye(8).to_sparse()), "torch.sparse_coo"),
    "another tensor": (lambda: stored(torch.zeros(8, 8).as_subclass(Stored)), "stored as Stored"),
}
HOOKS = [
    "register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook",
    "register_full_backward_hook", "register_state_dict_pre_hook",
    "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook",
]  # fmt: skip
REFUSED |= {register: (lambda r=register: hooked(r), "hooks on it") for register in HOOKS}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_a_product_is_left_out_and_refused_by_name(kind):
    make, reason = REFUSED[kind]
    model = nn.ModuleDict({"odd": make(), "plain": linear()})
    odd = model["odd"]
    with pytest.raises(ArgumentError, match=f"target_modules.*odd.*{reason}"):
        swap_(model, r=1, target_modules=["odd"])
    assert type(model["plain"]) is nn.Linear and model["plain"].weight.requires_grad
    report = swap_(model, r=1)
    assert [row.module for row in report.rows] == ["plain"] and model["odd"] is odd
    (group,) = report.coverage.left_out
    assert (group.name, group.reason) == ("odd", why_not_linear(odd))


def with_its_class_forward() -> nn.Linear:
    layer = linear()
    layer.forward = layer.forward  # what accelerate leaves when its hook is removed
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Renamed(8, 8),
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8),
        with_its_class_forward,
        lambda: prune.remove(prune.random_unstructured(linear(), "weight", 0.5), "weight"),
    ],
)
def test_what_adds_nothing_is_taken(make, randn):
    model, x = nn.ModuleDict({"x": make()}), randn(4, 8)
    before = model["x"](x)
    swap_(model, r=2, target_modules=["x"])
    assert isinstance(model["x"], LoraLinear)
    torch.testing.assert_close(model["x"](x), before)


def test_falcons_own_forward_is_the_same_product():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=20
    )
    model = transformers.FalconModel(config).eval()
    ids = torch.arange(6)[None]
    before = model(ids).last_hidden_state
    assert len(swap_(model, r=1).rows) == 4
    torch.testing.assert_close(model(ids).last_hidden_state, before)


def test_a_hook_on_a_quantised_layer_still_runs(randn):
    """The layer that was there is called, with all that hangs on it."""

    class Bytes(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)

    layer = Bytes(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    model, x = nn.Sequential(layer), randn(4, 8)
    before = model(x)
    swap_(model, r=2)
    assert torch.equal(model(x), before)


def test_a_model_without_a_layer_that_can_be_taken():
    with pytest.raises(ArgumentError, match="'all-linear', which names 0: Doubled has a forward"):
        swap_(nn.Sequential(Doubled(8, 8)), r=1)
