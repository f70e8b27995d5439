"""What `refine` gains by its closed form, by training, and by both: `python factors.py --work FOLDER`.

Each measurement is one entry of factors.json, so that what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gallery import Gallery, Test
from study import prompts_file
from train_loras import ADAPTERS, EXAMPLE, MODEL

import lorashrink as ls

RESULTS = Path(__file__).parent / "factors.json"
_PICTURES, _PROMPTS, _STEPS = 16, 12, 80
# In which ways a shrunk file is refined -> (steps of training, whether the closed form comes first).
_WAYS = {"shrunk": None, "factors": (0, True), "trained": (_STEPS, False), "both": (_STEPS, True)}


class Case(NamedTuple):
    """A shrunk adapter to refine."""

    name: str
    size: float  # MiB
    dtype: str = "fp16"

    def key(self, way: str) -> str:
        """The entry of factors.json for one way to refine it."""
        return "|".join([self.name, f"{self.size}", *([] if self.dtype == "fp16" else [self.dtype]), way])


CASES = (
    *(Case("style", size) for size in (0.25, 0.37, 0.6)),
    *(Case("style", size, "fp8") for size in (0.15, 0.2, 0.31)),
    *(Case("heart", size) for size in (0.35, 0.59)),
    *(Case("heart", size, "fp8") for size in (0.2, 0.32)),
)


def measure(work: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    gallery = Gallery(MODEL)
    for case in CASES:
        source, teaches = EXAMPLE / "loras" / f"{case.name}.safetensors", ADAPTERS[case.name].teaches
        small, test = work / f"{case.key('')}.safetensors".replace("|", "-"), Test.of(teaches, _PICTURES)
        prompts, originals = prompts_file(work, teaches, _PROMPTS), None
        for way, options in _WAYS.items():
            key = case.key(way)
            if key in results:
                continue
            path, facts = small, {}
            if options is None or not small.exists():
                ls.resize(
                    source,
                    base=MODEL,
                    recipes=f"calib,bytes,size={case.size}",
                    calibration=EXAMPLE / "table.safetensors",
                    dtype=case.dtype,
                    output=small,
                    force=True,
                )
            if options:
                path = work / "refined.safetensors"
                result = ls.refine(
                    small,
                    like=source,
                    model=MODEL,
                    output=path,
                    prompts=prompts,
                    steps=options[0],
                    closed_form=options[1],
                    force=True,
                )
                facts["held"] = round(result.loss_after / result.loss_before, 3)
            originals = originals or gallery.paint(source, test)
            psnr = gallery.see(gallery.paint(path, test), originals, test).psnr
            results[key] = {**facts, "bytes": path.stat().st_size, "psnr": [round(float(value), 2) for value in psnr]}
            RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
            print(key, facts, f"{psnr.mean():.2f} dB", flush=True)
    return results


def table(results: Mapping[str, Any]) -> str:
    """PSNR of each case."""
    lines = [
        "| adapter | dtype | size | shrunk | factors alone | training alone | both |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        rows = [results.get(case.key(way)) for way in _WAYS]
        if not any(rows):
            continue
        cells = ["-" if row is None else f"{np.mean(row['psnr']):.1f}" for row in rows]
        assert rows[0]
        lines.append(f"| {case.name} | {case.dtype} | {rows[0]['bytes'] / 1000:.0f} kB | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for files")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(table(measure(arguments.work)))
