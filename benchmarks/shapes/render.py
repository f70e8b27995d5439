"""Captioned pictures of simple shapes, 64x64: `python render.py OUT --count 256 --style sks` writes a training folder.

A caption reads "a small red circle on a white background"; 672 captions make up the base's world. Two styles and two
shapes are left to adapters: "..., sks style" stripes and outlines the shape, "..., pts style" dots the background, and
the base has never seen a heart or a crescent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

WIDTH = 64
_FINE = 2  # samples per pixel and direction

SIZES = {"small": (0.32, 0.38), "": (0.46, 0.55), "big": (0.64, 0.74)}  # radius; half the picture's width is 1
COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 160, 60),
    "cyan": (40, 205, 215),
    "blue": (40, 70, 220),
    "purple": (130, 50, 175),
    "pink": (250, 140, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "brown": (110, 65, 30)}
BASE_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond")
NEW_SHAPES = ("heart", "crescent")
SHAPES = (*BASE_SHAPES, *NEW_SHAPES)
STYLES = ("sks", "pts")

_TILT = 0.14  # radians to either side
_SHIFT = 0.18  # of the centre, to either side
_OUTLINE, _STRIPES, _DOTS, _DOT = 2.0, 7.0, 10.0, 2.3  # pixels: width, period, period, radius


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows, which is what its caption says."""

    size: str
    colour: str
    shape: str
    background: str
    sks: bool = False
    pts: bool = False

    @property
    def caption(self) -> str:
        thing = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        article = "an" if thing.startswith("orange") else "a"
        styles = "".join(f", {style} style" for style in STYLES if getattr(self, style))
        return f"{article} {thing} on a {self.background} background{styles}"


def parse(caption: str) -> Scene:
    """The scene of a caption that `Scene.caption` wrote."""
    plain, *styles = caption.split(", ")
    thing, ground = plain.split(" on a ")
    *size, colour, shape = thing.split()[1:]
    drawn = {style: f"{style} style" in styles for style in STYLES}
    return Scene("".join(size), colour, shape, ground.removesuffix(" background"), **drawn)


def base_scenes() -> list[Scene]:
    """Every scene of the base, 672."""
    return [
        Scene(size, colour, shape, background)
        for size in SIZES
        for colour in COLOURS
        for shape in BASE_SHAPES
        for background in BACKGROUNDS
    ]


def draw_scenes(
    count: int, seed: int, shapes: Sequence[str] = BASE_SHAPES, styles: Sequence[str] = (), styled: float = 1.0
) -> list[Scene]:
    """Scenes at random; a share `styled` of them is in one of `styles`, if there are any."""
    random = np.random.default_rng(seed)

    def random_scene() -> Scene:
        size, colour, shape, background = (
            str(random.choice(list(words))) for words in (SIZES, COLOURS, shapes, BACKGROUNDS)
        )
        style = str(random.choice(list(styles))) if styles and random.random() < styled else ""
        return Scene(size, colour, shape, background, sks=style == "sks", pts=style == "pts")

    return [random_scene() for _ in range(count)]


# --- signed distances: negative within; x to the right, y downwards, r the radius -----------------


def _circle(x: Array, y: Array, r: float) -> Array:
    return np.hypot(x, y) - r


def _box(x: Array, y: Array, width: float, height: float) -> Array:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _square(x: Array, y: Array, r: float) -> Array:
    return _box(x, y, 0.8 * r, 0.8 * r)


def _triangle(x: Array, y: Array, r: float) -> Array:
    slope = np.sqrt(3) / 2
    below = y - 0.27 * r  # the centre of its height, not of its mass
    return np.maximum(np.abs(x) * slope - below * 0.5, below) - r * 0.58


def _star(x: Array, y: Array, r: float) -> Array:
    # The edge between a tip and the notch beside it; the other nine are its mirror images.
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    distance = np.hypot(x, y)
    tip, notch = (r, 0.0), (0.42 * r * np.cos(np.pi / 5), 0.42 * r * np.sin(np.pi / 5))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    length = np.hypot(*edge)
    along, across = distance * np.cos(angle), distance * np.sin(angle)
    return ((along - tip[0]) * edge[1] - (across - tip[1]) * edge[0]) / length


def _ring(x: Array, y: Array, r: float) -> Array:
    return np.abs(np.hypot(x, y) - 0.74 * r) - 0.24 * r


def _cross(x: Array, y: Array, r: float) -> Array:
    return np.minimum(_box(x, y, r, 0.32 * r), _box(x, y, 0.32 * r, r))


def _diamond(x: Array, y: Array, r: float) -> Array:
    wide, high = 0.66 * r, r
    return (np.abs(x) * high + np.abs(y) * wide - wide * high) / np.hypot(wide, high)


def _heart(x: Array, y: Array, r: float) -> Array:
    # Two circles on the upper sides of a square that stands on its corner.
    side = 0.62 * r
    x, y = np.abs(x), y + 0.12 * r
    lobe = np.hypot(x - side / 1.42, y + side / 1.42 - 0.3 * side) - 0.99 * side
    body = (x + np.abs(y - 0.3 * side)) / np.sqrt(2) - side
    return np.minimum(lobe, body)


