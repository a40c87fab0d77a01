"""`rms_norm` against float64 and transformers' modules; its readers make their input again."""

import functools
import gc
import weakref

import pytest
import torch
from lora_linear_calls import kept_by
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltadiff import lora_linear
from deltadiff.ops.reference_blocks import rms_norm_again_ref, rms_norm_ref
from deltadiff.ops.remade import remade_of
from deltadiff.ops.rms_norm import rms_norm

EPS = 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (3, 1000)], ids=str)
@pytest.mark.parametrize("offset, twice", [(0.0, True), (1.0, False)], ids=["llama", "gemma"])
def test_kernels_against_float64(path, dtype, shape, offset, twice, randn, assert_close):
    if path.backend != "triton":
        pytest.skip("the reference is tested as rms_norm")
    kernels = pytest.importorskip("deltadiff.kernels.rms_norm")
    how = {"dtype": dtype, "device": path.device}
    x, w, dy = randn(*shape, **how, scale=3.0), randn(shape[1], **how), randn(*shape, **how)
    y, rstd = kernels.rms_norm(x, w, EPS, offset, twice)
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    eager = rms_norm_ref(leaves[0], w, EPS, offset, twice)[0]
    truth = rms_norm_ref(leaves[1], w.double(), EPS, offset, twice)[0]
    assert_close(y, eager, truth, 2)
    assert torch.equal(y, kernels.rms_norm_again(x, w, rstd, offset, twice))
    (of_eager,) = torch.autograd.grad(eager, leaves[0], dy)
    (of_truth,) = torch.autograd.grad(truth, leaves[1], dy.double())
    if shape[1] > 1:  # with one column, dx is a difference of equal numbers
        assert_close(kernels.rms_norm_bwd(dy, x, w, rstd, offset), of_eager, of_truth, 3)


@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_the_modules_of_transformers_give(module, dtype, randn, assert_close):
    norm = module(24, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(randn(24))
    x = [randn(2, 5, 24, dtype=dtype).clone().requires_grad_() for _ in range(2)]
    x[1].data.copy_(x[0].data)
    gemma = module is Gemma2RMSNorm
    y = rms_norm(x[0], norm.weight, EPS, float(gemma), rounds_twice=not gemma), norm(x[1])
    assert torch.equal(*y)
    dy = randn(2, 5, 24, dtype=dtype)
    dx = [torch.autograd.grad(a, b, dy)[0] for a, b in zip(y, x, strict=True)]
    wide = x[0].detach().double().requires_grad_()
    weight = norm.weight.detach().double()
    truth = rms_norm_ref(wide, weight, EPS, float(gemma), rounds_twice=not gemma)[0]
    assert_close(*dx, torch.autograd.grad(truth, wide, dy.double())[0], 3)
    rms = functools.partial(rms_norm, weight=weight, eps=EPS, offset=float(gemma))
    assert torch.autograd.gradcheck(rms, wide)


# ------------------------------------------------------------------- what is made again


@pytest.fixture
def pairs(randn):
    return [
        (randn(6, 8), randn(2, 8).requires_grad_(), randn(6, 2).requires_grad_()) for _ in range(3)
    ]


def read(y, pairs):
    return sum(lora_linear(y, w, a, b, scaling=0.7) for w, a, b in pairs)


def test_readers_keep_the_input_of_the_norm_and_get_the_same_gradients(pairs, randn):
    x, weight, dy = randn(5, 8).requires_grad_(), randn(8), randn(5, 6)
    leaves = [x, *(t for _, a, b in pairs for t in (a, b))]
    y = rms_norm(x, weight, EPS)
    pointer = y.data_ptr()
    out, kept = kept_by(read, y, pairs)
    assert kept and pointer not in {t.data_ptr() for t in kept}
    assert {x.data_ptr()} <= {t.data_ptr() for t in kept}
    ours = [torch.autograd.grad(out, leaves, dy, retain_graph=keep) for keep in (True, False)]
    plain = torch.autograd.grad(read(rms_norm(x, weight, EPS) + 0.0, pairs), leaves, dy)
    for found in ours:
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_several_gradients_at_a_time(pairs, randn):
    """``is_grads_batched=True``, which no kernel takes."""
    x, dys = randn(5, 8).requires_grad_(), randn(3, 5, 6)
    out = read(rms_norm(x, randn(8), EPS), pairs)
    leaves = [x, *(t for _, a, b in pairs for t in (a, b))]
    found = torch.autograd.grad(out, leaves, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, dy, retain_graph=True) for dy in dys]
    for batched, alone in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(alone))


def test_it_is_made_once_and_dropped_after_the_last_reader(pairs, randn):
    x, made = randn(5, 8).requires_grad_(), []
    y = rms_norm(x, randn(8), EPS)
    again = remade_of(y).again
    make = again._make
    again._make = lambda *sources: made.append(make(*sources)) or made[-1]
    read(y, pairs).sum().backward()
    assert len(made) == 1
    gone = weakref.ref(made.pop())
    gc.collect()
    assert gone() is None


def test_an_output_that_was_written_is_kept_as_it_is(pairs, randn):
    x, dy = randn(5, 8).requires_grad_(), randn(5, 6)
    found = []
    for write in (lambda y: y.mul_(2), lambda y: y * 2):
        y = write(rms_norm(x, torch.ones(8), EPS))
        assert remade_of(y) is None
        found.append(torch.autograd.grad(read(y, pairs), x, dy))
    torch.testing.assert_close(*found)


def test_an_input_of_the_norm_that_is_written_before_the_backward_pass_is_noticed(pairs, randn):
    x = randn(5, 8)
    out = read(rms_norm(x, randn(8), EPS), pairs)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, pairs, randn):
    x, weight, dy = randn(5, 8).requires_grad_(), randn(8), randn(5, 6)

    def block(x):
        return read(rms_norm(x, weight, EPS), pairs)

    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        for p in (x, *(t for _, a, b in pairs for t in (a, b))):
            p.grad = None
        run(x).backward(dy)
        found.append([x.grad, *(t.grad for _, a, b in pairs for t in (a, b))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_reference_gives_the_same_bits_again(randn):
    x, weight = randn(5, 8, dtype=torch.bfloat16), randn(8, dtype=torch.bfloat16)
    for offset, twice in ((0.0, True), (1.0, False)):
        y, rstd = rms_norm_ref(x, weight, EPS, offset, twice)
        assert torch.equal(y, rms_norm_again_ref(x, weight, rstd, offset, twice))
