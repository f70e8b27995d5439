"""The measurements behind docs/evidence.md: `python study.py --work FOLDER`, the folder of `train_loras.py`.

Each measurement is one entry of a JSON file, so that what is there is not measured again. `write_up.py` makes the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gallery import Gallery, Test
from render import Pixels, draw_scenes
from train_loras import ADAPTERS, MODEL

import lorashrink as ls
import lorashrink_example
from lorashrink.calibration import watching
from lorashrink.calibration.statistics import Side, Sides, open_statistics, write_adapters, write_table
from lorashrink.engine.gram import Grams

HERE = Path(__file__).parent
RESULTS = HERE / "study.json"
_PICTURES = 32
_RANKS = (1, 2, 4, 8)
# At the sizes that these ranks give, the recipes that are compared.
RECIPES = {
    "rank": "rank={rank}",
    "energy": "energy={energy:.6f}",
    "fro_ckpt": "fro_ckpt,size={size}",
    "spn_ckpt": "spn_ckpt,size={size}",
    "fro_ckpt,bytes": "fro_ckpt,bytes,size={size}",
    "calib,bytes": "calib,bytes,size={size}",
}
STUDIED = ("style-32", "heart", "style", "crescent-32", "style-32-seed2", "style-32-seed3", "dots-loha")
FEW = ("rank", "fro_ckpt,bytes", "calib,bytes")  # recipes of the further training seeds, and of plain prompts
PLAIN = ("style-32", "heart")
SMALL = ("style-2", "style-4", "style-8")


@dataclass(eq=False)
class Study:
    """Where everything is."""

    work: Path
    gallery: Gallery
    results: dict[str, Any]

    def adapter(self, name: str) -> Path:
        return (lorashrink_example.path("loras") if ADAPTERS[name].shipped else self.work) / f"{name}.safetensors"

    @cache  # noqa: B019 - one study per process
    def originals(self, adapter: Path, test: Test) -> list[Pixels]:
        return self.gallery.paint(adapter, test)

    def measure(self, key: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Measure what is not there yet, and write it down."""
        if key not in self.results:
            self.results[key] = dict(make())
            RESULTS.write_text(json.dumps(self.results, indent=0, sort_keys=True) + "\n")
            print(key, {k: v for k, v in self.results[key].items() if not isinstance(v, list)}, flush=True)

    def seen(self, adapter: Path | None, source: Path, test: Test) -> dict[str, Any]:
        seen = self.gallery.see(self.gallery.paint(adapter, test), self.originals(source, test), test)
        return {
            "psnr": [round(float(value), 2) for value in seen.psnr],
            "ssim": [round(float(value), 4) for value in seen.ssim],
            "concept": seen.concept,
            "right": seen.right,
        }

    def shrunk(self, source: Path, recipe: str, statistics: Path | None = None) -> tuple[Path, dict[str, Any]]:
        report = ls.resize(
            source,
            base=MODEL,
            recipes=recipe,
            calibration=statistics,
            output=self.work / "shrunk.safetensors",
            force=True,
        )
        if report.failed:
            raise SystemExit(report.failed[0].error)
        result = report.results[0]
        return Path(result.output), {
            "bytes": result.bytes_after,
            "error": round(result.relative_error, 5),
            "recipe": recipe,
        }


def bytes_of(source: Path, recipe: str) -> int:
    return ls.resize(source, base=MODEL, recipes=recipe, dry_run=True).results[0].bytes_after


def energy_for(source: Path, size: int) -> float:
    """The share of each layer's energy that gives a file of at most this size."""
    low, high = 0.0, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if middle and bytes_of(source, f"energy={middle:.6f}") <= size else (low, middle)
    return max(low, 1e-4)


# --- statistics ---------------------------------------------------------------------------------


def prompts_file(work: Path, words: str, count: int, seed: int = 101) -> Path:
    """Prompts that are in no test; `words` are flags of `render.py`, or "" for plain ones."""
    path = work / f"prompts-{words.replace(' ', '') or 'plain'}-{count}.txt"
    if words:
        flag, name = words.split()
        scenes = draw_scenes(count, seed, (name,)) if flag == "--shape" else draw_scenes(count, seed, styles=(name,))
    else:
        scenes = draw_scenes(count, seed)
    lines = [f"{scene.caption} --w 64 --h 64 --d {number} --l 4 --s 20" for number, scene in enumerate(scenes)]
    path.write_text("\n".join(lines) + "\n")
    return path


