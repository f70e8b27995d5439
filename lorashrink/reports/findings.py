"""The facts that a report page states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashrink.bases.views import BaseInfo
from lorashrink.results.inspection import AdapterTable
from lorashrink.results.shrinking import FileResult
from lorashrink.results.sweep import Sweep


@dataclass(frozen=True, slots=True)
class Findings:
    """What a page is made of."""

    table: AdapterTable  # with singular values
    base: BaseInfo | None
    sweep: Sweep | None
    unswept: str  # why there is no sweep, else ""
    shrunk: FileResult | None  # what one recipe of the sweep would do to each layer
    hashes: Mapping[str, str]  # file -> what identifies its contents
    commands: Mapping[str, str]  # purpose -> command line
