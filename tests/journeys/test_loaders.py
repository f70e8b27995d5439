"""Programs load what was shrunk or renamed, at the right strength.

diffusers, PEFT and LyCORIS run themselves, with small models of random weights; of ComfyUI only its rules are checked.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import fixtures
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    ZImagePipeline,
)
from loaders import (
    CHANGED,
    SAME,
    added,
    components,
    differences,
    diffusers_file,
    diffusers_name,
    factors,
    folder,
    kohya,
    layers_of,
    ldm_name,
    loaded,
    merged,
    outputs,
    pipe,
    text_config,
)
from lycoris import create_lycoris, create_lycoris_from_weights
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.adapters import open_adapter
from lorashrink.making.conversion import convert
from lorashrink.shrinking.run import resize

__all__ = ["folder", "pipe"]  # fixtures

MAKERS = {
    "kohya, LDM names": functools.partial(kohya, unet_name=ldm_name),
    "kohya, diffusers names": functools.partial(kohya, unet_name=diffusers_name),
    "diffusers": diffusers_file,
    "diffusers, with text_model": functools.partial(diffusers_file, text_model=True),
}


@dataclass
class Original:
    path: Path
    layers: int  # on which diffusers puts the adapter
    outputs: dict[str, torch.Tensor]  # with the adapter
    bare: dict[str, torch.Tensor]  # without


@pytest.fixture(scope="module", params=MAKERS)
def original(request, pipe, tmp_path_factory):
    path = MAKERS[request.param](pipe, tmp_path_factory.mktemp("adapter") / "lora.safetensors")
    bare = outputs(pipe)
    return Original(path, *reversed(loaded(pipe, path)), bare)


def shrink(path, folder, recipe, output):
    report = resize(path, base=folder, recipes=recipe, dtype="fp32", output=output, jobs=2)
    assert report.failed == ()
    (result,) = report.results
    assert (result.verbatim, result.removed) == ((), ())
    return output, result


def test_diffusers_adds_the_same_deltas(pipe, folder, original):
    with open_adapter(original.path) as adapter:
        assert len(adapter) == original.layers > 100
    assert min(differences(original.outputs, original.bare).values()) > CHANGED
    with merged(pipe, folder, original.path):
        assert max(differences(outputs(pipe), original.outputs).values()) < SAME
    assert max(differences(outputs(pipe), original.bare).values()) == 0


def test_a_lossless_result_makes_the_same_outputs(pipe, folder, original, tmp_path):
    output, result = shrink(original.path, folder, "energy=1", tmp_path / "out.safetensors")
    assert result.relative_error < 1e-5
    actual, layers = loaded(pipe, output)
    assert layers == original.layers
    assert max(differences(actual, original.outputs).values()) < SAME
    assert min(differences(actual, original.bare).values()) > CHANGED


@pytest.mark.parametrize("recipe", ["rank=2", "energy=0.9"])
def test_a_truncated_result_is_loaded_at_its_strength(pipe, folder, original, tmp_path, recipe):
    output, result = shrink(original.path, folder, recipe, tmp_path / "out.safetensors")
    ranks = {layer.rank_after for layer in result.layers}
    assert ranks == {2} if recipe == "rank=2" else len(ranks) > 2
    actual, layers = loaded(pipe, output)
    assert layers == original.layers
    assert min(differences(actual, original.outputs).values()) > 10 * SAME
    with merged(pipe, folder, output):
        assert max(differences(actual, outputs(pipe)).values()) < SAME


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_renamed_adapter_makes_the_same_outputs(pipe, folder, original, tmp_path, naming):
    (result,) = convert(original.path, base=folder, naming=naming, output=tmp_path).results
    assert result.kept == ()
    actual, layers = loaded(pipe, result.output)
    assert layers == original.layers
    assert max(differences(actual, original.outputs).values()) < SAME


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_an_adapter_is_shrunk_and_renamed_at_once(pipe, folder, original, tmp_path, naming):
    report = resize(original.path, base=folder, recipes="rank=2", naming=naming, dtype="fp32", output=tmp_path)
    (result,) = report.results
    actual, layers = loaded(pipe, result.output)
    assert layers == original.layers
    assert min(differences(actual, original.outputs).values()) > 10 * SAME
    with merged(pipe, folder, result.output):
        assert max(differences(actual, outputs(pipe)).values()) < SAME


# --- SD 1.5, SD 3 and FLUX ----------------------------------------------------------------------


def small_sd15():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel(text_config(8, 2)),
        tokenizer=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small_sd3():
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModelWithProjection(text_config(8, 2)),
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, 3)),
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def small_flux():
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModel(text_config(8, 2)),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def in_blocks_without_linear1(name):
    """What diffusers reads of a kohya file for FLUX: no outer layers, and `linear1` in its real width alone."""
    split = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    return (
        not name.startswith("single_") or not name.endswith(split) if "transformer_blocks" in name else "layers" in name
    )


# pipeline, namings that diffusers reads for it, and which layers it reads in kohya's
PIPELINES = {
    "sd15": (small_sd15, ("kohya", "diffusers"), lambda name: True),
    "sd3": (small_sd3, ("diffusers",), lambda name: True),
    "flux": (small_flux, ("diffusers",), lambda name: True),
    "flux for kohya": (small_flux, ("kohya", "diffusers"), in_blocks_without_linear1),
}


@dataclass
class Small:
    pipe: object
    folder: Path
    path: Path  # of an adapter in diffusers' names
    bare: dict[str, torch.Tensor]  # outputs without it
    outputs: dict[str, torch.Tensor]  # and with it, by adding to the weights
    namings: tuple[str, ...]


def trained(pipe, choose):
    """(component, module) -> factors. Ranks differ, but not among the attentions of a UNet.

    diffusers 0.42 gives all of these the most frequent alpha of a kohya file.
    """
    generator = torch.Generator().manual_seed(5)
    by_module = {}
    for component in components(pipe):
        for number, (name, module) in enumerate(layers_of(getattr(pipe, component)).items()):
            if choose(name):
                lower = number % 4 == 0 if component == "transformer" else isinstance(module, nn.Conv2d)
                decay, rank = (0.3, 0.6, 0.9)[number % 3], 3 if lower else 5
                by_module[component, name] = factors(module.weight, rank, decay, generator)
    return by_module


@pytest.fixture(scope="module", params=PIPELINES)
def small(request, tmp_path_factory):
    make, namings, choose = PIPELINES[request.param]
    torch.manual_seed(0)
    pipe, directory = make(), tmp_path_factory.mktemp("small")
    for name in components(pipe):
        getattr(pipe, name).save_pretrained(directory / "base" / name)
    layers, tensors = trained(pipe, choose), {}
    for (component, name), (up, down) in layers.items():
        level = "" if component in ("unet", "transformer") or name.startswith("text_model.") else "text_model."
        tensors |= {f"{component}.{level}{name}.lora_B.weight": up, f"{component}.{level}{name}.lora_A.weight": down}
    path = fixtures.write_tensors(directory / "lora.safetensors", tensors)
    bare, states = outputs(pipe), {name: getattr(pipe, name).state_dict() for name in components(pipe)}
    with added(states):
        for (component, name), (up, down) in layers.items():
            weight = states[component][f"{name}.weight"]
            weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        expected = outputs(pipe)
    return Small(pipe, directory / "base", path, bare, expected, namings)


def test_diffusers_loads_the_adapter_of_a_small_pipeline(small):
    actual, _ = loaded(small.pipe, small.path)
    assert min(differences(small.outputs, small.bare).values()) > CHANGED
    assert max(differences(actual, small.outputs).values()) < SAME
    assert max(differences(outputs(small.pipe), small.bare).values()) == 0


def test_the_same_weights_are_found_as_by_diffusers(small):
    with merged(small.pipe, small.folder, small.path):
        assert max(differences(outputs(small.pipe), small.outputs).values()) < SAME


def test_diffusers_reads_every_naming_that_it_knows(small, tmp_path):
    for naming in small.namings:
        (result,) = convert(small.path, base=small.folder, naming=naming, output=tmp_path).results
        assert result.exact
        assert result.kept == ()
        actual, _ = loaded(small.pipe, result.output)
        assert max(differences(actual, small.outputs).values()) < SAME, naming


def test_comfys_names_mean_the_same_weights(small, tmp_path):
    (result,) = convert(small.path, base=small.folder, naming="comfy", output=tmp_path).results
    assert all(key.startswith(("diffusion_model.", "text_encoders.clip_")) for key in load_file(result.output))
    with merged(small.pipe, small.folder, result.output):
        assert max(differences(outputs(small.pipe), small.outputs).values()) < SAME


@pytest.mark.parametrize("recipe", ["energy=1", "energy=0.9", "rank=2"])
def test_a_shrunk_adapter_is_loaded_at_its_strength(small, tmp_path, recipe):
    for naming in (None, *small.namings):
        report = resize(
            small.path, base=small.folder, recipes=recipe, naming=naming, dtype="fp32", output=tmp_path / f"{naming}"
        )
        (result,) = report.results
        actual, _ = loaded(small.pipe, result.output)
        if recipe == "energy=1":
            assert max(differences(actual, small.outputs).values()) < SAME
        else:
            assert max(differences(actual, small.outputs).values()) > SAME
        with merged(small.pipe, small.folder, result.output):
            assert max(differences(actual, outputs(small.pipe)).values()) < SAME, naming


def test_peft_loads_a_folder_for_the_transformer_of_a_pipeline(tmp_path):
    torch.manual_seed(0)
    pipe = small_flux()
    pipe.transformer.save_pretrained(tmp_path / "base" / "transformer")
    pipe.text_encoder = None
    layers = trained(pipe, lambda name: True)
    source = fixtures.write_tensors(
        tmp_path / "lora.safetensors",
        {
            f"transformer.{name}.lora_{letter}.weight": factor
            for (_, name), pair in layers.items()
            for letter, factor in zip("BA", pair, strict=True)
        },
    )
    bare = outputs(pipe)
    with merged(pipe, tmp_path / "base", source):
        expected = outputs(pipe)
    assert differences(expected, bare)["transformer"] > CHANGED
    (flattened,) = convert(source, base=tmp_path / "base", naming="kohya", output=tmp_path).results
    for path in (source, flattened.output):
        (folder,) = convert(path, base=tmp_path / "base", naming="peft", output=tmp_path / "peft", force=True).results
        small = resize(folder.output, recipes="energy=1", dtype="fp32", output=tmp_path / "shrunk", force=True)
        for output in (folder.output, small.results[0].output):
            fresh = FluxTransformer2DModel.from_pretrained(tmp_path / "base" / "transformer")
            pipe.transformer = PeftModel.from_pretrained(fresh, output)
            assert differences(outputs(pipe), expected)["transformer"] < SAME


# --- how diffusers itself renames ---------------------------------------------------------------


def first_blocks(name, *, blocks=r"(?:blocks|layers)[._][01][._]"):
    """A listed adapter's first blocks."""
    return {key: shape for key, shape in fixtures.shapes(name).items() if re.search(blocks, key) and "text" not in key}


