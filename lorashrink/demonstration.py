"""The main job on the example that is part of the package: a base of SDXL's architecture and a LoCon for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorashrink.batch import resize
from lorashrink.errors import OutputError
from lorashrink.recipe import DEFAULT
from lorashrink.results import Report

EXAMPLE = Path(__file__).parent / "example"


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did and left behind."""

    report: Report
    command: str  # the same by hand
    picture: str


def demo(output: str | Path = "demo-out", *, progress: Callable[[str, int, int], None] | None = None) -> Demo:
    """Shrink the example adapter as training guides do, and draw the rank of each block before and after.

    Writes the adapter and a PNG into the folder `output`. Raises OutputError.
    """
    from lorashrink.plots.ranks import rank_per_block

    folder = Path(output)
    base, adapter = EXAMPLE / "base.safetensors", EXAMPLE / "adapter.safetensors"
    report = resize(adapter, base=base, recipes=DEFAULT, output=folder, force=True, progress=progress)
    picture = folder / "ranks.png"
    try:
        rank_per_block(report.results[0]).savefig(picture)
    except OSError as error:
        raise OutputError(f"{picture}: cannot be written ({error.strerror or error}).") from error
    return Demo(report, f"lorashrink resize -o {folder} -r {DEFAULT} {base} {adapter}", str(picture))
