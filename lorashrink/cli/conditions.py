"""Conditions of `--fail-on`, such as `error>5%`, `psnr<40` or `size>50MB`."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lorashrink.errors import UsageError
from lorashrink.text import bytes_in, decibel_text, percent_text, size_text

FailOn = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-on",
        metavar="CONDITION",
        help="Exit with status 3 if a result meets a condition: error>5%, psnr<40, size>50MB.",
    ),
]

# Of one result: "error" as a share, "psnr" in dB, "size" in bytes; None where it was not measured.
Measured = Mapping[str, float | None]

# A command's result -> the name of each file or recipe in it, and what was measured of that.
Measure = Callable[[Any], Iterable[tuple[str, Measured]]]

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


# What is measured -> the number that the text of a limit stands for.
_LIMITS: Mapping[str, Callable[[str], float]] = {
    "error": lambda text: float(text[:-1]) / 100 if text.endswith("%") else float(text),
    "psnr": lambda text: float(re.sub(r" ?db$", "", text, flags=re.IGNORECASE)),
    "size": bytes_in,
}

_TEXTS: Mapping[str, Callable[[float], str]] = {"error": percent_text, "psnr": decibel_text, "size": size_text}

_CONDITION = re.compile(rf"\s*({'|'.join(_LIMITS)})\s*({'|'.join(_COMPARISONS)})\s*([\d.]+(?: ?[A-Za-z]+|%)?)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison that fails the run for every result that meets it."""

    text: str
    quantity: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str, quantities: Collection[str] = tuple(_LIMITS)) -> Condition:
        """Parse a condition on one of these quantities. Raises UsageError."""
        match = _CONDITION.fullmatch(text)
        if match and match[1] not in quantities:
            raise UsageError(f"--fail-on {text}: this command measures {' and '.join(quantities)}.")
        if match:
            with contextlib.suppress(ValueError):
                return cls(text.strip(), match[1], match[2], _LIMITS[match[1]](match[3]))
        raise UsageError(f"--fail-on {text}: write it like error>5%, psnr<40 or size>50MB, in quotes.")

    def fault(self, measured: Measured) -> str:
        """What is wrong with a result by this condition, "" if nothing. What was not measured is wrong."""
        value = measured.get(self.quantity)
        if value is None:
            return f"{self.text} cannot be checked: no pictures were drawn"
        met = _COMPARISONS[self.comparison](value, self.limit)
        return f"{self.text} is true: {_TEXTS[self.quantity](value)}" if met else ""
