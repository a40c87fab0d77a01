"""`DeltaLoRA`: AdamW on the low-rank pairs, and W += lambda s (B'A' - BA), in one `step()`.

One step is Algorithm 1 of the Delta-LoRA paper, for iteration t = 0, 1, ...:

    A', B' = AdamW(A, B)
    if t > K:  W += lambda s (B'A' - BA)

The update telescopes, so "factored" reaches the same model without writing W (see `lora`). Whether
a step counts (`torch.amp.GradScaler`, ``skip_nonfinite``) is known on the device only, so the
iteration lives there. Kernels read what follows from
it there, so a step can be captured in a CUDA graph. The host keeps bounds of it to save launches.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checks import HALF_DTYPES, REMAINDER_DTYPES, ROUNDINGS, wide_dtype
from ..errors import ArgumentError, ArgumentTypeError
from ..kernels.runtime.gpu import is_capturing
from ..layers.lora_linear import LoraLinear
from ..layers.pending_delta import LowRankFactors
from ..layers.writable import check_writable
from . import param_groups as groups_
from .address_tracker import ANY, MOVED
from .device_step import AdamWRun, DeviceStep, found_infs
from .weight_update import WeightUpdate

W_UPDATES = ("inplace", "factored")


class DeltaLoRA(torch.optim.Optimizer):
    """AdamW with the Delta-LoRA update of the frozen weights (Algorithm 1).

    All trainable parameters get AdamW (decoupled weight decay, as `torch.optim.AdamW`, moments in
    float32); those that are a `LoraLinear`'s own pair also move its weight. ``update_ratio=0`` is
    plain LoRA. With updates from the first step on, Delta-LoRA under Adam is LoRA with
    lora_alpha (1 + lambda).

    A step may be captured in a CUDA graph after it has run once outside (`torch.cuda.graph`; the
    gradients and parameters then stay where they were). Replays count; call `send_param_groups`
    between them after changing a value of ``param_groups``.

    Args:
        model_or_params: a swapped model, or an iterable of parameters, modules or param groups
            (whose "params" may be a module). Groups may set lr, betas, eps, weight_decay,
            update_ratio and start_step.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`; lr may be a 0-dim tensor on the
            parameters' device, which LR schedulers fill in place.
        update_ratio: lambda >= 0. It may change between steps (not from 0): what the old value did
            is then folded into W.
        start_step: K, an int >= 0; W is updated where t > K, so K = 0 skips the first step.
        w_update: "inplace" writes W (Algorithm 1); "factored" does not, and adds the same update
            in the forward pass, also for a weight that cannot be written.
        rounding: of a 16-bit W: "remainder" (default; 2 bytes an element), "stochastic" or
            "nearest" (warns once, with the share of the update that is lost). A wider W needs none.
        seed: of the random bits of "stochastic".
        skip_nonfinite: skip a step whose gradients hold an inf or NaN, without a host read.
        model: where ``model_or_params`` holds bare parameters, the model they belong to.

    Raises:
        ArgumentTypeError, ArgumentError: a value as named; a weight that cannot be written in
            place (quantised, tied, shared, expanded); parameters without a swapped layer; a layer
            with dropout whose weight is to be updated.
        SwapError: (in `step`) the model was un-swapped or merged.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over found_inf without reading it

    def __init__(
        self,
        model_or_params: nn.Module | Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        update_ratio: float = 0.5,
        start_step: int = 0,
        w_update: str = "inplace",
        rounding: str | None = None,
        seed: int = 0,
        skip_nonfinite: bool = False,
        model: nn.Module | None = None,
    ):
        if w_update not in W_UPDATES:
            raise ArgumentError("w_update", repr(w_update), " or ".join(map(repr, W_UPDATES)))
        if rounding not in (None, *ROUNDINGS):
            raise ArgumentError("rounding", repr(rounding), f"None, {', '.join(ROUNDINGS)}")
        if not isinstance(seed, int) or not 0 <= seed < 2**62:
            raise ArgumentError("seed", repr(seed), "an int from 0 to 2**62 - 1")
        groups, self._modules = groups_.parse(model_or_params)
        self._modules += [] if model is None else [model]
        self.w_update, self.rounding, self.seed = w_update, rounding, seed
        self.skip_nonfinite = skip_nonfinite
        self._t_least: int = 0  # bounds of the iteration on the device
        self._t_most: float = 0
        self._captured = False  # replays then count steps that the host does not see
        self._devices: dict[torch.device, DeviceStep] = {}
        self._iteration: dict[torch.device, Tensor] = {}
        self._delta: dict[Tensor, Tensor] = {}  # A' - A and B' - B of the current step
        self._bound = self._built = False
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "update_ratio": update_ratio, "start_step": start_step,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self._build()

    # -------------------------------------------------------------------- set-up

    def add_param_group(self, param_group: dict) -> None:
        """Add a group: parameters, or a module's trainable ones. Checked before it is added."""
        if isinstance(param_group.get("params"), nn.Module):
            self._modules.append(param_group["params"])
            params = groups_.trainable(param_group["params"])
            param_group = {**param_group, "params": params}
        groups_.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._built:
            try:
                self._build()
            except ArgumentError:
                self.param_groups.pop()
                self._build()
                raise

    def _build(self) -> None:
        """Allocate the state, and sort the tensors into launches."""
        groups, self._bound = self.param_groups, False
        index = {p: i for i, g in enumerate(groups) for p in g["params"]}
        pairs = groups_.find_pairs(self._modules, groups, index)
        for p in index:
            groups_.check_parameter(p)
        if self.w_update == "inplace":
            check_writable(pairs, self._modules)

        by_device: dict[torch.device, dict] = defaultdict(lambda: defaultdict(list))
        for p, i in index.items():
            by_device[p.device][i, p.dtype].append(p)
        known = next(iter(self._iteration.values()), torch.zeros((), dtype=torch.int64))
        self._devices = {
            device: DeviceStep(device, known, groups, sum(map(len, kinds.values())))
            for device, kinds in by_device.items()
        }
        self._iteration = {device: step.iteration for device, step in self._devices.items()}
        for device, kinds in by_device.items():
            params = [p for ps in kinds.values() for p in ps]
            for p, step in zip(params, self._devices[device].steps, strict=True):
                self._allocate(p, step)

        updates: dict[tuple, dict[str, LoraLinear]] = defaultdict(dict)
        for name, layer in pairs.items():
            updates[index[layer.lora_B], layer.weight.device, layer.weight.dtype][name] = layer
        self._weight_updates = []
        for (i, device, _), layers in updates.items():
            rounding = self.rounding or "remainder"
            for layer in layers.values():
                self._allocate_update(layer, rounding)
            update = WeightUpdate(
                groups[i], layers, self.w_update == "inplace", rounding,
                self.seed + len(self._weight_updates), self.state, self._delta,
            )  # fmt: skip
            update.apply, _ = self._devices[device].flags_of(groups[i])
            update.prepare()
            self._weight_updates.append(update)
        self._plain_groups = [g for g in groups if not g["update_ratio"]]

        for device, step in self._devices.items():
            start = 0
            for (i, _), params in by_device[device].items():
                place = slice(start, start := start + len(params))
                run = AdamWRun(groups[i], params, self.state, self._delta, place, step)
                step.runs.append(run)
            mine = [u for u in self._weight_updates if u.device == device]
            step.add_gates(mine)
            step.watch([m.weight for u in mine if u.inplace for m in u.layers.values()])
        self._adamw_runs = [run for step in self._devices.values() for run in step.runs]
        self._settings: list = [None] * len(groups)  # values of the groups, as last checked
        self._built = True

    def _allocate(self, p: Tensor, step: Tensor) -> None:
        wide = wide_dtype(p.dtype)
        state = self.state[p]
        if state:
            held = state["exp_avg"]
            if held.shape != p.shape or held.device != p.device:
                given = f"a parameter that became {tuple(p.shape)} on {p.device}"
                accepted = f"{tuple(held.shape)} on {held.device}, where its moments are"
                raise ArgumentTypeError("model_or_params", given, accepted)
            step.copy_(state["step"])
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(p.shape, dtype=wide, device=p.device)
        state["step"] = step  # a view into the run's steps

    def _allocate_update(self, layer: LoraLinear, rounding: str) -> None:
        w = layer.matrix
        for p in (layer.lora_A, layer.lora_B):
            if "anchor" not in self.state[p]:
                self.state[p]["anchor"] = torch.zeros_like(p.detach())
            if self.w_update == "inplace" and p not in self._delta:
                self._delta[p] = torch.zeros_like(self.state[p]["exp_avg"])
        keeps = rounding == "remainder" and self.w_update == "inplace"
        state = self.state[layer.lora_B]
        if keeps and w.dtype in HALF_DTYPES and "remainder" not in state:
            low = torch.zeros_like(w.detach(), dtype=REMAINDER_DTYPES[w.dtype])  # W's strides too
            state["remainder"] = low

    # ---------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure=None):
        """AdamW for every parameter with a gradient, then the weight updates.

        Raises before anything is changed: SwapError, ArgumentError (a value of a param group).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        capturing = any(map(is_capturing, self._devices))
        if capturing and not self._bound:
            accepted = "a step outside, which compiles the kernels, then the capture"
            raise ArgumentError("step", "a capture before any step", accepted)
        settings = self._changed_settings()
        if not self._look():
            if capturing:
                given = "a capture after a parameter or weight moved"
                raise ArgumentError("step", given, "a step outside, then the capture")
            if self._bound:
                self._send(settings, capturing)  # of the layers as they were
            self._build()
            self._look()
            settings = self._changed_settings()
        if not self._bound:
            self._bind()
        if not any(step.seen & ANY for step in self._devices.values()):
            return
        self._send(settings, capturing)
        # What GradScaler set lies on one device.
        flag, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        found_inf = found_infs(list(self._devices.values()), flag, self.skip_nonfinite)
        for device, step in self._devices.items():
            step.adamw(grad_scale, found_inf.get(device), capturing)
        wrote = set()
        for update in self._weight_updates:
            t, flag = self._iteration[update.device], found_inf.get(update.device)
            if update.run(t, self._t_least, self._t_most, flag, capturing):
                wrote.add(update.device)
        for device, step in self._devices.items():
            step.advance(found_inf.get(device))
            step.step_watch.wrote(device in wrote)
        if capturing:
            self._captured, self._t_most = True, math.inf
            for step in self._devices.values():
                step.leave_to_graph()
        else:
            self._t_most += 1
            self._t_least += not found_inf

    @torch.no_grad()
    def send_param_groups(self) -> None:
        """Send what changed in ``param_groups`` to the device: for replays of a captured step.

        `step` does it by itself; a replay runs no host code. Nothing waits for the device, unless
        update_ratio changed.

        Raises:
            ArgumentError: a value that cannot be used; another tensor as lr than the captured one;
                update_ratio with w_update "factored", where the forward pass changes its form, or
                without Triton's kernels.
        """
        settings = self._changed_settings()
        if not self._bound:
            self._bind()
        for update in self._weight_updates:
            ratio = update.group["update_ratio"]
            follows = update.inplace and update.backend == "triton"
            if self._captured and not follows and update.ratio != ratio:
                accepted = "the captured one; this path needs a new capture for another"
                raise ArgumentError("update_ratio", ratio, accepted)
        self._send(settings, capturing=False)

    def _look(self) -> bool:
        """Look at gradients, parameters and weights; whether the launches still point to them."""
        same = all([update.check_layers() for update in self._weight_updates])
        for step in self._devices.values():
            same &= not step.look() & MOVED
        return same

    def _changed_settings(self) -> list | None:
        """The groups' values, checked; None where they are those last sent."""
        settings = [
            (g["betas"], g["eps"], g["weight_decay"], g["update_ratio"], g["start_step"])
            for g in self.param_groups
        ]
        if settings == self._settings and not any(
            [run.options_changed() for run in self._adamw_runs]
        ):
            return None
        for group in self.param_groups:
            groups_.check_group(group)
        for update in self._weight_updates:
            update.check_settings()
        for group in self._plain_groups:
            if group["update_ratio"]:
                accepted = "a run that starts with an update ratio above 0"
                raise ArgumentError("update_ratio", f"{group['update_ratio']} after 0", accepted)
        for run in self._adamw_runs:
            run.check_lr(self._captured)
        return settings

    def _send(self, settings: list | None, capturing: bool) -> None:
        if not capturing:
            for update in self._weight_updates:
                update.report_loss()
        if settings is None:
            return
        if capturing:
            given = "changed since the last step, which a capture cannot send"
            raise ArgumentError("param_groups", given, "`send_param_groups()` before the capture")
        for update in self._weight_updates:
            if update.ratio != update.group["update_ratio"]:
                update.change_ratio(self._read_iteration())
        for run in self._adamw_runs:
            if run.options_changed():
                run.send_options()
        self._settings = settings

    def _bind(self, restored=None) -> None:
        t = self._read_iteration()
        for step in self._devices.values():
            step.set_iteration(t)
        for update in self._weight_updates:
            update.bind(t > update.start_step + 1, restored)
        self._bound = True

    def _read_iteration(self) -> int:
        """For set-up and changes of lambda: asks the device only where steps were skipped."""
        if self._t_least != self._t_most:
            self._t_least = int(next(iter(self._iteration.values())))
            self._t_most = math.inf if self._captured else self._t_least
        return self._t_least

    # --------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """As `torch.optim.Optimizer.state_dict`; together with the model's it resumes exactly."""
        saved = super().state_dict()
        params = [p for g in self.param_groups for p in g["params"]]
        index = {p: i for i, p in enumerate(params)}
        layers = [m for u in self._weight_updates for m in u.layers.values() if m.delta]
        saved["state"]["delta_lora"] = {
            "iteration": next(iter(self._iteration.values())).cpu(),
            "w_update": self.w_update,
            "update_ratio": [update.ratio for update in self._weight_updates],
            "folded": {
                index[m.lora_B]: m.delta.past_updates
                and [(p.B, p.A, p.in_weight) for p in m.delta.past_updates]
                for m in layers
            },
        }
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` gave; dtypes and devices stay those of this optimizer.

        Raises:
            ArgumentError: the state is not one of DeltaLoRA, or of other shapes; nothing changed.
        """
        state, groups = state_dict["state"], state_dict["param_groups"]
        groups_.check_state(state, groups, self.w_update, self.state, self.param_groups)
        extra = state["delta_lora"]
        ids = [i for g in groups for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        own, mine = self.state, self.param_groups
        super().load_state_dict({"state": {}, "param_groups": groups})
        for group, loaded in zip(mine, self.param_groups, strict=True):
            lr = group["lr"]
            group.update(loaded)  # the launches hold these very dicts
            if isinstance(lr, Tensor):
                lr.copy_(torch.as_tensor(loaded["lr"]))  # and this very tensor
                group["lr"] = lr
        self.state, self.param_groups = own, mine
        for i, p in zip(ids, params, strict=True):
            for name, value in state[i].items():
                own[p][name].copy_(value)
        for t in self._iteration.values():
            t.copy_(extra["iteration"])
        self._t_least = int(extra["iteration"])
        self._t_most = math.inf if self._captured else self._t_least
        for update, ratio in zip(self._weight_updates, extra["update_ratio"], strict=True):
            update.set_ratio(ratio)
        restored = {}
        for i, products in extra["folded"].items():
            p = params[ids.index(i)]
            kept = [LowRankFactors(b.to(p.device), a.to(p.device), w) for b, a, w in products or ()]
            restored[p] = None if products is None else kept
        self._bind(restored)
