"""Random walks over PEFT's calls and steps of Delta-LoRA, beside Algorithm 1 by its own words.

Beside the model, `DeltaWalk` keeps W_0 of each layer and the sum of the updates that Algorithm 1
makes of it, step by step. After each call the outputs must be those of W_0, of the updates of the
active adapters, and of their pairs.
"""

import copy
import random

import peft
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_cases import shake
from peft_models import input_of, make_model, output_of
from torch import Tensor, nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.errors import ArgumentError

X = input_of("mlp")


class DeltaWalk:
    """A model that is trained between PEFT's calls.

    Attributes:
        model: PEFT's model, swapped, with adapters "a" and "b" at first.
        updates: by layer and adapter, the sum of the updates of W so far.
        refused: the calls that raised, because W holds an update.
    """

    def __init__(self, seed: int, w_update: str):
        self.draw, self.w_update = random.Random(seed), w_update
        model = make_model("mlp").double()
        self.model = peft.get_peft_model(model, self._config(), adapter_name="a")
        self.model.add_adapter("b", self._config())
        shake(self.model)
        if self.draw.random() < 0.3:
            prepare_model_for_compiled_hotswap(self.model)  # its scalings are tensors then
        swap_(self.model)
        weights = {n: m.base_layer.weight for n, m in self.layers().items()}
        self.before = {n: w.detach().clone() for n, w in weights.items()}
        self.updates: dict[tuple[str, str], Tensor] = {}
        self.optimizers: dict[str, DeltaLoRA] = {}
        self.runs: dict[str, tuple[int, dict[str, float]]] = {}  # the next t, and s of each layer
        self.start_step, self.active = self.draw.choice([0, 1]), ["a"]
        self.merged = self.disabled = False
        self.trail: list[str] = []
        self.refused: list[str] = []

    def _config(self, targets=("lin0", "lin1")) -> peft.LoraConfig:
        options = {"r": self.draw.choice([1, 2, 3]), "lora_alpha": self.draw.choice([1, 6])}
        return peft.LoraConfig(target_modules=[*targets], init_lora_weights=False, **options)

    def layers(self) -> dict[str, nn.Module]:
        kind = peft.tuners.lora.Linear
        return {n: m for n, m in self.model.named_modules() if isinstance(m, kind)}

    def step(self) -> None:
        call = self.draw.choice(CALLS)
        self.trail.append(call.__name__)
        try:
            call(self)
        except ArgumentError as error:
            assert self.w_update == "inplace" and "updated in place" in str(error), self.trail
            self.refused.append(call.__name__)
        self.compare()

    def compare(self) -> None:
        with torch.no_grad():
            found, wanted = output_of(self.model, X), self._wanted()
        assert (found - wanted).abs().max() < 1e-10, self.trail

    def _wanted(self) -> Tensor:
        """The outputs by the formula, from a base model of its own."""
        base = make_model("mlp").double()
        mine = {n.removeprefix("base_model.model."): p for n, p in self.model.named_parameters()}
        mine = {n.replace(".base_layer", ""): p for n, p in mine.items()}
        for name, p in base.named_parameters():
            p.copy_(mine[name])
        for name, layer in self.layers().items():
            w = base.get_submodule(name.removeprefix("base_model.model.")).weight
            w.copy_(self.before[name])
            for adapter in () if self.disabled else self.active:
                if adapter in layer.lora_A:
                    w += float(layer.scaling[adapter]) * product(layer, adapter)
                    w += self.updates.get((name, adapter), 0)
        return base(X)

    # ------------------------------------------------------------------------ the calls

    def train(self) -> None:
        self.unmerge()
        self.enable()
        if len(self.active) > 1:  # of which one may have an update in W, which must stay active
            changed = [name for name in self.active if any(name == n for _, n in self.updates)]
            self.active = (changed or self.active)[:1]
            self.model.set_adapter(self.active[0])
        (adapter,) = self.active
        layers = {n: m for n, m in self.layers().items() if adapter in m.lora_A}
        if adapter not in self.optimizers:
            self.runs[adapter] = 0, {n: float(m.scaling[adapter]) for n, m in layers.items()}
            self.optimizers[adapter] = DeltaLoRA(
                self.model, lr=1e-2, update_ratio=0.5, start_step=self.start_step,
                w_update=self.w_update,
            )  # fmt: skip
        optimizer, (t, scalings) = self.optimizers[adapter], self.runs[adapter]
        ratio, old = optimizer.param_groups[0]["update_ratio"], {}
        for name, layer in layers.items():
            old[name] = product(layer, adapter)
        self._step_of(optimizer)
        for name, layer in layers.items() if t > self.start_step else ():
            moved = ratio * scalings[name] * (product(layer, adapter) - old[name])
            self.updates[name, adapter] = self.updates.get((name, adapter), 0) + moved
        self.runs[adapter] = t + 1, scalings

    def _step_of(self, optimizer: DeltaLoRA) -> None:
        optimizer.zero_grad()
        output_of(self.model, X).square().mean().backward()
        optimizer.step()

    def begin_another_run(self) -> None:
        self.optimizers.pop(self.active[0], None)

    def change_the_ratio(self) -> None:
        for optimizer in self.optimizers.values():
            if self.trail.count("change_the_ratio") < 8:  # so many a factored run keeps
                optimizer.param_groups[0]["update_ratio"] = self.draw.choice([0.25, 0.5, 1.0])

    def take_a_step_back(self) -> None:
        optimizer = self.optimizers.get(self.active[0])
        if optimizer is None or len(self.active) > 1 or self.merged or self.disabled:
            return
        saved = copy.deepcopy((self.model.state_dict(), optimizer.state_dict()))
        self._step_of(optimizer)
        self.model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])

    def load_its_own_state(self) -> None:
        if self.merged:
            return
        state = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(1.1) if p.requires_grad else None
        self.model.load_state_dict(state)

    def become_a_copy(self) -> None:
        self.model, self.optimizers = copy.deepcopy((self.model, self.optimizers))

    def set_adapter(self) -> None:
        name = self.draw.choice([*self.model.peft_config])
        self.model.set_adapter(name)
        self.active = [name]

    def set_two(self) -> None:
        names = self.draw.sample([*self.model.peft_config], 2)
        self.model.base_model.set_adapter(names)
        self.active = names

    def add_adapter(self) -> None:
        targets = self.draw.choice([["lin0"], ["lin1"], ["lin0", "lin1"]])
        self.model.add_adapter(f"n{len(self.trail)}", self._config(targets))
        swap_(self.model)

    def delete_adapter(self) -> None:
        known = [*self.model.peft_config]
        name = self.draw.choice(known)
        # PEFT needs its first active adapter to stay, and two for `set_two`.
        if self.merged or len(known) < 3 or name in (*self.active, self.model.active_adapter):
            return
        self.model.delete_adapter(name)
        self.optimizers.pop(name, None)
        self.updates = {key: w for key, w in self.updates.items() if key[1] != name}

    def set_scale(self) -> None:
        name, factor = self.draw.choice([*self.model.peft_config]), self.draw.choice([0, 0.5, 1, 2])
        for layer in () if self.merged else self.layers().values():
            layer.set_scale(name, factor)

    def merge(self) -> None:
        if not self.disabled and not self.merged:
            self.model.merge_adapter()
            self.merged = True

    def unmerge(self) -> None:
        if self.merged:
            self.model.unmerge_adapter()
            self.merged = False

    def disable(self) -> None:
        if not self.merged:
            self.model.base_model.disable_adapter_layers()
            self.disabled = True

    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.disabled = False

    def run_pefts_own_forward(self) -> None:
        layers = self.layers().values()
        hooks = [m.base_layer.register_forward_hook(lambda *_: None) for m in layers]
        self.compare()
        for hook in hooks:
            hook.remove()


def product(layer: nn.Module, adapter: str) -> Tensor:
    """B A of an adapter of a layer."""
    return (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).detach()


_ONCE = (
    "begin_another_run change_the_ratio take_a_step_back load_its_own_state become_a_copy set_two "
    "add_adapter delete_adapter set_scale merge run_pefts_own_forward disable"
)
_OFTEN = "train train train train train train set_adapter enable enable unmerge unmerge"
CALLS = [getattr(DeltaWalk, name) for name in f"{_ONCE} {_OFTEN}".split()]
