"""The trainer's flags against sd-scripts' parser (commit 48d368fa), whose names, types and defaults the tables give."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashrink.errors import InputError, OutputError, UsageError
from lorashrink.pictures.prompts import SAMPLERS
from lorashrink.train.flags.options import INTERPOLATIONS, UNSUPPORTED, Options, parse, parser, write_config

# (type, default) -> flags; "flag" takes no value, "*" takes several. sd-scripts' Path is a text here, its None of
# several values an empty tuple.
IMPLEMENTED: dict[tuple[str, Any], str] = {
    ("flag", False): """
        v_parameterization shuffle_caption flip_aug cache_latents cache_latents_to_disk skip_cache_check
        enable_bucket bucket_no_upscale save_state
        save_state_on_train_end mem_eff_attn xformers sdpa persistent_data_loader_workers
        gradient_checkpointing full_bf16 log_config noise_offset_random_strength zero_terminal_snr lowram
        highvram sample_at_first output_config use_8bit_adam use_lion_optimizer
        scale_v_pred_loss_like_noise_pred debiased_estimation_loss cache_text_encoder_outputs
        cache_text_encoder_outputs_to_disk disable_mmap_load_safetensors no_metadata network_train_unet_only
        network_train_text_encoder_only dim_from_weights no_half_vae
    """,
    ("str", None): """
        pretrained_model_name_or_path tokenizer_cache_dir metadata_title metadata_author
        metadata_description metadata_license metadata_tags metadata_usage_hint metadata_thumbnail
        metadata_merged_from metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding
        train_data_dir caption_extention secondary_separator caption_prefix caption_suffix resolution
        resize_interpolation reg_data_dir output_dir output_name save_precision resume vae logging_dir
        log_with log_prefix log_tracker_name wandb_run_name sample_prompts config_file network_weights
        network_module training_comment dataset_config
    """,
    ("str", ","): "caption_separator",
    ("str", ".caption"): "caption_extension",
    ("str", ""): "keep_tokens_separator optimizer_type lr_scheduler_type",
    ("str", "no"): "mixed_precision",
    ("str", "ddim"): "sample_sampler",
    ("str", "constant"): "lr_scheduler",
    ("str", "safetensors"): "save_model_as",
    ("int", None): """
        save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs
        save_last_n_epochs_state save_last_n_steps save_last_n_steps_state max_token_length max_train_epochs
        seed clip_skip multires_noise_iterations min_timestep max_timestep sample_every_n_steps
        sample_every_n_epochs lr_scheduler_timescale network_dim
    """,
    ("int", 0): "keep_tokens caption_dropout_every_n_epochs",
    ("int", 1): """
        vae_batch_size dataset_repeats train_batch_size gradient_accumulation_steps
        lr_scheduler_num_cycles
    """,
    ("int", 8): "max_data_loader_n_workers",
    ("int", 64): "bucket_reso_steps",
    ("int", 256): "min_bucket_reso",
    ("int", 1024): "max_bucket_reso",
    ("int", 1600): "max_train_steps",
    ("int or float", 0): "lr_warmup_steps lr_decay_steps",
    ("float", None): """
        noise_offset adaptive_noise_scale lr_scheduler_min_lr_ratio min_snr_gamma v_pred_like_loss unet_lr
        network_dropout scale_weight_norms
    """,
    ("float", 0.0): "caption_dropout_rate caption_tag_dropout_rate",
    ("float", 0.3): "multires_noise_discount",
    ("float", 1.0): "prior_loss_weight max_grad_norm lr_scheduler_power network_alpha",
    ("float", 2e-6): "learning_rate",
    ("str*", ()): "optimizer_args lr_scheduler_args network_args base_weights",
    ("float*", ()): "text_encoder_lr base_weights_multiplier",
}
KNOWN_ONLY: dict[tuple[str, Any], str] = {
    ("flag", False): """
        console_log_simple cache_info debug_dataset alpha_mask save_state_to_huggingface
        resume_from_huggingface async_upload torch_compile full_fp16 fp8_base ddp_gradient_as_bucket_view
        ddp_static_graph ip_noise_gamma_random_strength masked_loss deepspeed zero3_init_flag
        zero3_save_16bit_model fp16_master_weights_and_gradients fused_backward_pass weighted_captions
        cpu_offload_checkpointing fp8_base_unet skip_until_initial_step v2 enable_wildcard color_aug random_crop
    """,
    ("str", None): """
        console_log_level console_log_file face_crop_aug_range dataset_class in_json huggingface_repo_id
        huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility
        log_tracker_config wandb_api_key conditioning_data_dir offload_optimizer_device
        offload_optimizer_nvme_path offload_param_device offload_param_nvme_path
    """,
    ("str", "inductor"): "dynamo_backend",
    ("str", "l2"): "loss_type",
    ("str", "snr"): "huber_schedule",
    ("int", None): """
        ddp_timeout initial_epoch initial_step validation_seed validate_every_n_steps
        validate_every_n_epochs max_validation_steps
    """,
    ("int", 1): "token_warmup_min",
    ("int", 2): "zero_stage",
    ("float", None): "ip_noise_gamma",
    ("float", 0.0): "token_warmup_step validation_split",
    ("float", 0.1): "huber_c",
    ("float", 1.0): "huber_scale",
}
# fp32 and 75 are lorashrink's own: the guide's prose has the first, and the second is what no value means.
CHOICES: dict[str, tuple[Any, ...]] = {
    "resize_interpolation": ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    "save_precision": ("float", "fp32", "fp16", "bf16"),
    "save_model_as": ("ckpt", "pt", "safetensors"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "max_token_length": (75, 150, 225),
    "log_with": ("tensorboard", "wandb", "all"),
    "sample_sampler": (
        "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
        "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
    ),
}  # fmt: skip
OWN = {"text_encoder_batch_size", "model_config", "shrink", "plan", "debug"}


def rows(table: dict[tuple[str, Any], str]) -> list[tuple[str, str, Any]]:
    return [(name, kind, default) for (kind, default), names in table.items() for name in names.split()]


FREE = [row for row in rows(IMPLEMENTED) if row[0] not in CHOICES]

# The training command of the guide, with neutral paths.
GUIDE = shlex.split("""
    --lowram --pretrained_model_name_or_path=/models/base/ --train_data_dir=/pictures --resolution=1024,1024
    --output_dir=/results --enable_bucket --min_bucket_reso=256 --max_bucket_reso=1024 --network_alpha=4
    --save_model_as=safetensors --network_module=lycoris.kohya
    --network_args preset=full conv_dim=256 conv_alpha=4 use_tucker=False use_scalar=False
    rank_dropout_scale=False algo=locon train_norm=False
    block_dims=8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8
    block_alphas=0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,\
