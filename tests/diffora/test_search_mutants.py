"""Whatever a forged search.pt holds, a search goes on from it, or is refused unchanged."""

import io
import random

import pytest
import torch
from damaged_files import damage
from mutants import Mutants, mutate_state, spoil
from small_searches import assert_same, batch, snapshot, squares, stack

from deltadiff.diffora import Search, search, split
from deltadiff.errors import ArgumentError
from deltadiff.files import read_sealed, write_sealed

CASES = 20  # for each seed
HOW = {"rounds": 2, "inner_steps": 2, "batch_size": 2, "save_every": 1}


def run(folder, **more) -> Search:
    model = stack("ab", "ab")
    state = Search(model, r=2, seed=0, lr=1e-2)

    def loss(indices: list[int]) -> torch.Tensor:
        return squares(model, batch(indices[0]))

    before, generator = snapshot(state), torch.get_rng_state()
    try:
        search(state, loss, split(12, 0.5), folder=folder, **HOW | more)
    except ArgumentError:
        assert_same(snapshot(state), before)
        assert torch.equal(torch.get_rng_state(), generator)
        raise
    return state


@pytest.mark.check(short=2, long=40)
def test_states_of_a_search(seed, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    path = tmp_path / "search.pt"
    run(tmp_path, progress=lambda *_: None)
    right = read_sealed(path)
    state = torch.load(io.BytesIO(right), weights_only=True)
    for number in range(CASES):
        path.unlink(missing_ok=True)
        how = random_.choices(("state", "bytes", "spoil"), (12, 4, 1))[0]
        if how == "state":
            torch.save(mutate_state(state, random_), path)
        else:
            write_sealed(path, damage(right, random_))
        what = spoil(path, random_) if how == "spoil" else how
        mutants.attempt(
            f"case {number}: {what}",
            lambda: run(tmp_path, progress=lambda *_: None, rounds=3, resume=True),
        )
        if path.is_dir():
            path.rmdir()
    mutants.conclude(tally, "states of a search")
