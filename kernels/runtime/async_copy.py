"""Vectors from the host to the device without waiting, also while a CUDA graph is captured."""

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of the stream that launches go to; 0 without a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _LastingMemory:
    """Pinned memory that no one else is ever given.

    A captured graph copies from the same host memory at each replay. It is set aside beforehand,
    because allocating is forbidden during a capture.
    """

    BYTES = 1 << 20
    free: list[torch.Tensor] = []

    @classmethod
    def set_aside(cls) -> None:
        if not cls.free or cls.free[-1].numel() < cls.BYTES // 2:
            cls.free.append(torch.empty(cls.BYTES, dtype=torch.uint8, pin_memory=True))

    @classmethod
    def copy(cls, values: torch.Tensor) -> torch.Tensor:
        nbytes = values.numel() * values.element_size()
        room = cls.free.pop() if cls.free else values.new_empty(0, dtype=torch.uint8)
        if room.numel() < nbytes:
            raise RuntimeError(
                f"a CUDA graph needs {nbytes} bytes of pinned memory, {room.numel()} are there: "
                "run the same step once before the capture"
            )
        cls.free.append(room[(nbytes + 63) // 64 * 64 :])
        return room[:nbytes].view(values.dtype).copy_(values)


def send(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy a vector from the host to ``target`` on the device, without waiting; returns it."""
    if target.device.type != "cuda":
        return target.copy_(values)
    if is_capturing(target.device):
        return target.copy_(_LastingMemory.copy(values), non_blocking=True)
    _LastingMemory.set_aside()
    return target.copy_(values.pin_memory(), non_blocking=True)
