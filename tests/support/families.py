"""Tiny random models of many of transformers' families, with inputs and a loss.

`FAMILIES` is the table. A family is known by transformers' name of its configuration; its sizes are
`SIZES`, with what the family calls otherwise or needs besides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_IN_FLOAT64 = {"experts_implementation": "eager"}  # the default has no float64
_HEADS = {"head_dim": 8}
_ENCODER_DECODER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "moe_topk": 2, "shared_expert_intermediate_size": 8,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
_IMAGE = {"image_size": 16, "patch_size": 8}
_SOUND = {
    "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [4, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
    "apply_spec_augment": False,  # its masks come from NumPy's generator
}  # fmt: skip
_TOWER = {**_IMAGE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip
_TWO_TOWERS = {
    "text_config": {**SIZES, "projection_dim": 16}, "vision_config": _TOWER, "projection_dim": 16,
}  # fmt: skip
_NO_HEAD = {"vision_use_head": False}
_IMAGE_TOKEN = 3
_QWEN_VL = {
    "text_config": {
        **SIZES, **_HEADS,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "window_size": 8,
        "fullatt_block_indexes": [0],
    },
    "image_token_id": _IMAGE_TOKEN, "video_token_id": 4, "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        name: transformers' name of the type of its configuration.
        kind: which ``AutoModelFor`` class makes the model; it settles the inputs.
        options: of the configuration, beside `SIZES`.
        no_pair: the last parts of the names of linear layers that cannot have a pair: the model,
            or a kernel that it takes on a GPU, reads their weights itself, or they are smaller
            than the rank.
        default: what the family's real models have otherwise than its default configuration.
    """

    name: str
    kind: str = "CausalLM"
    options: Mapping = field(default_factory=dict)
    no_pair: tuple[str, ...] = ()
    default: Mapping = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in evaluation mode, always with the same weights.

        Nothing is 0 in it, because a lost bias of 0 would not be seen.
        """
        sizes = {} if "text_config" in self.options else SIZES
        config = transformers.AutoConfig.for_model(self.name, **{**sizes, **self.options})
        torch.manual_seed(0)
        model = self._auto_class.from_config(config, dtype=torch.float64, **_IN_FLOAT64)
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():
                    p.normal_(std=0.1)
                p.copy_(p.float())  # the same weights in float32
        return model.to(dtype).eval()

    def load(self, folder: Path) -> nn.Module:
        """The model that was saved in a folder, in evaluation mode."""
        return self._auto_class.from_pretrained(folder, dtype=torch.float64, **_IN_FLOAT64).eval()

    def build_default(self) -> nn.Module:
        """The model of the family's default configuration, without memory for its weights."""
        config = transformers.AutoConfig.for_model(self.name, **self.default)
        with torch.device("meta"):
            return self._auto_class.from_config(config)

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self.kind in ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText")

    @property
    def _auto_class(self) -> type:
        return getattr(transformers, f"AutoModelFor{self.kind}")

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """A batch with labels, always the same."""
        return {
            name: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in _inputs(self.name, self.kind).items()
        }


def _inputs(name: str, kind: str) -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(7, 64, (2, 8), generator=generator)
    image, classes = normal(2, 3, 16, 16), torch.tensor([0, 1])
    match kind:
        case "CausalLM" | "MaskedLM" | "Seq2SeqLM":
            globally = {"global_attention_mask": ids % 2} if name == "longformer" else {}
            return {"input_ids": ids, "labels": ids, **globally}
        case "SequenceClassification":
            return {"input_ids": ids, "labels": classes}
        case "TokenClassification":  # of a page, whose words have places
            boxes = torch.randint(0, 8, (2, 8, 4), generator=generator).sort(-1).values
            return {"input_ids": ids, "labels": ids % 2, "bbox": boxes, "pixel_values": image}
        case "ImageClassification":
            return {"pixel_values": image, "labels": classes}
        case "ZeroShotImageClassification":
            return {"input_ids": ids, "pixel_values": image, "return_loss": True}
        case "ImageTextToText":
            ids[:, 1:5] = _IMAGE_TOKEN
            shown = (ids == _IMAGE_TOKEN).long()
            if name == "gemma3":
                kinds = {"pixel_values": image, "token_type_ids": shown}
            else:  # one row for each patch
                grid = torch.tensor([[1, 4, 4]] * 2)
                kinds = {"pixel_values": normal(32, 48), "image_grid_thw": grid}
                kinds |= {"mm_token_type_ids": shown}
            return {"input_ids": ids, "labels": ids, **kinds}
        case "SpeechSeq2Seq":
            return {"input_features": normal(2, 8, 16), "labels": ids}
        case "CTC":
            return {"input_values": normal(2, 400), "labels": ids[:, :4]}
    raise AssertionError(kind)


