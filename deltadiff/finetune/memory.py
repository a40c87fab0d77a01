"""`PeakMemory`: how much memory a run takes above the loaded model."""

import contextlib
from pathlib import Path

import torch


class PeakMemory:
    """Memory above what was in use at the start, in MiB: on the GPU, or resident on Linux."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = self._now()

    def reset(self) -> None:
        """Forget the peak so far; the start stays."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float | None:
        """The peak in MiB; None if the system does not tell."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
        peak = self._status("VmHWM")
        return None if peak is None or self.start is None else (peak - self.start) / 2**20

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def _status(self, key: str) -> int | None:
        """An entry of /proc/self/status in bytes."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
        return None
