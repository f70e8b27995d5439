"""Models as diffusers' pipelines: folders of four families, single files, and adapters that come and go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import fixtures
import numpy as np
import pytest
import tiny_sdxl
import tiny_single_file
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from fixtures import write_tensors
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import lorashrink as ls
from lorashrink.errors import InputError, UsageError
from lorashrink.pictures.drawing import Studio, read_picture, shots_of
from lorashrink.pictures.pipelines import (
    KINDS,
    adapted,
    check_model,
    companions,
    enough_memory,
    open_pipeline,
    pipeline_kind,
)
from lorashrink.pictures.prompts import OWN, Prompt

SHOT = Prompt("a cat", "bad", width=64, height=64, seed=3, steps=2, scale=4.0, sampler=OWN)
LDM_SD1 = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}


# --- tiny models --------------------------------------------------------------------------------


def autoencoder(**settings: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        **settings,
    )


def write_sd1(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_sdxl.write_tokenizer(folder / "tokenizer", tiny_sdxl.EOS)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=16,
    )
    StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=tiny_sdxl._encoder(CLIPTextModel, 16, tokenizer), tokenizer=tokenizer,
        unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def bytes_for_t5() -> PreTrainedTokenizerFast:
    """Like T5's in what comes out: words of single bytes, and an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: place for place, word in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=64)


