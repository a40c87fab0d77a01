"""The split of the training examples for stage 1 of DiffoRA."""

import pytest

from deltadiff.diffora import Split, split
from deltadiff.errors import ArgumentError, ArgumentTypeError


def test_a_split_takes_a_random_part_once():
    data = split(100, share=0.6, valid_share=0.25, seed=3)
    assert (len(data.train), len(data.valid)) == (45, 15)
    assert len(set(data.train + data.valid)) == 60 and set(data.train + data.valid) < set(
        range(100)
    )
    assert data == split(100, share=0.6, valid_share=0.25, seed=3)
    assert data != split(100, share=0.6, valid_share=0.25, seed=4)
    assert len(split(10, share=0.7).train) + len(split(10, share=0.7).valid) == 7
    assert sorted(split(10).train + split(10).valid) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n": 0}, ArgumentError, "n: got 0"),
        ({"n": 2.5}, ArgumentTypeError, "n: got 2.5"),
        ({"n": 10, "share": 0.0}, ArgumentError, "share: got 0.0"),
        ({"n": 10, "share": 1.5}, ArgumentError, "share: got 1.5"),
        ({"n": 10, "share": float("nan")}, ArgumentError, "share"),
        ({"n": 10, "valid_share": 1.0}, ArgumentError, "valid_share: got 1.0"),
        ({"n": 10, "valid_share": 0}, ArgumentError, "valid_share: got 0"),
        ({"n": 1}, ArgumentError, "at least one to train and one to validate"),
        ({"n": 100, "share": 0.02, "valid_share": 0.1}, ArgumentError, "0.1 of 2 examples"),
    ],
)
def test_shares_that_leave_nothing(arguments, error, words):
    with pytest.raises(error, match=words):
        split(**arguments)


def test_splits_made_by_hand_are_checked():
    with pytest.raises(ArgumentError, match="train: got no examples"):
        Split((), (1,))
    with pytest.raises(ArgumentError, match="valid: got no examples"):
        Split((1,), ())
    with pytest.raises(ArgumentError, match="2 examples in both parts, the first is 3"):
        Split((1, 3, 5), (5, 3))
