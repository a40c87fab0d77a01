"""The JSON files of gates and selections: what is in them, and files that are refused."""

import json

import pytest
from gate_matrices import gate_matrix

from deltadiff.diffora import GateMatrix, Selection, random_selection
from deltadiff.errors import CheckpointError


def test_gates_and_selection_come_back_from_json(tmp_path):
    gates = gate_matrix({"a": 0.1, "b": 0.9}, {"b": 1 / 3, "c": 2 / 3})
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
    gate_matrix([0.5, 0.5]).save(path)
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
    gate_matrix([0.5, 0.5]).save(path)
    with pytest.raises(CheckpointError, match="deltadiff-selection"):
        Selection.load(path)
