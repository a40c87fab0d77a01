"""transformers' Trainer in two processes, by DDP and FSDP2, with accumulation; and resumed."""

import pytest
import torch
from accelerate_runs import STATE_TYPES, allow_fsdp_on_cpu
from ranks import run_ranks, short_form
from trainer_runs import KINDS, make, trainer_of

from deltadiff import DeltaLoRA
from deltadiff.ranks import whole

METHODS = {
    "LoRA": (torch.float32, {"update_ratio": 0.0}),
    "factored": (torch.float32, {"w_update": "factored"}),
    "in place": (torch.float32, {"w_update": "inplace"}),
    "remainder": (torch.bfloat16, {"w_update": "inplace", "rounding": "remainder"}),
}
PARALLEL = ["DDP", *STATE_TYPES]
pytestmark = pytest.mark.filterwarnings("ignore:PEFT's adapter files", "ignore:the state of a")


def new_trainer(method, kind, folder, parallel=None, **options):
    dtype, how = METHODS[method]
    model = make(kind, dtype)
    optimizer = DeltaLoRA, {"model": model, "lr": 1e-2, **how}  # FSDP takes no finished one
    if parallel in STATE_TYPES:
        allow_fsdp_on_cpu()
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": parallel}}
    return trainer_of(model, optimizer, folder, 6, **options)


def values(model):
    return [whole(p).float().flatten().tolist() for p in model.parameters()]


def train_and_resume(rank, method, kind, folder, parallel):
    """What six steps give, and the last three of them once more from the checkpoint."""
    found = []
    for checkpoint in (None, f"{folder}/checkpoint-3"):
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
        trainer = new_trainer(method, kind, folder, parallel, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(values(trainer.model))
    return found


CASES = [(method, kind, parallel) for method in METHODS for kind in KINDS for parallel in PARALLEL]
SHORT = (("in place", "plain", "SHARDED_STATE_DICT"),)


@pytest.mark.parametrize("case", short_form(CASES, *SHORT), ids=str)
def test_a_run_and_a_resumed_one(case, tmp_path):
    method, kind, parallel = case
    (first, resumed), other = run_ranks(train_and_resume, method, kind, str(tmp_path), parallel)
    assert [first, resumed] == other == [first] * 2
    alone = new_trainer(method, kind, tmp_path / "alone")
    alone.train()
    for ours, theirs in zip(first, values(alone.model), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=2e-5)