def with_rank(shapes, rank):
    """In full width, but of a low rank: the side that is the rank is the shortest one."""
    return {
        key: tuple(rank if side == min(shape[:2]) else side for side in shape) if shape else ()
        for key, shape in shapes.items()
    }


# adapter -> (pipeline, base in native names, base in diffusers' names, namings to read)
RENAMED = {
    "flux_lora_kohya": (FluxPipeline, "flux_dev_comfy_full", "flux_dev_diffusers", ["kohya"]),
    "flux_lora_diffusers": (FluxPipeline, "flux_dev_comfy_full", "flux_dev_diffusers", ["kohya"]),
    "flux_lora_diffusers_no_proj_mlp": (FluxPipeline, "flux_dev_comfy_full", "flux_dev_diffusers", ["kohya"]),
    "flux_lora_aitoolkit_bfl": (FluxPipeline, "flux_dev_comfy_full", "flux_dev_diffusers", ["kohya"]),
    "flux_lora_xlabs": (FluxPipeline, "flux_dev_comfy_full", "flux_dev_diffusers", [None, "kohya"]),
    "wan21_1_3b_lora_comfy": (WanPipeline, "wan21_1_3b_native", "wan21_1_3b_diffusers", [None, "kohya", "comfy"]),
    "wan21_1_3b_lora_musubi": (WanPipeline, "wan21_1_3b_native", "wan21_1_3b_diffusers", [None, "kohya", "comfy"]),
    "qwen_image_lora_musubi": (
        QwenImagePipeline,
        "qwen_image_native",
        "qwen_image_diffusers",
        [None, "kohya", "comfy"],
    ),
    "qwen_image_lora_diffusers": (
        QwenImagePipeline,
        "qwen_image_native",
        "qwen_image_diffusers",
        [None, "kohya", "comfy"],
    ),
    "z_image_lora_aitoolkit": (ZImagePipeline, "z_image_diffusers", "z_image_diffusers", [None, "kohya"]),
}


