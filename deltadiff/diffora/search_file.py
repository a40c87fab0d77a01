"""The file of a search that `rounds.search` runs: all that it needs to go on bit by bit.

Where several processes search together the file is the first one's: it alone writes and reads, and
sends what it read to the others. They have the same search, but may have random numbers of their
own.
"""

import io
from pathlib import Path

import torch

from ..errors import ArgumentError
from ..files import read_sealed, reading, write_sealed
from ..loop import rng_states, set_rng_states
from ..ranks import Ranks
from .bilevel import Search
from .search_state import fingerprint

FORMAT, VERSION = "deltadiff-search", 1
FILE = "search.pt"


def save_search(path: Path, state: Search, settings: dict) -> None:
    """Write ``state`` and the random generators.

    Args:
        path: the file, which the first process writes.
        settings: plain data, which a search that goes on from the file must have, too.

    Raises:
        OSError: it cannot be written; in all processes.
    """
    ranks = state.ranks
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "search": state.state_dict(),
        **_generators(ranks),
    }
    with ranks.together():
        if ranks.rank == 0:
            blob = io.BytesIO()
            torch.save(contents, blob)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(path, blob.getvalue())


def load_search(path: Path, state: Search, settings: dict) -> None:
    """Put ``state`` and the random generators of all processes where the file has them.

    Of the file, only tensors and plain data are unpickled.

    Raises:
        CheckpointError, ArgumentError: it is missing or garbled, or is that of a search with other
            settings; in all processes, and nothing was changed.
    """
    ranks, accepted = state.ranks, "a search that was saved"
    blob = b""
    with ranks.together(), reading(path, accepted):
        blob = read_sealed(path) if ranks.rank == 0 else b""
    blob = ranks.of_first(blob)
    with ranks.together(), reading(path, accepted):
        saved = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        if (saved["format"], saved["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {saved['format']!r}, version {saved['version']}")
        for name, value in settings.items():
            earlier = saved["settings"][name]
            if (type(earlier), earlier) != (type(value), value):
                raise ArgumentError(name, f"{value!r:.60}", f"{earlier!r:.60}, as before")
        generators = saved
        if "by_process" in saved:
            states = saved["by_process"]
            if len(states) != ranks.size:
                accepted = f"{len(states)}, each of which had random numbers of its own"
                raise ArgumentError("processes", ranks.size, accepted)
            generators = states[ranks.rank]
    before = rng_states()
    try:
        with reading(path, accepted):
            with ranks.together():
                set_rng_states(generators)
            state.load_state_dict(saved["search"])  # the last, for it changes all or nothing
    except BaseException:
        set_rng_states(before)
        raise


def _generators(ranks: Ranks) -> dict[str, object]:
    """The states of the random generators: those of each process where they differ, else one."""
    found = ranks.gather(rng_states())
    differ = len(set(map(fingerprint, found))) > 1
    return {"by_process": found} if differ else found[0]
