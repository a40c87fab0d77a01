"""DiffoRA's candidates, gates and selection: what is found, equation 14, JSON, bad input."""

import json

import pytest
from small_models import ARCHITECTURES, TYPES, Block, Stack, build
from torch import nn

from deltadiff import swap_
from deltadiff.diffora import Candidates, GateMatrix, Selection, find_candidates, random_selection
from deltadiff.errors import ArgumentError, ArgumentTypeError, CheckpointError


def matrix(*rows) -> GateMatrix:
    """Gates of layers "l.0", "l.1", ...; a row is a dict of modules, or a list for a, b, c, ..."""
    rows = [
        row if isinstance(row, dict) else dict(zip("abcdefghij", row, strict=False)) for row in rows
    ]
    layers = tuple(f"l.{i}" for i in range(len(rows)))
    candidates = Candidates(layers, tuple(map(tuple, rows)))
    return GateMatrix(candidates, tuple(tuple(r.get(t) for t in candidates.types) for r in rows))


# ----------------------------------------------------------------------- candidates


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_candidates_of_real_architectures(name):
    model = build(name)
    candidates = find_candidates(model)
    assert len(candidates.layers) == 3 and candidates.types == TYPES[name]
    assert candidates.modules == (TYPES[name],) * 3
    modules = dict(model.named_modules())
    for whole, (i, j) in candidates.places.items():
        assert whole == f"{candidates.layers[i]}.{candidates.types[j]}" and whole in modules
    heads = {"bert": {"bert.pooler.dense", "classifier"}, "gpt2": set(), "llama": set()}
    if name in heads:
        assert set(candidates.outside) == heads[name]


def test_each_layer_has_its_own_modules():
    model = Stack(Block("ab"), Block("bca"))
    candidates = find_candidates(model)
    assert candidates.layers == ("layers.0", "layers.1")
    assert candidates.modules == (("a", "b"), ("b", "c", "a"))
    assert candidates.types == ("a", "b", "c")
    assert candidates.places["layers.1.c"] == (1, 2)


def test_an_outermost_stack_is_the_stack():
    inner = Stack(Block("ab"), Block("ab"))
    candidates = find_candidates(Stack(inner))
    assert candidates.layers == ("layers.0",) and candidates.types[0] == "layers.0.a"


def test_targets_narrow_the_candidates():
    candidates = find_candidates(build("bert"), ["query", "value"])
    assert candidates.types == ("attention.self.query", "attention.self.value")
    kept = find_candidates(build("bert"), modules_to_save=["classifier"])
    assert kept.outside == ("bert.pooler.dense",)


def test_a_module_in_two_layers_is_one_candidate():
    first, second = Block("abc"), Block("abc")
    second.a = first.a
    assert find_candidates(Stack(first, second)).modules == (("a", "b", "c"), ("b", "c"))


@pytest.mark.parametrize(
    ("model", "targets", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "all-linear", "nn.ModuleList"),
        (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "all-linear", "nn.ModuleList"),
        (Stack(Block("ab"), Block("ab")), ["a"], "one module in layers.0: a"),
        (Stack(Block("ab"), Block("c")), "all-linear", "one module in layers.1: c"),
        (Stack(Block("ab")), ["query"], "query"),
        (nn.LayerNorm(3), "all-linear", "matches no linear layer"),
        ("bert", "all-linear", "torch.nn.Module"),
    ],
)
def test_no_candidates(model, targets, words):
    with pytest.raises(ArgumentError, match=words):
        find_candidates(model, targets)


def test_peft_layers_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ArgumentTypeError, match="PEFT"):
        find_candidates(model)


def test_a_swapped_model_has_no_candidates_left():
    model = Stack(Block("ab"))
    swap_(model, r=2)
    with pytest.raises(ArgumentError, match="target_modules"):
        find_candidates(model)


# ----------------------------------------------------------------------- equation 14


def test_discretise_keeps_the_largest_of_each_layer():
    gates = matrix([0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.05, 0.15])
    selection = gates.discretise(0.5)
    assert selection.selected == {"l.0.b", "l.0.c", "l.1.a", "l.1.d"}
    assert selection.others == ("l.0.a", "l.0.d", "l.1.b", "l.1.c")
    assert selection.gates is gates and selection.ratio == 0.5
    # by the equation itself: 1 where the gate is at least the K-th largest
    for i, row in enumerate(gates.values):
        delta = sorted(row, reverse=True)[1]
        for t, gate in zip("abcd", row, strict=True):
            assert (f"l.{i}.{t}" in selection.selected) == (gate >= delta)


def test_discretise_takes_exactly_k_and_the_first_of_equal_ones():
    gates = matrix([0.25] * 4, [0.2, 0.3, 0.2, 0.3])
    assert gates.discretise(0.5).selected == {"l.0.a", "l.0.b", "l.1.b", "l.1.d"}
    assert gates.discretise(0.75).selected >= {"l.1.a"}
    assert not gates.discretise(0.75).selected & {"l.0.d", "l.1.c"}


