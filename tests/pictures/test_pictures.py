"""Pictures of a tiny model: drawing, keeping and comparing them, and sweeps with pictures."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sdxl
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from fixtures import write_tensors
from PIL import Image
from tiny_pipelines import SDXL_MODULES, write_clip, write_sdxl_adapter
from typer.testing import CliRunner

import lorashrink as ls
from lorashrink.cli import app
from lorashrink.errors import FamilyMismatch, InputError, LorashrinkError, UsageError
from lorashrink.pictures.drawing import CACHE_BYTES, Shot, Studio, read_picture, shots_of
from lorashrink.pictures.likeness import MEASURES, ms_ssim, psnr, ssim
from lorashrink.pictures.prompts import Prompt
from lorashrink.pictures.samplers import scheduler
from lorashrink.plots.comparison_sheet import pictures_by_size
from lorashrink.plots.quality import size_and_pictures
from lorashrink.results.sweep import Drawn, Pictures, Point, Sweep
from lorashrink.sweeping.sweep import suggest, with_front

SMALL = Prompt("a cat", "bad", width=64, height=64, seed=3, steps=2, scale=4.0, sampler="euler_a")
LINES = "a cat --n bad --w 64 --h 64 --s 2 --l 4 --ss euler_a --d 3\na dog --w 80 --h 64 --s 2\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl_adapter(tmp_path_factory.mktemp("adapter") / "lora.safetensors", model)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(LINES)
    return path


def studio_shots() -> tuple[Shot, ...]:
    return shots_of([SMALL, replace(SMALL, sampler="ddim", seed=None)], [0, 1])


@pytest.fixture
def studio(model: Path, tmp_path: Path) -> Iterator[Studio]:
    with Studio(model, studio_shots(), folder=tmp_path) as studio:
        yield studio


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- drawing ---


def expected(
    model: Path,
    lora: Path | None = None,
    prepare: Callable[[Any], None] = lambda pipeline: None,
    device: str = "cpu",
) -> list[np.ndarray]:
    """The four shots of `studio` by diffusers alone, which reads the file itself."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora))
    prepare(pipeline)
    pictures = []
    for sampler, seed in (("euler_a", 3), ("euler_a", 4), ("ddim", 0), ("ddim", 1)):
        pipeline.scheduler = scheduler(sampler, v_parameterization=False)
        (picture,) = pipeline(
            "a cat", negative_prompt="bad", width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        pictures.append(np.asarray(picture))
    return pictures


def farthest(path: Path, picture: np.ndarray) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(read_picture(path).astype(int) - picture.astype(int)).max())


@pytest.mark.parametrize("adapted", [False, True])
def test_pictures_are_those_of_diffusers(model: Path, lora: Path, adapted: bool, tmp_path: Path, device: str) -> None:
    adapter = lora if adapted else None
    with Studio(model, studio_shots(), folder=tmp_path, device=device) as studio:
        studio.draw(lora, "before", dtype="float32")  # an adapter leaves nothing behind
        drawn = studio.draw(adapter, "x", dtype="float32")
    for path, picture in zip(drawn, expected(model, adapter, device=device), strict=True):
        assert farthest(path, picture) <= 1


def test_kept_pictures_are_not_drawn_again(studio: Studio, lora: Path, tmp_path: Path) -> None:
    paths = studio.draw(lora, "x")
    before, content = times(tmp_path), paths[1].read_bytes()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(lora.read_bytes())
    assert studio.draw(copy, "another label") == paths
    copy.unlink()
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:100])
    assert studio.draw(lora, "x") == paths
    assert paths[1].read_bytes() == content
    assert {name for name, when in times(tmp_path).items() if before[name] == when} == {paths[0].name, paths[3].name}


def test_a_model_with_nothing_new_to_draw_is_not_loaded(studio: Studio, model: Path, tmp_path: Path) -> None:
    studio.draw(None, "none")
    with Studio(model, studio.shots, folder=tmp_path) as again:
        again.draw(None, "none")
        assert again._loaded is None


