"""Bytes against pictures, packed and not: `python packed.py` measures the two adapters of the package.

Each measurement is one entry of packed.json, so that what is there is not measured again. `--table` prints the section
of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gallery import Gallery, Test
from render import Pixels
from train_loras import ADAPTERS, EXAMPLE, MODEL

import lorashrink as ls
from lorashrink.files.header import header_bytes, read_header

RESULTS = Path(__file__).parent / "packed.json"
NAMES = ("style", "heart")
_PICTURES = 16
_TABLE = EXAMPLE / "table.safetensors"
_WAYS: Mapping[str, Mapping[str, Any]] = {
    "calibration": {"calibration": _TABLE},
    "base": {"base": MODEL},
    "weights": {},
}
_BYTES = (25_000, 40_000, 60_000, 90_000, 130_000, 180_000)  # of packed files, without metadata
_QUALITY = 40  # dB
_SIZES = (0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)  # MiB of ordinary tensors
_RECIPES = ("fro_ckpt,bytes", "calib,bytes")


def payload(path: Path) -> int:
    """Bytes of a packed file without its metadata."""
    _, metadata, _ = read_header(path)
    return path.stat().st_size - len(header_bytes({}, metadata))


def tensors(path: Path) -> int:
    """Bytes of the tensors of an ordinary file, without its header."""
    return sum(info.nbytes for info in read_header(path)[0].values())


class Study:
    """The pictures of each adapter, and what was measured."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.folder = Path(tempfile.mkdtemp(prefix="lorashrink-"))

    @property
    @cache  # noqa: B019 - one study per process
    def gallery(self) -> Gallery:
        return Gallery(MODEL)

    @cache  # noqa: B019
    def originals(self, name: str) -> list[Pixels]:
        return self.gallery.paint(source(name), self.test(name))

    def test(self, name: str) -> Test:
        return Test.of(ADAPTERS[name].teaches, _PICTURES)

    def measure(self, key: str, name: str, make: Callable[[Path], dict[str, Any]]) -> None:
        """Measure what is not there yet, and write it down."""
        if key in self.results:
            return
        path = self.folder / "made.safetensors"
        facts = make(path)
        test = self.test(name)
        pictures = self.gallery.see(self.gallery.paint(path, test), self.originals(name), test)
        facts["psnr"] = [round(float(value), 2) for value in pictures.psnr]
        self.results[key] = facts
        RESULTS.write_text(json.dumps(self.results, indent=0, sort_keys=True) + "\n")
        print(key, facts["bytes"], f"{np.mean(facts['psnr']):.1f} dB", flush=True)


def source(name: str) -> Path:
    return EXAMPLE / "loras" / f"{name}.safetensors"


def pack(name: str, way: str, nbytes: int | None, path: Path) -> dict[str, Any]:
    """By size, without metadata, or by quality."""
    metadata = len(header_bytes({}, read_header(source(name))[1]))
    goal = {"quality": _QUALITY} if nbytes is None else {"size": nbytes + metadata}
    (result,) = ls.pack(source(name), output=path, force=True, **goal, **_WAYS[way]).results
    return {"bytes": payload(path), "predicted": round(result.predicted_db, 2), "bits": round(result.bits, 3)}


def shrink(name: str, recipe: str, size: float, path: Path) -> dict[str, Any]:
    header = len(read_header(source(name))[2]) / 2**20
    ls.resize(
        source(name),
        base=MODEL,
        calibration=_TABLE,
        recipes=f"{recipe},size={size + header:.5f}",
        dtype="fp16",
        output=path,
        force=True,
    )
    return {"bytes": tensors(path)}


def run(study: Study) -> None:
    for name in NAMES:
        for recipe in _RECIPES:
            for size in _SIZES:
                study.measure(
                    f"{name}|{recipe}|{size}",
                    name,
                    lambda path, name=name, recipe=recipe, size=size: shrink(name, recipe, size, path),
                )
        for way in _WAYS:
            for nbytes in (*_BYTES, None):
                study.measure(
                    f"{name}|{way}|{nbytes or 'quality'}",
                    name,
                    lambda path, name=name, way=way, nbytes=nbytes: pack(name, way, nbytes, path),
                )


# --- what was measured --------------------------------------------------------------------------


def curve(results: Mapping[str, Any], name: str, kind: str) -> tuple[list[float], list[float]]:
    """(bytes, mean PSNR) of one kind of file, smallest first."""
    rows = [row for key, row in results.items() if key.startswith(f"{name}|{kind}|")]
    pairs = sorted((row["bytes"], float(np.mean(row["psnr"]))) for row in rows)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def bytes_for(results: Mapping[str, Any], name: str, kind: str, quality: float) -> float | None:
    """Bytes at which the curve reaches a PSNR, None outside of what was measured."""
    nbytes, values = curve(results, name, kind)
    rising = np.maximum.accumulate(values)
    if not rising[0] <= quality <= rising[-1]:
        return None
    return float(np.exp(np.interp(quality, rising, np.log(nbytes))))


def table(results: Mapping[str, Any]) -> str:
    """kB at three qualities."""
    lines = ["| adapter | file | 30 dB | 35 dB | 40 dB |", "| --- | --- | --- | --- | --- |"]
    kinds = {
        "fro_ckpt,bytes": "`fro_ckpt,bytes`, fp16",
        "calib,bytes": "`calib,bytes`, fp16",
        "weights": "packed by ΔW alone",
        "base": "packed by the base",
        "calibration": "packed by statistics",
    }
    for name in NAMES:
        for kind, title in kinds.items():
            sizes = [bytes_for(results, name, kind, quality) for quality in (30, 35, 40)]
            cells = ["-" if size is None else f"{size / 1000:.0f} kB" for size in sizes]
            lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predictions(results: Mapping[str, Any]) -> str:
    """How far off predictions are, and what `--quality` really gave."""
    heads = ("judged by", "predictions are off by", *(f"`--quality {_QUALITY}`, {name}" for name in NAMES))
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for way, title in {"calibration": "statistics", "base": "the base", "weights": "ΔW alone"}.items():
        rows = [row for key, row in results.items() if key.split("|")[1] == way]
        pairs = [(float(np.mean(row["psnr"])), row["predicted"]) for row in rows]
        off = np.sqrt(np.mean([(measured - predicted) ** 2 for measured, predicted in pairs if 24 < measured < 50]))
        exact = [results[f"{name}|{way}|quality"] for name in NAMES]
        cells = [f"{np.mean(row['psnr']):.1f} dB in {row['bytes'] / 1000:.0f} kB" for row in exact]
        lines.append(f"| {title} | {off:.1f} dB | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    if not parser.parse_args().table:
        run(Study())
    measured = json.loads(RESULTS.read_text())
    print(table(measured))
    print(predictions(measured))
