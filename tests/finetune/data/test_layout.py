"""What a user says about a file."""

from deltadiff.finetune.data.layout import Layout, is_column


def test_the_column_none_is_no_column():
    assert is_column("text") and not is_column(None) and not is_column("none")
    assert Layout("text", "none", prompt="p").asked == ["text", "p"]


def test_numbers_say_that_there_is_no_header():
    assert not Layout("3", "1").has_header
    assert Layout("3", "label").has_header and Layout().has_header
