"""`deltadiff info`: its text, its JSON, and what it says a backend is chosen for."""

import json
import re

import pytest
import torch

import deltadiff
from deltadiff.__main__ import main
from deltadiff.ops import info
from deltadiff.ops.backends import BACKENDS, why_unavailable
from deltadiff.ops.dispatch import choose_path


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert deltadiff.__version__ in text and torch.__version__ in text
    for backend in BACKENDS:
        assert f"cpu     {backend}" in text
    assert "float64 goes to the reference" in text


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert [d["device"] for d in found["devices"]] == ["cpu"] + [
        f"cuda:{i}" for i in range(torch.cuda.device_count())
    ]
    paths = found["paths"]
    assert len(paths) == len(BACKENDS) * 4 * len(found["devices"])
    for path in paths:
        device, dtype = torch.device(path["device"]), getattr(torch, path["dtype"])
        chosen = choose_path(device, dtype).backend == path["backend"]
        assert chosen == (path["chosen"] in ("all", "the others"))
        assert path["reason"] == why_unavailable(path["backend"], device, dtype)
        assert not (path["chosen"] and path["reason"])


def test_info_tells_what_a_backend_is_chosen_for(monkeypatch):
    pytest.importorskip("triton")
    gpu = {"device": "cuda:0", "name": "", "capability": "", "memory_gib": 0, "threads": 0}
    monkeypatch.setattr(info, "list_devices", lambda: [gpu])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choose_path.cache_clear()
    table = info.format_info(info.collect()).splitlines()[-len(BACKENDS) :]
    choose_path.cache_clear()
    rows = {cells[1]: cells[2:] for cells in (re.split(r"\s{2,}", line) for line in table)}
    lora, others = "chosen for lora_linear", "chosen for the others"
    assert rows["hopper"][:4] == ["-", lora, lora, "-"]
    assert "the sm_90 kernels are for bfloat16 and float16" in rows["hopper"][4]
    assert rows["triton"][:4] == ["chosen", others, others, "-"]
    assert rows["reference"][:4] == ["there", "there", "there", "chosen"]
