"""`DeltaLoRA`: AdamW on the low-rank pairs, and W += lambda s (B'A' - BA), in one `step()`.

One step is Algorithm 1 of the Delta-LoRA paper, for iteration t = 0, 1, ...:

    A', B' = AdamW(A, B)
    if t > K:  W += lambda s (B'A' - BA)

The update telescopes, so "factored" reaches the same model without writing W (see `lora`). Whether
a step counts (`torch.amp.GradScaler`, ``skip_nonfinite``) is known on the device only, so the
iteration lives there. The host keeps bounds of it; what these leave open, kernels read from 0-dim
tensors.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import param_groups as groups_
from .checks import HALF_DTYPES, remainder_dtype
from .errors import ArgumentError
from .lora import LoraLinear, Product, lora_layers
from .ops import choose_path, run_adamw_step
from .weight_update import WeightUpdate

W_UPDATES = ("inplace", "factored")
ROUNDINGS = ("remainder", "stochastic", "nearest")


@dataclass
class _AdamWRun:
    """Parameters of one group, device and dtype: one launch."""

    group: dict
    params: list[Tensor]
    steps: Tensor
    backend: str


class DeltaLoRA(torch.optim.Optimizer):
    """AdamW with the Delta-LoRA update of the frozen weights (Algorithm 1).

    All trainable parameters get AdamW (decoupled weight decay, as `torch.optim.AdamW`, moments in
    float32); those that are the pair of a `LoraLinear` also move its weight. ``update_ratio=0`` is
    plain LoRA. With updates from the first step on, Delta-LoRA under Adam is LoRA with
    lora_alpha (1 + lambda).

    Args:
        model_or_params: a swapped model, or an iterable of parameters, modules or param groups
            (whose "params" may be a module). Groups may set lr, betas, eps, weight_decay,
            update_ratio and start_step.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`.
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
            place (quantised, tied, shared, expanded); parameters without a swapped layer.
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
        self._t_least = self._t_most = 0  # bounds of the iteration on the device
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
        pairs = self._pairs(index)
        for p in index:
            groups_.check_parameter(p)
        if self.w_update == "inplace":
            groups_.check_writable(pairs, self._modules)

        adamw: dict[tuple, list[Tensor]] = defaultdict(list)
        for p, i in index.items():
            adamw[i, p.device, p.dtype].append(p)
        self._adamw_runs = []
        for (i, device, dtype), params in adamw.items():
            steps = torch.zeros(len(params), dtype=torch.float32, device=device)
            for p, step in zip(params, steps, strict=True):
                self._allocate(p, step)
            backend = choose_path(device, dtype).backend
            self._adamw_runs.append(_AdamWRun(groups[i], params, steps, backend))
            if device not in self._iteration:
                known = next(iter(self._iteration.values()), torch.zeros((), dtype=torch.int64))
                self._iteration[device] = known.to(device, copy=True)

        updates: dict[tuple, dict[str, LoraLinear]] = defaultdict(dict)
        for name, layer in pairs.items():
            updates[index[layer.lora_B], layer.weight.device, layer.weight.dtype][name] = layer
        self._weight_updates = []
        for (i, _, _), layers in updates.items():
            rounding = self.rounding or "remainder"
            for layer in layers.values():
                self._allocate_update(layer, rounding)
            update = WeightUpdate(
                groups[i], layers, self.w_update == "inplace", rounding,
                self.seed + len(self._weight_updates), self.state, self._delta,
            )  # fmt: skip
            self._weight_updates.append(update)
        self._plain_groups = [g for g in groups if not g["update_ratio"]]
        self._built = True

    def _pairs(self, index: dict[Tensor, int]) -> dict[str, LoraLinear]:
        """The layers whose weight is updated: those with a pair under an update ratio above 0."""
        pairs, known = {}, {}
        for module in self._modules:
            known |= {layer: name for name, layer in lora_layers(module).items()}
        for layer, name in known.items():
            groups = [
                self.param_groups[index[p]] for p in (layer.lora_A, layer.lora_B) if p in index
            ]
            settings = [(g["update_ratio"], g["start_step"]) for g in groups]
            if not any(ratio for ratio, _ in settings):
                continue
            if len(settings) < 2 or settings[0] != settings[1]:
                given = f"lora_A and lora_B of {name} not both there, or unlike"
                accepted = "both, with one update_ratio and start_step"
                raise ArgumentError("model_or_params", given, accepted)
            pairs[name] = layer
        if not pairs and any(g["update_ratio"] for g in self.param_groups):
            given = "no pair of a swapped layer"
            accepted = "a model that `swap_` changed, model=, or update_ratio=0"
            raise ArgumentError("model_or_params", given, accepted)
        return pairs

    def _allocate(self, p: Tensor, step: Tensor) -> None:
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        state = self.state[p]
        if state:
            step.copy_(state["step"])
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(p.shape, dtype=wide, device=p.device)
        state["step"] = step  # a view into the run's steps

    def _allocate_update(self, layer: LoraLinear, rounding: str) -> None:
        w = layer.weight
        for p in (layer.lora_A, layer.lora_B):
            if p not in self._delta:
                wide = torch.float64 if p.dtype == torch.float64 else torch.float32
                self._delta[p] = torch.zeros(p.shape, dtype=wide, device=p.device)
                self.state[p]["anchor"] = torch.zeros_like(p.detach())
        keeps = rounding == "remainder" and self.w_update == "inplace"
        state = self.state[layer.lora_B]
        if keeps and w.dtype in HALF_DTYPES and "remainder" not in state:
            low = torch.zeros(w.shape, dtype=remainder_dtype(w.dtype), device=w.device)
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
        self._check()
        if not self._bound:
            self._bind()
        if all(p.grad is None for run in self._adamw_runs for p in run.params):
            return loss
        found_inf = self._found_inf()
        for update in self._weight_updates:
            update.report_loss()
            if update.ratio != update.group["update_ratio"]:
                update.change_ratio(self._read_iteration())
        for run in self._adamw_runs:
            self._run_adamw(run, found_inf.get(run.steps.device))
        for update in self._weight_updates:
            t = self._iteration[update.device]
            update.run(t, self._t_least, self._t_most, found_inf.get(update.device))
        for device, t in self._iteration.items():
            t.add_(1 if device not in found_inf else found_inf[device].view(()) == 0)
        self._t_most += 1
        self._t_least += not found_inf
        return loss

    def _bind(self, restored=None) -> None:
        t = self._read_iteration()
        for update in self._weight_updates:
            update.bind(t > update.start_step + 1, restored)
        self._bound = True

    def _read_iteration(self) -> int:
        """For set-up and changes of lambda: asks the device only where steps were skipped."""
        if self._t_least != self._t_most:
            self._t_least = self._t_most = int(next(iter(self._iteration.values())))
        return self._t_least

    def _check(self) -> None:
        for group in self.param_groups:
            groups_.check_group(group)
        for update in self._weight_updates:
            update.check()
        for group in self._plain_groups:
            if group["update_ratio"]:
                accepted = "a run that starts with an update ratio above 0"
                raise ArgumentError("update_ratio", f"{group['update_ratio']} after 0", accepted)

    def _found_inf(self) -> dict[torch.device, Tensor]:
        """Per device a tensor that is not 0 where this step must be skipped; empty: never."""
        flags = [f for f in (getattr(self, "found_inf", None),) if f is not None]
        if self.skip_nonfinite:
            for run in self._adamw_runs:
                grads = [p.grad for p in run.params if p.grad is not None]
                largest = torch.stack(torch._foreach_norm(grads, float("inf"))).max()
                flags.append((~largest.isfinite()).float())
        if not flags:
            return {}
        return {
            device: torch.stack([f.to(device, non_blocking=True).view(()) for f in flags]).amax()
            for device in self._iteration
        }

    def _run_adamw(self, run: _AdamWRun, found_inf: Tensor | None) -> None:
        group, params, steps, index = run.group, run.params, run.steps, None
        anchor_now = self._anchor_now(run)
        used = [i for i, p in enumerate(params) if p.grad is not None]
        if len(used) < len(params):
            for p in params:
                if p.grad is None and p in self._delta:
                    self._delta[p].zero_()
                    if anchor_now is not None:
                        anchor = self.state[p]["anchor"]
                        anchor.copy_(torch.where(anchor_now, p, anchor))
            index = torch.tensor(used, device=steps.device)
            params, steps = [params[i] for i in used], steps[index]
        if not params:
            return
        state = [self.state[p] for p in params]
        grad_scale = getattr(self, "grad_scale", None)  # set by GradScaler, on one device
        if grad_scale is not None:
            grad_scale = grad_scale.to(steps.device, non_blocking=True)
        wants_delta = self.w_update == "inplace" and self._t_most > group["start_step"]
        run_adamw_step(
            run.backend, params, [p.grad for p in params], [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state], steps, float(group["lr"]), *group["betas"],
            group["eps"], group["weight_decay"],
            [self._delta.get(p) if wants_delta else None for p in params],
            [s.get("anchor") if anchor_now is not None else None for s in state],
            anchor_now, grad_scale, found_inf,
        )  # fmt: skip
        if index is not None:
            run.steps[index] = steps

    def _anchor_now(self, run: _AdamWRun) -> Tensor | None:
        """Not 0 in iteration K + 1, the first that updates W; None where it surely is another."""
        first = run.group["start_step"] + 1
        if not run.group["update_ratio"] or not self._t_least <= first <= self._t_most:
            return None
        return self._iteration[run.steps.device] == first

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
                index[m.lora_B]: m.delta.folded
                and [(p.B, p.A, p.in_weight) for p in m.delta.folded]
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
        extra = state.get("delta_lora")
        if extra is None or extra["w_update"] != self.w_update:
            given = "no Delta-LoRA state" if extra is None else f"w_update={extra['w_update']!r}"
            raise ArgumentError("state_dict", given, f"a state of w_update={self.w_update!r}")
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            given = f"groups of {[len(g['params']) for g in groups]} parameters"
            accepted = f"{[len(g['params']) for g in self.param_groups]}"
            raise ArgumentError("state_dict", given, accepted)
        ids = [i for g in groups for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(ids, params, strict=True):
            have = {k: tuple(t.shape) for k, t in self.state[p].items()}
            given = {k: tuple(t.shape) for k, t in state.get(i, {}).items()}
            if given != have:
                raise ArgumentError("state_dict", f"parameter {i} with {given}", str(have))
        own, mine = self.state, self.param_groups
        super().load_state_dict({"state": {}, "param_groups": groups})
        for group, loaded in zip(mine, self.param_groups, strict=True):
            group.update(loaded)  # the launches hold these very dicts
        self.state, self.param_groups = own, mine
        for i, p in zip(ids, params, strict=True):
            for name, value in state[i].items():
                own[p][name].copy_(value)
        for t in self._iteration.values():
            t.copy_(extra["iteration"])
        self._t_least = self._t_most = int(extra["iteration"])
        for update, ratio in zip(self._weight_updates, extra["update_ratio"], strict=True):
            update.ratio = ratio
        restored = {}
        for i, products in extra["folded"].items():
            p = params[ids.index(i)]
            kept = [Product(b.to(p.device), a.to(p.device), w) for b, a, w in products or ()]
            restored[p] = None if products is None else kept
        self._bind(restored)
