"""`TrainedParams`: what the inner steps of a search train, whole or sharded by FSDP2."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ArgumentError, SwapError
from ..layers.fsdp_places import check_replaceable
from ..ranks import Ranks, is_sharded, reshard

ORDER = "`Search`, then `fully_shard`, then the steps"


class TrainedParams(dict[str, Tensor]):
    """The trainable parameters of a model, by name.

    `fully_shard` puts other parameters into the modules, of which each process holds a part; the
    names stay those of the whole ones. FSDP averages the gradients of what it shards.

    Args:
        model: swapped, and not sharded yet.
    """

    def __init__(self, model: nn.Module):
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        super().__init__(named)
        self._model = model
        names = {p: name for name, p in self.items()}
        self._places: dict[str, tuple[dict[str, Any], str]] = {
            names[p]: (module._parameters, key)
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None and p in names
        }

    @property
    def whole(self) -> list[Tensor]:
        """Those of which each process has all."""
        return [p for p in self.values() if not is_sharded(p)]

    @property
    def sharded(self) -> bool:
        """Whether there are others."""
        return len(self.whole) < len(self)

    def follow(self, ranks: Ranks, layers: Mapping[str, nn.Module], started: bool) -> bool:
        """Take the parameters that stand in the model now.

        Args:
            ranks: the processes that search together.
            layers: the swapped layers, by name, whose places others take after the search.
            started: whether steps were taken, whose moments belong to the parameters so far.

        Returns:
            Whether there are other parameters than before.

        Raises:
            SwapError: there are, after the first step; or `fully_shard` was called on a layer.
            ArgumentError: other processes hold parts of the model than search together.
        """
        if not self._moved():
            return False
        reshard(self._model)
        if not self._moved():
            return False
        if started:
            given = "other parameters than before in the model, after steps of the search"
            accepted = f"{ORDER}; or its `state_dict`, which a new search can load"
            raise SwapError("search", given, accepted)
        check_replaceable("Search", self._model, layers)
        now = {name: held[key] for name, (held, key) in self._places.items()}
        _check_mesh(ranks, now.values())
        self.update(now)
        return True

    def _moved(self) -> bool:
        """Whether other parameters stand in the model than these."""
        return any(held.get(key) is not self[name] for name, (held, key) in self._places.items())

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """While the block runs, the whole ones do not require gradients.

        FSDP settles in its first forward pass what it reduces, so sharded ones go on to. They get
        no gradients from `torch.autograd.grad` with respect to others.
        """
        whole = self.whole
        for p in whole:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in whole:
                p.requires_grad_(True)


def _check_mesh(ranks: Ranks, params: Collection[Tensor]) -> None:
    """Raise ArgumentError unless sharded parameters lie on the processes that search together."""
    for p in params:
        if is_sharded(p):
            mesh = sorted(p.device_mesh.mesh.flatten().tolist())
            own = sorted(dist.get_process_group_ranks(ranks.group))
            if mesh != own:
                given = f"processes {own}, of a model that is sharded over {mesh}"
                raise ArgumentError("process_group", given, "the processes of the model")