def write_flux(folder: Path) -> Path:
    torch.manual_seed(0)
    clip, t5 = tiny_sdxl.write_tokenizer(folder / "tokenizer", tiny_sdxl.EOS), bytes_for_t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    encoder = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(latent_channels=4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=tiny_sdxl._encoder(CLIPTextModel, 16, clip),
        tokenizer=clip,
        text_encoder_2=encoder,
        tokenizer_2=t5,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_sd3(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizers = [tiny_sdxl.write_tokenizer(folder / f"tokenizer{end}", tiny_sdxl.EOS) for end in ("", "_2")]
    encoders = [tiny_sdxl._encoder(CLIPTextModelWithProjection, 16, tokenizer) for tokenizer in tokenizers]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(latent_channels=4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "StableDiffusionXLPipeline": tiny_sdxl.write_model,
    "StableDiffusionPipeline": write_sd1,
    "FluxPipeline": write_flux,
    "StableDiffusion3Pipeline": write_sd3,
}
# A layer of attention, one besides it, and one of a text encoder, in diffusers' names and in kohya's.
LAYERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "StableDiffusionXLPipeline": (
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "unet.up_blocks.0.resnets.0.conv1",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ),
    "StableDiffusionPipeline": (
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    ),
    # The transformer's own proj_out has the name that ends those of the blocks.
    "FluxPipeline": (
        (
            "transformer.transformer_blocks.0.attn.to_q",
            "transformer.proj_out",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"),
    ),
    "StableDiffusion3Pipeline": (
        ("transformer.transformer_blocks.0.attn.to_q", "transformer.proj_out"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ),
}
FAMILIES = sorted(KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def write_adapter(path: Path, model: Path, names: tuple[str, ...]) -> Path:
    """A LoRA of rank 3 in the names of diffusers or kohya."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    with ls.open_base(model) as base:
        for name in names:
            (out, fan_in, *kernel) = ls.bases.views_shape(base.find(name))
            kohya = name.startswith("lora_")
            up, down = ("lora_up", "lora_down") if kohya else ("lora_B", "lora_A")
            tensors[f"{name}.{up}.weight"] = torch.randn(out, 3, *[1] * len(kernel), generator=generator)
            tensors[f"{name}.{down}.weight"] = torch.randn(3, fan_in, *kernel, generator=generator)
    return write_tensors(path, tensors)


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
def test_pictures_are_those_that_diffusers_draws_by_itself(
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
    more = {"negative_prompt": "bad"} if KINDS[name].negative else {}
    (picture,) = pipeline(
        "a cat", width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), **more,
    ).images  # fmt: skip
    assert np.abs(read_picture(path).astype(int) - np.asarray(picture).astype(int)).max() <= 1


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_changes_exactly_its_layers_and_leaves_nothing_behind(
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
            made = sum(float(layer.get_delta_weight("default").detach().square().sum()) for layer in layers)
        planned = sum(float(layer.delta.dense().square().sum()) for layer in adapter)
    assert made == pytest.approx(planned, rel=1e-5)
    after = weights(pipeline)
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
    assert all(one != other for one, other in zip(bare, changed, strict=True))
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


def test_negative_prompts_that_a_model_does_not_read_are_named(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, said in (("FluxPipeline", ["FLUX.1 has no negative prompts; they are left out"]),
                       ("StableDiffusion3Pipeline", [])):  # fmt: skip
        lora = write_adapter(tmp_path / "lora.safetensors", folders[name], LAYERS[name][0])
        caplog.clear()
        with Studio(folders[name], shots_of([SHOT], [0])) as studio:
            studio.check(lora)
        assert caplog.messages == said


def test_tensors_that_pictures_leave_out_are_named(
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
        (one,), (other,) = studio.draw(lora, "x"), studio.draw(more, "x")
        assert one.read_bytes() == other.read_bytes()


def test_adapters_without_layers_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "norms.safetensors", {"lora_unet_out_0.w_norm": torch.ones(16)})
    with (
        Studio(folders["StableDiffusionXLPipeline"], []) as studio,
        pytest.raises(InputError, match="no layers of LoRA"),
    ):
        studio.check(path)
    for more in ({}, {"images": folders["StableDiffusionXLPipeline"], "prompts": tmp_path / "p.txt"}):
        (tmp_path / "p.txt").write_text("a cat\n")
        with pytest.raises(InputError, match=r"norms\.safetensors: (has|holds) no layer"):
            ls.sweep(path, recipes="rank=1", **more)


# --- single files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    sdxl, sd1 = folders["StableDiffusionXLPipeline"], folders["StableDiffusionPipeline"]
    return {
        "StableDiffusionXLPipeline": tiny_single_file.write_single_file(sdxl, place / "sdxl.safetensors"),
        "StableDiffusionPipeline": tiny_single_file.write_tensors(
            in_one_file(folder_parts(sd1)), place / "sd1.safetensors"
        ),
    }


def folder_parts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {part: load_file(next((folder / part).glob("*.safetensors"))) for part in LDM_SD1}


def in_one_file(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parts of SD 1 under its original names."""
    encoder = {name.removeprefix("text_model."): tensor for name, tensor in parts["text_encoder"].items()}
    return {
        **{f"{LDM_SD1['unet']}{name}": tensor for name, tensor in tiny_single_file._unet(parts["unet"]).items()},
        **{f"{LDM_SD1['vae']}{name}": tensor for name, tensor in tiny_single_file.ldm_vae(parts["vae"]).items()},
        **{f"{LDM_SD1['text_encoder']}transformer.text_model.{name}": tensor for name, tensor in encoder.items()},
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
    for one, other in zip(*pictures, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_the_packaged_settings_of_sd_1_are_those_of_the_published_model() -> None:
    package, place = KINDS["StableDiffusionPipeline"].settings or ("", "")
    settings = Path(ls.__path__[0]) / place
    assert package == "lorashrink"
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(settings / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(settings / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(settings / "text_encoder")),
        }
    ours = in_one_file({name: part.state_dict() for name, part in parts.items()})
    published = fixtures.shapes("base_sd15_ldm")
    listed = {name: shape for name, shape in published.items() if name.startswith(tuple(LDM_SD1.values()))}
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


def test_a_tokenizer_is_found_beside_the_file_and_in_the_hubs_cache(
    alone: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    model, folder = alone("StableDiffusionXLPipeline"), folders["StableDiffusionXLPipeline"]
    with pytest.raises(UsageError, match=r"sdxl\.safetensors: a single file holds no tokenizer.*--images-config"):
        check_model(model)
    cached = tmp_path / "hub" / "models--openai--clip-vit-large-patch14" / "snapshots" / "0"
    shutil.copytree(folder / "tokenizer", cached)
    assert companions(model)[1:] == (cached,)
    shutil.copytree(folder / "tokenizer", model.parent / "tokenizer")
    assert companions(model)[1:] == (model.parent / "tokenizer",)
    assert check_model(model) == "StableDiffusionXLPipeline"


def test_a_single_file_needs_no_settings_if_it_is_of_the_published_form(
    alone: Callable[[str], Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the settings of the tiny model for the published ones, but without their scheduler and tokenizers."""
    model, folder = alone("StableDiffusionXLPipeline"), folders["StableDiffusionXLPipeline"]
    settings = tmp_path / "package" / "settings"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (settings / part).mkdir(parents=True)
        shutil.copy(folder / part / "config.json", settings / part)
    index = json.loads((folder / "model_index.json").read_text())
    (settings / "model_index.json").write_text(json.dumps({**index, "scheduler": [None, None]}))
    (settings.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = replace(KINDS["StableDiffusionXLPipeline"], settings=("package", "settings"))
    monkeypatch.setitem(KINDS, "StableDiffusionXLPipeline", changed)  # type: ignore[arg-type]
    shutil.copytree(folder / "tokenizer", model.parent / "tokenizer")
    pictures = []
    for each in (folder, model):
        with Studio(each, shots_of([replace(SHOT, sampler="euler")], [0]), folder=tmp_path / "png") as studio:
            pictures.append(read_picture(*studio.draw(None, "none")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_file_says_by_two_keys_that_it_predicts_velocities(
    alone: Callable[[str], Path], folders: dict[str, Path]
) -> None:
    from lorashrink.pictures.pipelines import _published_scheduler

    model = alone("StableDiffusionXLPipeline")
    assert _published_scheduler(model).config.prediction_type == "epsilon"
    keys = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    write_tensors(model, {**load_file(model), **keys})
    assert _published_scheduler(model).config.prediction_type == "v_prediction"
    assert _published_scheduler(model).config.rescale_betas_zero_snr


def test_a_single_file_that_lacks_tensors_is_named(alone: Callable[[str], Path], folders: dict[str, Path]) -> None:
    name = "StableDiffusionXLPipeline"
    model = alone(name)
    tensors = load_file(model)
    del tensors["model.diffusion_model.out.2.weight"]
    write_tensors(model, tensors)
    with pytest.raises(InputError, match=r"sdxl\.safetensors: lacks tensors"):
        open_pipeline(model, device="cpu", dtype="float32", settings=folders[name])


def test_single_files_that_say_too_little_are_named(
    folders: dict[str, Path], single_files: dict[str, Path], tmp_path: Path
) -> None:
    flux = tmp_path / "flux.safetensors"
    tensors = load_file(next((folders["FluxPipeline"] / "transformer").glob("*.safetensors")))
    write_tensors(flux, tensors)
    sdxl = single_files["StableDiffusionXLPipeline"]
    other = write_tensors(
        tmp_path / "other.safetensors", {"bert.encoder.layer.0.output.dense.weight": torch.ones(2, 2)}
    )
    for model, settings, said in (
        (flux, None, "FLUX.1 in one file, which tells neither"),
        (sdxl, folders["StableDiffusionPipeline"], "must be a folder of SDXL"),
        (sdxl, tmp_path / "none", "--images-config .*none: must be a folder"),
        (other, None, "in one file, and pictures are drawn with SDXL, SD 1 and 2, FLUX.1, SD 3 only"),
    ):
        with pytest.raises(UsageError, match=said):
            check_model(model, settings)


def test_a_transformer_in_one_file_draws_with_the_other_parts_of_its_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["FluxPipeline"]
    model = tmp_path / "flux.safetensors"
    shutil.copy(next((folder / "transformer").glob("*.safetensors")), model)
    pictures = []
    for each, settings in ((folder, None), (model, folder)):
        with Studio(each, shots_of([SHOT], [0]), folder=tmp_path / "png", settings=settings) as studio:
            pictures.append(read_picture(*studio.draw(None, "none")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


# --- memory -------------------------------------------------------------------------------------


def test_pictures_too_large_for_the_memory_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    side = 8_000_000  # 16 TB of noise
    shots = shots_of([replace(SHOT, width=side, height=side)], [0])
    said = r"prompt 00, seed 3: 8000000 × 8000000 pixels .*\(out of memory on cpu\)"
    model = folders["StableDiffusionXLPipeline"]
    with Studio(model, shots, folder=tmp_path) as studio, pytest.raises(UsageError, match=said):
        studio.draw(None, "none")


def test_only_a_lack_of_memory_is_said_to_be_one() -> None:
    said = r"it is too large \(out of memory on cuda\). Buy more"
    with pytest.raises(UsageError, match=said), enough_memory("it is too large", "cuda", "Buy more."):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="mat1"), enough_memory("it is too large", "cuda", "Buy more."):
        torch.ones(2, 3) @ torch.ones(2, 3)
