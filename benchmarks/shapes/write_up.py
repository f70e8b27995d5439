"""docs/evidence.md and its figures, from the `.json` files beside this one: `python write_up.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import curves
import encoder
import factors
import language
import numpy as np
import packed
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import bootstrap, spearmanr
from study import FEW, RECIPES, RESULTS, SMALL, STUDIED

from lorashrink.measuring.curves import Curve, quality_gap, rate_gap
from lorashrink.plots import style
from lorashrink.plots.rates import named_curves
from lorashrink.recipes.levels import ADAPTER_LINE, BASE_LINE

DOCS = Path(__file__).parents[2] / "docs"
_RANKS = (1, 2, 4, 8)
_LOOKS_ALIKE = 28  # dB: below, no level of `shrink` ends
_TITLES = {
    "style": "style, as the guide trains",
    "style-32": "style, rank 32",
    "style-32-seed2": "the same, second seed",
    "style-32-seed3": "the same, third seed",
    "heart": "heart, rank 16",
    "heart-seed2": "heart, second seed",
    "heart-seed3": "heart, third seed",
    "crescent-lokr": "crescent, LoKr",
    "crescent-32": "crescent, rank 32",
    "dots-loha": "dots, LoHa",
}
_SHOWN = ("style", "style-32", "heart", "crescent-32", "dots-loha")
Entry = Mapping[str, Any]


def mean(entry: Entry) -> float:
    return float(np.mean(entry["psnr"]))


def interval(numbers: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """95 % of the means of 4000 samples with replacement."""
    limits = bootstrap((numbers,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
    return float(limits.confidence_interval.low), float(limits.confidence_interval.high)


def gain(entry: Entry, reference: Entry) -> str:
    """By how much an entry is above a reference, picture by picture, with its interval."""
    differences = np.asarray(entry["psnr"]) - np.asarray(reference["psnr"])
    low, high = interval(differences)
    return f"{differences.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recipes_table(results: Mapping[str, Entry], name: str, label: str = "own") -> str:
    rows = []
    kept = [recipe for recipe in RECIPES if f"recipes|{name}|{label}|{recipe}|1" in results]
    for rank in _RANKS:
        entries = {recipe: results[f"recipes|{name}|{label}|{recipe}|{rank}"] for recipe in kept}
        best = max(mean(entry) for recipe, entry in entries.items() if "calib" not in recipe)
        cells = [
            f"**{mean(entry):.1f}**" if mean(entry) >= best - 0.05 else f"{mean(entry):.1f}"
            for entry in entries.values()
        ]
        least = entries["fro_ckpt,bytes"]["bytes"]
        rows.append([f"{least / 1000:.0f} kB", *cells, gain(entries["calib,bytes"], entries["fro_ckpt,bytes"])])
    return table(["size", *(f"`{recipe}`" for recipe in kept), "`calib,bytes` above `fro_ckpt,bytes`"], rows)


def concepts_table(results: Mapping[str, Entry]) -> str:
    rows = []
    for name in _SHOWN:
        original, none = (results[f"recipes|{name}|own|{what}|"]["concept"] for what in ("whole", "none"))
        cells = [
            " / ".join(f"{results[f'recipes|{name}|own|{recipe}|{rank}']['concept']:.2f}" for rank in _RANKS)
            for recipe in FEW
        ]
        rows.append([_TITLES[name], f"{original:.2f}", f"{none:.2f}", *cells])
    return table(["adapter", "whole", "none", *(f"`{recipe}` at the four sizes" for recipe in FEW)], rows)


def correlations(results: Mapping[str, Entry]) -> str:
    rows = []
    for name in _SHOWN:
        points = {
            key.split("|")[3]: [] for key in results if key.startswith(f"recipes|{name}|own|") and key.split("|")[4]
        }
        for key, entry in results.items():
            _, adapter, label, recipe, rank = (*key.split("|"), "", "", "", "")[:5]
            if key.startswith("recipes|") and adapter == name and label == "own" and rank:
                points[recipe].append((entry["error"], mean(entry)))
        plain = [point for recipe, of_recipe in points.items() if "calib" not in recipe for point in of_recipe]
        every = [point for of_recipe in points.values() for point in of_recipe]
        rows.append(
            [_TITLES[name], *(f"{spearmanr(*zip(*some, strict=True)).statistic:.2f}" for some in (plain, every))]
        )
    return table(["adapter", "recipes without statistics", "with the calibrated one"], rows)


def above_lines(results: Mapping[str, Entry]) -> str:
    """How many files are at least as good as the lines by which `shrink` takes an error for a quality."""
    texts = []
    for recipe, line in (("fro_ckpt,bytes", BASE_LINE), ("energy", ADAPTER_LINE)):
        files = [
            entry
            for key, entry in results.items()
            if key.startswith("recipes|") and key.split("|")[2:4] == ["own", recipe] and mean(entry) > _LOOKS_ALIKE
        ]
        above = sum(mean(entry) >= line - 20 * math.log10(entry["error"]) for entry in files)
        texts.append(f"{above} of {len(files)}")
    return " and ".join(texts)


def seeds_table(results: Mapping[str, Entry]) -> str:
    names = [name for name in STUDIED if name.startswith("style-32")]
    rows = []
    for name in names:
        gains = []
        for rank in _RANKS:
            calibrated, plain = (
                results[f"recipes|{name}|own|{recipe}|{rank}"] for recipe in ("calib,bytes", "fro_ckpt,bytes")
            )
            gains.append(gain(calibrated, plain))
        rows.append([_TITLES[name], *gains])
    sizes = [f"{results[f'recipes|style-32|own|calib,bytes|{rank}']['bytes'] / 1000:.0f} kB" for rank in _RANKS]
    return table(["adapter", *sizes], rows)


def variants_table(results: Mapping[str, Entry]) -> str:
    labels = dict.fromkeys(key.split("|")[1] for key in results if key.startswith("calibration|"))
    order = sorted(labels, key=lambda label: -mean(results[f"calibration|{label}|8"]))
    rows = [[label, *(f"{mean(results[f'calibration|{label}|{rank}']):.1f}" for rank in (2, 4, 8))] for label in order]
    sizes = [f"{results[f'calibration|{order[0]}|{rank}']['bytes'] / 1000:.0f} kB" for rank in (2, 4, 8)]
    return table(["statistics", *sizes], rows)


def refined_table(results: Mapping[str, Entry]) -> str:
    rows = []
    for key, after in results.items():
        if key.startswith("refined|"):
            before = after["before"]
            rows.append([f"{after['bytes'] / 1000:.0f} kB", f"`{key.split('|')[1]}`", f"{np.mean(before):.1f}",
                         f"{mean(after):.1f}", gain(after, {"psnr": before})])  # fmt: skip
    rows.sort(key=lambda row: (row[1], float(row[0].split()[0])))
    return table(["size", "recipe", "PSNR", "refined", "gain"], rows)


def small_table(results: Mapping[str, Entry]) -> str:
    rows = []
    for name in SMALL:
        for how, title in (
            ("trained", f"trained at rank {name.removeprefix('style-')}"),
            ("fro_ckpt,bytes", "rank 32, `fro_ckpt,bytes`"),
            ("calib,bytes", "rank 32, `calib,bytes`"),
        ):
            entry = results[f"small|{name}|{how}"]
            rows.append(
                [f"{entry['bytes'] / 1000:.0f} kB", title, f"{entry['concept']:.2f}", f"{entry['right']:.2f}",
                 f"{entry['plain_right']:.2f}"]
            )  # fmt: skip
    entry = results["small|style-32|trained"]
    rows.append([f"{entry['bytes'] / 1000:.0f} kB", "trained at rank 32, whole", f"{entry['concept']:.2f}",
                 f"{entry['right']:.2f}", f"{entry['plain_right']:.2f}"])  # fmt: skip
    return table(["size", "", "style seen", "shape and colours right", "the same without the style's word"], rows)


# --- curves by `lorashrink evidence` ------------------------------------------------------------

Studies = Mapping[str, Mapping[str, Any]]

_FP16 = ("rank fp16", "energy fp16", "fro_ckpt fp16", curves.ANCHOR)
_FP8, _PACKED = curves.ROUNDED
_QUALITY = 40  # dB


def curve_of(study: Mapping[str, Any], name: str) -> Curve | None:
    """The curve of a method, None if it was not measured."""
    points = [point for point in study["points"] if point["curve"] == name and not (point["draw"] or point["plain"])]
    return Curve.of([(point["payload"], point["psnr"]) for point in points]) if len(points) > 1 else None


def reached(study: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What a method takes for 40 dB."""
    return next((entry for entry in study["reached"] if entry["curve"] == name), None)


