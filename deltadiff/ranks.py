"""Processes that train one model together, and tensors of which each of them holds a part.

`Ranks` are the processes of a group. A *sharded* tensor is a DTensor, as FSDP2 (`fully_shard`)
makes them of parameters: split by rows over the processes. A *unit* is a module on which
`fully_shard` was called.
"""

import hashlib
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .errors import ArgumentError, SwapError

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


FSDP = "torch.distributed.fsdp"

Value = TypeVar("Value")


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    fsdp = sys.modules.get(FSDP)  # where nobody imported it, there is no such module
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def plain_kind(module: nn.Module) -> type:
    """The class of a module, without the one that `fully_shard` puts before it."""
    return type(module).__mro__[2] if is_unit(module) else type(module)


def reshard(model: nn.Module) -> bool:
    """Put sharded parameters where FSDP left whole ones; whether FSDP shards the model at all.

    What is written to a whole one is lost to the next forward pass.
    """
    units: list[Any] = [m for m in model.modules() if is_unit(m)]
    for unit in units:
        unit.reshard()
    return bool(units)


def is_partitioned(t: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the values of a parameter, and left an empty one here."""
    return hasattr(t, "ds_id") and t.numel() == 0


def whole_shape(t: Tensor) -> torch.Size:
    """The shape of all of a parameter, which ZeRO-3 may have partitioned."""
    return getattr(t, "ds_shape", t.shape) if is_partitioned(t) else t.shape


def gathered(params: Iterable[Tensor]) -> AbstractContextManager:
    """A context in which what ZeRO-3 has partitioned is whole; all processes enter it."""
    parts = [p for p in params if is_partitioned(p)]
    return sys.modules["deepspeed"].zero.GatheredParameters(parts) if parts else nullcontext()


def check_not_partitioned(call: str, model: nn.Module) -> None:
    """Raise SwapError where ZeRO-3 holds values that a call would read or write."""
    if any(map(is_partitioned, model.parameters())):
        given = "parameters that DeepSpeed's ZeRO-3 has partitioned"
        accepted = "`deepspeed.zero.GatheredParameters(list(model.parameters()))` around it"
        raise SwapError(call, given, accepted)


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether ``t`` is a DTensor, of which this process may hold a part alone."""
    return hasattr(t, "device_mesh")


def local(t: Any) -> Any:
    """The part of a tensor that this process holds, in the same memory; all of it, if whole."""
    return t._local_tensor if is_sharded(t) else t


def device_of_passes(t: Tensor) -> torch.device:
    """Where forward passes use a parameter, which FSDP may keep on the CPU until then."""
    kind = t.device_mesh.device_type if is_sharded(t) else t.device.type
    if kind == t.device.type:
        return t.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All of a tensor, detached. Of a sharded one it is a copy, which all processes ask for."""
    t = t.detach()
    return t.full_tensor() if is_sharded(t) else t


def view_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of a matrix as rows of another dtype, in the same memory if its rows lie densely.

    Of a sharded matrix, it is sharded alike.
    """
    part = local(t).contiguous()
    part = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
    shape = t.shape[0], t.shape[1] * t.dtype.itemsize // dtype.itemsize
    return _sharded(part.view(dtype), t, shape) if is_sharded(t) else part.view(dtype)


def shard_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which ``part`` is what this process holds, sharded as ``like`` of its shape."""
    return _sharded(part, like, like.shape) if is_sharded(like) else part


def whole_stack(parts: Tensor, like: Tensor) -> Tensor:
    """(n, *shape) of what this process holds of n tensors that are sharded as ``like``.

    Differentiable, as seen from one process: each gets the gradient of its own part. All processes
    call it.
    """
    if not is_sharded(like):
        return parts
    return _sharded(parts, like, (len(parts), *like.shape), dim=1).full_tensor()


def _sharded(part: Tensor, like: "DTensor", shape: Sequence[int], dim: int = 0) -> "DTensor":
    """``part`` as that of a contiguous tensor, split along ``dim`` as another one is by rows."""
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(dim) if p.is_shard() else p for p in like.placements]
    whole_shape = torch.Size(shape)
    stride = torch.empty(whole_shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=whole_shape, stride=stride
    )


def first_row(t: Tensor) -> int:
    """The number of the first row of ``local(t)`` in all of ``t``."""
    dim, first = _place(t)
    return first if dim == 0 else 0


def _place(t: Tensor) -> tuple[int, int]:
    """The dimension along which a tensor is split, and where ``local(t)`` begins in it."""
    if not is_sharded(t):
        return 0, 0
    places: list[tuple[int, Any]] = [*enumerate(t.placements)]
    mesh_dim, placement = next(((i, p) for i, p in places if p.is_shard()), (0, None))
    if placement is None:
        return 0, 0
    size = t.shape[placement.dim]
    most = -(-size // t.device_mesh.size(mesh_dim))  # what every process but the last ones has
    return placement.dim, min(size, most * t.device_mesh.get_local_rank(mesh_dim))


@torch.no_grad()
def copy_values(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` into ``target``, of the same shape; each may be sharded or whole."""
    if is_sharded(target) and not is_sharded(source):
        local(target).copy_(own_part(source, target))
    else:
        target.copy_(source if is_sharded(target) else whole(source))


def check_alike(argument: str, value: object, sharded: Tensor) -> None:
    """Raise ArgumentError unless all processes of a sharded tensor have one value; all call it."""
    if is_sharded(sharded):
        mesh = sharded.device_mesh
        for dim in range(mesh.ndim):
            Ranks(mesh.get_group(dim)).check_alike({argument: value})


def own_part(t: Tensor, sharded: Tensor) -> Tensor:
    """The part of a whole tensor beside that which this process holds of another one."""
    dim, first = _place(sharded)
    return t.narrow(dim, first, local(sharded).shape[dim])


def add_up(sums: Tensor, sharded: Tensor) -> None:
    """Add up in place what each process found out about its part of a sharded tensor."""
    if is_sharded(sharded):
        dim = next(i for i, p in enumerate(sharded.placements) if p.is_shard())
        dist.all_reduce(sums, group=sharded.device_mesh.get_group(dim))


def like_shards(t: Tensor, other: Tensor) -> Tensor:
    """``t``, or its part where ``other``, of the same shape, is sharded and ``t`` is not."""
    if is_sharded(t) or not is_sharded(other):
        return t
    part = torch.empty_like(other.detach(), dtype=t.dtype)
    copy_values(part, t)
    return part


def of_the_first(found: dict[str, Tensor], sharded: "DTensor") -> dict[str, Tensor]:
    """``found`` of the first process, where the processes of a sharded tensor have unlike ones.

    All of them call this. torch.distributed's ``broadcast_from_rank0`` leaves entries of a state
    that are no parameters with the first process alone.

    Raises:
        ArgumentError: another process has more than the first one.
    """
    mesh = sharded.device_mesh
    for dim in reversed(range(mesh.ndim)):
        group = mesh.get_group(dim)
        counts = torch.tensor([len(found), -len(found)], device=mesh.device_type)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=group)
        most, least = counts.tolist()
        if most == -least:
            continue
        sent = [{name: whole(t).cpu() for name, t in found.items()}]
        dist.broadcast_object_list(sent, dist.get_global_rank(group, 0), group=group)
        found = sent[0]
        if len(found) < most:
            given = "an update of Delta-LoRA that the first process does not have"
            raise ArgumentError("state_dict", given, "the same state in all processes")
    return found


