"""The cases of a comparison: methods, seeds and sweeps."""

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.compare.cases import SWEEPS, cases


@pytest.mark.parametrize(
    ("sweep", "methods", "values"),
    [
        ("lambda", {"delta-lora", "lora-alpha-control"}, [0, 1, 2, 3, 4, 5]),
        ("k", {"delta-lora"}, [0, 1, 2, 3, 4, 5]),
        ("ratio", {"diffora", "diffora-random"}, [0.2, 0.4, 0.5, 0.7, 0.9]),
        ("sharing", {"diffora"}, [0, 2]),
    ],
)
def test_the_cases_of_a_sweep(sweep, methods, values, tmp_path):
    given = {"model": "m", "data": "d", "steps": 6}
    found = cases(given, tmp_path, [], 2, [sweep])
    assert {case.settings.method for case in found} == methods
    assert sorted({case.x for case in found}) == values
    assert len(found) == len(values) * len(methods) * 2
    assert len({case.folder for case in found}) == len(found)
    field = SWEEPS[sweep].field
    assert all(getattr(case.settings, field) == case.x for case in found)


def test_k_is_swept_as_in_the_paper_where_the_run_is_long_enough(tmp_path):
    given = {"model": "m", "data": "d", "steps": 2000}
    found = cases(given, tmp_path, [], 1, ["k"])
    assert [case.x for case in found] == list(range(0, 1001, 100))


def test_a_preset_is_for_all_methods(tmp_path):
    given = {"model": "m", "data": "d", "preset": "delta-lora/e2e"}
    found = cases(given, tmp_path, ["lora", "full"], 1)
    assert {(case.settings.r, case.settings.epochs, case.settings.num_beams) for case in found} == {
        (4, 5.0, 10)
    }
    with pytest.raises(ArgumentError):
        cases(given | {"preset": "none"}, tmp_path, ["lora"], 1)