def calibrated(
    work: Path, name: str, adapter: Path | None, *, words: str = "", count: int = 16, steps: int = 10, **options: Any
) -> Path:
    path = work / f"statistics-{name}.safetensors"
    if not path.exists():
        model = options.pop("model", MODEL)
        ls.calibrate(
            [adapter] if adapter else [],
            model=model,
            output=path,
            prompts=prompts_file(work, words, count),
            steps_used=steps,
            **options,
        )
    return path


def one_sided(work: Path, source: Path, side: str) -> Path:
    """Adapter statistics of which the other side is one number per layer."""
    path = work / f"statistics-only-{side}.safetensors"
    with open_statistics(source) as statistics, ls.open_adapter(ADAPTER_OF[source]) as adapter:
        grams_of_layers = {}
        for layer, make in zip(adapter, statistics.of_layers(adapter), strict=True):
            assert make
            grams, delta = make.grams(layer.delta), layer.delta
            own = Grams(delta.down.double() @ delta.down.double().mT, delta.up.double().mT @ delta.up.double())
            up, down = (
                float(gram.trace() / plain.trace().clamp(min=1e-30))
                for gram, plain in ((grams.up, own.up), (grams.down, own.down))
            )
            pair = Grams(grams.down, own.up * up) if side == "in" else Grams(own.down * down, grams.up)
            grams_of_layers[f"{statistics_key(adapter)}/{layer.name}"] = pair
        write_adapters(path, grams_of_layers, {statistics_key(adapter): "one-sided"}, statistics.base, {})
    return path


def statistics_key(adapter: Any) -> str:
    from lorashrink.calibration.statistics import adapter_key

    return adapter_key(adapter)


ADAPTER_OF: dict[Path, Path] = {}


def diagonal_only(work: Path, table: Path) -> Path:
    """The table without its columns."""
    path = work / "statistics-diagonal.safetensors"
    with open_statistics(table) as statistics:
        flat = {}
        for view in (view for views in statistics.base.all_views for view in views):
            if f"{view}|in.diagonal" in statistics.store.tensors:
                flat[view] = Sides(*(_flat(side) for side in statistics.sides(str(view))))
        write_table(path, flat, statistics.base, {})
    return path


def _flat(side: Side) -> Side:
    return Side(side.diagonal + (side.low**2).sum(1), side.low[:, :0], side.taps)


