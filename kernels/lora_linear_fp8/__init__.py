"""`lora_linear` over a weight in FP8 with activations in FP8; `launch.py` has the passes of sm_90.

    forward   X8 sx = X, U = s g X A^T        Y  = (X8 sx) W^T + bias + U B^T
    backward  dY8 sy = dY, V = s g dY B       dX = (dY8 sy) W + V A     dB = dY^T U   dA = V^T X

One pass over X (dY) quantises it and makes U (V), for which it takes the activations as they are
(`quantise.py`). The product takes the low-rank term as one more step (`product.py`). The tensor
cores of sm_90 read FP8 along the summed dimension only, so the backward pass transposes W, byte by
byte (`transpose.py`). dA and dB are products of 16 bits. `scaled_mm.py` has the same passes for
other GPUs, by PyTorch's own product.
"""
