"""Loading SDXL from folders and files, and encoding captions and pictures with it."""

import json
import pickle
import shutil
from pathlib import Path

import diffusers
import fixtures
import pytest
import tiny_sdxl
import tiny_single_file
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.errors import DamagedFile, InputError, LorashrinkError, NotABase, UsageError
from lorashrink.pictures.pipelines import quiet_libraries, scheduler_of_file
from lorashrink.train.flags.options import Options
from lorashrink.train.model import loading as model_module
from lorashrink.train.model.loading import (
    Encoded,
    Model,
    encode,
    encode_pixels,
    load_model,
    set_checkpointing,
    token_count,
    tokenize,
    weight_dtype,
)

CPU = torch.device("cpu")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def single(folder):
    return tiny_single_file.write_single_file(folder, folder.parent / "single.safetensors")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(Options(pretrained_model_name_or_path=str(folder)), CPU)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(base, **options) -> Model:
    return load_model(Options(pretrained_model_name_or_path=str(base), **options), CPU)


def states(model):
    return [module.state_dict() for module in model.modules]


def assert_same_weights(first, second):
    for ours, theirs in zip(states(first), states(second), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def change_tensors(path, change):
    tensors = load_file(path)
    save_file(change(tensors), path, {"format": "pt"})


def change_settings(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- folders and files --------------------------------------------------------------------------


def test_a_folder_gives_the_weights_that_lie_in_it(folder):
    model = load(f"{folder}/")
    for part, module in (("unet", model.unet), ("vae", model.vae), ("text_encoder_2", model.encoders[1])):
        stored = load_file(next((folder / part).glob("*.safetensors")))
        state = module.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    assert model.tokenizers[1].pad_token_id == 0


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_single_file_gives_the_same_weights_as_the_folder(folder, loaded, tmp_path, ending):
    single = tiny_single_file.write_single_file(folder, tmp_path / f"single{ending}")
    assert_same_weights(load(single, model_config=str(folder)), loaded)


def test_the_packaged_settings_are_those_of_the_published_file():
    # Names and shapes of sd_xl_base_1.0; its two other tensors there take no part in training.
    settings = model_module.SETTINGS
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(settings / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(settings / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(settings / "text_encoder")),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(settings / "text_encoder_2")),
        }
    ours = tiny_single_file.single_file({name: part.state_dict() for name, part in parts.items()})
    starts = tuple(tiny_single_file.PREFIXES.values())
    published = {name: shape for name, shape in fixtures.shapes("base_sdxl_ldm").items() if name.startswith(starts)}
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        name: shape for name, shape in published.items() if not name.endswith(("position_ids", "logit_scale"))
    }
    assert parts["vae"].config.scaling_factor == model_module.LATENT_SCALE


def test_a_single_file_needs_only_packaged_settings_and_a_tokenizer(folder, single, loaded, tmp_path):
    settings = shutil.copytree(model_module.SETTINGS, tmp_path / "settings")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        change_settings(settings / part / "config.json", **json.loads((folder / part / "config.json").read_text()))
    assert_same_weights(load(single, model_config=str(settings), tokenizer_cache_dir=str(folder)), loaded)


def test_old_folders_whose_first_encoder_has_the_level_text_model_load_too(copy, loaded):
    change_tensors(
        copy / "text_encoder/model.safetensors",
        lambda tensors: {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()},
    )
    assert_same_weights(load(copy), loaded)


