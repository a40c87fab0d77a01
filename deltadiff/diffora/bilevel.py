"""`Search`: stage 1 of DiffoRA, one step at a time; `rounds.search` runs it over data.

Every candidate gets a low-rank pair and a gate. The gates of a layer are a softmax of its logits:

    y = x W^T + bias + s g (x A^T) B^T          (eq. 10)        g = softmax(logits)    (eq. 11)

The bi-level problem (eq. 13) is solved to first order, as in Algorithm 1: a step on the logits with
validation data keeps A and B fixed, and a step on A and B with training data keeps the gates fixed.
The host waits for the device only when it reads the losses of the last few steps (`StepLog`).
"""

import copy
import math
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_betas, check_number
from ..errors import ArgumentError, ArgumentTypeError, NonFiniteLossError, SwapError
from ..layers.fsdp_places import check_before_sharding
from ..layers.lora_layers import lora_layers
from ..layers.swap import swap_, unswap_
from ..layers.targets.choose import Targets
from ..optim.fused_adamw import FusedAdamW
from ..ranks import Ranks, copy_values, device_of_passes, is_sharded, local, whole
from .candidates import find_candidates, swapped_candidate
from .gate_logits import GateLogits
from .gates import GateMatrix
from .search_state import check_state, fingerprint
from .step_log import Place, StepLog
from .trained_params import ORDER, TrainedParams

Loss = Callable[[], Tensor]