0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625
    --network_dropout=0 --lr_scheduler=cosine --learning_rate=0.0001 --unet_lr=0.0001 --text_encoder_lr=0.0001
    --network_dim=8 --output_name=mylora --scale_weight_norms=1 --no_half_vae --save_every_n_epochs=50
    --mixed_precision=fp16 --save_precision=fp16 --caption_extension=.txt --cache_latents --cache_latents_to_disk
    --optimizer_type=AdamW --max_grad_norm=1 --keep_tokens=1 --max_data_loader_n_workers=8 --bucket_reso_steps=32
    --multires_noise_iterations=10 --multires_noise_discount=0.1 --log_prefix=xl-locon
    --gradient_accumulation_steps=6 --gradient_checkpointing --train_batch_size=8 --dataset_repeats=0
    --max_train_steps=400 --shuffle_caption --sdpa --sample_prompts=/pictures/sample-prompts.txt
    --sample_sampler=euler_a --sample_every_n_steps=100
""")
# What sd-scripts' parser makes of it, without what equals a default.
GUIDE_VALUES: dict[str, Any] = {
    "lowram": True,
    "pretrained_model_name_or_path": "/models/base/",
    "train_data_dir": "/pictures",
    "resolution": "1024,1024",
    "output_dir": "/results",
    "enable_bucket": True,
    "network_alpha": 4.0,
    "network_module": "lycoris.kohya",
    "network_args": (
        "preset=full",
        "conv_dim=256",
        "conv_alpha=4",
        "use_tucker=False",
        "use_scalar=False",
        "rank_dropout_scale=False",
        "algo=locon",
        "train_norm=False",
        "block_dims=8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8",
        f"block_alphas={','.join(['0.0625'] * 24)}",
    ),
    "network_dropout": 0.0,
    "lr_scheduler": "cosine",
    "learning_rate": 1e-4,
    "unet_lr": 1e-4,
    "text_encoder_lr": (1e-4,),
    "network_dim": 8,
    "output_name": "mylora",
    "scale_weight_norms": 1.0,
    "no_half_vae": True,
    "save_every_n_epochs": 50,
    "mixed_precision": "fp16",
    "save_precision": "fp16",
    "caption_extension": ".txt",
    "cache_latents": True,
    "cache_latents_to_disk": True,
    "optimizer_type": "AdamW",
    "keep_tokens": 1,
    "bucket_reso_steps": 32,
    "multires_noise_iterations": 10,
    "multires_noise_discount": 0.1,
    "log_prefix": "xl-locon",
    "gradient_accumulation_steps": 6,
    "gradient_checkpointing": True,
    "train_batch_size": 8,
    "dataset_repeats": 0,
    "max_train_steps": 400,
    "shuffle_caption": True,
    "sdpa": True,
    "sample_prompts": "/pictures/sample-prompts.txt",
    "sample_sampler": "euler_a",
    "sample_every_n_steps": 100,
}


def differing(options: Options) -> dict[str, Any]:
    return {
        row.name: getattr(options, row.name)
        for row in dataclasses.fields(options)
        if getattr(options, row.name) != row.default
    }


def written(folder: Path, text: str) -> str:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    return str(folder / "run.toml")


# --- flags ----------------------------------------------------------------------------------------------------------


def test_the_guides_command_parses_to_what_sd_scripts_parser_yields() -> None:
    assert differing(parse(GUIDE)) == GUIDE_VALUES


def test_every_flag_of_sd_scripts_is_known() -> None:
    names = [name for name, _, _ in rows(IMPLEMENTED) + rows(KNOWN_ONLY)]

    assert len(set(names)) == len(names) == 196
    assert {row.name for row in dataclasses.fields(Options)} == {name for name, _, _ in rows(IMPLEMENTED)} | OWN
    assert {name for name, _, _ in rows(KNOWN_ONLY)} <= set(UNSUPPORTED)


@pytest.mark.parametrize(("name", "kind", "default"), rows(IMPLEMENTED))
def test_defaults_are_those_of_sd_scripts(name: str, kind: str, default: Any) -> None:
    value = getattr(parse([]), name)

    assert (value, type(value)) == (default, type(default))


@pytest.mark.parametrize(("name", "kind", "default"), FREE)
def test_values_have_the_types_of_sd_scripts(name: str, kind: str, default: Any) -> None:
    words = [f"--{name}"] if kind == "flag" else [f"--{name}", "7", "8"] if "*" in kind else [f"--{name}", "7"]
    expected: dict[str, Any] = {
        "flag": True,
        "str": "7",
        "int": 7,
        "float": 7.0,
        "int or float": 7,
        "str*": ("7", "8"),
        "float*": (7.0, 8.0),
    }
    if name in ("config_file", "output_config"):
        words = ["--output_config", "--config_file", "7"]

    value = getattr(parse(words), name)

    assert (value, type(value)) == (expected[kind], type(expected[kind]))


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_choices_are_those_of_sd_scripts(name: str, choices: tuple[Any, ...]) -> None:
    equal_to_another = {"fp32": "float", 75: None}
    for choice in choices:
        assert getattr(parse([f"--{name}", str(choice)]), name) == equal_to_another.get(choice, choice)
    with pytest.raises(UsageError, match=f"--{name} must be"):
        parse([f"--{name}", "neither"])


def test_the_named_lists_hold_the_choices() -> None:
    assert set(SAMPLERS) == set(CHOICES["sample_sampler"])
    assert set(INTERPOLATIONS) == set(CHOICES["resize_interpolation"])


@pytest.mark.parametrize(
    ("text", "expected"), [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("100%", 1.0), ("0", 0), ("1e-1", 0.1)]
)
def test_warm_up_is_a_number_of_steps_or_a_share(text: str, expected: float) -> None:
    value = parse(["--lr_warmup_steps", text]).lr_warmup_steps

    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max_train_step=5"], {"max_train_steps": 5}),
        (["--train_batch", "2"], {"train_batch_size": 2}),
        (["--save_precision", "fp32"], {"save_precision": "float"}),
        (["--cache_latents_to_disk"], {"cache_latents": True, "cache_latents_to_disk": True}),
        (
            ["--cache_text_encoder_outputs_to_disk"],
            {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True},
        ),
        (
            ["--caption_extension=.cap", "--caption_extention=.txt"],
            {"caption_extension": ".txt", "caption_extention": ".txt"},
        ),
        (["--vae", "", "--seed=", "--network_args", ""], {}),
        (["--noise_offset", "-0.1", "--seed=-1"], {"noise_offset": -0.1, "seed": -1}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
)
def test_spellings_mean_what_they_mean_in_sd_scripts(arguments: list[str], expected: dict[str, Any]) -> None:
    assert differing(parse(arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spda"], "no such option: --spda (did you mean --sdpa?)"),
        (["--network_dims=8"], "did you mean --network_dim?"),
        (["--xyzzy"], "`--help` lists all"),
        (["--network_args", "algo=locon", "--spda"], "did you mean --sdpa?"),
        (["trigger word"], "need quotes"),
        (["--keep_tokens", "one"], '--keep_tokens must be a whole number, not "one"'),
        (["--keep_tokens", "1.5"], "a whole number"),
        (["--learning_rate", "fast"], '--learning_rate must be a number, not "fast"'),
        (["--lr_warmup_steps", "some"], "must be a number"),
        (["--text_encoder_lr", "1e-4", "x"], "--text_encoder_lr must be a number"),
        (["--seed"], "--seed: expected one argument"),
        (["--sdpa=yes"], "--sdpa"),
        (["--save_pre=int4"], "--save_precision must be one of float, fp32, fp16, bf16, not int4"),
        (["--save_last=1"], "could match"),
        (["--wandb_api_key=secret"], "WANDB_API_KEY"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind", "default"), rows(KNOWN_ONLY))
def test_unsupported_flags_are_refused_by_name(name: str, kind: str, default: Any) -> None:
    with pytest.raises(UsageError, match=f"not supported: --{name}(;|$)"):
        parse([f"--{name}"] if kind == "flag" else [f"--{name}", "7"])


@pytest.mark.parametrize(("name", "kind", "default"), rows(KNOWN_ONLY))
def test_unsupported_options_may_have_the_value_that_changes_nothing(
    name: str, kind: str, default: Any, tmp_path: Path
) -> None:
    empty = {"str": "", "int": 0, "float": 0.0}
    neutral = empty[kind] if default is None else default

    assert parse(["--config_file", written(tmp_path, f"{name} = {json.dumps(neutral)}")]) == parse(
        ["--config_file", str(tmp_path / "run.toml")] + ([] if kind == "flag" else [f"--{name}", str(neutral)])
    )


# --- configuration files --------------------------------------------------------------------------------------------


def test_a_configuration_file_has_any_sections_and_the_command_line_wins(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        seed = 1
        [model]
        pretrained_model_name_or_path = "base"
        lowram = true
        sdpa = false
        vae = ""
        [anything]
        network_args = ["algo=locon", "preset=full"]
        text_encoder_lr = 1e-4
        base_weights = ""
        resolution = 1024
        network_alpha = 4
        lr_warmup_steps = 0.1
        train_batch_size = 2
        fp8_base = false
        """,
    )

    value = differing(parse(["--config_file", path, "--train_batch_size=3"]))

    assert value == {
        "config_file": path,
        "seed": 1,
        "pretrained_model_name_or_path": "base",
        "lowram": True,
        "network_args": ("algo=locon", "preset=full"),
        "text_encoder_lr": (1e-4,),
        "resolution": "1024",
        "network_alpha": 4.0,
        "lr_warmup_steps": 0.1,
        "train_batch_size": 3,
    }
    assert parse(["--config_file", path.removesuffix(".toml")]).seed == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("network_dims = 8", "no such option: --network_dims (did you mean --network_dim?)"),
        ('keep_tokens = "one"', '--keep_tokens must be a whole number, not "one"'),
        ("keep_tokens = 1.5", "--keep_tokens must be a whole number, not 1.5"),
        ("keep_tokens = true", "--keep_tokens must be a whole number, not true"),
        ('sdpa = "yes"', '--sdpa must be true or false, not "yes"'),
        ("sdpa = 1", "--sdpa must be true or false, not 1"),
        ("resolution = [1024, 1024]", "--resolution must be text"),
        ("output_name = 2024-01-01", "--output_name must be text"),
        ("text_encoder_lr = [true]", "--text_encoder_lr must be a number, not true"),
        ('save_precision = "int4"', "--save_precision must be one of float, fp32, fp16, bf16"),
        ("fp8_base = true", "not supported: --fp8_base"),
        ('loss_type = "huber"', "not supported: --loss_type"),
    ],
)
def test_a_mistake_in_a_settings_file_is_explained_with_its_path(line: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, line)

    with pytest.raises(UsageError) as caught:
        parse(["--config_file", path])

    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_configuration_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        parse(["--config_file", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no valid TOML"):
        parse(["--config_file", written(tmp_path, "seed = ")])


_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "flag": st.just(True),
    "str": st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), min_size=1),
    "int": st.integers(0, 2**31),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "int or float": st.integers(0, 2**31) | st.floats(0, 1),
}
_VALUES |= {f"{kind}*": st.lists(_VALUES[kind], min_size=1).map(tuple) for kind in ("str", "float")}
_CHANGED = [(name, kind) for name, kind, _ in FREE if name not in ("config_file", "output_config")]


