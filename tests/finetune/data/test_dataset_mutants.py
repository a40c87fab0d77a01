"""Damaged files of parquet, Arrow and saved datasets are read, or one error says what is wrong."""

import random
import shutil

import pytest
from damaged_files import damage
from mutants import Mutants, mutate_json_file, spoil

from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples

CASES = 10  # for each seed


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A dataset in the forms in which one may lie on a disk."""
    datasets = pytest.importorskip("datasets")
    feather = pytest.importorskip("pyarrow.feather")
    from datasets import ClassLabel, Dataset, Features, Value

    datasets.disable_progress_bars()
    kinds = {"text": Value("string"), "label": ClassLabel(names=["bad", "good"])}
    rows = {"text": ["a", None, "c"], "label": [1, 0, -1]}
    rows = Dataset.from_dict(rows, features=Features(kinds))
    folder = tmp_path_factory.mktemp("data")
    rows.to_parquet(folder / "a.parquet")
    rows.save_to_disk(folder / "saved")
    plain = rows.cast_column("label", Value("int64")).data.table
    feather.write_feather(plain, folder / "b.arrow", compression="uncompressed")
    return folder


@pytest.mark.check(short=1, long=25)
def test_datasets(seed, right, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    for number in range(CASES):
        folder = tmp_path / str(number)
        shutil.copytree(right, folder)
        name = random_.choice(["a.parquet", "b.arrow", "saved"])
        path = folder / name
        if name == "saved":
            path = random_.choice(sorted(path.iterdir()))
        blob = path.read_bytes()
        mutate = mutate_json_file if path.suffix == ".json" else damage
        path.write_bytes(mutate(blob, random_))
        what = spoil(path, random_) if random_.random() < 0.1 else ""
        mutants.attempt(
            f"case {number}: {path.relative_to(folder)} {what}",
            lambda p=folder / name: read_examples(str(p), Layout(label="label")),
        )
    mutants.conclude(tally, "datasets")