def read_by(pipeline, path, probe):
    """Module -> ΔW times a fixed matrix, as this pipeline reads the file."""
    state = pipeline.lora_state_dict(str(path))
    return {
        key.removesuffix(".lora_A.weight"): state[key.replace("lora_A", "lora_B")] @ (down @ probe(down.shape[1]))
        for key, down in state.items()
        if key.endswith(".lora_A.weight")
    }


@pytest.mark.parametrize("name", RENAMED)
def test_diffusers_renames_to_the_same(tmp_path, name):
    """diffusers, which expects FLUX in full width, reads the same ΔW."""
    pipeline, native, theirs, namings = RENAMED[name]
    generator = torch.Generator().manual_seed(3)
    probe = functools.cache(lambda width: torch.randn(width, 2, generator=generator))
    shapes = with_rank(first_blocks(name), 4)
    tensors = {
        key: torch.randn(shape, generator=generator) if shape else torch.tensor(2.5) for key, shape in shapes.items()
    }
    source = fixtures.write_tensors(tmp_path / "lora.safetensors", tensors)
    files = {
        base: fixtures.write_header(tmp_path / f"{base}.safetensors", fixtures.shapes(f"base_{base}"))
        for base in (native, theirs)
    }
    results = {}
    for base, file in files.items():
        (result,) = convert(source, base=file, naming="diffusers", output=tmp_path / base).results
        assert result.kept == ()
        results[base] = read_by(pipeline, result.output, probe)
    expected = results[native]
    assert len(expected) >= 8
    for naming in namings:
        path = source
        if naming:
            (result,) = convert(source, base=files[native], naming=naming, output=tmp_path / naming).results
            path = result.output
        results[naming] = read_by(pipeline, path, probe)
    for read in results.values():
        assert {key: value for key, value in read.items() if value.any()}.keys() == expected.keys()
        assert all((read[key] - value).norm() <= 1e-4 * value.norm() for key, value in expected.items())


