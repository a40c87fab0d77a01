"""`deltadiff bench model --peers`: libraries that patch others, each in a process of its own.

A peer loads a checkpoint from a folder, as its users do: the same shape of model with random
weights, and a tokenizer that nobody asks. Its steps see tokens instead of embeddings, and all
linear layers have pairs. The frozen model beside which its time stands runs in another process.
"""

import importlib.util
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..devices import free_memory
from ..errors import ArgumentError
from .clocks import time_steps
from .methods import ALPHA, LR, Settings
from .models import ModelShape, build_model, use_liger_
from .records import Timing, failure

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# So that a peer neither asks a server for anything nor tells one.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


def why_no_peer(name: str) -> str | None:
    """None where a peer is installed, else the reason in words."""
    missing = [p for p in PEERS[name][1] if importlib.util.find_spec(p) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def peer_timings(
    shape: ModelShape, settings: Settings, checkpointing: Sequence[bool], device: torch.device
) -> Iterator[tuple[str, bool, Timing]]:
    """(peer, checkpointing, timing) of each peer; one that fails has a note instead of times.

    Raises:
        ArgumentError: the peers have no such base.
    """
    if not settings.peers:
        return
    if settings.base not in ("bf16", "nf4"):
        raise ArgumentError("--peers", f"--base {settings.base} beside it", "bf16 or nf4")
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(shape, settings.dtype, device)
        model.save_pretrained(folder)
        _save_tokenizer(Path(folder))
        del model
        free_memory(device)
        for name in settings.peers:
            for on in checkpointing:
                yield name, on, _alone(name, folder, settings, on, device)


def _alone(
    name: str, folder: str, settings: Settings, checkpointing: bool, device: torch.device
) -> Timing:
    """What `measure_peer` finds in a new process, which ends with it."""
    context = multiprocessing.get_context("spawn")  # a forked one would have this one's patches
    try:
        with ProcessPoolExecutor(1, context) as pool:
            job = name, folder, settings, checkpointing, str(device)
            return pool.submit(measure_peer, *job).result()
    except Exception as error:  # the process may have been killed
        return Timing(note=failure(error))


def measure_peer(
    name: str, folder: str, settings: Settings, checkpointing: bool, device: str
) -> Timing:
    """Time the training steps of a peer, in this process, which is its own."""
    os.environ.update(ENVIRONMENT)
    at = torch.device(device)
    try:
        model = PEERS[name][0](folder, settings, checkpointing, at)
        params = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in params:
                p.normal_(std=0.02)  # a product with zeros would be faster
        optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
        shape = settings.batch, settings.sequence
        ids = torch.randint(model.config.vocab_size, shape, device=at)

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds, peak = time_steps(step, settings.steps, at, warm_up=2)
    except Exception as error:
        return Timing(note=failure(error))
    return Timing(seconds, peak_mib=peak)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip


# ------------------------------------------------------------------------- peers


def _peft(folder: str, settings: Settings, checkpointing: bool, device: torch.device) -> nn.Module:
    """PEFT, over bitsandbytes' layers where the base is NF4, as QLoRA's users run it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if settings.base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=settings.dtype,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=settings.dtype, device_map={"": device}, **options
    ).train()
    if settings.liger:
        use_liger_(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=settings.r, lora_alpha=ALPHA, target_modules=LAYERS)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for p in model.parameters():
        p.data = p.data.to(settings.dtype) if p.requires_grad else p.data
    return model


def _unsloth(
    folder: str, settings: Settings, checkpointing: bool, device: torch.device
) -> nn.Module:
    """Unsloth, with its own checkpointing, which offloads."""
    from unsloth import FastLanguageModel  # it has to come before transformers

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=settings.sequence, dtype=settings.dtype,
        load_in_4bit=settings.base == "nf4", local_files_only=True,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=settings.r, lora_alpha=ALPHA, lora_dropout=0, bias="none",
        target_modules=LAYERS, use_gradient_checkpointing="unsloth" if checkpointing else False,
    )  # fmt: skip


# How to load a peer's model with its pairs, and the packages that it needs.
Load = Callable[[str, Settings, bool, torch.device], nn.Module]
PEERS: dict[str, tuple[Load, tuple[str, ...]]] = {
    "peft-alone": (_peft, ("peft", "accelerate")),
    "unsloth": (_unsloth, ("unsloth",)),
}
