"""`search`: stage 1 of DiffoRA over data, and `split`, which parts of the data it takes.

Algorithm 1, lines 3 to 8: in each of V rounds one step on the gates with validation data, then T
steps on the low-rank pairs with training data.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check_int, check_number
from ..errors import ArgumentError, Interrupted, NonFiniteLossError
from ..files import reading, write_bytes
from ..loop import batch_indices, catch_interrupt, rng_states, set_rng_states
from .bilevel import Search
from .gates import GateMatrix

FORMAT, VERSION = "deltadiff-search", 1


FILE = "search.pt"


@dataclass(frozen=True)
class Split:
    """Which examples train A and B, and which the gates.

    Raises:
        ArgumentError: an empty part, or an example in both.
    """

    train: tuple[int, ...]
    valid: tuple[int, ...]

    def __post_init__(self):
        for name, part in (("train", self.train), ("valid", self.valid)):
            if not part:
                raise ArgumentError(name, "no examples", "at least one")
        both = sorted(set(self.train) & set(self.valid))
        if both:
            given = f"{len(both)} examples in both parts, the first is {both[0]}"
            raise ArgumentError("valid", given, "examples that are not in train")


def split(n: int, share: float = 1.0, valid_share: float = 0.5, seed: int = 0) -> Split:
    """A random part of ``n`` training examples, split at random for training and validation.

    Args:
        n: how many training examples there are.
        share: of them that the search takes, in (0, 1].
        valid_share: of those that are for validation, in (0, 1).
        seed: of the choice.

    Raises:
        ArgumentTypeError, ArgumentError: another share, or one that leaves a part empty.
    """
    check_int("n", n, 1)
    if not 0 < check_number("share", share) <= 1:
        raise ArgumentError("share", share, "a share in (0, 1]")
    if not 0 < check_number("valid_share", valid_share) < 1:
        raise ArgumentError("valid_share", valid_share, "a share in (0, 1)")
    taken = int(share * n + 1e-9)
    valid = round(valid_share * taken)
    if not 0 < valid < taken:
        given = f"{valid_share} of {taken} examples, which is {valid}"
        raise ArgumentError("valid_share", given, "at least one to train and one to validate")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(tuple(order[valid:taken]), tuple(order[:valid]))


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
) -> GateMatrix:
    """Run the rounds of stage 1, with a progress bar.

    Args:
        state: the search, new or wherever it is.
        loss: computes the loss of the examples with these indices; what it raises is passed on.
        data: which examples train, which validate.
        rounds: V, in all; a search that was resumed may get more.
        inner_steps: T, steps on A and B a round.
        batch_size: examples a step.
        seed: of the order of the examples.
        folder: where the search is saved, as one file, atomically; None saves nothing.
        save_every: rounds between two saves.
        resume: go on with the search in ``folder``, bit by bit.

    Returns:
        The gates.

    Raises:
        ArgumentTypeError, ArgumentError: values that cannot be used; a folder that holds a search
            although ``resume`` is off; a resumed search over other candidates or settings.
        CheckpointError: ``resume``, and the file is missing or garbled.
        NonFiniteLossError: a loss or gradient became inf or NaN; names the batch. ``state`` (and
            ``folder``) hold what was before it.
        Interrupted: Ctrl-C or SIGTERM; names the file that holds the search.
    """
    from tqdm import tqdm

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
    settings = {
        "inner_steps": inner_steps,
        "batch_size": batch_size,
        "seed": seed,
        "train": list(data.train),
        "valid": list(data.valid),
    }
    path = None if folder is None else Path(folder) / FILE
    if resume:
        _load(path, state, settings)
    elif path is not None and path.exists():
        raise ArgumentError("folder", f"{folder}, which holds a search", "resume=True, or another")

    def save() -> Path | None:
        if path is not None:
            _save(path, state, settings)
        return path

    def batch(part: Sequence[int], seed: int, step: int) -> list[int]:
        return [part[i] for i in batch_indices(len(part), batch_size, seed, step)]

    done = state.round if state.index == inner_steps else max(0, state.round - 1)
    on_terminal = sys.stderr.isatty()
    with (
        catch_interrupt() as interrupt,
        tqdm(
            total=rounds, initial=done, unit="round", desc="search",
            mininterval=0.2 if on_terminal else 15,
        ) as bar,
    ):  # fmt: skip
        try:
            while state.round < rounds or state.index < inner_steps:
                if interrupt:
                    raise Interrupted(save())
                if state.round == 0 or state.index == inner_steps:
                    indices = batch(data.valid, seed + 1, state.round)
                    state.gate_step(lambda indices=indices: loss(indices))
                    continue
                step = (state.round - 1) * inner_steps + state.index
                indices = batch(data.train, seed, step)
                state.inner_step(lambda indices=indices: loss(indices))
                if state.index == inner_steps:
                    _show(bar, state)
                    if state.round % save_every == 0:
                        save()
            state.check()
        except NonFiniteLossError:
            save()
            raise
    save()
    return state.gates()


def _show(bar, state: Search) -> None:
    if state.gate_losses and state.inner_losses:
        last = {"valid": state.gate_losses[-1], "train": state.inner_losses[-1]}
        bar.set_postfix({name: f"{value:.4f}" for name, value in last.items()}, refresh=False)
    bar.update()


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
    write_bytes(path, blob.getvalue())


def _load(path: Path | None, state: Search, settings: dict) -> None:
    """Nothing in the file is unpickled but tensors and plain data."""
    if path is None:
        raise ArgumentError("folder", None, "the folder of the search to resume")
    with reading(path, "a search that was saved"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if (saved["format"], saved["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {saved['format']!r}, version {saved['version']}")
        for name, value in settings.items():
            if saved["settings"][name] != value:
                given = f"{value!r:.60}"
                raise ArgumentError(name, given, f"{saved['settings'][name]!r:.60}, as before")
        state.load_state_dict(saved["search"])
        set_rng_states(saved)
