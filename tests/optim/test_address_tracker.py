"""`AddressTracker`, in Python and in C++."""

import pytest
import torch
from torch import nn

from deltadiff.optim.address_tracker import (
    ALIGNED,
    ANY,
    GRADS,
    MOVED,
    AddressTracker,
    track_addresses,
)


@pytest.mark.parametrize("make", [AddressTracker, track_addresses], ids=["python", "cpp"])
def test_what_moved_is_found_and_what_was_written_is_told(make):
    params = [nn.Parameter(torch.randn(4, 8)) for _ in range(3)]
    weights = [nn.Parameter(torch.randn(4, 4), requires_grad=False)]
    tracker = make(params, weights, [None] * 3)
    assert tracker.look() == ALIGNED and not tracker.grads().any()
    params[1].grad = torch.randn(4, 8)
    assert tracker.look() == GRADS | ANY | ALIGNED
    assert tracker.grads().tolist() == [0, params[1].grad.data_ptr(), 0]
    assert tracker.look() == ANY | ALIGNED
    versions = [p._version for p in (*params, *weights)]
    tracker.wrote(False)
    tracker.wrote(True)
    written = [p._version - v for p, v in zip((*params, *weights), versions, strict=True)]
    assert written == [0, 2, 0, 1]
    params[1].grad = torch.randn(33)[1:].view(4, 8)
    assert tracker.look() == GRADS | ANY
    params[1].grad = torch.randn(8, 4).T
    assert tracker.look() & (GRADS | ANY)
    assert tracker.grads()[1] != params[1].grad.data_ptr()
    params[1].grad = None
    assert tracker.look() == GRADS | ALIGNED
    weights[0].data = weights[0].data.clone()
    assert tracker.look() == MOVED | ALIGNED
