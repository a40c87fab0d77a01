"""`deltadiff merge`: the merged folder is an ordinary model, or there is none."""

import pytest
import torch
from commands import refused

from deltadiff import DeltaLoRA, merge_, save_adapter, swap_
from deltadiff.__main__ import main
from deltadiff.layers.lora_layers import lora_layers


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


def test_merge_takes_an_adapter_of_peft(transformers, tmp_path):
    """It has the head of a classifier, of which the encoder's folder knows nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    transformers.BertModel(small_bert(transformers)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    kind = transformers.AutoModelForSequenceClassification
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"])
    model = peft.get_peft_model(kind.from_pretrained(folder, num_labels=3), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    model.save_pretrained(adapter)
    assert main(["merge", str(folder), str(adapter), str(tmp_path / "merged")]) == 0
    merged = kind.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model.eval()))


def test_merge_names_what_it_cannot_take_of_peft(transformers, llama_folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    text = refused(capsys, "merge", llama_folder, tmp_path / "adapter", tmp_path / "out")
    assert "use_dora" in text and "PeftModel.from_pretrained" in text


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
