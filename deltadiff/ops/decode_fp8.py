"""`decode_fp8`: the matrix that a weight in FP8 stands for."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_int, check_plain, check_tensor
from ..errors import ArgumentError, ArgumentTypeError
from .backends import TRITON_BACKENDS
from .dispatch import choose_decoder
from .reference_fp8 import decode_fp8_ref

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels import decode_fp8 as kernel

DATA_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# The dtypes in which checkpoints store scales; float32 holds all of their numbers.
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


class Float8(NamedTuple):
    """A weight W (N, K) in FP8: W = data * scale, with one scale for each block of data.

    Blocks of 128 x 128 are the format of DeepSeek's and Qwen's checkpoints, whose
    ``weight_scale_inv`` is this scale, despite its name. A scale for each row (out feature) is a
    block of (1, K), and one scale for all of W a block of (N, K).

    Attributes:
        data: (N, K) float8_e4m3fn or float8_e5m2, contiguous.
        scale: (ceil(N / block[0]), ceil(K / block[1])) float32, contiguous.
        block: rows and columns of a block. Those at the edges of W may be cut off.
    """

    data: Tensor
    scale: Tensor
    block: tuple[int, int]

    @classmethod
    def of(cls, source: Any) -> "Float8":
        """The weight of a layer in FP8, or a weight of torchao, in its own memory.

        Scales are converted where they are stored otherwise than here: in 16 bits or as powers of
        two, as checkpoints have them, 0-dim, or those of rows in one dimension.

        Args:
            source: a layer that holds ``weight`` in FP8, ``weight_scale_inv`` and ``block_size``
                (None for one scale), as transformers' and deltadiff's do; a layer whose weight is
                torchao's; or such a weight itself.

        Raises:
            ArgumentTypeError: it is none of these. `check_fp8` says whether the parts fit.
        """
        weight = source.weight if isinstance(source, nn.Module) else source
        data, scale, block = _of_torchao(weight) or (weight, None, None)
        if data is weight and hasattr(source, "block_size"):
            scale, block = getattr(source, "weight_scale_inv", None), source.block_size
        if not isinstance(data, Tensor) or data.dtype not in DATA_DTYPES or scale is None:
            kind = getattr(data, "dtype", type(data).__name__)
            given = f"{kind}{' without scales' if scale is None else ''}"
            raise ArgumentTypeError("weight", given, "FP8 with scales, of a layer or of torchao")
        if scale.dtype not in SCALE_DTYPES:
            accepted = " or ".join(map(str, SCALE_DTYPES))
            raise ArgumentTypeError("weight.scale", f"dtype {scale.dtype}", accepted)
        scale = scale.detach().to(torch.float32)
        scale = scale.view(-1, 1) if scale.dim() < 2 else scale
        return cls(data.detach(), scale, tuple(block or data.shape))

    @classmethod
    def from_parts(cls, parts: Any, shape: tuple[int, int]) -> "Float8":
        """The weight with these `parts`."""
        data, scale, *block = parts
        return cls(data, scale, tuple(block))

    @property
    def parts(self) -> tuple[Any, ...]:
        """What operations of PyTorch take in the place of the weight."""
        return self.data, self.scale, *self.block

    def first_rows(self, count: int) -> "Float8":
        """The first rows of W, at most ``count``, in the same memory."""
        scale = self.scale[: -(-count // self.block[0])]
        return self._replace(data=self.data[:count], scale=scale)

    @property
    def e4m3_block(self) -> tuple[int, int] | None:
        """The block, where data is float8_e4m3fn: what the choice of a kernel depends on."""
        return self.block if self.data.dtype == torch.float8_e4m3fn else None

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device


def is_fp8(weight: Any) -> bool:
    """Whether a weight is stored in FP8, as a tensor of that dtype or by torchao."""
    of_torchao = _of_torchao(weight)
    data = weight if of_torchao is None else of_torchao[0]
    return data.dtype in DATA_DTYPES


def _of_torchao(weight: Any) -> tuple[Any, Any, Any] | None:
    """(data, scale, block) of a weight of torchao; None for another."""
    if type(weight) in (nn.Parameter, Tensor):
        return None
    if hasattr(weight, "qdata"):
        return weight.qdata, getattr(weight, "scale", None), getattr(weight, "block_size", None)
    stored: Any = getattr(weight, "tensor_impl", None)  # before torchao 0.13
    if hasattr(stored, "float8_data"):
        return stored.float8_data, stored.scale, weight.block_size
    return None


def check_fp8(name: str, weight: Float8) -> None:
    """Raise where the parts of a weight in FP8 do not fit each other."""
    data, scale, block = weight
    check_plain(f"{name}.data", data)
    if data.dim() != 2 or data.numel() == 0:
        raise ArgumentError(f"{name}.data", f"shape {tuple(data.shape)}", "two dimensions")
    if not isinstance(block, tuple) or len(block) != 2:
        given = f"{len(block)} numbers" if isinstance(block, tuple) else type(block).__name__
        raise ArgumentTypeError(f"{name}.block", given, "(rows, columns)")
    for side in block:
        check_int(f"{name}.block", side, 1, bits=32)
    check_tensor(f"{name}.data", data, tuple(data.shape), data.device, DATA_DTYPES)
    blocks = tuple(-(-size // side) for size, side in zip(data.shape, block, strict=True))
    check_plain(f"{name}.scale", scale)
    check_tensor(f"{name}.scale", scale, blocks, data.device, (torch.float32,))
    for part, t in (("data", data), ("scale", scale)):
        if not t.is_contiguous():
            raise ArgumentError(f"{name}.{part}", f"strides {t.stride()}", "a contiguous tensor")


def decode_fp8(weight: Float8, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """W (N, K), contiguous: data * scale in float32, rounded once to ``dtype``.

    The result is a constant: it has no gradient.

    Args:
        weight: `Float8.of` makes it of a layer of transformers, torchao or deltadiff.
        dtype: float32, bfloat16, float16 or float64.
        backend: None chooses one (see `choose_path`): "triton" on a GPU, else "reference".

    Raises:
        ArgumentTypeError, ArgumentError: a dtype, device, shape or block does not fit.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if not isinstance(weight, Float8):
        raise ArgumentTypeError("weight", type(weight).__name__, "a Float8")
    check_fp8("weight", weight)
    return decoded_fp8(weight, dtype, choose_decoder(weight.device, dtype, backend))


def decoded_fp8(weight: Float8, dtype: torch.dtype, backend: str) -> Tensor:
    """`decode_fp8` by a backend that was chosen, without checks.

    There is one kernel, which serves all backends that run on a GPU.
    """
    if backend in TRITON_BACKENDS:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        kernel.decode_fp8(*weight, out)
        return out
    return decode_fp8_ref(*weight, dtype)
