"""A tokenizer for the tests of encoding: a token for each character."""


class CharacterTokenizer:
    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None):
        return {"input_ids": [list(map(ord, t))[:max_length] for t in texts]}