def test_the_fp16_files_are_taken_where_fp16_is_asked_for(copy, loaded):
    tensors = load_file(copy / UNET_FILE)
    half = {name: torch.zeros_like(tensor).half() for name, tensor in tensors.items()}
    save_file(half, copy / "unet/diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    chosen = load(copy, mixed_precision="fp16", no_half_vae=True)
    assert not any(tensor.any() for tensor in chosen.unet.state_dict().values())
    assert chosen.vae.dtype == torch.float32
    assert_same_weights(load(copy), loaded)
    (copy / UNET_FILE).unlink()
    assert not any(tensor.any() for tensor in load(copy, mixed_precision="bf16").unet.state_dict().values())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_weights_have_the_asked_dtype_and_are_frozen(folder, precision, dtype):
    options = Options(mixed_precision=precision)
    assert weight_dtype(options) == dtype
    for no_half_vae in (False, True):
        model = load(folder, mixed_precision=precision, no_half_vae=no_half_vae)
        assert model.vae.dtype == (torch.float32 if no_half_vae else dtype)
        assert {part.dtype for part in (model.unet, *model.encoders)} == {dtype}
        assert not any(weight.requires_grad for part in model.modules for weight in part.parameters())
        assert not any(part.training for part in model.modules)


def test_a_single_file_rounds_its_vae_only_where_that_is_wanted(folder, single, loaded):
    model = load(single, model_config=str(folder), mixed_precision="fp16", no_half_vae=True)
    assert torch.equal(model.vae.encoder.conv_in.weight, loaded.vae.encoder.conv_in.weight)
    assert torch.equal(model.unet.conv_in.weight, loaded.unet.conv_in.weight.half())


def test_only_lowram_puts_weights_on_the_device(folder):
    for lowram in (False, True):
        options = Options(pretrained_model_name_or_path=str(folder), lowram=lowram)
        model = load_model(options, torch.device("meta"))
        assert {weight.is_meta for part in model.modules for weight in part.parameters()} == {lowram}


@pytest.mark.parametrize("kind", ["folder", "model folder", "ldm.safetensors", "ldm.pt", "diffusers.safetensors"])
def test_another_vae_takes_the_place_of_the_base_s(folder, loaded, tmp_path, kind):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        for weight in vae.parameters():
            weight.mul_(2)
    path = tmp_path / kind
    if kind.endswith("folder"):
        vae.save_pretrained(path / "vae" if kind == "model folder" else path)
    elif kind.startswith("ldm"):
        tiny_single_file.write_tensors(tiny_single_file.ldm_vae(vae.state_dict()), path)
    else:
        tiny_single_file.write_tensors(vae.state_dict(), path)
    model = load(folder, vae=str(path))
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in model.vae.state_dict().items())
    assert torch.equal(model.unet.conv_in.weight, loaded.unet.conv_in.weight)


def test_a_file_without_a_vae_trains_with_another(folder, single, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(single).items() if not name.startswith("first_stage_model.")}
    without = tiny_single_file.write_tensors(tensors, tmp_path / "without.safetensors")
    with pytest.raises(InputError, match="holds no vae; --vae can give another one"):
        load(without, model_config=str(folder))
    model = load(without, model_config=str(folder), vae=str(folder))
    assert model.vae.config.latent_channels == 4


# --- tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ".",
        "tokenizer",
        "openai_clip-vit-large-patch14",
        "models--openai--clip-vit-large-patch14/snapshots/1a2b",
    ],
    ids=["itself", "model folder", "sd-scripts", "hub"],
)
def test_the_tokenizer_of_a_single_file_comes_from_a_cache_folder(single, copy, tmp_path, path):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UsageError, match=r"no tokenizer in .*--tokenizer_cache_dir"):
        load(single, model_config=str(copy))
    tiny_sdxl.write_tokenizer(tmp_path / "cache" / path, tiny_sdxl.EOS)
    model = load(single, model_config=str(copy), tokenizer_cache_dir=str(tmp_path / "cache"))
    assert [tokenizer.pad_token_id for tokenizer in model.tokenizers] == [513, 0]
    assert tokenize(model.tokenizers[1], ["a"], None)[0, 0, :4].tolist() == [512, 320, 513, 0]


def test_an_exclamation_mark_is_a_word_in_both_tokenizers(loaded):
    # 256 is "!" at the end of a word; the published tokenizer_2 alone would make it 0, its padding.
    for tokenizer in loaded.tokenizers:
        assert tokenize(tokenizer, ["a!"], None)[0, 0, :4].tolist() == [512, 320, 256, 513]


