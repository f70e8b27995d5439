"""What the nodes do, without ComfyUI."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import fixtures
import numpy as np
import pytest
import torch
from pack import FOLDER, load_pack
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio
from torch import nn
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.automatic.method import Method
from lorashrink.bases.norms import BaseNorms
from lorashrink.cli import app
from lorashrink.errors import LorashrinkError, OutputError, RecipeError, UsageError

logic = load_pack()
EXAMPLE = lorashrink_example.path()


@pytest.fixture
def lora(tmp_path):
    return Path(shutil.copy(EXAMPLE / "loras" / "style.safetensors", tmp_path / "style.safetensors"))


class Holder(nn.Module):
    """A module with parameters of these dotted names, as ComfyUI's models have."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module = self
            for word in path:
                if not hasattr(module, word):
                    module.add_module(word, nn.Module())
                module = getattr(module, word)
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))


def comfy_model(base, prefix="model.diffusion_model."):
    """A MODEL of ComfyUI with the weights of a checkpoint."""
    tensors = load_file(base)
    unet = {f"diffusion_model.{key.removeprefix(prefix)}": t for key, t in tensors.items() if key.startswith(prefix)}
    return SimpleNamespace(model=Holder(unet), backup={})


# --- targets ------------------------------------------------------------------------------------


ALONE = Method("adapter", "")


def test_each_target_gives_its_recipe():
    assert str(logic.recipe_for("quality", ALONE, quality="high")) == "energy=0.994988"  # 40 dB: error 10^((17-40)/20)
    assert str(logic.recipe_for("rank", ALONE, rank=8)) == "rank=8"
    assert str(logic.recipe_for("recipe", ALONE, recipe=" spn_lora=1,thr=-1.2 ")) == "spn_lora=1,thr=-1.2"
    recipe = logic.recipe_for("size in MB", ALONE, megabytes=32)
    assert recipe.value * 2**20 == pytest.approx(32e6, rel=1e-5)


def test_a_wrong_recipe_is_said_in_words():
    with pytest.raises(RecipeError, match="Did you mean rank"):
        logic.recipe_for("recipe", ALONE, recipe="rnk=4")


def test_a_sum_has_the_method_of_its_first_lora(lora):
    heart = EXAMPLE / "loras" / "heart.safetensors"
    with ls.open_base(EXAMPLE / "model") as base:
        assert logic.method_for(logic.sum_of([(str(lora), 1.0), (str(heart), 0.5)]), base).name == "base"


def test_a_quality_gives_the_file_that_shrink_writes(adapter, base, tmp_path):
    unet = {key: tensor for key, tensor in load_file(base).items() if key.startswith("model.diffusion_model.")}
    file = fixtures.write_tensors(tmp_path / "unet.safetensors", unet)
    model = comfy_model(base)
    loaded = logic.base_of(model)
    method = logic.method_for(str(adapter), loaded)
    shrunk = logic.shrink(str(adapter), logic.recipe_for("quality", method, quality="small"), dtype="auto", base=loaded)
    (written,) = ls.shrink(adapter, base=file, quality="small", output=tmp_path / "out").results
    expected, state = load_file(written.output), shrunk.state_dict()
    assert (method.name, written.method) == ("base", "base")
    assert state.keys() == expected.keys()
    assert all(state[key].equal(tensor) for key, tensor in expected.items())
    assert method.why in logic.report(shrunk, method)


# --- the model ----------------------------------------------------------------------------------


def test_norms_of_a_loaded_model_are_those_of_its_file(base):
    model = comfy_model(base)
    with ls.open_base(base) as from_file:
        in_memory = logic.base_of(model)
        name = "lora_unet_middle_block_1_proj_in"
        (of_file,) = BaseNorms(from_file, cache=False).look_up([from_file.find(name)], ("fro", "spn")).values()
        (of_model,) = BaseNorms(in_memory).look_up([in_memory.find(name)], ("fro", "spn")).values()
        assert of_model == of_file


# Lists of models with the names that they have in ComfyUI, all layers and no companions of packed weights.
LOADED = [name for name in fixtures.ALL_BASES if not any(word in name for word in ("diffusers", "fp8", "bnb"))]


