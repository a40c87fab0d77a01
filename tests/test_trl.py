"""TRL's trainers on swapped models: as on unswapped ones, and the reference stays the base."""

import itertools

import pytest
import torch
from trainer_runs import TARGETS, llama, lora_config, make
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback
from word_tokenizer import WORDS, word_tokenizer

from deltadiff import DeltaLoRA, swap_
from deltadiff.layers.lora_layers import lora_layers

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:PEFT's adapter files"),
]
PAIRS = list(itertools.permutations(WORDS[:6], 2))
TEXTS = {"prompt": [f"{a} is" for a, _ in PAIRS], "chosen": [f" {b}" for _, b in PAIRS]}
TEXTS["rejected"] = [" not"] * len(PAIRS)


def options(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "gradient_checkpointing": False,
        "dataloader_pin_memory": False, **more,
    }  # fmt: skip


def losses(trainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def sft(model, folder, **more):
    data = Dataset.from_dict({"text": [f"{a} is {b}" for a, b in PAIRS]})
    return trl.SFTTrainer(
        model, trl.SFTConfig(**options(folder)), train_dataset=data,
        processing_class=word_tokenizer(), **more,
    )  # fmt: skip


def dpo(model, folder):
    config = trl.DPOConfig(**options(folder), max_length=8)
    data = Dataset.from_dict(TEXTS)
    return trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=word_tokenizer())


def grpo(model, folder):
    config = trl.GRPOConfig(
        **options(folder), beta=0.1, num_generations=2, max_completion_length=4,
        temperature=1.0,
    )  # fmt: skip

    def reward(completions, **_):
        return [float(len(text)) for text in completions]

    data = Dataset.from_dict({"prompt": TEXTS["prompt"]})
    return trl.GRPOTrainer(
        model, reward, config, train_dataset=data, processing_class=word_tokenizer()
    )


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_swapped_peft_model_trains_as_an_unswapped_one(name, tmp_path):
    found = []
    for swap in (True, False):
        trainer = TRAINERS[name](make("peft", swap=swap), tmp_path)
        found.append(losses(trainer))
        assert len(found[-1]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_sft_with_a_peft_config_is_swapped_afterwards(tmp_path):
    found = []
    for swap in (True, False):
        torch.manual_seed(3)
        trainer = sft(llama(), tmp_path, peft_config=lora_config())
        if swap:
            assert len(swap_(trainer.model).rows) == 4
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_sft_of_a_model_that_swap_gave_its_pairs(tmp_path):
    model = make("plain")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = losses(sft(model, tmp_path, optimizers=(DeltaLoRA(model, lr=1e-2), None)))
    assert found[-1] < found[0]
    moved = {n.split(".")[-1] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"lora_A", "lora_B", "weight"}


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_reference_is_the_untouched_base_under_delta_lora(name, tmp_path):
    """The reference's log-probabilities come from the model with its adapter disabled."""
    model, base = make("peft"), llama().eval()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    assert optimizer.w_update == "factored"
    trainer = TRAINERS[name](model, tmp_path)
    trainer.optimizer = optimizer
    seen, x = [], torch.arange(3, 9)[None]

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            with torch.no_grad(), model.disable_adapter():
                seen.append(torch.equal(model(x).logits, base(x).logits))

    trainer.add_callback(Look())
    assert len(losses(trainer)) == 3
    assert len(seen) == 3 and all(seen)
    assert all(layer.delta.started() for layer in lora_layers(model).values() if layer.active)
    assert not torch.equal(model(x).logits, base(x).logits)


def test_a_reward_model(tmp_path):
    found = []
    for swap in (True, False):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(**sizes, **heads, num_labels=1, pad_token_id=0)
        model = LlamaForSequenceClassification(config)
        data = Dataset.from_dict(
            {side: [p + t for p, t in zip(TEXTS["prompt"], TEXTS[side], strict=True)]
             for side in ("chosen", "rejected")}
        )  # fmt: skip
        lora = lora_config()
        lora.task_type = "SEQ_CLS"
        trainer = trl.RewardTrainer(
            model, trl.RewardConfig(**options(tmp_path), max_length=8), train_dataset=data,
            processing_class=word_tokenizer(), peft_config=lora,
        )  # fmt: skip
        if swap:
            assert {r.module.split(".")[-1] for r in swap_(trainer.model).rows} == set(TARGETS)
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