def test_a_tokenizer_of_another_model_is_refused(folder, copy):
    vocabulary = json.loads((copy / "tokenizer/vocab.json").read_text())
    (copy / "tokenizer/vocab.json").write_text(json.dumps(vocabulary | {"more</w>": len(vocabulary)}))
    (copy / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(InputError, match="know fewer than the 515 words"):
        load(copy)


# --- what cannot be trained on ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-xl-base-1.0", "/no/such/folder", "nowhere.safetensors"])
def test_nothing_is_ever_downloaded(name):
    with pytest.raises(LorashrinkError, match=name):
        load(name)


@pytest.mark.parametrize(
    ("layout", "title"),
    [("sd15 folder", "SD 1.x"), ("sd15 file", "SD 1.x"), ("sd2 folder", "SD 2.x")],
)
def test_other_families_are_named(tmp_path, layout, title):
    with pytest.raises(NotABase, match=f"this is {title}, and lorashrink trains on SDXL only"):
        load(fixtures.write_base(tmp_path, layout))


@pytest.mark.parametrize("adapter", ["sdxl_locon_kohya", "sdxl_lora_diffusers_peft"])
def test_an_adapter_is_no_base(tmp_path, adapter):
    with pytest.raises(NotABase, match="this is an adapter, not a base"):
        load(fixtures.write_adapter(tmp_path, adapter))


def test_a_unet_alone_is_no_base(tmp_path):
    path = fixtures.write_base(tmp_path, "sdxl UNet in diffusers names")
    with pytest.raises(InputError, match="holds no unet and no text_encoder and no text_encoder_2 and no vae"):
        load(path)


def test_a_text_file_is_no_base(tmp_path):
    path = tmp_path / "model.txt"
    path.write_text("a model")
    with pytest.raises(NotABase, match=r"Give a diffusers folder, \.safetensors or \.ckpt"):
        load(path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_without_one_of_its_parts_is_refused(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(InputError, match=r"holds no |SDXL"):
        load(copy)


@pytest.mark.parametrize(
    "file", [UNET_FILE, "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"]
)
def test_a_file_that_was_cut_short_is_refused(copy, file):
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut short|damaged"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET_FILE, "conv_out.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight"),
        ("text_encoder/model.safetensors", "final_layer_norm.weight"),
        ("text_encoder_2/model.safetensors", "text_projection.weight"),
    ],
)
def test_no_tensor_of_a_folder_is_left_at_random(copy, file, name):
    change_tensors(copy / file, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InputError, match=f"its {Path(file).parent} lacks 1 tensors, such as {name}"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "model.diffusion_model.out.2.bias"),
        ("vae", "first_stage_model.encoder.conv_in.weight"),
        ("text_encoder", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"),
        ("text_encoder_2", "conditioner.embedders.1.model.ln_final.bias"),
    ],
)
def test_no_tensor_of_a_single_file_is_left_at_random(folder, single, tmp_path, part, name):
    tensors = {key: value for key, value in load_file(single).items() if key != name}
    path = tiny_single_file.write_tensors(tensors, tmp_path / "incomplete.safetensors")
    with pytest.raises(InputError, match=f"(its {part})? lacks (1 )?tensors"):
        load(path, model_config=str(folder))


def test_a_file_of_other_sizes_than_its_settings_is_refused(folder, single):
    with pytest.raises(InputError, match=r"cannot load it.*--model_config"):
        load(single, tokenizer_cache_dir=str(folder))


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("code-was-run"),))


@pytest.mark.parametrize("flag", ["base", "vae"])
def test_a_checkpoint_runs_no_code(folder, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    trap = tmp_path / "trap.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "callbacks": Trap()}, trap, pickle_module=pickle)
    with pytest.raises(DamagedFile, match="could run code"):
        load(trap) if flag == "base" else load(folder, vae=str(trap))
    assert not (tmp_path / "code-was-run").exists()


def test_a_folder_that_predicts_v_is_not_trained_as_noise(copy):
    (copy / "scheduler").mkdir(exist_ok=True)
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="predicts v and not noise; add --v_parameterization and --zero_terminal_snr"):
        load(copy)
    assert load(copy, v_parameterization=True).unet is not None


def test_a_single_file_that_predicts_v_is_not_trained_as_noise(folder, single, tmp_path):
    path = tmp_path / "v.safetensors"
    save_file({**load_file(single), "v_pred": torch.zeros(0)}, path)
    more = {"model_config": str(folder), "tokenizer_cache_dir": str(folder)}
    with pytest.raises(UsageError, match=r"predicts v and not noise; add --v_parameterization\."):
        load(path, **more)
    assert load(path, **more, v_parameterization=True).unet is not None


def test_a_single_file_may_state_its_prediction_in_its_metadata(folder, single, tmp_path, caplog):
    path = tmp_path / "v.safetensors"
    more = {"model_config": str(folder), "tokenizer_cache_dir": str(folder)}
    save_file(load_file(single), path, {"modelspec.prediction_type": "v"})
    with pytest.raises(UsageError, match=r"predicts v and not noise; add --v_parameterization\."):
        load(path, **more)
    assert scheduler_of_file(path).config.prediction_type == "v_prediction"
    save_file(load_file(single), path, {"modelspec.prediction_type": "epsilon"})
    load(path, **more, v_parameterization=True)
    assert "predicts noise" in caplog.text


