"""`AddressTracker`, in Python and in C++."""

import pytest
import torch
from torch import nn

from deltadiff.optim.address_tracker import (
    ALIGNED,
    ANY,
    GRADS,
    MOVED,
    WRITTEN,
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


@pytest.mark.parametrize("make", [AddressTracker, track_addresses], ids=["python", "cpp"])
def test_writes_beside_the_steps_are_found(make):
    params = [nn.Parameter(torch.randn(4, 8)) for _ in range(2)]
    copies = [params[0].detach().clone(), None]
    tracker = make(params, [], copies)
    for p in params:
        p.grad = torch.randn(4, 8)
    tracker.look()
    tracker.wrote(False)  # a step writes a parameter and its copy
    assert not tracker.look() & WRITTEN
    with torch.no_grad():
        params[1].mul_(2)  # has no copy
    assert not tracker.look() & WRITTEN
    with torch.no_grad():
        params[0].mul_(1)
    assert tracker.look() & WRITTEN and tracker.look() & WRITTEN
    tracker.accept()
    assert not tracker.look() & WRITTEN
    params[0].data.mul_(2)
    assert tracker.look() & WRITTEN
    copies[0].data.copy_(params[0].data)
    assert not tracker.look() & WRITTEN
