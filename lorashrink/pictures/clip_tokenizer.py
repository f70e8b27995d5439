"""The tokenizer of CLIP with the vocabulary of the package instant-clip-tokenizer, for models that bring none."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

PACKAGE = "instant_clip_tokenizer"

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SIZE = 49408
_LONGEST = 77  # tokens that CLIP reads, both ends among them


def has_vocabulary() -> bool:
    """Whether the package with the vocabulary is installed."""
    return find_spec(PACKAGE) is not None


def bundled_tokenizer() -> Any:
    """A tokenizer of transformers that gives the ids of the published `CLIPTokenizer` for every text."""
    from instant_clip_tokenizer import Tokenizer
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence
    from transformers import PreTrainedTokenizer

    words = Tokenizer()
    # As in transformers: the package itself neither composes accents nor lowers letters one by one.
    normalizer = Sequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])

    class BundledTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
        """Tokens are ids as text, because parts of characters are no text."""

        model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers declares it so

        @property
        def vocab_size(self) -> int:
            return _SIZE

        def get_vocab(self) -> dict[str, int]:
            ids = {str(number): number for number in range(_SIZE - 2)}
            return {**ids, _START: _SIZE - 2, _END: _SIZE - 1, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return [str(number) for number in words.encode(normalizer.normalize_str(text))]

        def _convert_token_to_id(self, token: str) -> int:
            return {_START: _SIZE - 2, _END: _SIZE - 1}.get(token) or int(token)

        def _convert_id_to_token(self, index: int) -> str:
            return {_SIZE - 2: _START, _SIZE - 1: _END}.get(index) or str(index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return str(words.decode([int(token) for token in tokens if token.isdigit()])).strip()

        def build_inputs_with_special_tokens(
            self, token_ids_0: list[int], token_ids_1: list[int] | None = None
        ) -> list[int]:
            return [_SIZE - 2, *token_ids_0, *(token_ids_1 or ()), _SIZE - 1]

    return BundledTokenizer(bos_token=_START, eos_token=_END, unk_token=_END, pad_token=_END, model_max_length=_LONGEST)
