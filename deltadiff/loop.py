"""What every training loop needs: the order of examples, generator states, interrupts."""

import contextlib
import functools
import signal
from collections.abc import Iterator

import torch


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples step number ``step`` trains on: a function of its arguments alone."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(count, seed, p // count)[p % count] for p in positions]


LOSS_SYNC_INTERVAL = 10  # steps between two looks at the loss of a GPU, each of which waits for it


@contextlib.contextmanager
def catch_interrupt() -> Iterator[list]:
    """A list that gets an entry with the first Ctrl-C (or SIGTERM); the second one ends at once."""
    received: list[int] = []
    earlier = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else earlier[number])

    for number in earlier:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def rng_states() -> dict[str, object]:
    """The random generators of the CPU and of all GPUs, as entries of a checkpoint."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_states(state: dict) -> None:
    """Put the generators where `rng_states` found them."""
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