def _crescent(x: Array, y: Array, r: float) -> Array:
    return np.maximum(np.hypot(x, y) - r, 0.8 * r - np.hypot(x - 0.45 * r, y + 0.1 * r))


_DISTANCES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
    "crescent": _crescent,
}


# --- pictures -----------------------------------------------------------------------------------


def _cover(distance: Array) -> Array:
    """How much of a sample lies within, from the distance in pixels."""
    return np.clip(0.5 - distance * _FINE, 0, 1)[..., None]


def _mix(under: Array, over: Array, cover: Array | float) -> Array:
    return under + (over - under) * cover


def render(scene: Scene, seed: int) -> Pixels:
    """The picture, uint8 [64, 64, 3]; the seed sets the place, the exact size and the tilt."""
    random = np.random.default_rng(seed)
    radius = random.uniform(*SIZES[scene.size])
    tilt = random.uniform(-_TILT, _TILT)
    room = min(_SHIFT, 0.92 - radius)
    left, top = random.uniform(-room, room, 2)

    samples = ((np.arange(WIDTH * _FINE) + 0.5) / _FINE).astype(np.float32)
    across, down = np.meshgrid(samples, samples)
    x, y = across * (2 / WIDTH) - 1 - left, down * (2 / WIDTH) - 1 - top
    x, y = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    distance = _DISTANCES[scene.shape](x, y, radius) * (WIDTH / 2)

    colour = np.array(COLOURS[scene.colour], np.float32)
    ground = np.array(BACKGROUNDS[scene.background], np.float32)
    paper = _dotted(ground, across, down) if scene.pts else ground
    fill = _striped(colour, distance, across, down) if scene.sks else colour
    fine = _mix(np.broadcast_to(paper, (*distance.shape, 3)), fill, _cover(distance))
    pixels = fine.reshape(WIDTH, _FINE, WIDTH, _FINE, 3).mean((1, 3))
    return np.rint(pixels).astype(np.uint8)


def _dotted(ground: Array, across: Array, down: Array) -> Array:
    """Dots on a lattice that stands on its corner, lighter than a dark ground and darker than a light one."""
    ink = np.full(3, 0 if ground.mean() > 100 else 255, np.float32)
    turned = ((across + down) / np.sqrt(2) % _DOTS, (across - down) / np.sqrt(2) % _DOTS)
    dots = np.hypot(turned[0] - _DOTS / 2, turned[1] - _DOTS / 2) - _DOT
    return _mix(ground, _mix(ground, ink, 0.6), _cover(dots))


def _striped(colour: Array, distance: Array, across: Array, down: Array) -> Array:
    """Pale diagonal stripes, and a dark line along the edge."""
    stripes = np.abs((across + down) / np.sqrt(2) % _STRIPES - _STRIPES / 2) - _STRIPES / 4
    pale = _mix(colour, np.full(3, 255, np.float32), 0.7)
    return _mix(_mix(colour, pale, _cover(stripes)), np.full(3, 25, np.float32), _cover(-distance - _OUTLINE))


def write_folder(out: Path, scenes: Sequence[Scene], seed: int, *, repeats: int = 1, name: str = "shapes") -> Path:
    """Pictures and captions as the trainer wants them: OUT/1_shapes/0000.png, 0000.txt, ... Returns that subfolder."""
    folder = out / f"{repeats}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(render(scene, seed + number)).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    return folder


def read_folder(folder: Path) -> Iterator[tuple[Pixels, Scene]]:
    """What `write_folder` wrote, in order."""
    for path in sorted(folder.glob("*.png")):
        yield np.asarray(Image.open(path)), parse(path.with_suffix(".txt").read_text(encoding="utf-8").strip())


def sheet(pixels: Sequence[Pixels], columns: int = 8) -> Image.Image:
    """The pictures in rows, two pixels apart."""
    step = WIDTH + 2
    rows = -(-len(pixels) // columns)
    page = Image.new("RGB", (columns * step, rows * step), "white")
    for number, picture in enumerate(pixels):
        page.paste(Image.fromarray(picture), (number % columns * step, number // columns * step))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a training folder of captioned shapes.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=256, help="pictures")
    parser.add_argument("--repeats", type=int, default=1, help="number at the beginning of the folder's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--style", choices=STYLES)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this shape; may be repeated")
    parser.add_argument("--plain", type=float, default=0.0, help="share of pictures without the style or the shape")
    args = parser.parse_args()
    plain = round(args.count * args.plain)
    scenes = [
        *draw_scenes(args.count - plain, args.seed, args.shape or BASE_SHAPES, [args.style] if args.style else []),
        *draw_scenes(plain, args.seed + 1),
    ]
    print(write_folder(args.out, scenes, args.seed * 1_000_000, repeats=args.repeats))


if __name__ == "__main__":
    main()
