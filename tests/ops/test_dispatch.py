"""Which backend and which kernel run a call: by device, layer, dtype and number of tokens."""

import pytest
import torch
from lora_linear_calls import inputs, outputs

import deltadiff
from deltadiff import lora_linear
from deltadiff.errors import BackendUnavailableError
from deltadiff.ops import dispatch
from deltadiff.ops.backends import BACKENDS, LAUNCHERS
from deltadiff.ops.dispatch import KERNELS, Dispatch, Layer, choose_path, runs_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU, LAYER = torch.device("cpu"), (4096, 4096, 16)


def kernels_at(chosen: Dispatch, *tokens: int) -> list[str]:
    return [chosen.at(m).name for m in tokens]


# --------------------------------------------------------------------------- the backend


def test_choose_path_names_what_runs(path):
    asked = deltadiff.choose_path(path.device, F32, path.backend)
    assert asked.backend == path.backend
    by_itself = deltadiff.choose_path(path.device, F32)
    assert by_itself.backend == ("cpp" if path.device.type == "cpu" else "triton")


@pytest.mark.parametrize(
    "layer, reason",
    [
        ((4096, 11008, 16), None),
        ((8, 8, 1), None),
        ((4096, 4096, 32), None),
        ((4096, 4096, 256), None),
        ((4096, 4096, 257), "rank 257 > 256"),
        ((12, 4096, 8), "12 x 4096: TMA needs rows of a multiple of 16 bytes"),
        ((4096, 777, 8), "4096 x 777: TMA needs rows of a multiple of 16 bytes"),
    ],
)
def test_layers_that_the_sm_90_kernel_takes(layer, reason, on_capability):
    device = on_capability(9, 0)
    for dtype in (BF16, F16):
        chosen = choose_path(device, dtype, None, layer)
        assert chosen.backend == ("triton" if reason else "hopper")
        assert (reason or "sm_90") in chosen.reason
        if reason:
            with pytest.raises(BackendUnavailableError, match=reason):
                choose_path(device, dtype, "hopper", layer)
        else:
            assert choose_path(device, dtype, "hopper", layer).backend == "hopper"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_take_the_portable_kernels(capability, on_capability):
    device = on_capability(*capability)
    assert choose_path(device, BF16, None, LAYER).backend == "triton"
    name = "sm_{}{}".format(*capability)
    with pytest.raises(BackendUnavailableError, match=f"need sm_90; cuda:0 is {name}"):
        choose_path(device, BF16, "hopper", LAYER)


def test_older_gpus_take_the_reference(on_capability):
    chosen = choose_path(on_capability(7, 5), F32, None, LAYER)
    assert chosen.backend == "reference" and "need sm_80" in chosen.reason
    assert kernels_at(chosen, 1, 1000) == ["reference"] * 2


def test_a_transposed_weight_takes_the_portable_kernels(on_capability):
    device = on_capability(9, 0)
    chosen = choose_path(device, BF16, None, LAYER, transposed=True)
    assert chosen.backend == "triton" and "would copy" in chosen.reason
    asked = choose_path(device, BF16, "hopper", LAYER, transposed=True)
    assert asked.backend == "hopper"


def test_dropout_takes_the_portable_kernels(on_capability):
    device = on_capability(9, 0)
    chosen = choose_path(device, BF16, None, LAYER, True)
    assert chosen.backend == "triton" and "the sm_90 kernel has no dropout" in chosen.reason
    assert kernels_at(chosen, 1, 300, 1000) == ["portable"] * 3
    with pytest.raises(BackendUnavailableError, match="the sm_90 kernel has no dropout"):
        choose_path(device, BF16, "hopper", LAYER, True)


def test_the_sm_90_kernel_is_for_16_bits_and_for_lora_linear_only(on_capability):
    device = on_capability(9, 0)
    assert choose_path(device, F32, None, LAYER).backend == "triton"
    assert choose_path(device, torch.float64, None, LAYER).backend == "reference"
    assert choose_path(device, BF16).backend == "triton"
    with pytest.raises(BackendUnavailableError, match="for bfloat16 and float16"):
        choose_path(device, F32, "hopper", LAYER)
    with pytest.raises(BackendUnavailableError, match="float64 goes to the reference"):
        choose_path(device, torch.float64, "hopper", LAYER)
    with pytest.raises(BackendUnavailableError, match="for lora_linear only"):
        choose_path(device, BF16, "hopper")
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPUs"):
        choose_path(CPU, BF16, "hopper", LAYER)


# ---------------------------------------------------------------------------- the kernel


def test_the_number_of_tokens_chooses_on_sm_90(on_capability):
    chosen = choose_path(on_capability(9, 0), BF16, None, LAYER)
    assert kernels_at(chosen, 0, 1, 255) == ["few_tokens"] * 3
    assert kernels_at(chosen, 256, 8192, 128 * 0x7FFF) == ["hopper"] * 3
    assert kernels_at(chosen, 128 * 0x7FFF + 1) == ["portable"]
    assert chosen.at(255).backend == "triton" and chosen.at(256).backend == "hopper"
    few, _, many = chosen.runs
    assert few.reason == "hopper takes 256 tokens or more"
    assert many.reason == (
        "hopper takes up to 4,194,176 tokens; triton few_tokens takes up to 511 tokens"
    )
    assert chosen.in_words() == (
        "triton few_tokens (up to 255 tokens), hopper (256 to 4,194,176 tokens), "
        "triton portable (more)"
    )


