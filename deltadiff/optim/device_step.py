"""`DeviceStep`: one device's part of an optimizer step, in few launches and little host time.

Whatever the number of parameters, AdamW is one launch for each param group and dtype, and counting
the step is one more. (The update of W comes between them, see `weight_update`.) The kernels read
pointers, options and counts from the device. The host only looks whether a tensor moved, so a step
can also be captured in a CUDA graph.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError
from ..kernels.runtime.async_copy import copy_async
from ..ops.adamw_step import prepare_adamw_step
from ..ops.dispatch import choose_path
from ..ops.step_counters import advance_counters
from ..ranks import is_sharded, local
from .address_tracker import ALIGNED, GRADS, track_addresses
from .shards import to_launch
from .update_start import UpdateStart


class AdamWRun:
    """AdamW for the parameters of one param group, device and dtype.

    Args:
        group: the param group; its values may change between steps.
        params: what the launches get of the parameters, see `DeviceStep.tensors`.
        moments: the two of each.
        steps: (parameters,) float32, the steps done by each.
        deltas, anchors, anchor_now, copies, moved: as for `adamw_step_`.
    """

    def __init__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        moments: tuple[list[Tensor], list[Tensor]],
        steps: Tensor,
        deltas: list[Tensor | None] | None = None,
        anchors: list[Tensor | None] | None = None,
        anchor_now: Tensor | None = None,
        copies: list[Tensor | None] | None = None,
        moved: Tensor | None = None,
    ):
        none: list[Tensor | None] = [None] * len(params)
        self.moved = moved
        self.group, self.params, self.steps, self.anchor_now = group, params, steps, anchor_now
        # What the device has.
        self.sent_lr: float | Tensor | None = None
        self.sent_options: tuple[float, ...] | None = None
        backend = choose_path(params[0].device, params[0].dtype).backend
        self.launch = prepare_adamw_step(
            backend, params, *moments, deltas or none, anchors or none, copies or none,
        )  # fmt: skip

    def lr_changed(self) -> bool:
        """Whether the group's lr is not the one that the device has; asked in every step."""
        lr, sent = self.group["lr"], self.sent_lr
        if lr is sent:
            return False
        return isinstance(lr, Tensor) or isinstance(sent, Tensor) or lr != sent

    def check_lr(self, captured: bool) -> None:
        """Raise where a captured step reads another lr than the group's."""
        lr, sent = self.group["lr"], self.sent_lr
        if captured and lr is not sent and (isinstance(lr, Tensor) or isinstance(sent, Tensor)):
            accepted = "the lr that the step was captured with, a tensor filled in place"
            raise ArgumentError("lr", f"another {type(lr).__name__}", accepted)

    def send_options(self) -> None:
        """Send lr, betas, eps and weight_decay of the group to the device, if one changed."""
        group = self.group
        options = *group["betas"], group["eps"], group["weight_decay"]
        if options == self.sent_options and not self.lr_changed():
            return
        lr = group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"])
        self.launch.set_options(lr, *options)
        self.sent_lr, self.sent_options = lr, options


