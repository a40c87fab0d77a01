"""Loading a model with its weights as 4-bit numbers, by bitsandbytes."""

import torch

from ..checks import need_package


def four_bit_options(auto_class, config, dtype: torch.dtype, device: torch.device) -> dict:
    """What transformers has to be told to load a model as QLoRA does.

    The weights of linear layers become NF4, whose scales are quantised again; products are computed
    in ``dtype``. The output layer and a new head stay as they are. The model is made on ``device``.

    Args:
        auto_class: transformers' class that will load the model.
        config: the model's config, with the number of outputs that a new head gets.

    Raises:
        ArgumentError: bitsandbytes or accelerate, which transformers needs for it, is missing.
    """
    import transformers

    for package in ("bitsandbytes", "accelerate"):
        need_package(package, extra=None, argument="load_in_4bit")
    with torch.device("meta"):
        module = auto_class.from_config(config)
    outputs = module.get_output_embeddings()
    whole = [*new_head(module), *(n for n, m in module.named_modules() if m is outputs)]
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=whole,
    )  # fmt: skip
    return {"quantization_config": quantisation, "device_map": {"": device}}


def keep_as_loaded(module: torch.nn.Module) -> None:
    """Stop bitsandbytes from packing the weights anew in the first evaluation on a CPU.

    Where the CPU has AVX-512 with bfloat16, it would round the scales of the weights, so that the
    base of the training would be another one after the first evaluation; and it would fail for
    layers whose inputs are no multiple of 64.
    """
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def new_head(module: torch.nn.Module) -> tuple[str, ...]:
    """The children beside the pre-trained body that have parameters."""
    body = f"{module.base_model_prefix}."
    names = (name for name, _ in module.named_parameters() if not name.startswith(body))
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))
