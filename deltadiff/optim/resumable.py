"""`Resumable`: how the state of a fused optimizer is saved, loaded and copied."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ArgumentTypeError
from .address_tracker import MOVED
from .device_step import DeviceStep
from .saved_state import (
    PREFIX,
    SavedState,
    check_entry,
    read_state,
    run_entries,
    saved_steps,
    take_entry,
)


class Resumable(torch.optim.Optimizer):
    """The part of `FusedAdamW` that outlives it.

    Derived methods add to what is saved and loaded with `_run_state`, `_check_state` and
    `_take_state`, and to what a copy takes over with `_copied`; their `_build` makes the rest anew.
    """

    _methods: tuple[str, ...]  # whose states are read; the first is its own name in a state
    _copied: tuple[str, ...] = (
        "defaults", "state", "param_groups", "skip_nonfinite", "_modules", "_iteration",
    )  # fmt: skip
    _devices: dict[torch.device, DeviceStep]
    _iteration: dict[torch.device, Tensor]  # steps that were not skipped
    _captured: bool  # replays then count steps that the host does not see
    _bound: bool
    _built: bool

    def _build(self) -> None:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _holds_params(self) -> bool:
        raise NotImplementedError

    def _take_from_groups(self) -> None:
        """Load a state that DeepSpeed's universal checkpoints put where this optimizer has its own.

        They set the values of the param groups and the moments, and call nothing. A state that
        cannot be loaded stays there, so that each use of the optimizer is refused.
        """
        if not any(f"{PREFIX}format" in group for group in self.param_groups):
            return
        self._build()  # the launches take the moments
        self.load_state_dict(super().state_dict())

    def _follow_moves(self) -> None:
        """Let the state be that of the groups' parameters, on their devices and in their dtypes."""
        moved = [step for step in self._devices.values() if step.look() & MOVED]
        for step in self._devices.values():
            step.forget_grads()
        if moved or not self._holds_params():
            self._build()

    # --------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.AdamW.state_dict`, with what belongs to the run in each param group."""
        self._take_from_groups()
        self._follow_moves()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group |= run_entries({"method": self._methods[0], **self._run_state()})
        return saved

    def _run_state(self) -> dict[str, Any]:
        """What belongs to the run; waits for the device."""
        return {"iteration": int(next(iter(self._iteration.values())))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; dtypes and devices stay those of this optimizer.

        States of older versions are read.

        Raises:
            ArgumentError: the state of another method, of other groups or settings, of parameters
                or weights of other shapes, of a newer format, or garbled; of Delta-LoRA also from
                a version that did not save W. Nothing was changed.
            SwapError: the update of an earlier run of Delta-LoRA would be lost, as in `step`;
                nothing was changed.
        """
        self._follow_moves()
        saved = read_state(state_dict, self.param_groups, self._methods)
        self._check_state(saved)
        own_state, own_groups = self.state, self.param_groups
        ids = iter(saved.ids)
        groups = [
            {**group, "params": [next(ids) for _ in own["params"]]}
            for group, own in zip(saved.groups, own_groups, strict=True)
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})  # it calls the hooks
        for group, loaded in zip(own_groups, self.param_groups, strict=True):
            lr = group["lr"]
            group.update(loaded)  # the launches hold these very dicts
            for name in [name for name in group if name.startswith(PREFIX)]:
                del group[name]  # another state, see `_take_from_groups`
            if isinstance(lr, Tensor):
                lr.copy_(torch.as_tensor(loaded["lr"]))  # and this very tensor
                group["lr"] = lr
        self.state, self.param_groups = own_state, own_groups
        with torch.no_grad():
            self._take_state(saved)

    def _check_state(self, saved: SavedState) -> None:
        """Raise where the state does not fit; nothing is changed but ``saved``, which is made fit.

        Older states are given the form of this version.
        """
        groups = saved.merged_groups(self.param_groups, self.defaults)
        for group in groups:
            self._check_group(group)
        if "iteration" not in saved.run and "format" not in saved.run:
            steps = [entry["step"] for entry in saved.entries.values() if "step" in entry]
            saved.run["iteration"] = max(map(saved_steps, steps), default=0)
        saved.number("iteration")
        for i, p in saved.ids.items():
            check_entry(i, saved.entries[p], self._saved_tensors(p, saved))

    def _saved_tensors(self, p: Tensor, saved: SavedState) -> dict[str, Tensor]:
        """Tensors like those that the entry of a parameter must hold."""
        return self.state[p]

    def _take_state(self, saved: SavedState) -> None:
        """Take over a state that was checked; the param groups have its values already."""
        for p, entry in saved.entries.items():
            take_entry(entry, self.state[p])
        self._set_iteration(saved.number("iteration"))

    def _set_iteration(self, t: int) -> None:
        for own in self._iteration.values():
            own.fill_(t)

    # -------------------------------------------------------------------- copies

    def __copy__(self) -> NoReturn:
        """Refused: two optimizers would count the steps of one state."""
        given = f"a shallow copy of {type(self).__name__}"
        raise ArgumentTypeError("copy", given, "`copy.deepcopy((model, optimizer))`")

    def __reduce__(self) -> tuple:
        """For `copy.deepcopy` and pickle, of a model and its optimizer in one call.

        Hooks, what a learning rate scheduler put here, and captured graphs stay behind.
        """
        return _make_copy, (type(self), self._to_copy())

    def _to_copy(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self._copied}

    def _become_copy(self, attributes: dict[str, Any]) -> None:
        """The constructor of a copy; ``attributes`` are its own."""
        super().__setstate__(attributes)  # torch's, which also adds what stayed behind, empty
        self._devices = {}
        self._captured = self._bound = self._built = False
        self._build()


def _make_copy(kind: type[Resumable], attributes: dict[str, Any]) -> Resumable:
    optimizer = kind.__new__(kind)
    optimizer._become_copy(attributes)
    return optimizer
