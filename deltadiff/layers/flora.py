"""FLoRA: W + s B G A with a core G between the factors (Si et al., 2024, arXiv 2405.14739).

The paper's "low-rank core space" of a weight with N dimensions is a Tucker decomposition. Of a
linear layer, which has two, it is B G A: B (out, r) and A (r, in) are a `LoraLinear`'s pair, and
the core G (r, r) is its ``gate``. Where AdaLoRA trains a diagonal there, G is a full matrix. G goes
into the smaller factor in each pass, so a layer stays one call of `lora_linear` at rank r.

A and B start as in the authors' code (SJTU-DeepVisionLab/FLoRA), by Kaiming's normal rule with a =
sqrt(3) of an (out, r) and an (in, r) tensor, which is N(0, 1 / (2 r)), and G starts at 0. Their
scale s is a number that does not depend on r, 1 unless it is given. The first author's collection
of methods for language models (Chongjie-Si/Subspace-Tuning) scales by alpha / r instead, and its
code for GLUE starts from N(0, 0.02^2). AdamW trains all three: `FusedAdamW`, for example.
"""

import math
from collections.abc import Collection

import torch
from torch import nn

from ..checks import check_int
from .report import SwapReport
from .swap_gated import swap_gated_
from .targets.choose import Targets


def swap_flora_(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float | None = None,
    target_modules: Targets = "all-linear",
    lora_dropout: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: Collection[str] = (),
    backend: str | None = None,
    seed: int | None = None,
    lean: bool | None = None,
) -> SwapReport:
    """`swap_` for FLoRA: each layer gets A, B and an r x r core G, and computes W + s B G A.

        swap_flora_(model, r=8, target_modules=["q_proj", "v_proj"])
        optimizer = deltadiff.FusedAdamW(model, lr=5e-4)

    All else is as for `swap_`: the model is saved, loaded, merged, exported and un-swapped alike.
    `export_peft` multiplies G into B, so it writes an ordinary LoRA adapter of rank r. Delta-LoRA
    has no update of W for such layers: `DeltaLoRA` refuses them unless ``update_ratio=0``.

    Args:
        lora_alpha: s is lora_alpha / r; None is r, so that s is 1, as in the authors' code.
        model, r, target_modules, lora_dropout, adapter_dtype, modules_to_save, backend, seed, lean:
            as for `swap_`.

    Returns:
        A report of the layers, their paths and the reasons; it prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError, BackendUnavailableError: as for `swap_`, and for a model
            with PEFT's layers; nothing was changed.
    """
    check_int("r", r, 1)
    return swap_gated_(
        model, "FLoRA", r=r, lora_alpha=lora_alpha, seed=seed, gate=(r, r),
        std=1 / math.sqrt(2 * r), target_modules=target_modules, lora_dropout=lora_dropout,
        adapter_dtype=adapter_dtype, modules_to_save=modules_to_save, backend=backend, lean=lean,
    )  # fmt: skip