# --- LyCORIS ------------------------------------------------------------------------------------


class Model(nn.Module):
    """Linear layers, among them one whose sides differ much, and convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 16, 3, padding=1, bias=False)  # LyCORIS reads no bias beside a LoRA
        self.point = nn.Conv2d(16, 24, 1, bias=False)
        self.attn_q = nn.Linear(24, 24, bias=False)
        self.mlp = nn.Sequential(nn.Linear(24, 96, bias=False), nn.Tanh(), nn.Linear(96, 24, bias=False))

    def forward(self, x):
        x = torch.tanh(self.point(torch.tanh(self.first(x)))).flatten(2).mT
        return self.mlp(torch.tanh(self.attn_q(x)))


NETWORKS = {
    "locon": {"algo": "locon"},
    "loha": {"algo": "loha"},
    "loha with a core": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr in two factors": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
}


@torch.no_grad()
def lycoris_output(path=None):
    """What the model makes of a picture with the network of a file, in the forward pass that training uses."""
    model = Model()
    if path is not None:
        network, _ = create_lycoris_from_weights(1.0, str(path), model)
        assert len(network.loras) == 5
        network.apply_to()
    return model(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module", params=NETWORKS)
def network_file(request, tmp_path_factory):
    """A file as LyCORIS saves a network whose alpha is not its rank, and that is not at its start."""
    model, directory = Model(), tmp_path_factory.mktemp("lycoris")
    network = create_lycoris(
        model, 1.0, linear_dim=3, linear_alpha=2, conv_dim=2, conv_alpha=3, **NETWORKS[request.param]
    )
    network.apply_to()
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    network.save_weights(str(directory / "network.safetensors"), torch.float32, {"ss_network_dim": "3"})
    return directory / "network.safetensors"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return fixtures.write_tensors(tmp_path_factory.mktemp("model") / "model.safetensors", Model().state_dict())


@pytest.mark.parametrize("form", ["auto", "same", "lora"])
def test_lycoris_reads_a_lossless_result_as_before(network_file, model_file, tmp_path, form):
    report = resize(network_file, base=model_file, recipes="energy=1", form=form, dtype="fp32", output=tmp_path)
    (result,) = report.results
    before, after = lycoris_output(network_file), lycoris_output(result.output)
    assert float((before - lycoris_output()).norm() / before.norm()) > CHANGED
    assert float((after - before).abs().max()) < 1e-4
    if form == "lora":
        assert all(key.endswith((".lora_up.weight", ".lora_down.weight", ".alpha")) for key in load_file(result.output))


@pytest.mark.parametrize("form", ["auto", "lora"])
@pytest.mark.parametrize("recipe", ["rank=2", "energy=0.8"])
def test_lycoris_reads_a_truncated_result_at_its_strength(network_file, model_file, tmp_path, form, recipe):
    report = resize(network_file, base=model_file, recipes=recipe, form=form, dtype="fp32", output=tmp_path)
    (result,) = report.results
    model = Model()
    with open_adapter(result.output) as adapter, torch.no_grad():
        for layer in adapter:
            name = next(name for name, _ in model.named_modules() if f"lycoris_{name}".replace(".", "_") == layer.name)
            weight = model.get_submodule(name).weight
            weight += layer.delta.dense().reshape(weight.shape)
        expected = model(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert float((lycoris_output(result.output) - expected).abs().max()) < 1e-4


# --- ComfyUI ------------------------------------------------------------------------------------

# What stands behind the name of a module; of a group either all of the first part are there or none.
COMFY_FORMS = (
    (("lora_up.weight", "lora_down.weight"), ("alpha", "dora_scale", "lora_mid.weight")),
    (("lora_B.weight", "lora_A.weight"), ("alpha", "dora_scale")),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("alpha", "dora_scale", "hada_t1", "hada_t2")),
    (("lokr_w1", "lokr_w2"), ("alpha", "dora_scale")),
    (("lokr_w1", "lokr_w2_a", "lokr_w2_b"), ("alpha", "dora_scale", "lokr_t2")),
    (("lokr_w1_a", "lokr_w1_b", "lokr_w2"), ("alpha", "dora_scale")),
    (("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"), ("alpha", "dora_scale", "lokr_t2")),
    (("diff",), ("diff_b",)),
    (("w_norm",), ("b_norm",)),
)
COMFY_ENCODER_LAYER = "text_model.encoder.layers.{}.{}"
COMFY_ENCODER_MODULES = (
    *(f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")),
    *(f"mlp.{name}" for name in ("fc1", "fc2")),
)


def comfy_names(native, diffusers, encoders, prefixes):
    """Every name of a module that ComfyUI looks for.

    Its denoiser has the native names, with dots behind `diffusion_model.` and without behind `lora_unet_`; those of
    diffusers are known for some families behind other prefixes. Text encoders have Hugging Face's names.
    """
    names = {f"diffusion_model.{name}" for name in native} | {f"lora_unet_{name.replace('.', '_')}" for name in native}
    for prefix in prefixes:
        names |= {prefix + (name.replace(".", "_") if prefix.endswith("_") else name) for name in diffusers}
    for name, (depth, numbers) in encoders.items():
        for module in (COMFY_ENCODER_LAYER.format(i, inner) for i in range(depth) for inner in COMFY_ENCODER_MODULES):
            names |= {f"lora_te{number}_{module.replace('.', '_')}" for number in numbers}
            names.add(f"text_encoders.{name}.transformer.{module}")
    return names


def modules_of(base, prefix=""):
    return {
        key.removeprefix(prefix).removesuffix(".weight")
        for key in fixtures.shapes(base)
        if key.startswith(prefix) and key.endswith(".weight")
    }


INSIDE = "model.diffusion_model."
# family -> (base in native names, its prefix, base in diffusers' names, encoders, prefixes of diffusers' names)
COMFY = {
    "sd15": (
        "base_sd15_ldm",
        INSIDE,
        "base_sd15_diffusers_unet",
        {"clip_l": (12, ("", 1))},
        ("lora_unet_", "lycoris_"),
    ),
    "sdxl": (
        "base_sdxl_ldm",
        INSIDE,
        "base_sdxl_diffusers_unet",
        {"clip_l": (12, ("", 1)), "clip_g": (32, (2,))},
        ("lora_unet_", "lycoris_"),
    ),
    "sd3": (
        "base_sd35_medium_native",
        INSIDE,
        "base_sd35_medium_diffusers",
        {"clip_l": (12, ("", 1)), "clip_g": (32, (2,))},
        ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"),
    ),
    "flux": (
        "base_flux_dev_comfy_full",
        INSIDE,
        "base_flux_dev_diffusers",
        {"clip_l": (12, ("", 1))},
        ("transformer.", "lora_transformer_", "lycoris_"),
    ),
    "wan": ("base_wan21_1_3b_native", "", "base_wan21_1_3b_diffusers", {}, ()),
}
FOR_COMFY = {
    "sd15_lora_kohya": "sd15",
    "sd15_lora_diffusers_processor": "sd15",
    "sd15_loha_tucker_kohya": "sd15",
    "sd15_lokr_both_kohya": "sd15",
    "sd15_lokr_unbalanced_kohya": "sd15",
    "sdxl_lora_kohya_te1_te2": "sdxl",
    "sdxl_lora_diffusers_peft": "sdxl",
    "sdxl_locon_kohya": "sdxl",
    "sdxl_locon_tucker_kohya": "sdxl",
    "sdxl_dora_kohya_out": "sdxl",
    "sd35_medium_lora_kohya": "sd3",
    "sd35_medium_lora_diffusers": "sd3",
    "flux_lora_kohya_te1": "flux",
    "flux_lora_diffusers": "flux",
    "flux_lora_diffusers_no_proj_mlp": "flux",
    "flux_lora_aitoolkit_bfl": "flux",
    "flux_lora_xlabs": "flux",
    "wan21_1_3b_lora_comfy": "wan",
    "wan21_1_3b_lora_diffusers": "wan",
    "wan21_1_3b_lora_musubi": "wan",
    "wan21_1_3b_lora_fun_double_underscore": "wan",
}


def not_read_by_comfy(keys, names):
    """Keys that ComfyUI would pass over: those of modules it does not know, and of forms that it does not."""
    by_module = {}
    for key in keys:
        ending = next(
            (form for forms in COMFY_FORMS for part in forms for form in part if key.endswith(f".{form}")), ""
        )
        by_module.setdefault(key.removesuffix(f".{ending}"), []).append(ending)
    return {
        module: endings
        for module, endings in by_module.items()
        if module not in names
        or not any(set(needed) <= set(endings) <= {*needed, *more} for needed, more in COMFY_FORMS)
    }


@pytest.fixture(scope="module")
def comfy_base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comfy")

    @functools.cache
    def get(family):
        shapes = dict(fixtures.shapes(COMFY[family][0]))
        for name in COMFY[family][3] if family == "sd3" else ():
            if not any(key.startswith(f"text_encoders.{name}.") for key in shapes):
                encoder = fixtures.shapes(f"base_{name}_transformers")
                shapes |= {f"text_encoders.{name}.transformer.{key}": shape for key, shape in encoder.items()}
        return fixtures.write_header(directory / f"{family}.safetensors", shapes)

    return get


@pytest.mark.parametrize("naming", ["kohya", "comfy"])
@pytest.mark.parametrize("name", FOR_COMFY)
def test_comfy_finds_a_module_for_every_key(comfy_base, tmp_path, name, naming):
    family = FOR_COMFY[name]
    native, prefix, theirs, encoders, prefixes = COMFY[family]
    names = comfy_names(modules_of(native, prefix), modules_of(theirs), encoders, prefixes)
    shapes = {
        key: shape
        for key, shape in fixtures.shapes(name).items()
        if re.search(r"[._](?:[01]|mid_block|middle_block)[._]", key)
    }
    tensors = {key: torch.zeros(shape, dtype=torch.float8_e4m3fn) for key, shape in shapes.items()}
    source = fixtures.write_tensors(tmp_path / "lora.safetensors", tensors)
    (result,) = convert(source, base=comfy_base(family), naming=naming, output=tmp_path).results
    assert result.kept == ()
    assert not_read_by_comfy(load_file(result.output), names) == {}


def test_comfys_own_files_follow_the_rules_of_comfy():
    """Published adapters in its names, and those that it does not read."""
    for name in ("flux_lora_aitoolkit_bfl", "wan21_1_3b_lora_comfy", "sdxl_lora_kohya_te1_te2", "flux_lora_diffusers"):
        native, prefix, theirs, encoders, prefixes = COMFY[name.partition("_")[0].replace("wan21", "wan")]
        names = comfy_names(modules_of(native, prefix), modules_of(theirs), encoders, prefixes)
        assert not_read_by_comfy(fixtures.shapes(name), names) == {}
    native, prefix, theirs, encoders, prefixes = COMFY["flux"]
    names = comfy_names(modules_of(native, prefix), modules_of(theirs), encoders, prefixes)
    assert not_read_by_comfy(["diffusion_model.img_in.lora_B.weight"], names)
    assert not_read_by_comfy(["diffusion_model.img_in.lora_magnitude_vector"], names)
    assert not_read_by_comfy(["transformer.img_in.diff"], names)


# --- text encoders that a recipe leaves with little ----------------------------------------------


def test_diffusers_loads_encoders_whose_out_proj_are_weak(pipe, folder, tmp_path):
    path = kohya(pipe, tmp_path / "lora.safetensors", unet_name=ldm_name)
    tensors = load_file(path)
    weak = {key: tensor * 1e-4 if "out_proj.lora_up" in key else tensor for key, tensor in tensors.items()}
    save_file(weak, path)
    report = resize(path, base=folder, recipes="thr=-1.5", dtype="fp32", output=tmp_path / "out")
    (result,) = report.results
    assert len([warning for warning in result.warnings if "out_proj" in warning]) == 2
    actual, layers = loaded(pipe, result.output)
    assert layers == len([row for row in result.layers if row.rank_after])
    with merged(pipe, folder, result.output):
        assert max(differences(actual, outputs(pipe)).values()) < SAME


# --- 8-bit factors --------------------------------------------------------------------------------


def eight_bits(source, output, **options):
    report = resize(source, dtype="fp8", output=output, **options)
    assert report.failed == ()
    (result,) = report.results
    tensors = load_file(adapter_file(result.output))
    small = {key for key, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert small == {key for key in tensors if re.search(r"lora_(up|down|A|B)\.", key)}
    return result


def adapter_file(path):
    path = Path(path)
    return path / "adapter_model.safetensors" if path.is_dir() else path


def numbers_in(tensors):
    """The numbers of factors, whatever they are called."""
    return sorted(tensor.float().flatten().tolist() for tensor in tensors)


def loaded_factors(pipe, path):
    """The numbers that diffusers put into the pipeline's modules."""
    try:
        pipe.load_lora_weights(str(path))
        modules = [m for name in components(pipe) for m in getattr(pipe, name).modules() if hasattr(m, "lora_A")]
        return numbers_in(
            layer["default_0"].weight.detach() for module in modules for layer in (module.lora_A, module.lora_B)
        )
    finally:
        pipe.unload_lora_weights()


