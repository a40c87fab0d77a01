"""Delta-LoRA and LoRA under transformers' Trainer: training, resuming, the best model."""

import math

import peft
import pytest
import torch
from trainer_runs import KINDS, Tokens, delta_lora, everything, lora_config, make, trainer_of

from deltadiff import DeltaLoRA, FusedAdamW, diffora, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.trainer import SHARE, DeltaLoRACallback

BF16 = torch.bfloat16
METHODS = {
    "lora": lambda model: FusedAdamW(model, lr=1e-2),
    "factored": lambda model: delta_lora(model, "factored"),
    "in place": lambda model: delta_lora(model, "inplace"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:rounding=", "ignore:PEFT's adapter files"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def assert_resumes(make_model, make_optimizer, folder, **options):
    """Six steps equal three steps, a checkpoint, and three steps of a new Trainer."""
    model = make_model()
    optimizer = make_optimizer(model)
    trainer_of(model, optimizer, folder / "a", 6, **options).train()
    twin = make_model()
    other = make_optimizer(twin)
    resumed = trainer_of(twin, other, folder / "b", 6, **options)
    resumed.train(resume_from_checkpoint=str(folder / "a" / "checkpoint-3"))
    found, wanted = everything(twin, other), everything(model, optimizer)
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal(kind, method, tmp_path):
    assert_resumes(lambda: make(kind), METHODS[method], tmp_path)


@pytest.mark.parametrize("rounding", ["remainder", "stochastic", "nearest"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_a_bfloat16_model_is_bit_equal(kind, rounding, tmp_path):
    optimizer = lambda model: delta_lora(model, "inplace", rounding)  # noqa: E731
    assert_resumes(lambda: make(kind, BF16), optimizer, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["accumulation", "bf16", "checkpointing", "reentrant checkpointing"],
)
def test_what_people_train_with(options, tmp_path):
    """A swapped PEFT model and an unswapped one end at the same loss."""

    def model(swap: bool):
        found = make("peft", swap=swap)
        found.enable_input_require_grads()
        return found

    assert_resumes(lambda: model(True), METHODS["factored"], tmp_path, **options)
    losses = []
    for swap in (True, False):
        mine = model(swap)
        optimizer = torch.optim.AdamW((p for p in mine.parameters() if p.requires_grad), lr=1e-2)
        trainer = trainer_of(mine, optimizer, tmp_path / "c", 4, **options)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    tolerance = 2**-7 if options.get("bf16") else 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_a_compiled_model(tmp_path):
    """Compiled and not, a swapped PEFT model takes the same steps."""
    losses = []
    for options in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        model = make("peft")
        trainer = trainer_of(model, METHODS["factored"](model), tmp_path, 3, **options)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"fp16": True}, {"bf16": True}, {"torch_compile": True}])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_on_a_gpu_is_bit_equal(kind, method, options, tmp_path):
    assert_resumes(lambda: make(kind).cuda(), METHODS[method], tmp_path, use_cpu=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["remainder", "stochastic", "nearest"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_bfloat16_model_on_a_gpu_is_bit_equal(kind, rounding, tmp_path):
    optimizer = lambda model: delta_lora(model, "inplace", rounding)  # noqa: E731
    assert_resumes(lambda: make(kind, BF16).cuda(), optimizer, tmp_path, use_cpu=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_comes_back_with_its_update(kind, method, tmp_path):
    """Of seven checkpoints the fourth is called the best."""
    model = make(kind)
    optimizer = METHODS[method](model)
    callbacks = [] if method == "lora" else [DeltaLoRACallback()]
    trainer = trainer_of(
        model, optimizer, tmp_path, 7, callbacks, load_best_model_at_end=True, eval_steps=1,
        eval_strategy="steps", save_steps=1, save_total_limit=2, metric_for_best_model="closeness",
        greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"closeness": -abs(trainer.state.global_step - 4)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == losses[3] and losses[3] not in losses[4:]


def test_without_the_callback_the_lost_update_is_said(tmp_path):
    model = make("peft")
    trainer = trainer_of(
        model, delta_lora(model, "factored"), tmp_path, 4, load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=1, save_steps=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="without Delta-LoRA's update.*DeltaLoRACallback"):
        trainer.train()


def test_the_share_of_the_update_that_reached_w_is_logged(tmp_path):
    shares = {}
    for rounding in ("remainder", "nearest", None):
        model = make("plain", torch.float32 if rounding is None else BF16)
        optimizer = delta_lora(model, "inplace", rounding, lr=1e-4)
        trainer = trainer_of(model, optimizer, tmp_path, 5, [DeltaLoRACallback()])
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [SHARE in log for log in logs] == [False, False, True, True, True]  # K = 1
        shares[rounding] = [log[SHARE] for log in logs[2:]]
    assert all(math.isclose(share, 1, abs_tol=1e-3) for share in shares[None])
    assert all(math.isclose(share, 1, abs_tol=1e-3) for share in shares["remainder"])
    assert all(share < 0.9 for share in shares["nearest"])


def test_the_callback_refuses_what_it_cannot_serve(tmp_path):
    model = make("plain")
    trainer = trainer_of(model, FusedAdamW(model), tmp_path, 1, [DeltaLoRACallback()])
    with pytest.raises(ArgumentTypeError, match="optimizer: got FusedAdamW"):
        trainer.train()
    model = make("peft")
    trainer = trainer_of(
        model, delta_lora(model, "factored"), tmp_path, 1, [DeltaLoRACallback()],
        load_best_model_at_end=True, save_only_model=True, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="save_only_model"):
        trainer.train()


def test_the_class_of_the_optimizer_instead_of_the_optimizer(tmp_path):
    from transformers import Trainer

    for kind in KINDS:
        model = make(kind)
        plain = trainer_of(model, None, tmp_path, 3)
        options = {"model": model, "lr": 1e-2, "update_ratio": 0.5}
        trainer = Trainer(
            model, plain.args, train_dataset=Tokens(), optimizer_cls_and_kwargs=(DeltaLoRA, options)
        )
        trainer.train()
        twin = make(kind)
        trainer_of(twin, DeltaLoRA(twin, lr=1e-2, update_ratio=0.5), tmp_path, 3).train()
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_after_the_preparation_by_accelerate(kind):
    """`accelerate.Accelerator.prepare` before and after `swap_` give the same step."""
    from accelerate import Accelerator

    losses = []
    for first in ("swap", "prepare"):
        model = make(kind, swap=first == "swap")
        accelerator = Accelerator(cpu=True)
        if first == "prepare":
            model = accelerator.prepare_model(model)
            swap_(
                model,
                **(
                    {}
                    if kind == "peft"
                    else {"r": 4, "target_modules": ["q_proj", "v_proj"], "seed": 0}
                ),
            )  # noqa: E501
            optimizer = accelerator.prepare_optimizer(delta_lora(model, "factored"))
        else:
            model, optimizer = accelerator.prepare(model, delta_lora(model, "factored"))
        for _ in range(3):
            loss = model(Tokens().rows[:4], labels=Tokens().rows[:4]).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_transformers_own_adapters_without_a_peft_model(tmp_path):
    """`model.add_adapter` instead of `get_peft_model`: the Trainer saves PEFT's file of it."""
    losses = []
    for swap in (True, False):
        model = make("plain", swap=False)
        torch.manual_seed(1)
        model.add_adapter(lora_config())
        if swap:
            assert len(swap_(model).rows) == 4
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        trainer = trainer_of(model, optimizer, tmp_path, 3)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert len(peft.load_peft_weights(str(tmp_path / "checkpoint-3"), device="cpu")) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_resumed_run_of_diffora_with_sharing_is_bit_equal(tmp_path):
    """W of the selected modules moves; those that are not selected share a pair by type."""
    candidates = diffora.find_candidates(make("plain", swap=False), ["q_proj", "v_proj"])
    selection = diffora.random_selection(candidates, 0.5, seed=0)

    def model():
        found = make("plain", swap=False)
        diffora.apply_(found, selection, r=4, share_r=2, seed=0)
        return found

    assert_resumes(model, METHODS["in place"], tmp_path)
