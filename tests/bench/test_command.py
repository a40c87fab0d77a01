"""`deltadiff bench`: records, the variants' equal work, the command's files, and plots."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from deltadiff import delta_update_
from deltadiff.__main__ import main
from deltadiff.bench import (
    layer as bench_layer,
)
from deltadiff.bench import (
    model as bench_model,
)
from deltadiff.bench import (
    plots as bench_plots,
)
from deltadiff.bench import (
    search as bench_search,
)
from deltadiff.bench import (
    step as bench_step,
)
from deltadiff.bench.timing import Case, Variant, compare, format_table

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
NEEDED = {
    "op", "variant", "mode", "graph", "shape", "rounding", "dtype", "p20_ms", "p50_ms", "p80_ms",
    "over_floor", "host_ms", "peak_mib", "gpu", "driver", "torch", "triton", "commit",
}  # fmt: skip
TINY = {
    **bench_model.SMALL, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "vocab_size": 64,
}  # fmt: skip


def case_of(**calls) -> Case:
    fields = {"op": "x", "mode": "step", "graph": False, "shape": {"M": 1}, "dtype": "float32"}
    return Case(fields, "floor", lambda _: {n: Variant(lambda c=c: c) for n, c in calls.items()})


def fails(error):
    def call():
        raise error

    return call


# ------------------------------------------------------------------ measuring


def test_records_of_a_case():
    slow = torch.randn(200, 200)
    case = case_of(floor=lambda: None, slow=lambda: slow @ slow)
    floor, other = compare(case, CPU, budget_s=0.01)
    assert (floor["variant"], floor["over_floor"]) == ("floor", 1)
    assert other["variant"] == "slow" and other["over_floor"] > 2
    for r in (floor, other):
        assert 0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"]
        assert r["host_ms"] is r["peak_mib"] is r["note"] is None  # there is no GPU


def test_variants_take_turns_and_the_wanted_ones_only():
    order = []
    case = case_of(**{n: lambda n=n: order.append(n) for n in ("floor", "a", "b")})
    rounds = []

    def repeat(one_round, n):
        order.clear()
        one_round()
        rounds.append(n)

    found = compare(case, CPU, ["b"], repeat=repeat)
    assert [r["variant"] for r in found] == ["floor", "b"] and rounds[0] >= 5
    assert list(dict.fromkeys(order)) == ["floor", "b"]


def test_a_variant_that_fails_costs_the_others_nothing():
    out_of_memory = torch.OutOfMemoryError("tried to allocate")
    case = case_of(floor=lambda: None, big=fails(out_of_memory), bad=fails(KeyError("x")))
    floor, big, bad = compare(case, CPU, budget_s=0.01)
    assert floor["over_floor"] == 1
    assert (big["note"], bad["note"]) == ("out of memory", "KeyError: 'x'")
    assert big["p50_ms"] is big["over_floor"] is bad["p50_ms"] is None
    assert "bad: KeyError: 'x'" in format_table([floor, big, bad])


# ------------------------------------------------------ variants do equal work


@pytest.mark.parametrize("name", ["deltadiff", "deltadiff-fp32", "peft", "peft-bf16"])
def test_layers_compute_the_same(name, randint):
    weight, lora_A, lora_B = randint(24, 16), randint(4, 16), randint(24, 4)
    x, dy = randint(8, 16).requires_grad_(), randint(8, 24)

    def outputs(variant):
        layer, factors = bench_layer.LAYERS[variant](weight, lora_A, lora_B, F32)
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *factors], dy)]

    for ours, eager in zip(outputs(name), outputs("eager"), strict=True):
        assert torch.equal(ours, eager)  # integers: every sum is exact


def test_weight_updates_compute_the_same(randint):
    weight, a, b = randint(24, 16), randint(4, 16), randint(24, 4)
    da, db = randint(4, 16), randint(24, 4)
    expected = delta_update_(weight.clone(), a, b, da, db, scale=0.5)
    for update in (bench_step.naive_update, bench_step.addmm_update):
        w = weight.clone()
        update([w], [(b, a)], [(b - db, a - da)], 0.5)
        assert torch.equal(w, expected)


def test_the_floor_moves_the_bytes_of_the_case(monkeypatch):
    case = bench_step.delta_update_case([(24, 16)] * 3, 4, BF16, "remainder", False)
    # W and its remainder are read and written; the four factors are read
    assert case.fields["bytes"] == 3 * (2 * 24 * 16 * (2 + 2) + 2 * 4 * 4 * (24 + 16))
    monkeypatch.setattr(bench_step, "COPY_BYTES", 1000)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, source: copied.append(t.numel()))
    bench_step.copies(case.fields["bytes"], CPU)()
    assert len(copied) > 1 and 2 * sum(copied) == case.fields["bytes"]


def step_cases(graph):
    shapes = [(24, 16), (16, 40)]
    yield bench_step.adamw_case(shapes, 4, True, graph)
    for rounding in bench_step.ROUNDINGS:
        yield bench_step.delta_update_case(shapes, 4, BF16, rounding, graph)
        yield bench_step.step_case(shapes, 4, BF16, rounding, graph)


def test_every_variant_of_the_step_runs():
    seen = set()
    for case in step_cases(graph=False):
        for r in compare(case, CPU, budget_s=0.01):
            assert r["note"] is None and r["p50_ms"] > 0
            seen.add(r["variant"])
    assert seen == set(bench_step.VARIANTS)


@pytest.mark.gpu
def test_every_variant_runs_as_a_cuda_graph():
    device = torch.device("cuda", torch.cuda.current_device())
    layer = bench_layer.layer_case(64, 128, 128, 8, "forward+backward", BF16, True)
    for case in [layer, *step_cases(graph=True)]:
        for r in compare(case, device, budget_s=0.01):
            assert r["note"] is None and r["host_ms"] > 0 and r["peak_mib"] is not None


# ---------------------------------------------------------------------- model


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path


def test_model_variants_leave_the_model_as_it_was(config):
    settings = bench_model.settings_for(CPU, config=config, batch=1, sequence=8, steps=1)
    name, model = bench_model.build_model(CPU, settings)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    labels = torch.randint(TINY["vocab_size"], (1, 8))
    embeds = model.get_input_embeddings()(labels).detach().requires_grad_()
    for method in bench_model.methods():
        timing = bench_model._measure(
            method, CPU, (("q_proj", "v_proj"),), model, embeds, labels, settings
        )
        assert timing.note is None and len(timing.seconds) == 1
        assert model.state_dict().keys() == before.keys()
        assert not any(p.requires_grad for p in model.parameters())
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same == (method.method in ("LoRA", "Delta-LoRA factored"))
        model.load_state_dict(before)
    assert name == "tiny"


def test_model_command(config, tmp_path, capsys):
    argv = ["bench", "model", "--device", "cpu", "--config", str(config), "--steps", "1"]
    argv += ["--batch", "1", "--sequence", "8", "--r", "4", "--output", str(tmp_path)]
    assert main(argv) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("model-*.json")
    records = json.loads(path.read_text())
    assert all(r.keys() >= NEEDED | {"model", "targets", "checkpointing"} for r in records)
    assert {r["targets"] for r in records} == {"q,v", "all", None}
    assert {r["checkpointing"] for r in records if r["variant"] == "deltadiff"} == {False, True}
    assert all(r["over_floor"] == 1 for r in records if r["variant"] == "frozen")
    assert bench_plots.stale_plots(records, tmp_path) == []


def test_one_slow_frozen_step_is_no_floor(config, monkeypatch):
    """Each of them in turn."""
    settings = bench_model.settings_for(CPU, config=config, batch=1, sequence=8)
    frozen = itertools.count()
    slow = None

    def seconds(step, calls, device, flush):
        is_frozen = getattr(step, "func", None) is bench_model._forward_backward
        return [2.0 if is_frozen and next(frozen) == slow else 1.0]

    monkeypatch.setattr(bench_model, "sample", seconds)
    for slow in range(9):
        frozen = itertools.count()
        records = list(bench_model.model_records(CPU, settings, ["all"], [False], ["deltadiff"]))
        assert next(frozen) > slow and {r["over_floor"] for r in records} == {1.0}


def test_config_that_cannot_be_used(tmp_path, capsys):
    path = tmp_path / "config.json"
    for text in ("{", '{"model_type": "resnet"}'):
        path.write_text(text)
        assert main(["bench", "model", "--device", "cpu", "--config", str(path)]) == 2
        assert "deltadiff: --config: got" in capsys.readouterr().err


# --------------------------------------------------------------------- search

SEARCHED = [
    dataclasses.replace(
        shape, config={**shape.config, **TINY, "model_type": kind, "num_hidden_layers": 3},
        batch=2, sequence=8,
    )
    for kind, shape in (("bert", bench_search.BERT), ("llama", bench_search.LLAMA_1B))
]  # fmt: skip


@pytest.mark.parametrize("shape", SEARCHED, ids=lambda shape: shape.name)
def test_steps_of_the_search_compute_the_same(shape):
    model = bench_search.build_model(shape, torch.float64, CPU)
    batches = bench_search.random_batches(model, shape, CPU)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    both = [
        make(bench_search.sharing_weights(model), torch.float64)
        for make in (bench_search.ours, bench_search.EagerSearch)
    ]
    with torch.no_grad():  # large pairs, for gates to matter
        for layer in [layer for search in both for layer in search.layers.values()]:
            layer.lora_A.mul_(20)
            layer.lora_B.mul_(20)
    start = [layer.lora_A.detach().clone() for layer in both[0].layers.values()]
    for mode in ("gate", "inner", "search"):  # two steps on each
        for search in both:
            bench_search.search_step(search, mode, batches)()

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
    losses = [bench_search.loss_of(search.model, batches[0]) for search in both]
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def check_search_variants(device):
    for shape in SEARCHED:
        for mode in bench_search.MODES:
            found = compare(bench_search.search_case(shape, mode, BF16), device, budget_s=0.01)
            assert [r["variant"] for r in found] == list(bench_search.VARIANTS)
            for r in found:
                assert r["note"] is None and r["p50_ms"] > 0 and r["shape"]["M"] == 16
                adapters = None if r["variant"] == "frozen" else "float32"
                assert (r["op"], r["mode"], r["adapter_dtype"]) == ("search", mode, adapters)


def test_every_variant_of_the_search_runs():
    check_search_variants(CPU)


@pytest.mark.gpu
def test_every_variant_of_the_search_runs_on_a_gpu():
    check_search_variants(torch.device("cuda", torch.cuda.current_device()))


def test_the_floor_of_the_search_takes_as_many_batches(monkeypatch):
    seen, loss_of = [], bench_search.loss_of
    monkeypatch.setattr(bench_search, "loss_of", lambda *args: seen.append(1) or loss_of(*args))
    for mode, batches in (("gate", 1), ("inner", 1), ("search", 2)):
        variants = bench_search.search_case(SEARCHED[0], mode, F32).build(CPU)
        assert set(variants) == set(bench_search.VARIANTS) - {"eager-cast"}
        for variant in variants.values():
            call = variant.make()
            seen.clear()
            call()
            assert len(seen) == batches


# ------------------------------------------------------------ command and plots


def test_search_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_search, "LLAMA_SMALL", SEARCHED[1])
    argv = ["bench", "search", "--device", "cpu", "--variants", "eager", "--output", str(tmp_path)]
    assert main([*argv, "--quick"]) == 0
    assert main(argv) == 0, capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert all(r.keys() >= NEEDED | {"model", "adapter_dtype"} for r in records)
    assert [(r["mode"], r["variant"]) for r in records] == [
        (mode, variant) for mode in bench_search.MODES for variant in ("frozen", "eager")
    ]
    assert all((r["over_floor"] == 1) == (r["variant"] == "frozen") for r in records)


def test_layer_command(tmp_path, capsys):
    argv = ["bench", "layer", "--device", "cpu", "--quick", "--shapes", "16x24x32", "--ranks", "4"]
    argv += ["8", "--variants", "deltadiff", "eager", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert "16x24x32 r8" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()  # no plot of two points
    records = json.loads(path.read_text())
    assert len(records) == 2 * 2 * 3
    for r in records:
        assert r.keys() >= NEEDED and r["op"] == "lora_linear" and math.isfinite(r["over_floor"])
    assert {r["variant"] for r in records} == {"frozen", "deltadiff", "eager"}


@pytest.mark.parametrize("words", [["layer", "--shapes", "16x24"], ["layer", "--ranks", "0"], []])
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *words])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_plots_belong_to_their_records(tmp_path):
    fields = {"op": "lora_linear", "mode": "forward+backward", "graph": True, "gpu": "A GPU"}
    records = [
        {**fields, "variant": v, "shape": {"M": m, "K": 4096, "N": 4096, "r": 16},
         "p50_ms": 0.1, "over_floor": 1.0 + m / 1000}
        for v in ("frozen", "deltadiff") for m in (1, 16, 64)
    ]  # fmt: skip
    (path,) = bench_plots.write_plots(records, tmp_path)
    assert path.name == "layer-a-gpu.png"
    assert bench_plots.stale_plots(records[::-1], tmp_path) == []
    records[0]["p50_ms"] = 0.2
    assert bench_plots.stale_plots(records, tmp_path) == [path]
    path.unlink()
    assert bench_plots.stale_plots(records, tmp_path) == [path]
    assert bench_plots.plots(records[:2], tmp_path) == {}  # too few points