@pytest.mark.parametrize(
    ("config", "words"),
    [({"prediction_type": "sample"}, "predicts 'sample'"), ([], "cannot be read"), ("{", "cannot be read")],
)
def test_settings_of_another_prediction_are_refused(copy, config, words):
    (copy / "scheduler").mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (copy / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises((InputError, UsageError), match=words):
        load(copy)


def test_training_v_on_a_base_of_noise_is_a_warning(copy, caplog):
    (copy / "scheduler").mkdir(exist_ok=True)
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    load(copy, v_parameterization=True)
    assert "predicts noise" in caplog.text


def test_a_model_for_inpainting_is_refused(copy):
    settings = UNet2DConditionModel.load_config(copy / "unet") | {"in_channels": 9}
    UNet2DConditionModel.from_config(settings).save_pretrained(copy / "unet")
    with pytest.raises(InputError, match="takes 9 channels, and its VAE makes 4"):
        load(copy)


def test_parts_of_different_models_are_refused(copy):
    settings = CLIPTextConfig.from_pretrained(copy / "text_encoder")
    settings.hidden_size = 20
    CLIPTextModel(settings).save_pretrained(copy / "text_encoder")
    with pytest.raises(InputError, match=r"takes text of width 40, and its text encoders make 20 \+ 24"):
        load(copy)


def test_quiet_libraries_say_nothing_while_a_model_is_loaded(folder, single, capfd):
    libraries = (transformers.utils.logging, diffusers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        quiet_libraries()
        load(folder)
        load(single, model_config=str(folder))
        assert capfd.readouterr() == ("", "")
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()


# --- setting up ---------------------------------------------------------------------------------


def noisy_input():
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([7, 600]),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 24, generator=generator),
            "time_ids": torch.full((2, 6), 64.0),
        },
    }


def test_gradient_checkpointing_leaves_the_gradients_as_they_are(folder):
    gradients = []
    for enabled in (False, True):
        model = load(folder)
        set_checkpointing(model, Options(gradient_checkpointing=enabled))
        trained = [
            model.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight,
            model.unet.up_blocks[0].resnets[1].conv1.weight,
            *(encoder.get_input_embeddings().weight for encoder in model.encoders),
        ]
        for weight in trained:
            weight.requires_grad_(True)
        tokens = [tokenize(tokenizer, ["a cat", "a dog, blue"], None) for tokenizer in model.tokenizers]
        text = encode(model.encoders, *tokens)
        model.unet(**noisy_input(), encoder_hidden_states=text.context).sample.square().mean().backward()
        gradients.append([weight.grad for weight in trained])
        checkpointed = [
            any(getattr(module, "gradient_checkpointing", False) for module in part.modules()) for part in model.modules
        ]
        assert checkpointed == [enabled, False, enabled, enabled]
        assert [part.training for part in model.modules] == [enabled, False, enabled, enabled]
    for without, with_checkpoints in zip(*gradients, strict=True):
        assert without.abs().max() > 0
        assert torch.equal(without, with_checkpoints)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_picture_draws_its_latents_with_its_own_generator(folder, precision):
    vae = load(folder, mixed_precision=precision).vae
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_pixels(vae, pixels, [torch.Generator().manual_seed(seed) for seed in (5, 6)])
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 4), torch.float32)
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    for path, seed in enumerate((5, 6)):
        noise = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(latents[path], posterior.mean[path].float() + posterior.std[path].float() * noise)


# --- text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts():
    return ["a cat, sitting", "", "x" * 75, "more than seventy-five letters, which are the words here, " * 3]


def encode_captions(model, captions, limit=None):
    with torch.no_grad():
        return encode(model.encoders, *(tokenize(tokenizer, captions, limit) for tokenizer in model.tokenizers))


def test_text_is_encoded_as_diffusers_encodes_it(folder, loaded, prompts):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(prompts, device=CPU, do_classifier_free_guidance=False)
    ours = encode_captions(loaded, prompts)
    assert torch.equal(ours.context, context)
    assert torch.equal(ours.pooled, pooled)


