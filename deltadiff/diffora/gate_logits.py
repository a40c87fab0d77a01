"""`GateLogits`: the parameter that stage 1 of DiffoRA trains, and the gates that it stands for."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layers.lora_linear import LoraLinear
from .candidates import Candidates


class GateLogits:
    """A logit for each candidate; the gates of a layer are a softmax of its logits (eq. 11).

    The logits start at 0, so that the gates of a layer start equal. Each swapped layer holds its
    gate as a 0-dim view of the gates of inner steps.

    Args:
        candidates: the modules that have a gate.
        layers: the swapped layer of each candidate by name, all on one device.

    Attributes:
        logits: (layers, types) float32 parameter; entries without a module stay 0.
        inner_gates: (layers, types), the gates of inner steps. Steps leave them in this memory, so
            that a CUDA graph of an inner step sees the values of later rounds.
    """

    def __init__(self, candidates: Candidates, layers: dict[str, LoraLinear]):
        places, self._layers = candidates.places, layers
        shape = len(candidates.layers), len(candidates.types)
        device = next(iter(layers.values())).weight.device
        self.logits = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        # Where the entry of each candidate is in the flattened logits.
        self._slots = [i * shape[1] + j for i, j in places.values()]
        missing = torch.ones(shape, dtype=torch.bool)
        missing.view(-1)[self._slots] = False
        self._missing = missing.to(device) if missing.any() else None
        self.inner_gates = self._softmax().detach()
        self._hand_out(self.inner_gates)

    def move_to(self, device: torch.device) -> None:
        """Let logits and gates lie on a device, in new memory."""
        self.logits.data = self.logits.data.to(device)
        self._missing = None if self._missing is None else self._missing.to(device)
        self.inner_gates = self.inner_gates.to(device)
        self._hand_out(self.inner_gates)

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """While the block runs, the layers hold gates that depend on the logits."""
        try:
            self._hand_out(self._softmax())
            yield
        finally:
            self._hand_out(self.inner_gates)

    @torch.no_grad()
    def update_inner_gates(self) -> None:
        """Let inner steps see the logits as they are now."""
        self.inner_gates.copy_(self._softmax())

    def _softmax(self) -> Tensor:
        logits: Tensor = self.logits
        if self._missing is not None:
            logits = logits.masked_fill(self._missing, -torch.inf)
        return logits.softmax(1)

    def _hand_out(self, gates: Tensor) -> None:
        """Give each layer its gate."""
        entries = gates.flatten().unbind()
        for layer, slot in zip(self._layers.values(), self._slots, strict=True):
            layer.gate = entries[slot]
