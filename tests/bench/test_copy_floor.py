"""The floor of the optimizer step: a copy of the bytes that a case has to move."""

import torch

from deltadiff.bench import copy_floor
from deltadiff.bench.delta_update import delta_update_case


def test_the_floor_moves_the_bytes_of_the_case(monkeypatch):
    case = delta_update_case([(24, 16)] * 3, 4, torch.bfloat16, "remainder", False)
    # W and its remainder are read and written; the four factors are read
    assert case.fields["bytes"] == 3 * (2 * 24 * 16 * (2 + 2) + 2 * 4 * 4 * (24 + 16))
    monkeypatch.setattr(copy_floor, "COPY_BYTES", 1000)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, source: copied.append(t.numel()))
    copy_floor.copies(case.fields["bytes"], torch.device("cpu"))()
    assert len(copied) > 1 and 2 * sum(copied) == case.fields["bytes"]
