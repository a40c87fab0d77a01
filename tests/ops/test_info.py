"""`deltadiff info`: which kernels run what; tests/test_main.py runs the command."""

import json

import torch

from deltadiff.ops import info
from deltadiff.ops.dispatch import choose_path


def test_what_runs_lora_linear_on_the_cpu():
    found = json.loads(json.dumps(info.collect()))["lora_linear"]
    here = [entry for entry in found if entry["device"] == "cpu"]
    assert [entry["dtype"] for entry in here] == ["float32", "bfloat16", "float16", "float64"]
    for entry in here:
        chosen = choose_path(torch.device("cpu"), getattr(torch, entry["dtype"]), None, info.LAYER)
        assert [kernel["kernel"] for kernel in entry["kernels"]] == [chosen.at(1).name]
        assert entry["in_words"] == chosen.in_words()


def test_what_runs_lora_linear_at_which_number_of_tokens(monkeypatch):
    gpu = {"device": "cuda:0", "name": "", "capability": "", "memory_gib": 0, "threads": 0}
    monkeypatch.setattr(info, "list_devices", lambda: [gpu])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choose_path.cache_clear()
    found = info.collect()
    choose_path.cache_clear()
    by_dtype = {entry["dtype"]: entry["kernels"] for entry in found["lora_linear"]}
    runs = [(run["from_tokens"], run["kernel"], run["backend"]) for run in by_dtype["bfloat16"]]
    assert runs[:2] == [(0, "few_tokens", "triton"), (256, "hopper", "hopper")]
    assert by_dtype["bfloat16"][0]["reason"] == "hopper takes 256 tokens or more"
    assert [run["kernel"] for run in by_dtype["float32"]] == ["portable"]
    text = info.format_info(found)
    assert "triton few_tokens (up to 255 tokens), hopper (256 to 4,194,176 tokens)" in text
    assert "bfloat16, float16" in text
