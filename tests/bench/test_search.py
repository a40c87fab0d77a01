"""`deltadiff bench search`: `Search` and its peer in eager PyTorch take the same steps."""

import pytest
import torch
from tiny_bench import SEARCHED

from deltadiff.bench import search as bench_search
from deltadiff.bench.eager_search import EagerSearch
from deltadiff.bench.models import build_model
from deltadiff.bench.search import (
    MODES,
    VARIANTS,
    fused_search,
    loss_of,
    random_batches,
    search_case,
    search_step,
    sharing_weights,
)
from deltadiff.bench.timing import compare

pytest.importorskip("transformers")
CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.mark.parametrize("shape", SEARCHED, ids=lambda shape: shape.model.name)
def test_steps_of_the_search_compute_the_same(shape):
    model = build_model(shape.model, torch.float64, CPU)
    batches = random_batches(model, shape, CPU)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    both = [make(sharing_weights(model), torch.float64) for make in (fused_search, EagerSearch)]
    with torch.no_grad():  # large pairs, so that the gates matter
        for layer in [layer for search in both for layer in search.layers.values()]:
            layer.lora_A.mul_(20)
            layer.lora_B.mul_(20)
    start = [layer.lora_A.detach().clone() for layer in both[0].layers.values()]
    for mode in ("gate", "inner", "search"):  # two steps on each
        for search in both:
            search_step(search, mode, batches)()

    ours, eager = both
    assert ours.layers.keys() == eager.layers.keys() and ours.logits.shape[0] == 3
    # Gradients agree to 1e-15; Adam of a logit rounds to float32.
    torch.testing.assert_close(ours.logits, eager.logits, rtol=1e-6, atol=0)
    assert ours.logits.abs().mean() > 5e-3
    for a, mine, other in zip(start, ours.layers.values(), eager.layers.values(), strict=True):
        for name in ("lora_A", "lora_B"):
            found, expected = getattr(mine, name), getattr(other, name)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert (mine.lora_A - a).abs().mean() > 1e-4
    losses = [loss_of(search.model, batches[0]) for search in both]
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def check_variants(device):
    for shape in SEARCHED:
        for mode in MODES:
            found = compare(search_case(shape, mode, BF16), device, budget_s=0.01)
            assert [r["variant"] for r in found] == list(VARIANTS)
            for r in found:
                assert r["note"] is None and r["p50_ms"] > 0 and r["shape"]["M"] == 16
                adapters = None if r["variant"] == "frozen" else "float32"
                assert (r["op"], r["mode"], r["adapter_dtype"]) == ("search", mode, adapters)


def test_every_variant_of_the_search_runs():
    check_variants(CPU)


@pytest.mark.gpu
def test_every_variant_of_the_search_runs_on_a_gpu():
    check_variants(torch.device("cuda", torch.cuda.current_device()))


def test_the_floor_of_the_search_takes_as_many_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_search, "loss_of", lambda *args: seen.append(1) or loss_of(*args))
    for mode, batches in (("gate", 1), ("inner", 1), ("search", 2)):
        variants = search_case(SEARCHED[0], mode, F32).build(CPU)
        assert set(variants) == set(VARIANTS) - {"eager-cast"}
        for variant in variants.values():
            call = variant.make()
            seen.clear()
            call()
            assert len(seen) == batches
