"""What the package `datasets` reads: the same rows from each of its forms."""

import os
import sys

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples
from deltadiff.finetune.data.skipped import Skipped

BOTH = Layout("text", "label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset in every form in which one may lie on a disk."""
    datasets = pytest.importorskip("datasets")
    feather = pytest.importorskip("pyarrow.feather")
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    datasets.disable_progress_bars()
    features = Features(
        {"id": Value("int64"), "text": Value("string"), "label": ClassLabel(names=["bad", "good"])}
    )
    columns = {"id": [1, 2, 3, 4], "text": ["a", None, "c", " d "], "label": [1, 0, -1, 0]}
    rows = Dataset.from_dict(columns, features=features)
    folder = tmp_path_factory.mktemp("data")
    rows.to_parquet(folder / "a.parquet")
    rows.save_to_disk(folder / "saved")
    DatasetDict(train=rows, test=rows.select([3])).save_to_disk(folder / "splits")
    os.rename(folder / "saved" / "data-00000-of-00001.arrow", folder / "b.arrow")
    rows.save_to_disk(folder / "saved")
    plain = rows.cast_column("label", Value("int64")).data.table
    feather.write_feather(plain.slice(0, 1), folder / "c.arrow", compression="uncompressed")
    for split, part in (("train", rows), ("test", rows.select([3]))):
        part.to_parquet(folder / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "tables").mkdir()
    (folder / "tables" / "train.csv").write_text("text,label\na,b,c\n")
    return folder


@pytest.mark.parametrize(
    "name", ["a.parquet", "b.arrow", "saved", "splits:train", "splits/train", "hub:train"]
)
def test_all_forms_give_the_same_examples(name, folder):
    skipped = Skipped()
    found = read_examples(f"{folder}/{name}", BOTH, skipped)
    assert found == [Example("a", "good"), Example("d", "bad")]
    assert [e.place for e in found] == [f"{folder}/{name}, row {n}" for n in (1, 4)]
    assert skipped.counts == {"without text": 1, "without a label": 1}
    assert f"without a label (first: {folder}/{name}, row 3)" in str(skipped)


def test_another_split_and_other_columns(folder):
    assert read_examples(f"{folder}/splits:test", BOTH) == [Example("d", "bad")]
    assert read_examples(f"{folder}/hub:test") == [Example("d")]
    assert read_examples(f"{folder}/c.arrow", Layout("id", "label")) == [Example("1", "1")]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("splits", "with 2 splits; accepted: {folder}/splits:train or {folder}/splits:test"),
        ("hub", "with 2 splits; accepted: {folder}/hub:"),
        ("hub:dev", "hub:dev, of a dataset with 2 splits"),
        ("saved:train", "with 1 splits; accepted: {folder}/saved"),
        ("tables", "tables, a folder of csv files; accepted: one of its files"),
        ("bad.parquet", "bad.parquet: Parquet magic bytes not found"),
        ("empty", "empty: "),
        ("a.csv", "a.csv, which holds no examples"),
    ],
)
def test_what_cannot_be_read(name, told, folder):
    (folder / "bad.parquet").write_text("no parquet, but long enough")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "a.csv").touch()
    with pytest.raises(ArgumentError) as caught:
        read_examples(f"{folder}/{name}", BOTH)
    assert caught.value.argument == "data" and told.format(folder=folder) in str(caught.value)


def test_a_column_that_is_not_there(folder):
    with pytest.raises(ArgumentError, match="label_column: got 'stars', which .*, row 1 lacks"):
        read_examples(f"{folder}/saved", Layout("text", "stars"))


def test_a_format_for_folders(folder):
    assert read_examples(f"{folder}/saved", Layout(format="dataset")) == read_examples(
        f"{folder}/saved"
    )
    for name, format in (("saved", "csv"), ("a.parquet", "dataset")):
        with pytest.raises(ArgumentError, match=f"format: got '{format}' for "):
            read_examples(f"{folder}/{name}", Layout(format=format))


def test_datasets_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("a.parquet", "saved"):
        with pytest.raises(ArgumentError, match=r"an installed datasets: pip install .*finetune"):
            read_examples(f"{folder}/{name}")
