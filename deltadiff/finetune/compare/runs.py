"""The runs of a comparison, and the flat records of what they measured.

A run whose records are there is not run again, so an interrupted comparison goes on when the same
command is given again.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from ...devices import environment, free_memory
from ...errors import ArgumentError, Interrupted, NonFiniteLossError
from ...files import read_sealed_json, write_sealed_json
from ..inputs import device_of
from ..run import RESULT_FILE, can_go_on, finetune
from ..run_inputs import SETTINGS_FILE
from ..settings import Settings
from .cases import Case

RECORDS_FILE = "records.json"
DIVERGED = "diverged"  # how the note of a run begins whose loss was not finite
WHERE = ("output", "device", "save_every")  # settings that say where or how, not what


@dataclasses.dataclass(frozen=True)
class Run:
    """What a case left: its flat records, and what its result.json holds, None without one."""

    records: list[dict]
    result: dict | None

    @property
    def not_finite(self) -> bool:
        """Whether its loss, or an answer after its training, was inf or NaN."""
        note = self.records[0]["note"] or ""
        left_out = self.result["metrics_left_out"] if self.result else {}
        return note.startswith(DIVERGED) or "answers" in left_out


def read_run(case: Case, found: list[dict]) -> Run:
    """The run of a case whose records are ``found``."""
    return Run(found, read_if_there(case.folder / RESULT_FILE))


def run_case(case: Case, task: str, alone: bool) -> list[dict]:
    """The records of a case, from an earlier run of it or from a new one.

    ``alone`` says that no other run goes on beside it, so that its time means something.

    Raises:
        ArgumentError: the folder holds a run with other settings.
        Interrupted, KeyboardInterrupt: the run was stopped; the same call goes on with it.
    """
    folder, settings = case.folder, case.settings
    _check_same(settings, folder)
    earlier = read_if_there(folder / RECORDS_FILE)
    if earlier is not None:
        return earlier["records"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    device = device_of(settings)
    # There may be a result without records, where a kill came between the two.
    result, note, final = read_if_there(folder / RESULT_FILE), None, True
    if result is None:
        result, note, final = _run(case, alone)
    free_memory(device)
    found = records(case, task, result, note, _where(device, torch.get_num_threads()), alone)
    if final:
        folder.mkdir(exist_ok=True)
        write_sealed_json(folder / RECORDS_FILE, {"records": found})
    return found


@functools.cache
def _where(device: torch.device, threads: int) -> dict:
    """`environment`, which asks git: once in a process, as the source that runs is the same."""
    return environment(device)


def _run(case: Case, alone: bool) -> tuple[dict | None, str | None, bool]:
    """(result, why there is none, whether the next call need not try again)."""
    folder, settings = case.folder, case.settings
    result, note, final = None, None, True
    with folder.with_name(f"{folder.name}.log").open("a") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                result = finetune(settings, resume=can_go_on(folder), export=False)
            except Interrupted:
                raise
            except NonFiniteLossError as error:
                note = f"{DIVERGED}: {error}"
            except torch.OutOfMemoryError as error:
                note = f"failed: {str(error).splitlines()[0]}"
                final = alone  # memory that other runs take now may be free next time
            except Exception as error:  # one method must not end the others; the log has the rest
                # An error about the method itself says that it cannot run here.
                cannot = isinstance(error, ArgumentError) and error.argument == "method"
                reason = error.given if cannot else f"{type(error).__name__}: {error}"
                note = textwrap.shorten(f"{'cannot run' if cannot else 'failed'}: {reason}", 400)
                final = False  # a package that it lacks may be installed next time
                traceback.print_exc()
    if result is not None and not result["after"]:
        note = textwrap.shorten(f"failed: {'; '.join(result['failed'].values())}", 400)
    return result, note, final


def records(
    case: Case, task: str, result: dict | None, note: str | None, where: dict, alone: bool
) -> list[dict]:
    """One flat record for each metric of a run.

    Without a ``result`` there is one record without a metric, with the ``note`` that says why.
    ``where`` describes the environment, and ``alone`` is that of `run_case`.
    """
    settings = result["settings"] if result else dataclasses.asdict(case.settings)
    head = {"op": "compare", "method": case.settings.method, "task": task}
    head |= {"seed": case.settings.seed, "sweep": case.sweep, "x": case.x}
    head |= {"stage": case.stage} if case.stage else {}
    result, search = result or {}, (result or {}).get("search", {})
    # On a CPU, the peak is that of the process, which is the same for all of its runs.
    known_peak = where["driver"] is not None
    seconds = [result.get("seconds"), search.get("seconds", 0)]
    peaks = [s.get("peak_memory_mib") or 0 for s in (result, search)]
    cost = {
        "trainable": result.get("trainable_parameters"),
        "seconds": round(sum(seconds), 3) if alone and None not in seconds else None,
        "step_ms": round(result["seconds_per_step"] * 1e3, 3) if result and alone else None,
        "peak_mib": round(max(peaks), 1) if result and known_peak else None,
        "share": (result.get("weight_update") or {}).get("share"),
        "note": note,
    }
    tail = {name: Path(settings[name]).name for name in ("model", "data", "heldout")}
    tail |= {k: v for k, v in settings.items() if k not in (*WHERE, *head, *tail)}
    before, after = result.get("before", {}), result.get("after") or {None: None}
    return [
        head | {"metric": name, "value": value, "before": before.get(name)} | cost | tail | where
        for name, value in after.items()
    ]


def _check_same(settings: Settings, folder: Path) -> None:
    """Check that what the folder holds was made with these settings.

    Raises:
        ArgumentError: it was not.
    """
    held, wanted = read_if_there(folder / SETTINGS_FILE) or {}, dataclasses.asdict(settings)
    skipped = (*WHERE, "steps") if settings.epochs else WHERE  # steps follow from epochs
    for name, value in held.items():
        if name not in skipped and wanted.get(name) != value:
            given = f"{folder.parent.parent}, where {name} was {value} and not {wanted.get(name)}"
            raise ArgumentError("output", given, "the settings of that comparison, or a new folder")


def read_if_there(path: Path) -> dict | None:
    """The JSON object in a file of a run; None if there is no file.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_sealed_json(path, "what an earlier run left") if path.exists() else None


