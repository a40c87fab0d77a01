"""Lean blocks: the same results as the layers one by one, with less kept for the backward pass."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from flora_runs import draw_cores
from lora_linear_calls import kept_by
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import deltadiff
from deltadiff import DeltaLoRA, quantise_, swap_, unswap_
from deltadiff.bench.checkpointing import checkpointing_of
from deltadiff.bench.models import to_nf4_
from deltadiff.errors import ArgumentTypeError
from deltadiff.layers.flora import swap_flora_
from deltadiff.ops import gated_mlp as gated_mlp_op

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ("Llama", "Qwen3", "Gemma2", "Phi3")
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def build(family="Llama", dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()


def swapped(family="Llama", lean=True, dtype=torch.float32, **options):
    model = build(family, dtype)
    swap_(model, r=2, lean=lean, **options)
    draw(model)
    return model


def draw(model):
    """Random pairs, which are the same for models with the same pairs."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


def assert_equal_gradients(found, expected, exact=False):
    assert found.keys() == expected.keys() and len(found) > 4
    for name, t in expected.items():
        if exact:
            assert torch.equal(found[name], t), name
        else:
            torch.testing.assert_close(found[name], t, rtol=1e-4, atol=1e-6, msg=name)


def lean_modules(model):
    return [name for name, m in model.named_modules() if "forward" in vars(m)]


def kept_numbers(model):
    """How many numbers autograd keeps beside the model's parameters."""
    _, kept = kept_by(loss_of, model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(n for pointer, n in found.items() if pointer not in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_layers_one_by_one_and_keeps_less(family):
    lean, plain = swapped(family), swapped(family, lean=False)
    assert len(lean_modules(lean)) >= 6 and not lean_modules(plain)
    assert_equal_gradients(gradients(lean), gradients(plain))
    rows, h = IDS.numel() * 4, 2 * SIZES["intermediate_size"]  # bytes; both layers
    assert kept_numbers(lean) <= kept_numbers(plain) - rows * h


def test_the_report_tells_what_is_lean_and_what_is_not():
    model = build()
    report = swap_(model, r=2, lean=True)
    assert "lean (they keep less for the backward pass): 2 x gated MLP, 5 x RMSNorm" in str(report)
    assert {row.why_not for row in report.lean} == {""}
    model = build()
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    report = swap_(model, r=2, lean=True)
    assert "not lean: gated MLP model.layers.1.mlp: its activation is ReLU" in str(report)
    model = build()
    report = swap_(model, r=2, lean=True, target_modules=["q_proj", "up_proj", "down_proj"])
    reason = "gate_proj: not swapped"
    assert f"not lean: gated MLP model.layers.0.mlp and 1 more: {reason}" in str(report)
    assert swap_(build(), r=2).lean == ()  # on a CPU only where it is asked for


def test_what_is_trained_beside_the_pairs_stays_as_it_is():
    names = ["model.norm", "model.layers.0.input_layernorm"]
    lean = swapped(modules_to_save=names)
    plain = swapped(lean=False, modules_to_save=names)
    assert not set(names) & set(lean_modules(lean))
    assert_equal_gradients(gradients(lean), gradients(plain))


@pytest.mark.parametrize("rounding", ["inplace", "factored"])
def test_training_by_delta_lora(rounding):
    results = []
    for lean in (True, False):
        model = swapped(lean=lean)
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=rounding)
        for _ in range(4):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(gradients(model))
    for name, t in results[1].items():
        torch.testing.assert_close(results[0][name], t, rtol=2e-3, atol=1e-4)


def test_peft_models():
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0)
    results = []
    for lean in (True, False):
        model = peft.get_peft_model(build(), config)
        report = swap_(model, lean=lean)
        draw(model)
        assert bool(report.lean) == lean
        results.append(gradients(model))
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(loss_of(model), loss_of(build()))
        unswap_(model)
        assert not lean_modules(model)
    assert_equal_gradients(*results)


