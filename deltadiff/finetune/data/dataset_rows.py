"""Rows that the package `datasets` reads: parquet, Arrow, and folders of Hugging Face datasets.

CSV is not read so: `datasets` shifts the columns of ragged rows without a word.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping

from ...checks import need_package
from ...errors import ArgumentError, reason
from .rows import used_columns
from .source import Row, Source

# The builders of `datasets` whose result is the same as what the files say.
EXACT_BUILDERS = ("parquet", "arrow")


def parquet_rows(source: Source) -> Iterator[Row]:
    """Rows of a parquet file."""
    return _file_rows(source, "parquet")


def arrow_rows(source: Source) -> Iterator[Row]:
    """Rows of an Arrow file, in the streaming or the random-access format."""
    return _file_rows(source, "arrow")


def folder_rows(source: Source) -> Iterator[Row]:
    """Rows of what ``save_to_disk`` wrote, or of a folder of parquet files as it is on the hub."""
    datasets = need_package("datasets", "finetune", argument="data")
    with _read_by_datasets(source) as cache:
        path = str(source.path)
        if any((source.path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
            splits = found if isinstance(found, datasets.DatasetDict) else {"": found}
        else:
            builder = datasets.load_dataset_builder(path, cache_dir=cache)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in EXACT_BUILDERS:
                given = f"{source.name}, a folder of {kind} files"
                raise ArgumentError("data", given, "one of its files; or a folder of parquet files")
            splits = datasets.load_dataset(path, cache_dir=cache, streaming=True)
        yield from _rows(source, _choose(source, splits))


def _file_rows(source: Source, kind: str) -> Iterator[Row]:
    datasets = need_package("datasets", "finetune", argument="data")
    with _read_by_datasets(source) as cache:
        files = [str(source.path)]
        yield from _rows(
            source,
            datasets.load_dataset(
                kind, data_files=files, split="train", cache_dir=cache, streaming=True
            ),
        )


@contextlib.contextmanager
def _read_by_datasets(source: Source) -> Iterator[str]:
    """A folder for what `datasets` leaves behind; its errors become ones about the source."""
    with tempfile.TemporaryDirectory(prefix="deltadiff-") as cache:
        try:
            yield cache
        except ArgumentError:
            raise
        except Exception as error:  # those of pyarrow, fsspec and datasets have no common base
            accepted = "a parquet or Arrow file, or a folder of a Hugging Face dataset"
            raise ArgumentError("data", f"{source.name}: {reason(error)}", accepted) from error


def _choose(source: Source, splits: Mapping[str, object]):
    """The split that was asked for, or the only one."""
    names = list(splits)
    if source.split is None and len(names) == 1:
        return splits[names[0]]
    if source.split in names:
        return splits[source.split]
    accepted = " or ".join(f"{source.path}:{name}" if name else f"{source.path}" for name in names)
    given = f"{source.name}, of a dataset with {len(names)} splits"
    raise ArgumentError("data", given, accepted)


def _rows(source: Source, table) -> Iterator[Row]:
    """The rows of a table; numbers that stand for named classes become those names."""
    names = table.column_names or list(next(iter(table), {}))
    table = table.select_columns(used_columns(names, source.layout))
    classes = {
        name: feature.names
        for name, feature in (table.features or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }
    for number, cells in enumerate(table, 1):
        for name, known in classes.items():
            value = cells[name]  # -1 is how a test set says that a label is not known
            cells[name] = None if value is None or value < 0 else known[value]
        yield Row(f"{source.name}, row {number}", cells)
