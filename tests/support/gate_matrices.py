"""Matrices of gates that a test writes down in a line."""

from deltadiff.diffora import Candidates, GateMatrix


def gate_matrix(*rows) -> GateMatrix:
    """Gates of layers "l.0", "l.1", ...; a row is a dict by module, or a list for a, b, c, ..."""
    rows = [
        row if isinstance(row, dict) else dict(zip("abcdefghij", row, strict=False)) for row in rows
    ]
    layers = tuple(f"l.{i}" for i in range(len(rows)))
    candidates = Candidates(layers, tuple(map(tuple, rows)))
    return GateMatrix(candidates, tuple(tuple(r.get(t) for t in candidates.types) for r in rows))
