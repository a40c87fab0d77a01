"""Whether a tokenizer can be used, and a model can take the tokens that it makes of some text."""

from torch import nn

from ..errors import ArgumentError
from .batches import EncodedExamples
from .models import Model
from .tasks.text import prompt_tokens


def check_tokenizer(tokenizer, name: str) -> None:
    """Reject a tokenizer that nothing can be trained with; ``name`` is the model's.

    Raises:
        ArgumentError: it knows no words, as one that transformers makes of nothing; or it has no
            token to pad with.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        accepted = "a model with the files of its tokenizer, such as tokenizer.json"
        raise ArgumentError("model", f"{name}, which has no tokenizer", accepted)
    if tokenizer.pad_token_id is None:
        given = f"{name}, whose tokenizer has neither a padding token nor an end token"
        raise ArgumentError("model", given, "a tokenizer with one of the two")


def check_tokens(data: EncodedExamples, model: Model, max_length: int, name: str) -> None:
    """Reject tokens that the model has no embedding or no position for, or that all mean "unknown".

    ``name`` is what a message calls the texts.

    Raises:
        ArgumentError: see above. Most often the folder holds the tokenizer of another model.
    """
    module, tokenizer = model.module, model.tokenizer
    rows = module.get_input_embeddings().weight.shape[0]
    largest = max(map(max, data.ids))
    if largest >= rows:
        given = f"a tokenizer that makes token {largest}, for an embedding of {rows} tokens"
        raise ArgumentError("model", given, "a model with its own tokenizer")
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        ignored = set(tokenizer.all_special_ids) - {unknown}
        words = sum(token not in ignored for row in data.ids for token in row)
        share = sum(row.count(unknown) for row in data.ids) / max(1, words)
        if share == 1:
            given = f"a tokenizer for which all of the text is unknown ({tokenizer.unk_token})"
            raise ArgumentError("model", given, "a model with its own tokenizer")
        if share > 0.01:
            print(f"{share:.1%} of the tokens of {name} texts are unknown to the tokenizer")
    positions = most_tokens(module)
    longest = max(map(len, data.ids))
    if positions is not None and longest > positions:
        given = f"{max_length}; a text has {longest} tokens"
        raise ArgumentError("max_length", given, f"at most {positions}, the positions of the model")


def check_generation(data: EncodedExamples, model: Model, max_new_tokens: int) -> None:
    """Reject prompts after which a model has too few positions for a completion.

    Raises:
        ArgumentError: see above.
    """
    positions = most_tokens(model.module)
    longest = max(map(len, prompt_tokens(model.tokenizer, data.examples)))
    if positions is not None and longest + max_new_tokens > positions:
        given = f"{max_new_tokens}; a prompt has {longest} tokens"
        accepted = f"a completion within the model's {positions} positions"
        raise ArgumentError("max_new_tokens", given, accepted)


def most_tokens(module: nn.Module) -> int | None:
    """How many tokens a model with a learnt embedding for each position takes; None for others."""
    found = [
        m.num_embeddings - _first_position(m)
        for name, m in module.named_modules()
        if isinstance(m, nn.Embedding)
        and name.rpartition(".")[2] in ("position_embeddings", "embed_positions", "wpe")
    ]
    return min(found, default=None)


def _first_position(m: nn.Embedding) -> int:
    """The row of the first token: RoBERTa counts from the padding index, OPT from an offset."""
    return getattr(m, "offset", 0) if m.padding_idx is None else m.padding_idx + 1