@pytest.mark.parametrize("listed", LOADED)
def test_a_model_in_memory_is_of_the_family_of_its_file(listed, tmp_path):
    with ls.open_base(fixtures.write_header(tmp_path / "base.safetensors", fixtures.shapes(listed))) as from_file:
        denoiser = {}
        for key, shape in fixtures.shapes(listed).items():
            for prefix in ("model.diffusion_model.", "diffusion_model.", "net.", "model.", ""):
                if key.startswith(prefix):
                    break
            if not key.startswith(("conditioner", "cond_stage", "text_encoders", "first_stage", "vae", "model_ema")):
                denoiser[f"diffusion_model.{key.removeprefix(prefix)}"] = torch.zeros(()).expand(shape)
        model = SimpleNamespace(model=Holder(denoiser), backup={})
        assert logic.base_of(model).family.name == from_file.family.name


def test_what_loras_added_to_a_loaded_model_does_not_count(base):
    model = comfy_model(base)
    name, parameter = next(iter(model.model.named_parameters()))
    original = parameter.detach().clone()
    model.backup[name] = SimpleNamespace(weight=original)
    parameter.add_(1)
    assert logic.Weights({"": (model.model, model.backup)})[name].equal(original)


def test_scaled_fp8_weights_in_memory_count_with_their_scale():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().max() / 448
    packed = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"diffusion_model.a.weight": packed, "diffusion_model.a.scale_weight": scale}
    model = SimpleNamespace(model=Holder(tensors), backup={})
    base = logic.base_of(model)
    (norms,) = BaseNorms(base).look_up([base.find("lora_unet_a")], ("fro",)).values()
    assert norms["fro"] == pytest.approx(float((packed.float() * scale).norm()), rel=1e-5)


def test_a_model_is_opened_once_and_not_kept_alive(base):
    model = comfy_model(base)
    opened = logic.base_of(model)
    assert logic.base_of(model) is opened
    del model
    with pytest.raises(LorashrinkError, match="unloaded"):
        opened.store.read(next(iter(opened.store.tensors)))


def test_a_model_without_weights_is_no_base():
    assert logic.base_of(SimpleNamespace(model=Holder({"a": torch.ones(2)}), backup={})) is None


# --- shrunk LoRAs -------------------------------------------------------------------------------


def test_a_shrunk_lora_is_what_resize_writes(adapter, base, tmp_path):
    model = comfy_model(base)
    unet = {key: tensor for key, tensor in load_file(base).items() if key.startswith("model.diffusion_model.")}
    file = fixtures.write_tensors(tmp_path / "unet.safetensors", unet)
    for recipe in (logic.recipe_for("size in MB", Method("base", ""), megabytes=0.06), ls.Recipe.parse("energy=0.95")):
        shrunk = logic.shrink(str(adapter), recipe, base=logic.base_of(model))
        ls.resize(adapter, base=file, recipes=recipe, output=tmp_path / "a.safetensors", force=True)
        expected = load_file(tmp_path / "a.safetensors")
        state = shrunk.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[key].equal(tensor) for key, tensor in expected.items())
        assert shrunk.outcome.bytes == (tmp_path / "a.safetensors").stat().st_size
        assert recipe.select != "size" or shrunk.outcome.bytes <= 60_000
        assert ("stay as they are" in logic.report(shrunk)) == recipe.needs_base  # the encoders have no base


def test_another_target_does_not_decompose_again(lora, monkeypatch):
    first = logic.shrink(str(lora), ls.Recipe.parse("rank=4"))

    def refuse(*_):
        raise AssertionError("decomposed again")

    monkeypatch.setattr("lorashrink.engine.spectrum._decompose_chunk", refuse)
    monkeypatch.setattr("lorashrink.files.disk.sha256_file", refuse)
    second = logic.shrink(str(lora), ls.Recipe.parse("energy=0.9"), dtype="bf16")
    assert second.prepared is first.prepared
    assert {tensor.dtype for key, tensor in second.state_dict().items() if "lora_up" in key} == {torch.bfloat16}


