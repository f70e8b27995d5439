"""Which tensors form a layer, what it adds to the base, and that nothing is lost on the way."""

import json
import math
import re

import fixtures
import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from lorashrink.adapters import adapter_family, looks_like_adapter, open_adapter, peft
from lorashrink.errors import NotAnAdapter, ShapeError


def write(path, tensors, entries=None):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, entries)
    return path


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(name="lora_unet_x", *, out=8, rank=4, fan_in=6):
    return {f"{name}.lora_up.weight": noise(out, rank), f"{name}.lora_down.weight": noise(rank, fan_in)}


# --- sorting the keys ---------------------------------------------------------------------------

# layers, other keys
COUNTS = {
    "sdxl_lora_kohya_te1_te2": (986, 0),
    "sdxl_locon_kohya": (788, 0),
    "sdxl_locon_tucker_kohya": (49, 0),
    "sdxl_lora_diffusers_peft": (736, 0),
    "sdxl_dora_kohya_out": (722, 0),
    "sdxl_loha_kohya": (722, 0),
    "sd15_lora_kohya": (264, 0),
    "sd15_locon_kohya": (278, 0),
    "sd15_locon_norm_kohya": (192, 218),
    "sd15_lora_diffusers_processor": (176, 0),
    "sd2_lora_kohya": (330, 0),
}


@pytest.mark.parametrize("name", fixtures.ADAPTERS)
def test_every_key_is_in_one_layer_or_has_a_reason(name, tmp_path):
    with open_adapter(fixtures.write_adapter(tmp_path, name)) as adapter:
        of_layers = [key for layer in adapter for key in layer.keys.values()]
        assert len(of_layers) == len(set(of_layers))
        assert set(of_layers) | set(adapter.others) == set(fixtures.shapes(name))
        assert set(of_layers) & set(adapter.others) == set()
        assert all(adapter.others.values())
        assert (len(adapter), len(adapter.others)) == COUNTS[name]


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("spelling", ["lora_up.weight lora_down.weight", "lora_B.weight lora_A.weight"])
def test_a_magnitude_belongs_to_its_layer_but_not_to_its_delta(key, spelling, tmp_path):
    up, down = spelling.split()
    tensors = {f"x.{up}": noise(8, 4), f"x.{down}": noise(4, 6), f"x.{key}": noise(8, 1)}
    with open_adapter(write(tmp_path / "a.safetensors", tensors)) as adapter:
        (layer,) = adapter
        assert layer.algo == "dora"
        assert layer.keys["magnitude"] == f"x.{key}"
        assert_close(layer.delta.dense(), tensors[f"x.{up}"] @ tensors[f"x.{down}"])


def test_norms_beside_factors_are_no_layers(tmp_path):
    with open_adapter(fixtures.write_adapter(tmp_path, "sd15_locon_norm_kohya")) as adapter:
        assert {key.rpartition(".")[2]: reason for key, reason in adapter.others.items()} == {
            "w_norm": "a difference of a normalisation layer",
            "b_norm": "a difference of a bias",
        }


OF_OTHER_FAMILIES = [
    "x.hada_w1_a",
    "x.hada_t2",
    "x.lokr_w1",
    "x.lokr_w2_b",
    "x.lokr_t2",
    "x.oft_blocks",
    "x.oft_R.weight",
    "x.a1.weight",
    "x.lora_embedding_A",
    "x.lora_embedding_B.default",
    "x.lora_E",
    "x.diff",
    "x.ia3_l",
    "x.on_input",
    "x.vera_lambda_d",
]
CARRIED = [
    "x.diff_b",
    "x.w_norm",
    "x.set_weight",
    "x.q_layer.weight",
    "x.lokr_t1",
    "x.fourierft_spectrum",
    "x.hra_u",
    "x.boft_R",
    "x.ln_tuning_layers.weight",
]