def test_diffusers_loads_8_bit_factors_of_sdxl_to_the_last_bit(pipe, folder, original, tmp_path):
    result = eight_bits(original.path, tmp_path / "out.safetensors", base=folder, recipes="rank=2")
    assert "diffusers" in result.loads.loads_in
    tensors = load_file(result.output)
    assert loaded_factors(pipe, result.output) == numbers_in(t for t in tensors.values() if t.ndim > 1)
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} <= {1.0}
    actual, layers = loaded(pipe, result.output)
    assert layers == original.layers
    with merged(pipe, folder, result.output):
        assert max(differences(actual, outputs(pipe)).values()) < SAME
    exact, _ = shrink(original.path, folder, "rank=2", tmp_path / "exact.safetensors")
    assert max(differences(actual, loaded(pipe, exact)[0]).values()) < 0.3


def test_diffusers_loads_8_bit_factors_of_every_small_pipeline(small, tmp_path):
    for naming in (None, *small.namings):
        result = eight_bits(small.path, tmp_path / f"{naming}", base=small.folder, recipes="energy=0.9", naming=naming)
        assert "diffusers" in result.loads.loads_in
        actual, _ = loaded(small.pipe, result.output)
        with merged(small.pipe, small.folder, result.output):
            assert max(differences(actual, outputs(small.pipe)).values()) < SAME, naming
        (changed,) = convert(
            small.path, base=small.folder, naming=naming, dtype="fp8", output=tmp_path / f"c{naming}"
        ).results
        actual, _ = loaded(small.pipe, changed.output)
        with merged(small.pipe, small.folder, changed.output):
            assert max(differences(actual, outputs(small.pipe)).values()) < SAME, naming
        if naming is None:
            with open_adapter(small.path) as before, open_adapter(changed.output) as after:
                for old, new in zip(before, after, strict=True):
                    delta = old.delta.dense()
                    assert float((new.delta.dense() - delta).norm()) < 0.06 * float(delta.norm()), old.name


