"""README.md: its Python runs, on tiny models, and the command line knows its commands."""

import argparse
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

import deltadiff
from deltadiff.__main__ import main

pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")
pytest_plugins = ["tiny_models"]
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]


def blocks(section: str) -> list[str]:
    """The Python of a section of README.md."""
    text = PAGES[0].read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no Python under {section}"
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(section, folder of a model, **names) runs a section's code on the CPU."""
    monkeypatch.chdir(tmp_path)

    def run(section: str, place: str, **names) -> dict:
        for code in blocks(section):
            code = code.replace(".cuda()", "").replace('"cuda"', '"cpu"')
            exec(code.replace("path/to/model", place), names)
        return names

    return run


def batches(count: int) -> list[dict]:
    tokens = [torch.randint(3, 23, (2, 6)) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def test_swap(run, llama, tmp_path, capsys):
    names = run("Swap", llama, loader=batches(2))
    assert "q_proj" in capsys.readouterr().out
    swapped = [m for m in names["model"].modules() if isinstance(m, deltadiff.LoraLinear)]
    assert swapped and all(layer.lora_B.abs().sum() > 0 for layer in swapped)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(llama)
    deltadiff.load_adapter(fresh, tmp_path / "adapter")


def test_the_fastest_step(run, llama, monkeypatch, capsys):
    """Liger's patch stands for itself here: it changes the classes of the whole process."""
    patched = []
    liger = types.SimpleNamespace(apply_liger_kernel_to_llama=lambda: patched.append(1))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    names = run("The fastest step", llama, transformers=transformers, deltadiff=deltadiff)
    assert patched and "layers swapped" in capsys.readouterr().out
    assert isinstance(names["optimizer"], deltadiff.DeltaLoRA)


def test_with_peft_and_trainer(run, llama, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    names = run("With PEFT", llama, base=base, peft=peft, deltadiff=deltadiff)
    assert "q_proj" in capsys.readouterr().out
    (batch,) = batches(1)
    rows = [{name: ids[0] for name, ids in batch.items()}] * 8
    args = transformers.TrainingArguments("run", max_steps=3, use_cpu=True, report_to=[])
    names = run("With Trainer", llama, args=args, data=rows, transformers=transformers, **{
        name: names[name] for name in ("model", "deltadiff")
    })  # fmt: skip
    fresh = transformers.AutoModelForCausalLM.from_pretrained(llama)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, names["model"].eval()(**batch).logits)


def test_diffora(run, bert, tmp_path):
    texts = ["the film is great", "a dull story"] * 40
    names = run(
        "DiffoRA", bert, texts=texts, labels=torch.tensor([1, 0] * 40),
        transformers=transformers, tokenizer=transformers.AutoTokenizer.from_pretrained(bert),
    )  # fmt: skip
    assert (tmp_path / "gates.png").is_file() and (tmp_path / "search").is_dir()
    names["loss"](range(4)).backward()
    names["optimizer"].step()


def test_adalora_and_dylora(run, llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (batch,) = batches(1)
    names = run("AdaLoRA, DyLoRA and FLoRA", llama, model=model, batch=batch)
    names["optimizer"].step()
    other = transformers.AutoModelForCausalLM.from_pretrained(llama)
    deltadiff.swap_(other, r=8)
    optimizer = names["DyLoRA"](other, lr=2e-4, r_min=1)
    with optimizer.truncated(4):
        other(**batch)


def test_commands(run, randn, capsys):
    given = {"x": randn(4, 24), "weight": randn(16, 24)}
    given |= {"lora_A": randn(2, 24), "lora_B": randn(16, 2)}
    names = run("Commands", "", deltadiff=deltadiff, **given)
    assert names["y"].shape == (4, 16)
    assert "CPU: native C++" in capsys.readouterr().out


def commands() -> list[str]:
    """The lines of all shell blocks that call deltadiff."""
    fenced = [part for page in PAGES for part in page.read_text().split("```")[1::2]]
    shell = "".join(part for part in fenced if part.startswith("\n")).replace("\\\n", " ")
    return re.findall(r"^deltadiff .*$", shell, re.MULTILINE)


@pytest.mark.parametrize("line", commands())
def test_commands_are_known(line, monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser, argv):
        parse(parser, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        main(shlex.split(line, comments=True)[1:])
