"""The split of examples into those to train on and those held out."""

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example, split_examples


def test_a_split_keeps_groups_whole():
    examples = [Example(str(i), group=str(i % 40)) for i in range(400)]
    train, held = split_examples(examples, 0.2, seed=3)
    assert {e.group for e in train}.isdisjoint(e.group for e in held)
    assert sorted(train + held, key=lambda e: int(e.text)) == examples
    assert len(held) == 80
    assert split_examples(examples, 0.2, seed=3) == (train, held)
    assert split_examples(examples, 0.2, seed=4) != (train, held)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ArgumentError, match="heldout"):
        split_examples([Example("a"), Example("b")], share, 0)


def test_one_group_cannot_be_split():
    with pytest.raises(ArgumentError, match="some of 1 groups"):
        split_examples([Example("a", group="g"), Example("b", group="g")], 0.5, 0)
