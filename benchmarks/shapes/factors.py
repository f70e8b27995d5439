"""What the closed form of `refine` gains without training, and before it: `python factors.py --work FOLDER`.

Each measurement is one entry of factors.json, so that what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gallery import Gallery, Test
from study import prompts_file
from train_loras import ADAPTERS, EXAMPLE, MODEL

import lorashrink as ls

RESULTS = Path(__file__).parent / "factors.json"
_PICTURES, _PROMPTS, _STEPS = 16, 12, 80
# (adapter, MiB, whether it is also trained)
CASES = (("style", 0.37, True), ("style", 0.25, False), ("heart", 0.35, False), ("heart", 0.59, False))


def measure(work: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    gallery = Gallery(MODEL)
    for name, size, trained in CASES:
        source, teaches = EXAMPLE / "loras" / f"{name}.safetensors", ADAPTERS[name].teaches
        small, test = work / f"{name}-{size}.safetensors", Test.of(teaches, _PICTURES)
        prompts, originals = prompts_file(work, teaches, _PROMPTS), None
        ways = {"shrunk": None, "factors": (0, True)}
        ways |= {"trained": (_STEPS, False), "both": (_STEPS, True)} if trained else {}
        for way, options in ways.items():
            key = f"{name}|{size}|{way}"
            if key in results:
                continue
            path, facts = small, {}
            if options is None or not small.exists():
                ls.resize(
                    source,
                    base=MODEL,
                    recipes=f"calib,bytes,size={size}",
                    calibration=EXAMPLE / "table.safetensors",
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
        "| adapter | size | shrunk | factors alone | training alone | both |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, size, _ in CASES:
        rows = [results.get(f"{name}|{size}|{way}") for way in ("shrunk", "factors", "trained", "both")]
        cells = ["-" if row is None else f"{np.mean(row['psnr']):.1f}" for row in rows]
        assert rows[0]
        lines.append(f"| {name} | {rows[0]['bytes'] / 1000:.0f} kB | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for files")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(table(measure(arguments.work)))
