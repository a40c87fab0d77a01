"""A process that has imported all that `deltadiff` needs, and forks a child for each call.

Starting Python and importing transformers takes seconds, and a test that kills hundreds of runs
cannot wait for that. A forked child is as good as a new process: nothing was built before the fork.

As a script it is the server: it reads a call from each line of its standard input, as JSON, and
answers with the child's number at its start and with its exit code at its end.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class ForkServer:
    """Starts children, one after the other.

    The exit code of a child is negative where a signal ended it, as that of `subprocess`.
    """

    def __init__(self, folder: Path):
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, name: str, words: Sequence[object], log: Path) -> int:
        """Start a child; returns its number.

        ``name``: "main" for the command line with these words, or a function of `CALLS`. What the
        child prints goes to ``log``.
        """
        call = {"name": name, "words": [str(word) for word in words], "log": str(log)}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        self.child = self._answer()
        return self.child

    def wait(self) -> int:
        """The exit code of the child that was started last, when it has ended."""
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> int:
        return int(self._process.stdout.readline())


# ------------------------------------------------------------------------- the server


def save_adapters(base: str, one: str, other: str, folder: str) -> int:
    """Save two adapters of a base model into one folder, in turn, for ever."""
    from transformers import AutoModel

    from deltadiff import load_adapter, save_adapter

    models = [AutoModel.from_pretrained(base) for _ in range(2)]
    for model, adapter in zip(models, (one, other), strict=True):
        load_adapter(model, adapter)
    while True:
        for model in models:
            save_adapter(model, folder)


IMPORTED = (
    "deltadiff.finetune.command", "deltadiff.finetune.compare.command",
    "deltadiff.finetune.merge_command", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "PIL.PngImagePlugin", "safetensors.torch", "sklearn.metrics", "tqdm",
    "transformers.models.auto",
)  # fmt: skip
CALLS = {"save_adapters": save_adapters}


def serve() -> None:
    import torch

    from deltadiff.__main__ import main

    for name in IMPORTED:
        importlib.import_module(name)
    bert = importlib.import_module("transformers.models.bert")
    assert bert.BertModel and bert.BertForSequenceClassification  # which are imported now
    torch.set_num_threads(1)
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(call["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            code = 99
            try:
                words = call["words"]
                code = main(words) if call["name"] == "main" else CALLS[call["name"]](*words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this script, which has modules of common names
    serve()