def test_a_file_that_was_replaced_is_read_again(lora):
    first = logic.shrink(str(lora), ls.Recipe.parse("rank=4"))
    shutil.copy(EXAMPLE / "loras" / "heart.safetensors", lora)
    os.utime(lora, ns=(1, 1))
    assert logic.shrink(str(lora), ls.Recipe.parse("rank=4")).prepared is not first.prepared


def test_a_recipe_that_needs_an_unknown_model_is_refused_in_words(lora):
    with pytest.raises(UsageError, match="does not know this kind of model"):
        logic.shrink(str(lora), ls.Recipe.parse("fro_ckpt,size=1"))


def test_the_report_has_sizes_error_and_ranks(lora):
    shrunk = logic.shrink(str(lora), ls.Recipe.parse("rank=4"))
    text = logic.report(shrunk)
    assert "3.7 MB before" in text
    assert "ranks 4" in text
    assert "no smaller" in logic.report(logic.shrink(str(lora), ls.Recipe.parse("energy=1"), dtype="fp32"))


def test_the_curve_is_a_picture_for_comfyui(lora):
    image = logic.to_image(logic.curve_figure(logic.shrink(str(lora), ls.Recipe.parse("rank=4")), ALONE))
    assert image.shape == (1, 662, 1152, 3)
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) < 0.5 < float(image.max()) <= 1


def test_a_merge_is_the_sum_of_its_loras(lora):
    heart = EXAMPLE / "loras" / "heart.safetensors"
    terms = [(str(lora), 0.5), (str(heart), -1.5)]
    state = logic.shrink(logic.sum_of(terms), ls.Recipe.parse("energy=1"), dtype="fp32").state_dict()
    parts = [dict(load_file(path)) for path, _ in terms]

    def delta(tensors, name):
        up, down = tensors[f"{name}.lora_up.weight"].float(), tensors[f"{name}.lora_down.weight"].float()
        return float(tensors[f"{name}.alpha"]) / len(down) * up.flatten(1) @ down.flatten(1)

    for name in ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_middle_block_1_proj_in"]:
        if f"{name}.alpha" in parts[0]:
            expected = 0.5 * delta(parts[0], name) - 1.5 * delta(parts[1], name)
            assert torch.allclose(delta(state, name), expected, atol=1e-5)


# --- looking ------------------------------------------------------------------------------------


def test_facts_are_words_and_a_picture(adapter, base):
    model = comfy_model(base)
    text, figure = logic.facts(str(adapter), logic.base_of(model))
    assert "layers of rank" in text
    assert logic.to_image(figure).shape[0] == 1
    logic.to_image(logic.facts(str(adapter), None)[1])


def test_a_damaged_file_is_said_in_words(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(LorashrinkError, match="not a safetensors file"):
        logic.facts(str(tmp_path / "bad.safetensors"), None)


def test_the_overlap_of_a_stack_is_advice_and_a_picture(lora):
    heart = EXAMPLE / "loras" / "heart.safetensors"
    text, figure = logic.overlap([(str(lora), 1.0), (str(heart), 0.5)], None)
    assert text
    assert logic.to_image(figure).ndim == 4


def test_a_grid_has_a_column_for_each_lora_and_tells_psnr(lora):
    generator = torch.Generator().manual_seed(0)
    full = torch.rand(2, 64, 96, 3, generator=generator)
    noisy = (full + 0.05 * torch.randn(full.shape, generator=generator)).clamp(0, 1)
    shrunk = logic.shrink(str(lora), ls.Recipe.parse("rank=4"))
    image = logic.grid(full, [(noisy, shrunk), (full, None)], shrunk.bytes_before)
    enlarged = noisy[0].repeat_interleave(2, 0).repeat_interleave(2, 1)  # to about 256 pixels
    top, left, gap = 12 + 3 * 24, 12 + 192 + 12, 12
    assert image.shape == (1, top + 2 * (128 + gap), gap + 3 * (192 + gap), 3)
    assert torch.allclose(image[0, top : top + 128, left : left + 192], enlarged, atol=1 / 255)
    a, b = ((picture * 255).round().byte().numpy() for picture in (full, noisy))
    expected = np.mean([peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)])
    assert f"PSNR {expected:.1f} dB" in logic._likeness(full, noisy)


