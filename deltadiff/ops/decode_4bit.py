"""`decode_4bit`: the matrix that a weight of 4 bits stands for."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_plain, check_tensor
from ..errors import ArgumentError, ArgumentTypeError
from .backends import TRITON_BACKENDS
from .dispatch import choose_decoder
from .reference_4bit import absmax_ref, decode_4bit_ref

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels import decode_4bit as kernel

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class FourBit(NamedTuple):
    """A weight W (N, K) of 4 bits as bitsandbytes stores it: W = code[number] * absmax.

    The numbers stand row after row. Each ``blocksize`` of them have one absmax, also where they
    reach over the end of a row. absmax may be quantised in turn ("double quantisation"):
    absmax = scale_code[absmax] * scale + offset, with one scale for each ``scale_blocksize``.

    Attributes:
        packed: (ceil(N K / 2),) uint8, two numbers in a byte, the first one in its upper half.
        absmax: (ceil(N K / blocksize),) float32, or uint8 where it is quantised in turn.
        code: (16,) float32.
        scale: (ceil(absmax / scale_blocksize),) float32; this and the next two are None where
            absmax is not quantised.
        scale_code: (256,) float32.
        offset: one float32 number, 0-dim.
        shape: (N, K), out_features and in_features.
        blocksize: a power of two, 32 to 4096; ``scale_blocksize`` too, or 0.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    scale: Tensor | None
    scale_code: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    blocksize: int
    scale_blocksize: int

    @classmethod
    def of(cls, weight: Any, state: Any = None) -> "FourBit":
        """The weight of a ``bitsandbytes.nn.Linear4bit``, in its own memory.

        Args:
            state: the ``quant_state`` that the layer holds, for a weight that has lost its own, as
                FSDP's whole parameters have.

        Raises:
            ArgumentTypeError: it is not quantised yet, which ``to(device)`` does.
            ArgumentError: its kind is neither NF4 nor FP4; or bitsandbytes has repacked it for the
                CPU, which it does in evaluation.
        """
        state = getattr(weight, "quant_state", None) or state
        if state is None:
            given = f"a {type(weight).__name__} that is not quantised"
            accepted = "the weight of a Linear4bit, which `.to(device)` quantises"
            raise ArgumentTypeError("weight", given, accepted)
        if state.quant_type not in QUANT_TYPES:
            accepted = " or ".join(map(repr, QUANT_TYPES))
            raise ArgumentError("quant_type", repr(state.quant_type), accepted)
        if getattr(state, "packing_format_for_cpu", False):
            given = "a weight that bitsandbytes has repacked for products on the CPU"
            raise ArgumentError("weight", given, "one that was loaded or quantised anew")
        # A model that is to be sharded stores the bytes as another dtype.
        packed, nested = weight.detach().view(torch.uint8).view(-1), state.state2
        scales: tuple[Tensor | None, ...] = (None, None, None)
        scale_blocksize = 0
        if nested is not None:
            scales, scale_blocksize = (nested.absmax, nested.code, state.offset), nested.blocksize
        parts = packed, state.absmax, state.code, *scales, state.blocksize, scale_blocksize
        return cls.from_parts(parts, tuple(state.shape))

    @classmethod
    def from_parts(cls, parts: Any, shape: tuple[int, int]) -> "FourBit":
        """The weight with these `parts` and this shape."""
        *tensors, blocksize, scale_blocksize = parts
        return cls._make((*tensors, shape, blocksize, scale_blocksize))

    def first_rows(self, count: int) -> "FourBit":
        """The first rows of W, at most ``count``, in the same memory."""
        rows, k = min(count, self.shape[0]), self.shape[1]
        blocks = -(-rows * k // self.blocksize)
        scale = None if self.scale is None else self.scale[: -(-blocks // self.scale_blocksize)]
        packed = self.packed[: -(-rows * k // 2)]
        return self._replace(
            packed=packed, absmax=self.absmax[:blocks], scale=scale, shape=(rows, k)
        )

    @property
    def parts(self) -> tuple[Any, ...]:
        """What operations of PyTorch take in the place of the weight."""
        return (*self.tensors, *self.blocksizes)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:6]

    @property
    def blocksizes(self) -> tuple[int, int]:
        return self[7:]

    @property
    def device(self) -> torch.device:
        return self.packed.device


def check_4bit(name: str, weight: FourBit) -> None:
    """Raise where the parts of a weight of 4 bits do not fit each other."""
    packed, shape, (blocksize, scale_blocksize) = weight.packed, weight.shape, weight.blocksizes
    if not isinstance(shape, tuple) or len(shape) != 2:
        given = f"{len(shape)} numbers" if isinstance(shape, tuple) else type(shape).__name__
        raise ArgumentTypeError(f"{name}.shape", given, "(out_features, in_features)")
    for size in shape:
        check_int(f"{name}.shape", size, 1, bits=32)
    _check_blocksize(f"{name}.blocksize", blocksize)
    check_plain(f"{name}.packed", packed)
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    nested = any(part is not None for part in weight.tensors[3:])
    expected: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((-(-numel // 2),), torch.uint8),
        ((blocks,), torch.uint8 if nested else torch.float32),
        ((16,), torch.float32),
    ]
    if nested:
        _check_blocksize(f"{name}.scale_blocksize", scale_blocksize)
        expected += [
            ((-(-blocks // scale_blocksize),), torch.float32),
            ((256,), torch.float32),
            ((), torch.float32),
        ]
    for part, t, (wanted, dtype) in zip(weight._fields, weight.tensors, expected, strict=False):
        check_plain(f"{name}.{part}", t)
        assert t is not None
        check_tensor(f"{name}.{part}", t, wanted, packed.device, (dtype,))
        if not t.is_contiguous():
            raise ArgumentError(f"{name}.{part}", f"strides {t.stride()}", "a contiguous tensor")


def _check_blocksize(name: str, blocksize: object) -> None:
    if check_int(name, blocksize, 1, bits=32) not in BLOCKSIZES:
        raise ArgumentError(name, blocksize, f"one of {', '.join(map(str, BLOCKSIZES))}")


def decode_4bit(weight: FourBit, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """W (N, K), contiguous: code[number] * absmax in float32, rounded once to ``dtype``.

    In each dtype these are the bits of ``bitsandbytes.functional.dequantize_4bit``. (On the CPU,
    that of bitsandbytes 0.50 is wrong where a block reaches over the end of a row.)

    The result is a constant: it has no gradient.

    Args:
        weight: `FourBit.of` makes it of the weight of a layer of bitsandbytes.
        dtype: float32, bfloat16, float16 or float64.
        backend: None chooses one (see `choose_path`): "triton" on a GPU, else "reference".

    Raises:
        ArgumentTypeError, ArgumentError: a dtype, device, shape or block size does not fit.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if not isinstance(weight, FourBit):
        raise ArgumentTypeError("weight", type(weight).__name__, "a FourBit")
    check_4bit("weight", weight)
    return decoded_4bit(weight, dtype, choose_decoder(weight.device, dtype, backend))


def decoded_4bit(weight: FourBit, dtype: torch.dtype, backend: str) -> Tensor:
    """`decode_4bit` by a backend that was chosen, without checks.

    There is one kernel, which serves all backends that run on a GPU.
    """
    if backend in TRITON_BACKENDS:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        kernel.decode_4bit(weight, out)
        return out
    packed, absmax, code, scale, scale_code, offset, shape, blocksize, scale_blocksize = weight
    if scale is not None and scale_code is not None and offset is not None:
        absmax = absmax_ref(absmax, scale, scale_code, offset, scale_blocksize)
    return decode_4bit_ref(packed, absmax, code, shape, blocksize, dtype)