def test_a_pictures_key_holds_all_that_decides_it(studio: Studio, model: Path, lora: Path, tmp_path: Path) -> None:
    shot = studio.shots[0]
    second_model = tiny_sdxl.write_model(tmp_path / "second", seed=1)
    keys = studio.picture_keys(None, "float32")[:1]
    keys += studio.picture_keys(lora, "float32")[:1] + studio.picture_keys(None, "float16")[:1]
    changes = {"prompt": "b", "negative": "b", "width": 72, "height": 72, "seed": 9, "steps": 3, "scale": 1.0}
    for name, value in {**changes, "sampler": "ddim"}.items():
        studio.shots = (replace(shot, prompt=replace(SMALL, **{name: value})),)
        keys += studio.picture_keys(None, "float32")
    for folder in (second_model, model):
        with Studio(folder, [shot]) as own_studio:
            keys += own_studio.picture_keys(None, "float32")
    assert keys.pop() == keys[0]
    assert len(set(keys)) == len(keys)


def test_an_interrupted_sweep_goes_on_where_it_was(model: Path, lora: Path, prompts: Path, tmp_path: Path) -> None:
    def sweep(progress: object = None) -> Sweep:
        return ls.sweep(lora, recipes="rank=1", images=model, prompts=prompts, pictures=tmp_path, progress=progress)

    def interrupt(text: str, done: int, total: int) -> None:
        if text == "pictures: rank1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(interrupt)
    before = times(tmp_path)
    assert sorted(name.split("_")[0] + name.split("_")[2] for name in before) == ["00rank1", "00whole", "01whole"]
    result = sweep()
    assert before.items() <= times(tmp_path).items()
    assert len(times(tmp_path)) == 8
    assert result.drawn is not None
    assert result == sweep()


def test_pictures_are_kept_in_the_users_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Studio(model, shots_of([SMALL], [0])) as studio:
        (path,) = studio.draw(None, "none")
    assert path.parent == tmp_path / "lorashrink" / "pictures"


def test_a_peft_folder_is_drawn_and_swept(studio: Studio, model: Path, prompts: Path, tmp_path: Path) -> None:
    lora = write_sdxl_adapter(tmp_path / "in" / "unet.safetensors", model, {"unet": SDXL_MODULES["unet"]})
    (converted,) = ls.convert(lora, base=model, naming="peft", output=tmp_path / "in" / "peft").results
    folder = Path(converted.output)
    for of_folder, of_file in zip(studio.draw(folder, "folder"), studio.draw(lora, "file"), strict=True):
        assert of_folder != of_file
        assert farthest(of_folder, read_picture(of_file)) <= 1
    sweeps = [
        ls.sweep(path, recipes=["rank=1", "rank=2"], images=model, prompts=prompts, pictures=tmp_path / "png")
        for path in (folder, lora)
    ]
    levels = [[point.pictures.psnr for point in sweep.points if point.pictures] for sweep in sweeps]
    assert levels[0] == pytest.approx(levels[1], abs=0.5)


def test_dora_is_drawn_as_its_formula_says(studio: Studio, model: Path, tmp_path: Path) -> None:
    """m · (W + ΔW) / ‖W + ΔW‖; diffusers 0.42 reads kohya's DoRA as LoRA."""
    lora = write_sdxl_adapter(
        tmp_path / "in" / "dora.safetensors", model, {"unet": SDXL_MODULES["unet"][:4]}, dora=True
    )

    def merge(pipeline: StableDiffusionXLPipeline) -> None:
        weights = pipeline.unet.state_dict()
        with ls.open_base(model) as base, ls.open_adapter(lora) as adapter:
            for layer in adapter:
                weight = weights[base.find(layer.name)[0].key.removeprefix("unet.")]
                direction = weight + layer.delta.dense()
                magnitude = layer.store.read(layer.keys["magnitude"]).reshape(-1, 1)
                weight.copy_(magnitude * direction / direction.norm(dim=1, keepdim=True))

    for path, picture in zip(studio.draw(lora, "x"), expected(model, prepare=merge), strict=True):
        assert farthest(path, picture) <= 1


def test_the_users_cache_stays_small_and_keeps_new_pictures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "lorashrink" / "pictures"
    cache.mkdir(parents=True)
    ages = {"old_" + "a" * 24: 3, "new_" + "b" * 24: 1, "older_" + "c" * 24: 5, "holiday": 9}  # days
    for name, days in ages.items():
        path = cache / f"{name}.png"
        with path.open("wb") as handle:
            handle.truncate(int(0.7 * CACHE_BYTES))  # a hole
        os.utime(path, (days * -86400 + 1e9,) * 2)
    with Studio(model, shots_of([SMALL], [0])) as studio:
        (drawn,) = studio.draw(None, "none")
        os.utime(drawn, (0, 0))
    assert {path.name for path in cache.iterdir()} == {drawn.name, "new_" + "b" * 24 + ".png", "holiday.png"}


