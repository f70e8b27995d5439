"""Captions: what a caption file says, and what of it a picture is shown with this time.

The rules are sd-scripts' caption options. All chance comes from the generator that is given, so that a showing can be
repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

from lorashrink.errors import InputError
from lorashrink.train.flags.options import Options


def varies(options: Options) -> bool:
    """Whether a picture may have different captions from one showing to the next."""
    return _splits(options) or options.caption_dropout_rate > 0 or options.caption_dropout_every_n_epochs > 0


def _splits(options: Options) -> bool:
    """Whether captions are taken apart into tags. If not, they are used as they were written."""
    return options.shuffle_caption or options.caption_tag_dropout_rate > 0


def read_caption(picture: Path, options: Options) -> list[str] | None:
    """The lines of a picture's caption file, stripped: its caption, and lines that are not used, without blank ones.

    None where there is no such file. Raises InputError if it is empty, or no UTF-8 text, or cannot be read.
    """
    path = picture.with_name(picture.stem + options.caption_extension)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text; save it with the encoding UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not text:
        raise InputError(f"{path} is empty; write a caption, or delete it to use the folder's name as caption")
    first, *more = [line.strip() for line in text.split("\n")]
    return [first, *filter(None, more)]


def draw_caption(caption: str, options: Options, random: Random, *, epoch: int) -> str:
    """The caption for one showing of a picture in this epoch, counted from 1."""
    if options.caption_dropout_rate > 0 and random.random() < options.caption_dropout_rate:
        return ""
    if options.caption_dropout_every_n_epochs > 0 and epoch % options.caption_dropout_every_n_epochs == 0:
        return ""
    caption = " ".join(filter(None, (options.caption_prefix, caption, options.caption_suffix)))
    mark, separator = options.keep_tokens_separator, options.caption_separator
    if _splits(options):
        if mark and mark in caption:
            # Between the marks blank tags vanish; without a mark they are tags like others.
            head, tags, *tail = [list(filter(None, _tags(part, separator))) for part in caption.split(mark, 2)]
        else:
            tags, tail = _tags(caption, separator), []
            head, tags = tags[: options.keep_tokens], tags[options.keep_tokens :]
        if options.shuffle_caption:
            random.shuffle(tags)
        if options.caption_tag_dropout_rate > 0:
            tags = [tag for tag in tags if random.random() >= options.caption_tag_dropout_rate]
        joined = separator if separator[-1:].isspace() else f"{separator} "
        caption = joined.join(head + tags + (tail[0] if tail else []))
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, separator)
    return caption


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator)]


def tag_counts(captions: Iterable[str], options: Options) -> dict[str, int]:
    """How often each tag occurs, in lower case, in order of first occurrence: for `ss_tag_frequency`.

    --keep_tokens_separator stands between tags and is in none.
    """
    mark, separator = options.keep_tokens_separator, options.caption_separator
    plain = (caption.replace(mark, separator) if mark else caption for caption in captions)
    tags = (tag.lower() for caption in plain for tag in _tags(caption, separator))
    return dict(Counter(tag for tag in tags if tag))
