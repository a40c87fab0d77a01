"""Weights of 4 bits, made by bitsandbytes on the CPU."""

import pytest
import torch

from deltadiff.ops.decode_4bit import FourBit

# quant_type, blocksize, whether absmax is quantised in turn
FORMATS = [("nf4", 64, True), ("nf4", 64, False), ("fp4", 64, True), ("nf4", 128, True)]


def params_4bit(w, quant_type="nf4", blocksize=64, nested=True, storage=torch.uint8):
    """The parameter that a layer of bitsandbytes would hold."""
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Params4bit(
        w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type,
        quant_storage=storage,
    ).to("cpu")  # fmt: skip


def four_bit(w, *how, device="cpu") -> FourBit:
    weight = FourBit.of(params_4bit(w.cpu(), *how))
    return weight._replace(
        **{
            name: value.to(device)
            for name, value in weight._asdict().items()
            if isinstance(value, torch.Tensor)
        }
    )