@pytest.mark.parametrize("number", [2, 7])
def test_the_pooled_vector_is_taken_at_the_first_eos(copy, loaded, prompts, number):
    # 2 is what the published settings of the second encoder say; its EOS is 49407.
    change_settings(copy / "text_encoder_2/config.json", eos_token_id=number)
    ours = encode_captions(load(copy), prompts)
    assert torch.equal(ours.pooled, encode_captions(loaded, prompts).pooled)
    tokens = tokenize(loaded.tokenizers[1], prompts, None)[:, 0]
    with torch.no_grad():
        last = loaded.encoders[1](tokens).last_hidden_state
        first_eos = [row.index(513) for row in tokens.tolist()]
        expected = loaded.encoders[1].text_projection(last[range(4), first_eos])
    assert torch.allclose(ours.pooled, expected, atol=1e-6)


B, E = 512, 513

# sd-scripts' layout for 150 tokens: text tokens in each chunk, and what follows the first EOS (P is the padding).
LAYOUTS = {
    0: (0, 0),
    74: (74, 0),
    75: (75, 0),
    76: (75, 1),
    149: (75, 74),
    150: (75, 75),
    200: (75, 75),
}


@pytest.mark.parametrize("length", LAYOUTS)
@pytest.mark.parametrize(("number", "pad"), [(0, E), (1, 0)])
def test_long_captions_are_cut_into_chunks(loaded, number, pad, length):
    tokenizer = loaded.tokenizers[number]
    words = tokenizer("x" * length, add_special_tokens=False).input_ids
    rows = []
    for path, count in enumerate(LAYOUTS[length]):
        part = words[75 * path : 75 * path + count]
        rows.append([B, *part, E, *[pad] * (75 - count)])
    assert tokenize(tokenizer, ["x" * length], 150)[0].tolist() == rows


@pytest.mark.parametrize(("limit", "chunks"), [(None, 1), (150, 2), (225, 3)])
def test_every_length_of_caption_has_its_number_of_chunks(loaded, limit, chunks):
    for tokenizer in loaded.tokenizers:
        tokens = tokenize(tokenizer, ["x" * 300, "short"], limit)
        assert (tokens.shape, tokens.dtype) == ((2, chunks, 77), torch.int64)
        assert (tokens[..., 0] == B).all()
        assert (tokens[0, :, -1] == E).all()
    assert encode_captions(loaded, ["x" * 300], limit).context.shape == (1, 75 * chunks + 2, 40)


def test_the_padding_word_is_treated_as_in_sd_scripts(loaded):
    # "!!" is the word 0, which pads the second tokenizer, and the word 256, its form at the end of a word.
    at_end, at_start = tokenize(loaded.tokenizers[1], ["x" * 74 + "!!", "x" * 75 + "!!"], 150)
    assert at_end[0, -2:].tolist() == [0, 0]
    assert at_end[1, :4].tolist() == [B, 256, E, 0]
    assert at_start[0, -1] == E
    assert at_start[1, :4].tolist() == [B, E, 256, E]


def test_hidden_states_of_chunks_are_joined_to_one_row_of_positions(loaded):
    captions = ["x" * 100, "y" * 160]
    tokens = [tokenize(tokenizer, captions, 225) for tokenizer in loaded.tokenizers]
    ours = encode_captions(loaded, captions, 225)
    assert ours.context.shape == (2, 227, 40)
    for encoder, ids, hidden in zip(loaded.encoders, tokens, (ours.hidden1, ours.hidden2), strict=True):
        for caption in range(2):
            with torch.no_grad():
                chunks = [encoder(ids[caption, k, None], output_hidden_states=True) for k in range(3)]
            states = [chunk.hidden_states[-2][0] for chunk in chunks]
            expected = torch.cat([states[0][:76], states[1][1:76], states[2][1:77]])
            assert torch.allclose(hidden[caption], expected, atol=1e-6)
            if encoder is loaded.encoders[1]:
                assert torch.allclose(ours.pooled[caption], chunks[0].text_embeds[0], atol=1e-6)


def test_encoded_text_changes_device_and_dtype_as_a_whole(loaded):
    text = encode_captions(loaded, ["a cat"])
    moved = text.to("cpu", torch.bfloat16)
    assert isinstance(moved, Encoded)
    assert {tensor.dtype for tensor in (moved.hidden1, moved.hidden2, moved.pooled)} == {torch.bfloat16}
    assert torch.equal(moved.context, text.context.bfloat16())


def test_tokens_are_counted_without_marks_and_without_an_end(loaded):
    tokenizer = loaded.tokenizers[0]
    assert [token_count(tokenizer, text) for text in ("", "abc", "x" * 300)] == [0, 3, 300]
