"""Checks and launches of lists of tensors that came before are not made again."""

import pytest
import torch

from deltadiff import adamw_step_, delta_update_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.kernels.runtime.launch_cache import Seen, fingerprint
from deltadiff.ops import adamw_step, delta_update

pytest.importorskip("deltadiff._C", exc_type=ImportError)


def test_a_fingerprint_tells_all_that_a_launch_depends_on():
    t = torch.zeros(4, 6)
    others = [
        t.clone(), t[:, :3], t[:3], t.T, t.view(6, 4), t.view(torch.int32), t[None], None,
        torch.empty_like(t, device="meta"),
    ]  # fmt: skip
    seen = {fingerprint([other]) for other in (t, *others)}
    assert len(seen) == len(others) + 1 and None not in seen
    assert fingerprint([t, None]) == fingerprint([t, None]) != fingerprint([None, t])


def test_what_is_no_plain_tensor_has_none():
    class Own(torch.Tensor):
        pass

    assert fingerprint([torch.zeros(2).as_subclass(Own)]) is None
    assert fingerprint([[1.0]]) is None
    assert fingerprint([torch.nn.Parameter(torch.zeros(2))]) is not None


def test_the_last_few_are_kept_and_errors_are_not():
    seen, made = Seen(), []
    for key in [0, 0, 1, None, None]:
        seen.get(key, lambda: made.append(1))
    assert len(made) == 4
    for key in range(2, 2 + Seen.MOST):
        seen.get(key, lambda: None)
    assert seen.get(0, lambda: "anew") == "anew"
    with pytest.raises(ZeroDivisionError):
        seen.get("bad", lambda: 1 / 0)
    assert seen.get("bad", lambda: "good") == "good"


@pytest.fixture
def checks(monkeypatch):
    """How often lists were checked."""
    made = []
    for module in (adamw_step, delta_update):
        name = f"check_{module.__name__.rpartition('.')[2]}"
        check = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, check=check, name=name: made.append(name) or check(*args)
        )
        monkeypatch.setattr(module, "_checked", Seen())
    return made


def adamw_lists():
    return [[torch.ones(3, 8) for _ in range(2)] for _ in range(4)]


def test_adamw_step_checks_the_same_tensors_once(checks):
    lists, steps = adamw_lists(), torch.zeros(2)
    for lr in (0.1, 0.2):
        adamw_step_(*lists, steps, lr=lr)
    assert len(checks) == 1 and steps.tolist() == [2, 2]
    with pytest.raises(ArgumentError, match="lr"):
        adamw_step_(*lists, steps, lr=-1.0)
    lists[1][0] = torch.ones(3, 8)
    adamw_step_(*lists, steps, lr=0.1)
    assert len(checks) == 2
    lists[2][1] = torch.ones(3, 7)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="exp_avgs"):
            adamw_step_(*lists, steps, lr=0.1)
    with pytest.raises(ArgumentError, match="grads"):
        adamw_step_(lists[0], lists[1][:1], *adamw_lists()[2:], steps, lr=0.1)


def test_delta_update_checks_the_same_tensors_once(checks):
    w = [torch.zeros(6, 8) for _ in range(2)]
    factors = [[torch.ones(2, 8)] * 2, [torch.ones(6, 2)] * 2]
    for scale in (1.0, 1.0, 2):
        delta_update_(w, *factors, *factors, scale=scale)
    assert len(checks) == 2 and torch.equal(w[0], w[1]) and (w[0] == 8).all()
    for scale, error in (
        (float("nan"), ArgumentError), (True, ArgumentTypeError), ("1", ArgumentTypeError),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises(error, match="scale"):
                delta_update_(w, *factors, *factors, scale=[1.0, scale])
    with pytest.raises(ArgumentTypeError, match="seed"):
        delta_update_(w, *factors, *factors, scale=1.0, seed=0.0)
