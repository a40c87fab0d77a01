"""`search`: stage 1 of DiffoRA over data, with progress, saving and resuming.

It is lines 3 to 8 of Algorithm 1: each of V rounds takes one step on the gates with validation data
and then T steps on the low-rank pairs with training data.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..checks import check_int
from ..errors import ArgumentError, Interrupted, NonFiniteLossError
from ..files import as_folder
from ..loop import batch_indices, catch_interrupt
from ..ranks import Ranks
from .bilevel import Search
from .data_split import Split
from .gates import GateMatrix
from .search_file import FILE, load_search, save_search

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

    Where several processes search together (see `Search`), all of them call this with the same
    arguments. Each computes the losses of its part of each batch, so that together they see the
    batches of one process, and all end with the same gates. ``folder`` is the business of the
    first process alone, whose file they all go on from. An error in ``loss`` or ``progress`` ends
    one process, and it is left to the launcher (torchrun) to end the others.

    Args:
        state: the search, new or after any number of steps.
        loss: computes the loss of the examples with these indices, a mean over them; `search` does
            not catch what it raises.
        data: which examples train, and which validate.
        rounds: V, the number of rounds in all; a resumed search may get more than before.
        inner_steps: T, the steps on A and B in each round.
        batch_size: examples in each step, of all processes together: a multiple of their number.
        seed: fixes the order of the examples.
        folder: where the search is saved, as one file, atomically; None saves nothing.
        save_every: rounds between two saves.
        resume: continue the search in ``folder``; the result is the same, bit by bit, as without
            the stop. Another number of processes may go on too, and then the result is the same but
            for rounding.
        progress: called after each round, in each process, with its number, ``rounds``, and the
            last losses that were read from the device, by "valid" and "train" (empty before the
            first). None shows a progress bar in the first process where tqdm is installed, and
            nothing elsewhere.

    Returns:
        The gates.

    Raises:
        ArgumentTypeError, ArgumentError: a value cannot be used, or differs between the processes;
            ``folder`` holds a search although ``resume`` is off; the search to resume has other
            candidates or settings, or random numbers of another number of processes. Nothing was
            changed in any process.
        CheckpointError: the file of the search to resume is missing or garbled.
        NonFiniteLossError: a loss or gradient became inf or NaN, in all processes where it did in
            one; the message names the batch. ``state`` (and ``folder``) hold what was before that
            step.
        Interrupted: Ctrl-C or SIGTERM stopped the search, in the main thread; its value is the path
            of the file that holds it. A signal to one process stops all of them after the same
            step, the next after which they read losses: on a GPU one in ten. In another thread, an
            exception of ``progress`` stops it.
    """
    ranks = state.ranks
    with ranks.together():
        for name, value in (
            ("rounds", rounds),
            ("inner_steps", inner_steps),
            ("batch_size", batch_size),
            ("save_every", save_every),
        ):
            check_int(name, value, 1)
        most = min(len(data.train), len(data.valid))
        if batch_size > most:
            accepted = f"1 to {most}, the smaller part of the data"
            raise ArgumentError("batch_size", batch_size, accepted)
        if batch_size % ranks.size:
            accepted = f"a multiple of {ranks.size}, the number of processes that search together"
            raise ArgumentError("batch_size", batch_size, accepted)
        path = None if folder is None else as_folder("folder", folder) / FILE
        if resume and path is None:
            raise ArgumentError("folder", None, "the folder of the search to resume")
        settings = {
            "inner_steps": inner_steps,
            "batch_size": batch_size,
            "seed": seed,
            "train": list(data.train),
            "valid": list(data.valid),
        }
    others = {"rounds": rounds, "save_every": save_every, "resume": resume, "folder": path}
    ranks.check_alike({**settings, **others, "state": (state.round, state.index)})
    if path is not None and resume:
        load_search(path, state, settings)
    elif path is not None:
        with ranks.together():
            if ranks.rank == 0 and path.exists():
                accepted = "resume=True, or another"
                raise ArgumentError("folder", f"{folder}, which holds a search", accepted)

    def save() -> Path | None:
        """Save the search where there is a folder; returns the path of the file, or None."""
        if path is not None:
            save_search(path, state, settings)
        return path

    def stopped() -> int:
        """The signal that a process got, or 0; the same in all of them."""
        if ranks.size > 1 and not state.log.all_read:
            return 0  # they would have to wait for their devices
        return max(ranks.gather(interrupt[0] if interrupt else 0))

    def batch(part: Sequence[int], seed: int, step: int) -> list[int]:
        """The examples of a step that are this process's part of the batch."""
        whole = batch_indices(len(part), batch_size, seed, step)
        size = batch_size // ranks.size
        return [part[i] for i in whole[ranks.rank * size : (ranks.rank + 1) * size]]

    done = state.round if state.index == inner_steps else max(0, state.round - 1)
    shown = contextlib.nullcontext(progress) if progress else _progress_bar(rounds, done, ranks)
    with catch_interrupt() as interrupt, shown as show:
        try:
            while state.round < rounds or state.index < inner_steps:
                if number := stopped():
                    raise Interrupted(save(), number)
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
def _progress_bar(rounds: int, done: int, ranks: Ranks) -> Iterator[Progress]:
    """A bar of tqdm that starts at ``done``, in the first process; nothing without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or ranks.rank:
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
