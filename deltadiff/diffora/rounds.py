"""`search`: stage 1 of DiffoRA over data, with progress, saving and resuming.

It is lines 3 to 8 of Algorithm 1: each of V rounds takes one step on the gates with validation data
and then T steps on the low-rank pairs with training data.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check_int
from ..errors import ArgumentError, Interrupted, NonFiniteLossError
from ..files import as_folder, read_sealed, reading, write_sealed
from ..loop import batch_indices, catch_interrupt, rng_states, set_rng_states
from .bilevel import Search
from .data_split import Split
from .gates import GateMatrix

FORMAT, VERSION = "deltadiff-search", 1
FILE = "search.pt"

Progress = Callable[[int, int, dict[str, float]], None]


def search(
    state: Search,
    loss: Callable[[list[int]], Tensor],
    data: Split,
    *,
    rounds: int,
    inner_steps: int,
    batch_size: int,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    save_every: int = 10,
    resume: bool = False,
    progress: Progress | None = None,
) -> GateMatrix:
    """Run the rounds of stage 1.

    Args:
        state: the search, new or after any number of steps.
        loss: computes the loss of the examples with these indices; `search` does not catch what it
            raises.
        data: which examples train, and which validate.
        rounds: V, the number of rounds in all; a resumed search may get more than before.
        inner_steps: T, the steps on A and B in each round.
        batch_size: examples in each step.
        seed: fixes the order of the examples.
        folder: where the search is saved, as one file, atomically; None saves nothing.
        save_every: rounds between two saves.
        resume: continue the search in ``folder``; the result is the same, bit by bit, as without
            the stop.
        progress: called after each round with its number, ``rounds``, and the last losses that were
            read from the device, by "valid" and "train" (empty before the first). None shows a
            progress bar where tqdm is installed, and nothing elsewhere.

    Returns:
        The gates.

    Raises:
        ArgumentTypeError, ArgumentError: a value cannot be used; ``folder`` holds a search although
            ``resume`` is off; the search to resume has other candidates or settings; several
            processes search together.
        CheckpointError: the file of the search to resume is missing or garbled.
        NonFiniteLossError: a loss or gradient became inf or NaN; the message names the batch.
            ``state`` (and ``folder``) hold what was before that step.
        Interrupted: Ctrl-C or SIGTERM stopped the search, in the main thread; its value is the path
            of the file that holds it. In another thread, an exception of ``progress`` stops it.
    """
    for name, value in (
        ("rounds", rounds),
        ("inner_steps", inner_steps),
        ("batch_size", batch_size),
        ("save_every", save_every),
    ):
        check_int(name, value, 1)
    most = min(len(data.train), len(data.valid))
    if batch_size > most:
        raise ArgumentError("batch_size", batch_size, f"1 to {most}, the smaller part of the data")
    if state.ranks.size > 1:
        given = f"a search of {state.ranks.size} processes, which would all take the same batches"
        accepted = "one process; or `Search.gate_step` and `inner_step`, with a part of each batch"
        raise ArgumentError("state", given, accepted)
    settings = {
        "inner_steps": inner_steps,
        "batch_size": batch_size,
        "seed": seed,
        "train": list(data.train),
        "valid": list(data.valid),
    }
    path = None if folder is None else as_folder("folder", folder) / FILE
    if resume:
        _load(path, state, settings)
    elif path is not None and path.exists():
        raise ArgumentError("folder", f"{folder}, which holds a search", "resume=True, or another")

    def save() -> Path | None:
        """Save the search where there is a folder; returns the path of the file, or None."""
        if path is not None:
            _save(path, state, settings)
        return path

    def batch(part: Sequence[int], seed: int, step: int) -> list[int]:
        return [part[i] for i in batch_indices(len(part), batch_size, seed, step)]

    done = state.round if state.index == inner_steps else max(0, state.round - 1)
    shown = contextlib.nullcontext(progress) if progress else _progress_bar(rounds, done)
    with catch_interrupt() as interrupt, shown as show:
        try:
            while state.round < rounds or state.index < inner_steps:
                if interrupt:
                    raise Interrupted(save(), interrupt[0])
                if state.round == 0 or state.index == inner_steps:
                    indices = batch(data.valid, seed + 1, state.round)
                    state.gate_step(functools.partial(loss, indices))
                    continue
                step = (state.round - 1) * inner_steps + state.index
                indices = batch(data.train, seed, step)
                state.inner_step(functools.partial(loss, indices))
                if state.index == inner_steps:
                    show(state.round, rounds, _last_losses(state))
                    if state.round % save_every == 0:
                        save()
            state.check()
        except NonFiniteLossError:
            save()
            raise
        saved = save()
        if interrupt:  # in the last step: whoever called this has more to do
            raise Interrupted(saved, interrupt[0])
    return state.gates()


# --------------------------------------------------------------------------- progress


def _last_losses(state: Search) -> dict[str, float]:
    if not (state.gate_losses and state.inner_losses):
        return {}
    return {"valid": state.gate_losses[-1], "train": state.inner_losses[-1]}


@contextlib.contextmanager
def _progress_bar(rounds: int, done: int) -> Iterator[Progress]:
    """A bar of tqdm that starts at ``done``; nothing where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield lambda *_: None
        return
    seconds = 0.2 if sys.stderr.isatty() else 15  # between two updates; a log file gets few
    options = {"unit": "round", "desc": "search", "mininterval": seconds}
    with tqdm(total=rounds, initial=done, **options) as bar:

        def show(number: int, rounds: int, losses: dict[str, float]) -> None:
            if losses:
                text = {name: f"{value:.4f}" for name, value in losses.items()}
                bar.set_postfix(text, refresh=False)
            bar.update()

        yield show


# ------------------------------------------------------------------------ checkpoints


def _save(path: Path, state: Search, settings: dict) -> None:
    blob = io.BytesIO()
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "search": state.state_dict(),
        **rng_states(),
    }
    torch.save(contents, blob)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, blob.getvalue())


def _load(path: Path | None, state: Search, settings: dict) -> None:
    """Put ``state`` and the random generators where the file has them.

    Of the file, only tensors and plain data are unpickled.
    """
    if path is None:
        raise ArgumentError("folder", None, "the folder of the search to resume")
    with reading(path, "a search that was saved"):
        blob = io.BytesIO(read_sealed(path))
        saved = torch.load(blob, map_location="cpu", weights_only=True)
        if (saved["format"], saved["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {saved['format']!r}, version {saved['version']}")
        for name, value in settings.items():
            earlier = saved["settings"][name]
            if (type(earlier), earlier) != (type(value), value):
                raise ArgumentError(name, f"{value!r:.60}", f"{earlier!r:.60}, as before")
        before = rng_states()
        try:
            set_rng_states(saved)
            state.load_state_dict(saved["search"])  # the last, for it changes all or nothing
        except BaseException:
            set_rng_states(before)
            raise
