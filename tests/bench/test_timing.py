"""How a case is measured: records, turns, and variants that fail."""

import torch

from deltadiff.bench.report import format_table
from deltadiff.bench.timing import Case, Variant, compare

CPU = torch.device("cpu")


def case_of(**calls) -> Case:
    fields = {"op": "x", "mode": "step", "graph": False, "shape": {"M": 1}, "dtype": "float32"}
    return Case(fields, "floor", lambda _: {n: Variant(lambda c=c: c) for n, c in calls.items()})


def fails(error):
    def call():
        raise error

    return call


def test_records_of_a_case():
    slow = torch.randn(200, 200)
    case = case_of(floor=lambda: None, slow=lambda: slow @ slow)
    floor, other = compare(case, CPU, budget_s=0.01)
    assert (floor["variant"], floor["over_floor"]) == ("floor", 1)
    assert other["variant"] == "slow" and other["over_floor"] > 2
    for r in (floor, other):
        assert 0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"]
        assert r["host_ms"] is r["peak_mib"] is r["note"] is None  # there is no GPU


def test_wanted_variants_take_turns_with_the_floor():
    order = []
    case = case_of(**{n: lambda n=n: order.append(n) for n in ("floor", "a", "b")})
    rounds = []

    def repeat(one_round, n):
        order.clear()
        one_round()
        rounds.append(n)

    found = compare(case, CPU, ["b"], repeat=repeat)
    assert [r["variant"] for r in found] == ["floor", "b"] and rounds[0] >= 5
    assert list(dict.fromkeys(order)) == ["floor", "b"]


def test_a_variant_that_fails_costs_the_others_nothing():
    out_of_memory = torch.OutOfMemoryError("tried to allocate")
    case = case_of(floor=lambda: None, big=fails(out_of_memory), bad=fails(KeyError("x")))
    floor, big, bad = compare(case, CPU, budget_s=0.01)
    assert floor["over_floor"] == 1
    assert (big["note"], bad["note"]) == ("out of memory", "KeyError: 'x'")
    assert big["p50_ms"] is big["over_floor"] is bad["p50_ms"] is None
    assert "bad: KeyError: 'x'" in format_table([floor, big, bad])
