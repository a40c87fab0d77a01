"""Plots of benchmarks know the records that they were made of."""

import pytest

from deltadiff.bench.plots import plots, stale_plots, write_plots

pytest.importorskip("matplotlib")


def test_plots_belong_to_their_records(tmp_path):
    fields = {"op": "lora_linear", "mode": "forward+backward", "graph": True, "gpu": "A GPU"}
    records = [
        {**fields, "variant": v, "shape": {"M": m, "K": 4096, "N": 4096, "r": 16},
         "p50_ms": 0.1, "over_floor": 1.0 + m / 1000}
        for v in ("frozen", "deltadiff") for m in (1, 16, 64)
    ]  # fmt: skip
    (path,) = write_plots(records, tmp_path)
    assert path.name == "layer-a-gpu.png"
    assert stale_plots(records[::-1], tmp_path) == []
    records[0]["p50_ms"] = 0.2
    assert stale_plots(records, tmp_path) == [path]
    path.unlink()
    assert stale_plots(records, tmp_path) == [path]
    assert plots(records[:2], tmp_path) == {}  # too few points
