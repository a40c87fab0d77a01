"""Which tensors an operation in place can write, by where their elements lie."""

import itertools

import pytest
import torch

from deltadiff import adamw_step_, delta_update_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops.memory import check_memory


def refused(written, read=()):
    named = [(f"w{i}", t) for i, t in enumerate(written)], [("r", t) for t in read]
    try:
        check_memory(*named)
    except ArgumentError as error:
        return error.argument
    return None


@pytest.mark.parametrize("strides", list(itertools.product(range(7), repeat=2)))
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 4), (1, 5), (5, 1)])
def test_a_matrix_that_overlaps_itself_is_told_exactly(shape, strides):
    places = [i * strides[0] + j * strides[1] for i in range(shape[0]) for j in range(shape[1])]
    t = torch.zeros(60).as_strided(shape, strides)
    assert (refused([t]) is not None) == (len(set(places)) < len(places))
    assert refused([], [t]) is None  # it may be read


def test_tensors_between_the_elements_of_each_other_are_apart():
    w = torch.zeros(6, 8)
    assert refused([w[:, :4], w[:, 4:]]) is None
    assert refused([w[:3], w[3:]], [w.new_zeros(3)]) is None
    assert refused([w[:, ::2], w[:, 1::2]]) is None
    assert refused([w[:, :5], w[:, 4:]]) == "w0"
    assert refused([w[:, ::2]], [w[:, 1::2]]) is None
    assert refused([w[2:4]], [w[0], w[3]]) == "w0"
    assert refused([], [w, w, w[0]]) is None
    of_bytes = w.view(torch.int16)
    assert refused([w[0, 1:2], of_bytes[0, :2]]) is None
    assert refused([w[0, 1:2], of_bytes[0, 1:3]]) is not None


def test_an_overlap_is_found_behind_others():
    w = torch.zeros(100)
    assert refused([w[:1], w[2:50], w[3:4], w[60:61]]) == "w1"
    assert refused([w[:1], w[50:60], w[70:]], [w[10:20], w[75:76]]) == "w2"


def test_nothing_lies_nowhere():
    w = torch.zeros(4, 4)
    assert refused([w, w[:0], None], [w[:, :0], None]) is None
    assert refused([w.to("meta")]) == "w0"


def test_columns_of_one_matrix_are_updated_in_one_call():
    both = torch.zeros(6, 16)
    halves, one = [both[:, :8], both[:, 8:]], torch.ones(1, 8)
    column, zero = torch.ones(6, 1), torch.zeros(1, 8)
    delta_update_(halves, [one] * 2, [column] * 2, [zero] * 2, [column] * 2, scale=[1.0, 2.0])
    assert (both[:, :8] == 1).all() and (both[:, 8:] == 2).all()


def test_inference_tensors_are_written_in_inference_mode_alone():
    with torch.inference_mode():
        w, a, b = torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2)
        delta_update_(w, a, b, a, b, scale=1.0)
        p, m = torch.ones(3), [torch.zeros(3), torch.zeros(3)]
        adamw_step_([p], [p.clone()], m[:1], m[1:], torch.zeros(1), lr=0.1)
    before = w.clone(), p.clone()
    with pytest.raises(ArgumentTypeError, match="weight: got an inference tensor"):
        delta_update_(w, a, b, a, b, scale=1.0)
    with pytest.raises(ArgumentTypeError, match="params: got an inference tensor"):
        adamw_step_([p], [p.clone()], m[:1], m[1:], torch.zeros(1), lr=0.1)
    assert torch.equal(w, before[0]) and torch.equal(p, before[1])


def test_a_call_that_is_known_is_checked_no_more(monkeypatch):
    w, a, b = torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2)
    delta_update_(w, a, b, a, b, scale=1.0)
    monkeypatch.setattr("deltadiff.ops.delta_update.check_memory", lambda *_: pytest.fail())
    delta_update_(w, a, b, a, b, scale=1.0)
