"""Inputs of layers that the backward pass makes again, instead of keeping them.

`rms_norm` tells of its output what it was made of, which is kept anyway. A layer that would keep
this output for its backward pass then keeps those sources, and makes the output again there: once
for all the layers that read it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_deltadiff_remade"


class Again:
    """Makes a tensor again for the layers that read it, one after the other.

    It holds no sources: each layer keeps them by autograd's rules, and hands them in.
    """

    def __init__(self, make: Callable[..., Tensor]):
        self._make = make
        self._readers = self._served = 0
        self._made: tuple[object, Tensor] | None = None

    def add_reader(self) -> None:
        self._readers += 1

    def __call__(self, *sources: Tensor) -> Tensor:
        """The tensor; it is dropped when every reader had it.

        With autograd at work, for a second derivative, each reader gets one that goes back to x.
        """
        if torch.is_grad_enabled():
            return self._make(*sources)
        device = sources[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._made is None or self._made[0] != stream:  # another stream would not wait for it
            self._made = stream, self._make(*sources)
        made = self._made[1]
        self._served += 1
        if self._served >= self._readers:
            self._served, self._made = 0, None
        return made


class Remade:
    """What a tensor can be made of again: ``sources``, and how, `Again`."""

    def __init__(self, tensor: Tensor, sources: Sequence[Tensor], make: Callable[..., Tensor]):
        self.sources = tuple(sources)
        self.again = Again(make)
        self._version = tensor._version


def tell_remade(tensor: Tensor, sources: Sequence[Tensor], make: Callable[..., Tensor]) -> None:
    """Let `remade_of` know that ``make(*sources)`` gives the rows of ``tensor``, bit by bit."""
    setattr(tensor, _ATTRIBUTE, Remade(tensor, sources, make))


def remade_of(tensor: Tensor) -> Remade | None:
    """What this tensor can be made of again; None if that is unknown, or it was written since."""
    found: Remade | None = getattr(tensor, _ATTRIBUTE, None)
    return found if found is not None and found._version == tensor._version else None


def sources_of(
    x: Tensor, remade: Remade | None, reads_x: bool
) -> tuple[Sequence[Tensor | None], Again | None]:
    """What a layer keeps in the place of its input, for `made_of` in its backward pass.

    ``reads_x``: whether that reads the input; where it does not, nothing is kept.
    """
    if not reads_x:
        return (None,), None
    if remade is None:
        return (x,), None
    remade.again.add_reader()
    return remade.sources, remade.again


def made_of(sources: Sequence[Any], again: Again | None) -> Tensor | None:
    """The input of a layer, of what `sources_of` gave; None where the layer does not read it."""
    return sources[0] if again is None else again(*sources)
