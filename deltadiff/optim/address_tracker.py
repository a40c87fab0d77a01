"""`StepWatch`: where the tensors of an optimizer step lie, and what moved since the last look.

Kernels read pointers from tables on the device. Whether a table is still right has to be asked in
every step, of hundreds of tensors: `csrc/address_tracker.cpp` does it in a tenth of the time.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops.dispatch import why_unavailable

MOVED, GRADS, ANY, ALIGNED = 1, 2, 4, 8


class StepWatch:
    """Watches parameters of one device, their gradients, and weights.

    A gradient that its parameter's kernel cannot read as it is (other dtype, not contiguous) is
    copied at each look.
    """

    def __init__(self, params: list[Tensor], weights: list[Tensor]):
        self.params, self.weights = params, weights
        self.known = [t.data_ptr() for t in (*params, *weights)]
        self.addresses, self.copies = [0] * len(params), []

    def look(self) -> int:
        """Bits: MOVED a parameter or weight is elsewhere than at the start; GRADS a gradient is
        elsewhere than at the last look; ANY there is one; ALIGNED all lie on 16 bytes."""
        moved = [t.data_ptr() for t in (*self.params, *self.weights)] != self.known
        fitting = [
            p.grad if p.grad is None else p.grad.to(p.dtype).contiguous() for p in self.params
        ]
        pairs = zip(self.params, fitting, strict=True)
        self.copies = [g for p, g in pairs if g is not p.grad]
        before = self.addresses
        self.addresses = [0 if g is None else g.data_ptr() for g in fitting]
        return (
            MOVED * moved
            | GRADS * (self.addresses != before)
            | ANY * any(self.addresses)
            | ALIGNED * (not any(address % 16 for address in self.addresses))
        )

    def grads(self) -> Tensor:
        """(parameters,) int64 on the CPU: addresses at the last look, 0 where there is none."""
        return torch.tensor(self.addresses, dtype=torch.int64)

    def wrote(self, weights: bool) -> None:
        """Tell autograd that the parameters with a gradient were written, and the weights."""
        pairs = zip(self.params, self.addresses, strict=True)
        increment_version([p for p, address in pairs if address])
        if weights:
            increment_version(self.weights)


def step_watch(params: list[Tensor], weights: list[Tensor]):
    """A `StepWatch`, the one in C++ where it was built."""
    if why_unavailable("cpp", torch.device("cpu"), torch.float32) is None:
        return torch.classes.deltadiff.AddressTracker(params, weights)
    return StepWatch(params, weights)
