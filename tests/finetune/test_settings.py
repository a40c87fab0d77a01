"""Settings that contradict each other are refused before anything is read."""

import dataclasses
import json

import pytest

from deltadiff.errors import ArgumentError, CheckpointError
from deltadiff.finetune.methods.table import METHODS
from deltadiff.finetune.settings import Settings, make_settings, read_settings


def refusal(method: str, **more) -> str:
    """What is said about settings of a method; empty if they can be used."""
    try:
        make_settings({"model": "m", "data": "d", "method": method, **more}).check()
    except ArgumentError as error:
        return str(error)
    return ""


def test_formats_of_adapters():
    fused = set(METHODS) - {"lora-peft", "full", "full-no-embeddings", "full-qv", "bitfit"}
    fused -= {"houlsby", "pfeiffer"}
    for method in METHODS:
        assert bool(refusal(method, adapter_format="deltadiff")) == (method not in fused)
        taken = method in fused or method == "lora-peft"
        assert bool(refusal(method, adapter_format="peft")) != taken
    assert "got 'peft'; accepted: none for method full" in refusal("full", adapter_format="peft")
    told = refusal("lora-peft", adapter_format="deltadiff")
    assert told.endswith("accepted: peft for method lora-peft")


def test_4_bit_weights_are_not_written():
    """In place would write into them, and other methods train them."""
    for method in METHODS:
        told = refusal(method, load_in_4bit=True)
        inplace = method in ("delta-lora", "delta-lora-nearest", "diffora-delta-lora")
        whole = not METHODS[method].adapter_formats
        assert bool(told) == (inplace or whole), method
        assert ("--w-update factored" in told) == inplace
        if inplace and method != "delta-lora-nearest":
            assert not refusal(method, load_in_4bit=True, w_update="factored")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"gradient_accumulation": 0}, "gradient_accumulation: got 0"),
        ({"delimiter": ",,"}, "delimiter: got ',,'"),
        ({"encoding": "utf-9"}, "encoding: got 'utf-9'"),
    ],
)
def test_values_out_of_range(more, told):
    assert refusal("lora", **more).startswith(told)


def test_settings_of_older_runs_have_the_defaults_of_new_options(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"model": "m", "data": "d", "r": 3}))
    settings = read_settings(tmp_path)
    assert (settings.r, settings.gradient_accumulation, settings.step_size) == (3, 1, 32)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "3"}, {"steps": 2.5}, {"steps": None}, {"steps": True}, {"lr": "fast"},
        {"regression": 1}, {"method": None}, {"text_column": 3}, {"init_r": [4]}, {"model": None},
        {"load_in_4bit": "yes"}, {"no_such": 1},
    ],
)  # fmt: skip
def test_settings_of_the_wrong_type(change, tmp_path):
    good = dataclasses.asdict(Settings("m", "d", init_r=4, lr=1))
    (tmp_path / "settings.json").write_text(json.dumps(good))
    assert read_settings(tmp_path) == Settings("m", "d", str(tmp_path), init_r=4, lr=1)
    (tmp_path / "settings.json").write_text(json.dumps(good | change))
    with pytest.raises(CheckpointError, match="settings.json: got"):
        read_settings(tmp_path)
