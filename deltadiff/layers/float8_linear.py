"""`Float8Linear`: a linear layer with a frozen weight in FP8, which `quantise_` puts in."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decode_fp8 import Float8
from ..ops.linear_fp8 import linear_fp8
from .fp8 import keeping_fp8, why_not_loadable


class Float8Linear(nn.Linear):
    """Linear layer y = x W^T + bias with W = data * scale in FP8, decoded in each pass.

    It computes in the dtype of its input, or in that of autocast, and is differentiable in x and
    bias. W is never trained. ``to`` and its like change the dtype of the bias alone.

    Its parameters have the names of checkpoints in FP8, such as DeepSeek's, and in blocks of
    128 x 128 their format.

    Attributes:
        weight: (out_features, in_features) float8_e4m3fn, the data.
        weight_scale_inv: float32, one scale for each block; W = data * scale, despite its name.
        block_size: rows and columns of a block.
        dtype_before: the dtype of the weight that was quantised.
    """

    def __init__(self, weight: Float8, bias: nn.Parameter | None, dtype_before: torch.dtype):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        self.register_parameter("bias", bias)
        self.weight_scale_inv = nn.Parameter(weight.scale, requires_grad=False)
        self.block_size, self.dtype_before = weight.block, dtype_before

    def forward(self, x: Tensor) -> Tensor:
        return linear_fp8(x, Float8.of(self), self.bias)

    def extra_repr(self) -> str:
        rows, columns = self.block_size
        return f"{super().extra_repr()}, block_size=({rows}, {columns})"

    def _apply(self, fn: Any, recurse: bool = True) -> "Float8Linear":
        return super()._apply(keeping_fp8(self, fn), recurse)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: dict, strict: bool, *errors: list[str]
    ) -> None:
        errors[-1].extend(why_not_loadable(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *errors)
