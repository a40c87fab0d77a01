"""`lora_linear` by backends "fp8" and "scaled_mm": specification, kernels, what is refused."""

import pytest
import torch
from fp8 import BLOCKS, float8
from lora_linear_calls import doubles, inputs, outputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltadiff
from deltadiff import lora_linear, quantise_, swap_
from deltadiff.errors import BackendUnavailableError
from deltadiff.ops.decode_fp8 import decode_fp8
from deltadiff.ops.dispatch import FP8_PRODUCTS, choose_fp8_path, runs_of
from deltadiff.ops.reference import lora_linear_ref
from deltadiff.ops.reference_fp8 import (
    E4M3,
    activations_fp8_ref,
    lora_linear_fp8_ref,
)
from deltadiff.verify.run import run
from deltadiff.verify.tolerance import format_table

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYER = 4096, 4096, 16


def spec(x, weight, lora_A, lora_B, **options):
    return lora_linear_fp8_ref(x, *weight, lora_A, lora_B, **options)


# --------------------------------------------------------------------- the specification


def test_activations_by_hand():
    x = torch.tensor([[448.0, 1.0, 17.0], [0.0, 0.0, 1.0]])
    # Between 16 and 32 numbers of e4m3 are 2 apart, and 17 lies between two of them.
    assert activations_fp8_ref(x, 2).tolist() == [[448, 1, 17], [0, 0, 1]]
    assert activations_fp8_ref(x, 3).tolist() == [[448, 1, 16], [0, 0, 1]]
    assert activations_fp8_ref(x / 1024, 3).tolist()[0] == [448 / 1024, 1 / 1024, 16 / 1024]
    tiny = torch.tensor([[1e-38, 2e-38]])
    assert activations_fp8_ref(tiny, 2).abs().max() < 1e-33
    odd = torch.tensor([[1.0, float("inf"), 2.0], [1.0, float("nan"), 2.0]])
    assert activations_fp8_ref(odd, 3).isnan().all()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_specification_is_exact_where_fp8_is(block, randn):
    """Whole numbers up to 15 lose nothing in FP8; scales are powers of two."""
    k, n, m, r = 256, 144, 9, 4
    x, dy = (torch.randint(-7, 8, s).float() for s in ((m, k), (m, n)))
    x[:, ::128] = dy[:, ::128] = 7.0  # the largest number, so that scales are the same
    w = torch.randint(-7, 8, (n, k)).float() / 8
    w[::64, ::64] = 7 / 8
    w[:, 0] = 7 / 8
    weight = float8(w, block)
    assert torch.equal(decode_fp8(weight, F32), w)
    a, b = randn(r, k, scale=0.1, dtype=F32), randn(n, r, dtype=F32)
    ours = outputs(spec, x, weight, a, b, None, None, dy)
    truth = outputs(lora_linear_ref, *doubles([x, w, a, b, None, None, dy]))
    for name, expected in truth.items():
        # The gradients of A and B are long sums of float32, of terms up to 500.
        atol = 1e-3 if name.startswith("lora") else 2e-5
        torch.testing.assert_close(ours[name].double(), expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_error_of_the_specification_is_that_of_e4m3(block, randn):
    """Two factors with 3 bits of mantissa each: about 0.026 each, of the big products alone."""
    given = inputs(randn, 64, 384, 256, 4, F32, "cpu", gate=(4,), bias=True)
    x, w, *rest = given
    weight = float8(w, block)
    ours = outputs(spec, x, weight, *rest)
    truth = outputs(lora_linear_ref, *doubles(given))
    for name in ("y", "x"):
        error = (ours[name] - truth[name]).norm() / truth[name].norm()
        assert 0.01 < error < 0.04, (name, error)
    for name in ("lora_A", "lora_B", "gate", "bias"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- the choice


@pytest.fixture
def sm_90(on_capability):
    return on_capability(9, 0)


def test_it_runs_only_if_it_is_asked_for(sm_90):
    pytest.importorskip("triton")
    by_itself = choose_fp8_path(sm_90, BF16, None, LAYER, False, (128, 128))
    assert by_itself.backend == "hopper" and "(backend='fp8' multiplies in FP8)" in by_itself.reason
    asked = choose_fp8_path(sm_90, BF16, "fp8", LAYER, False, (128, 128))
    assert asked.backend == "fp8" and "decoded" not in asked.reason
    kernels = {m: asked.at(m).label for m in (1, 255, 256, 8192)}
    assert kernels == {1: "triton few_tokens", 255: "triton few_tokens", 256: "fp8", 8192: "fp8"}


@pytest.mark.parametrize(
    "layer, block, dropout, reason",
    [
        ((4096, 4096, 16), None, False, "W is not in float8_e4m3fn; see `quantise_`"),
        ((4096, 4096, 16), (64, 64), False, "scales of 64 x 64: it takes those of 128 x 128"),
        ((4096, 4096, 16), (128, 128), True, "products in FP8 have no dropout"),
        ((4096, 4096, 257), (128, 128), False, "rank 257 > 256"),
        ((4096, 4088, 16), (1, 4088), False, "4096 x 4088: products in FP8 need multiples of 16"),
    ],
)
def test_what_it_does_not_take(layer, block, dropout, reason, sm_90):
    pytest.importorskip("triton")
    with pytest.raises(BackendUnavailableError, match=reason.replace("`", ".")):
        choose_fp8_path(sm_90, BF16, "fp8", layer, dropout, block)
    other = choose_fp8_path(sm_90, BF16, None, layer, dropout, block)
    assert "multiplies in FP8" not in other.reason


def test_blocks_that_it_takes():
    for block in ((128, 128), (1, 4096), (1, 9999), (4096, 4096), (10**6, 10**6)):
        for name in ("fp8", "scaled_mm"):
            kernels = {
                run.kernel.name for run in runs_of(name, (*LAYER, BF16, False, False, block))
            }
            assert (name in kernels) == (name == "fp8" or block != (128, 128))


@pytest.mark.parametrize("numbers", [(8, 9), (10, 0), (12, 0)])
def test_other_gpus_ask_pytorch(numbers, on_capability):
    pytest.importorskip("triton")
    device = on_capability(*numbers)
    rows = device, BF16, None, LAYER, False, (1, 4096)
    assert choose_fp8_path(*rows).reason.endswith("(backend='scaled_mm' multiplies in FP8)")
    assert choose_fp8_path(*rows[:2], "scaled_mm", *rows[3:]).at(8192).name == "scaled_mm"
    with pytest.raises(BackendUnavailableError, match="need sm_90"):
        choose_fp8_path(*rows[:2], "fp8", *rows[3:])
    with pytest.raises(BackendUnavailableError, match="128 x 128: it takes those of rows, or one"):
        choose_fp8_path(*rows[:2], "scaled_mm", *rows[3:-1], (128, 128))
    with pytest.raises(BackendUnavailableError, match="gives bfloat16 only"):
        choose_fp8_path(device, F16, "scaled_mm", *rows[3:])


def test_older_gpus_decode(on_capability):
    pytest.importorskip("triton")
    device = on_capability(8, 6)
    assert (
        "multiplies in FP8"
        not in choose_fp8_path(device, BF16, None, LAYER, False, (1, 4096)).reason
    )
    with pytest.raises(BackendUnavailableError, match="need sm_89 or newer"):
        choose_fp8_path(device, BF16, "scaled_mm", LAYER, False, (1, 4096))


def test_elsewhere_it_is_refused_before_anything_changes(randn):
    model = nn.Sequential(nn.Linear(64, 64))
    quantise_(model, "fp8")
    with pytest.raises(BackendUnavailableError, match="the sm_90 kernels are for NVIDIA GPUs"):
        swap_(model, r=4, lora_alpha=8, backend="fp8")
    assert type(model[0]).__name__ == "Float8Linear"
    x, w, *rest, _ = inputs(randn, 4, 64, 48, 2, F32, "cpu")
    a, b, gate, bias = rest
    with pytest.raises(BackendUnavailableError, match="fp8"):
        lora_linear(x, float8(w), a, b, scaling=1.0, backend="fp8")
    with pytest.raises(BackendUnavailableError, match="fp8"):
        deltadiff.choose_path(x.device, F32, "fp8")


# --------------------------------------------------------- the kernels that Triton interprets


@pytest.fixture
def interpreted():
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1")


@pytest.mark.parametrize("columns", [128, 1024])
@pytest.mark.parametrize("by_rows", [False, True])
def test_quantised_activations(columns, by_rows, interpreted, randn):
    from deltadiff.kernels.lora_linear_fp8 import launch

    m, c, r = 70, 1200, 3
    v, p = randn(m, c, dtype=F32), randn(r, c, dtype=F32, scale=c**-0.5)
    factors = torch.rand(c) + 0.5 if by_rows else None
    gate = randn(r, dtype=F32)
    v8, scales, s, u = launch.quantised(v, p, 1.7, gate, factors, columns // 128)
    rows = scales.T.repeat_interleave(columns, 1)[:, :c]
    expected = activations_fp8_ref(v if factors is None else v * factors, columns)
    # Triton's interpreter (of 3.6 and 3.7) halves what rounds up to a power of two, and cuts off
    # subnormal numbers. A GPU does not.
    data = (expected / rows).to(E4M3).float().abs()
    right = (torch.frexp(data).mantissa != 0.5) & (data >= 2**-6)
    assert torch.equal((v8.float() * rows)[right], expected[right]) and right.float().mean() > 0.8
    torch.testing.assert_close(s, v @ p.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(u[:, :r], 1.7 * gate * s, rtol=1e-6, atol=1e-6)
    assert u.shape == (m, 8) and not u[:, r:].any()


def test_transposed_bytes(interpreted):
    from deltadiff.kernels.lora_linear_fp8 import launch

    data = torch.randint(0, 256, (144, 272), dtype=torch.uint8)
    assert torch.equal(launch.transposed(data.view(E4M3)).view(torch.uint8), data.T)


@pytest.mark.parametrize("block", BLOCKS[1:], ids=str)
def test_scaled_mm(block, interpreted, randn):
    """PyTorch has its product on the CPU, too. What FP8 loses hides small differences here."""
    from deltadiff.kernels.lora_linear_fp8 import scaled_mm

    x, w, a, b, gate, bias, dy = given = inputs(
        randn, 40, 144, 80, 3, F16, "cpu", F32, gate=(3,), bias=True
    )
    weight, needs = float8(w, block), [True] * 4
    y, s = scaled_mm.lora_linear_fwd(x, weight, 144, a, b, 0.7, gate, bias)
    grads = scaled_mm.lora_linear_bwd(dy, x, weight, 144, a, b, s, 0.7, gate, needs)
    found = dict(zip(("y", "x", "lora_A", "lora_B", "gate"), (y, *grads), strict=True))
    truth = outputs(lora_linear_ref, *doubles(given))
    for name, ours in found.items():
        error = (ours - truth[name]).norm() / truth[name].norm()
        assert error < (0.06 if name in ("y", "x") else 2e-3), (name, error)
    before = scaled_mm.bwd_before_da(
        dy, weight, 144, a, b, s, 0.7, gate, needs[:1] + [False, True, True]
    )
    assert torch.equal(before[0], grads[0]) and torch.equal(before[2], grads[2])
    torch.testing.assert_close((before[1][:, :3].T @ x).float(), grads[1], rtol=5e-3, atol=5e-2)


# ------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def hopper(gpu_path):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("sm_90")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FP8_PRODUCTS)
def test_output_and_gradients(backend, hopper):
    """What `deltadiff verify` says of all shapes, formats of scales and dtypes."""
    rows, ok = run("cuda", ["lora_linear_fp8"], backend, seed=5)
    assert ok, format_table([row for row in rows if row.ok is False])
    assert {row.path for row in rows} == {backend}


@pytest.mark.gpu
def test_activations_are_those_of_the_specification(hopper, randn):
    from deltadiff.kernels.lora_linear_fp8 import launch

    v, p = randn(300, 2064, dtype=BF16, device=hopper), randn(8, 2064, dtype=BF16, device=hopper)
    for columns in (128, 1024):
        v8, scales, *_ = launch.quantised(v, p, 1.0, None, None, columns // 128)
        rows = scales.T.repeat_interleave(columns, 1)[:, : v.shape[1]]
        assert torch.equal(v8.float() * rows, activations_fp8_ref(v, columns))


@pytest.mark.gpu
def test_other_strides_streams_and_few_tokens(hopper, randn):
    x, w, *rest = inputs(randn, 512, 256, 384, 4, BF16, hopper, F32)
    weight = float8(w, device=hopper)
    ours = outputs(lora_linear, x, weight, *rest, backend="fp8")
    strided = x.T.contiguous().T
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        theirs = outputs(lora_linear, strided, weight, *rest, backend="fp8")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    few = outputs(lora_linear, x[:7], weight, *rest[:-1], rest[-1][:7], backend="fp8")
    decoded = outputs(lora_linear, x[:7], weight, *rest[:-1], rest[-1][:7], backend="triton")
    assert all(torch.equal(few[name], decoded[name]) for name in few)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["graph", "checkpoint", "compile", "frozen pair"])
def test_ways_of_calling(how, hopper, randn):
    x, w, a, b, _, _, dy = inputs(randn, 512, 256, 384, 4, BF16, hopper, F32)
    weight = float8(w, device=hopper)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    if how == "frozen pair":
        leaves = leaves[:1]

    def layer(x, a, b):
        return lora_linear(x, weight, a, b, scaling=0.7, backend="fp8")

    def passes(layer):
        y = layer(x, a, b)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    expected = passes(layer)
    if how == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = passes(layer)
        graph.replay()
    elif how == "checkpoint":
        found = passes(lambda *args: checkpoint(layer, *args, use_reentrant=False))
    else:
        found = passes(torch.compile(layer, fullgraph=True) if how == "compile" else layer)
    assert all(torch.equal(t, e) for t, e in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("lean", [False, True])
def test_a_model_of_layers_in_fp8(lean, hopper, randn):
    """Trained by backend "fp8", beside the same model with 16-bit activations."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512,
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.randint(0, 512, (2, 256), device=hopper)
    losses = {}
    for backend in (None, "fp8"):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).to(hopper, BF16)
        quantise_(model, "fp8")
        report = swap_(model, r=8, lora_alpha=16, backend=backend, lean=lean)
        assert all((row.backend == "fp8") == (backend == "fp8") for row in report.rows)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = deltadiff.FusedAdamW(trained, lr=1e-2)
        for _ in range(20):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[backend] = loss.item()
    assert losses[None] < 5  # a guess costs log 512 = 6.2
    assert abs(losses["fp8"] - losses[None]) < 0.1 * losses[None]
