"""Random sequences of what can happen to a `DeltaLoRA` and its model, beside Algorithm 1."""

import copy
import io
import pickle
import tempfile
from typing import Any

import hypothesis.strategies as st
import torch
from algorithm_1 import Algorithm1, Run, product
from delta_lora_runs import snapshot
from torch import Tensor, nn

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_
from deltadiff.errors import ArgumentError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.low_rank_sum import low_rank_sum
from deltadiff.ops.reference import join_remainder

LAYERS = ("0", "2")
# By the coarsest dtype that W or the pair has had: how far W may be from the algorithm's, of 1.
CLOSE = {torch.float64: 2.0**-38, torch.float32: 2.0**-19, torch.bfloat16: 2.0**-17}
FORMS = [
    ("inplace", torch.float64, torch.float64), ("inplace", torch.float32, torch.float32),
    ("inplace", torch.bfloat16, torch.float32), ("inplace", torch.bfloat16, torch.bfloat16),
    ("factored", torch.float64, torch.float64), ("factored", torch.float32, torch.float32),
]  # fmt: skip
SETTINGS = {
    "lr": [0.0, 1e-3, 1e-2], "betas": [(0.9, 0.999), (0.5, 0.9)], "weight_decay": [0.0, 0.1],
    "update_ratio": [0.0, 0.25, 0.5, 1.0],
}  # fmt: skip


class Stopped(Exception):
    """The run refused to go on, as it should, and nothing was changed."""


