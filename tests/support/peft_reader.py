"""A program without deltadiff: puts adapters on their bases with PEFT, and writes what they give.

Once it is ready, it reads from stdin the name of a folder that has a folder for each case, with
``base`` (a model that transformers saved), ``adapter`` and ``inputs.safetensors``. It adds
``outputs.safetensors``, the logits in the base's own dtype and in float64, and ``warnings.json``,
what PEFT said meanwhile.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file


@torch.no_grad()
def read(case: Path) -> None:
    inputs = load_file(case / "inputs.safetensors")
    config = transformers.AutoConfig.from_pretrained(case / "base")
    kind = getattr(transformers, config.architectures[0])
    outputs = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name, dtype in (("own", "auto"), ("float64", torch.float64)):
            base = kind.from_pretrained(case / "base", dtype=dtype).eval()
            model = PeftModel.from_pretrained(base, case / "adapter")
            outputs[name] = model(**inputs).logits.contiguous()
    save_file(outputs, case / "outputs.safetensors")
    about_adapters = [str(w.message) for w in said if "peft" in w.filename]
    (case / "warnings.json").write_text(json.dumps(about_adapters))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in sorted(Path(sys.stdin.readline().strip()).iterdir()):
        read(folder)
    assert "deltadiff" not in sys.modules
