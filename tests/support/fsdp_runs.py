"""A small Llama with LoRA, sharded by FSDP2 or whole, and training runs on parts of batches."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from deltadiff import DeltaLoRA, swap_, swap_report
from deltadiff.ranks import whole

F32, BF16 = torch.float32, torch.bfloat16
STEPS = 6
# The dtype of the model, and the arguments of DeltaLoRA.
METHODS = {
    "LoRA": (F32, {"update_ratio": 0.0}),
    "factored": (F32, {"w_update": "factored"}),
    "factored, K = 2": (F32, {"w_update": "factored", "start_step": 2}),
    "in place": (F32, {}),
    "in place, K = 2": (F32, {"start_step": 2}),
    "remainder": (BF16, {"rounding": "remainder"}),
    "stochastic": (BF16, {"rounding": "stochastic", "seed": 3}),
    "nearest": (BF16, {"rounding": "nearest"}),
}


def make_base(dtype):
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, use_cache=False)
    return transformers.LlamaForCausalLM(config).to(dtype)


def make_model(dtype=F32, r=8):
    model = make_base(dtype)
    swap_(model, r=r, lora_alpha=2 * r, seed=1)
    return model


def shard(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def quantise_(model, storage=torch.uint8):
    """Store the linear layers but the head in NF4, the bytes as ``storage``."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or layer is model.get_output_embeddings():
                continue
            how = {"quant_type": "nf4", "quant_storage": storage}
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False,
                compute_dtype=layer.weight.dtype, device="meta", **how,
            )  # fmt: skip
            weight = bnb.nn.Params4bit(layer.weight.detach(), False, module=packed, **how)
            packed.weight = weight.to("cpu")
            setattr(parent, name, packed)
    return model


def parts_of(step, parts):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(96, (12, 8), generator=generator).chunk(parts)


def train(model, optimizer, rank=None, size=2, steps=STEPS, device="cpu"):
    """With a rank, on its part of each batch; else on all parts, one after the other."""
    for t in range(steps):
        parts = parts_of(t, size)
        for ids in parts if rank is None else [parts[rank]]:
            ids = ids.to(device)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / size if rank is None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [whole(p).float().flatten().tolist() for p in model.parameters()]


def make_peft_model(dtype=F32, r=8):
    """The same layers with PEFT's pairs, swapped."""
    import peft

    lora = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
    model = peft.get_peft_model(make_base(dtype), lora)
    swap_(model)
    return model


def shard_peft(model, alone=False, **options):
    """By blocks; with ``alone``, each lora_A and lora_B is a unit of its own, as PEFT's policy has
    them.
    """
    if alone:
        for name, module in model.named_modules():
            if name.endswith((".lora_A.default", ".lora_B.default")):
                fully_shard(module, **options)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def save_checkpoint(model, optimizer, folder):
    """What all processes have, in a folder."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load_checkpoint(model, optimizer, folder):
    """What `save_checkpoint` wrote, also in another number of processes."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    found = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )


# ------------------------------------------------------------------ bases of few bits

FACTORED = {"lr": 5e-3, "w_update": "factored"}


def of_trained(model):
    """The values of the pairs; of one process, all are whole."""
    return values(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad))


def trained_peft(rank, model):
    """Shard and train a model of PEFT: its pairs, whether its report stayed, and its paths."""
    paths = [(row.path, row.reason) for row in swap_report(model).rows]
    shard_peft(model)
    kept = [(row.path, row.reason) for row in swap_report(model).rows] == paths
    train(model, DeltaLoRA(model, **FACTORED), rank, steps=3)
    return of_trained(model), kept, {path for path, _ in paths}
