"""What an adapter of PEFT holds beside the pairs: new heads and other modules that were trained."""

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...errors import SwapError
from ..lora_layers import LoraLayer
from ..low_rank_sum import whole_on_cpu
from .names import is_of_peft, plain_name

# Under these tasks PEFT saves the modules whose names end so, whatever the configuration says.
_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASK_OF_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_INSTEAD = "`save_adapter`, or `merge_` and save the whole model"


@dataclass(frozen=True)
class BesidePairs:
    """What is saved beside the pairs.

    Attributes:
        tensors: by name, without PEFT's prefix.
        modules_to_save, bias, task_type: entries of the configuration.
    """

    tensors: dict[str, Tensor]
    modules_to_save: list[str]
    bias: str
    task_type: str | None


def beside_pairs(
    base: nn.Module, modules: Mapping[str, nn.Module], layers: Mapping[str, LoraLayer]
) -> BesidePairs:
    """The modules that hold other parameters that require gradients, and copies that PEFT made.

    Args:
        base: a model without wrappers.
        modules: its modules by name.
        layers: a pair of each layer that has some, by name. Their biases may be trained, too.

    Raises:
        SwapError: PEFT cannot save a trained parameter, or would leave out a pair because of it.
        ArgumentTypeError: a parameter is on meta.
    """
    tensors: dict[str, Tensor] = {}
    owners = _copies_of_peft(base, modules)
    for name, module in modules.items():
        own = (layers[name].holder if name in layers else module)._parameters
        trained = {key: p for key, p in own.items() if p is not None and p.requires_grad}
        if name not in layers:
            owners |= {name} if trained else set()
        elif "weight" in trained:
            given = f"{name}.weight, which is trained beside a pair"
            raise SwapError("model", given, f"frozen weights; else {_INSTEAD}")
        elif "bias" in trained:
            tensors[f"{name}.base_layer.bias"] = whole_on_cpu(name, trained["bias"])
    bias = "lora_only" if tensors else "none"
    kept, task = _modules_to_save(modules, owners, layers, _task_type(base))
    for name in kept:
        for key, t in modules[name].state_dict().items():
            tensors[f"{name}.{plain_name(key)}"] = whole_on_cpu(name, t)
    return BesidePairs(tensors, kept, bias, task)


def _copies_of_peft(base: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """The modules that are PEFT's copies, which it saves whole whether they are frozen or not."""
    wrappers = [m for m in base.modules() if is_of_peft(m)]
    copies = {id(c) for m in wrappers for c in getattr(m, "modules_to_save", {}).values()}
    return {name for name, module in modules.items() if id(module) in copies}


def _task_type(base: nn.Module) -> str | None:
    """PEFT's name of what a model of transformers is for; None where it is not certain."""
    kind = type(base).__name__
    if getattr(base, "main_input_name", None) != "input_ids":
        return None
    if getattr(base.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if kind.endswith("ForConditionalGeneration") else None
    for ending, task in _TASK_OF_CLASS.items():
        if kind.endswith(ending):
            return task
    # PEFT's wrapper for this task passes ``inputs_embeds``, which CLIP's models do not take.
    takes = "inputs_embeds" in inspect.signature(base.forward).parameters
    return "FEATURE_EXTRACTION" if takes and getattr(base, "base_model", None) is base else None


def _modules_to_save(
    modules: Mapping[str, nn.Module], owners: set[str], layers: Collection[str], task: str | None
) -> tuple[list[str], str | None]:
    """The modules that PEFT keeps whole when these are to be kept, and the task to say.

    PEFT keeps all modules whose names end in one of ``modules_to_save``, and for some tasks heads
    that nobody named. It wants all of their weights in the file. Where PEFT would keep a head that
    is in the way of a pair, the task is not said.
    """
    parents = {n.rpartition(".")[0] if isinstance(modules[n], _CONTAINERS) else n for n in owners}
    obstacles: list[str] = []
    for said in (task, None):
        heads = _HEADS_OF_TASK.get(said or "", ())
        outer = {name for name in modules if name and name.endswith(heads)} | parents
        names = [n for n in parents if not n.startswith(tuple(f"{name}." for name in outer))]
        kept = sorted(name for name in modules if name and name.endswith((*names, *heads)))
        obstacles = _obstacles(kept, modules, layers) + [n for n in names if not n]
        if not obstacles:
            return kept, said
    given = f"trained parameters in {', '.join(map(repr, sorted(owners)))}, which PEFT cannot save"
    if any(obstacles):
        given += f" because of {', '.join(sorted(obstacles))}"
    raise SwapError("model", given, f"modules without pairs of names that end so; else {_INSTEAD}")


def _obstacles(
    kept: list[str], modules: Mapping[str, nn.Module], layers: Collection[str]
) -> list[str]:
    """The modules because of which PEFT cannot keep these, or would leave out a pair."""
    found = [name for name in kept if isinstance(modules[name], _CONTAINERS)]
    found += [name for name in kept for other in kept if name.startswith(f"{other}.")]
    # PEFT, too, takes these names for regular expressions here.
    excluded = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in kept]
    return found + [name for name in layers if any(r.match(name) for r in excluded)]