@given(st.lists(st.sampled_from(_CHANGED), unique=True, max_size=6), st.data())
def test_written_options_are_read_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, changed: list[tuple[str, str]], data: st.DataObject
) -> None:
    values = {name: data.draw(_VALUES[kind], label=name) for name, kind in changed}
    path = tmp_path_factory.mktemp("config") / "run.toml"
    several = {name: value for name, value in values.items() if isinstance(value, tuple)}
    line = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if name not in several
    ]
    options = dataclasses.replace(parse(line), **several)

    write_config(dataclasses.replace(options, config_file=str(path), output_config=True))

    assert parse(["--config_file", str(path)]) == dataclasses.replace(options, config_file=str(path))


def test_the_guides_command_survives_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "guide.toml"

    assert write_config(parse([*GUIDE, "--output_config", "--config_file", str(path)])) == path
    assert differing(parse(["--config_file", str(path)])) == {**GUIDE_VALUES, "config_file": str(path)}


def test_options_are_never_written_over_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "seed = 1")

    with pytest.raises(UsageError, match="exists"):
        write_config(parse(["--output_config", "--config_file", path]))
    with pytest.raises(UsageError, match="needs --config_file"):
        write_config(parse(["--output_config"]))
    with pytest.raises(OutputError):
        write_config(parse(["--output_config", "--config_file", f"{path}/in-a-file.toml"]))
    assert Path(path).read_text() == "seed = 1"


