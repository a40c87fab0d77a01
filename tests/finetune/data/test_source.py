"""How a file is decoded."""

import gzip
import lzma

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples

TEXT = "text,label\nune été,x\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [None, gzip.compress, lzma.compress])
def test_the_byte_order_mark_tells_the_encoding(encoding, pack, tmp_path):
    blob = TEXT.encode(encoding)
    path = tmp_path / {None: "a.csv", gzip.compress: "a.csv.gz", lzma.compress: "a.csv.xz"}[pack]
    path.write_bytes(pack(blob) if pack else blob)
    assert read_examples(str(path), Layout("text", "label")) == [Example("une été", "x")]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "UTF8"])
def test_an_encoding_is_given(encoding, tmp_path):
    (tmp_path / "a.csv").write_bytes(TEXT.encode(encoding))
    layout = Layout("text", "label", encoding=encoding)
    assert read_examples(str(tmp_path / "a.csv"), layout) == [Example("une été", "x")]


def test_bytes_that_are_not_utf_8_have_a_line_and_a_character(tmp_path):
    (tmp_path / "a.csv").write_bytes(TEXT.encode("cp1252"))
    with pytest.raises(ArgumentError) as caught:
        read_examples(str(tmp_path / "a.csv"))
    told = "a.csv, line 2, character 5: 0xe9, which is not utf-8; accepted: text in one encoding; "
    assert f"{told}--encoding" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-9", "base64", "a\0b", ""])
def test_no_encoding_of_text(encoding, tmp_path):
    (tmp_path / "a.csv").write_text(TEXT)
    with pytest.raises(ArgumentError, match="encoding: got"):
        read_examples(str(tmp_path / "a.csv"), Layout(encoding=encoding))
