"""Tiny models for the tests of `deltadiff bench`, and the keys that every record has."""

from dataclasses import replace

from deltadiff.bench.models import BERT, LLAMA_1B
from deltadiff.bench.search import SearchShape

KEYS = {
    "op", "variant", "mode", "graph", "shape", "rounding", "dtype", "p20_ms", "p50_ms", "p80_ms",
    "over_floor", "host_ms", "peak_mib", "gpu", "driver", "torch", "triton", "commit",
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA = {**LLAMA_1B.config, **SIZES, "num_hidden_layers": 2}
SEARCHED = [
    SearchShape(replace(model, config={**model.config, **SIZES, "num_hidden_layers": 3}), 2, 8)
    for model in (BERT, LLAMA_1B)
]
