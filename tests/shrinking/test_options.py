"""The options of `resize`: one list of them, known to type checkers, to the documentation and to the command."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

import pytest

from lorashrink.cli.resizing import resize as command
from lorashrink.errors import UsageError
from lorashrink.shrinking.options import ResizeKeywords, ResizeOptions
from lorashrink.shrinking.run import resize

FIELDS = {field.name for field in dataclasses.fields(ResizeOptions)}


def test_the_keywords_are_the_fields_with_their_types() -> None:
    assert typing.get_type_hints(ResizeKeywords) == typing.get_type_hints(ResizeOptions)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_help_describes_every_option(name: str) -> None:
    assert re.search(rf"^ +(?:\w+, )*{name}(?:, \w+)*: ", str(resize.__doc__), re.MULTILINE)


def test_the_command_has_every_option() -> None:
    assert FIELDS - set(inspect.signature(command).parameters) == {"recipes", "quantiles"}


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        resize("lora.safetensors", colour="red")


def test_no_adapters_at_all_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no adapters"):
        resize([], recipes="rank=1")
