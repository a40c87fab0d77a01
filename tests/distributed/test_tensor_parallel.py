"""Tensor parallelism is refused in words of its own, before anything is changed."""

import pytest
import torch
import transformers
from fsdp_runs import make_base, make_model, make_peft_model, parts_of, values
from ranks import run_ranks
from tensor_parallel_runs import split_up
from torch.distributed.tensor import Replicate

from deltadiff import DeltaLoRA, merge_, swap_, unswap_
from deltadiff.errors import ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers

F32 = torch.float32
WORDS = "tensor parallelism (a tp_plan, `parallelize_module`) splits its weight: use DDP or `fully_"


def refused(call):
    with pytest.raises(ArgumentTypeError) as error:
        call()
    return str(error.value)


def plain_layers(rank, folder):
    """What `swap_` says before and after, and for a model of transformers with a plan."""
    model = split_up(make_base(F32))
    report = str(swap_(model, r=4))
    texts = [report] + [
        refused(lambda name=name: swap_(split_up(make_base(F32)), r=4, target_modules=[name]))
        for name in ("up_proj", "down_proj")
    ]
    planned = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    before = [type(m) for m in planned.modules()]
    texts.append(refused(lambda: swap_(planned, r=4)))
    assert before == [type(m) for m in planned.modules()]
    late = split_up(make_model())
    late_text = refused(lambda: late(input_ids=parts_of(0, 2)[rank]))
    for call in (unswap_, merge_):  # another layer would lack the hooks
        with pytest.raises(SwapError, match="gate_proj, whose weight tensor parallelism splits"):
            call(late)
    return texts, late_text


def layers_of_peft(rank):
    """Base layers that gather their outputs: PEFT's own forward pass is right, W stays as it is."""
    model = split_up(
        make_peft_model(), ".base_layer", input_layouts=Replicate(), output_layouts=Replicate()
    )
    ids = parts_of(0, 2)[0]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = make_peft_model()(input_ids=ids).logits
    reasons = {layer.dispatch.reason for layer in lora_layers(model).values()}
    before = values(model)
    text = refused(lambda: DeltaLoRA(model, w_update="inplace"))
    assert before == values(model)
    return torch.equal(logits, expected) or (logits - expected).abs().max().item(), reasons, text


def test_plain_layers(tmp_path):
    make_base(F32).save_pretrained(tmp_path)
    for texts, late in run_ranks(plain_layers, str(tmp_path)):
        assert all(WORDS in text and "call `swap_` before" not in text for text in texts)
        assert "x: got a DTensor" in late and "no tensor parallelism of LoRA layers" in late


def test_layers_of_peft():
    for error, reasons, text in run_ranks(layers_of_peft):
        assert error is True or error < 1e-5
        assert "PEFT's own forward: tensor parallelism splits its base weight" in reasons
        assert "W split over processes and its pair not, as by tensor parallelism" in text
