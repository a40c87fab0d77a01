"""`DeviceStep`: one device's part of an optimizer step, in few launches and little host time.

Three launches, whatever the number of layers: AdamW (one a param group and dtype), the update of W
(likewise, in `weight_update`), and one that counts. They read pointers, options and counts from the
device. The host only looks whether a tensor moved, so a step can also be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..errors import ArgumentError
from ..kernels.runtime.async_copy import send
from ..ops.adamw_step import prepare_adamw_step
from ..ops.dispatch import choose_path
from ..ops.step_counters import run_advance
from . import address_tracker as step_watch

NEVER = 2**62


class Gates:
    """The gates of one dtype, in one vector, and what they become in which iteration."""

    SPACING = 64  # elements: each gate starts a cache line

    def __init__(self, sizes: list[int], dtype: torch.dtype, device: torch.device):
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // self.SPACING) * self.SPACING)
        self.places = [slice(a, a + n) for a, n in zip(starts, sizes, strict=False)]
        self.now = torch.zeros(starts[-1], dtype=dtype, device=device)
        self.opened = torch.zeros_like(self.now)
        self.opens = torch.full(self.now.shape, NEVER, dtype=torch.int64, device=device)


class AdamWRun:
    """AdamW for the parameters of one group, device and dtype."""

    def __init__(self, group, params: list[Tensor], state, delta, place: slice, device_step):
        self.group, self.params, self.place, self.options = group, params, place, None
        self.steps = device_step.steps[place]
        _, self.anchor_now = device_step.flags_of(group)
        self.backend = choose_path(params[0].device, params[0].dtype).backend
        self.step = prepare_adamw_step(
            self.backend, params,
            [state[p]["exp_avg"] for p in params], [state[p]["exp_avg_sq"] for p in params],
            [delta.get(p) for p in params], [state[p].get("anchor") for p in params],
        )  # fmt: skip

    def options_changed(self) -> bool:
        lr, options = self._options()
        if self.options is None or options != self.options[1]:
            return True
        known = self.options[0]
        if isinstance(lr, Tensor) or isinstance(known, Tensor):
            return lr is not known
        return lr != known

    def check_lr(self, captured: bool) -> None:
        """Raise where a captured step reads another lr than the group's."""
        lr, known = self.group["lr"], self.options and self.options[0]
        if captured and lr is not known and (isinstance(lr, Tensor) or isinstance(known, Tensor)):
            accepted = "the lr that the step was captured with, a tensor filled in place"
            raise ArgumentError("lr", f"another {type(lr).__name__}", accepted)

    def send_options(self) -> None:
        """Hand lr, betas, eps and weight_decay of the group to the device."""
        lr, options = self._options()
        beta1, beta2, eps, weight_decay = options
        lr = lr if isinstance(lr, Tensor) else float(lr)
        self.step.set_options(lr, beta1, beta2, eps, weight_decay)
        self.options = lr, options

    def _options(self) -> tuple:
        group = self.group
        return group["lr"], (*group["betas"], group["eps"], group["weight_decay"])


class DeviceStep:
    """Parameters, counters and gates of one device.

    Attributes:
        iteration: 0-dim int64, t.
        flags: (groups, 2) int32, of the coming iteration: t > K, t == K + 1.
        steps: (parameters,) float32, done by each.
    """

    def __init__(self, device: torch.device, iteration: Tensor, groups: list[dict], params: int):
        self.device = device
        self.iteration = iteration.to(device, copy=True)
        self.steps = torch.zeros(params, dtype=torch.float32, device=device)
        firsts = [group["start_step"] + 1 for group in groups]
        self.firsts = torch.tensor(firsts, dtype=torch.int64, device=device)
        self.flags = torch.zeros(len(groups), 2, dtype=torch.int32, device=device)
        self.group_flags = {id(g): tuple(f) for g, f in zip(groups, self.flags, strict=True)}
        self.backend = choose_path(device, torch.float32).backend
        self.runs: list[AdamWRun] = []
        self.gates: list[Gates] = []
        self.grads: Tensor | None = None
        self.graph_grads: list[Tensor] = []

    def flags_of(self, group: dict) -> tuple[Tensor, Tensor]:
        """0-dim views: t > K and t == K + 1 of a param group."""
        return self.group_flags[id(group)]

    def add_gates(self, updates: list) -> None:
        """Give each weight update of this device its gates, one a rank."""
        wanted: dict[torch.dtype, list] = {}
        for update in updates:
            for layer in update.layers.values():
                dtype = layer.lora_A.dtype
                dtype = wide_dtype(dtype)
                pairs = wanted.setdefault(dtype, [])
                if (update, layer.r) not in pairs:
                    pairs.append((update, layer.r))
        for dtype, pairs in wanted.items():
            gates = Gates([2 * r for _, r in pairs], dtype, self.device)
            for (update, r), place in zip(pairs, gates.places, strict=True):
                update.gates[r], update.opened[r] = gates.now[place], gates.opened[place]
                gates.opens[place] = update.start_step + 2
            self.gates.append(gates)
        if not self.gates:
            self.gates.append(Gates([], torch.float32, self.device))

    def watch(self, weights: list[Tensor]) -> None:
        params = [p for run in self.runs for p in run.params]
        self.step_watch = step_watch.step_watch(params, weights)

    def set_iteration(self, t: int) -> None:
        self.iteration.fill_(t)
        self.flags[:, 0] = self.firsts <= t
        self.flags[:, 1] = self.firsts == t

    def look(self) -> int:
        """The bits of `StepWatch.look`."""
        self.seen = self.step_watch.look()
        return self.seen

    def adamw(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        if self.seen & step_watch.GRADS or self.grads is None or capturing:
            addresses = self.step_watch.grads()
            # Never the old vector: a captured graph may be reading it.
            self.grads = send(addresses, torch.empty_like(addresses, device=self.device))
            self.parts = [(run, self.grads[run.place]) for run in self.runs]
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.device, non_blocking=True)
        aligned = bool(self.seen & step_watch.ALIGNED)
        for run, grads in self.parts:
            run.step(grads, aligned, run.steps, run.anchor_now, grad_scale, found_inf)

    def advance(self, found_inf: Tensor | None) -> None:
        """Count the step."""
        first, *others = self.gates
        run_advance(
            self.backend, self.iteration, self.steps, self.grads, self.firsts, self.flags,
            first.now, first.opened, first.opens, found_inf,
        )  # fmt: skip
        for gates in others:  # adapters of float32 and float64 on one device
            opened = torch.where(self.iteration >= gates.opens, gates.opened, gates.now)
            gates.now.copy_(opened)

    def leave_to_graph(self) -> None:
        """The addresses of gradients that a graph was captured with are its own from now on."""
        self.graph_grads.append(self.grads)
        self.grads = None


def found_infs(
    steps: list[DeviceStep], flag: Tensor | None, skip_nonfinite: bool
) -> dict[torch.device, Tensor]:
    """Per device a tensor that is not 0 where this step must be skipped; empty: never.

    ``flag``: such a tensor of the caller's, on any device.
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
    return {
        step.device: torch.stack(
            [f.to(step.device, non_blocking=True).view(()) for f in flags]
        ).amax()
        for step in steps
    }
