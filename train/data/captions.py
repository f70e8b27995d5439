"""Captions: what a caption file says, and what of it a picture is shown with this time.

The rules are sd-scripts'. All chance comes from the generator that is given, so that a showing can be repeated.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lorashrink.errors import InputError

_WILDCARD = re.compile(r"\{([^}]+)\}")
# Stand for the literal braces {{ and }} while wildcards are replaced; no text file has these characters.
_OPEN, _CLOSE = "\0", "\1"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """How captions are read and varied; the fields are sd-scripts' caption options."""

    extension: str = ".caption"
    separator: str = ","
    shuffle: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    wildcard: bool = False
    prefix: str | None = None
    suffix: str | None = None
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether a picture has the same caption each time it is shown."""
        return not (self.splits or self.wildcard or self.dropout_rate > 0 or self.dropout_every_n_epochs > 0)

    @property
    def splits(self) -> bool:
        """Whether captions are taken apart into tags. If not, they are used as they were written."""
        return self.shuffle or self.token_warmup_step > 0 or self.tag_dropout_rate > 0


def read_caption(picture: Path, rules: CaptionRules) -> tuple[str, ...] | None:
    """The stripped lines of a picture's caption file: the first, or with wildcards all that are not blank.

    None where there is no such file. A file whose first line is blank is an empty caption.

    Raises:
        InputError: the file is empty, or no UTF-8 text, or cannot be read.
    """
    path = picture.with_name(picture.stem + rules.extension)
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text; save it with the encoding UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not text:
        raise InputError(f"{path} is empty; write a caption, or delete it to use the folder's name as caption")
    lines = [line.strip() for line in text.split("\n")]
    if not rules.wildcard:
        return (lines[0],)
    return tuple(filter(None, lines)) or ("",)


def draw(
    lines: tuple[str, ...], rules: CaptionRules, random: Random, *, epoch: int, step: int, total_steps: int
) -> str:
    """The caption for one showing of a picture.

    Args:
        lines: of `read_caption`.
        epoch: counted from 1.
        step: optimizer steps done before this showing.
        total_steps: optimizer steps of the whole training.
    """
    if rules.dropout_rate > 0 and random.random() < rules.dropout_rate:
        return ""
    if rules.dropout_every_n_epochs > 0 and epoch % rules.dropout_every_n_epochs == 0:
        return ""
    line = random.choice(lines) if rules.wildcard else lines[0]
    caption = " ".join(filter(None, (rules.prefix, line, rules.suffix)))
    if rules.wildcard:
        caption = _choose(caption, random)
    if rules.splits:
        caption = _vary(caption, rules, random, step, total_steps)
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.separator)
    return caption


def _choose(caption: str, random: Random) -> str:
    """The caption with one of a, b, c for each {a|b|c}, and single braces for double ones."""
    hidden = caption.replace("{{", _OPEN).replace("}}", _CLOSE)
    chosen = _WILDCARD.sub(lambda match: random.choice(match[1].split("|")), hidden)
    return chosen.replace(_OPEN, "{").replace(_CLOSE, "}")


def _vary(caption: str, rules: CaptionRules, random: Random, step: int, total_steps: int) -> str:
    """The caption's tags shuffled and thinned out as the rules say, joined by ", "."""
    head, tags, tail = _parts(caption, rules)
    tags = tags[: _warm(len(tags), rules, step, total_steps)]
    if rules.shuffle:
        random.shuffle(tags)
    if rules.tag_dropout_rate > 0:
        tags = [tag for tag in tags if random.random() >= rules.tag_dropout_rate]
    return ", ".join(head + tags + tail)


def _warm(count: int, rules: CaptionRules, step: int, total_steps: int) -> int:
    """How many of `count` tags are used: from the warm-up's least number to all, along a straight line."""
    length = rules.token_warmup_step
    if length < 1:
        length = math.floor(length * total_steps)
    if step >= length:
        return count
    return rules.token_warmup_min + math.floor(step * (count - rules.token_warmup_min) / length)


def _parts(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that vary, and those that stay at the end."""
    mark = rules.keep_tokens_separator
    if mark and mark in caption:
        # Between the marks blank tags vanish; without a mark they are tags like others.
        parts = [list(filter(None, _tags(part, rules.separator))) for part in caption.split(mark, 2)]
        head, tags, *rest = parts
        return head, tags, rest[0] if rest else []
    tags = _tags(caption, rules.separator)
    kept = max(rules.keep_tokens, 0)
    return tags[:kept], tags[kept:], []


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator)]


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag between commas occurs, in lower case, in order of first occurrence: for `ss_tag_frequency`."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))
