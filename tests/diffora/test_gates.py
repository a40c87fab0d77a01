"""DiffoRA's gates and selections: equation 14, the random control, bad input."""

import pytest
from gate_matrices import gate_matrix

from deltadiff.diffora import Candidates, GateMatrix, Selection, random_selection
from deltadiff.errors import ArgumentError


def test_discretise_keeps_the_largest_of_each_layer():
    gates = gate_matrix([0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.05, 0.15])
    selection = gates.discretise(0.5)
    assert selection.selected == {"l.0.b", "l.0.c", "l.1.a", "l.1.d"}
    assert selection.others == ("l.0.a", "l.0.d", "l.1.b", "l.1.c")
    assert selection.gates is gates and selection.ratio == 0.5
    # Equation 14 itself selects a gate that is at least the K-th largest.
    for i, row in enumerate(gates.values):
        delta = sorted(row, reverse=True)[1]
        for t, gate in zip("abcd", row, strict=True):
            assert (f"l.{i}.{t}" in selection.selected) == (gate >= delta)


def test_discretise_takes_exactly_k_and_the_first_of_equal_ones():
    gates = gate_matrix([0.25] * 4, [0.2, 0.3, 0.2, 0.3])
    assert gates.discretise(0.5).selected == {"l.0.a", "l.0.b", "l.1.b", "l.1.d"}
    assert gates.discretise(0.75).selected >= {"l.1.a"}
    assert not gates.discretise(0.75).selected & {"l.0.d", "l.1.c"}


def test_first_is_first_in_the_layer_not_in_the_table():
    gates = gate_matrix({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5})
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
    gates = gate_matrix({"a": 0.1, "b": 0.9}, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    assert gates.discretise(0.5).selected == {"l.0.b", "l.1.c", "l.1.d"}


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf"), "half", None, True])
def test_ratios_that_are_none(ratio):
    gates = gate_matrix([0.25] * 4)
    with pytest.raises(ArgumentError, match="ratio"):
        gates.discretise(ratio)
    with pytest.raises(ArgumentError, match="ratio"):
        random_selection(gates.candidates, ratio)


def test_a_ratio_of_less_than_one_module():
    gates = gate_matrix({"a": 0.2, "b": 0.3, "c": 0.2, "d": 0.1, "e": 0.2}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ArgumentError, match=r"0.4 of 2 modules in l.1.*accepted: 0.5 to 1"):
        gates.discretise(0.4)


def test_random_selection_is_seeded_and_takes_k_a_layer():
    candidates = gate_matrix(*[[0.25] * 4] * 8).candidates
    one, same, other = (random_selection(candidates, 0.5, seed) for seed in (1, 1, 2))
    assert one == same != other and one.gates is None
    for i in range(8):
        assert sum(name.startswith(f"l.{i}.") for name in one.selected) == 2
    picks = [random_selection(candidates, 0.25, seed).selected for seed in range(40)]
    assert {name for p in picks for name in p} == set(candidates.places)  # none is left out


def test_gates_and_selections_made_by_hand_are_checked():
    with pytest.raises(ArgumentError, match="gate of l.0.b"):
        gate_matrix([0.5, float("nan")])
    candidates = gate_matrix([0.5, 0.5]).candidates
    with pytest.raises(ArgumentError, match="values: got rows of 1; accepted: 1 rows of 2"):
        GateMatrix(candidates, ((0.5,),))
    with pytest.raises(ArgumentError, match=r"l\.0\.z"):
        Selection(candidates, frozenset({"l.0.z"}), 0.5)
