"""The command `deltadiff`: output, exit codes, one line for an error."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltadiff
from deltadiff import DeltaLoRA, merge_, save_adapter, swap_
from deltadiff.__main__ import main
from deltadiff.layers.lora_linear import lora_layers
from deltadiff.ops import info
from deltadiff.ops.dispatch import BACKENDS, choose_path, why_unavailable
from deltadiff.verify import run as verify


def refused(capsys, *argv) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("deltadiff") and "Traceback" not in err
    return err


def run_command(*argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "deltadiff", *argv], capture_output=True, text=True, timeout=120
    )


def test_module_is_the_command():
    done = run_command("--version")
    assert (done.returncode, done.stdout) == (0, f"deltadiff {deltadiff.__version__}\n")
    done = run_command("verify", "--device", "banana")
    assert done.returncode == 2
    assert done.stderr.startswith("deltadiff: device: got 'banana'; accepted: one of cpu")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["verify", "--help"], ["finetune", "--help"]])
def test_help_names_the_exit_codes(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text and "a check failed" in text


@pytest.mark.parametrize("argv", [[], ["serve"], ["verify", "--op", "lora"], ["merge", "model"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


# ---------------------------------------------------------------- info


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
    assert "the sm_90 kernel is for bfloat16 and float16" in rows["hopper"][4]
    assert rows["triton"][:4] == ["chosen", others, others, "-"]
    assert rows["reference"][:4] == ["there", "there", "there", "chosen"]


# ---------------------------------------------------------------- verify


def test_verify(capsys):
    assert main(["verify", "--op", "adamw_step", "--quick", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "verify on cpu, seed 3" in text
    assert "0 failed" in text and " NO" not in text
    assert "delta_update" not in text


def test_verify_as_json(capsys):
    assert (
        main(["verify", "--op", "adamw_step", "--quick", "--backend", "reference", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["device"] == "cpu"
    assert {row["seed"] for row in report["rows"]} == {report["seed"]}
    assert {row["path"] for row in report["rows"]} == {"reference"}
    assert {row["op"] for row in report["rows"]} == {"adamw_step"}


@pytest.mark.parametrize(
    "op, name", [("delta_update", "delta_update_"), ("adamw_step", "adamw_step_")]
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_verify_fails_with_a_wrong_operation(op, name, flags, monkeypatch, capsys):
    module = importlib.import_module(f"deltadiff.verify.{op}")
    real = getattr(module, name)

    def wrong(**call):
        real(**call)
        call.get("weight", call.get("params"))[0].view(-1)[0] = 3.0

    monkeypatch.setattr(module, name, wrong)
    assert main(["verify", "--op", op, "--quick", *flags]) == 1
    text = capsys.readouterr().out
    assert (json.loads(text)["ok"] is False) if flags else "  NO" in text


def test_verify_fails_with_a_wrong_kernel(monkeypatch, capsys):
    """Not the public function but the registered operation behind it."""
    if choose_path(torch.device("cpu"), torch.float32).backend != "cpp":
        pytest.skip("the C++ extension is not built")
    real = torch.ops.deltadiff.lora_linear

    def scaling_dropped(x, weight, lora_A, lora_B, scaling, *others):
        return real(x, weight, lora_A, lora_B, 1.0, *others)

    monkeypatch.setattr(torch.ops.deltadiff, "lora_linear", scaling_dropped)
    assert main(["verify", "--op", "lora_linear", "--quick"]) == 1
    wrong = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "  NO" in line]
    assert set(wrong) == {"y", "dx", "dA", "dB", "dgate"}


def test_verify_refuses(capsys, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    choose_path.cache_clear()
    assert "interpreter" in refused(capsys, "verify", "--backend", "triton")
    assert "NVIDIA GPUs" in refused(capsys, "verify", "--backend", "hopper")
    assert "one of cpu" in refused(capsys, "verify", "--device", "cuda:99")


# ---------------------------------------------------------------- merge


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def small_bert(transformers):
    return transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip


@pytest.fixture
def llama_folder(transformers, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "base"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not of the tokenizer")
    return folder


TOKENS = torch.tensor([[3, 14, 15, 9, 26]])


def train(model, target_modules="all-linear", **options):
    swap_(model, r=2, target_modules=target_modules, seed=0, **options)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=1)
    for _ in range(4):
        optimizer.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def test_merge(transformers, llama_folder, tmp_path, capsys):
    base = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    before = logits(base)
    model = train(base, target_modules=["q_proj", "down_proj"])
    save_adapter(model, tmp_path / "adapter")
    output = tmp_path / "merged"
    output.mkdir()  # empty, which is accepted
    assert main(["merge", str(llama_folder), str(tmp_path / "adapter"), str(output)]) == 0
    text = capsys.readouterr().out
    assert "layers.0.mlp.down_proj" in text and f"saved in {output}" in text
    merged = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert not lora_layers(merged)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(merged), before, atol=1e-3)
    names = {path.name for path in output.iterdir()}
    assert "tokenizer.json" in names and "notes.txt" not in names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]

    assert "not empty" in refused(capsys, "merge", llama_folder, tmp_path / "adapter", output)


def test_merge_takes_the_head_of_a_classifier(transformers, tmp_path, capsys):
    """An encoder's folder names a class without a head; the adapter knows of one."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    transformers.BertModel(small_bert(transformers)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    kind = transformers.AutoModelForSequenceClassification
    model = train(
        kind.from_pretrained(folder, num_labels=3), ["query"], modules_to_save=["classifier"]
    )
    save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = kind.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
    assert (tmp_path / "merged" / "vocab.txt").exists()