class Sequence:
    """A model, the optimizers that train it, and what Algorithm 1 makes of it."""

    def __init__(self, form: tuple, update_ratio: float, start_step: int):
        self.w_update, self.dtype, self.adapter_dtype = form
        self.coarsest = {self.dtype, self.adapter_dtype}
        self.options = {"lr": 1e-2, "update_ratio": update_ratio, "start_step": start_step}
        self.model = self.fresh_model()
        self.optimizers: list[DeltaLoRA] = []
        self.runs: list[Run] = []
        weights = {name: self.model.get_submodule(name).weight for name in LAYERS}
        self.truth = Algorithm1(weights, scaling=2.0)
        self.extras = 0
        self.grads = torch.Generator().manual_seed(1)
        self.unseen = False  # whether A and B were written through .data since the last step
        self.exact_base = True  # whether W_0 is still the one of the beginning
        self.another_optimizer()

    def fresh_model(self) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(self.dtype)
        model.extra = nn.ParameterList()
        swap_(
            model, r=2, lora_alpha=4, target_modules=list(LAYERS), seed=1,
            adapter_dtype=self.adapter_dtype,
        )  # fmt: skip
        return model

    def fresh_optimizer(self, over: Any, **options: Any) -> DeltaLoRA:
        options = {**self.options, **options}
        return DeltaLoRA(over, w_update=self.w_update, skip_nonfinite=True, **options)

    # ------------------------------------------------------------------ looking at it

    def params(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """The trained parameters by name."""
        named = (self.model if model is None else model).named_parameters()
        return {name: p for name, p in named if "lora_" in name or "extra" in name}

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params().items()}

    def compare(self) -> None:
        """The model is what Algorithm 1 makes of it."""
        params = self.params()
        close = max(CLOSE[dtype] for dtype in self.coarsest)
        for name in LAYERS:
            layer = lora_layers(self.model)[name]
            wanted, delta = self.truth.effective(name, params).detach(), layer.delta
            found = layer.matrix.detach().double()
            if delta is not None and delta.remainder is not None:
                found = join_remainder(layer.matrix.detach(), delta.remainder).double()
            found = found + self.truth.scaling * product(params, name).detach()
            for part in () if delta is None else delta.unwritten():
                found = found + part.B.double() @ part.A.double()
            error = float((found - wanted).abs().max())
            assert error <= close, f"layer {name} is {error:.1e} from Algorithm 1"
            # What a file would say of it.
            if self.exact_base and (delta is None or delta.known()):
                b, a = low_rank_sum(name, [layer])
                error = float(
                    (self.truth.first[name] + b.double() @ a.double() - wanted).abs().max()
                )
                assert error <= max(close, CLOSE[torch.float32]), f"file: {error:.1e} off"
        if not self.unseen:
            self.compare_forward(params)

    def compare_forward(self, params: dict[str, Tensor]) -> None:
        """Outputs and gradients, in a dtype wide enough to see them."""
        w = self.model[0].weight
        if w.dtype not in (torch.float64, torch.float32) or self.adapter_dtype == torch.bfloat16:
            return
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
        leaves = {n: p.detach().double().requires_grad_() for n, p in params.items()}
        y, hidden = x.to(w.dtype), x
        for name in ("0", "1", "2"):
            y = self.model.get_submodule(name)(y)
        for name in LAYERS:
            pair = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
            weight = self.truth.weights[name] + self.truth.scaling * pair
            hidden = hidden @ weight.T + self.model.get_submodule(name).bias.detach().double()
            hidden = hidden.tanh() if name == "0" else hidden
        close = 64 * max(CLOSE[dtype] for dtype in self.coarsest)
        assert (y.double() - hidden).abs().max() <= close
        pairs = [name for name in params if "lora_" in name]
        grads = torch.autograd.grad(y.square().sum(), [params[name] for name in pairs])
        wanted = torch.autograd.grad(hidden.square().sum(), [leaves[name] for name in pairs])
        for name, g, right in zip(pairs, grads, wanted, strict=True):
            size = 1 + float(right.abs().max())
            assert (g.double() - right).abs().max() <= close * size, f"gradient of {name}"

    def refused(self, call: Any) -> None:
        """Make a call; where it is refused for too many changes, all must be as before."""
        before = [t.clone() for o in self.optimizers for t in snapshot(self.model, o)]
        try:
            call()
        except ArgumentError as error:
            if "at most 8 changes" not in str(error) and "too many values" not in str(error):
                raise
            after = [t for o in self.optimizers for t in snapshot(self.model, o)]
            assert all(map(torch.equal, before, after))
            raise Stopped from error

    # --------------------------------------------------------------------- the calls

    def another_optimizer(self, update_ratio: float | None = None) -> None:
        ratio = self.options["update_ratio"] if update_ratio is None else update_ratio
        optimizer = self.fresh_optimizer(self.model, update_ratio=ratio)
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        self.optimizers = [*self.optimizers[-1:], optimizer]
        self.runs = [*self.runs[-1:], Run([(list(self.params()), settings)])]

    def step(self, which: int, kind: str, size: float) -> None:
        which %= len(self.optimizers)
        optimizer, run, before = self.optimizers[which], self.runs[which], self.values()
        mine = {name for names, _ in run.groups for name in names}
        grads = {}
        for i, (name, p) in enumerate(self.params().items()):
            g = torch.randn(p.shape, generator=self.grads, dtype=torch.float64) * size
            missing = name not in mine or (kind == "some" and i % 2) or kind == "none"
            p.grad = None if missing else g.to(p.dtype)
            if not missing:
                grads[name] = p.grad
        if kind == "inf":
            next(iter(grads.values())).view(-1)[0] = float("inf")
        for group, (_, settings) in zip(optimizer.param_groups, run.groups, strict=True):
            settings |= {k: group[k] for k in settings}
        self.refused(optimizer.step)
        self.unseen &= not grads
        if grads:  # a step without any gradient is none
            self.truth.step(run, before, self.values(), grads)
        else:
            assert all(torch.equal(p, before[name]) for name, p in self.params().items())

    def change(self, which: int, group: int, name: str, value: Any) -> None:
        groups = self.optimizers[which % len(self.optimizers)].param_groups
        groups[0 if name == "update_ratio" else group % len(groups)][name] = value

    def change_start(self, start_step: int) -> None:
        """Before the first step it may change; later it is refused, and stays."""
        run, optimizer = self.runs[-1], self.optimizers[-1]
        group = optimizer.param_groups[0]
        before, group["start_step"] = group["start_step"], start_step
        if run.t or optimizer._t_most:
            if start_step != before and lora_layers(self.model)["0"].delta is not None:
                group["start_step"] = before

    def add_group(self) -> None:
        p = nn.Parameter(torch.ones(3, dtype=self.params()["0.lora_A"].dtype))
        self.model.extra.append(p)
        optimizer, run = self.optimizers[-1], self.runs[-1]
        optimizer.add_param_group({"params": [p], "lr": 1e-3, "update_ratio": 0.0})
        settings = {k: v for k, v in optimizer.param_groups[-1].items() if k != "params"}
        run.groups.append(([f"extra.{len(self.model.extra) - 1}"], settings))

    def resume(self, order: int) -> None:
        """In another process: what was saved goes into a fresh model and optimizer."""
        file = io.BytesIO()
        optimizer = self.optimizers[-1]
        torch.save((self.model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        self._become(self._fresh(saved[0]), lambda m, o: self._load(m, o, saved, order))

    def _load(self, model: nn.Module, optimizer: DeltaLoRA, saved: tuple, order: int) -> None:
        parts = [(model, saved[0]), (optimizer, saved[1])]
        for owner, state in parts if order else parts[::-1]:
            owner.load_state_dict(state)

    def _fresh(self, state: dict[str, Tensor]) -> nn.Module:
        model = self.fresh_model().to(self.model[0].weight.dtype)
        for layer in lora_layers(model).values():
            layer.lora_A.data = layer.lora_A.data.to(self.params()["0.lora_A"].dtype)
            layer.lora_B.data = layer.lora_B.data.to(self.params()["0.lora_A"].dtype)
        for p in self.model.extra:
            model.extra.append(nn.Parameter(torch.zeros_like(p)))
        return model

    def _become(self, model: nn.Module, load: Any) -> None:
        groups = []
        for group, (names, _) in zip(
            self.optimizers[-1].param_groups, self.runs[-1].groups, strict=True
        ):
            ours = self.params(model)
            groups.append({"params": [ours[name] for name in names]})
            groups[-1]["start_step"] = group["start_step"]
        optimizer = self.fresh_optimizer(groups, model=model)
        load(model, optimizer)
        self.model, self.optimizers, self.runs = model, [optimizer], self.runs[-1:]

    def resume_from_adapter(self) -> None:
        """A, B and the update from one file, W and the moments from the other."""
        if self.dtype != self.model[0].weight.dtype or not self.exact_base:
            return  # another base model
        saved = copy.deepcopy(self.optimizers[-1].state_dict())
        extra = [p.detach().clone() for p in self.model.extra]
        with tempfile.TemporaryDirectory() as folder:
            try:
                save_adapter(self.model, folder)
            except SwapError as error:
                assert "too many values" in str(error)
                return

            def load(model: nn.Module, optimizer: DeltaLoRA) -> None:
                load_adapter(model, folder)
                optimizer.load_state_dict(saved)
                with torch.no_grad():
                    for p, value in zip(model.extra, extra, strict=True):
                        p.copy_(value)

            # The file holds modules and pairs; other parameters are the caller's.
            self._become(self._fresh(self.model.state_dict()), load)

    def take_steps_back(self, order: int) -> None:
        """Go on, then load what was saved before into the same model and optimizer."""
        optimizer = self.optimizers[-1]
        saved = copy.deepcopy((self.model.state_dict(), optimizer.state_dict()))
        optimizer.param_groups[0]["update_ratio"] = 0.75
        for _ in range(2):
            for p in self.params().values():
                p.grad = torch.full_like(p, 0.1)
            self.refused(optimizer.step)
        try:
            self._load(self.model, optimizer, saved, order)
        except ArgumentError as error:
            assert "because its update_ratio was 0" in str(error)
            raise Stopped from error
        self.optimizers, self.runs = [optimizer], self.runs[-1:]

    def copy_both(self, way: str) -> None:
        pair = self.model, self.optimizers
        if way == "deepcopy":
            self.model, self.optimizers = copy.deepcopy(pair)
        else:
            self.model, self.optimizers = pickle.loads(pickle.dumps(pair))

    def load_own_state(self) -> None:
        state = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            for p in self.params().values():
                p.mul_(1.5)
        self.model.load_state_dict(state)

    def convert(self, dtype: torch.dtype) -> None:
        """`model.to(dtype)`: W and the pair are rounded, the update is what it was."""
        w = self.model[0].weight.dtype
        self.model.to(dtype)
        self.coarsest |= {dtype}
        if {w, dtype, self.params()["0.lora_A"].dtype} != {torch.float64}:
            self.truth.moments = torch.float32
        if w == torch.bfloat16:
            self.coarsest |= {torch.float32}
        if w == torch.float64 and dtype != w:
            self.exact_base = False

    def move(self, how: str, factor: float) -> None:
        """A and B are written by somebody else."""
        params = [p for name, p in self.params().items() if "lora_" in name]
        with torch.no_grad():
            if how == "in place":
                params[1].mul_(factor)
            elif how == "data":
                params[1].data.mul_(factor)
                self.unseen = self.w_update == "factored"  # until the next step
            elif how == "other memory":
                params[0].data = params[0].data * factor
            elif how == "vector":
                vector = nn.utils.parameters_to_vector(params)
                nn.utils.vector_to_parameters(vector * factor, params)
            else:  # an average is swapped in for a look, and out again
                kept = [p.clone() for p in params]
                for p in params:
                    p.mul_(factor)
                with torch.enable_grad():
                    self.compare()
                for p, value in zip(params, kept, strict=True):
                    p.copy_(value)

    def merge_a_copy(self) -> None:
        """The copy's weights are what its layers were, and its optimizer refuses a step."""
        model, optimizer = copy.deepcopy((self.model, self.optimizers[-1]))
        names = {name: self.truth.effective(name, self.params()).detach() for name in LAYERS}
        for p in self.params(model).values():
            p.grad = torch.ones_like(p)
        merge_(model)
        for name, wanted in names.items():
            error = (model.get_submodule(name).weight.double() - wanted).abs().max()
            close = max(CLOSE[dtype] for dtype in self.coarsest)
            w = model.get_submodule(name).weight
            assert error <= max(close, torch.finfo(w.dtype).eps * float(wanted.abs().max()))
        if optimizer.weight_updates:
            try:
                optimizer.step()
            except SwapError:
                return
            raise AssertionError("a step over merged layers")


def _calls() -> st.SearchStrategy:
    which, factors = st.integers(0, 1), st.sampled_from([0.5, 0.9, 1.5])
    kinds = st.sampled_from(["all", "all", "all", "some", "none", "inf"])
    step = st.tuples(st.just("step"), which, kinds, st.sampled_from([1e-2, 1.0]))
    change = st.sampled_from([(n, v) for n, vs in SETTINGS.items() for v in vs]).flatmap(
        lambda pair: st.tuples(st.just("change"), which, st.integers(0, 2), *map(st.just, pair))
    )
    ways = ["in place", "data", "other memory", "vector", "and back"]
    other = st.one_of(
        change,
        st.tuples(st.just("change_start"), st.integers(0, 2)),
        st.tuples(st.just("another_optimizer"), st.sampled_from([0.25, 0.5])),
        st.just(("add_group",)), st.tuples(st.just("resume"), which),
        st.just(("resume_from_adapter",)), st.tuples(st.just("take_steps_back"), which),
        st.tuples(st.just("copy_both"), st.sampled_from(["deepcopy", "pickle"])),
        st.just(("load_own_state",)), st.just(("merge_a_copy",)),
        st.tuples(st.just("convert"), st.sampled_from([torch.float32, torch.float64])),
        st.tuples(st.just("move"), st.sampled_from(ways), factors),
    )  # fmt: skip
    return st.booleans().flatmap(lambda trains: step if trains else other)


PLANS = st.tuples(
    st.sampled_from(FORMS), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2),
    st.lists(_calls(), min_size=6, max_size=16),
)  # fmt: skip


def run_plan(plan: tuple) -> None:
    """Run one sequence; raises AssertionError where model and algorithm differ."""
    form, update_ratio, start_step, calls = plan
    sequence = Sequence(form, update_ratio, start_step)
    try:
        for name, *arguments in calls:
            getattr(sequence, name)(*arguments)
            sequence.compare()
    except Stopped:
        return
