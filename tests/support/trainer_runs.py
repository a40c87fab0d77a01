"""A tiny Llama under transformers' Trainer, plain or with PEFT's layers, swapped."""

import peft
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deltadiff import DeltaLoRA, swap_

TARGETS = ["q_proj", "v_proj"]
KINDS = ["peft", "plain"]


class Tokens(Dataset):
    """Sequences of random tokens, which are their own labels."""

    def __init__(self, size: int = 64):
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(64, (size, 8), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def llama(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype)


def lora_config(**options) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)


def make(kind: str, dtype=torch.float32, swap: bool = True):
    """The model: PEFT's, or one that `swap_` gave its pairs."""
    model = llama(dtype)
    if kind == "peft":
        model = peft.get_peft_model(model, lora_config())
    if swap and kind == "peft":
        swap_(model)
    elif swap:
        swap_(model, r=4, target_modules=TARGETS, seed=0)
    return model


def delta_lora(model, w_update, rounding=None, lr=1e-2) -> DeltaLoRA:
    return DeltaLoRA(
        model, lr=lr, update_ratio=0.5, start_step=1, w_update=w_update, rounding=rounding,
    )  # fmt: skip


def trainer_of(model, optimizer, folder, steps, callbacks=None, kind=Trainer, **options) -> Trainer:
    """A Trainer on the CPU that logs each step and saves every third.

    ``optimizer``: one, or its class and options, of which the Trainer makes it; None is what the
    Trainer makes by itself. ``kind``: the class of the Trainer.
    """
    options = {
        "max_steps": steps, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "linear",
        "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **options)
    made = {"optimizers": (optimizer, None)} if optimizer else {}
    if isinstance(optimizer, tuple):
        made = {"optimizer_cls_and_kwargs": optimizer}
    data = {"train_dataset": Tokens(), "eval_dataset": Tokens(8)}
    return kind(model, arguments, callbacks=callbacks, **data, **made)


def everything(model, optimizer) -> list[torch.Tensor]:
    """All of a run that a resumed one must equal bit by bit."""
    state = optimizer.state_dict()["state"]
    kept = [t for entry in state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        logits = model.eval()(Tokens().rows[:2].to(model.device)).logits
    return [logits, *(p.detach() for p in model.parameters()), *kept]
