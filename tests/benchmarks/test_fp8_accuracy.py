"""benchmarks/fp8_accuracy.py: a whole measurement on a tiny model, and what is said of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from fp8 import float8_linear
from tiny_models import bert, one_thread, reviews  # noqa: F401

from deltadiff import swap_
from deltadiff.bench import fp8_accuracy
from deltadiff.bench.plots import stale_plots, write_plots
from deltadiff.ops.decode_fp8 import Float8
from deltadiff.ops.reference_fp8 import activations_fp8_ref, lora_linear_fp8_ref

FILE = Path(__file__).parents[2] / "benchmarks" / "fp8_accuracy.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fp8_accuracy", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def records(script, bert, reviews, tmp_path_factory, one_thread):  # noqa: F811
    folder = tmp_path_factory.mktemp("records")
    words = [bert, reviews, "--label-column", "label", "--steps", "3", "--batch-size", "8"]
    words += ["--device", "cpu", "--seeds", "2", "--simulate", "--output", str(folder)]
    assert script.main(words) == 0
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_every_base_is_trained_with_every_seed(script, records):
    runs = [r for r in records if r["part"] == "run"]
    cases = {(r["base"], r["seed"]) for r in runs}
    assert cases == {(base.name, seed) for base in script.BASES for seed in (0, 1)}
    assert len(runs) == len(cases) and {r["op"] for r in records} == {"fp8_accuracy"}
    assert all(r["simulated"] and r["gpu"] and r["torch"] and "commit" in r for r in records)
    losses = {(r["base"], r["seed"]): r["final_loss"] for r in runs}
    # No base stands for another, but all of so small a weight is one block.
    assert len(set(losses.values())) == 2 * (len(script.BASES) - 1)
    assert all(losses["FP8, block", seed] == losses["FP8, tensor", seed] for seed in (0, 1))
    for r in runs:
        assert len(r["curve"]) == 1 and r["note"] is None
        assert 0 <= r["heldout"]["accuracy"] <= 1 and r["heldout_rows"] == 40
        assert r["final_loss"] == pytest.approx(losses["bf16", r["seed"]], rel=0.1)


def test_errors_are_those_of_the_format(script, records):
    """bf16 keeps 8 bits, FP8 4, and a product with x in FP8 as well has two such errors."""
    layers = {(r["layer"], r["base"]): r for r in records if r["part"] == "layer"}
    types = {layer for layer, _ in layers}
    assert "bert.encoder.layer.*.attention.self.query" in types and len(types) == 7
    assert len(layers) == 7 * len(script.PRODUCTS)
    for layer in types:
        plain, decoded, both = (
            layers[layer, base]["mean"] for base in ("bf16", "FP8 decoded, row", "FP8, row")
        )
        for output in ("y", "dx"):
            assert 1e-4 < plain[output] < 6e-3 < decoded[output] < both[output] < 8e-2
        for output in ("dA", "dB"):  # which are products of 16 bits everywhere
            assert plain[output] < 6e-3 and both[output] < 6e-3
        assert layers[layer, "FP8, row"]["by"] == "specification"
    assert all(r["worst"][o] >= r["mean"][o] > 0 for r in layers.values() for o in script.OUTPUTS)


def test_e5m2_is_measured_beside_e4m3(records):
    found = {(r["layer"], r["base"], r["dy"]): r["mean"] for r in records if r["part"] == "dy"}
    pairs = [key for key in found if key[2] == "e4m3"]
    assert len(pairs) == 7 * 3 and len(found) == 2 * len(pairs)
    for layer, base, _ in pairs:
        assert found[layer, base, "e4m3"]["dx"] < found[layer, base, "e5m2"]["dx"] < 0.12


def test_dy_in_e5m2():
    assert activations_fp8_ref(torch.tensor([[57344.0, 9.0]]), 2, torch.float8_e5m2).tolist() == [
        [57344, 8]
    ]
    layer = float8_linear(32, 16, dtype=torch.float64)
    weight, x = Float8.of(layer), torch.randn(5, 16, dtype=torch.float64)
    pair = torch.zeros(2, 16).double(), torch.zeros(32, 2).double()
    dy = torch.randn(5, 32, dtype=torch.float64)
    x.requires_grad_()
    y = lora_linear_fp8_ref(x, *weight, *pair, scaling=1.0, dy_dtype=torch.float8_e5m2)
    w = weight.data.double() * weight.scale.double()
    expected = activations_fp8_ref(dy, 128, torch.float8_e5m2).double() @ w
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected)


def test_the_simulated_layer_is_the_specification(script):
    model = torch.nn.Sequential(float8_linear(32, 16, dtype=torch.float32))
    swap_(model, r=2, target_modules=lambda *_: True, seed=0)
    model[0].lora_B.data.normal_()
    x = torch.randn(2, 3, 16)
    own = model(x)
    model[0].register_forward_hook(script.specified)
    layer = model[0]
    expected = lora_linear_fp8_ref(
        x.view(6, 16), *Float8.of(layer.base_layer), layer.lora_A, layer.lora_B,
        scaling=layer.scaling, bias=layer.bias,
    )  # fmt: skip
    assert torch.equal(model(x), expected.view(2, 3, 32)) and not torch.equal(model(x), own)


def test_without_the_kernel_it_says_what_to_do(script, bert, reviews, capsys):  # noqa: F811
    words = [bert, reviews, "--label-column", "label", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
    assert 'backend "fp8" is not available: ' in (said := capsys.readouterr().err)
    assert "--simulate" in said


def run(base: str, seed: int, loss: float | None, **more) -> dict:
    about = {"op": "fp8_accuracy", "part": "run", "model": "a model", "data": "a text", "r": 8}
    about |= {"steps": 20, "batch": 4, "simulated": False, "gpu": "A GPU", "note": None}
    curve = [] if loss is None else [loss + 1, loss]
    return {**about, "base": base, "seed": seed, "final_loss": loss, "heldout": {}, "curve": curve,
            **more}  # fmt: skip


def test_the_verdict_is_by_the_deviation_of_bf16_over_its_seeds():
    plain = [run("bf16", seed, loss) for seed, loss in enumerate((0.3, 0.4, 0.5))]
    near = [run("FP8, block", seed, loss + 0.09) for seed, loss in enumerate((0.3, 0.4, 0.5))]
    far = [run("FP8, tensor", seed, loss - 0.11) for seed, loss in enumerate((0.3, 0.4, 0.5))]
    found = fp8_accuracy.values(plain + near + far, "final_loss")
    verdict = fp8_accuracy.verdict(found, "FP8, block")
    assert verdict.difference == pytest.approx(0.09) and verdict.deviation == pytest.approx(0.1)
    assert verdict.within is True
    assert fp8_accuracy.verdict(found, "FP8, tensor").within is False
    alone = fp8_accuracy.values([plain[0], near[0]], "final_loss")
    assert fp8_accuracy.verdict(alone, "FP8, block").within is None
    gone = run("FP8, tensor", 0, None, note="the loss is nan at step 1")
    text = fp8_accuracy.tables([*plain, *near, gone])
    assert "by the sm_90 kernel" in text
    assert "| FP8, block | 3 | 0.4900 ± 0.1000 | +0.0900 | yes |" in text
    assert "| FP8, tensor | 1, 1 diverged |  |  | no |" in text


def test_the_tables_and_the_picture(records, tmp_path):
    pytest.importorskip("matplotlib")
    text = fp8_accuracy.tables(records)
    assert "(simulated)" in text and "FP8, tensor: e5m2" in text
    (path,) = write_plots(records, tmp_path)
    assert path.name.startswith("fp8-accuracy-") and stale_plots(records, tmp_path) == []