class TimeIsUp(Exception):
    """The time limit was reached: the runs at work were finished, and no more were begun."""


class Runner:
    """Runs cases, and gives each with its records, in the order in which they are done.

    ``jobs`` processes work at a time, each with its share of the cores and, if several GPUs are
    visible, on the next GPU. They are started when there is something to run, run one case after
    the other, and end with the block, or with this process, however it ends.
    """

    def __init__(self, task: str, jobs: int = 1, until: float | None = None) -> None:
        """``until``: no run is begun after `time.monotonic` has passed it."""
        self.task, self.jobs, self.until = task, jobs, until
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._pool is None:
            return
        if kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt)):
            for worker in multiprocessing.active_children():
                worker.terminate()  # it saves what it has
        self._pool.shutdown(cancel_futures=True)

    def run(self, todo: Sequence[Case]) -> Iterator[tuple[Case, list[dict]]]:
        """Each case with its records. Cases that have them from earlier come first.

        Raises:
            TimeIsUp: the time was up while there was something left to begin.
        """
        left = []
        for case in todo:
            if (case.folder / RECORDS_FILE).exists():
                yield case, run_case(case, self.task, alone=False)
            else:
                left.append(case)
        yield from self._run_here(left) if self.jobs == 1 else self._run_beside(left)

    def _time_is_up(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    def _run_here(self, todo: Sequence[Case]) -> Iterator[tuple[Case, list[dict]]]:
        for case in todo:
            if self._time_is_up():
                raise TimeIsUp
            yield case, run_case(case, self.task, alone=True)

    def _run_beside(self, todo: Sequence[Case]) -> Iterator[tuple[Case, list[dict]]]:
        waiting, running = list(reversed(todo)), {}
        while waiting or running:
            while waiting and len(running) < self.jobs and not self._time_is_up():
                case = waiting.pop()
                future = self._workers(case).submit(run_case, case, self.task, alone=False)
                running[future] = case
            if not running:
                raise TimeIsUp
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()

    def _workers(self, case: Case) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            places = context.Queue()
            for i in range(self.jobs):
                places.put(i if case.settings.device == "auto" else None)
            threads = max(1, torch.get_num_threads() // self.jobs)
            self._pool = ProcessPoolExecutor(
                self.jobs, context, initializer=_begin_worker, initargs=(places, threads)
            )
        return self._pool


def _begin_worker(places: multiprocessing.Queue, threads: int) -> None:
    """Give a new worker its GPU, if the user named none, and its cores."""
    place = places.get()
    if place is not None:
        os.environ |= one_gpu(place, os.environ)  # CUDA has not been asked for anything yet
    torch.set_num_threads(threads)
    _end_with_parent()


def one_gpu(place: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that lets a worker see one GPU of the visible ones, in turn; {} without any.

    A worker then runs on the first GPU that it sees. The settings of its runs name none, so that
    another worker can go on with them.
    """
    named = environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        [str(i) for i in range(torch.cuda.device_count())]
        if named is None
        else [name for name in named.split(",") if name]
    )
    return {"CUDA_VISIBLE_DEVICES": visible[place % len(visible)]} if len(visible) > 1 else {}


def _end_with_parent() -> None:
    """Let a worker end as soon as the process that started it is dead, also by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # as a kill at this moment, which every file bears

    threading.Thread(target=watch, daemon=True).start()
