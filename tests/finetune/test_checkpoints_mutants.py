"""Checkpoints that somebody forged, with right checksums: a run goes on or says why not."""

import json
import random
import shutil

import pytest
import torch
from command_mutants import attempt
from damaged_files import damage
from finetune_runs import stop_at
from mutants import Mutants, mutate_json, mutate_state, spoil

from deltadiff.__main__ import main
from deltadiff.errors import Interrupted
from deltadiff.files import sha256_of_file, sha256_of_json
from deltadiff.finetune import run, training
from deltadiff.finetune.checkpoints import CHECKPOINT_FILE, find_checkpoints

pytest_plugins = ["tiny_models"]
CASES = 10  # for each seed


@pytest.fixture(scope="module")
def interrupted(bert, tmp_path_factory):
    """The folder of a run that was stopped after its second step."""
    data = tmp_path_factory.mktemp("data") / "small.csv"
    data.write_text("text,label\n" + "great film,fun\ndull film,dull\n" * 8)
    output = tmp_path_factory.mktemp("run")
    words = ["--label-column", "label", "--device", "cpu", "--steps", "4", "--start-step", "0"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, training, 2)
        assert main(["finetune", bert, str(data), *words, "--output", str(output)]) == 130
    assert find_checkpoints(output)
    return output


def forge(folder, random_: random.Random) -> str:
    """Change a part of a checkpoint, and most often seal it again."""
    path = folder / CHECKPOINT_FILE
    contents = json.loads(path.read_text())
    del contents["checksum"]
    how = random_.choices(("contents", "state", "file", "spoil"), (6, 6, 2, 1))[0]
    if how == "state":
        state = torch.load(folder / "state.pt", weights_only=True)
        torch.save(mutate_state(state, random_), folder / "state.pt")
    elif how == "contents":
        contents = mutate_json(contents, random_)
    else:
        file = folder / random_.choice(list(contents["files"]))
        if how == "spoil":
            return f"{file.name} {spoil(file, random_)}"
        file.write_bytes(damage(file.read_bytes(), random_))
    if isinstance(contents, dict):
        if how != "contents":
            contents["files"] = {name: sha256_of_file(folder / name) for name in contents["files"]}
        contents["checksum"] = sha256_of_json(contents)
    path.write_text(json.dumps(contents))
    return f"{how}: {contents if how == 'contents' else ''!s:.300}"


@pytest.fixture
def training_alone(monkeypatch):
    """Runs end after their training, as by Ctrl-C."""
    train = run.train

    def stop(*args, **options):
        train(*args, **options)
        raise Interrupted("nowhere")

    monkeypatch.setattr(run, "train", stop)


@pytest.mark.check(short=1, long=20)
def test_forged_checkpoints(seed, interrupted, tmp_path, tally, one_thread, training_alone):
    random_ = random.Random(seed)
    mutants = Mutants()
    for number in range(CASES):
        output = tmp_path / str(number)
        shutil.copytree(interrupted, output)
        case = f"case {number}: {forge(find_checkpoints(output)[-1], random_)}"
        attempt(mutants, case, ["finetune", "--resume", output])
    mutants.conclude(tally, "checkpoints")
