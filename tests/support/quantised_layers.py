"""Stand-ins for the quantised layers of other packages, which keep more than weight and bias."""

import torch
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """Bytes and a scale for each row; it saves and loads the scales itself, as Linear8bitLt does.

    The scales are an attribute, neither parameter nor buffer.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        w = linear.weight.detach()
        self.scale = w.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((w / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        unexpected = rest[-2]
        if f"{prefix}scale" in unexpected:
            unexpected.remove(f"{prefix}scale")
            self.scale.copy_(state_dict[f"{prefix}scale"])


class FixedWeight(nn.Parameter):
    """Bytes in one column that know their scale."""

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.scale = self.scale.clone()
        return copied


class PackedWeight(FixedWeight):
    """One that can be made of what was saved, as bitsandbytes' Params4bit can."""

    @classmethod
    def from_prequantized(cls, data, quantized_stats, requires_grad, device, module):
        weight = cls(data.to(device), requires_grad=requires_grad)
        weight.scale = quantized_stats["weight.scale"].to(device)
        return weight


class PackedLinear(nn.Linear):
    """A `PackedWeight`, whose scale the layer saves but does not load, as Linear4bit does not."""

    weight_class = PackedWeight

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        w = linear.weight.detach()
        scale = w.abs().max() / 127
        packed = ((w / scale).round() + 128).to(torch.uint8).view(-1, 1)
        self.weight = self.weight_class(packed, requires_grad=False)
        self.weight.scale = scale
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.view(self.out_features, -1).to(x.dtype) - 128
        return nn.functional.linear(x, w * self.weight.scale.to(x.dtype), self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = self.weight.scale


class FixedLinear(PackedLinear):
    """Its scale cannot be loaded at all."""

    weight_class = FixedWeight


def dequantised(layer: nn.Linear) -> nn.Linear:
    """The dense layer of the same weight and bias."""
    dense = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        dense.bias.zero_()
        dense.weight.copy_((layer(torch.eye(layer.in_features)) - layer.bias).T)
        dense.bias.copy_(layer.bias)
    return dense
