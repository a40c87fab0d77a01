"""What was made for a list of tensors is found again, and only for that list."""

import pytest
import torch

from deltadiff.kernels.runtime.launch_cache import LaunchCache, fingerprint


def test_a_fingerprint_tells_all_that_a_launch_depends_on():
    t = torch.zeros(4, 6)
    others = [
        t.clone(), t[:, :3], t[:3], t.T, t.view(6, 4), t.view(torch.int32), t[None], None,
        torch.empty_like(t, device="meta"),
    ]  # fmt: skip
    found = {fingerprint([other]) for other in (t, *others)}
    assert len(found) == len(others) + 1 and None not in found
    assert fingerprint([t, None]) == fingerprint([t, None]) != fingerprint([None, t])


def test_only_plain_tensors_have_a_fingerprint():
    class Own(torch.Tensor):
        pass

    assert fingerprint([torch.zeros(2).as_subclass(Own)]) is None
    assert fingerprint([[1.0]]) is None
    assert fingerprint([torch.nn.Parameter(torch.zeros(2))]) is not None


def test_the_keys_used_last_are_kept_and_errors_are_not():
    cache, made = LaunchCache(), []
    for key in [0, 0, 1, None, None]:
        cache.get(key, lambda: made.append(1))
    assert len(made) == 4
    for key in range(2, 2 + LaunchCache.CAPACITY):
        cache.get(key, lambda: None)
    assert cache.get(0, lambda: "anew") == "anew"
    with pytest.raises(ZeroDivisionError):
        cache.get("bad", lambda: 1 / 0)
    assert cache.get("bad", lambda: "good") == "good"
