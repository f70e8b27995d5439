"""A small study on the embedded model: numbers against other programs, reruns, and what goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.cli import app
from lorashrink.errors import RecipeError, UsageError
from lorashrink.measuring.methods import METHODS, Method, methods_of
from lorashrink.results.evidence import Evidence

MODEL = lorashrink_example.path("model")
STYLE = lorashrink_example.path("loras", "style.safetensors")
TABLE = lorashrink_example.path("table.safetensors")

PROMPTS = """\
a big red circle on a white background, sks style --w 64 --h 64 --d 1 --l 4
a big blue star on a black background, sks style --w 64 --h 64 --d 2 --l 4
"""
METHODS_TRIED = ("calib,bytes fp8", "rank fp16")
SIZES = (200_000, 400_000)

Pictures = list[np.ndarray]


def study(source: Path, folder: Path, methods: Sequence[str] = METHODS_TRIED, **options: object) -> Evidence:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text(PROMPTS)
    settings = {"prompts": prompts, "sizes": SIZES, "seeds": (0,), "steps": 2, "calibration": TABLE, "quality": 38.0}
    return ls.evidence(MODEL, source, output=folder, methods=methods, **(settings | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evidence, list[Pictures]]:
    """A folder of a study that was interrupted in its second file and started again, and the pictures of each file."""
    root = tmp_path_factory.mktemp("study")
    source = root / "style.safetensors"
    shutil.copy(STYLE, source)
    seen: list[Pictures] = []

    def judge(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        if len(seen) == 1 and not (root / "interrupted").exists():
            (root / "interrupted").touch()
            raise KeyboardInterrupt
        seen.append(list(pictures))
        return {"letters": [len(prompt) for prompt in prompts]}

    with pytest.raises(KeyboardInterrupt):
        study(source, root / "out", judge=judge)
    first = (root / "out" / "measured.jsonl").read_text()
    result = study(source, root / "out", judge=judge)
    assert (root / "out" / "measured.jsonl").read_text().startswith(first)
    return root, result, seen


def test_an_interrupted_study_measures_each_file_once(drawn: tuple[Path, Evidence, list[Pictures]]) -> None:
    root, result, seen = drawn
    keys = [json.loads(line)["key"] for line in (root / "out" / "measured.jsonl").read_text().splitlines()]
    assert len(set(keys)) == len(keys)
    assert len(seen) == len(result.results)


def test_likeness_is_that_of_scikit_image(drawn: tuple[Path, Evidence, list[Pictures]]) -> None:
    """The pictures of the original adapter are in the folder, those of each file went to the judge."""
    root, result, seen = drawn
    paths = sorted((root / "out" / "pictures").glob("*style-whole*.png"))
    originals = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    own = [path for path in paths if path.name.startswith(("00", "01"))]
    assert len(own) == 4  # two prompts with the word, two without
    for point, pictures in zip(result.results, seen, strict=True):
        for picture, level, alike in zip(pictures, point.psnr, point.ssim, strict=True):
            levels = [peak_signal_noise_ratio(original, picture) for original in originals]
            assert min(abs(number - level) for number in levels) < 1e-3
            structures = [
                structural_similarity(original, picture, channel_axis=-1, data_range=255) for original in originals
            ]
            assert min(abs(number - alike) for number in structures) < 1e-3
    assert all(0 <= value <= 1 for point in result.results for value in point.ms_ssim)


def test_sizes_are_those_of_the_file_that_resize_writes(
    drawn: tuple[Path, Evidence, list[Pictures]], tmp_path: Path
) -> None:
    _, result, _ = drawn
    point = result.points("style", "calib,bytes fp8")[-1]
    (resized,) = ls.resize(
        STYLE, base=MODEL, calibration=TABLE, recipes=point.recipe, dtype="fp8", output=tmp_path / "made.safetensors"
    ).results
    path = Path(resized.output)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert (point.bytes, point.payload) == (len(data), len(data) - header)
    assert abs(point.payload / SIZES[-1] - 1) < 0.05
    assert point.predicted_db == pytest.approx(resized.predicted_db)


def test_one_rank_stays_below_the_size(drawn: tuple[Path, Evidence, list[Pictures]]) -> None:
    points = drawn[1].points("style", "rank fp16")
    assert points
    assert all(re.fullmatch(r"rank=\d+", point.recipe) for point in points)
    assert all(point.payload <= 1.01 * SIZES[-1] for point in points)


def test_plain_prompts_have_no_word_that_calls_the_adapter(drawn: tuple[Path, Evidence, list[Pictures]]) -> None:
    plain = [point for point in drawn[1].results if point.plain]
    assert plain
    shorter = len(", sks style")
    letters = [len(line.partition(" --")[0]) for line in PROMPTS.splitlines()]
    assert plain[0].judged["letters"] == tuple(number - shorter for number in letters)


def test_what_can_be_sent_in_names_no_folder_and_no_prompt(drawn: tuple[Path, Evidence, list[Pictures]]) -> None:
    root, result, _ = drawn
    for name in ("evidence.json", "evidence.html", "evidence.md"):
        text = (root / "out" / name).read_text()
        assert str(root) not in text
        assert "red circle" not in text
    document = json.loads((root / "out" / "evidence.json").read_text())
    assert document["command"] == "evidence"
    assert [point["psnr"] for point in document["results"]] == [list(point.psnr) for point in result.results]


def test_a_rerun_measures_nothing_and_a_line_cut_short_only_itself(
    drawn: tuple[Path, Evidence, list[Pictures]],
) -> None:
    root, result, _ = drawn
    journal = root / "out" / "measured.jsonl"
    before = journal.read_text()
    assert study(root / "style.safetensors", root / "out").results == result.results
    assert journal.read_text() == before
    journal.write_text(before[:-40])
    again = study(root / "style.safetensors", root / "out")
    assert [point.recipe for point in again.results] == [point.recipe for point in result.results]
    assert len(journal.read_text().splitlines()) == len(before.splitlines()) + 1


def test_another_adapter_of_the_same_name_is_measured_anew(
    drawn: tuple[Path, Evidence, list[Pictures]], tmp_path: Path
) -> None:
    root, result, _ = drawn
    shutil.copytree(root / "out", tmp_path / "out")
    ls.resize(STYLE, recipes="rank=4", output=tmp_path / "style.safetensors")
    changed = study(tmp_path / "style.safetensors", tmp_path / "out", ["rank fp16"], sizes=(200_000,), draws=1)
    assert "are not those of" in changed.notes[0]
    assert changed.results[0].psnr != result.points("style", "rank fp16")[0].psnr


def test_packed_files_count_without_their_metadata(tmp_path: Path) -> None:
    result = study(STYLE, tmp_path / "out", ["calib,bytes packed"], sizes=(60_000,), steps=1)
    (point,) = result.results
    assert 55_000 < point.payload <= 60_000
    assert point.bytes > point.payload


def test_a_size_that_no_packed_file_has_is_a_note(tmp_path: Path) -> None:
    result = study(STYLE, tmp_path / "out", ["energy packed"], sizes=(10,), steps=1)
    assert not result.results
    assert result.notes == ("style, energy packed: not measured. It makes no file of these --sizes.",)


def test_an_adapter_that_is_no_lora_is_drawn_as_one(tmp_path: Path) -> None:
    """A LoKr of rank 2 whose larger factor is a product: w1 ⊗ (a·b). Only the base tells that the layer is linear."""
    layer, generator = "lora_unet_input_blocks_1_0_emb_layers_1", torch.Generator().manual_seed(0)
    shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 32)}
    tensors = {f"{layer}.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(2.0)}, tmp_path / "lokr.safetensors")
    result = study(
        tmp_path / "lokr.safetensors", tmp_path / "out", ["rank fp16", "energy packed"], sizes=(5_000,), steps=1
    )
    assert not result.failed
    point, packed = result.results
    assert packed.payload < point.payload
    assert 8 * (32 + 128) * 2 <= point.payload < 2600  # all of it in fp16: rank 4 × 2
    assert point.mean_db > 50


# --- before any drawing --------------------------------------------------------------------------


def run(*words: object, status: int) -> str:
    result = CliRunner().invoke(app, ["evidence", *map(str, words)])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_a_plan_says_what_was_reckoned_and_draws_nothing(tmp_path: Path) -> None:
    text = run(MODEL, STYLE, "-o", tmp_path / "out", "--plan", status=0)
    assert f"1 adapter × {len(METHODS)} methods" in text
    assert text.count("reckoned, not measured") == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", STYLE, "-o", "out"], "missing"),
        ([MODEL, "missing.safetensors", "-o", "out"], "missing.safetensors"),
        ([MODEL, STYLE], "-o"),
        ([MODEL, STYLE, "-o", "out", "--methods", "rank fp9"], "fp9"),
        ([MODEL, STYLE, "-o", "out", "--sizes", "4;8"], "commas"),
        ([MODEL, STYLE, "-o", "out", "--against", "rank fp8"], "--against rank fp8"),
        ([STYLE, STYLE, "-o", "out"], "style.safetensors"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[object], message: str) -> None:
    error = run(*words, status=2)
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_no_adapter_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    result = ls.evidence(MODEL, [tmp_path / "text.safetensors", STYLE], output=tmp_path / "out", plan=True)
    (failure,) = result.failed
    assert "text.safetensors" in failure.error
    assert not result.results


def test_methods_are_named_with_and_without_a_dtype() -> None:
    methods, notes = methods_of(["rank: calib,bytes :energy fp8"], ["fp16", "packed"])
    assert [str(method) for method in methods] == ["rank fp16", "calib,bytes fp16", "calib,bytes packed", "energy fp8"]
    assert [note.partition(": ")[0] for note in notes] == ["rank"]
    assert "not measured packed" in notes[0]
    methods, notes = methods_of([], [])
    assert tuple(map(str, methods)) == METHODS
    assert not notes
    methods, notes = methods_of([], ["fp8", "packed"])
    assert {method.dtype for method in methods} == {"fp8", "packed"}
    assert not notes
    with pytest.raises(UsageError, match="Packed goes with"):
        Method.parse("rank packed")
    with pytest.raises(RecipeError):
        Method.parse("nonsense fp16")


def test_methods_without_a_packed_form_are_notes_of_a_study(tmp_path: Path) -> None:
    result = study(STYLE, tmp_path / "out", ["rank", "energy"], dtypes=("fp16", "packed"), sizes=(60_000,), plan=True)
    (note,) = result.notes
    assert note.startswith("rank: not measured packed")
