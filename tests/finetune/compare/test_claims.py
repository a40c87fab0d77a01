"""The page of the papers' claims: its sentences follow from intervals."""

import pytest

from deltadiff.finetune.compare import claims
from deltadiff.finetune.compare.cases import SWEEPS, Arm
from deltadiff.finetune.compare.claims import CLAIMS, HOLDS, OPEN, OPPOSITE, Claim
from deltadiff.finetune.compare.differences import pairs
from deltadiff.finetune.methods.table import METHODS

ALL = [claim for found in CLAIMS.values() for claim in found]
ABOVE = Claim("One is better.", "table 1", lambda r: True)
BELOW = Claim("One is worse.", "table 1", lambda r: True, sign=-1)


def difference(low, high, **more) -> dict:
    """A record of a difference."""
    names = {"method": "diffora", "sweep": None, "x": None, "control": "lora", "control_x": None}
    about = {"op": "compare_difference", "task": "sst2", "metric": "accuracy", "mean": 0.8}
    about |= {"control_mean": 0.7, "diverged": 0, "control_diverged": 0, "trainable": 5.0}
    about |= {"control_trainable": 10.0, "gain": (low + high) / 2, "low": low, "high": high}
    return names | about | more


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.1, 0.2, HOLDS, OPPOSITE),
        (-0.2, -0.1, OPPOSITE, HOLDS),
        (-0.1, 0.2, OPEN, OPEN),
        (0.0, 0.2, OPEN, OPEN),
        (-0.2, 0.0, OPEN, OPEN),
    ],
)
def test_a_verdict_is_where_the_interval_lies(low, high, above, below):
    r = difference(low, high)
    assert (claims.verdict(ABOVE, r), claims.verdict(BELOW, r)) == (above, below)


def test_a_sentence_names_the_tasks_of_each_verdict():
    found = [
        difference(0.1, 0.2), difference(-0.1, 0.2, task="cola"),
        difference(0.1, 0.3, task="e2e", metric="bleu", sweep="ratio", x=0.2, control_x=0.5),
    ]  # fmt: skip
    told = claims.sentence(ABOVE, found)
    assert told == (
        "**Holds** on SST-2 (accuracy) and E2E (BLEU) at ratio 0.2. "
        "**Not decided** on CoLA (accuracy)."
    )
    assert claims.sentence(BELOW, found[:1]) == "**The opposite holds** on SST-2 (accuracy)."
    assert claims.sentence(ABOVE, []) == "**Not measured.**"


def test_fewer_parameters_are_counted():
    claim = Claim("Better with fewer.", "table 1", lambda r: True, with_fewer=True)
    fewer, more = difference(0.1, 0.2), difference(0.1, 0.2, trainable=11.0)
    assert claims.sentence(claim, [fewer]).endswith("were trained on all of these.")
    assert claims.sentence(claim, [fewer, more]).endswith("were trained on some of these.")
    assert claims.sentence(claim, [more]).endswith("were trained on none of these.")


def test_each_claim_is_tested_by_a_difference_that_compare_makes():
    arms = [Arm(method) for method in METHODS]
    for name, sweep in SWEEPS.items():
        arms += [Arm(m, name, x) for m in sweep.methods for x in (sweep.reference, 0.25)]
    records = [
        difference(
            0.1, 0.2, method=one.method, sweep=one.sweep, x=one.x, control=other.method,
            control_x=other.x,
        )
        for one, other in pairs(arms)
    ]  # fmt: skip
    tested = {claim.text: [r for r in records if claim.tested_by(r)] for claim in ALL}
    assert all(tested.values())
    assert len({claim.text for claim in ALL}) == len(ALL)
    for found in tested.values():
        keys = [(r["method"], r["control"], r["sweep"], r["x"], r["control_x"]) for r in found]
        assert len(set(keys)) == len(keys)
    page, summary = claims.page(records), claims.summary(records)
    for claim in ALL:
        assert claim.text in page and claim.text in summary
    assert "Not measured" in claims.page([]) and "not measured" in claims.summary([])
    assert not any(r["sweep"] for found in claims.pictured(records).values() for r in found)


def test_the_control_of_each_method_is_a_method():
    assert {method.control for method in METHODS.values()} <= set(METHODS)


def test_pairs_are_compared_once_and_with_their_control():
    found = list(pairs([Arm(m) for m in ("lora", "lora-alpha-control", "delta-lora", "diffora")]))
    assert (Arm("delta-lora"), Arm("lora-alpha-control")) in found
    assert (Arm("diffora"), Arm("lora")) in found and (
        Arm("lora-alpha-control"),
        Arm("lora"),
    ) in found
    assert (
        len({frozenset(pair) for pair in found}) == len(found) and (Arm("lora"),) * 2 not in found
    )
    swept = [Arm("diffora", "ratio", x) for x in (0.2, 0.5)]
    swept += [Arm("diffora-random", "ratio", x) for x in (0.2, 0.5)]
    assert set(pairs(swept)) == {
        (swept[0], swept[2]), (swept[1], swept[3]), (swept[0], swept[1]), (swept[2], swept[3]),
    }  # fmt: skip
