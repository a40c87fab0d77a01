"""Where DyLoRA's drawn rank holds: in training mode, and nowhere else."""

import copy
import pickle

import peft
import pytest
import torch
from dylora_runs import R, base, data, loss_of, swapped, train
from torch.utils.checkpoint import checkpoint

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.lora_linear import LoraLinear
from deltadiff.optim.dylora import DyLoRA, truncate_


def draw(optimizer, rank):
    while optimizer.rank != rank:
        optimizer.draw()


def at_rank(model, b, scale="alpha/b"):
    """What the model cut to rank b computes, on a copy of it."""
    cut = copy.deepcopy(model)
    for m in lora_layers(cut).values():
        m.gate = None
    truncate_(cut, b, scale=scale)
    return cut(data(0)[0]).detach()


@torch.no_grad()
def evaluated(model):
    before = model.training
    y = model.eval()(data(0)[0])
    model.train(before)
    return y


def from_adapter(model, folder):
    save_adapter(model, folder)
    fresh = base()
    load_adapter(fresh, folder)
    return fresh(data(0)[0])


def from_state(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    fresh = swapped()
    fresh.load_state_dict(torch.load(folder / "model.pt"))
    return fresh(data(0)[0])


def merged(model, folder):
    model = copy.deepcopy(model)
    merge_(model)
    return model(data(0)[0])


USES = {
    "evaluation": lambda model, folder: evaluated(model),
    "evaluation with gradients": lambda model, folder: copy.deepcopy(model).eval()(data(0)[0]),
    "adapter": from_adapter,
    "state": from_state,
    "merge_": merged,
    "deepcopy": lambda model, folder: copy.deepcopy(model)(data(0)[0]),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model))(data(0)[0]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [({}, R, "alpha/b"), ({"r_max": 4}, 4, "alpha/b"), ({"r_max": 4}, 4, "alpha/r")],
)
def test_all_that_is_not_training_has_the_largest_rank(tmp_path, use, options, rank, scale):
    model = swapped()
    optimizer = DyLoRA(model, lr=0.02, scale=scale, **options)
    train(model, optimizer, range(3))
    draw(optimizer, 2)
    loss_of(model, 3).backward()  # as in the middle of a step
    wanted = at_rank(model, rank, scale)
    torch.testing.assert_close(USES[use](model, tmp_path), wanted, atol=1e-12, rtol=0)
    with torch.no_grad():  # and training goes on at the drawn rank
        found = model(data(0)[0])
    torch.testing.assert_close(found, at_rank(model, 2, scale), atol=1e-12, rtol=0)