@pytest.mark.parametrize("key", OF_OTHER_FAMILIES)
def test_a_layer_of_several_families_stays_together(key, tmp_path):
    tensors = {**factors("x"), "x.alpha": torch.tensor(2.0), **factors("y"), key: torch.ones(2)}
    with open_adapter(write(tmp_path / "a.safetensors", tensors)) as adapter:
        assert [layer.name for layer in adapter] == ["y"]
        keys = (key, "x.lora_up.weight", "x.lora_down.weight", "x.alpha")
        assert adapter.others == dict.fromkeys(keys, "its layer, x, is made of several families")


@pytest.mark.parametrize("key", CARRIED)
def test_tensors_that_change_no_matrix_are_carried_along(key, tmp_path):
    with open_adapter(write(tmp_path / "a.safetensors", {**factors("x"), key: torch.ones(2)})) as adapter:
        assert [layer.name for layer in adapter] == ["x"]
        assert list(adapter.others) == [key]
    with open_adapter(write(tmp_path / "b.safetensors", {key: torch.ones(2)})) as adapter:
        assert len(adapter) == 0


def test_factors_without_their_partners_are_refused(tmp_path):
    with pytest.raises(ShapeError, match=r"x has x\.hada_t2 but no"):
        open_adapter(write(tmp_path / "a.safetensors", {"x.hada_t2": torch.ones(2, 2, 3, 3)}))


def test_other_tensors_are_listed_with_a_reason(tmp_path):
    tensors = {
        **factors(),
        "bundle_emb.word.clip_l": torch.ones(1, 768),
        "weight": torch.ones(1),
        "lonely.alpha": torch.tensor(1.0),
    }
    with open_adapter(write(tmp_path / "a.safetensors", tensors)) as adapter:
        assert adapter.others == {
            "bundle_emb.word.clip_l": "an embedding that comes with the adapter",
            "weight": "not part of an adapter layer",
            "lonely.alpha": "belongs to factors that are not there",
        }


def test_keys_without_any_prefix_form_layers(tmp_path):
    tensors = factors("mid_block.attentions.0.proj_in")
    with open_adapter(write(tmp_path / "a.safetensors", tensors)) as adapter:
        assert [layer.name for layer in adapter] == ["mid_block.attentions.0.proj_in"]
        assert adapter.others == {}


LISTED = [
    ("sdxl_lora_kohya_te1_te2", "lora_unet_input_blocks_4_1_proj_in", (640, 640), 32),
    ("sdxl_lora_kohya_te1_te2", "lora_te2_text_model_encoder_layers_31_mlp_fc2", (1280, 5120), 32),
    ("sdxl_locon_kohya", "lora_unet_input_blocks_1_0_in_layers_2", (320, 320, 3, 3), 8),
    ("sdxl_locon_kohya", "lora_unet_output_blocks_8_0_skip_connection", (320, 640, 1, 1), 16),
    ("sdxl_locon_tucker_kohya", "lora_unet_input_blocks_1_0_in_layers_2", (320, 320, 3, 3), 8),
    ("sdxl_lora_diffusers_peft", "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj", (1280, 1280), 8),
    ("sd15_lora_kohya", "lora_unet_down_blocks_0_attentions_0_proj_in", (320, 320, 1, 1), 32),
    (
        "sd15_lora_diffusers_processor",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        (320, 320),
        4,
    ),
    ("sd2_lora_kohya", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 1024), 16),
]


@pytest.mark.parametrize(("name", "layer", "shape", "rank"), LISTED, ids=[f"{a} {b}" for a, b, _, _ in LISTED])
def test_the_header_gives_shape_and_rank(name, layer, shape, rank, tmp_path):
    with open_adapter(fixtures.write_adapter(tmp_path, name)) as adapter:
        (row,) = (candidate for candidate in adapter if candidate.name == layer)
        assert (row.shape, row.rank, row.dtype) == (shape, rank, "F16")


# --- what is no adapter, and what is broken -----------------------------------------------------


