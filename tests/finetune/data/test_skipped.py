"""Counts of what was left out."""

from deltadiff.finetune.data.skipped import Skipped


def test_reasons_are_counted_with_their_first_place():
    one, other = Skipped(), Skipped()
    assert not one and str(one) == ""
    one.add("blank", "a.csv, line 3")
    one.add("blank", "a.csv, line 5")
    other.add("blank", "b.csv, line 1")
    other.add("without text", "b.csv, line 2")
    both = one + other
    assert both and both.counts == {"blank": 3, "without text": 1}
    assert str(both) == "3 blank (first: a.csv, line 3), 1 without text (first: b.csv, line 2)"
    assert one.counts == {"blank": 2}
