"""Which files of a model's folder belong to its tokenizer."""

from pathlib import Path

# The names that Hugging Face and the authors of models use.
_PATTERNS = (
    "tokenizer*", "tokenization*.py", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates", "*.model", "*.bpe", "*.spm",
    "*.tiktoken", "tekken.json", "bpe.codes", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """The files, and folders of files, of the tokenizer in a model's folder."""
    return [path for pattern in _PATTERNS for path in folder.glob(pattern)]