@pytest.mark.parametrize("name", fixtures.LISTED)
def test_adapters_look_like_adapters_and_bases_do_not(name):
    assert looks_like_adapter(fixtures.shapes(name)) == (not name.startswith("base_"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["x.alpha"], False),
        (["diff.weight", "up.weight", "down.weight"], False),
        (["x.lora_A.default.weight"], True),
        (["x.hada_w1_a"], True),
        ([], False),
    ],
    ids=["an alpha alone", "words of suffixes", "raw PEFT names", "LoHa", "nothing"],
)
def test_single_keys_tell_an_adapter(keys, expected):
    assert looks_like_adapter(dict.fromkeys(keys)) == expected


def test_a_base_is_not_opened_as_an_adapter(tmp_path):
    shapes = fixtures.shapes("base_sdxl_ldm")
    path = fixtures.write_header(tmp_path / "sdxl.safetensors", shapes)
    with pytest.raises(NotAnAdapter, match=rf"no adapter layer found among its {len(shapes)} tensors.*--base"):
        open_adapter(path)


UP, DOWN, MID = "x.lora_up.weight", "x.lora_down.weight", "x.lora_mid.weight"
BROKEN = {
    "up is missing": ({DOWN: (4, 6)}, "no up factor beside it"),
    "down is missing": ({UP: (8, 4)}, "no down factor beside it"),
    "only the core is there": ({MID: (4, 4, 3, 3)}, "no down and up factor beside it"),
    "ranks differ": ({UP: (8, 4), DOWN: (3, 6)}, "their ranks differ"),
    "vectors": ({UP: (8,), DOWN: (6,)}, "are no matrices"),
    "kernel in up": ({UP: (8, 4, 3, 3), DOWN: (4, 6, 3, 3)}, "its kernel should be 1×1"),
    "core of another rank": ({UP: (8, 4, 1, 1), MID: (5, 4, 3, 3), DOWN: (4, 6, 1, 1)}, "they do not chain"),
    "kernel in core and down": ({UP: (8, 4, 1, 1), MID: (4, 4, 3, 3), DOWN: (4, 6, 3, 3)}, "they do not chain"),
    "rank 0": ({UP: (8, 0), DOWN: (0, 6)}, "are empty"),
    "two adapters": (
        {f"x.lora_{letter}.{name}.weight": (4, 4) for letter in "AB" for name in ("default", "other")},
        "the file holds several adapters",
    ),
}


@pytest.mark.parametrize(("shapes", "message"), BROKEN.values(), ids=BROKEN)
def test_an_inconsistent_layer_is_refused(shapes, message, tmp_path):
    path = write(tmp_path / "broken.safetensors", {key: torch.ones(shape) for key, shape in shapes.items()})
    with pytest.raises(ShapeError, match=rf"broken\.safetensors: .*{re.escape(message)}"):
        open_adapter(path)


def test_a_layer_in_two_spellings_is_refused_as_such(tmp_path):
    tensors = {**factors("x"), "x.lora_A.weight": noise(4, 6), "x.lora_B.weight": noise(8, 4)}
    with pytest.raises(ShapeError, match=r"layer x ") as error:
        open_adapter(write(tmp_path / "a.safetensors", tensors))
    assert "incomplete" not in str(error.value)


# --- ΔW -----------------------------------------------------------------------------------------

LYCORIS = {
    "linear": (nn.Linear(6, 8), False),
    "1x1": (nn.Conv2d(6, 8, 1), False),
    "1x1 asked for Tucker": (nn.Conv2d(6, 8, 1), True),
    "3x3": (nn.Conv2d(6, 8, 3), False),
    "Tucker": (nn.Conv2d(6, 8, 3), True),
    "Tucker, kernel not square": (nn.Conv2d(6, 8, (1, 3)), True),
}


