"""Quality over size by `lorashrink evidence`, for adapters of the example model: `python curves.py --work FOLDER`.

FOLDER is that of `train_loras.py`. What has been measured is not measured again; all of it is in `curves.json`.
`write_up.py` makes the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import judge
import torch
from gallery import Gallery
from render import BASE_SHAPES, Pixels, draw_scenes, parse
from study import Study, other_checkpoint
from train_loras import ADAPTERS, EXAMPLE, MODEL

import lorashrink as ls

RESULTS = Path(__file__).with_name("curves.json")
_OWN, _PLAIN = 32, 16  # prompts with the word that calls the adapter, and without
_SEED = 7_000_000  # of the noise; in no training set
_STEPS = 10

ANCHOR = "fro_ckpt,bytes fp16"
# With several files of nearly one size at the quality: rounding moves the mean of a file.
ROUNDED = ("calib,bytes fp8", "calib,bytes packed")
SCALED = "calib,bytes+scaled fp8"
OTHERS = (
    ANCHOR,
    "fro_ckpt,bytes fp8",
    "calib,bytes fp16",
    "calib,bytes mixed",
    "fro_ckpt,bytes mixed",
    "energy fp16",
    "rank fp16",
    "fro_ckpt fp16",
    SCALED,
)
MAIN = ("style", "heart", "crescent-32", "dots-loha", "style-32", "crescent-lokr")
SEEDS = (("style-32", "style-32-seed2", "style-32-seed3"), ("heart", "heart-seed2", "heart-seed3"))
DRAWS = 5
# Also with the table of another checkpoint, by ROUNDED; under NAME|other in the results.
TRANSFERRED = ("style", "heart")


def prompts_file(name: str, folder: Path) -> Path:
    """Prompts that are in no training set of captions with this noise: own ones, and plain ones behind them."""
    flag, word = ADAPTERS[name].teaches.split()
    shapes, styles = ((word,), ()) if flag == "--shape" else (BASE_SHAPES, (word,))
    scenes = [*draw_scenes(_OWN, 4242, shapes, styles), *draw_scenes(_PLAIN, 4242)]
    lines = [f"{scene.caption} --w 64 --h 64 --d {_SEED + number} --l 4" for number, scene in enumerate(scenes)]
    path = folder / f"{name}.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def judged(name: str) -> Any:
    """A judge of pictures: 1 where it sees the concept, and where shape, colour and background are right."""
    flag, word = ADAPTERS[name].teaches.split()
    head = "shape" if flag == "--shape" else word
    network = judge.load()

    def tell(pictures: Sequence[Pixels], prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        scenes = [parse(prompt) for prompt in prompts]
        seen = judge.see(network, pictures)
        pairs = list(zip(seen, scenes, strict=True))
        right = ("shape", "colour", "background")
        return {
            "concept": [float(getattr(view, head) == getattr(scene, head)) for view, scene in pairs],
            "right": [float(all(getattr(view, key) == getattr(scene, key) for key in right)) for view, scene in pairs],
        }

    return tell


def measure(
    name: str, work: Path, methods: Sequence[str], draws: int, table: Path = EXAMPLE / "table.safetensors"
) -> dict[str, Any]:
    """The curves of one adapter, calibrated by a table."""
    folder = work / "curves" / name
    folder.mkdir(parents=True, exist_ok=True)
    source = EXAMPLE / "loras" if ADAPTERS[name].shipped else work
    result = ls.evidence(
        MODEL,
        source / f"{name}.safetensors",
        output=folder,
        prompts=prompts_file(name, folder),
        methods=methods,
        seeds=(0,),
        steps=_STEPS,
        draws=draws,
        calibration=table,
        judge=judged(name),
        device="cpu",
    )
    for failure in result.failed:
        raise SystemExit(failure.error)
    print(name, methods, *result.notes, sep="\n  ", flush=True)
    return result.to_dict()


def other_table(work: Path) -> Path:
    """The table of the model with the crescent built in, by the same prompts as the model's own."""
    path = work / "other-table.safetensors"
    if not path.exists():
        other = other_checkpoint(Study(work, Gallery(MODEL), {}))
        ls.calibrate(model=other, output=path, prompts=EXAMPLE / "plain.txt")
    return path


def brief(document: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_up.py` needs of a study: the PSNR of each picture, and means of the rest."""
    points = [
        {
            **{key: point[key] for key in ("curve", "recipe", "payload", "bytes", "predicted_db", "draw", "plain")},
            "error": round(point["relative_error"], 5),
            "psnr": [round(level, 2) for level in point["psnr"]],
            **{key: round(fmean(point[key]), 5) for key in ("ssim", "ms_ssim")},
            **{key: round(fmean(values), 4) for key, values in point["judged"].items()},
        }
        for point in document["results"]
    ]
    (adapter,) = document["adapters"]
    facts = {"bytes": adapter["bytes"], "full_size": adapter["full_size"], "none": round(adapter["none_db"], 2)}
    reached = [entry for entry in document["reached"] if entry["payload"]]
    return {**facts, "points": points, "reached": reached}


def add(name: str, study: Mapping[str, Any]) -> None:
    """Put the curves of a study in the place of earlier ones."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    new = {point["curve"] for point in study["points"]}
    kept = results.get(name, {"points": [], "reached": []})
    lists = {
        key: [*(entry for entry in kept[key] if entry["curve"] not in new), *study[key]]
        for key in ("points", "reached")
    }
    results[name] = {**study, **lists}
    RESULTS.write_text(json.dumps(results, sort_keys=True).replace('{"bytes"', '\n{"bytes"') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure; what has been measured stays.")
    parser.add_argument("--work", type=Path, required=True, help="the folder of train_loras.py")
    parser.add_argument("names", nargs="*", help="adapters; default all")
    parser.add_argument("--only", nargs="*", help="methods, of those that the page has")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names or dict.fromkeys([*MAIN, *(seed for seeds in SEEDS for seed in seeds)]):
        for methods, draws in ((ROUNDED, DRAWS if name in MAIN else 1), (OTHERS if name in MAIN else (ANCHOR,), 1)):
            if chosen := [method for method in methods if not args.only or method in args.only]:
                add(name, brief(measure(name, args.work, chosen, draws)))
    if not args.only:
        for name in args.names or TRANSFERRED:
            if name in TRANSFERRED:
                add(f"{name}|other", brief(measure(name, args.work, ROUNDED, DRAWS, other_table(args.work))))


if __name__ == "__main__":
    main()
