"""The heat map of gates: the tests count the pixels of each colour in the PNG."""

import pytest

from deltadiff.diffora import Candidates, GateMatrix, random_selection
from deltadiff.diffora.heat_map import MISSING, OWN, plot_gates
from deltadiff.errors import ArgumentError

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
GATES = (0.1, 0.15, 0.2, 0.55)


def matrix(layers=6, types="abcd") -> GateMatrix:
    names = tuple(f"encoder.layer.{i}" for i in range(layers))
    candidates = Candidates(names, (tuple(types),) * layers)
    return GateMatrix(candidates, (GATES[: len(types)],) * layers)


def count(path, colour: str) -> int:
    """The number of pixels of this colour."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    with Image.open(path) as image:
        return dict((c, n) for n, c in image.convert("RGB").getcolors(2**24)).get(wanted, 0)


def size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_the_selected_cells_are_the_dark_ones(tmp_path):
    gates, path = matrix(), tmp_path / "gates.png"
    dark = []
    for ratio in (None, 0.25, 0.5, 1.0):
        plot_gates(path, gates, ratio and gates.discretise(ratio))
        dark.append(count(path, OWN))
    cell = (dark[3] - dark[1]) / 18  # 24 cells against 6
    assert dark[2] - dark[1] == pytest.approx(6 * cell, rel=0.1)
    assert cell > 500  # pixels, which is enough to be seen


def test_layers_that_lack_a_module_show_it(tmp_path):
    candidates = Candidates(("l.0", "l.1"), (("a", "b"), ("a", "b", "c")))
    gates = GateMatrix(candidates, ((0.4, 0.6, None), (0.2, 0.3, 0.5)))
    plot_gates(tmp_path / "some.png", gates)
    plot_gates(tmp_path / "none.png", matrix(2, "abc"))
    assert count(tmp_path / "some.png", MISSING) > 500 > count(tmp_path / "none.png", MISSING)


@pytest.mark.parametrize("layers", [1, 12, 32, 80])
def test_many_layers_still_fit(tmp_path, layers):
    gates = matrix(layers)
    plot_gates(tmp_path / "a.png", gates, random_selection(gates.candidates, 0.5), title="RTE")
    width, height = size(tmp_path / "a.png")
    assert width <= 20 * 130  # inches and dots an inch
    plot_gates(tmp_path / "b.png", gates)
    above = size(tmp_path / "b.png")[1] < 0.6 * height
    assert above == (layers > 19)  # then the panels are one above the other


def test_a_selection_of_another_model_is_refused(tmp_path):
    other = random_selection(matrix(7).candidates, 0.5)
    with pytest.raises(ArgumentError, match="other candidates"):
        plot_gates(tmp_path / "a.png", matrix(), other)
    assert not list(tmp_path.iterdir())
