"""What every training loop needs: the order of examples, generator states and interrupts."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch

Handler = Callable[[int, FrameType | None], object] | int


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the examples in an epoch; the step at its end needs that of the next one too."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The positions of the examples in one step, which depend on the arguments alone.

    Args:
        count: how many examples there are.
        batch_size: how many examples a step has.
        seed: each epoch has its own random order, which depends on this.
        step: the number of the step, from 0. Steps go on across the end of an epoch.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(count, seed, p // count)[p % count] for p in positions]


# Steps after which the losses are read from a GPU. Each read waits until the GPU is done.
LOSS_SYNC_INTERVAL = 10


@contextlib.contextmanager
def catch_interrupt() -> Iterator[list[int]]:
    """A list that gets an entry with the first Ctrl-C or SIGTERM; a second one ends the process.

    Only the main thread can catch signals. In any other the list stays empty, and a signal does
    what it did before.
    """
    received: list[int] = []
    earlier: dict[int, Handler] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else earlier[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is None:  # not set from Python, which could not put it back
                continue
            try:
                signal.signal(number, note)
            except ValueError:  # not in the main thread of the main interpreter
                break
            earlier[number] = handler
        yield received
    finally:
        for caught, handler in earlier.items():
            signal.signal(caught, handler)


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[list[int]]:
    """In this block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that files are cleaned up.

    Gives a list that gets the number of the signal, for the exit code. Only the main thread can
    catch signals; in any other, SIGTERM does what it did before.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        earlier = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread of the main interpreter
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)


def exit_code(received: list[int]) -> int:
    """That of a process which a signal stopped: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (received[0] if received else signal.SIGINT)


def rng_states() -> dict[str, object]:
    """The states of the random generators of the CPU and all GPUs, as entries of a checkpoint."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_states(state: dict) -> None:
    """Put the generators back into the states that `rng_states` returned."""
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
