"""Comparisons of methods on a tiny model, for the tests of `deltadiff compare`."""

import json

from deltadiff.__main__ import main

FIXED = ["--label-column", "label", "--device", "cpu", "--steps", "6", "--lr", "0.01"]


def compare(model, data, output, *words) -> int:
    """The exit code of `deltadiff compare`."""
    return main(["compare", model, data, "--output", str(output), *FIXED, *map(str, words)])


def load(output) -> list[dict]:
    """The records of a comparison."""
    (path,) = output.glob("compare-*.json")
    return json.loads(path.read_text())
