"""The tally of the long tests: how rows are added up, and what is written."""

import json

import tally as tallies


def test_rows_about_the_same_are_added_up():
    one = tallies.row("mutants", "settings.json", 3, failures=1)
    other = tallies.row("verify", "lora_linear", 5, path="cpp-cpu", worst_ratio=0.25)
    worse = tallies.row("verify", "lora_linear", 2, path="cpp-cpu", worst_ratio=0.5)
    mutants, verified = tallies.merge([other, one, worse, one])
    assert (mutants["cases"], mutants["failures"], mutants["worst_ratio"]) == (6, 2, None)
    assert (verified["cases"], verified["failures"], verified["worst_ratio"]) == (7, 0, 0.5)
    assert tallies.describe(verified) == (
        "verify lora_linear cpp-cpu: 7 cases, 0 failures, worst 0.500 of its limit"
    )


def test_a_new_row_replaces_the_earlier_one_about_the_same(tmp_path):
    tallies.write(
        [tallies.row("kills", "finetune", 9), tallies.row("mutants", "x", 1)], 3, tmp_path
    )
    (path,) = tallies.write([tallies.row("kills", "finetune", 4)], 5, tmp_path)
    kills, mutants = json.loads(path.read_text())
    assert (kills["cases"], kills["seed"]) == (4, 5)
    assert (mutants["cases"], mutants["seed"]) == (1, 3)
    assert {"gpu", "torch", "commit"} <= kills.keys()


def test_a_test_counts_with_its_fixture(tally, request):
    tally("sequences", "DeltaLoRA", 300, failures=0)
    assert (tallies.PROPERTY, tallies.row("sequences", "DeltaLoRA", 300)) in (
        request.node.user_properties
    )
