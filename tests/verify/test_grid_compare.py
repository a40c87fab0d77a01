"""`compare`: values that are not finite must be where eager PyTorch has them."""

import pytest
import torch

from deltadiff.verify.grid.compare import compare
from deltadiff.verify.tolerance import FORWARD, Case

INF, NAN = torch.inf, torch.nan


def compared(ours, eager, **rule):
    case = Case("lora_linear", "float32", "0", "reference", torch.device("cpu"), 0)
    return compare(case, "y", [ours], [eager], [eager.double()], factor=FORWARD, **rule)


@pytest.mark.parametrize("wrong", [-INF, NAN, 1.0])
def test_one_wrong_kind_among_few(wrong):
    eager = torch.tensor([1.0, INF, -INF, NAN])
    assert compared(eager.clone(), eager).ok
    ours = eager.clone()
    ours[1] = wrong
    row = compared(ours, eager)
    assert not row.ok and "1 are" in row.note and "where eager PyTorch has inf" in row.note
    assert compared(ours, eager, exact_kind=False).ok == (wrong != 1.0)


def test_rounding_decides_one_sign_of_hundreds():
    eager = torch.full((400,), INF)
    eager[0] = 1.0
    ours = eager.clone()
    ours[1] = -INF
    assert compared(ours, eager).ok
    ours[2:4] = NAN
    assert not compared(ours, eager).ok


@pytest.mark.parametrize("ours, eager", [(1.0, INF), (INF, 1.0), (NAN, 1.0)])
def test_rounding_makes_no_number_finite(ours, eager):
    theirs = torch.full((4000,), INF)
    theirs[0] = eager
    mine = theirs.clone()
    mine[0] = ours
    assert not compared(mine, theirs).ok