def test_pictures_of_other_sizes_are_refused(lora):
    with pytest.raises(UsageError, match="same seed and size"):
        logic.grid(torch.rand(1, 64, 64, 3), [(torch.rand(1, 32, 64, 3), None)])


# --- saving -------------------------------------------------------------------------------------


def test_a_saved_lora_stands_beside_its_source_with_its_sidecars(lora, tmp_path):
    (tmp_path / "style.preview.png").write_bytes(b"picture")
    (tmp_path / "style.civitai.info").write_text("{}")
    (tmp_path / "style.txt").write_text("trigger")
    notes = {
        "file_name": "style",
        "size": 1,
        "sha256": "0",
        "preview_url": str(tmp_path / "style.preview.png"),
        "tags": [],
    }
    (tmp_path / "style.metadata.json").write_text(json.dumps(notes))
    path, *sidecars = logic.save(logic.shrink(str(lora), ls.Recipe.parse("rank=4")))
    assert path == tmp_path / "style_rank4.safetensors"
    assert sorted(sidecar.name for sidecar in sidecars) == [
        "style_rank4.civitai.info",
        "style_rank4.metadata.json",
        "style_rank4.preview.png",
        "style_rank4.txt",
    ]
    copied = json.loads((tmp_path / "style_rank4.metadata.json").read_text())
    assert copied["size"] == path.stat().st_size
    assert copied["preview_url"] == str(tmp_path / "style_rank4.preview.png")
    assert (copied["file_name"], copied["tags"]) == ("style_rank4", [])
    ls.resize(lora, recipes="rank=4", output=tmp_path / "by_resize.safetensors")
    assert path.read_bytes() == (tmp_path / "by_resize.safetensors").read_bytes()


def test_a_file_is_replaced_only_when_asked_and_the_source_never(lora):
    shrunk = logic.shrink(str(lora), ls.Recipe.parse("rank=4"))
    logic.save(shrunk, "small")
    with pytest.raises(OutputError):
        logic.save(shrunk, "small")
    logic.save(shrunk, "small", overwrite=True)
    before = lora.read_bytes()
    with pytest.raises(OutputError):
        logic.save(shrunk, "style", overwrite=True)
    assert lora.read_bytes() == before


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", ".hidden", "a\\b"])
def test_a_name_cannot_leave_the_folder(lora, name):
    with pytest.raises(OutputError, match="no name of a file"):
        logic.save(logic.shrink(str(lora), ls.Recipe.parse("rank=4")), name)


def test_a_merged_lora_is_named_after_its_parts(lora, tmp_path):
    heart = shutil.copy(EXAMPLE / "loras" / "heart.safetensors", tmp_path / "heart.safetensors")
    merged = logic.shrink(logic.sum_of([(str(lora), 1.0), (str(heart), 0.5)]), ls.Recipe.parse("rank=4"))
    assert [path.name for path in logic.save(merged)] == ["style+heart_rank4.safetensors"]
    assert logic.report(merged).startswith("1 × style.safetensors + 0.5 × heart.safetensors\n")


# --- installing ---------------------------------------------------------------------------------


def install(*words):
    return CliRunner().invoke(app, ["comfyui", "install", *map(str, words)])


def test_the_nodes_are_linked_into_comfyui(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    assert install(tmp_path).exit_code == 0
    assert (tmp_path / "custom_nodes" / "lorashrink").resolve() == FOLDER
    assert install(tmp_path).exit_code == 2
    assert install(tmp_path, "--copy", "--force").exit_code == 0
    target = tmp_path / "custom_nodes" / "lorashrink"
    assert not target.is_symlink()
    assert {path.name for path in FOLDER.glob("*.py")} <= {path.name for path in target.iterdir()}
    assert (FOLDER / "nodes.py").is_file()
    assert install(target.parent, "--force").exit_code == 0
    assert target.is_symlink()


def test_folders_without_comfyui_or_with_other_nodes_stay_unchanged(tmp_path):
    assert install(tmp_path).exit_code == 2
    own_nodes = tmp_path / "custom_nodes" / "lorashrink"
    own_nodes.mkdir(parents=True)
    (own_nodes / "mine.py").write_text("")
    assert install(tmp_path, "--force").exit_code == 2
    assert (own_nodes / "mine.py").is_file()
