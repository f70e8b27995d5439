"""Captions: what a caption file says, and what of it a picture is shown with this time.

The rules are sd-scripts'. All chance comes from the generator that is given, so that a showing can be repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lorashrink.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """How captions are read and varied; the fields are sd-scripts' caption options."""

    extension: str = ".caption"
    separator: str = ","
    shuffle: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether a picture has the same caption each time it is shown."""
        return not (self.splits or self.dropout_rate > 0 or self.dropout_every_n_epochs > 0)

    @property
    def splits(self) -> bool:
        """Whether captions are taken apart into tags. If not, they are used as they were written."""
        return self.shuffle or self.tag_dropout_rate > 0


def read_caption(picture: Path, rules: CaptionRules) -> str | None:
    """The first line of a picture's caption file, stripped; None where there is no such file.

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
    return text.split("\n")[0].strip()


def draw_caption(caption: str, rules: CaptionRules, random: Random, *, epoch: int) -> str:
    """The caption for one showing of a picture in this epoch, counted from 1."""
    if rules.dropout_rate > 0 and random.random() < rules.dropout_rate:
        return ""
    if rules.dropout_every_n_epochs > 0 and epoch % rules.dropout_every_n_epochs == 0:
        return ""
    caption = " ".join(filter(None, (rules.prefix, caption, rules.suffix)))
    if rules.splits:
        head, tags, tail = _parts(caption, rules)
        if rules.shuffle:
            random.shuffle(tags)
        if rules.tag_dropout_rate > 0:
            tags = [tag for tag in tags if random.random() >= rules.tag_dropout_rate]
        caption = ", ".join(head + tags + tail)
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.separator)
    return caption


def _parts(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that vary, and those that stay at the end."""
    mark = rules.keep_tokens_separator
    if mark and mark in caption:
        # Between the marks blank tags vanish; without a mark they are tags like others.
        head, tags, *tail = [list(filter(None, _tags(part, rules.separator))) for part in caption.split(mark, 2)]
        return head, tags, tail[0] if tail else []
    tags = _tags(caption, rules.separator)
    kept = max(rules.keep_tokens, 0)
    return tags[:kept], tags[kept:], []


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator)]


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag between commas occurs, in lower case, in order of first occurrence: for `ss_tag_frequency`."""
    tags = (tag.lower() for caption in captions for tag in _tags(caption, ","))
    return dict(Counter(tag for tag in tags if tag))
