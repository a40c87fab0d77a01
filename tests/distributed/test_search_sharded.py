"""DiffoRA under FSDP2: a search of a sharded model finds the gates that one process finds."""

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import make_base, parts_of, shard, train, values
from ranks import run_ranks, short_form
from small_searches import assert_same, snapshot
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltadiff import DeltaLoRA
from deltadiff.diffora import Search, apply_, find_candidates, random_selection, search, split
from deltadiff.errors import ArgumentError, NonFiniteLossError, SwapError
from deltadiff.ranks import is_sharded, plain_kind, whole

F32, BF16 = torch.float32, torch.bfloat16
# Options of `fully_shard`.
WAYS = {
    "plain": {},
    "not resharded": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


ROUNDING = 1e-5  # the parameters move by 3e-2
CASES = [*((way, 2) for way in WAYS), ("plain", 3)]


def new(dtype=F32, sharded=False, **options):
    model = make_base(dtype)
    state = Search(model, r=2, lr=1e-2, gate_lr=1e-1, seed=0, **options)
    if sharded:
        shard(model)
    return state


def loss_by(state, step, rank, factor=1.0, size=2):
    """The loss of a process's part of a batch; without a rank, the mean of those of all parts."""
    parts = parts_of(step, size)

    def loss():
        losses = [
            state.model(input_ids=ids, labels=ids).loss
            for ids in (parts if rank is None else [parts[rank]])
        ]
        return factor * sum(losses) / len(losses)

    return loss


def take_steps(state, rank, rounds=2, size=2):
    for t in range(0, 2 * rounds, 2):
        state.gate_step(loss_by(state, t, rank, size=size))
        state.inner_step(loss_by(state, t + 1, rank, size=size))


def result(state):
    trained = [whole(p).float().flatten().tolist() for p in state.trained.values()]
    gates = [layer.gate.item() for layer in state.layers.values()]
    return [gates, state.logits.flatten().tolist(), state.gate_losses, state.inner_losses, *trained]


def assert_close(found, expected):
    for ours, one in zip(found, expected, strict=True):
        assert ours == pytest.approx(one, rel=0, abs=ROUNDING)


# ------------------------------------------------------------------------- the same search


def searched(rank, way, size):
    """A search with a head, in which activations are computed again."""
    state = new(modules_to_save=["lm_head"])
    state.model.train()
    state.model.gradient_checkpointing_enable({"use_reentrant": False})
    if way is not None:
        shard(state.model, **WAYS[way])
    take_steps(state, rank, size=size)
    assert way is None or all(map(is_sharded, state.trained.values()))
    return result(state)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("case", short_form(CASES, ("plain", 3)))
def test_processes_with_parts_of_the_model_search_as_one(case):
    """Of three processes that share pairs of rank 2, one has nothing of lora_A."""
    way, size = case
    first, *others = run_ranks(searched, way, size, size=size)
    assert all(other == first for other in others)
    assert_close(first, searched(None, None, size))


def in_16_bits(rank):
    """The passes compute in bfloat16, and what FSDP reduces stays float32."""
    found = []
    for dtype, policy in ((BF16, {}), (F32, {"param_dtype": BF16, "reduce_dtype": F32})):
        state = new(dtype)
        shard(state.model, mp_policy=MixedPrecisionPolicy(**policy))
        take_steps(state, rank)
        assert {p.dtype for p in state.trained.values()} == {F32}
        found.append(result(state))
    return found


@pytest.mark.long
def test_16_bits():
    first, second = run_ranks(in_16_bits)
    assert first == second
    state = new(BF16)
    take_steps(state, None)
    for _, logits, *losses in (found[:4] for found in first):
        assert any(logits)
        for ours, one in zip(losses, (state.gate_losses, state.inner_losses), strict=True):
            assert ours == pytest.approx(one, rel=2e-2)


def not_finite(rank):
    """An infinite loss in one process; then a gradient of NaN in what one process has of a head."""
    state = new(sharded=True, modules_to_save=["lm_head"])
    take_steps(state, rank)
    before, told = result(state), []

    def attempt(step, factor):
        with pytest.raises(NonFiniteLossError) as error:
            step(loss_by(state, 7, rank, factor))
        told.append(str(error.value))

    attempt(state.gate_step, torch.inf if rank else 1.0)
    attempt(state.inner_step, torch.inf if rank else 1.0)

    def add_nothing(head, args, out):
        return out + (0.0 * head.weight[-1].sum()).sqrt() * 0.0  # its derivative is 0 times inf

    hook = state.model.lm_head.register_forward_hook(add_nothing)
    attempt(state.inner_step, 1.0)
    hook.remove()
    same = before == result(state)
    take_steps(state, rank, rounds=1)
    return told, same, len(state.inner_losses)


def test_what_is_not_finite_in_one_stops_all():
    first, second = run_ranks(not_finite)
    told, same, count = first
    assert first == second and same and count == 3
    assert told[0].startswith("the loss is inf at the validation batch of round 3")
    assert told[1].startswith("the loss is inf at training batch 2 of round 2")
    assert told[2].startswith("a gradient is not finite")


# -------------------------------------------------------------------- rounds and files

ROUNDS = {"inner_steps": 1, "batch_size": 4, "progress": lambda *_: None}
EXAMPLES = torch.cat([parts_of(i, 1)[0] for i in range(3)])


def run_rounds(sharded, rounds, **files):
    state = new(sharded=sharded)

    def loss(indices):
        return state.model(input_ids=EXAMPLES[indices], labels=EXAMPLES[indices]).loss

    search(state, loss, split(len(EXAMPLES)), rounds=rounds, **ROUNDS, **files)
    return result(state)


def rounds_of_parts(rank, folder, other):
    """A search as it ends; one that was stopped; and one that goes on from that of one process."""
    ended = run_rounds(True, 3)
    run_rounds(True, 2, folder=folder)
    return [
        ended, run_rounds(True, 3, folder=folder, resume=True),
        run_rounds(True, 3, folder=other, resume=True),
    ]  # fmt: skip


def test_rounds_go_on_bit_by_bit_and_on_other_numbers_of_processes(tmp_path):
    ours, alone = tmp_path / "ours", tmp_path / "alone"
    run_rounds(False, 2, folder=alone)
    first, second = run_ranks(rounds_of_parts, ours, alone)
    ended, resumed, taken_over = first
    assert first == second and ended == resumed
    expected = run_rounds(False, 3)
    assert_close(ended, expected)
    assert_close(taken_over, expected)
    assert_close(run_rounds(False, 4, folder=ours, resume=True), run_rounds(False, 4))


# ------------------------------------------------------------------------ after the search


def closed(rank):
    """What is left of the search, and that the model is the base model again."""
    state, base = new(sharded=True, modules_to_save=["lm_head"]), make_base(F32)
    kinds = [type(m) for m in base.modules()]
    model = state.model
    take_steps(state, rank)
    model(input_ids=parts_of(9, 2)[rank])  # which leaves some parameters whole
    gates, head = state.gates(), whole(state.heads["lm_head.weight"])
    state.close()
    assert state.gates() == gates and torch.equal(state.heads["lm_head.weight"], head)
    assert values(model) == values(base) and not torch.equal(head, base.lm_head.weight)
    assert all(p.requires_grad and is_sharded(p) for p in model.parameters())
    assert [*map(plain_kind, model.modules())] == kinds
    for call in (state.close, state.state_dict, lambda: state.gate_step(None)):
        with pytest.raises(SwapError, match="closed"):
            call()
    return warm(state)


def warm(state):
    """A model in which the selected pairs start with those of a search."""
    model = make_base(F32)
    selection = state.gates().discretise(0.5)
    apply_(model, selection, r=2, share=False, warm_start=state, modules_to_save=["lm_head"])
    return [p.detach().flatten().tolist() for p in model.parameters() if p.requires_grad]


def test_a_closed_search_leaves_the_base_model_and_starts_the_second_stage():
    first, second = run_ranks(closed)
    assert first == second
    state = new(modules_to_save=["lm_head"])
    take_steps(state, None)
    state.close()
    assert_close(first, warm(state))


def second_stage(rank, units):
    """DiffoRA's second stage with shared pairs; without a rank, of a whole model."""
    model = make_base(F32)
    selection = random_selection(find_candidates(model), 0.5, seed=0)
    apply_(model, selection, r=4, share_r=2, seed=0)
    if units == "blocks in one call":
        fully_shard([*model.model.layers])
    if units == "blocks":
        shard(model)
    elif units != "none":
        fully_shard(model)
    optimizer = DeltaLoRA(model, lr=5e-3)
    train(model, optimizer, rank)
    return values(model)


@pytest.mark.parametrize("units", short_form(["model", "blocks in one call"]))
def test_layers_that_share_a_pair_train_in_one_unit(units):
    first, second = run_ranks(second_stage, units)
    assert first == second == second_stage(None, "none")


# -------------------------------------------------------------------------------- orders


def wrong_orders(rank):
    told = []

    def refused(call, kind=SwapError):
        with pytest.raises(kind) as error:
            call()
        told.append(str(error.value))

    selection = random_selection(find_candidates(make_base(F32)), 0.5)
    model = shard(make_base(F32))
    refused(lambda: Search(model, r=2))
    refused(lambda: apply_(model, selection))
    refused(lambda: second_stage(rank, "blocks"))
    refused(lambda: Search(DistributedDataParallel(make_base(F32)), r=2))
    state = new()
    state.gate_step(loss_by(state, 0, rank))
    state.inner_step(loss_by(state, 1, rank))
    before = snapshot(state)
    shard(state.model)
    for call in (
        lambda: state.inner_step(loss_by(state, 2, rank)), state.state_dict, state.close,
    ):  # fmt: skip
        refused(call)
    assert_same(snapshot(state), before)
    state = new()
    for layer in state.layers.values():
        fully_shard(layer)
    for _ in range(2):
        refused(lambda: state.gate_step(loss_by(state, 0, rank)))
    pairs = [dist.new_group([0]), dist.new_group([1])]
    state = new(process_group=pairs[rank])
    shard(state.model)
    refused(lambda: state.gate_step(loss_by(state, 0, rank)), ArgumentError)
    return told


def test_wrong_orders_are_refused_in_words():
    first, second = run_ranks(wrong_orders)
    words = [
        "sharded before `Search`; accepted: `Search`, then `fully_shard`, then the steps",
        "sharded before `apply_`; accepted: `apply_`, then `fully_shard`, then the optimizer",
        "split the shared pair of 'self_attn.k_proj'; accepted: one unit around all layers",
        "DistributedDataParallel; accepted: the model inside of it",
        *["after steps of the search; accepted: `Search`, then `fully_shard`, then the steps"] * 3,
        *["on which `fully_shard` was called itself; accepted: a unit around it"] * 2,
        "of a model that is sharded over [0, 1]",
    ]
    for text, also, expected in zip(first, second, words, strict=True):
        assert expected in text and expected in also