def best_fp16(study: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The method without calibration in fp16 that takes the fewest bytes for 40 dB."""
    entries = [entry for name in _FP16 if (entry := reached(study, name))]
    return min(entries, key=lambda entry: entry["payload"], default=None)


def shares(studies: Studies, name: str, key: str = "payload") -> dict[str, float]:
    """Adapter -> bytes for 40 dB as a share of the best method without calibration in fp16."""
    parts = {}
    for adapter in curves.MAIN:
        study = studies.get(adapter)
        entry, best = (reached(study, name), best_fp16(study)) if study else (None, None)
        if entry and best:
            parts[adapter] = entry[key] / best[key]
    return parts


def sizes_table(studies: Studies) -> str:
    """kB of tensors for 40 dB, and the worst picture there."""
    rows = []
    names = (
        *(*_FP16, "fro_ckpt,bytes fp8", "fro_ckpt,bytes mixed"),
        *("calib,bytes fp16", _FP8, "calib,bytes mixed", curves.SCALED, _PACKED),
    )
    for name in names:
        cells = []
        for adapter in curves.MAIN:
            entry = reached(studies[adapter], name) if adapter in studies else None
            cells.append(f"{entry['payload'] / 1000:.0f} ({entry['worst_db']:.0f})" if entry else "–")
        if set(cells) != {"–"}:
            rows.append([f"`{name}`", *cells])
    return table(["method", *(_TITLES[adapter] for adapter in curves.MAIN)], rows)


def gaps_table(studies: Studies) -> str:
    """Bjøntegaard differences to `fro_ckpt,bytes` in fp16, in the mean of the adapters that have both."""
    rows = []
    for name in dict.fromkeys(point["curve"] for study in studies.values() for point in study["points"]):
        pairs = [
            (anchor, curve)
            for adapter in curves.MAIN
            if adapter in studies
            and (anchor := curve_of(studies[adapter], curves.ANCHOR))
            and (curve := curve_of(studies[adapter], name))
        ]
        if name == curves.ANCHOR or not pairs:
            continue
        quality, rate = quality_gap(pairs), rate_gap(pairs)
        rows.append(
            [
                f"`{name}`",
                str(len(pairs)),
                f"{quality.value:+.1f} ({quality.low:+.1f} to {quality.high:+.1f})" if quality else "–",
                f"{100 * rate.value:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})" if rate else "–",
            ]
        )
    return table(["method", "adapters", "dB at equal size", "size at equal quality"], rows)


def targets_table(studies: Studies) -> str:
    """What was aimed at, and what came out."""

    def text(parts: Mapping[str, float]) -> tuple[str, str]:
        return f"{100 * np.mean(list(parts.values())):.0f} %", f"{100 * max(parts.values()):.0f} %"

    def worse(name: str) -> str:
        gaps = [
            entry["worst_db"] - best["worst_db"]
            for adapter in curves.MAIN
            if adapter in studies
            and (entry := reached(studies[adapter], name))
            and (best := best_fp16(studies[adapter]))
        ]
        return f"{np.mean(gaps):+.1f} dB in the mean, {min(gaps):+.1f} at least"

    fp8, smallest, files = shares(studies, _FP8), shares(studies, _PACKED), shares(studies, _FP8, "bytes")
    halves = {
        adapter: half["payload"] / full["payload"]
        for adapter in curves.MAIN
        if adapter in studies
        and (half := reached(studies[adapter], "fro_ckpt,bytes fp8"))
        and (full := reached(studies[adapter], curves.ANCHOR))
    }
    rows = [
        ["`calib,bytes` in fp8, tensors, mean", "36 %", text(fp8)[0], str(len(fp8))],
        ["the same, largest", "42 %", text(fp8)[1], str(len(fp8))],
        ["the same, whole files, mean", "45 %", text(files)[0], str(len(files))],
        ["the same, worst picture against that of the best in fp16", "no worse", worse(_FP8), str(len(fp8))],
        ["packed with calibration, mean", "17 %", text(smallest)[0], str(len(smallest))],
        ["`fro_ckpt,bytes` in fp8 against the same in fp16, mean", "55 %", text(halves)[0], str(len(halves))],
    ]
    return table(
        ["bytes for 40 dB, as a share of the best in fp16 without calibration", "aim", "seen", "adapters"], rows
    )


def predicted_table(studies: Studies) -> str:
    """How far predictions were off."""
    rows = []
    for name in ("calib,bytes fp16", _FP8, _PACKED):
        cells = []
        for adapter in curves.MAIN:
            pairs = [
                (point["predicted_db"], float(np.mean(point["psnr"])))
                for point in studies.get(adapter, {"points": []})["points"]
                if point["curve"] == name and not point["plain"] and point["predicted_db"] is not None
            ]
            off = [predicted - seen for predicted, seen in pairs if 28 < seen < 45]
            cells.append(f"{np.mean(off):+.1f}" if off else "–")
        rows.append([f"`{name}`", *cells])
    return table(["predicted − seen, dB", *(_TITLES[adapter] for adapter in curves.MAIN)], rows)


def judged_table(studies: Studies) -> str:
    """Share of pictures that show the concept near 40 dB, and the PSNR of plain prompts."""
    rows = []
    for name in (curves.ANCHOR, _FP8, _PACKED):
        cells = []
        for adapter in curves.MAIN:
            points = [point for point in studies.get(adapter, {"points": []})["points"] if point["curve"] == name]
            own = [point["concept"] for point in points if point["draw"]]
            plain = [f"{np.mean(point['psnr']):.0f} dB" for point in points if point["plain"]]
            cells.append(f"{np.mean(own):.2f}, {plain[0]}" if own and plain else "–")
        rows.append([f"`{name}`", *cells])
    return table(["concept seen, plain prompts", *(_TITLES[adapter] for adapter in curves.MAIN)], rows)


def retrained_table(studies: Studies) -> str:
    """What further seeds of training take for 40 dB, as shares of `fro_ckpt,bytes` in fp16."""
    rows = []
    for names in curves.SEEDS:
        for name in names:
            anchor = reached(studies[name], curves.ANCHOR) if name in studies else None
            cells = [
                f"{100 * entry['payload'] / anchor['payload']:.0f} %"
                for method in curves.ROUNDED
                if anchor and (entry := reached(studies[name], method))
            ]
            if anchor and len(cells) == len(curves.ROUNDED):
                rows.append([_TITLES[name], f"{anchor['payload'] / 1000:.0f} kB", *cells])
    return table(["adapter", f"`{curves.ANCHOR}`", *(f"`{name}`" for name in curves.ROUNDED)], rows)


def transferred_table(studies: Studies) -> str:
    """kB for 40 dB with the model's own table and with that of another checkpoint, and the worst picture there."""
    rows = []
    for adapter in curves.TRANSFERRED:
        tables = [studies.get(name) for name in (adapter, f"{adapter}|other")]
        for method in curves.ROUNDED:
            entries = [reached(study, method) if study else None for study in tables]
            cells = [f"{entry['payload'] / 1000:.0f} ({entry['worst_db']:.0f})" if entry else "–" for entry in entries]
            rows.append([_TITLES[adapter], f"`{method}`", *cells])
    return table(["adapter", "method", "the model's own table", "table of another checkpoint"], rows)


def rates_figure(studies: Studies, adapter: str) -> Figure:
    """Quality over size of six methods, with their names beside them."""
    shown = ("rank fp16", curves.ANCHOR, "fro_ckpt,bytes fp8", "calib,bytes fp16", _FP8, _PACKED)
    study = studies[adapter]
    lines = {
        name: [(size, float(level)) for size, level in zip(curve.sizes, curve.means, strict=True)]
        for name in shown
        if (curve := curve_of(study, name))
    }
    return named_curves({"mean PSNR (dB)": lines}, quality=_QUALITY, title=f"Six methods, {_TITLES[adapter]}")


def stacks_table(results: Mapping[str, Entry]) -> str:
    rows = []
    for key, entry in results.items():
        if key.startswith("stacks|") and key != "stacks|together":
            what = key.split("|")[1]
            rows.append([f"{entry['bytes'] / 1000:.0f} kB", what.replace("fro_ckpt,bytes", "`fro_ckpt,bytes`")
                         .replace("calib,bytes", "`calib,bytes`").replace(", rank", ", `rank`"),
                         f"{mean(entry):.1f}", f"{entry['right']:.2f}", f"{entry['concept']:.2f}"])  # fmt: skip
    rows.sort(key=lambda row: (float(row[0].split()[0]), float(row[2])))
    return table(["size", "", "PSNR against both used together", "heart and colours right", "style seen"], rows)


# --- figures ------------------------------------------------------------------------------------


def draw_curves(axes: Axes, results: Mapping[str, Entry], name: str) -> None:
    for number, recipe in enumerate(RECIPES):
        entries = [results[f"recipes|{name}|own|{recipe}|{rank}"] for rank in _RANKS]
        sizes = np.array([entry["bytes"] for entry in entries]) / 1e6
        colour = style.COLOURS[number % len(style.COLOURS)]
        axes.plot(sizes, [mean(entry) for entry in entries], "o-", color=colour, label=recipe, markersize=4)
        if recipe in ("calib,bytes", "fro_ckpt,bytes"):
            low, high = np.array([interval(entry["psnr"]) for entry in entries]).T
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    ticks = [entry["bytes"] / 1e6 for entry in (results[f"recipes|{name}|own|rank|{rank}"] for rank in _RANKS)]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.axhline(mean(results[f"recipes|{name}|own|none|"]), color="gray", linestyle=":", linewidth=1)
    megabytes = results[f"recipes|{name}|own|whole|"]["bytes"] / 1e6
    axes.set_title(f"{_TITLES[name]}, {megabytes:.1f} MB")


def figure(results: Mapping[str, Entry], names: Sequence[str]) -> Figure:
    with rc_context(style.RC):
        drawn = Figure(figsize=(3.6 * len(names), 3.8), layout="constrained")
        for number, name in enumerate(names):
            axes = drawn.add_subplot(1, len(names), number + 1)
            draw_curves(axes, results, name)
            axes.set_xlabel("file size (MB)")
            if not number:
                axes.set_ylabel("PSNR (dB)")
        handles, labels = axes.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(names) > 2 else 3)
        return drawn