@pytest.mark.parametrize("alpha", [2, 4, 1.5])
@pytest.mark.parametrize(("module", "tucker"), LYCORIS.values(), ids=LYCORIS)
def test_locon_adds_what_lycoris_adds(module, tucker, alpha, tmp_path):
    reference = LoConModule("lora_unet_x", module, lora_dim=4, alpha=alpha, use_tucker=tucker)
    nn.init.normal_(reference.lora_up.weight, generator=torch.Generator().manual_seed(1))
    stored = {f"lora_unet_x.{key}": value.detach() for key, value in reference.state_dict().items()}
    expected = reference.get_diff_weight()[0].detach()
    with open_adapter(write(tmp_path / "a.safetensors", stored)) as adapter:
        (layer,) = adapter
        assert layer.shape == tuple(module.weight.shape) == layer.delta.shape
        assert layer.scale == alpha / 4
        torch.testing.assert_close(layer.delta.dense(), expected, rtol=1e-5, atol=1e-6)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv2d(6, 8, 3)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.mid = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))


TARGETS = ["linear", "conv", "pointwise", "mid.0", "mid.1"]
PEFT = {
    "alpha is twice the rank": {"r": 3, "lora_alpha": 6},
    "alpha is not whole": {"r": 4, "lora_alpha": 1.5},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "rank pattern": {"r": 4, "lora_alpha": 4, "rank_pattern": {"conv": 2, "mid.0": 3}},
    "alpha pattern": {"r": 4, "lora_alpha": 4, "alpha_pattern": {"mid.1": 7, "linear": 1}},
    "both patterns, anchored": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"^linear": 2, r"mid\.\d": 5},
        "alpha_pattern": {"^linear": 3, r"mid\.\d": 1, "0": 100},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("settings", PEFT.values(), ids=PEFT)
