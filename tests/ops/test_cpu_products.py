"""What the C++ kernels make of layouts and shapes for which PyTorch's own products are a trap."""

import pytest
import torch
from lora_linear_calls import doubles, inputs, outputs

from deltadiff import adamw_step_, delta_update_, lora_linear
from deltadiff.ops import reference as ref
from deltadiff.verify.delta_update import eager_delta_update

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def with_gaps(t):
    """The same values, in rows with NaN between them."""
    wide = t.new_full((t.shape[0], t.shape[1] + 8), torch.nan)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


@pytest.mark.parametrize("k, n", [(3, 40), (38, 108), (33, 241), (64, 96)])
def test_gaps_between_rows_are_not_read(k, n, randn, assert_close):
    """With AMX, PyTorch 2.13 takes them for elements where k is no multiple of 32."""
    given = inputs(randn, 300, k, n, 5, BF16, "cpu", bias=True)
    eager, truth = (
        outputs(ref.lora_linear_ref, *given),
        outputs(ref.lora_linear_ref, *doubles(given)),
    )
    apart = [with_gaps(t) if t is not None and t.dim() == 2 else t for t in given]
    ours = outputs(lora_linear, *apart, backend="cpp")
    for name, expected in truth.items():
        assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3)


@pytest.mark.parametrize("k", [1, 5])
def test_a_long_sum_for_few_columns(k, randn):
    """Where PyTorch takes a product of a matrix and a vector, which adds up in parts."""
    r, scale, ours, eager = 256, 0.07 / 16, 0.0, 0.0
    for _ in range(60):
        w = randn(32, k, scale=0.05)
        given = [randn(*shape, scale=0.7) for shape in ((r, k), (32, r), (r, k), (32, r))]
        truth = ref.delta_update_ref_(w.double(), *doubles(given), scale=scale)
        found = delta_update_(w.clone(), *given, scale=scale, backend="cpp")
        ours += (found.double() - truth).square().sum()
        eager += (eager_delta_update(w, *given, scale).double() - truth).square().sum()
    assert ours.sqrt() < 2 * eager.sqrt()


@pytest.mark.parametrize("tokens, k, n", [(1, 300, 200), (3, 48, 64), (40, 5, 9), (200, 9, 5)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_small_low_rank_term_beside_a_few_rows_or_columns(
    tokens, k, n, dropout, by_columns, randn
):
    """MKL may add the terms of such a product one after the other to what is there."""
    r, ours, eager = 255, torch.zeros(2), torch.zeros(2)
    for _ in range(20):
        given = inputs(randn, tokens, k, n, r, F32, "cpu")
        given = [t.T.contiguous().T if by_columns and t is not None else t for t in given]
        how = {"scaling": 0.01, "dropout": dropout}
        truth = outputs(ref.lora_linear_ref, *doubles(given), **how)
        found = outputs(lora_linear, *given, backend="cpp", **how)
        usual = outputs(ref.lora_linear_ref, *given, **how)
        for i, name in enumerate(("y", "x")):
            ours[i] += (found[name].double() - truth[name]).square().sum()
            eager[i] += (usual[name].double() - truth[name]).square().sum()
    assert (ours.sqrt() < 2 * eager.sqrt()).all(), (ours, eager)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_moments_of_two_dtypes_in_one_list(dtype, randn):
    shapes, moments = [(5, 8), (40,), (3, 3)], [F32, dtype, F32]

    def tensors():
        torch.manual_seed(1)
        params, grads = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
        exp_avgs = [torch.randn(s).to(d) for s, d in zip(shapes, moments, strict=True)]
        return [params, grads, exp_avgs, [t.abs() for t in exp_avgs]]

    together, apart = tensors(), tensors()
    adamw_step_(*together, torch.zeros(3), lr=0.1, backend="cpp")
    for i in range(3):
        adamw_step_(*([ts[i]] for ts in apart), torch.zeros(1), lr=0.1, backend="cpp")
    for ours, expected in zip(together, apart, strict=True):
        assert all(map(torch.equal, ours, expected))
