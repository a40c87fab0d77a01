"""A tokenizer for the tests of encoding: a token for each character."""


class CharacterTokenizer:
    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None, **more):
        ids = [list(map(ord, t))[:max_length] for t in texts]
        return {"input_ids": ids, "special_tokens_mask": [[0] * len(row) for row in ids]}

    def num_special_tokens_to_add(self, pair=False):
        return 0
