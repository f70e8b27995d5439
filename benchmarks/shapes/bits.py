"""How many bytes of numbers a mean PSNR takes in fp16 and in fp8: `python bits.py`, which adds what `bits.json` lacks.

Each entry is an adapter, a recipe, a dtype and a number of bytes; `write_up.py` makes the section of docs/evidence.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gallery import Gallery, Test
from render import Pixels
from train_loras import ADAPTERS, EXAMPLE, MODEL

import lorashrink as ls
from lorashrink.files.header import read_header

RESULTS = Path(__file__).with_name("bits.json")
# (recipe, dtype) -> kB of numbers at which it is drawn
FORMS = {
    ("fro_ckpt,bytes", "fp16"): (280, 480, 690, 900),
    ("fro_ckpt", "fp16"): (280, 480, 690, 900),
    ("fro_ckpt,bytes", "fp8"): (140, 240, 345, 450),
    ("calib,bytes", "fp16"): (250, 380, 520, 680),
    ("calib,bytes", "fp8"): (110, 170, 230, 290, 400),
    ("calib,bytes", "mixed"): (290, 400, 660),
}
_PICTURES = 16
_HEADER = 0.1  # MiB of names and metadata, to begin with


def written(source: Path, recipe: str, dtype: str, kilobytes: int, output: Path) -> dict[str, Any]:
    """Shrink to about so many kB of numbers."""
    size = kilobytes / 1024 + _HEADER
    for _ in range(3):
        (result,) = ls.resize(
            source,
            base=MODEL,
            recipes=f"{recipe},size={size:.6f}",
            calibration=EXAMPLE / "table.safetensors",
            dtype=dtype,
            output=output,
            force=True,
        ).results
        payload = sum(info.nbytes for info in read_header(output)[0].values())
        size += (kilobytes * 1000 - payload) / 2**20
    return {"payload": payload, "predicted": result.predicted_db, "distortion": result.distortion}


def main() -> None:
    torch.set_num_threads(1)
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    gallery = Gallery(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "shrunk.safetensors"
        for name in ("style", "heart"):
            source, test = EXAMPLE / "loras" / f"{name}.safetensors", Test.of(ADAPTERS[name].teaches, _PICTURES)
            originals: list[Pixels] = []
            for (recipe, dtype), sizes in FORMS.items():
                for kilobytes in sizes:
                    key = f"{name}|{recipe}|{dtype}|{kilobytes}"
                    if key in entries:
                        continue
                    originals = originals or gallery.paint(source, test)
                    entry = written(source, recipe, dtype, kilobytes, output)
                    seen = gallery.see(gallery.paint(output, test), originals, test)
                    entries[key] = entry | {"psnr": [round(float(value), 2) for value in seen.psnr]}
                    RESULTS.write_text(json.dumps(entries, indent=0, sort_keys=True) + "\n")
                    print(key, entry, f"{seen.psnr.mean():.1f} dB, worst {seen.psnr.min():.1f}", flush=True)


if __name__ == "__main__":
    main()
