"""Runs that are killed at random moments: the finished result is that of an undisturbed run.

Nothing is lost, nothing is left over, and files of others stay as they are.
"""

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from finetune_runs import trained_bytes, without_times
from fork_server import ForkServer

from deltadiff import load_adapter, save_adapter, swap_
from deltadiff.finetune.run import can_go_on
from deltadiff.layers.adapter_files.format import read_adapter
from deltadiff.layers.lora_layers import lora_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]

FIXED = ["--label-column", "label", "--device", "cpu", "--lr", "0.01", "--batch-size", "8"]
FIXED += ["--heldout", "0.05", "--r", "4"]
RUN = [*FIXED, "--steps", "10", "--save-every", "1", "--start-step", "2"]
SEARCH = ["--search-rounds", "10", "--inner-steps", "1"]
VARIANTS = {
    "finetune": ["--method", "delta-lora", "--dtype", "bfloat16"],
    "finetune to PEFT": ["--method", "lora", "--adapter-format", "peft", "--lora-dropout", "0.1"],
    "finetune after a search": ["--method", "diffora", *SEARCH],
    "finetune a whole model": ["--method", "full"],
}
OPS = ["finetune", "save_adapter", "merge", *[*VARIANTS][1:], "finetune", "compare"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LEFTOVER = re.compile(r"\..*\.[a-z0-9_]{8}|checkpoint-\d+|search\.pt|\.deltadiff\.lock")
# Names that are near to those that a run writes, and are somebody else's.
FOREIGN = ("notes", ".result.json.swp", ".checkpoint-3.abc", "checkpoint-mine/a", ".out.ABCDEFGH")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


class Runs:
    """The calls of an operation on one folder."""

    def __init__(self, server, op, bert, reviews, adapters, folder):
        self.server, self.op, self.output = server, op, folder / "out"
        self.log, self.adapters = folder.parent / f"{folder.name}.log", adapters
        self.bert, self.reviews = bert, reviews
        folder.mkdir()

    def words(self) -> tuple[str, list]:
        """The call that begins, or that goes on with what a killed one left."""
        place = ["--output", self.output]
        if self.op == "compare":
            words = [self.bert, self.reviews, *FIXED, *place, "--steps", 4, "--seeds", 1]
            return "main", ["compare", *words, "--methods", "lora", "bitfit"]
        if self.op == "merge":
            return "main", ["merge", self.bert, self.adapters[0], self.output]
        if self.op == "save_adapter":
            return "save_adapters", [self.bert, *self.adapters, self.output]
        if can_go_on(self.output):
            return "main", ["finetune", "--resume", self.output]
        words = [self.bert, self.reviews, *RUN, *VARIANTS[self.op], *place]
        return "main", ["finetune", *words]

    def finish(self) -> float:
        """Run undisturbed to the end; returns the seconds."""
        started = time.perf_counter()
        if self.finished():  # it was killed after its last line, and the next call says so
            words = [self.words()[1][0], "--resume", self.output]
            words = self.words()[1] if self.op == "merge" else words
            assert self.call("main", words) == 2
        else:
            assert self.call(*self.words()) == 0, self.told()
        return time.perf_counter() - started

    def finished(self) -> bool:
        if self.op == "merge":
            return self.output.exists()
        return self.op != "compare" and (self.output / "result.json").exists()

    def call(self, name, words) -> int:
        self.server.start(name, words, self.log)
        return self.server.wait()

    def told(self) -> str:
        return self.log.read_text()[-3000:]

    def kill(self, number: int, seconds: float) -> bool:
        """Start, and send a signal after so many seconds; whether it was in time."""
        handle = os.pidfd_open(self.server.start(*self.words(), self.log))
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(handle, number)
        os.close(handle)
        code = self.server.wait()
        # A process that has not set its handlers yet dies of the signal itself.
        assert code in {0, -number, 128 + number}, (code, self.told())
        assert "Traceback" not in self.told() or code == -number, self.told()
        return code != 0

    def add_foreign_files(self) -> None:
        begun = [self.output / name for name in ("settings.json", "runs", "adapter.json")]
        places = [self.output, self.output.parent] if any(p.exists() for p in begun) else []
        for place in [self.output.parent] if self.op == "merge" else places:
            for name in FOREIGN:
                (place / name).parent.mkdir(exist_ok=True)
                (place / name).write_text(name)

    def check_what_is_left(self) -> None:
        for path in self.output.parent.rglob("*"):
            name = str(path.relative_to(self.output.parent)).removeprefix("out/")
            if name in FOREIGN:
                assert path.read_text() == name
            else:
                assert not LEFTOVER.fullmatch(path.name), path
        places = (self.output.parent, self.output)
        found = [sum((place / name).exists() for name in FOREIGN) for place in places]
        assert set(found) <= {0, len(FOREIGN)}

    def result(self) -> object:
        """What must be equal, however often the operation was killed."""
        if self.op == "compare":
            (path,) = self.output.glob("compare-*.json")
            kept = ("method", "metric", "value", "before", "trainable", "note")
            return [{k: r[k] for k in kept} for r in json.loads(path.read_text())]
        if self.op == "merge":
            return {p.name: p.read_bytes() for p in self.output.iterdir()}
        result = json.loads((self.output / "result.json").read_text())
        return trained_bytes(self.output), without_times(result)


@pytest.fixture(scope="module")
def adapters(bert, tmp_path_factory):
    """Two adapters of the same base model."""
    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("one", "other")]
    for seed, folder in enumerate(folders):
        model = transformers.AutoModel.from_pretrained(bert)
        swap_(model, r=4, seed=seed)
        torch.manual_seed(seed)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B)
        save_adapter(model, folder)
    return folders


