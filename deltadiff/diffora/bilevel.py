"""`Search`: stage 1 of DiffoRA, one step at a time; `diffora_rounds` runs it over data.

Every candidate gets a low-rank pair and a gate, the gates of a layer being a softmax of its logits:

    y = x W^T + bias + s g (x A^T) B^T          (eq. 10)        g = softmax(logits)    (eq. 11)

The bi-level problem (eq. 13) is solved to first order, as in Algorithm 1: a step on the logits with
validation data holds A and B fixed, a step on A and B with training data holds the gates fixed. No
step reads anything back from the device.
"""

import math
from collections.abc import Callable, Collection
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ..checks import check_betas, check_number
from ..errors import ArgumentError, ArgumentTypeError, NonFiniteLossError, SwapError
from ..layers.lora_linear import lora_layers
from ..layers.swap import swap_, unswap_
from ..layers.targets import Targets
from ..loop import LOSS_SYNC_INTERVAL
from ..optim.fused_adamw import FusedAdamW
from .gates import Candidates, GateMatrix, find_candidates

Loss = Callable[[], Tensor]


class Search:
    """Low-rank pairs with gates on every candidate of a model, and a step on either.

    The model is swapped until `close`. A and B get AdamW, the logits get Adam as DARTS does it;
    logits start at 0, so that the gates start equal. B starts at 0, so a gate has no gradient
    before the first inner step.

    Args:
        model: an eager model, whose candidates are on one device.
        r, lora_alpha, target_modules, lora_dropout, adapter_dtype, modules_to_save, backend, seed:
            as for `swap_`; ``modules_to_save`` (a new head) are trained together with A and B.
        lr, betas, weight_decay: of A and B.
        gate_lr, gate_betas, gate_weight_decay: of the logits.

    Attributes:
        candidates: which layers and modules.
        report: what `swap_` did.
        logits: (layers, types) float32 parameter; entries without a module stay 0.
        heads: by name, what was trained beside the pairs; after `close` the trained values.
        optimizer, gate_optimizer: of A and B, of the logits.
        round, index: gate steps so far, and inner steps since the last one.
        gate_losses, inner_losses: of all steps; complete after `check`.

    Raises:
        ArgumentTypeError, ArgumentError: values that cannot be used, no candidates, candidates on
            several devices; nothing was changed.
        SwapError: a model that is swapped already.
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
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("gate_lr", gate_lr)):
            check_number(name, value, 0)
        check_number("gate_weight_decay", gate_weight_decay, 0)
        betas, gate_betas = check_betas(betas), check_betas(gate_betas)
        if isinstance(model, nn.Module) and lora_layers(model):
            raise SwapError("model", "a model that is swapped already", "an eager model")
        self.model, self.candidates = model, find_candidates(model, target_modules, modules_to_save)
        places = self.candidates.places
        devices = {str(model.get_submodule(name).weight.device) for name in places}
        if len(devices) > 1:
            raise ArgumentError(
                "model", f"candidates on {', '.join(sorted(devices))}", "one device"
            )
        self.report = swap_(
            model, r=r, lora_alpha=lora_alpha, target_modules=lambda name, _: name in places,
            lora_dropout=lora_dropout, adapter_dtype=adapter_dtype,
            modules_to_save=modules_to_save, backend=backend, seed=seed,
        )  # fmt: skip
        self.layers = {name: model.get_submodule(name) for name in places}
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        pairs = {id(p) for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)}
        self.heads = {name: p for name, p in self.trained.items() if id(p) not in pairs}
        self._heads_before = {name: p.detach().clone() for name, p in self.heads.items()}
        try:
            self.optimizer = FusedAdamW(self.trained.values(), lr, betas, weight_decay=weight_decay)
        except ArgumentError:
            unswap_(model)
            raise

        shape = len(self.candidates.layers), len(self.candidates.types)
        device = next(iter(self.layers.values())).weight.device
        self.logits = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self._slots = [i * shape[1] + j for i, j in places.values()]  # in the flattened logits
        missing = torch.ones(shape, dtype=torch.bool)
        missing.view(-1)[self._slots] = False
        self._missing = missing.to(device) if missing.any() else None
        self.gate_optimizer = torch.optim.Adam(
            [self.logits], lr=gate_lr, betas=gate_betas, weight_decay=gate_weight_decay,
            fused=True,  # the one that skips a step without reading ``found_inf``
        )  # fmt: skip
        self._fixed = self._softmax().detach()  # the gates of inner steps, always in this memory
        self._hand_out(self._fixed)

        # Not 0 from a step on that must not be taken: no later one is, until the host looks.
        self._failed = torch.zeros((), dtype=torch.float32, device=device)
        self.optimizer.found_inf = self.gate_optimizer.found_inf = self._failed
        self._unread: list[tuple[tuple[int, int], tuple[int, int], Tensor]] = []
        self._read_every = 1 if device.type == "cpu" else LOSS_SYNC_INTERVAL
        self.round = self.index = 0
        self.gate_losses: list[float] = []
        self.inner_losses: list[float] = []

    # ---------------------------------------------------------------------- steps

    def gate_step(self, loss: Loss) -> Tensor:
        """One step on the logits; ``loss`` computes that of a batch of validation data.

        A and B do not require gradients meanwhile, so only those of the gates are computed.

        Returns:
            The loss, on the device.

        Raises:
            ArgumentTypeError, ArgumentError: ``loss`` gives no scalar that depends on the gates.
            NonFiniteLossError: this loss or gradient, or one of the last few steps', is inf or NaN.
                That step and those after it were not taken.
            SwapError: the search was closed.
        """
        self._check_open()
        for p in self.trained.values():
            p.requires_grad_(False)
        try:
            self._hand_out(self._softmax())
            value = self._evaluate(loss)
            (self.logits.grad,) = torch.autograd.grad(value, [self.logits])
        finally:
            self._hand_out(self._fixed)
            for p in self.trained.values():
                p.requires_grad_(True)
        self._take(self.gate_optimizer, (self.round + 1, 0), value.detach(), [self.logits])
        with torch.no_grad():
            self._fixed.copy_(self._softmax())
        return value.detach()

    def inner_step(self, loss: Loss) -> Tensor:
        """One step on A and B; ``loss`` computes that of a batch of training data.

        Returns and raises as `gate_step`.
        """
        self._check_open()
        value = self._evaluate(loss)
        value.backward()
        place = self.round, self.index + 1
        self._take(self.optimizer, place, value.detach(), list(self.trained.values()))
        return value.detach()

    def _softmax(self) -> Tensor:
        """Equation 11, for all layers at once."""
        logits = self.logits
        if self._missing is not None:
            logits = logits.masked_fill(self._missing, -torch.inf)
        return logits.softmax(1)

    def _hand_out(self, gates: Tensor) -> None:
        """Give each layer its entry, a 0-dim view."""
        entries = gates.flatten().unbind()
        for layer, slot in zip(self.layers.values(), self._slots, strict=True):
            layer.gate = entries[slot]

    @staticmethod
    def _evaluate(loss: Loss) -> Tensor:
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentTypeError("loss", given, "a function that returns a tensor of one number")
        if not value.requires_grad:
            accepted = "a loss computed by this model, with gradients on"
            raise ArgumentError("loss", "a value that depends on nothing trained", accepted)
        return value.view(())

    @torch.no_grad()
    def _take(self, optimizer, place: tuple[int, int], loss: Tensor, params: list[Tensor]) -> None:
        """Step, unless this loss or gradient or an earlier one is not finite; note the loss.

        ``place``: round and index after it.
        """
        grads = [p.grad for p in params if p.grad is not None]
        norms = torch._foreach_norm(grads, float("inf"))  # of two dtypes, with a 16-bit head
        largest = torch.stack([norm.float() for norm in norms]).max()
        failed = ~(loss.isfinite() & largest.isfinite())
        self._failed.copy_(torch.maximum(self._failed, failed.float()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        noted = torch.stack([loss.float(), self._failed])
        self._unread.append(((self.round, self.index), place, noted))
        self.round, self.index = place
        if len(self._unread) >= self._read_every:
            self.check()

    def check(self) -> None:
        """Read the losses of the last few steps; waits for the device.

        Raises:
            NonFiniteLossError: one of them, or a gradient, was not finite. Parameters, optimizers,
                round and index are those before that step, and the search can go on from there.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.stack([noted for *_, noted in unread]).tolist()
        for (before, (number, index), _), (loss, failed) in zip(unread, values, strict=True):
            if failed:
                self._failed.zero_()
                self.round, self.index = before
                what = f"the loss is {loss:g}"
                what = what if not math.isfinite(loss) else f"a gradient is not finite ({what})"
                which = f"training batch {index}" if index else "the validation batch"
                raise NonFiniteLossError(
                    f"{what} at {which} of round {number} of the search; that step was not taken"
                )
            (self.inner_losses if index else self.gate_losses).append(loss)

    # ------------------------------------------------------------------- the result

    def gates(self) -> GateMatrix:
        """The gates as they are now."""
        self.check()
        return GateMatrix.from_tensor(self.candidates, self._fixed)

    @torch.no_grad()
    def close(self) -> None:
        """Put the eager layers back. The model is as it was; what was found can still be read.

        ``modules_to_save`` get the values that they had before the search.
        """
        self._check_open()
        for layer in self.layers.values():
            layer.gate = None
        unswap_(self.model)
        for name, before in self._heads_before.items():
            p = self.trained[name]
            self.heads[name] = p.detach().clone()
            p.copy_(before)

    def _check_open(self) -> None:
        if not all(layer.swapped_in for layer in self.layers.values()):
            accepted = "a search whose layers are still in the model"
            raise SwapError("search", "one that was closed (or a model un-swapped)", accepted)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on bit by bit; tensors are not copied."""
        self.check()
        return {
            "candidates": {"layers": self.candidates.layers, "modules": self.candidates.modules},
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "logits": self.logits.detach(),
            "optimizer": self.optimizer.state_dict(),
            "gate_optimizer": self.gate_optimizer.state_dict(),
            "place": (self.round, self.index),
            "losses": (self.gate_losses, self.inner_losses),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ArgumentError: the state of a search over other candidates or of other shapes; the
                first that differs is named, and nothing was changed.
        """
        self._check_open()
        self._check_same(state)
        self.optimizer.load_state_dict(state["optimizer"])  # checks before it changes anything
        self.gate_optimizer.load_state_dict(state["gate_optimizer"])
        self.logits.copy_(state["logits"])
        for name, p in self.trained.items():
            p.copy_(state["trained"][name])
        self._fixed.copy_(self._softmax())
        self._failed.zero_()
        self._unread.clear()
        self.round, self.index = state["place"]
        self.gate_losses, self.inner_losses = map(list, state["losses"])

    def _check_same(self, state: dict) -> None:
        there, here = state["candidates"], self.candidates
        saved = Candidates(tuple(there["layers"]), tuple(map(tuple, there["modules"])))
        for theirs, ours in zip_longest(saved.places, here.places):
            if theirs != ours:
                accepted = f"{ours}, as in this model" if ours else "no more candidates"
                raise ArgumentError("candidates", theirs or "none", accepted)
        theirs = {name: tuple(t.shape) for name, t in state["trained"].items()}
        ours = {name: tuple(p.shape) for name, p in self.trained.items()}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                accepted = f"{ours.get(name)}, as in this search"
                raise ArgumentError(name, f"shape {theirs.get(name)}", accepted)