# --- help -----------------------------------------------------------------------------------------------------------


def test_the_help_lists_every_option_but_aliases_and_unsupported_ones() -> None:
    text = parser().format_help()
    listed = {word for line in text.splitlines() for word in line.split()[:1] if word.startswith("--")}
    aliases = {"caption_extention", "use_8bit_adam", "use_lion_optimizer"}

    assert listed == {f"--{row.name}" for row in dataclasses.fields(Options) if row.name not in aliases}


def test_the_help_comes_without_torch() -> None:
    program = (
        "import sys\n"
        "from lorashrink.train.command import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "--pretrained_model_name_or_path" in done.stdout


def test_all_unknown_keys_of_a_settings_file_are_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "network_dims = 8\nqqqq = 1\n[more]\nlearning_rat = 1e-4")
    with pytest.raises(UsageError) as caught:
        parse(["--config_file", path])
    assert str(caught.value) == (
        f"{path}: no such option: --network_dims (did you mean --network_dim?), --qqqq, "
        "--learning_rat (did you mean --learning_rate?); `--help` lists all"
    )
    with pytest.raises(UsageError, match="no such option: --qqqq, --wwww; "):
        parse(["--qqqq=1", "--wwww"])
    with pytest.raises(UsageError, match=r"not supported: --fp8_base.*; not supported: --loss_type"):
        parse(["--fp8_base", "--loss_type=huber"])
