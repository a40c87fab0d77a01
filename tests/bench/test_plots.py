"""Plots of benchmarks know the records that they were made of."""

import pytest

from deltadiff.bench.plots import _draw_whole_step, plots, stale_plots, write_plots

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


def test_labels_of_whole_steps_cover_no_other_label_and_no_point():
    """Six ways to train of about the same speed and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fields = {
        "op": "whole_step", "model": "A model", "method": "LoRA", "base": "bf16", "batch": 2,
        "sequence": 8, "shape": {"M": 4096}, "checkpointing": False,
    }  # fmt: skip
    names = ("frozen", "deltadiff", "deltadiff-layers", "peft", "peft-bf16", "peft-swapped")
    records = [
        {**fields, "variant": name, "p50_ms": 250 + i, "peak_mib": 40960 + i}
        for i, name in enumerate(names)
    ]
    records += [{**records[0], "p50_ms": 300, "peak_mib": 20480}]
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    _draw_whole_step(figure, records)
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == len(records)
    for i, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])
    points = axes.transData.transform([(r["peak_mib"] / 1024, 4096 / r["p50_ms"]) for r in records])
    assert not any(box.contains(*point) for box in boxes for point in points)