def test_peft_loads_a_folder_in_8_bits(tmp_path):
    torch.manual_seed(0)
    pipe = small_flux()
    pipe.transformer.save_pretrained(tmp_path / "base" / "transformer")
    pipe.text_encoder = None
    source = fixtures.write_tensors(
        tmp_path / "lora.safetensors",
        {
            f"transformer.{name}.lora_{letter}.weight": factor
            for (_, name), pair in trained(pipe, lambda name: True).items()
            for letter, factor in zip("BA", pair, strict=True)
        },
    )
    result = eight_bits(source, tmp_path / "out", base=tmp_path / "base", recipes="energy=0.9", naming="peft")
    pipe.transformer = PeftModel.from_pretrained(
        FluxTransformer2DModel.from_pretrained(tmp_path / "base" / "transformer"), result.output
    )
    factors = [tensor for key, tensor in pipe.transformer.named_parameters() if ".lora_" in key]
    assert numbers_in(factors) == numbers_in(load_file(adapter_file(result.output)).values())
    with open_adapter(result.output) as adapter:
        deltas = {layer.name.removeprefix("base_model.model."): layer.delta.dense() for layer in adapter}
    for name, module in pipe.transformer.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            delta = deltas[name.removeprefix("base_model.model.")]
            assert torch.allclose(module.get_delta_weight("default").detach(), delta, atol=1e-5)