class Search:
    """Low-rank pairs with gates on every candidate of a model, and the steps that train them.

    The model is swapped until `close`. AdamW trains A and B; Adam trains the logits, as in DARTS.
    B starts at 0, so a gate has no gradient before the first inner step.

    Where several processes search together, all of them make one with the same arguments, and each
    gives `gate_step` and `inner_step` the loss of its part of the batch. The search itself averages
    losses and gradients over them, so the model is a plain one, not wrapped for data parallelism;
    and all have the same pairs and gates in each step, from the values of the first process. Over
    NCCL, each calls `torch.cuda.set_device` before.

    FSDP2 may shard the model: make the search, then call `fully_shard`, then take steps, in which
    all processes run the same modules. Gates and logits belong to no module and stay whole.

    Args:
        model: an eager model, whose candidates are on one device.
        r, lora_alpha, target_modules, lora_dropout, adapter_dtype, modules_to_save, backend, seed:
            as for `swap_`; ``modules_to_save`` (a new head) are trained together with A and B.
        lr, betas, weight_decay: of the optimizer of A and B.
        gate_lr, gate_betas, gate_weight_decay: of the optimizer of the logits.
        process_group: the processes that search together. None is the default group where
            `torch.distributed` runs, else this process alone.

    Attributes:
        candidates: the modules that have a gate.
        report: the report of `swap_`.
        layers: the swapped layer of each candidate, by name.
        trained: the parameters that inner steps train, by name.
        logits: (layers, types) float32 parameter; entries without a module stay 0.
        ranks: the processes that search together.
        heads: the trained parameters that belong to no pair, by name; after `close`, copies.
        optimizer, gate_optimizer: the optimizer of A and B, and that of the logits.
        round, index: the number of gate steps so far, and of inner steps since the last one.
        gate_losses, inner_losses: the losses of all steps of either kind; complete after `check`.
        log: holds the losses that have not been read yet.

    Raises:
        ArgumentTypeError, ArgumentError: a value cannot be used, or the model has no candidates or
            has them on several devices; nothing was changed.
        SwapError: the model is swapped already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        r: int = 4,
        lora_alpha: float = 16,
        target_modules: Targets = "all-linear",
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        gate_lr: float = 1e-2,
        gate_betas: tuple[float, float] = (0.5, 0.999),
        gate_weight_decay: float = 1e-3,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        modules_to_save: Collection[str] = (),
        backend: str | None = None,
        seed: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ):
        self.ranks, self.model = Ranks(process_group), model
        settings = {
            "r": r, "lora_alpha": lora_alpha, "lr": lr, "betas": betas,
            "weight_decay": weight_decay, "gate_lr": gate_lr, "gate_betas": gate_betas,
            "gate_weight_decay": gate_weight_decay, "lora_dropout": lora_dropout,
            "adapter_dtype": adapter_dtype,
        }  # fmt: skip
        with self.ranks.together():
            for name in ("lr", "weight_decay", "gate_lr", "gate_weight_decay"):
                check_number(name, settings[name], 0)
            betas, gate_betas = check_betas(betas), check_betas(gate_betas)
            if isinstance(model, nn.Module):
                _check_eager(model)
            self.candidates = find_candidates(model, target_modules, modules_to_save)
            places = self.candidates.places
            devices = {str(model.get_submodule(name).weight.device) for name in places}
            if len(devices) > 1:
                given = f"candidates on {', '.join(sorted(devices))}"
                raise ArgumentError("model", given, "one device")
        self.ranks.check_alike(settings)
        try:
            with self.ranks.together():
                self.report = swap_(
                    model, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                    target_modules=lambda name, _: name in places, adapter_dtype=adapter_dtype,
                    modules_to_save=modules_to_save, backend=backend, seed=seed,
                )  # fmt: skip
                self.layers = {name: swapped_candidate(model, name) for name in places}
                self.trained = TrainedParams(model)
                self.optimizer = FusedAdamW(model, lr, betas, weight_decay=weight_decay)
            self.ranks.check_alike(
                {name: (tuple(p.shape), p.dtype) for name, p in self.trained.items()}
            )
        except BaseException:
            if lora_layers(model):
                unswap_(model)
            raise
        pairs = {id(p) for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)}
        self.heads: dict[str, Tensor] = {
            name: p for name, p in self.trained.items() if id(p) not in pairs
        }
        with torch.no_grad():
            self.ranks.copy_first_(list(self.trained.values()))
        self._heads_before = {name: p.detach().clone() for name, p in self.heads.items()}

        self._gate_logits = GateLogits(self.candidates, self.layers)
        self.logits = self._gate_logits.logits
        self.gate_optimizer = torch.optim.Adam(
            [self.logits], lr=gate_lr, betas=gate_betas, weight_decay=gate_weight_decay,
            fused=True,  # only this one skips a step without a read of ``found_inf`` by the host
        )  # fmt: skip
        self._start_log()
        self.round = self.index = 0
        self.gate_losses: list[float] = []
        self.inner_losses: list[float] = []

    def _start_log(self) -> None:
        self.log = StepLog(self.logits.device)
        for optimizer in (self.optimizer, self.gate_optimizer):
            # Optimizers read this attribute, which GradScaler sets too, but do not declare it.
            optimizer.found_inf = self.log.failed  # type: ignore[union-attr]

    # ---------------------------------------------------------------------- steps

    def gate_step(self, loss: Loss) -> Tensor:
        """Take one step on the logits.

        A and B do not require gradients meanwhile, so only those of the gates are computed.

        Args:
            loss: computes the loss of a batch of validation data.

        Returns:
            The loss, 0-dim, on the device; the mean over all processes that search together.

        Raises:
            ArgumentTypeError, ArgumentError: ``loss`` gives no scalar that depends on the gates.
            NonFiniteLossError: the loss or a gradient of this step, or of one of the last few, is
                inf or NaN. That step and those after it were not taken.
            SwapError: the search was closed.
        """
        self._look()
        with self.trained.fixed(), self._gate_logits.trained():
            value = self._evaluate(loss)
            (self.logits.grad,) = torch.autograd.grad(value, [self.logits])
        mean = value.detach().clone()
        self._take(self.gate_optimizer, (self.round + 1, 0), mean, [self.logits])
        self._gate_logits.update_inner_gates()
        return mean

    def inner_step(self, loss: Loss) -> Tensor:
        """Take one step on A and B.

        ``loss`` computes the loss of a batch of training data; everything else is as in
        `gate_step`.
        """
        self._look()
        value = self._evaluate(loss)
        value.backward()
        place, mean = (self.round, self.index + 1), value.detach().clone()
        self._take(self.optimizer, place, mean, list(self.trained.values()))
        return mean

    @staticmethod
    def _evaluate(loss: Loss) -> Tensor:
        """The loss, 0-dim; an error where it is no scalar or depends on nothing trained."""
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentTypeError("loss", given, "a function that returns a tensor of one number")
        if not value.requires_grad:
            accepted = "a loss computed by this model, with gradients on"
            raise ArgumentError("loss", "a value that depends on nothing trained", accepted)
        return value.view(())

    @torch.no_grad()
    def _take(
        self, optimizer: torch.optim.Optimizer, place: Place, loss: Tensor, params: list[Tensor]
    ) -> None:
        """Step to ``place``, unless the loss or a gradient, now or before, is not finite.

        ``loss`` and the gradients become their means over all processes, which therefore agree.
        """
        if self.ranks.size > 1:
            own = [p for p in params if not is_sharded(p)]  # FSDP averages the others
            for p in own:  # a module that this part of the batch did not use
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.ranks.average_([loss, *(p.grad for p in own if p.grad is not None)])
        grads = [local(p.grad) for p in params if p.grad is not None]
        self.log.judge(loss, [g for g in grads if g.numel()])
        if self.trained.sharded:  # other processes judged other parts of the gradients
            self.ranks.largest_(self.log.failed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.log.note((self.round, self.index), place, loss)
        self.round, self.index = place
        if self.log.due:
            self.check()

    def check(self) -> None:
        """Read the losses of the last few steps; waits for the device.

        Raises:
            NonFiniteLossError: a loss or a gradient was not finite. Parameters, optimizers, round
                and index are those before that step, and the search can continue from there.
        """
        for step in self.log.read():
            number, index = step.after
            if step.failed:
                self.round, self.index = step.before
                what = f"the loss is {step.loss:g}"
                if math.isfinite(step.loss):
                    what = f"a gradient is not finite ({what})"
                which = f"training batch {index}" if index else "the validation batch"
                raise NonFiniteLossError(
                    f"{what} at {which} of round {number} of the search; that step was not taken"
                )
            (self.inner_losses if index else self.gate_losses).append(step.loss)

    # ------------------------------------------------------------------- the result

    def gates(self) -> GateMatrix:
        """The gates as they are now."""
        self.check()
        return GateMatrix.from_tensor(self.candidates, self._gate_logits.inner_gates)

    @torch.no_grad()
    def close(self) -> None:
        """Put the eager layers back; what the search found can still be read.

        The model is as it was before the search, also the values of ``modules_to_save``; if it was
        sharded meanwhile it stays so, and all processes call this.
        """
        self._look()
        unswap_(self.model)
        for layer in self.layers.values():
            layer.gate = None
        for name, before in self._heads_before.items():
            p = self.trained[name]
            self.heads[name] = whole(p).clone()
            copy_values(p, before)

    def _look(self) -> None:
        """Follow what became of the model since the last call.

        Raises:
            SwapError: the layers of the search are in the model no more; or `fully_shard` was
                called on one of them, or after the first step.
            ArgumentError: other processes hold parts of the model than search together.
        """
        if not all(layer.swapped_in for layer in self.layers.values()):
            accepted = "a search whose layers are still in the model"
            raise SwapError("search", "one that was closed (or a model un-swapped)", accepted)
        started = bool(self.round or self.index)
        if self.trained.follow(self.ranks, self.layers, started):
            self.heads = {name: self.trained[name] for name in self.heads}
            self.optimizer.param_groups[0]["params"] = list(self.trained.values())
        device = device_of_passes(next(iter(self.trained.values())))
        if device != self.logits.device:  # `fully_shard` or `to` moved the model
            self.check()
            self._gate_logits.move_to(device)
            for entry in self.gate_optimizer.state.values():
                entry |= {key: t.to(device) for key, t in entry.items()}
            self._start_log()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict:
        """Everything that another search needs to continue bit by bit.

        Tensors are not copied. Of a model that is sharded they are whole, so that it does not
        matter how the other one is sharded, and all processes call this.

        Raises:
            NonFiniteLossError: as in `check`.
            SwapError: the search was closed, which put back the values of ``modules_to_save``.
        """
        self._look()
        self.check()
        return self._state()

    def _state(self) -> dict:
        of_optimizer = self.optimizer.state_dict()
        of_optimizer["state"] = {
            i: {key: whole(t) for key, t in entry.items()}
            for i, entry in of_optimizer["state"].items()
        }
        return {
            "candidates": {"layers": self.candidates.layers, "modules": self.candidates.modules},
            "trained": {name: whole(p) for name, p in self.trained.items()},
            "logits": self.logits.detach(),
            "optimizer": of_optimizer,
            "gate_optimizer": self.gate_optimizer.state_dict(),
            "place": (self.round, self.index),
            "losses": (self.gate_losses, self.inner_losses),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave; processes that search together all load the same.

        Raises:
            ArgumentError: the state is that of a search over other candidates or of other shapes,
                or is none, or differs between the processes. The message names the first
                difference; nothing was changed.
        """
        self._look()
        own = self._state()  # whatever the losses were that nobody has read yet
        with self.ranks.together():
            check_state(state, own)
        if self.ranks.size > 1:
            self.ranks.check_alike({"state": fingerprint(state)})
        before = copy.deepcopy(own)
        try:
            with self.ranks.together():
                self._restore(state)
        except BaseException:  # an optimizer may refuse what it is given, and may do so late
            self._restore(before)
            raise

    def _restore(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.gate_optimizer.load_state_dict(state["gate_optimizer"])
        self.logits.copy_(state["logits"])
        for name, p in self.trained.items():
            copy_values(p, state["trained"][name])
        self._gate_logits.update_inner_gates()
        self.log.clear()
        self.round, self.index = state["place"]
        self.gate_losses, self.inner_losses = map(list, state["losses"])


def _check_eager(model: nn.Module) -> None:
    """Raise SwapError unless a model is eager, and neither sharded nor wrapped."""
    if lora_layers(model):
        raise SwapError("model", "a model that is swapped already", "an eager model")
    check_before_sharding("Search", model, ORDER)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        accepted = "the model inside of it, because a search averages gradients itself"
        raise SwapError("model", "a DistributedDataParallel", accepted)
