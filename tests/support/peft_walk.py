"""Random walks over PEFT's calls, made on a model as PEFT runs it and on the same one swapped."""

import copy
import random
import tempfile
import warnings

import peft
import torch
from peft_checks import assert_equal_runs, fused_calls, run, swap_quietly
from peft_models import input_of, make_model, output_of
from torch import Tensor, nn

KIND, TARGETS = "tied", ["conv1d", "lm_head", "embed_tokens"]


class Walk:
    """Two models that get the same calls; `step` compares all that can be seen of them.

    Attributes:
        plain, swapped: the models.
        fused: how many calls of `lora_linear` there were.
        trail: the names of the calls so far.
    """

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.x, self.trail, self.fused, self.handles = input_of(KIND), [], 0, []
        config = peft.LoraConfig(r=2, target_modules=TARGETS[:2], init_lora_weights=False)
        self.plain, self.swapped = (self._make(config) for _ in range(2))
        swap_quietly(self.swapped)
        self.compare()

    def _make(self, config: peft.LoraConfig) -> nn.Module:
        model = make_model(KIND).double()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return peft.get_peft_model(model, copy.deepcopy(config), adapter_name="a0")

    def _config(self) -> peft.LoraConfig:
        draw = self.draw
        options = draw.choice([{}, {}, {}, {"use_rslora": True}, {"use_dora": True}])
        targets = draw.sample(
            TARGETS[:2] if "use_dora" in options else TARGETS, draw.choice([1, 2])
        )
        return peft.LoraConfig(
            r=draw.choice([1, 2, 4]), lora_alpha=draw.choice([1, 6]), target_modules=targets,
            init_lora_weights=False, fan_in_fan_out=True, **options,
        )  # fmt: skip

    # ------------------------------------------------------------------------ one step

    def step(self) -> None:
        """Make a random call on both models, and compare what comes of it."""
        call = self.draw.choice(CALLS)
        self.trail.append(call.__name__.strip("_"))
        act, seed = call(self), self.draw.randrange(2**31)
        ends = []
        for model in (self.plain, self.swapped):
            torch.manual_seed(seed)
            ends.append(_end_of(act, model))
        assert ends[0] == ends[1], self.trail
        if self.draw.random() < 0.3 or "add" in self.trail[-1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                swap_quietly(self.swapped)
        self.compare()

    def compare(self) -> None:
        """The models have equal outputs, gradients, states and parameters that train."""
        with fused_calls(self.swapped) as calls:
            found = _end_of(run, self.swapped, self.x, output_of)
        self.fused += calls.total()
        wanted = _end_of(run, self.plain, self.x, output_of)
        if isinstance(wanted[0], Tensor):
            assert_equal_runs(wanted, found)
        else:  # PEFT itself cannot run, for instance without its active adapter
            assert found == wanted, self.trail
        states = [m.state_dict() for m in (self.plain, self.swapped)]
        assert list(states[0]) == list(states[1]), self.trail
        for name, t in states[0].items():
            torch.testing.assert_close(states[1][name], t, rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # so that roundings do not grow over the steps
            for p, q in zip(self.plain.parameters(), self.swapped.parameters(), strict=True):
                q.copy_(p)
        trains = [[p.requires_grad for p in m.parameters()] for m in (self.plain, self.swapped)]
        assert trains[0] == trains[1], self.trail

    # ------------------------------------------------------- each draws once, for both models

    def name(self) -> str:
        return self.draw.choice([*self.plain.peft_config])

    def names(self) -> list[str]:
        known = [*self.plain.peft_config]
        return self.draw.sample(known, self.draw.randint(1, len(known)))

    def layer(self) -> str:
        names = [n for n, m in self.plain.named_modules() if type(m) is peft.tuners.lora.Linear]
        return self.draw.choice(names)


def _end_of(call, *args):
    """What a call returns, or the error that it raises."""
    try:
        return call(*args)
    except Exception as error:
        return type(error), str(error)


def _set_adapter(walk):
    name = walk.name()
    return lambda m: m.set_adapter(name)


def _activate_several(walk):
    names = walk.names()
    return lambda m: m.base_model.set_adapter(names)


def _add_adapter(walk):
    name, config = f"a{len(walk.trail)}", walk._config()
    return lambda m: m.add_adapter(name, copy.deepcopy(config))


def _delete_adapter(walk):
    name = walk.name()
    return lambda m: m.delete_adapter(name) if len(m.peft_config) > 1 else None


def _merge(walk):
    names, safe = walk.draw.choice([None, walk.names()]), walk.draw.random() < 0.5
    return lambda m: m.merge_adapter(names, safe_merge=safe)


def _unmerge(walk):
    return lambda m: m.unmerge_adapter()


def _disable(walk):
    return lambda m: m.base_model.disable_adapter_layers()


def _enable(walk):
    return lambda m: m.base_model.enable_adapter_layers()


def _change_mode(walk):
    mode = walk.draw.random() < 0.5
    return lambda m: m.train(mode) and None


def _scale(walk):
    layer, name = walk.layer(), walk.name()
    act = walk.draw.choice(["set", "scale", "unscale", "reset", "tensor"])

    def call(model):
        module = model.get_submodule(layer)
        if act == "set":
            module.set_scale(name, 0.7)
        elif act == "scale":
            module.scale_layer(1.5)
        elif act == "unscale":
            module.unscale_layer(1.5)
        elif act == "reset":
            module.unscale_layer()
        elif name in module.scaling and not isinstance(module.scaling[name], Tensor):
            module.scaling[name] = torch.tensor(module.scaling[name])  # as hot-swapping has it

    return call


def _weighted(walk):
    names, new = walk.names(), f"w{len(walk.trail)}"
    kind = walk.draw.choice(["svd", "cat", "linear"])
    return lambda m: m.add_weighted_adapter(names, [0.5] * len(names), new, kind)


def _train(walk):
    def call(model):
        model.zero_grad()
        output_of(model, walk.x).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.grad is not None:
                    p -= 0.1 * p.grad / p.grad.norm().clamp(min=1)

    return call


def _choose_what_trains(walk):
    names, on = walk.names(), walk.draw.random() < 0.6
    return lambda m: m.base_model.set_requires_grad(names, on)


def _train_a_base_weight(walk):
    layer, on = walk.layer(), walk.draw.random() < 0.3
    return lambda m: m.get_submodule(layer).get_base_layer().weight.requires_grad_(on) and None


def _save_and_load(walk):
    name, new = walk.name(), walk.draw.choice([walk.name(), f"l{len(walk.trail)}"])

    def call(model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=[name])
            model.load_adapter(folder if name == "default" else f"{folder}/{name}", new)

    return call


def _load_state(walk):
    scale = walk.draw.choice([0.5, 2.0])

    def call(model):
        state = {n: scale * t for n, t in model.state_dict().items() if "lora_" in n}
        return str(model.load_state_dict(state, strict=False).unexpected_keys)

    return call


def _hook(walk):
    layer, part = walk.layer(), walk.draw.choice(["base_layer", "lora_A", "lora_B"])

    def call(model):
        module = model.get_submodule(layer)
        inner = getattr(module, part)
        for m in [inner] if part == "base_layer" else inner.values():
            walk.handles.append(m.register_forward_hook(lambda m, args, y: 2 * y))

    return call


def _unhook(walk):
    def call(model):
        while walk.handles:
            walk.handles.pop().remove()

    return call


def _copy_parameter(walk):
    layer, name = walk.layer(), walk.name()

    def call(model):
        factors = model.get_submodule(layer).lora_B
        if name in factors:
            old = factors[name].weight
            factors[name].weight = nn.Parameter(1.5 * old.detach(), old.requires_grad)

    return call


CALLS = [
    _set_adapter, _activate_several, _add_adapter, _delete_adapter, _merge, _unmerge, _disable,
    _enable, _enable, _change_mode, _scale, _weighted, _train, _train, _choose_what_trains,
    _train_a_base_weight, _save_and_load, _load_state, _hook, _unhook, _unhook, _copy_parameter,
]  # fmt: skip
