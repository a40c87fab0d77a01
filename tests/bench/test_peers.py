"""Updates of W in plain PyTorch, beside deltadiff's."""

import torch

from deltadiff.bench.peers import addmm_update, naive_update
from deltadiff.ops.delta_update import delta_update_


def test_weight_updates_compute_the_same(randint):
    weight, a, b = randint(24, 16), randint(4, 16), randint(24, 4)
    da, db = randint(4, 16), randint(24, 4)
    expected = delta_update_(weight.clone(), a, b, da, db, scale=0.5)
    for update in (naive_update, addmm_update):
        w = weight.clone()
        update([w], [(b, a)], [(b - db, a - da)], 0.5)
        assert torch.equal(w, expected)
