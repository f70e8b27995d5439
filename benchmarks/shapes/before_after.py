"""Draw docs/before-after.png with the example model: `python before_after.py [--pictures FOLDER]`.

Pictures of a style without it, with the original adapter and with the shrunk one, and the sizes of both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import lorashrink as ls
from lorashrink.plots.sheet import sheet_font
from lorashrink.plots.style import INK
from lorashrink.text import size_text
from lorashrink_example import path

_RECIPE, _SIZE = "calib,bytes", 0.5  # MiB
_SIDE, _GAP, _LABEL = 128, 8, 150  # pixels
_OUTPUT = Path(__file__).parents[2] / "docs" / "before-after.png"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw docs/before-after.png.")
    parser.add_argument("--pictures", type=Path, help="Folder for the pictures; default is the user's cache.")
    args = parser.parse_args(argv)
    swept = ls.sweep(
        path("loras", "style.safetensors"),
        base=path("model"),
        recipes=_RECIPE,
        sizes=(_SIZE,),
        calibration=path("table.safetensors"),
        images=path("model"),
        prompts=path("prompts.txt"),
        pictures=args.pictures,
    )
    point, drawn = swept.points[0], swept.drawn
    assert point.pictures
    assert drawn
    rows = [
        (("without the LoRA",), drawn.none.files),
        (("with the LoRA,", size_text(swept.bytes)), drawn.files),
        (("shrunk to", size_text(point.bytes)), point.pictures.files),
    ]
    sheet(rows).quantize(256).save(_OUTPUT, optimize=True)
    print(f"{_OUTPUT}: {swept.bytes} -> {point.bytes} bytes, PSNR {point.pictures.psnr:.1f} dB")


def sheet(rows: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> Image.Image:
    """Rows of pictures, each behind the lines of its label; RGB."""
    step = _SIDE + _GAP
    image = Image.new("RGB", (_LABEL + step * len(rows[0][1]), step * len(rows) - _GAP), "white")
    drawing = ImageDraw.Draw(image)
    for row, (label, files) in enumerate(rows):
        drawing.multiline_text((_GAP, row * step + _SIDE // 2), "\n".join(label), INK, sheet_font(16), anchor="lm")
        for column, file in enumerate(files):
            with Image.open(file) as picture:
                image.paste(
                    picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (_LABEL + column * step, row * step)
                )
    return image


if __name__ == "__main__":
    main()