@pytest.fixture(scope="module")
def start(server, bert, reviews, adapters, tmp_path_factory):
    """start(op): (runs in a new folder, the result of an undisturbed run and its seconds)."""
    undisturbed = {}

    def start(op):
        folder = tmp_path_factory.mktemp("runs")
        if op not in undisturbed and op != "save_adapter":
            runs = Runs(server, op, bert, reviews, adapters, folder / "undisturbed")
            seconds = runs.finish()
            undisturbed[op] = runs.result(), seconds
        return Runs(server, op, bert, reviews, adapters, folder / "killed"), *undisturbed.get(
            op, ()
        )

    return start


@pytest.mark.check(short=3, long=100)
def test_killed_at_a_random_moment(seed, start, bert, adapters, tally):
    op, draw = OPS[seed % len(OPS)], random.Random(seed)
    if op == "save_adapter":
        kills = kill_while_saving(start(op)[0], draw, bert, adapters)
        tally("kills", op, kills)
        return
    runs, wanted, seconds = start(op)
    kills = 0
    while not kills or (draw.random() < 0.6 and not runs.finished()):
        kills += runs.kill(draw.choice(SIGNALS), draw.uniform(0, seconds))
        if not kills:  # it came to its end before
            shutil.rmtree(runs.output)
        runs.add_foreign_files()
    runs.finish()
    same = runs.result() == wanted
    tally("kills", op.partition(" ")[0], kills, failures=not same)
    assert same, runs.told()
    runs.check_what_is_left()


def kill_while_saving(runs, draw, bert, adapters) -> int:
    """Kill a process that saves two adapters in turn; each time one of them is there, whole."""
    wanted = [read_adapter(folder)[1] for folder in adapters]
    kills = 3
    for _ in range(kills):
        assert runs.kill(signal.SIGKILL, draw.uniform(0.2, 0.8))
        if (runs.output / "adapter.json").exists():
            found = read_adapter(runs.output)[1]
            same = [all(torch.equal(t, one[n]) for n, t in found.items()) for one in wanted]
            assert any(same)
        runs.add_foreign_files()
    model = transformers.AutoModel.from_pretrained(bert)
    load_adapter(model, adapters[0])
    save_adapter(model, runs.output)
    runs.check_what_is_left()
    assert len(list(runs.output.glob("adapter*"))) == 2
    return kills


def workers_of(parent: int) -> list[int]:
    """The processes that train for a comparison."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = path.read_text().rpartition(") ")
            words = path.with_name("cmdline").read_bytes()
            if int(rest.split()[1]) == parent and b"spawn_main" in words:
                found.append(int(path.parent.name))
    return found


@pytest.mark.check(short=1, long=4)
def test_the_workers_of_a_comparison_end_with_it(seed, server, bert, reviews, tmp_path, tally):
    number = (signal.SIGKILL, signal.SIGTERM)[seed % 2]
    words = ["compare", bert, reviews, *FIXED, "--steps", 10**6, "--jobs", 2, "--seeds", 1]
    words += ["--methods", "bitfit", "--output", tmp_path / "out"]
    parent = os.pidfd_open(server.start("main", words, tmp_path / "log"))
    while not (tmp_path / "out" / "runs" / "bitfit-seed0" / "settings.json").exists():
        assert not select.select([parent], [], [], 0.02)[0], (tmp_path / "log").read_text()
    (worker,) = [os.pidfd_open(pid) for pid in workers_of(server.child)]
    signal.pidfd_send_signal(parent, number)
    ended = select.select([worker], [], [], 60)[0]  # readable: the process has ended
    if not ended:
        signal.pidfd_send_signal(worker, signal.SIGKILL)
    tally("kills", "compare --jobs", 1, failures=not ended)
    assert ended and server.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in (tmp_path / "log").read_text()