def test_merge_of_an_encoder_without_a_head(transformers, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    model = transformers.BertModel(small_bert(transformers))
    model.save_pretrained(folder)
    swap_(model, r=2, target_modules=["query"], seed=0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = transformers.BertModel.from_pretrained(tmp_path / "merged").eval()
    merge_(model.eval())
    with torch.no_grad():
        found, expected = (m(TOKENS).last_hidden_state for m in (merged, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_merge_refuses(transformers, llama_folder, tmp_path, capsys):
    model = train(transformers.LlamaForCausalLM.from_pretrained(llama_folder), ["q_proj"])
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    save_adapter(model, adapter)
    other = tmp_path / "other"
    transformers.BertForMaskedLM(small_bert(transformers)).save_pretrained(other)
    assert "another base model" in refused(capsys, "merge", other, adapter, output)
    assert "no-such" in refused(capsys, "merge", tmp_path / "no-such", adapter, output)
    assert "adapter.json" in refused(capsys, "merge", llama_folder, llama_folder, output)
    file = tmp_path / "file"
    file.write_text("")
    assert "not empty" in refused(capsys, "merge", llama_folder, adapter, file)
    assert "OUTPUT" in refused(capsys, "merge", llama_folder, adapter, file / "below")
    (weights,) = adapter.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "truncated" in refused(capsys, "merge", llama_folder, adapter, output)
    assert not output.exists()


# ---------------------------------------------------------------- finetune


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_finetune_names_the_extra(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, "finetune", "some-model", "some-data.csv")
    assert package in line and 'pip install "deltadiff[finetune]"' in line


def test_finetune_without_arguments(capsys):
    assert "model" in refused(capsys, "finetune")


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "find_device", interrupt)
    assert main(["verify"]) == 130


def test_python_m_in_a_checkout(llama_folder, tmp_path):
    """There the folder `kernels` must not stand for the package that transformers looks for."""
    root = Path(deltadiff.__file__).resolve().parent.parent
    assert (root / "kernels").is_dir()
    (tmp_path / "data.txt").write_text("one\ntwo\nthree\nfour\n")
    words = ["finetune", str(llama_folder), str(tmp_path / "data.txt"), "--heldout", "0.5"]
    command = [sys.executable, "-m", "deltadiff", *words, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stderr.startswith("deltadiff finetune: model: got")  # its tokenizer is a dummy
    assert "kernels" not in done.stderr
