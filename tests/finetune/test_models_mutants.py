"""Model folders with files of any content: `deltadiff finetune` and `merge` run or say why not."""

import json
import random
import shutil
from pathlib import Path

import pytest
from command_mutants import attempt, no_training  # noqa: F401
from mutants import (
    Mutants,
    mutate_json_file,
    mutate_safetensors,
    mutate_tensors,
    mutate_text,
    spoil,
)
from safetensors.torch import load, save

from deltadiff import save_adapter, swap_
from deltadiff.finetune.task_file import write_task
from deltadiff.finetune.tasks.text import TextTask

transformers = pytest.importorskip("transformers")
pytest_plugins = ["tiny_models"]
CASES = 12  # for each seed


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.csv"
    path.write_text("text,label\n" + "great film,fun\ndull film,dull\n" * 4)
    return path


def forge(folder: Path, random_: random.Random) -> str:
    """Change one or two files of a model; returns which, and what one of them holds."""
    told, files = "", sorted(folder.iterdir())
    for path in random_.sample(files, random_.choice([1, 1, 2])):
        told += f" {path.name}"
        if random_.random() < 0.08:
            told += f" {spoil(path, random_)}"
        elif path.suffix == ".json":
            path.write_bytes(mutate_json_file(path.read_bytes(), random_))
            told += f" {path.read_bytes()[:400]!r}"
        elif path.suffix != ".safetensors":
            path.write_bytes(mutate_text(path.read_bytes(), random_))
        elif random_.random() < 0.5:
            path.write_bytes(mutate_safetensors(path.read_bytes(), random_))
        else:
            path.write_bytes(save(mutate_tensors(load(path.read_bytes()), random_)))
    return told


def shard(folder: Path) -> None:
    """Two files of weights and the index that names them."""
    path = folder / "model.safetensors"
    tensors = load(path.read_bytes())
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        (folder / file).write_bytes(save({n: tensors[n] for n in part}, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()


@pytest.mark.check(short=1, long=25)
def test_model_folders(seed, bert, llama, small, tmp_path, tally, one_thread, no_training):  # noqa: F811
    random_ = random.Random(seed)
    mutants = Mutants()
    for number in range(CASES):
        folder, output = tmp_path / f"model{number}", tmp_path / f"output{number}"
        kind = random_.choice(["bert", "llama", "sharded llama"])
        shutil.copytree(bert if kind == "bert" else llama, folder)
        if kind == "sharded llama":
            shard(folder)
        case = f"{kind} {number}:{forge(folder, random_)}"
        words = ["--label-column", "label"] if kind == "bert" else []
        words += ["--device", "cpu", "--heldout", "0.5", "--output", output]
        attempt(mutants, case, ["finetune", folder, small, *words])
    mutants.conclude(tally, "model folders")


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory) -> Path:
    """What `deltadiff finetune` leaves: an adapter, its task and its template."""
    folder = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    swap_(model, r=2)
    save_adapter(model, folder)
    write_task(folder, TextTask(), "{{ messages }}")
    return folder


@pytest.mark.check(short=1, long=20)
def test_merging(seed, llama, adapter, tmp_path, tally, one_thread):
    """Files of the model, of the adapter, and of the task beside it."""
    random_ = random.Random(seed)
    mutants = Mutants()
    for number in range(CASES):
        model, trained = tmp_path / f"model{number}", tmp_path / f"adapter{number}"
        shutil.copytree(llama, model)
        shutil.copytree(adapter, trained)
        case = f"{number}:{forge(random_.choice([model, trained, trained]), random_)}"
        output = tmp_path / f"output{number}"
        attempt(mutants, case, ["merge", model, trained, output])
        mutants.check(case, not list(tmp_path.glob(".*")), "a leftover")
    mutants.conclude(tally, "merging")