# --- the page -----------------------------------------------------------------------------------


def page(results: Mapping[str, Entry]) -> str:
    recipes = "\n\n".join(
        f"**{_TITLES[name]}** ({results[f'recipes|{name}|own|whole|']['bytes'] / 1e6:.1f} MB; without it "
        f"{mean(results[f'recipes|{name}|own|none|']):.1f} dB)\n\n{recipes_table(results, name)}"
        for name in _SHOWN
    )
    plain = "\n\n".join(
        f"{_TITLES[name]}:\n\n{recipes_table(results, name, 'plain')}" for name in ("style-32", "heart")
    )
    floor = mean(results["floor|style-32"])
    of_packed, studies = json.loads(packed.RESULTS.read_text()), json.loads(curves.RESULTS.read_text())
    return (
        (Path(__file__).parent / "evidence.md")
        .read_text()
        .format(
            recipes=recipes,
            plain=plain,
            concepts=concepts_table(results),
            correlations=correlations(results),
            above_lines=above_lines(results),
            seeds=seeds_table(results),
            variants=variants_table(results),
            small=small_table(results),
            stacks=stacks_table(results),
            floor=f"{floor:.1f}",
            pictures=len(results["floor|style-32"]["psnr"]),
            refined=refined_table(results),
            studied=len([name for name in curves.MAIN if name in studies]),
            targets=targets_table(studies),
            sizes=sizes_table(studies),
            gaps=gaps_table(studies),
            seen=judged_table(studies),
            predicted=predicted_table(studies),
            retrained=retrained_table(studies),
            transferred=transferred_table(studies),
            factors=factors.table(json.loads(factors.RESULTS.read_text())),
            language=language.tables(json.loads(language.RESULTS.read_text())),
            encoder=encoder.tables(json.loads(encoder.RESULTS.read_text())),
            packed=packed.table(of_packed),
            predictions=packed.predictions(of_packed),
        )
    )


def main() -> None:
    results = json.loads(RESULTS.read_text())
    (DOCS / "evidence.md").write_text(page(results))
    studies = json.loads(curves.RESULTS.read_text())
    drawn = {
        "evidence.png": figure(results, _SHOWN),
        "calibrated.png": figure(results, ("style", "style-32")),
        "rates.png": rates_figure(studies, "style"),
    }
    for name, plot in drawn.items():
        style.save(plot, DOCS / name)
        with Image.open(DOCS / name) as picture:
            small = picture.convert("RGB").quantize(256)
        small.save(DOCS / name, optimize=True)


if __name__ == "__main__":
    main()
