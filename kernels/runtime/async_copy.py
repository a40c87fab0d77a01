"""Copies of vectors from the host to the device that nobody waits for, even in a CUDA graph."""

import torch

from .gpu import is_capturing


class _GraphMemory:
    """Pinned host memory that belongs to captured graphs for good.

    A captured graph copies from the same host memory at every replay. Since nothing may be
    allocated during a capture, the memory is allocated before, in blocks of BYTES.
    """

    BYTES = 1 << 20
    free: list[torch.Tensor] = []  # what is left of the blocks, the newest last

    @classmethod
    def reserve(cls) -> None:
        """Allocate another block if less than half a block is left."""
        if not cls.free or cls.free[-1].numel() < cls.BYTES // 2:
            cls.free.append(torch.empty(cls.BYTES, dtype=torch.uint8, pin_memory=True))

    @classmethod
    def copy(cls, values: torch.Tensor) -> torch.Tensor:
        """A copy of ``values`` in reserved memory, which is not used again."""
        nbytes = values.numel() * values.element_size()
        block = cls.free.pop() if cls.free else values.new_empty(0, dtype=torch.uint8)
        if block.numel() < nbytes:
            raise RuntimeError(
                f"a CUDA graph needs {nbytes} bytes of pinned memory, {block.numel()} are there: "
                "run the same step once before the capture"
            )
        cls.free.append(block[(nbytes + 63) // 64 * 64 :])
        return block[:nbytes].view(values.dtype).copy_(values)


def copy_async(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy a vector from the host to ``target`` on the device without waiting; returns it."""
    if target.device.type != "cuda":
        return target.copy_(values)
    if is_capturing(target.device):
        return target.copy_(_GraphMemory.copy(values), non_blocking=True)
    _GraphMemory.reserve()
    return target.copy_(values.pin_memory(), non_blocking=True)