def test_a_diffusers_file_adds_what_peft_adds(settings, tmp_path):
    config = LoraConfig(target_modules=TARGETS, **settings)
    torch.manual_seed(2)
    model = get_peft_model(Small(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    stored = {key.replace("base_model.model.", "unet."): v for key, v in get_peft_model_state_dict(model).items()}
    entries = {f"unet.{key}": value for key, value in config.to_dict().items()}
    packed = {peft.METADATA_KEY: json.dumps(entries, default=list)}
    with open_adapter(write(tmp_path / "a.safetensors", stored, packed)) as adapter:
        assert {layer.name for layer in adapter} == {f"unet.{target}" for target in TARGETS}
        for layer in adapter:
            module = model.base_model.model.get_submodule(layer.name.removeprefix("unet."))
            expected = module.get_delta_weight("default").detach()
            torch.testing.assert_close(layer.delta.dense(), expected, rtol=1e-5, atol=1e-6)


SPELLINGS = {
    "kohya": ("lora_unet_x", ".lora_up.weight", ".lora_down.weight"),
    "PEFT": ("unet.x", ".lora_B.weight", ".lora_A.weight"),
    "PEFT with a name": ("base_model.model.x", ".lora_B.my_style.weight", ".lora_A.my_style.weight"),
    "diffusers of 2023": ("unet.x", ".lora.up.weight", ".lora.down.weight"),
    "attention processor": ("unet.x.processor.to_q", "_lora.up.weight", "_lora.down.weight"),
    "text encoder": ("text_encoder.x.q_proj", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
}


@pytest.mark.parametrize(("name", "up", "down"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_factors_means_the_same(name, up, down, tmp_path):
    tensors = {f"{name}{up}": noise(8, 4), f"{name}{down}": noise(4, 6), f"{name}.alpha": torch.tensor(2.0)}
    with open_adapter(write(tmp_path / "a.safetensors", tensors)) as adapter:
        (layer,) = adapter
        assert (layer.name, layer.shape, layer.rank, layer.alpha) == (name, (8, 6), 4, 2)
        torch.testing.assert_close(layer.delta.dense(), 0.5 * noise(8, 4) @ noise(4, 6))
        assert adapter.others == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tucker_core_is_multiplied_in_without_rounding(dtype, tmp_path):
    up, mid, down = noise(8, 4, 1, 1).to(dtype), noise(4, 4, 3, 3).to(dtype), noise(4, 6, 1, 1).to(dtype)
    path = write(tmp_path / "a.safetensors", {UP: up, MID: mid, DOWN: down})
    expected = torch.einsum("oa,abhw,bi->oihw", up.double().flatten(1), mid.double(), down.double().flatten(1))
    with open_adapter(path) as adapter:
        torch.testing.assert_close(adapter.layers[0].delta.dense(), expected.float(), rtol=1e-6, atol=1e-6)


# --- the scale ----------------------------------------------------------------------------------

ALPHAS = {
    "absent": (None, None, 1.0),
    "equal to the rank": (torch.tensor(4.0), 4.0, 1.0),
    "half": (torch.tensor(2.0), 2.0, 0.5),
    "not whole": (torch.tensor(0.75), 0.75, 0.1875),
    "negative": (torch.tensor(-4.0), -4.0, -1.0),
    "zero": (torch.tensor(0.0), 0.0, 0.0),
    "in a vector": (torch.tensor([2.0]), 2.0, 0.5),
    "float16": (torch.tensor(2.0, dtype=torch.float16), 2.0, 0.5),
    "bfloat16": (torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625, 0.0250244140625),
    "float64": (torch.tensor(0.3, dtype=torch.float64), 0.3, 0.075),
    "whole": (torch.tensor(8), 8.0, 2.0),
    "whole, in a vector": (torch.tensor([1]), 1.0, 0.25),
}


@pytest.mark.parametrize(("alpha", "value", "scale"), ALPHAS.values(), ids=ALPHAS)
def test_the_scale_is_alpha_over_the_stored_rank(alpha, value, scale, tmp_path):
    tensors = factors("x") | ({} if alpha is None else {"x.alpha": alpha})
    with open_adapter(write(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "128"})) as adapter:
        (layer,) = adapter
        assert (layer.alpha, layer.scale) == (value, scale)
        torch.testing.assert_close(layer.delta.dense(), scale * noise(8, 4) @ noise(4, 6))


def test_an_alpha_of_several_numbers_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {**factors("x"), "x.alpha": torch.ones(2)})
    with open_adapter(path) as adapter, pytest.raises(ShapeError, match=r"x\.alpha should be one number, it is \[2\]"):
        adapter.layers[0].scale  # noqa: B018 - reading it is what fails


# configuration, scales of unet.down.to_k (rank 4), unet.mid.to_k (rank 8) and text_encoder.to_k (rank 2)
CONFIGS = {
    "none": (None, (1, 1, 1)),
    "rank and alpha": ({"unet.r": 4, "unet.lora_alpha": 2}, (0.5, 0.25, 1)),
    "one per component": ({"unet.lora_alpha": 4, "text_encoder.lora_alpha": 6}, (1, 0.5, 3)),
    "no alpha": ({"unet.r": 4}, (1, 1, 1)),
    "rank pattern": ({"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"mid.to_k": 8}}, (1, 0.5, 1)),
    "alpha pattern": ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"mid.to_k": 16}}, (1, 2, 1)),
    "alpha pattern, first that fits": (
        {"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_k": 8, "mid.to_k": 16}},
        (2, 1, 1),
    ),
    "alpha pattern, whole levels only": ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"o_k": 8}}, (1, 0.5, 1)),
    "alpha pattern, anchored": ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"^to_k": 8}}, (1, 0.5, 1)),
    "rank-stabilised": (
        {"unet.lora_alpha": 4, "unet.use_rslora": True, "text_encoder.lora_alpha": 2},
        (2, math.sqrt(2), 1),
    ),
    "of another component": ({"transformer.lora_alpha": 32}, (1, 1, 1)),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_without_alphas_the_settings_in_the_file_set_the_scale(config, expected, tmp_path):
    tensors = {
        f"{name}.{key}": value
        for name, rank in (("unet.down.to_k", 4), ("unet.mid.to_k", 8), ("text_encoder.to_k", 2))
        for key, value in (("lora_A.weight", noise(rank, 6)), ("lora_B.weight", noise(8, rank)))
    }
    entries = None if config is None else {peft.METADATA_KEY: json.dumps(config)}
    with open_adapter(write(tmp_path / "a.safetensors", tensors, entries)) as adapter:
        scales = {layer.name: layer.scale for layer in adapter}
    by_name = dict(zip(("unet.down.to_k", "unet.mid.to_k", "text_encoder.to_k"), expected, strict=True))
    assert scales == pytest.approx(by_name)