@contextmanager
def positions_summed() -> Iterator[None]:
    """Inputs and gradients of a picture added up before their products are: all positions as one."""
    apart, add_inputs = watching.positions, watching.Projected.add_inputs
    reading_inputs = False

    def positions(tensor: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        rows = apart(tensor, module).unflatten(0, (len(tensor), -1))
        return rows.mean(1) if reading_inputs else rows.sum(1)

    def add_mean_inputs(self: watching.Projected, module: torch.nn.Module, batch: torch.Tensor) -> None:
        nonlocal reading_inputs
        reading_inputs = True
        add_inputs(self, module, batch)
        reading_inputs = False

    watching.positions, watching.Projected.add_inputs = positions, add_mean_inputs
    try:
        yield
    finally:
        watching.positions, watching.Projected.add_inputs = apart, add_inputs


def other_checkpoint(study: Study) -> Path:
    """The model with an adapter built in, as a fine-tune is."""
    folder = study.work / "other-model"
    if not (folder / "unet").exists():
        shutil.copytree(MODEL, folder, dirs_exist_ok=True)
        gallery = Gallery(MODEL)
        gallery.add(study.adapter("crescent-32"))
        gallery.pipe.unet.save_pretrained(folder / "unet")
        gallery.pipe.text_encoder.save_pretrained(folder / "text_encoder")
        gallery.pipe.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    return folder


# --- measurements -------------------------------------------------------------------------------


def recipes(study: Study, name: str, table: Path) -> None:
    """Recipes at equal sizes, with prompts that call what the adapter was taught, and with plain ones."""
    source, teaches = study.adapter(name), ADAPTERS[name].teaches
    own, plain = Test.of(teaches, _PICTURES), Test.of(teaches, _PICTURES, plain=True)
    for label, test in (("own", own), ("plain", plain)):
        study.measure(
            f"recipes|{name}|{label}|none|",
            lambda test=test: {"bytes": 0, "error": 1.0, **study.seen(None, source, test)},
        )
        study.measure(
            f"recipes|{name}|{label}|whole|",
            lambda test=test: {"bytes": source.stat().st_size, "error": 0.0, **study.seen(source, source, test)},
        )
    for rank in _RANKS:
        limit = bytes_of(source, f"rank={rank}")
        for recipe, form in RECIPES.items():
            if recipe in FEW or "seed" not in name:
                study.measure(
                    f"recipes|{name}|own|{recipe}|{rank}",
                    partial(_at_size, study, source, form, rank, limit, table, own),
                )
            if recipe in FEW and name in PLAIN:
                study.measure(
                    f"recipes|{name}|plain|{recipe}|{rank}",
                    partial(_at_size, study, source, form, rank, limit, table, plain),
                )


def _at_size(study: Study, source: Path, form: str, rank: int, limit: int, table: Path, test: Test) -> dict[str, Any]:
    energy = energy_for(source, limit) if "energy" in form else 0.0
    recipe = form.format(rank=rank, energy=energy, size=f"{limit / 2**20:.6f}")
    path, facts = study.shrunk(source, recipe, table)
    return {**facts, **study.seen(path, source, test)}


def variants(study: Study, table: Path) -> Iterator[tuple[str, Path]]:
    """Ways to gather statistics for the style adapter."""
    work, style = study.work, study.adapter("style-32")
    exact = partial(calibrated, work)
    yield "table, rank 16", table
    yield "table, rank 4", exact("table4", None, rank=4)
    yield "table, diagonals only", diagonal_only(work, table)
    yield "exact, plain prompts", exact("exact", style)
    ADAPTER_OF[exact("exact", style)] = style
    yield "exact, inputs only", one_sided(work, exact("exact", style), "in")
    yield "exact, outputs only", one_sided(work, exact("exact", style), "out")
    with positions_summed():
        yield "exact, positions summed first", exact("summed", style)
    yield "exact, own prompts", exact("own", style, words="--style sks")
    yield "exact, own prompts, adapter loaded", exact("loaded", style, words="--style sks", loaded=True)
    yield "exact, 1 prompt × 20 steps", exact("1x20", style, count=1, steps=20)
    yield "exact, 4 prompts × 5 steps", exact("4x5", style, count=4, steps=5)
    yield "exact, 32 prompts × 20 steps", exact("32x20", style, count=32, steps=20)
    yield "table of another checkpoint", exact("other", None, model=other_checkpoint(study))


def calibration(study: Study, table: Path) -> None:
    source = study.adapter("style-32")
    test = Test.of(ADAPTERS["style-32"].teaches, _PICTURES)
    for label, statistics in variants(study, table):
        for rank in (2, 4, 8):
            limit = bytes_of(source, f"rank={rank}")
            study.measure(
                f"calibration|{label}|{rank}",
                partial(_at_size, study, source, RECIPES["calib,bytes"], rank, limit, statistics, test),
            )


def small(study: Study, table: Path) -> None:
    """Adapters trained at a low rank against one of rank 32 that was shrunk to the same size."""
    test, plain = (Test.of("--style sks", 96, plain=is_plain) for is_plain in (False, True))
    original = study.adapter("style-32")
    for name in (*SMALL, "style-32"):
        source = study.adapter(name)
        study.measure(f"small|{name}|trained", lambda source=source: _alone(study, source, source, test, plain))
        if name in SMALL:
            size = f"{source.stat().st_size / 2**20:.6f}"
            for recipe in ("fro_ckpt,bytes", "calib,bytes"):
                study.measure(
                    f"small|{name}|{recipe}",
                    lambda recipe=recipe, size=size: _alone(
                        study,
                        study.shrunk(original, RECIPES[recipe].format(size=size), table)[0],
                        original,
                        test,
                        plain,
                    ),
                )


def _alone(study: Study, path: Path, original: Path, test: Test, plain: Test) -> dict[str, Any]:
    own, of_plain = study.seen(path, original, test), study.seen(path, original, plain)
    return {"bytes": path.stat().st_size, **own, "plain_right": of_plain["right"], "plain_concept": of_plain["concept"]}


def stacks(study: Study, table: Path) -> None:
    """Two adapters used together, merged, and merged and shrunk."""
    style, heart = study.adapter("style-32"), study.adapter("heart")
    test = Test(tuple(draw_scenes(_PICTURES, 4242, ("heart",), ("sks",))), "sks")
    merged = study.work / "merged.safetensors"
    ls.merge([f"{style}:1", f"{heart}:1"], output=merged, base=MODEL, force=True)
    together = study.gallery.paint([style, heart], test)

    def against(paths: Path | Sequence[Path]) -> dict[str, Any]:
        seen = study.gallery.see(study.gallery.paint(paths, test), together, test)
        files = [paths] if isinstance(paths, Path) else paths
        return {
            "bytes": sum(path.stat().st_size for path in files),
            "psnr": [round(float(value), 2) for value in seen.psnr],
            "ssim": [round(float(value), 4) for value in seen.ssim],
            "concept": seen.concept,
            "right": seen.right,
        }

    study.measure("stacks|together", lambda: against([style, heart]))
    study.measure("stacks|merged", lambda: against(merged))
    study.measure("stacks|style alone", lambda: against(style))
    for rank in (2, 4, 8):
        limit = bytes_of(merged, f"rank={rank}")
        for recipe in ("rank", "fro_ckpt,bytes", "calib,bytes"):
            text = RECIPES[recipe].format(rank=rank, size=f"{limit / 2**20:.6f}")
            study.measure(
                f"stacks|merged, {recipe}|{rank}", lambda text=text: against(study.shrunk(merged, text, table)[0])
            )
        halves = []
        for number, source in enumerate((style, heart)):
            half = f"fro_ckpt,bytes,size={limit / 2**21:.6f}"
            path = study.work / f"part{number}.safetensors"
            shutil.copy(study.shrunk(source, half)[0], path)
            halves.append(path)
        study.measure(f"stacks|each half of the bytes, fro_ckpt,bytes|{rank}", lambda halves=halves: against(halves))


def refined(study: Study, table: Path) -> None:
    """Shrunk, and then trained to predict what the original does."""
    source = study.adapter("style")
    test = Test.of(ADAPTERS["style"].teaches, _PICTURES)
    for recipe in ("fro_ckpt,bytes", "calib,bytes"):
        for rank in (1, 2, 4):

            def make(recipe: str = recipe, rank: int = rank) -> dict[str, Any]:
                size = f"{bytes_of(source, f'rank={rank}') / 2**20:.6f}"
                path, facts = study.shrunk(source, RECIPES[recipe].format(size=size), table)
                out = study.work / "refined.safetensors"
                prompts = prompts_file(study.work, ADAPTERS["style"].teaches, 16)
                ls.refine(path, like=source, model=MODEL, prompts=prompts, output=out, closed_form=False, force=True)
                return {**facts, "before": study.seen(path, source, test)["psnr"], **study.seen(out, source, test)}

            study.measure(f"refined|{recipe}|{rank}", make)


def floor(study: Study, name: str) -> None:
    """The original adapter, drawn in half precision."""
    source, test = study.adapter(name), Test.of(ADAPTERS[name].teaches, _PICTURES)
    study.originals(source, test)
    pipe = study.gallery.pipe
    pipe.to(torch.float16)
    try:
        study.measure(f"floor|{name}", lambda: study.seen(source, source, test))
    finally:
        pipe.to(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure; what has been measured stays.")
    parser.add_argument("--work", type=Path, required=True, help="the folder of train_loras.py")
    parser.add_argument("--only", nargs="*", default=[], help="adapters")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    study = Study(args.work, Gallery(MODEL), results)
    table = calibrated(args.work, "table16", None)
    for name in args.only or STUDIED:
        recipes(study, name, table)
    if not args.only:
        floor(study, "style-32")
        calibration(study, table)
        stacks(study, table)
        small(study, table)
        refined(study, table)


if __name__ == "__main__":
    main()
