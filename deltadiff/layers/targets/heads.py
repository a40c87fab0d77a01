"""`find_heads`: what of a model stands on top of its pretrained body.

A new head starts from random numbers: frozen, or with no more than a low-rank pair, it could not
learn what it is for, so `swap_` trains it whole, as PEFT does for its task types. A pretrained head
(of a language model, say) is left alone. A model does not tell which of the two its head is, but
the names of transformers' classes and of their parts do.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# What new heads are called beside a body, whatever the class is called.
_HEAD_NAMES = {
    "classification_head", "classifier", "ctc_head", "qa_outputs", "reward_head", "score",
    "v_head", "value_head",
}  # fmt: skip
# They are heads in models for classification alone, where transformers does not name the body.
_MAYBE_HEADS = {"fc", "head"}
# Classes whose head was pretrained together with the body.
_PRETRAINED = re.compile(
    "MaskedLM|CausalLM|LMHead|Pre[Tt]raining|NextSentencePrediction|MaskedImageModeling"
)
# Classes whose head is made for the labels or spans of a data set. Those that segment any image
# (CLIPSeg, SegGPT) come with their head.
_NEW = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|XVector|CTC|Regression|Reasoning|"
    r"Detection|(?<!Image)Segmentation)|DoubleHeads"
)

Head = nn.Module | nn.Parameter


@dataclass(frozen=True)
class Heads:
    """A model's heads by name: modules, or parameters that stand beside the body.

    Attributes:
        new: heads to be trained whole.
        pretrained: heads that are neither trained nor get a pair.
        outputs: the modules that give the scores of tokens (``get_output_embeddings``).
    """

    new: dict[str, Head]
    pretrained: dict[str, Head]
    outputs: frozenset[nn.Module]

    def modules(self) -> set[nn.Module]:
        """All modules of all heads. Detection models reach theirs by names in the body, too."""
        return {*self.outputs} | modules_of(self.new) | modules_of(self.pretrained)


def modules_of(heads: dict[str, Head]) -> set[nn.Module]:
    """The modules of these heads, with all inside of them."""
    return {m for h in heads.values() if isinstance(h, nn.Module) for m in h.modules()}


def parameters_of(head: Head) -> list[nn.Parameter]:
    return list(head.parameters()) if isinstance(head, nn.Module) else [head]


def find_heads(model: nn.Module) -> Heads:
    """The heads of the transformers models in a model, and those that stand beside such a model."""
    outputs = frozenset(_output_modules(model))
    new: dict[str, Head] = {}
    pretrained: dict[str, Head] = {}
    for name, head, kinds in _beside_bodies("", model):
        if isinstance(head, nn.Module) and not outputs.isdisjoint(head.modules()):
            pretrained[name] = head
        elif name.rpartition(".")[2] in _HEAD_NAMES:
            new[name] = head
        elif any(map(_PRETRAINED.search, kinds)):
            pretrained[name] = head
        elif any(map(_NEW.search, kinds)):
            new[name] = head
    return Heads(new, pretrained, outputs)


def _output_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        get = getattr(type(module), "get_output_embeddings", None)
        if get is not None:
            outputs = get(module)
            if isinstance(outputs, nn.Module):  # Musicgen's is a list of linear layers
                yield from outputs.modules()


def _is_pretrained(module: nn.Module) -> bool:
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def _beside_bodies(prefix: str, module: nn.Module) -> Iterator[tuple[str, Head, list[str]]]:
    """What stands beside each body: its name, itself, and the names of the model's classes."""
    children = dict(module.named_children())
    if _is_pretrained(module):
        kinds = [kind.__name__ for kind in type(module).__mro__]
        body = _body(module)
        for name, child in children.items():
            is_head = body is not None or name in _HEAD_NAMES | _MAYBE_HEADS
            if is_head and body not in {*child.modules()} and any(True for _ in child.parameters()):
                yield f"{prefix}{name}", child, kinds
        if body is not None:
            for name, p in module.named_parameters(recurse=False):
                yield f"{prefix}{name}", p, kinds
        return
    bodies = any(map(_is_pretrained, children.values()))
    for name, child in children.items():
        if bodies and name in _HEAD_NAMES:
            yield f"{prefix}{name}", child, []
        else:
            yield from _beside_bodies(f"{prefix}{name}.", child)


def _body(model: nn.Module) -> nn.Module | None:
    """The pretrained body of one of transformers' models; None where all of the model is."""
    for body in (model.base_model, model._modules.get("backbone")):
        if isinstance(body, nn.Module) and body is not model:
            return body
    return None