def test_the_number_of_tokens_chooses_on_other_gpus(on_capability):
    chosen = choose_path(on_capability(8, 0), BF16, None, LAYER)
    assert kernels_at(chosen, 0, 511, 512) == ["few_tokens", "few_tokens", "portable"]
    assert chosen.in_words() == "triton few_tokens (up to 511 tokens), triton portable (more)"


@pytest.mark.parametrize(
    "layer",
    [
        Layer(4096, 4096, 65, BF16),
        Layer(4096, 4100, 8, BF16),
        Layer(4100, 4096, 8, F16),
        Layer(4096, 4096, 8, F32),
        Layer(4096, 4096, 8, BF16, dropout=True),
    ],
    ids=str,
)
def test_layers_that_the_kernel_for_few_tokens_does_not_take(layer):
    few_tokens = next(kernel for kernel in KERNELS if kernel.name == "few_tokens")
    assert few_tokens.why_not(layer)
    (run,) = runs_of("triton", layer)
    assert run.kernel.name == "portable"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_one_kernel_runs_every_number_of_tokens(backend):
    chosen = choose_path(CPU, F32, backend, LAYER)
    assert kernels_at(chosen, 0, 1, 10**9) == [backend] * 3
    assert chosen.in_words() == backend


def test_the_runs_cover_every_number_of_tokens_once():
    for backend in BACKENDS:
        for r in (8, 65, 300):
            runs = runs_of(backend, Layer(64, 64, r, BF16))
            starts = [run.tokens.start for run in runs]
            stops = [run.tokens.stop for run in runs]
            assert starts == [0, *stops[:-1]] and stops[-1] > 2**60
            assert all(run.kernel.why_not(Layer(64, 64, r, BF16)) is None for run in runs)


def test_a_new_kernel_needs_its_entry_and_its_launchers(monkeypatch, randn):
    """A kernel of its own for one token, on top of the portable one: what adding one takes."""
    from deltadiff.kernels.lora_linear import portable

    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs where there is no GPU")
    called = []

    class OneToken:
        @staticmethod
        def lora_linear_fwd(*args, **options):
            called.append("fwd")
            return portable.lora_linear_fwd(*args, **options)

        @staticmethod
        def lora_linear_bwd(*args, **options):
            called.append("bwd")
            return portable.lora_linear_bwd(*args, **options)

    entry = dispatch.Kernel("one_token", "triton", tokens=range(1, 2))
    monkeypatch.setattr(dispatch, "KERNELS", (entry, *KERNELS))
    monkeypatch.setitem(LAUNCHERS, "one_token", OneToken)
    runs_of.cache_clear()
    choose_path.cache_clear()
    try:
        assert kernels_at(choose_path(CPU, F32, "triton", (24, 16, 2)), 1, 2) == [
            "one_token", "portable"
        ]  # fmt: skip
        for tokens in (1, 2):
            outputs(lora_linear, *inputs(randn, tokens, 16, 24, 2, F32, CPU), backend="triton")
    finally:
        runs_of.cache_clear()
        choose_path.cache_clear()
    assert called == ["fwd", "bwd"]


def test_both_kernels_of_triton_run_calls_of_one_layer(randn, monkeypatch):
    """The number of tokens is looked at in each call, forward and backward."""
    from deltadiff.kernels.lora_linear import few_tokens as launchers

    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs where there is no GPU")
    seen, original = [], launchers.lora_linear_bwd
    monkeypatch.setattr(
        launchers, "lora_linear_bwd", lambda *args: seen.append(args[0].shape[0]) or original(*args)
    )
    for tokens in (0, 3, 512):
        outputs(lora_linear, *inputs(randn, tokens, 16, 24, 2, F16, CPU), backend="triton")
    assert seen == [0, 3]


@pytest.mark.parametrize("need_A", [False, True])
@pytest.mark.parametrize("need_gate", [False, True])
def test_x_is_kept_where_the_backward_pass_reads_it(path, need_A, need_gate, randn):
    """The autograd functions of Python and C++ follow the rule of `dispatch.keeps_x`."""
    if path.backend == "reference":
        pytest.skip("the reference leaves it to PyTorch what is kept")
    x, w, a, b, gate, _, _ = inputs(randn, 6, 16, 12, 2, F32, path.device, gate=(2,))
    a.requires_grad_(need_A), gate.requires_grad_(need_gate), b.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear(x, w, a, b, scaling=0.7, gate=gate, backend=path.backend)
    expected = dispatch.keeps_x(path.backend, need_A, need_gate)
    assert any(t.data_ptr() == x.data_ptr() for t in kept) == expected
    y.sum().backward()
