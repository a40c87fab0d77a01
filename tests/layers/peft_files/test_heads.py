"""What `export_peft` saves beside the pairs, and what PEFT would not take."""

import copy
import json

import peft
import pytest
import torch
import transformers
from small_models import build
from torch import nn
from two_blocks import Model

from deltadiff import export_peft, swap_
from deltadiff.errors import SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.peft_files.heads import _task_type

SMALL = {"vocab_size": 40, "max_position_embeddings": 16}
DISTIL = transformers.DistilBertConfig(**SMALL, dim=8, n_layers=1, n_heads=2, hidden_dim=12)
IDS = torch.arange(3, 11).view(2, 4)


def swapped(model: nn.Module, **options) -> nn.Module:
    """The model with pairs and heads that differ from the base's."""
    swap_(model, r=2, seed=0, **options)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    return model


def assert_peft_gives_the_same(model, base, folder, x, saved) -> None:
    report = export_peft(model, folder)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with torch.no_grad():
        found, expected, start = (m(x) for m in (read, model.eval(), base.eval()))
    if not isinstance(found, torch.Tensor):
        found, expected, start = found[0], expected[0], start[0]
    torch.testing.assert_close(found, expected)
    assert (start - expected).norm() > 0.01 * expected.norm()
    assert list(report.modules_to_save) == saved


class TwoHeads(Model):
    """PEFT finds the second head when it looks for the first, by the ending of its name."""

    def __init__(self):
        super().__init__()
        self.aux_head = nn.Linear(6, 3)

    def forward(self, x):
        inner = self.layers[0](x) + self.layers[1](x)
        return self.head(inner) + self.aux_head(inner)


def test_a_head_whose_name_ends_so_is_saved_too(tmp_path):
    base = TwoHeads()
    model = swapped(copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=["head"])
    x = torch.randn(4, 8)
    assert_peft_gives_the_same(model, base, tmp_path, x, ["aux_head", "head"])


def test_a_pair_in_the_way_of_a_head_is_named(tmp_path):
    """DistilBERT has a ``pre_classifier``, whose name ends like that of its ``classifier``."""
    base = transformers.DistilBertForSequenceClassification(DISTIL)
    all_others = {"target_modules": lambda name, _: name != "classifier"}
    model = swapped(copy.deepcopy(base), **all_others, modules_to_save=["classifier"])
    with pytest.raises(SwapError, match="PEFT cannot save because of pre_classifier"):
        export_peft(model, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())
    model = swapped(copy.deepcopy(base), target_modules=["q_lin"], modules_to_save=["classifier"])
    saved = ["classifier", "pre_classifier"]
    assert_peft_gives_the_same(model, base, tmp_path, IDS, saved)


def test_a_frozen_head_is_saved_where_the_task_wants_it(tmp_path):
    base = build("bert")
    model = swapped(copy.deepcopy(base), target_modules=lambda name, _: name.endswith("dense"))
    assert_peft_gives_the_same(model, base, tmp_path, IDS, ["classifier"])


def test_the_task_is_not_said_where_its_head_has_a_pair(tmp_path):
    base = build("roberta")
    model = swapped(copy.deepcopy(base), target_modules=lambda *_: True)
    assert_peft_gives_the_same(model, base, tmp_path, IDS, [])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["auto_mapping"]["base_model_class"] in str(base)


def test_tied_embeddings_are_saved_in_both_places(tmp_path):
    llama = build("llama")
    llama.config.tie_word_embeddings = True
    base = type(llama)(llama.config)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = swapped(copy.deepcopy(base), **options)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's own
        saved = ["lm_head", "model.embed_tokens"]
        assert_peft_gives_the_same(model, base, tmp_path, IDS, saved)


def test_buffers_of_a_saved_module_are_saved(tmp_path):
    base = Model()
    base.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model = swapped(copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=["head"])
    model.train()(torch.randn(16, 8))
    x = torch.randn(4, 8)
    assert_peft_gives_the_same(model.eval(), base, tmp_path, x, ["head.0", "head.1"])


class ListedHead(nn.Module):
    """A head whose weights are in a list, which PEFT cannot save alone."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3, 6))])

    def forward(self, x):
        return x @ self.weights[0].T


def test_the_module_around_a_list_of_parameters_is_saved(tmp_path):
    base = Model()
    base.head = ListedHead()
    model = swapped(copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=["head"])
    assert_peft_gives_the_same(model, base, tmp_path, torch.randn(4, 8), ["head"])


class Scaled(Model):
    """A model with parameters that no module holds alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.layers[0].shift = nn.Parameter(torch.ones(6))


def test_parameters_that_peft_cannot_save_are_named(tmp_path):
    for name, found in (("scale", "''"), ("layers.0.shift", "'layers.0'")):
        model = swapped(Scaled(), target_modules=["q_proj"])
        model.get_parameter(name).requires_grad_(True)
        with pytest.raises(SwapError, match=f"trained parameters in {found}, which PEFT cannot"):
            export_peft(model, tmp_path)
    model = swapped(Model(), target_modules=["q_proj"])
    model.layers[0].q_proj.weight.requires_grad_(True)
    with pytest.raises(SwapError, match=r"layers\.0\.q_proj\.weight, which is trained beside"):
        export_peft(model, tmp_path)
    assert not any(tmp_path.iterdir())


TASKS = {
    ("Bert", "ForSequenceClassification"): "SEQ_CLS",
    ("Bert", "ForTokenClassification"): "TOKEN_CLS",
    ("Bert", "ForQuestionAnswering"): "QUESTION_ANS",
    ("Bert", "ForMaskedLM"): None,
    ("Bert", "LMHeadModel"): "CAUSAL_LM",
    ("Bert", "Model"): "FEATURE_EXTRACTION",
    ("GPT2", "LMHeadModel"): "CAUSAL_LM",
    ("GPT2", "DoubleHeadsModel"): None,
    ("T5", "ForConditionalGeneration"): "SEQ_2_SEQ_LM",
    ("T5", "Model"): None,
    ("ViT", "ForImageClassification"): None,
    ("ViT", "Model"): None,
}


@pytest.mark.parametrize(("family", "kind"), TASKS)
def test_the_task_of_a_model(family, kind):
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")()
        model = getattr(transformers, f"{family}{kind}")(config)
    assert _task_type(model) == TASKS[family, kind]
