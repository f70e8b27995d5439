"""CLIP's tokenizer from the package with its vocabulary, against ids of transformers' published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorashrink.pictures.clip_tokenizer import bundled_tokenizer

# Text -> ids that transformers' CLIPTokenizer gives with the published vocabulary.
EXPECTED: dict[str, list[int]] = json.loads((Path(__file__).parents[1] / "data" / "clip_tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bundled_tokenizer()


def test_ids_are_those_of_the_published_tokenizer(tokenizer: Any) -> None:
    assert len(EXPECTED) > 400
    wrong = {text: (ids, found) for text, ids in EXPECTED.items() if (found := tokenizer(text)["input_ids"]) != ids}
    assert not wrong


def test_a_batch_is_padded_and_cut_to_77_tokens(tokenizer: Any) -> None:
    batch = tokenizer(["a cat", "cat " * 100], padding="max_length", truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 77)
    assert batch["input_ids"][0, :5].tolist() == [49406, 320, 2368, 49407, 49407]
    assert batch["input_ids"][1, [0, 75, 76]].tolist() == [49406, 2368, 49407]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 77]


def test_another_padding_leaves_texts_alone(tokenizer: Any) -> None:
    padded = bundled_tokenizer()
    padded.pad_token_id = 0
    ids = padded("0 !", padding="max_length", max_length=6)["input_ids"]
    assert ids == [49406, 271, 256, 49407, 0, 0]


def test_ids_become_text_again(tokenizer: Any) -> None:
    ids = tokenizer("Hello, 4K 日本")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello , 4 k 日本"