def test_a_stored_alpha_wins_over_the_configuration(tmp_path):
    entries = {peft.METADATA_KEY: json.dumps({"unet.r": 4, "unet.lora_alpha": 64})}
    tensors = {"unet.x.lora_A.weight": noise(4, 6), "unet.x.lora_B.weight": noise(8, 4), "unet.x.alpha": torch.ones(())}
    with open_adapter(write(tmp_path / "a.safetensors", tensors, entries)) as adapter:
        assert adapter.layers[0].scale == 0.25


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"unet.lora_alpha"'])
def test_an_unreadable_configuration_counts_as_none(text, tmp_path):
    tensors = {"unet.x.lora_A.weight": noise(4, 6), "unet.x.lora_B.weight": noise(8, 4)}
    with open_adapter(write(tmp_path / "a.safetensors", tensors, {peft.METADATA_KEY: text})) as adapter:
        assert adapter.layers[0].scale == 1


def test_the_scale_of_a_listed_diffusers_file_is_one(tmp_path):
    with open_adapter(fixtures.write_adapter(tmp_path, "sdxl_lora_diffusers_peft")) as adapter:
        assert peft.METADATA_KEY in adapter.store.metadata
        assert {layer.scale for layer in adapter} == {1.0}


# --- family -------------------------------------------------------------------------------------

# None where names and widths fit several families, or no layer is decomposed.
LOOKS = {
    "sdxl_lora_kohya_te1_te2": "sdxl",
    "sdxl_locon_kohya": "sdxl",
    "sdxl_locon_tucker_kohya": None,
    "sdxl_lora_diffusers_peft": "sdxl",
    "sdxl_dora_kohya_out": "sdxl",
    "sdxl_loha_kohya": "sdxl",
    "sd15_lora_kohya": "sd15",
    "sd15_locon_kohya": "sd15",
    "sd15_locon_norm_kohya": "sd15",
    "sd15_lora_diffusers_processor": "sd15",
    "sd2_lora_kohya": "sd2",
}


@pytest.mark.parametrize("name", fixtures.ADAPTERS)
def test_names_and_widths_tell_the_family_of_models(name, tmp_path):
    with open_adapter(fixtures.write_adapter(tmp_path, name)) as adapter:
        assert adapter_family(adapter) == LOOKS[name]


PARTIAL = {
    "second encoder alone": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280)}, "sdxl"),
    "first encoder alone": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}, None),
    "deep transformer": ({"lora_unet_middle_block_1_transformer_blocks_4_attn1_to_q": (1280, 1280)}, "sdxl"),
    "shallow transformer": ({"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (1280, 1280)}, None),
    "context of SDXL": ({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048)}, "sdxl"),
    "context of SD 1.x": ({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 768)}, "sd15"),
}


@pytest.mark.parametrize(("layers", "expected"), PARTIAL.values(), ids=PARTIAL)
def test_a_few_layers_may_tell_the_family(layers, expected, tmp_path):
    shapes = {}
    for name, (out, fan_in) in layers.items():
        shapes |= {f"{name}.lora_up.weight": (out, 4), f"{name}.lora_down.weight": (4, fan_in)}
    with open_adapter(fixtures.write_header(tmp_path / "a.safetensors", shapes)) as adapter:
        assert adapter_family(adapter) == expected
