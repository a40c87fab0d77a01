"""`find_coverage`: how much of a model's weight is adapted, and why the rest is not."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..text import align_columns
from .lora_layers import HoldsPairs, lora_layers
from .matrices import Matrix, find_matrices, size_of, why_no_linear
from .model_notes import stopped_training
from .plain_names import plain_name
from .targets.eligible import find_refused
from .targets.heads import Head, Heads, find_heads, modules_of, parameters_of

_MOST_GROUPS = 5  # A report with more would not be read.


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one kind.

    Attributes:
        name: theirs, with "*" in the place of an index.
        reason: why they are not adapted, or train whole, in words; may be empty.
        count, elements: how many weights, and how many numbers they hold.
    """

    name: str
    reason: str
    count: int
    elements: int


@dataclass(frozen=True)
class Coverage:
    """What of a model's weight is adapted: of its tensors with two or more dimensions, each once.

    Quantised weights count by their logical size.

    Attributes:
        total, adapted: the elements of all, and of those that have a low-rank pair.
        whole: what trains without a pair.
        left_out: what neither trains nor has a pair.
        stopped: what trained before `swap_` and does not now, of all dimensions.
        frozen_heads, paired_heads: new heads that are frozen, or that have no more than a pair.

    All groups come in the order of their size.
    """

    total: int
    adapted: int
    whole: tuple[WeightGroup, ...]
    left_out: tuple[WeightGroup, ...]
    stopped: tuple[WeightGroup, ...]
    frozen_heads: tuple[str, ...]
    paired_heads: tuple[str, ...]

    def percent(self, elements: int) -> str:
        """The share of the weight that so many elements are, in words: "12.3 %"."""
        return _percent(elements, self.total)

    def lines(self) -> list[str]:
        """All but the share that is adapted, in 11 lines of text at most."""
        lines = []
        if self.whole:
            share = self.percent(_sum(self.whole))
            whole = (f"{g.name} ({g.reason})" if g.reason else g.name for g in self.whole)
            lines.append(f"trained whole, {share}: {_join(whole)}")
        states = (self.frozen_heads, "is frozen"), (self.paired_heads, "trains a pair alone")
        for heads, state in states:
            if heads:
                call = f"modules_to_save={list(heads)!r} trains it whole"
                lines.append(f"a new head {state}: {_join(heads)}; {call}")
        if self.left_out:
            lines += ["not adapted:", *group_lines(self.left_out, self.total, "coverage.left_out")]
        if self.stopped:
            count, names = _sum(self.stopped), _join(g.name for g in self.stopped)
            lines.append(f"{count:,} parameters stopped training: {names}")
        return lines


def group_lines(groups: Sequence[WeightGroup], total: int, place: str) -> list[str]:
    """A line for each of the largest groups with its share of ``total``, and one for the rest.

    ``place``: where all of them are, which the last line names.
    """
    shown, more = groups[:_MOST_GROUPS], groups[_MOST_GROUPS:]
    cells = [(f"  {_percent(g.elements, total)}", g.name, g.reason) for g in shown]
    if more:
        cells.append((f"  {_percent(_sum(more), total)}", f"{len(more)} more", f"see {place}"))
    return align_columns(cells, right=(0,)).splitlines()


def _percent(elements: int, total: int) -> str:
    share = 100 * elements / max(1, total)
    return "<0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


def find_coverage(model: nn.Module) -> Coverage:
    """How much of the weight of a model is adapted now, and why the rest is not."""
    heads, refused = find_heads(model), find_refused(model)
    new = {_plain(name): modules_of({name: head}) for name, head in heads.new.items()}
    paired = {id(layer.weight) for layer in lora_layers(model).values() if layer.active}
    total = adapted = 0
    whole: list[tuple[str, str, int]] = []
    left_out: list[tuple[str, str, int]] = []
    for m in find_matrices(model):
        total += m.elements
        name = _plain(m.name)
        if m.in_peft or id(m.parameter) in paired:
            adapted += m.elements
        elif m.parameter is not None and m.parameter.requires_grad:
            head = next((n for n, h in new.items() if m.module in h), None)
            reason = "" if head is None else "a new head"
            whole.append((head or f"{name}{_ties(m, ' with ')}", reason, m.elements))
        else:
            reason = why_left_out(m, heads, refused)
            left_out.append((name, f"{reason}{_ties(m, ', tied to ')}", m.elements))
    stopped = [(_block(n), "", size_of(p)) for n, p in stopped_training(model).items()]
    states = {_plain(name): _state(head) for name, head in heads.new.items()}
    return Coverage(
        total, adapted, group_weights(whole), group_weights(left_out), group_weights(stopped),
        tuple(name for name, state in states.items() if state == "frozen"),
        tuple(name for name, state in states.items() if state == "paired"),
    )  # fmt: skip


def why_left_out(matrix: Matrix, heads: Heads, refused: dict[nn.Module, str]) -> str:
    """The reason for which a weight has no pair and does not train."""
    module = matrix.module
    if not matrix.is_linear:
        return why_no_linear(matrix)
    if module in refused:
        return refused[module]
    if module in heads.outputs:
        return "the output head"
    if module in modules_of(heads.pretrained):
        return "part of a pretrained head"
    if module in modules_of(heads.new):
        return "part of a new head"
    return "a linear layer that target_modules does not name"


def _state(head: Head) -> str:
    """Whether a new head trains "whole", is "paired" or "frozen"."""
    if isinstance(head, nn.Module) and any(isinstance(m, HoldsPairs) for m in head.modules()):
        return "paired"
    return "whole" if any(p.requires_grad for p in parameters_of(head)) else "frozen"


def _plain(name: str) -> str:
    """The name of a module or parameter without PEFT's wrappers."""
    return plain_name(f"{name}.").removesuffix(".")


def _ties(matrix: Matrix, words: str) -> str:
    names = [_plain(name) for name in matrix.tied]
    return f"{words}{_join(names)}" if names else ""


def _block(name: str) -> str:
    """What a parameter belongs to: the stack of layers, or else the module."""
    stack = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return stack[0] if stack else name.rpartition(".")[0] or name


def group_weights(weights: Iterable[tuple[str, str, int]]) -> tuple[WeightGroup, ...]:
    """Put together (name, reason, elements) of the same reason whose names differ in indices."""
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, reason, elements in weights:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        found.setdefault((pattern, reason), []).append((name, elements))
    groups = []
    for (pattern, reason), members in found.items():
        name = pattern if len({n for n, _ in members}) > 1 else members[0][0]
        groups.append(WeightGroup(name, reason, len(members), sum(n for _, n in members)))
    return tuple(sorted(groups, key=lambda g: -g.elements))


def _sum(groups: Iterable[WeightGroup]) -> int:
    return sum(g.elements for g in groups)


def _join(names: Iterable[str], most: int = 5) -> str:
    """Names with commas between them; of many the first, and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