def test_a_folder_of_the_users_own_is_never_trimmed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / f"x_{'a' * 24}.png"
    with path.open("wb") as handle:
        handle.truncate(2 * CACHE_BYTES)
    with Studio(model, shots_of([SMALL], [0]), folder=tmp_path) as studio:
        studio.draw(None, "none")
    assert path.exists()


def test_shrunk_files_are_on_the_disk_one_at_a_time(
    model: Path, lora: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    counts: dict[str, int] = {}

    def count(text: str, done: int, total: int) -> None:
        counts[text] = len(list((tmp_path / "tmp").rglob("*.safetensors")))

    ls.sweep(lora, recipes=["rank=1", "rank=2"], images=model, prompts=prompts, pictures=tmp_path / "p", progress=count)
    drawn = {text: number for text, number in counts.items() if text.startswith("pictures: ")}
    ones = {"pictures: rank1": 1, "pictures: rank2": 1}
    assert drawn == {"pictures: whole": 0, **ones, "pictures: none": 0, "pictures: float16": 0}
    assert not list((tmp_path / "tmp").iterdir())


def test_a_clip_model_compares_pictures_too(model: Path, lora: Path, prompts: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    words = ["sweep", "-r", "rank=1", "--images", model, "--prompts", prompts, "--images-out", tmp_path / "png"]
    words += ["--clip", tmp_path / "clip", "--csv", tmp_path / "c.csv", lora]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert re.search(r"recipe .* PSNR +SSIM +MS-SSIM +CLIP", result.stdout)
    document = json.loads(CliRunner().invoke(app, list(map(str, [*words[:-3], "--json", lora]))).stdout)
    (point,) = document["points"]
    assert point["pictures"]["clip"] == pytest.approx(np.mean(point["pictures"]["values"]["clip"]))
    assert 0 < point["pictures"]["clip"] <= 1
    assert str(point["pictures"]["clip"]) in (tmp_path / "c.csv").read_text()


# --- what is refused ---


def test_adapters_that_cannot_be_drawn_are_refused(studio: Studio, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    flux = "lora_unet_double_blocks_0_img_attn_proj"
    pair = {"lora_up.weight": torch.ones(32, 2), "lora_down.weight": torch.ones(2, 32)}
    loha = {f"hada_w{index}_a": torch.ones(32, 2) for index in "12"}
    loha |= {f"hada_w{index}_b": torch.ones(2, 32) for index in "12"}
    for tensors, prefix, error, message in (
        (pair, flux, FamilyMismatch, "Give the base"),
        (loha, name, InputError, "resize --as lora"),
    ):
        path = write_tensors(
            tmp_path / "in" / "a.safetensors", {f"{prefix}.{key}": value for key, value in tensors.items()}
        )
        with pytest.raises(error, match=message):
            studio.check(path)
        with pytest.raises(error, match=message):
            studio.draw(path, "x")


def test_a_model_that_cannot_draw_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for folder, message in (
        (tmp_path / "none", "no such model"),
        (model / "unet", "no model_index.json"),
        (tmp_path / "wan", "WanPipeline"),
    ):
        with pytest.raises(UsageError, match=message):
            Studio(folder, [])


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_model(tmp_path / "model")
    (folder / "vae" / "config.json").unlink()
    with Studio(folder, shots_of([SMALL], [0]), folder=tmp_path) as studio, pytest.raises(InputError, match="model"):
        studio.draw(None, "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "model"}, "both --images"),
        ({"prompts": "p.txt"}, "both --images"),
        ({"images": "model", "prompts": "missing.txt"}, r"missing\.txt: cannot be read"),
        ({"images": "model", "prompts": "empty.txt"}, r"empty\.txt: no prompts"),
        ({"images": "model", "prompts": "pndm.txt"}, "pndm cannot draw in 2"),
        ({"images": "model", "prompts": "p.txt", "seeds": ()}, "seeds"),
    ],
)
def test_wrong_requests_for_pictures_fail_before_any_work(
    options: dict[str, object], message: str, model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model)
    Path("p.txt").write_text(LINES)
    Path("empty.txt").write_text("# nothing\n")
    Path("pndm.txt").write_text("a cat --ss pndm --s 2\n")
    with pytest.raises(UsageError, match=message):
        ls.sweep(lora, recipes="rank=1", **options)


BLOCKED = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
from lorashrink.cli import main
main()
"""


def test_without_the_packages_only_pictures_fail(lora: Path, model: Path, prompts: Path) -> None:
    def run(missing: list[str], *more: object) -> subprocess.CompletedProcess[str]:
        script = BLOCKED.format(missing=missing)
        words = [sys.executable, "-c", script, "sweep", "-r", "rank=1", "--json", str(lora), *map(str, more)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    heavy = ["diffusers", "transformers", "accelerate", "peft", "skimage"]
    assert json.loads(run(heavy).stdout)["drawn"] is None
    failed = run(["skimage", "diffusers"], "--images", model, "--prompts", prompts)
    assert failed.returncode == 2
    assert failed.stderr == "lorashrink: pictures need diffusers, scikit-image: pip install 'lorashrink[pictures]'\n"


# --- sweeps with pictures ---


def sweep_words(model: Path, prompts: Path, pictures: Path) -> list[object]:
    recipes = ["-r", "rank=1", "-r", "rank=3", "-r", "rank=6"]
    return ["sweep", *recipes, "--images", model, "--prompts", prompts, "--seeds", "0,1", "--images-out", pictures]


@pytest.fixture(scope="module")
def folder(model: Path, lora: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that one sweep writes."""
    output = tmp_path_factory.mktemp("sweep")
    words = [*sweep_words(model, prompts, output / "png"), "--plot", output / "c.svg", "--csv", output / "c.csv"]
    words += ["--json", lora]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    (output / "c.json").write_text(result.stdout)
    return output


def test_a_sweep_measures_how_pictures_change(folder: Path, model: Path) -> None:
    document = json.loads((folder / "c.json").read_text())
    drawn, points = document["drawn"], {point["recipe"]: point["pictures"] for point in document["points"]}
    assert [points[f"rank={rank}"]["psnr"] for rank in (1, 3, 6)] == sorted(point["psnr"] for point in points.values())
    assert [points[f"rank={rank}"]["ssim"] for rank in (1, 3, 6)] == sorted(point["ssim"] for point in points.values())
    assert drawn["none"]["psnr"] < points["rank=3"]["psnr"] < points["rank=6"]["psnr"]
    assert drawn["floor"]["psnr"] > drawn["none"]["psnr"]
    assert (drawn["model"], drawn["device"], drawn["dtype"], drawn["seeds"]) == (str(model), "cpu", "float32", [0, 1])
    assert [prompt["prompt"] for prompt in drawn["prompts"]] == ["a cat", "a dog"]
    assert len(list((folder / "png").iterdir())) == 4 * 6
    pairs = [tuple(map(read_picture, pair)) for pair in zip(drawn["files"], points["rank=1"]["files"], strict=True)]
    assert [picture.shape for picture, _ in pairs] == [(64, 64, 3)] * 2 + [(64, 80, 3)] * 2
    for name, measure in (("psnr", psnr), ("ssim", ssim), ("ms_ssim", ms_ssim)):
        values = [measure(*pair) for pair in pairs]
        assert points["rank=1"]["values"][name] == pytest.approx(values)
        assert points["rank=1"][name] == pytest.approx(np.mean(values))
        assert points["rank=1"][f"{name}_deviation"] == pytest.approx(np.std(values))


def test_the_csv_has_a_column_for_each_number(folder: Path) -> None:
    header, *rows = [line.split(",") for line in (folder / "c.csv").read_text().splitlines()]
    points = json.loads((folder / "c.json").read_text())["points"]
    assert [float(row[header.index("psnr")]) for row in rows] == [point["pictures"]["psnr"] for point in points]
    assert {"files", "values", "pictures"}.isdisjoint(header)


def test_every_measure_has_its_fields() -> None:
    names = {field.name for field in fields(Pictures)} - {"files", "values", "worst", "worst_psnr"}
    assert names == {name for measure in MEASURES for name in (measure.name, f"{measure.name}_deviation")}


def test_figure_and_sheet_are_written_beside_each_other(folder: Path) -> None:
    assert (folder / "c_pictures.svg").read_text().startswith("<?xml")
    with Image.open(folder / "c_sheet.png") as sheet:
        assert sheet.width > 5 * 160
        assert sheet.height > 4 * 64


def test_the_text_names_both_ends_of_the_scale(folder: Path, model: Path, lora: Path, prompts: Path) -> None:
    words = [*sweep_words(model, prompts, folder / "png"), lora]
    text = CliRunner().invoke(app, list(map(str, words))).stdout
    assert re.search(r"without the adapter: PSNR [\d.]+ dB, SSIM 0\.\d{4}, MS-SSIM 0\.\d{4}\n", text)
    assert "the original adapter in float16: " in text
    assert f"4 pictures each, in {folder / 'png'}" in text
    assert "recommended: -r rank=" in text


@pytest.mark.parametrize("seeds", ["1.5", "-1", "a"])
def test_seeds_are_whole_numbers(seeds: str, lora: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", f"--seeds={seeds}", str(lora)])
    assert result.exit_code == 2
    assert "--seeds" in result.stderr


def test_a_model_that_overflows_in_half_precision_has_no_floor(
    lora: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_sdxl.write_model(tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.conv_out.bias.data += 1e5
    unet.save_pretrained(folder / "unet")
    result = ls.sweep(lora, recipes="rank=1", images=folder, prompts=prompts, pictures=tmp_path / "png")
    assert result.drawn is not None
    assert result.drawn.floor is None
    assert "prompt 00, seed 3: becomes no picture in float16" in caplog.text
    with pytest.raises(LorashrinkError, match="NaN"), Studio(folder, shots_of([SMALL], [0]), folder=tmp_path) as studio:
        studio.draw(None, "none", dtype="float16")


# --- what to begin with, and figures, by hand ---


def pictures(psnr: float, ssim: float, files: tuple[str, ...] = ()) -> Pictures:
    """Of two pictures; MS-SSIM is SSIM."""
    values = {"psnr": (psnr - 1, psnr + 1), "ssim": (ssim - 0.01, ssim + 0.01), "ms_ssim": (ssim - 0.01, ssim + 0.01)}
    return Pictures(psnr, 1.0, ssim, 0.01, ssim, 0.01, files, values, 0, psnr - 1)


def sweep_of(
    values: list[tuple[float, float]], floor: Pictures | None, files: tuple[tuple[str, ...], ...] | None = None
) -> Sweep:
    """Sizes of 1, 2, 4, ... MB, with these PSNR and SSIM."""
    files = files or ((),) * (len(values) + 2)
    points = tuple(
        Point(
            f"rank={2**index}",
            "rank",
            2**index * 10**6,
            0.5**index,
            0.5,
            1.0,
            1,
            best=True,
            pictures=pictures(*value, own),
        )
        for index, (value, own) in enumerate(zip(values, files[2:], strict=True))
    )
    drawn = Drawn("m", "cpu", "float32", (Prompt("a cat"),), (0,), files[1], pictures(12.0, 0.3, files[0]), floor)
    return Sweep("x.safetensors", 10**8, points, suggest(points, 10**8, drawn), drawn)


@pytest.mark.parametrize(
    ("values", "floor", "expected"),
    [
        ([(20, 0.5), (33.5, 0.9), (34, 0.95)], (50, 0.99), "rank=4"),  # the worst picture has 32.5 dB, then 33
        ([(20, 0.5), (29, 0.9), (34, 0.95)], (28, 0.99), "rank=2"),  # half precision changes more
        ([(20, 0.5), (36, 0.9)], None, "rank=2"),
    ],
)
def test_the_smallest_file_with_a_close_worst_picture_is_recommended(
    values: list[tuple[float, float]], floor: tuple[float, float] | None, expected: str
) -> None:
    chosen = sweep_of(values, pictures(*floor) if floor else None).suggestion
    assert chosen is not None
    assert chosen.recipe == expected
    worst = next(point.pictures.worst_psnr for point in sweep_points(values) if point.recipe == expected)
    assert f"its worst picture has {worst:.1f} dB" in chosen.reason
    assert chosen.reason.endswith("worst: a cat (seed 0)")


def sweep_points(values: list[tuple[float, float]]) -> tuple[Point, ...]:
    return sweep_of(values, None).points


def test_the_closest_file_is_recommended_if_all_recipes_change_the_pictures() -> None:
    chosen = sweep_of([(20, 0.5), (21, 0.6), (22, 0.7), (23, 0.75)], pictures(50, 0.99)).suggestion
    assert chosen is not None
    assert chosen.recipe == "rank=8"
    assert chosen.reason.startswith("the closest, because no recipe keeps every picture at 33.0 dB or more: 8.00% of")


def test_calibrated_recipes_are_not_ranked_by_the_error_of_the_weights() -> None:
    points = [Point("rank=1", "rank", 10, 0.5, 0.75, 1.0, 1), Point("rank=2", "rank", 30, 0.1, 0.99, 2.0, 1)]
    by_outputs = Point("calib=1,size=1", "calib=1,size", 20, 0.05, 0.6, 1.0, 1, calibrated=True)
    assert [point.best for point in with_front([*points, by_outputs])] == [True, False, True]
    close, closer = (replace(points[number], pictures=pictures(level, 0.9)) for number, level in enumerate((30, 40)))
    middle = replace(by_outputs, pictures=pictures(35, 0.9))
    assert [point.best for point in with_front([close, closer, middle])] == [True, True, True]


def test_the_figure_shows_both_measures_over_size_and_both_ends() -> None:
    result = sweep_of([(20, 0.5), (36, 0.9), (40, 0.95)], pictures(50, 0.99))
    figure = size_and_pictures(result)
    texts = []
    for axes, name in zip(figure.axes, ("psnr", "ms_ssim"), strict=True):
        drawn = [point.pictures for point in result.points if point.pictures]
        curve = axes.containers[0].lines[0]
        assert np.array_equal(curve.get_data(), [[1, 2, 4], [getattr(pictures, name) for pictures in drawn]])
        dots = axes.collections[-1].get_offsets()
        assert [tuple(dot) for dot in dots] == [
            (size, value) for size, pictures in zip((1, 2, 4), drawn, strict=True) for value in pictures.values[name]
        ]
        texts.append([line.get_label() for line in axes.get_lines() if ":" in str(line.get_label())])
        ring = next(line for line in axes.get_lines() if line.get_markersize() == 11)
        assert list(zip(*ring.get_data(), strict=True)) == [(2, getattr(drawn[1], name))]
    assert ["recommended: rank=2" in text.get_text() for text in figure.axes[0].texts] == [True]
    assert texts[0] == ["the original adapter in float16: 50.0 dB", "no adapter: 12.0 dB"]
    assert texts[1] == ["the original adapter in float16: 0.9900", "no adapter: 0.3000"]


def test_the_sheet_goes_from_no_adapter_to_the_full_adapter(tmp_path: Path) -> None:
    colours = ["#ff0000", "#0000ff", *(f"#00{30 * step:02x}00" for step in range(1, 9))]
    files = []
    for number, colour in enumerate(colours):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (640, 320), colour).save(path)
        files.append((str(path),))
    values = [(15.0 + 3 * step, 0.5) for step in range(8)]
    sheet = pictures_by_size(sweep_of(values, pictures(50, 0.99), tuple(files)))
    columns = {colour: first_column(sheet, colour) for colour in colours}
    shown = [colour for colour in colours if columns[colour] is not None]
    assert len(shown) == 2 + 6
    assert {colours[2], colours[9]} <= set(shown)  # the smallest and the largest
    order = [shown[0], *shown[2:], shown[1]]
    assert sorted(order, key=lambda colour: columns[colour] or 0) == order
    width, height = 320, 160
    assert sum(count for count, colour in sheet.getcolors(1 << 20) if colour == (255, 0, 0)) == width * height


def first_column(sheet: Image.Image, colour: str) -> int | None:
    """The leftmost column of a picture in this colour."""
    rgb = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)])
    columns = np.flatnonzero((np.asarray(sheet) == rgb).all(-1).sum(0) > 100)
    return int(columns[0]) if len(columns) else None


def test_numbers_of_equal_pictures_are_finite() -> None:
    plain = np.zeros((8, 8, 3), np.uint8)
    assert math.isfinite(psnr(plain, plain))