@pytest.mark.parametrize("name", ["wan21_1_3b_lora_musubi", "qwen_image_lora_musubi", "z_image_lora_aitoolkit"])
def test_diffusers_renames_8_bit_factors_of_wide_models(tmp_path, name):
    """Outputs have other names than inputs, and diffusers reads the same ΔW."""
    pipeline, native, _, _ = RENAMED[name]
    generator = torch.Generator().manual_seed(3)
    shapes = with_rank(first_blocks(name), 4)
    tensors = {
        key: torch.randn(shape, generator=generator) / 10 if shape else torch.tensor(2.5)
        for key, shape in shapes.items()
    }
    source = fixtures.write_tensors(tmp_path / "lora.safetensors", tensors)
    base = fixtures.write_header(tmp_path / "base.safetensors", fixtures.shapes(f"base_{native}"))
    probe = functools.cache(lambda width: torch.randn(width, 2, generator=torch.Generator().manual_seed(width)))
    exact = resize(source, base=base, recipes="rank=3", naming="diffusers", dtype="fp32", output=tmp_path / "exact")
    expected = read_by(pipeline, exact.results[0].output, probe)
    result = eight_bits(source, tmp_path / "small", base=base, recipes="rank=3")
    assert "diffusers" in result.loads.loads_in
    assert any("names" in warning for warning in result.warnings)
    state = pipeline.lora_state_dict(result.output)
    assert {tensor.dtype for tensor in state.values()} == {torch.float8_e4m3fn}
    for key, delta in expected.items():
        up, down = (state[f"{key}.lora_{letter}.weight"].float() for letter in "BA")
        assert float((up @ (down @ probe(down.shape[1])) - delta).norm()) < 0.1 * float(delta.norm())