def test_first_is_first_in_the_layer_not_in_the_table():
    gates = matrix({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5})
    assert gates.discretise(0.5).selected == {"l.0.a", "l.1.b"}


@pytest.mark.parametrize(
    ("ratio", "n", "k"),
    [(0.7, 10, 7), (0.29, 100, 29), (2 / 3, 6, 4), (1 / 3, 6, 2), (0.5, 6, 3), (0.5, 7, 3),
     (0.9, 6, 5), (0.2, 6, 1), (1, 6, 6), (1.0, 5, 5), (0.6999, 10, 6)],
)  # fmt: skip
def test_how_many_are_kept(ratio, n, k):
    candidates = Candidates(("l",), (tuple(f"m{i}" for i in range(n)),))
    gates = GateMatrix(candidates, ((1 / n,) * n,))
    assert len(gates.discretise(ratio).selected) == k
    assert len(random_selection(candidates, ratio).selected) == k


def test_layers_of_different_sizes_keep_their_own_share():
    gates = matrix({"a": 0.1, "b": 0.9}, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    assert gates.discretise(0.5).selected == {"l.0.b", "l.1.c", "l.1.d"}


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf"), "half", None, True])
def test_ratios_that_are_none(ratio):
    gates = matrix([0.25] * 4)
    with pytest.raises(ArgumentError, match="ratio"):
        gates.discretise(ratio)
    with pytest.raises(ArgumentError, match="ratio"):
        random_selection(gates.candidates, ratio)


def test_a_ratio_of_less_than_one_module():
    gates = matrix({"a": 0.2, "b": 0.3, "c": 0.2, "d": 0.1, "e": 0.2}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ArgumentError, match=r"0.4 of 2 modules in l.1.*accepted: 0.5 to 1"):
        gates.discretise(0.4)


def test_random_selection_is_seeded_and_takes_k_a_layer():
    candidates = matrix(*[[0.25] * 4] * 8).candidates
    one, same, other = (random_selection(candidates, 0.5, seed) for seed in (1, 1, 2))
    assert one == same != other and one.gates is None
    for i in range(8):
        assert sum(name.startswith(f"l.{i}.") for name in one.selected) == 2
    picks = [random_selection(candidates, 0.25, seed).selected for seed in range(40)]
    assert {name for p in picks for name in p} == set(candidates.places)  # none is left out


# ----------------------------------------------------------------------- JSON


def test_gates_and_selection_come_back_from_json(tmp_path):
    gates = matrix({"a": 0.1, "b": 0.9}, {"b": 1 / 3, "c": 2 / 3})
    gates.save(tmp_path / "gates.json")
    assert GateMatrix.load(tmp_path / "gates.json") == gates
    written = json.loads((tmp_path / "gates.json").read_text())
    assert written["layers"] == {"l.0": {"a": 0.1, "b": 0.9}, "l.1": {"b": 1 / 3, "c": 2 / 3}}
    for selection in (gates.discretise(0.5), random_selection(gates.candidates, 0.5)):
        selection.save(tmp_path / "selection.json")
        assert Selection.load(tmp_path / "selection.json") == selection
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gates.json", "selection.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="other"), "'other'"),
        (lambda d: d.update(version=7), "version 7"),
        (lambda d: d.update(layers={}), "layers"),
        (lambda d: d.update(layers=[0.5]), "layers"),
        (lambda d: d["layers"].update({"l.0": {}}), "l.0"),
        (lambda d: d["layers"]["l.0"].update(a="much"), "l.0.a.*'much'"),
        (lambda d: d["layers"]["l.0"].update(a=float("nan")), "l.0.a.*nan"),
        (lambda d: d["layers"]["l.0"].update(a=1.5), "l.0.a.*1.5"),
        (lambda d: d["layers"]["l.0"].update(a=True), "l.0.a.*True"),
    ],
)
def test_garbled_gates(tmp_path, change, words):
    path = tmp_path / "gates.json"
    matrix([0.5, 0.5]).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=words):
        GateMatrix.load(path)


def test_files_that_are_no_tables(tmp_path):
    path = tmp_path / "gates.json"
    with pytest.raises(CheckpointError, match="No such file"):
        GateMatrix.load(path)
    for text in ("{", "[]", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError):
            GateMatrix.load(path)
    matrix([0.5, 0.5]).save(path)
    with pytest.raises(CheckpointError, match="deltadiff-selection"):
        Selection.load(path)


def test_gates_and_selections_made_by_hand_are_checked():
    with pytest.raises(ArgumentError, match="gate of l.0.b"):
        matrix([0.5, float("nan")])
    candidates = matrix([0.5, 0.5]).candidates
    with pytest.raises(ArgumentError, match="values: got rows of 1; accepted: 1 rows of 2"):
        GateMatrix(candidates, ((0.5,),))
    with pytest.raises(ArgumentError, match=r"l\.0\.z"):
        Selection(candidates, frozenset({"l.0.z"}), 0.5)