@pytest.mark.parametrize("of_peft", [False, True], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("bits", [torch.float32, torch.bfloat16, "fp8"], ids=str)
def test_a_base_of_few_bits(of_peft, bits):
    """In 4 bits that compute in the dtype of the model or in another one, and in FP8."""
    pytest.importorskip("bitsandbytes")
    results = []
    for lean in (True, False):
        model = build()
        if bits == "fp8":
            quantise_(model, bits)
        else:
            to_nf4_(model, bits)
        if of_peft:
            config = peft.LoraConfig(r=2, target_modules="all-linear")
            model = peft.get_peft_model(model, config)
            report = swap_(model, lean=lean)
        else:
            report = swap_(model, r=2, lean=lean)
        draw(model)
        assert sum(row.what == "gated MLP" and not row.why_not for row in report.lean) == 2 * lean
        found = gradients(model)
        results.append({name: t for name, t in found.items() if "lora_" in name})
    assert_equal_gradients(*results)


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_cores_of_flora(checkpointed, four_bits):
    results = []
    for lean in (True, False):
        model = build()
        if four_bits:
            to_nf4_(model, torch.float32)
        report = swap_flora_(model, r=2, lean=lean)
        draw(model)
        draw_cores(model)
        assert sum(row.what == "gated MLP" and not row.why_not for row in report.lean) == 2 * lean
        if checkpointed:
            model.gradient_checkpointing_enable()
        found = gradients(model)
        results.append({n: t for n, t in found.items() if "lora_" in n or n.endswith("gate")})
        assert all(t.any() for t in results[-1].values())
    assert_equal_gradients(*results)


def test_dropout_takes_the_layers_one_by_one():
    found = []
    for lean in (True, False):
        model = swapped(lean=lean, lora_dropout=0.5)
        torch.manual_seed(3)
        found.append(gradients(model))
    assert_equal_gradients(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, plain = swapped(), swapped()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        plain.enable_input_require_grads()
    assert_equal_gradients(gradients(model), gradients(plain), exact=True)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_what_is_kept_may_wait_in_the_memory_of_the_host(checkpointed):
    """PyTorch's ``save_on_cpu``, by which transformers offloads what checkpointing keeps."""
    model, plain = swapped(), swapped()
    if checkpointed:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(model)
    assert_equal_gradients(found, gradients(plain), exact=True)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_offloaded_checkpointing(library):
    """Bits are those of checkpointing that keeps the same on the GPU, step by step."""
    found = []
    for offload in (None, library):
        model = build(dtype=torch.bfloat16).cuda()
        swap_(model, r=2, lean=True)
        draw(model)
        ids = IDS.cuda()
        with checkpointing_of(model, True, offload) as around:
            for _ in range(2):  # the second one finds what the first left behind
                model.zero_grad()
                with around or nullcontext():
                    model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, offloaded = found
    assert plain and all(torch.equal(offloaded[name], grad) for name, grad in plain.items())


def test_checkpointing_repeats_no_product_that_nobody_reads(monkeypatch):
    """The last product of a block, down's, is not needed for what the block keeps."""
    model, calls = swapped(), []
    run = gated_mlp_op.run_fwd
    monkeypatch.setattr(
        gated_mlp_op,
        "run_fwd",
        lambda x, w, *rest: calls.append(tuple(w.shape)) or run(x, w, *rest),
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(model).backward()
    inner, outer, part = (24, 16), (16, 24), (8, 24)
    assert calls.count(inner) == 8 and calls.count(outer) == 2 and calls.count(part) == 2
    # A norm behind the block reads its result.
    model, calls[:] = swapped("Gemma2"), []
    expected = gradients(model)
    calls.clear()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model)
    assert calls.count(outer) == 4 and calls.count(part) == 2
    assert_equal_gradients(found, expected, exact=True)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_autocast_and_half_precision(how, assert_close):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    truth, found = gradients(swapped(lean=False, dtype=torch.float64)), []
    for lean in (True, False):
        model = swapped(lean=lean, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found.append(gradients(model))
    for name, expected in truth.items():
        assert_close(found[0][name], found[1][name], expected.double(), 3, torch.bfloat16)


def test_a_compiled_model_has_no_graph_break():
    model = swapped()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal_gradients({"loss": expected["loss"], **found}, expected)


def test_evaluation_and_generation():
    lean, plain = swapped().eval(), swapped(lean=False).eval()
    with torch.no_grad():
        assert torch.equal(lean(IDS).logits, plain(IDS).logits)
    found = [m.generate(IDS, max_new_tokens=3, do_sample=False) for m in (lean, plain)]
    assert torch.equal(*found)


@pytest.mark.parametrize("change", ["hook", "layer", "activation"])
def test_a_block_that_was_changed_runs_as_it_did_and_says_so(change):
    model, plain = swapped(), swapped(lean=False)
    seen = []
    for m in (model, plain):
        mlp = m.model.layers[0].mlp
        if change == "hook":
            mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        elif change == "layer":
            mlp.up_proj = nn.Linear(16, 24, bias=False)
            nn.init.constant_(mlp.up_proj.weight, 0.1)
        else:
            mlp.act_fn = nn.ReLU()
    words = {"hook": "hooks on the modules", "layer": "a Linear stands", "activation": "another"}
    with pytest.warns(UserWarning, match=f"lean gated MLP runs as it did.*{words[change]}"):
        found = gradients(model)
    assert_equal_gradients(found, gradients(plain))
    assert len(seen) == (2 if change == "hook" else 0)


def test_hooks_on_the_blocks_themselves_see_what_they_saw():
    seen = []
    for lean in (True, False):
        model = swapped(lean=lean)
        layer = model.model.layers[1]
        for module in (layer.mlp, layer.input_layernorm):
            module.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
            module.register_full_backward_hook(lambda m, dx, dy: seen.append((*dx, *dy)))
        gradients(model)
    half = len(seen) // 2
    assert half == 4
    for ours, theirs in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_copies_are_lean_by_themselves():
    model = swapped()
    expected = gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lean_modules(other) == lean_modules(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0)
        assert_equal_gradients(gradients(other), expected, exact=True)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        for p in model.parameters():
            p.grad = None
        gradients(other)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("take_out", [unswap_, deltadiff.merge_])
def test_it_is_taken_out_with_the_layers(take_out):
    model = build()
    patched = model.model.layers[0].mlp  # as Liger patches instances
    patched.forward = own = LlamaMLP.forward.__get__(patched)
    norm = model.model.norm
    state = set(model.state_dict())
    swap_(model, r=2, lean=True)
    assert len(lean_modules(model)) == 7
    assert {n for n in model.state_dict() if "lora_" not in n} == state
    take_out(model)
    assert lean_modules(model) == ["model.layers.0.mlp"] and patched.forward == own
    assert type(norm) is LlamaRMSNorm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model)


def test_lean_is_true_false_or_none():
    with pytest.raises(ArgumentTypeError, match="lean: got 'yes'; accepted: True, False or None"):
        swap_(build(), r=2, lean="yes")