class DeviceStep:
    """The parameters of one device, in the order of their launches, and what is counted there.

    Args:
        device: where all of it is.
        iteration: 0-dim int64, the steps that were not skipped so far.
        kinds: the parameters, by index of their param group and dtype.

    Attributes:
        iteration: t, its own copy, raised by one in each step that is not skipped.
        params: the parameters; ``places`` says which belong to which group's launch.
        tensors: what the launches get of them: of a sharded one an alias of its local part.
        steps: (parameters,) float32, the steps done by each.
        runs: the AdamW launches.
        start: of the weight updates; there are none unless `DeltaLoRA` has some.
        weights: tensors besides the parameters whose move shall be noticed.
        copies: what the last step left, of the parameters of which that is kept.
        moved: (parameters,) int32, see `adamw_step_`.
        seen: the bits of the last look, see `AddressTracker.look`.
    """

    def __init__(
        self,
        device: torch.device,
        iteration: Tensor,
        kinds: dict[tuple[int, torch.dtype], list[Tensor]],
    ):
        self.device = device
        self.iteration = iteration.to(device, copy=True)
        self.params: list[Tensor] = []
        self.places: list[tuple[int, slice]] = []
        for (i, _), params in kinds.items():
            self.places.append((i, slice(len(self.params), len(self.params) + len(params))))
            self.params += params
        self.tensors = [to_launch(p) if is_sharded(p) else p for p in self.params]
        pairs = zip(self.params, self.tensors, strict=True)
        self._sharded = [(p, alias) for p, alias in pairs if alias is not p]
        self.steps = torch.zeros(len(self.params), dtype=torch.float32, device=device)
        self.backend = choose_path(device, torch.float32).backend
        self.runs: list[AdamWRun] = []
        self.start = UpdateStart(device, [], [])
        self.weights: list[Tensor] = []
        self.copies: list[Tensor | None] = [None] * len(self.params)
        self.moved = torch.zeros(len(self.params), dtype=torch.int32, device=device)
        self.seen = 0
        self._grads: Tensor  # addresses, on the device; there once there are launches
        self._launches: list[tuple[AdamWRun, Tensor]] = []  # each with its part of the addresses
        self._graph_grads: list[Tensor] = []

    def watch(self) -> None:
        """Notice from now on when a parameter or weight moves."""
        copies = [copy if copy is None else to_launch(copy) for copy in self.copies]
        self.tracker = track_addresses(self.tensors, [*map(local, self.weights)], copies)

    def set_iteration(self, t: int) -> None:
        self.iteration.fill_(t)
        self.start.set_iteration(t)

    def look(self) -> int:
        """Look at all addresses; the bits of `AddressTracker.look`."""
        for p, alias in self._sharded:
            alias.grad = None if p.grad is None else to_launch(p.grad)
        self.seen = self.tracker.look()
        return self.seen

    def adamw(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        """Launch AdamW for every parameter that had a gradient at the last look."""
        if self.seen & GRADS or not self._launches or capturing:
            addresses = self.tracker.grads()
            # A new vector each time, because a captured graph may be reading the old one.
            self._grads = copy_async(addresses, torch.empty_like(addresses, device=self.device))
            parts = [self._grads[place] for _, place in self.places]
            self._launches = list(zip(self.runs, parts, strict=True))
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.device, non_blocking=True)
        aligned = bool(self.seen & ALIGNED)
        for run, grads in self._launches:
            run.launch(grads, aligned, run.steps, run.anchor_now, grad_scale, found_inf, run.moved)

    def advance(self, found_inf: Tensor | None) -> None:
        """Count the step."""
        start = self.start
        first, *others = start.rank_scales
        advance_counters(
            self.backend, self.iteration, self.steps, self._grads, start.firsts, start.flags,
            first.now, first.after, first.from_iteration, found_inf,
        )  # fmt: skip
        for scales in others:  # adapters of float32 and of float64 on one device
            reached = self.iteration >= scales.from_iteration
            scales.now.copy_(torch.where(reached, scales.after, scales.now))

    def forget_grads(self) -> None:
        """Send the addresses of gradients at the next step, whatever that look sees."""
        self._launches = []

    def leave_to_graph(self) -> None:
        """Keep the addresses of gradients that a graph was captured with for its replays."""
        self._graph_grads.append(self._grads)
        self._launches = []


def agreed(steps: Collection[DeviceStep], flags: list[Tensor]) -> list[Tensor]:
    """The flags, and where parameters are sharded those of the other processes, too."""
    for step in steps:
        meshes = {p.device_mesh for p in step.params if is_sharded(p)}
        if meshes:
            most = torch.stack([f.to(step.device).view(()) for f in flags]).amax().float()
            for mesh in meshes:
                for dim in range(mesh.ndim):
                    dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group(dim))
            return [most]
    return flags


def found_infs(
    steps: Collection[DeviceStep], flag: Tensor | None, skip_nonfinite: bool
) -> dict[torch.device, Tensor]:
    """For each device a tensor that is not 0 where this step must be skipped.

    The dict is empty where no step is ever skipped. ``flag``: such a tensor of the caller's, on any
    device. ``skip_nonfinite``: also skip where a gradient is not finite.
    """
    flags = [] if flag is None else [flag]
    if skip_nonfinite:
        for run in (run for step in steps for run in step.runs):
            grads = [p.grad for p in run.params if p.grad is not None]
            if grads:
                largest = torch.stack(torch._foreach_norm(grads, float("inf"))).max()
                flags.append((~largest.isfinite()).float())
    if not flags:
        return {}
    flags = agreed(steps, flags)
    return {
        step.device: torch.stack(
            [f.to(step.device, non_blocking=True).view(()) for f in flags]
        ).amax()
        for step in steps
    }
