"""`encode_labelled`: texts, or pairs of sentences, with a label each."""

from collections.abc import Sequence

from ...errors import ArgumentError
from ..batches import EncodedExamples
from ..data.examples import Example
from ..data.skipped import Skipped

NO_TOKENS = "without a token"


def encode_labelled(
    examples: Sequence[Example], labels: list, tokenizer, max_length: int
) -> EncodedExamples:
    """Texts, or pairs of prompt and text, with one label each.

    An example whose text the tokenizer makes nothing of is left out.

    Raises:
        ArgumentError: ``max_length`` leaves no room for a text; or all examples are left out.
    """
    texts = [[e.text for e in examples]]
    paired = any(e.prompt for e in examples)
    if paired:
        texts.insert(0, [e.prompt for e in examples])
    least = tokenizer.num_special_tokens_to_add(pair=paired) + len(texts)
    if max_length < least:
        raise ArgumentError("max_length", max_length, f"at least {least} for this tokenizer")
    found = tokenizer(
        *texts, truncation=True, max_length=max_length, return_special_tokens_mask=True
    )
    kept, skipped = [], Skipped()
    for i, (example, special) in enumerate(
        zip(examples, found["special_tokens_mask"], strict=True)
    ):
        if all(special):
            skipped.add(NO_TOKENS, example.place)
        else:
            kept.append(i)
    if not kept:
        raise ArgumentError("data", f"text of which nothing is left: {skipped}", "other text")
    segments = found.get("token_type_ids")
    encodings = getattr(found, "encodings", None)  # slow tokenizers have none
    return EncodedExamples(
        [found["input_ids"][i] for i in kept],
        [labels[i] for i in kept],
        tokenizer.pad_token_id,
        [examples[i] for i in kept],
        segments=None if segments is None else [segments[i] for i in kept],
        skipped=skipped,
        cut=sum(bool(encodings[i].overflowing) for i in kept) if encodings else 0,
    )