_TABLE = (
    # ------------------------------------------------------------------ decoders
    Family("llama"),
    Family("qwen3", options=_HEADS),
    Family("mistral"),
    Family("gemma2", options=_HEADS),
    Family("gemma3n_text", options=_HEADS | {
        "laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [24, 24], "activation_sparsity_pattern": [0.0, 0.0]},
        no_pair=("altup.correction_coefs",)),
    Family("phi", options={"num_key_value_heads": 2}),
    Family("phi3"),
    Family("gpt2", options={"n_positions": 32}),
    Family("gpt_neo", options={"attention_types": [[["global", "local"], 1]], "num_layers": 2}),
    Family("gpt_neox"),
    Family("opt", options={"ffn_dim": 24, "word_embed_proj_dim": 16}),
    Family("falcon"),
    Family("bloom", default={"hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    # ------------------------------------------------------------------ decoders with experts
    Family("mixtral", options=_EXPERTS),
    Family("qwen3_moe", options=_EXPERTS | _HEADS),
    Family("olmoe", options=_EXPERTS),
    Family("gpt_oss", options=_EXPERTS | _HEADS),
    Family("deepseek_v3", options=_EXPERTS | _LATENT | {
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    Family("longcat_flash", options=_EXPERTS | _LATENT | _HEADS | {
        "num_layers": 1, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 8, "zero_expert_num": 2},
        no_pair=("router.classifier",)),
    Family("llama4_text", options=_EXPERTS | _HEADS | {
        "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
        no_pair=("feed_forward.router",)),
    Family("phimoe", options=_EXPERTS, no_pair=("mlp.router",)),
    # ------------------------------------------------------------------ state space models
    Family("mamba", options={"state_size": 8, "time_step_rank": 4},
           no_pair=("x_proj", "dt_proj", "out_proj")),
    Family("mamba2", options={
        "head_dim": 8, "num_heads": 4, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 4,
    }, no_pair=("out_proj",)),
    Family("falcon_h1", options=_HEADS | {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 4}, no_pair=("mamba.out_proj",)),
    Family("jamba", options=_EXPERTS | {
        "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False}, no_pair=("mamba.dt_proj",)),
    Family("qwen3_next", options=_EXPERTS | _HEADS | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        no_pair=("shared_expert_gate",)),
    # ------------------------------------------------------------------ encoders
    Family("bert", "MaskedLM"),
    Family("roberta", "MaskedLM"),
    Family("deberta", "MaskedLM", _RELATIVE),
    Family("deberta-v2", "SequenceClassification", _RELATIVE | {"conv_kernel_size": 3}),
    Family("modernbert", "SequenceClassification"),
    Family("mpnet", "MaskedLM"),
    Family("electra", "MaskedLM", {"embedding_size": 8}),
    Family("distilbert", "MaskedLM", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    Family("albert", "MaskedLM", {"embedding_size": 8}),
    Family("mobilebert", "MaskedLM", {
        "embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8},
        no_pair=("predictions.dense",)),
    Family("longformer", "MaskedLM", {"attention_window": 4}),
    Family("layoutlmv3", "TokenClassification", {
        "max_2d_position_embeddings": 32, "coordinate_size": 2, "shape_size": 4, "input_size": 16,
        "patch_size": 8}, no_pair=("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
    # ------------------------------------------------------------------ encoders with a decoder
    Family("t5", "Seq2SeqLM", {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}),
    Family("bart", "Seq2SeqLM", _ENCODER_DECODER),
    Family("whisper", "SpeechSeq2Seq", _ENCODER_DECODER | {
        "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}),
    # ------------------------------------------------------------------ images and sound
    Family("vit", "ImageClassification", _IMAGE),
    Family("dinov2", "ImageClassification", _IMAGE),
    Family("clip", "ZeroShotImageClassification", _TWO_TOWERS),
    Family("siglip", "ZeroShotImageClassification", _TWO_TOWERS,
           no_pair=("head.attention.out_proj",)),
    Family("gemma3", "ImageTextToText", {
        "text_config": SIZES | _HEADS, "vision_config": _TOWER | _NO_HEAD | {"patch_size": 4},
        "mm_tokens_per_image": 4, "image_token_index": _IMAGE_TOKEN, "boi_token_index": 5,
        "eoi_token_index": 6}, default={"vision_config": _NO_HEAD}),
    Family("qwen2_5_vl", "ImageTextToText", _QWEN_VL),
    Family("qwen3_vl", "ImageTextToText", _QWEN_VL),
    Family("wav2vec2", "CTC", _SOUND),
    Family("wavlm", "CTC", _SOUND, no_pair=tuple(
        f"attention.{part}_proj" for part in ("q", "k", "v", "out"))),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}