@pytest.mark.parametrize("use", USES)
def test_truncated_holds_for_all_of_it(tmp_path, use):
    model = swapped()
    optimizer = DyLoRA(model)
    draw(optimizer, 1)
    wanted = at_rank(model, 3)
    with optimizer.truncated(3):
        found = USES[use](model, tmp_path)
        torch.testing.assert_close(model(data(0)[0]), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_truncated_gives_back_what_was_there_before():
    model = swapped()
    optimizer = DyLoRA(model)
    draw(optimizer, 1)
    x, _ = data(0)
    drawn = model(x)
    with pytest.raises(KeyError), optimizer.truncated(4):
        with optimizer.truncated(2):
            torch.testing.assert_close(model(x), at_rank(model, 2), atol=1e-12, rtol=0)
        torch.testing.assert_close(model(x), at_rank(model, 4), atol=1e-12, rtol=0)
        raise KeyError
    assert torch.equal(model(x), drawn)
    torch.testing.assert_close(evaluated(model), at_rank(model, R), atol=1e-12, rtol=0)


def test_an_evaluation_between_forward_and_backward_changes_no_gradient():
    model = swapped()
    optimizer = DyLoRA(model)
    draw(optimizer, 2)
    loss_of(model, 0).backward()
    wanted = [p.grad.clone() for m in lora_layers(model).values() for p in m.adapter]
    optimizer.zero_grad()
    loss = loss_of(model, 0)
    evaluated(model)
    with optimizer.truncated(4):
        evaluated(model)
    loss.backward()
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip(
            [p for m in lora_layers(model).values() for p in m.adapter], wanted, strict=True
        )
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_pass_at_the_same_rank(reentrant):
    model = swapped()
    optimizer = DyLoRA(model)
    draw(optimizer, 2)
    x, y = data(0)
    loss_of(model, 0).backward()
    wanted = [p.grad.clone() for m in lora_layers(model).values() for p in m.adapter]
    optimizer.zero_grad()
    out = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    (out - y).square().mean().backward()
    found = [p.grad for m in lora_layers(model).values() for p in m.adapter]
    assert all(map(torch.equal, found, wanted)) and not found[0][2:].any()


def test_the_drawn_rank_ends_with_its_optimizer():
    model = swapped()
    optimizer = DyLoRA(model)
    draw(optimizer, 1)
    with pytest.raises(ArgumentError, match="the ranks that a DyLoRA optimizer draws"):
        DeltaLoRA(model, update_ratio=0.5)
    del optimizer
    torch.testing.assert_close(model(data(0)[0]), at_rank(model, R), atol=1e-12, rtol=0)
    DeltaLoRA(model, update_ratio=0.5)


def test_steps_that_would_not_train_the_drawn_rank_are_refused():
    model = swapped()
    optimizer = DyLoRA(model)
    before = [p.detach().clone() for p in model.parameters()]
    model.eval()
    optimizer.step()  # without gradients there is nothing to refuse
    loss_of(model, 0).backward()
    with pytest.raises(ArgumentError, match=r"step: got gradients in evaluation mode.*train\(\)"):
        optimizer.step()
    model.train()
    with pytest.raises(ArgumentError, match="inside of `truncated`"), optimizer.truncated(2):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))


def test_the_mask_in_an_adapter_of_an_earlier_version_is_no_largest_rank():
    """Those were saved at the drawn rank; a run that goes on has the optimizer's state too."""
    model = swapped()
    optimizer = DyLoRA(model)
    saved = copy.deepcopy(optimizer.state_dict())
    for m in lora_layers(model).values():
        m.gate = torch.tensor([6.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    optimizer.load_state_dict(saved)
    torch.testing.assert_close(evaluated(model), at_rank(model, R), atol=1e-12, rtol=0)


def test_a_model_that_moved_trains_on_at_the_drawn_rank():
    model = swapped()
    optimizer = DyLoRA(model, lr=0.02, weight_decay=0)
    train(model, optimizer, [0])
    draw(optimizer, 3)
    model.double().to(torch.float64)
    for m in lora_layers(model).values():  # as a move to another device does
        m.lora_A.data = m.lora_A.data.clone()
    before = model[0].lora_A.detach().clone()
    loss_of(model, 1).backward()
    optimizer.step()
    assert (model[0].lora_A != before).any(1).tolist() == [True] * 3 + [False] * 3


def test_cutting_for_good_keeps_shared_pairs_shared():
    model = torch.nn.Sequential(
        *(
            LoraLinear(torch.nn.Linear(8, 8), torch.randn(4, 8), torch.randn(8, 4), 4, 1.0)
            for _ in range(3)
        )
    )
    for layer in model:
        layer.share_pair(model[0], "all")
    wanted = [m.lora_B[:, :2] @ m.lora_A[:2] for m in model]
    truncate_(model, 2, scale="alpha/r")
    assert len(set(model.parameters())) == 2 + 2 * 3
    assert all(torch.equal(m.lora_B @ m.lora_A, w) for m, w in zip(model, wanted, strict=True))


def test_peft_models_are_refused():
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["0"]))
    accepted = "`swap_` that, and `deltadiff.export_peft` the result"
    with pytest.raises(ArgumentTypeError, match=f"which DyLoRA cannot train.*{accepted}"):
        DyLoRA(model)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    model = swapped(torch.float32).cuda()
    optimizer = DyLoRA(model, lr=0.02)
    x = data(0, torch.float32)[0].cuda()

    def use():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()(x)
        with optimizer.truncated(3):
            model(x)
        model.train()
        optimizer.draw()

    use()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        use()
    finally:
        torch.cuda.set_sync_debug_mode("default")
