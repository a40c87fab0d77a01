"""Questions and texts in windows: tokens, labels, and inputs that cannot be used."""

import pytest
import torch
from finetune_runs import asked

from deltadiff.errors import ArgumentError
from deltadiff.finetune.tasks.windows import cut_windows

transformers = pytest.importorskip("transformers")
pytest_plugins = ["tiny_models"]


@pytest.fixture(scope="module")
def tokenizer(bert):
    return transformers.AutoTokenizer.from_pretrained(bert)


def test_windows(tokenizer):
    text = "the film is a story with plot and cast very great dull"
    examples = [asked("the film", text, "plot and"), asked("is", "a film", "film", "a")]
    data = cut_windows(examples, tokenizer, max_length=8, doc_stride=2)
    words = text.split()
    pieces = [words[0:6], words[4:10], words[8:12], ["a", "film"]]
    assert data.owners == [0, 0, 0, 1] and len(data) == 4
    for i, (owner, piece) in enumerate(zip(data.owners, pieces, strict=True)):
        places = data.offsets[i].tolist()
        shown = [examples[owner].text[a:b] for a, b in places if b]
        assert shown == piece and len(places) == len(data.ids[i])
    # "plot and" are words 6 and 7: whole in the second window, behind the question's two tokens.
    assert data.labels == [(0, 0), (4, 5), (0, 0), (2, 2)]
    batch = data.batch([3, 1], torch.device("cpu"))
    assert batch["context"].tolist() == [
        [False, True, True] + [False] * 5,
        [False] * 2 + [True] * 6,
    ]
    assert batch["labels"].tolist() == [[2, 2], [4, 5]]


def test_an_answer_that_no_window_holds_whole(tokenizer):
    data = cut_windows([asked("is", "a story with plot and cast", "with plot")], tokenizer, 4, 0)
    assert data.labels == [(0, 0), (0, 0)] and data.owners == [0, 0]


def test_texts_that_leave_no_room(tokenizer):
    examples = [asked("the film is", "a story", "story")]
    assert len(cut_windows(examples, tokenizer, 6, 2)) == 1
    with pytest.raises(ArgumentError, match="max_length: got 5; accepted: at least 6"):
        cut_windows(examples, tokenizer, 5, 2)


def test_tokenizers_without_offsets(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ArgumentError, match="Slow, which does not tell"):
        cut_windows([asked("q", "a", "a")], Slow(), 8, 0)