def why_no_shard(t: Tensor) -> str | None:
    """None for a whole tensor, or one that is split by rows as `fully_shard` does, else why not."""
    if not is_sharded(t):
        return None
    by_rows = [p.is_shard(0) and type(p).__name__ == "Shard" for p in t.placements]
    if sum(by_rows) == 1 and all(
        here or p.is_replicate() for here, p in zip(by_rows, t.placements, strict=True)
    ):
        return None
    return f"a DTensor with placements ({', '.join(map(str, t.placements))})"


class Ranks:
    """The processes of a group. One process alone needs no group, and then nothing is sent.

    All processes of the group call each method, in the same order.

    Args:
        group: None is the default group where `torch.distributed` runs, else this process alone.

    Attributes:
        rank, size: the number of this process in the group, and how many there are.

    Raises:
        ArgumentError: this process does not belong to the group.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        running = dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if running else 1
        self.rank = dist.get_rank(group) if running else 0
        if self.rank < 0:
            given = "a group that this process does not belong to"
            raise ArgumentError("process_group", given, "a group of this process, or None")

    # ---------------------------------------------------------------------- agreement

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by their numbers. They can be pickled."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def of_first(self, value: Value) -> Value:
        """The value of the first process, which can be pickled."""
        sent = [value]
        if self.size > 1:
            dist.broadcast_object_list(sent, self._first, group=self.group)
        return sent[0]

    def check_alike(self, values: Mapping[str, object]) -> None:
        """Raise ArgumentError, in all processes, unless each has the same values.

        Args:
            values: by the names of arguments. They are the same where their `repr` is.
        """
        if self.size == 1:
            return
        texts = {name: repr(value) for name, value in values.items()}
        mine = {
            name: (hashlib.sha256(text.encode()).hexdigest(), f"{text:.60}")
            for name, text in texts.items()
        }
        first, *others = self.gather(mine)
        for rank, theirs in enumerate(others, 1):
            for name in {**first, **theirs}:
                one, shown = first.get(name, ("", "nothing"))
                other, also = theirs.get(name, ("", "nothing"))
                if one != other:
                    given = f"{shown} in process 0 and {also} in process {rank}"
                    raise ArgumentError(name, given, "the same in all of them")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that raises in all processes where it raises in one.

        A process in which it did not fail raises the error of the first one in which it did. In the
        block a process does not wait for the others, which may have failed by then.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else _to_send(failure))
        if failure is not None:
            raise failure
        for rank, theirs in enumerate(failures):
            if theirs is not None:
                raise theirs from RuntimeError(f"process {rank} of {self.size} raised this error")

    # ------------------------------------------------------------------------ tensors

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes into each tensor, in place.

        The tensors have the same shapes, dtypes and order in all of them. What is not finite in one
        process is not finite in any afterwards.
        """
        if self.size == 1:
            return
        for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
            mine = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = _flatten_dense_tensors(mine)
            dist.all_reduce(flat, group=self.group)
            flat /= self.size
            torch._foreach_copy_(mine, _unflatten_dense_tensors(flat, mine))

    def largest_(self, t: Tensor) -> None:
        """Put the largest entries over all processes into a tensor, in place."""
        if self.size > 1:
            dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Put the values of the first process into the tensors of all, in place."""
        if self.size == 1:
            return
        for t in tensors:
            dist.broadcast(t, self._first, group=self.group)

    @property
    def _first(self) -> int:
        """The number of the first process among all that there are."""
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)


def _to_send(error: Exception) -> Exception:
    """The error as other processes can get it, which is a text where it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the class of a stranger's error does
        return RuntimeError(f"{type(error).__name__}: {error}")
