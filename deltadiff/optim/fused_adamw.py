"""`FusedAdamW`: AdamW for all parameters of a param group in one launch.

Its step is a sequence of methods, which `DeltaLoRA`, `AdaLoRA` and `DyLoRA` extend:

    _changed_settings   check the values of the param groups that changed since the last step
    _look               look whether a tensor moved; `_build` prepares the launches anew if so
    _send               send the changed values to the device
    AdamW               one launch for each param group, dtype and device
    _after_adamw        nothing here; `DeltaLoRA` updates the frozen weights
    count               one launch for each device

Only the device knows whether a step counts (`torch.amp.GradScaler`, ``skip_nonfinite``), so the
counts lie there. All kernels read them there, and a step can be captured in a CUDA graph.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..checks import wide_dtype
from ..errors import ArgumentError, ArgumentTypeError
from ..kernels.runtime.gpu import is_capturing
from ..ranks import is_sharded
from .address_tracker import ANY, MOVED, WRITTEN
from .device_step import AdamWRun, DeviceStep, found_infs
from .param_groups import (
    ModelOrParams,
    check_group,
    check_parameter,
    group_indices,
    parse_groups,
    trainable,
)
from .resumable import Resumable
from .shards import ShardedPlaces, check_exchange, check_order, check_shared_pairs, to_launch
from .zero_vectors import check_vectors

Loss = TypeVar("Loss")  # what a closure returns


class FusedAdamW(Resumable):
    """AdamW (decoupled weight decay) for any parameters, with few launches and little host time.

    It computes what `torch.optim.AdamW` computes, with moments in float32 (float64 for float64
    parameters), and unscales gradients in the same launch. No step waits for the device.

    A step may be captured in a CUDA graph after it has run once outside (`torch.cuda.graph`; the
    gradients and parameters then stay where they were). Replays count; call `send_param_groups`
    between them after changing a value of ``param_groups``.

    `copy.deepcopy((model, optimizer))`, or pickling both in one call, gives a pair that trains on
    as this one does.

    Args:
        model_or_params: a model, whose trainable parameters are taken, or an iterable of
            parameters, modules or param groups (whose "params" may be a module). Groups may set
            lr, betas, eps and weight_decay. Parameters are contiguous float32, bfloat16, float16 or
            float64 tensors on any devices.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; lr may be a 0-dim tensor on the
            parameters' device, which LR schedulers fill in place.
        skip_nonfinite: skip a step whose gradients hold an inf or NaN; the host does not read them.

    Raises:
        ArgumentTypeError, ArgumentError: an option or parameter that cannot be used, by name.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over found_inf without reading it

    # GradScaler sets these two before a step; at other times they may be missing.
    found_inf: Tensor
    grad_scale: Tensor

    _places: ShardedPlaces | None = None  # where sharded parameters stand
    _held: list[list[Tensor]]  # of each group, the parameters that launches were prepared for
    # Of groups like those of DeepSpeed's ZeRO, whose universal checkpoints put other moments there.
    _vector_moments: list[tuple[Tensor, Tensor]]

    # A derived method sets these two before it calls `__init__`.
    _model: nn.Module | None = None  # the model that bare parameters belong to
    _method_defaults: dict[str, Any] = {}  # of the values that it adds to param groups
    # Searches that older versions saved hold states of a `DeltaLoRA` that updates nothing.
    _methods: tuple[str, ...] = ("FusedAdamW", "DeltaLoRA")
    # The values of a param group that the host compares in each step; `AdamWRun` compares lr.
    _settings_of: Callable[[dict[str, Any]], tuple] = itemgetter("betas", "eps", "weight_decay")

    def __init__(
        self,
        model_or_params: ModelOrParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        skip_nonfinite: bool = False,
    ):
        groups, self._modules = parse_groups(model_or_params)
        self._modules += [] if self._model is None else [self._model]
        self.skip_nonfinite = skip_nonfinite
        self._devices: dict[torch.device, DeviceStep] = {}
        self._iteration: dict[torch.device, Tensor] = {}  # steps that were not skipped
        self._captured = False  # replays then count steps that the host does not see
        self._bound = self._built = False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults | self._method_defaults)
        self._build()

    # -------------------------------------------------------------------- set-up

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: parameters, or a module's trainable ones.

        Raises:
            ArgumentTypeError, ArgumentError: as for the constructor; nothing was added.
        """
        modules = []
        if isinstance(param_group.get("params"), nn.Module):
            modules = [param_group["params"]]
            param_group = {**param_group, "params": trainable(modules[0])}
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if not self._built:
            return  # torch's constructor adds the first groups; ours builds after it
        self._modules += modules
        try:
            self._build()
        except ArgumentError:
            self.param_groups.pop()
            del self._modules[len(self._modules) - len(modules) :]
            self._build()
            raise

    def _build(self) -> None:
        """Allocate the state, and prepare the launches for where the tensors lie now."""
        self._restore_places()
        params = [*group_indices(self.param_groups)]
        check_order(self._modules, params)
        check_exchange(self.state.keys(), params, self._iteration.values())
        if self._built:
            check_vectors(self._modules, params, len(self._held), self.skip_nonfinite)
        self._check_tensors()
        sharded = any(map(is_sharded, params))
        if sharded:
            check_shared_pairs(self._modules)
        self._places = ShardedPlaces(self._modules, params) if sharded else None
        for p in self.state.keys() - group_indices(self.param_groups).keys():
            del self.state[p]  # somebody took it out of the groups
        self._bound = False
        kinds: dict[torch.device, dict[tuple[int, torch.dtype], list[Tensor]]]
        kinds = defaultdict(lambda: defaultdict(list))
        for p, i in group_indices(self.param_groups).items():
            kinds[p.device][i, p.dtype].append(p)
        known = next(iter(self._iteration.values()), torch.zeros((), dtype=torch.int64))
        self._devices = {
            device: DeviceStep(device, known, params) for device, params in kinds.items()
        }
        self._iteration = {device: step.iteration for device, step in self._devices.items()}
        for step in self._devices.values():
            for p, count in zip(step.params, step.steps, strict=True):
                self._allocate(p, count)
        self._prepare()
        self._settings: Sequence[tuple | None]  # as last sent to the device
        self._settings = [None] * len(self.param_groups)
        self._held = [list(group["params"]) for group in self.param_groups]
        alone = [held[0] for held in self._held if len(held) == 1]
        self._vector_moments = [(p, self.state[p]["exp_avg"]) for p in alone]
        self._built = True

    def _check_tensors(self) -> None:
        """Raise where a parameter cannot be trained, before anything is allocated."""
        for p in group_indices(self.param_groups):
            check_parameter(p)
            held = self.state[p]["exp_avg"] if p in self.state else p
            if held.shape != p.shape:
                given = f"a parameter that became {tuple(p.shape)}"
                accepted = f"{tuple(held.shape)}, as its moments are"
                raise ArgumentTypeError("model_or_params", given, accepted)

    def _allocate(self, p: Tensor, step: Tensor) -> None:
        state, wide = self.state[p], wide_dtype(p.dtype)
        if state:
            step.copy_(state["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(p.device, wide)  # where the parameter was moved
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p.detach(), dtype=wide)  # sharded as p is
        state["step"] = step  # a view into the steps of its device

    def _prepare(self) -> None:
        """Prepare the launches; all moments are allocated."""
        self._runs: list[AdamWRun] = []
        for step in self._devices.values():
            for i, place in step.places:
                step.runs.append(self._prepare_run(self.param_groups[i], step, place))
            step.watch()
            self._runs += step.runs

    def _prepare_run(self, group: dict[str, Any], step: DeviceStep, place: slice) -> AdamWRun:
        return AdamWRun(group, step.tensors[place], self._moments(step, place), step.steps[place])

    def _moments(self, step: DeviceStep, place: slice) -> tuple[list[Tensor], list[Tensor]]:
        """The moments of some parameters, as launches get them."""
        states = [self.state[p] for p in step.params[place]]
        first, second = ([to_launch(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        return first, second

    # ---------------------------------------------------------------------- step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """One step for every parameter with a gradient; returns what ``closure`` returns.

        Raises:
            ArgumentError: a value of a param group that cannot be used, or a capture that a replay
                could not follow; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        self._take_from_groups()
        capturing = any(map(is_capturing, self._devices))
        if capturing and not self._bound:
            accepted = "a step outside, which compiles the kernels, then the capture"
            raise ArgumentError("step", "a capture before any step", accepted)
        settings = self._changed_settings()
        if not self._look() or (settings is not None and self._outdated()):
            if capturing:
                given = "a capture after a parameter or weight moved, or groups changed"
                raise ArgumentError("step", given, "a step outside, then the capture")
            if self._bound and settings is not None:
                self._send(settings)  # still to the old launches, before they are replaced
            self._build()
            self._look()
            settings = self._changed_settings()
        if not self._bound:
            self._bind()
        if not any(step.seen & ANY for step in self._devices.values()):
            check_order(self._modules, [*group_indices(self.param_groups)])
            return
        if settings is not None:
            if capturing:
                given = "changed since the last step, which a capture cannot send"
                raise ArgumentError("param_groups", given, "`send_param_groups()` before it")
            self._send(settings)
        if any(step.seen & WRITTEN for step in self._devices.values()):
            if capturing:
                given = "a capture after something else wrote A or B"
                raise ArgumentError("step", given, "a step outside, then the capture")
            self._follow_writes()
            self._accept_writes()
        self._before_adamw()
        # GradScaler sets these two as attributes; both lie on one device.
        flag, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        found_inf = found_infs(self._devices.values(), flag, self.skip_nonfinite)
        for device, step in self._devices.items():
            step.adamw(grad_scale, found_inf.get(device), capturing)
        wrote = self._after_adamw(found_inf, capturing)
        for device, step in self._devices.items():
            step.advance(found_inf.get(device))
            step.tracker.wrote(device in wrote)
        if capturing:
            self._captured = True
            for step in self._devices.values():
                step.leave_to_graph()

    def _bind(self) -> None:
        """The last preparations, in the first step after `_build`."""
        self._bound = True

    def _accept_writes(self) -> None:
        for step in self._devices.values():
            step.tracker.accept()

    def _follow_writes(self) -> None:
        """Something else than a step wrote parameters of which copies are kept."""

    def _before_adamw(self) -> None:
        """Work for which the parameters must be as they were before the step."""

    def _after_adamw(
        self, found_inf: dict[torch.device, Tensor], capturing: bool
    ) -> set[torch.device]:
        """Work between AdamW and the count of the step.

        Returns the devices on which watched weights may have been written.
        """
        return set()

    def _look(self) -> bool:
        """Look at gradients and parameters; whether the launches still point to them."""
        self._restore_places()
        same = all([self.state[p]["exp_avg"] is moment for p, moment in self._vector_moments])
        for step in self._devices.values():
            same &= not step.look() & MOVED
        return same

    def _restore_places(self) -> None:
        """Let sharded parameters stand in their places, see `ShardedPlaces`."""
        if self._places is not None:
            self._places.restore()

    def _follow_groups(self) -> None:
        """Build anew for other parameters in the groups, which a method is about to read."""
        if not self._holds_params():
            self._build()
        self._restore_places()

    # -------------------------------------------------- values of the param groups

    @torch.no_grad()
    def send_param_groups(self) -> None:
        """Send what changed in ``param_groups`` to the device: for replays of a captured step.

        `step` does it by itself; a replay runs no host code. Nothing waits for the device.

        Raises:
            ArgumentError: a value that cannot be used; another tensor as lr than the captured one.
        """
        settings = self._changed_settings()
        if not self._bound:
            self._bind()
        if settings is not None:
            self._send(settings)

    def _changed_settings(self) -> list[tuple] | None:
        """The groups' values, checked; None where they are those last sent."""
        groups = self.param_groups
        settings = [self._settings_of(group) for group in groups]
        same = settings == self._settings and not any([run.lr_changed() for run in self._runs])
        if same and self._holds_params():
            return None
        self._check_settings()
        return settings

    def _outdated(self) -> bool:
        """Whether launches must be prepared anew for the groups as they are now."""
        return not self._holds_params()

    def _holds_params(self) -> bool:
        """Whether the groups hold the very parameters that the launches were prepared for."""
        held, groups = self._held, self.param_groups
        if len(held) != len(groups):
            return False
        pairs = [(group["params"], mine) for group, mine in zip(groups, held, strict=True)]
        return all(
            [len(params) == len(mine) and all(map(is_, params, mine)) for params, mine in pairs]
        )

    def _check_settings(self) -> None:
        for group in self.param_groups:
            self._check_group(group)
        for run in self._runs:
            run.check_lr(self._captured)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless every value of a param group can be used."""
        check_group(group)

    def _send(self, settings: list[tuple]) -> None:
        for run in self._runs:
            run.send_options()
        self._settings = settings
