"""`find_readers`: the layers whose weight another module reads, past the layer's own forward pass.

A branch beside such a layer would be trained and never used. nn.MultiheadAttention hands
``out_proj.weight`` to a function, the kernels of Mamba take ``out_proj.weight``, and so on. No list
of models could be complete, so the source of each module's forward pass is searched for the weights
of the modules inside of it. What has no Python source is taken to read none.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

# Attributes that tell nothing of a weight's values: `self.wo.weight.dtype` in T5 is harmless.
_NO_VALUES = {
    "device", "dim", "dtype", "element_size", "is_cuda", "is_meta", "ndim", "numel",
    "requires_grad", "shape", "size",
}  # fmt: skip
# Settings of a model with the value that switches them off. Bloom, and code that was derived from
# transformers' first Llama, slice weights by hand where both, or the first, are on.
_SWITCHES = {"pretraining_tp": 1, "slow_but_exact": False}

# The names on the way from a module to one inside of it; "*" is an index or a key.
_Path = tuple[str, ...]


def find_readers(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose own forward pass is not what another one calls, with the reason."""
    found: dict[nn.Module, str] = {}
    entries: dict[nn.Module, set[str]] = {m: {"forward"} for m in model.modules()}
    for caller in model.modules():  # Gemma3n's layers call `self.altup.correct(...)`
        for called in _reads(caller, frozenset(["forward"])).calls:
            for module in _follow(caller, called[:-1]):
                entries[module].add(called[-1])
    for reader, names in entries.items():
        for path in _reads(reader, frozenset(names)).weights:
            for module in _follow(reader, path):
                # The innermost reader comes last.
                found[module] = f"{type(reader).__name__} reads its weight, past its forward pass"
        compiled = reader._modules.get("_orig_mod") if _is_compiled(reader) else None
        if compiled is not None:
            found[compiled] = "torch.compile has compiled it alone, and keeps its forward pass"
    return found


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"  # importing it would import the compiler


def _follow(module: nn.Module, path: _Path) -> list[nn.Module]:
    """The modules at the end of a path; none where it leads to something else."""
    ends = [module]
    for name in path:
        children = [m._modules for m in ends]
        ends = [c for m in children for n, c in m.items() if c is not None and name in (n, "*")]
    return ends


class _Reads(NamedTuple):
    """What methods of a class, with all that they call on the same object, read inside of it.

    Attributes:
        weights: the paths to weights.
        calls: the paths to attributes of modules inside, among them the methods that are called.
    """

    weights: frozenset[_Path]
    calls: frozenset[_Path]


def _reads(module: nn.Module, entries: frozenset[str]) -> _Reads:
    """What a module reads when these of its methods are called."""
    config = getattr(module, "config", None)
    switched_off = frozenset(
        name
        for name, off in _SWITCHES.items()
        if getattr(module, name, getattr(config, name, off)) == off
    )
    kind: Any = type(module)  # not hashable in the eyes of mypy
    return _class_reads(kind, entries, _function(vars(module).get("forward")), switched_off)


@functools.lru_cache(maxsize=4096)
def _class_reads(
    kind: type, entries: frozenset[str], own: Callable | None, switched_off: frozenset[str]
) -> _Reads:
    """`_reads` by class.

    ``own``: the forward pass of an instance where it has one, which perhaps calls its class's.
    """
    classes = [c for c in kind.__mro__ if c not in (nn.Module, object)]
    weights: set[_Path] = set()
    calls: set[_Path] = set()
    seen: set[Callable] = set()

    def search(function: Callable | None, owner: int) -> None:
        if function is None or function in seen:
            return
        seen.add(function)
        source = _search(function, switched_off)
        weights.update(source.weights)
        calls.update(source.calls)
        for names, start in ((source.own, 0), (source.inherited, owner + 1)):
            for name in names:
                search(*_method(classes, start, name))

    search(own, -1)
    for name in entries:
        search(*_method(classes, 0, name))
    return _Reads(frozenset(weights), frozenset(calls))


def _method(classes: list[type], start: int, name: str) -> tuple[Callable | None, int]:
    """The function of this name from class ``start`` on, with the index of the class it is in."""
    for i in range(start, len(classes)):
        if name in vars(classes[i]):
            return _function(vars(classes[i])[name]), i
    return None, start


def _function(member: object) -> Callable | None:
    """The function below a method, a property and decorators."""
    if isinstance(member, property):
        member = member.fget
    member = getattr(member, "__func__", member)
    member = inspect.unwrap(member) if callable(member) else None
    member = getattr(member, "__func__", member)
    return member if inspect.isfunction(member) else None


class _Source(ast.NodeVisitor):
    """What a method reads of the object that it is called on.

    Attributes:
        weights: the paths to weights whose values it reads.
        calls: the paths to other attributes of what is inside of the object.
        own, inherited: names of attributes, and of those after ``super()``.
    """

    def __init__(self, function: ast.FunctionDef, switched_off: frozenset[str]):
        self.weights: set[_Path] = set()
        self.calls: set[_Path] = set()
        self.own: set[str] = set()
        self.inherited: set[str] = set()
        self._switched_off = switched_off
        self._known: dict[str, set[_Path]] = {a.arg: {()} for a in function.args.args[:1]}
        for node in ast.walk(function):  # names for what is inside of the object
            if isinstance(node, ast.Assign):
                self._bind(node.targets[0], self._paths(node.value))
            elif isinstance(node, ast.For | ast.comprehension):
                parts = {p for n in ast.walk(node.iter) for p in self._paths(n) if p}
                self._bind(node.target, {(*p, "*") for p in parts})
        self.visit(function)

    def _bind(self, target: ast.expr, paths: set[_Path]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and paths:
                self._known.setdefault(node.id, set()).update(paths)

    def _paths(self, node: ast.AST) -> set[_Path]:
        """Where in the object an expression leads, as far as the source tells."""
        match node:
            case ast.Name():
                return self._known.get(node.id, set())
            case ast.Attribute():
                return {(*p, node.attr) for p in self._paths(node.value)}
            case ast.Subscript():
                return {(*p, "*") for p in self._paths(node.value)}
        return set()

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        tested = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
        if not tested & self._switched_off:
            self.generic_visit(node)
            return
        rest = node.orelse if isinstance(node, ast.If) else [node.orelse]
        for other in rest:
            self.visit(other)

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = node.value
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) == "super":
            self.inherited.add(node.attr)
        for path in self._paths(node):
            self.own |= {*path} if len(path) == 1 else set()
            if path[-1] == "weight" and len(path) > 1 and isinstance(node.ctx, ast.Load):
                self.weights.add(path[:-1])
            elif len(path) > 1:
                self.calls.add(path)
        if node.attr in _NO_VALUES and getattr(value, "attr", None) == "weight":
            value = value.value  # type: ignore[attr-defined]  # it is an Attribute
        self.visit(value)


@functools.lru_cache(maxsize=4096)
def _search(function: Callable, switched_off: frozenset[str]) -> _Source:
    return _Source(_parse(function), switched_off)


def _parse(function: Callable) -> ast.FunctionDef:
    """The syntax tree of a function; that of one that reads nothing where there is no source."""
    for source in (lambda: inspect.getsource(function), lambda: "def forward(self): ..."):
        try:
            tree = ast.parse(textwrap.dedent(source()))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                return node
    raise AssertionError("the last source is a function")
