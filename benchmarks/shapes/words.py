"""CLIP's tokenizer with only the merges that some chosen words need: they split as in CLIP, others fall into pieces."""

from __future__ import annotations

import gzip
import json
import zipfile
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
PADS = {"tokenizer": END, "tokenizer_2": "!"}  # of the two tokenizers, as in SDXL
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # of CLIP's vocabulary; the file holds more

_TEXT = """
a an the on in of with and no at by to from for one two three left right top bottom centre center middle
small big large medium tiny huge little
red orange yellow green cyan blue purple pink white black gray grey brown dark light pale bright
circle square triangle star ring cross diamond heart crescent hexagon moon oval shape shapes
background style sks pts striped stripes dotted dots outlined outline plain solid soft shadow glow pattern texture
photo picture image drawing painting illustration icon logo simple flat art
blurry blurred low high quality best worst bad good detailed
"""
WORDS = tuple(_TEXT.split())


def read_merges(path: Path) -> list[tuple[str, str]]:
    """CLIP's merges, best first, from the vocabulary file or from the wheel of open-clip-torch that holds it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            packed = wheel.read(f"open_clip/{_FILE}")
    else:
        packed = path.read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    return [(first, second) for first, second in (line.split() for line in lines[1 : _MERGES + 1])]


def used_merges(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that make up a word."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    used = set()
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        index = pairs.index(best)
        parts[index : index + 2] = ["".join(best)]
    return used


def write_tokenizer(folder: Path, merges: list[tuple[str, str]], pad: str) -> CLIPTokenizer:
    """A folder with vocab.json, merges.txt and tokenizer_config.json, and the tokenizer that it holds."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    kept = sorted(set().union(*(used_merges(word, ranks) for word in WORDS)), key=ranks.__getitem__)
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in kept), START, END]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: index for index, word in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in kept)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
