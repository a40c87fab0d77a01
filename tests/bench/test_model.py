"""`deltadiff bench model`: methods that leave the model as it was, and what they are held to."""

import itertools

import pytest
import torch
from tiny_bench import LLAMA

from deltadiff.bench import clocks
from deltadiff.bench.methods import forward_backward, methods
from deltadiff.bench.model import measure_method, model_records, settings_for
from deltadiff.bench.models import BASES, build_model, random_batch, shape_of_file

pytest.importorskip("transformers")
CPU = torch.device("cpu")


def test_methods_leave_the_model_as_it_was(llama_config):
    settings = settings_for(CPU, config=llama_config, batch=1, sequence=8, steps=1)
    shape = shape_of_file(llama_config)
    model = build_model(shape, torch.float32, CPU)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = random_batch(model, shape, 1, 8, CPU)
    batch.embeds.requires_grad_()
    for method in (m for m in methods() if m.variant != "deltadiff-fp8"):  # which needs a GPU
        timing = measure_method(method, "q,v", model, batch, settings)
        assert timing.note is None and len(timing.seconds) == 1
        assert model.state_dict().keys() == before.keys()
        assert not any(p.requires_grad for p in model.parameters())
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same == (method.method in ("LoRA", "Delta-LoRA factored"))
        model.load_state_dict(before)
    assert shape.name == "tiny" and model.config.vocab_size == LLAMA["vocab_size"]


def test_one_slow_frozen_step_is_no_floor(llama_config, monkeypatch):
    """Each of them in turn."""
    settings = settings_for(CPU, config=llama_config, batch=1, sequence=8)
    frozen = itertools.count()
    slow = None

    def seconds(step, calls, device, flush):
        is_frozen = getattr(step, "func", None) is forward_backward
        return [2.0 if is_frozen and next(frozen) == slow else 1.0]

    monkeypatch.setattr(clocks, "sample", seconds)
    for slow in range(9):
        frozen = itertools.count()
        records = list(model_records(CPU, settings, ["all"], [False], ["deltadiff"]))
        assert next(frozen) > slow and {r["over_floor"] for r in records} == {1.0}


@pytest.mark.parametrize("base", BASES)
def test_every_base_is_measured(base, llama_config):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    settings = settings_for(CPU, config=llama_config, batch=1, sequence=8, steps=1, base=base)
    records = list(model_records(CPU, settings, ["all"], [True]))
    assert all(r["note"] is None for r in records)
    ours = {(r["variant"], r["rounding"]) for r in records if r["variant"].startswith("deltadiff")}
    if base == "bf16":
        assert ("deltadiff", "remainder") in ours
    else:  # nothing is written into W
        assert ours == {("deltadiff", None), ("deltadiff-layers", None)}
