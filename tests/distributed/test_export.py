"""`export_peft` of sharded models: the first process writes what one process would."""

import pytest
from fsdp_runs import make_model, make_peft_model, shard, shard_peft, train
from ranks import run_ranks, short_form

from deltadiff import DeltaLoRA, export_peft

HOW = {
    "LoRA": {"update_ratio": 0.0},
    "in place": {"w_update": "inplace"},
    "factored": {"w_update": "factored"},
}
MODELS = {"own layers": (make_model, shard), "PEFT's": (make_peft_model, shard_peft)}


def run(kind, how, sharding=None):
    make, shard_ = MODELS[kind]
    model = make() if sharding is None else shard_(make(), **sharding)
    return model, DeltaLoRA(model, lr=5e-3, **HOW[how])


def export(rank, kind, how, folder):
    for i, sharding in enumerate(({}, {"reshard_after_forward": False})):
        model, optimizer = run(kind, how, sharding)
        train(model, optimizer, rank)
        report = export_peft(model, f"{folder}/{i}")
        assert report.path.exists()
    return report.ranks


CASES = [(kind, how) for kind in MODELS for how in HOW]


@pytest.mark.parametrize("case", short_form(CASES, ("PEFT's", "in place")), ids=str)
def test_written_by_the_first_process(case, tmp_path):
    kind, how = case
    model, optimizer = run(kind, how)
    train(model, optimizer)
    report = export_peft(model, tmp_path / "alone")
    assert run_ranks(export, kind, how, str(tmp_path)) == [report.ranks] * 2
    files = sorted(p.name for p in (tmp_path / "alone").iterdir())
    for folder in (tmp_path / "0", tmp_path / "1"):
        assert sorted(p.name for p in folder.iterdir()) == files
        for name in files:
            assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
