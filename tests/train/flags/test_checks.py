"""What is refused before a model is loaded, and what is only pointed out. The rules are sd-scripts' unless said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorashrink.errors import InputError, OutputError, UsageError
from lorashrink.train.flags.checks import LEARNING_RATES, check, parse_resolution
from lorashrink.train.flags.options import parse
from lorashrink.train.run.optimizers import make_optimizer, make_scheduler


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    """Options without anything to say about; what they name exists, and holds nothing."""
    for name in ("base", "pictures", "state"):
        (tmp_path / name).mkdir()
    for name in ("prompts.txt", "adapter.safetensors", "data.toml"):
        (tmp_path / name).touch()
    return [
        f"--pretrained_model_name_or_path={tmp_path / 'base'}",
        f"--train_data_dir={tmp_path / 'pictures'}",
        f"--output_dir={tmp_path / 'out'}",
        "--network_module=lycoris.kohya",
        "--network_dim=4",
        "--resolution=1024",
    ]


def refused(arguments: list[str]) -> str:
    with pytest.raises((UsageError, OutputError)) as caught:
        check(parse(arguments))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_options_that_are_good_are_not_commented(good: list[str]) -> None:
    assert check(parse(good)) == []


def test_everything_that_is_missing_is_named_at_once() -> None:
    text = refused([])

    for name in ("pretrained_model_name_or_path", "train_data_dir", "resolution", "output_dir", "network_module"):
        assert f"--{name}" in text


def test_a_dataset_file_stands_for_folder_and_resolution(good: list[str], tmp_path: Path) -> None:
    rest = [word for word in good if not word.startswith(("--train_data_dir", "--resolution"))]

    assert check(parse([*rest, f"--dataset_config={tmp_path / 'data.toml'}"])) == []


@pytest.mark.parametrize(
    "name",
    [
        "pretrained_model_name_or_path", "vae", "train_data_dir", "reg_data_dir", "dataset_config", "sample_prompts",
        "network_weights", "base_weights", "resume", "tokenizer_cache_dir", "model_config",
    ],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_refused(name: str, good: list[str], tmp_path: Path) -> None:
    text = refused([*good, f"--{name}", str(tmp_path / "nowhere.txt")])

    assert f"--{name}: there is no f" in text
    assert "nowhere.txt" in text


def test_a_file_is_no_folder_for_pictures_or_results(good: list[str], tmp_path: Path) -> None:
    assert "no folder" in refused([*good, f"--train_data_dir={tmp_path / 'prompts.txt'}"])
    assert "is no folder" in refused([*good, f"--output_dir={tmp_path / 'prompts.txt'}"])


# What sd-scripts refuses (library/train_util.py, sdxl_train_network.py), with what the message must name.
REFUSED = [
    ("--v2", "--v2"),
    ("--color_aug --cache_latents", "--color_aug"),
    ("--random_crop --cache_latents", "--random_crop"),
    ("--cache_text_encoder_outputs", "--network_train_unet_only"),
    ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"),
    ("--cache_text_encoder_outputs --network_train_unet_only --shuffle_caption", "--shuffle_caption"),
    ("--cache_text_encoder_outputs --network_train_unet_only --caption_dropout_rate=.1", "_dropout_"),
    ("--cache_text_encoder_outputs --network_train_unet_only --caption_tag_dropout_rate=.1", "_dropout_"),
    ("--bucket_reso_steps=48", "multiple of 32"),
    ("--enable_bucket --resolution=512,1024 --min_bucket_reso=768", "--min_bucket_reso"),
    ("--enable_bucket --resolution=512,1536", "--max_bucket_reso"),
    ("--adaptive_noise_scale=0.1", "--noise_offset"),
    ("--scale_v_pred_loss_like_noise_pred", "--v_parameterization"),
    ("--v_pred_like_loss=0.1 --v_parameterization", "--v_pred_like_loss"),
    ("--lr_warmup_steps=10", "--lr_warmup_steps"),
    ("--lr_warmup_steps=10 --lr_scheduler=piecewise_constant", "--lr_warmup_steps"),
    ("--lr_warmup_steps=10% --lr_scheduler_type=torch.optim.lr_scheduler.ConstantLR", "--lr_warmup_steps"),
    ("--lr_warmup_steps=10 --lr_scheduler=adafactor --optimizer_type=Adafactor", "--lr_warmup_steps"),
    ("--lr_scheduler=adafactor", "Adafactor"),
    ("--log_with=tensorboard", "--logging_dir"),
    ("--log_with=all", "--logging_dir"),
    ("--full_bf16", "--mixed_precision=bf16"),
    ("--full_bf16 --mixed_precision=fp16", "--mixed_precision=bf16"),
    ("--use_8bit_adam --use_lion_optimizer", "--use_lion_optimizer"),
    ("--use_8bit_adam --optimizer_type=AdamW", "--optimizer_type"),
    ("--min_timestep=500 --max_timestep=400", "--max_timestep=400"),
    ("--network_module=networks.oft", "--network_module"),
    ("--dim_from_weights", "--network_weights"),
    # Of lorashrink, where sd-scripts fails later, or does something that was not asked for.
    ("--network_train_unet_only --network_train_text_encoder_only", "--network_train_text_encoder_only"),
    ("--base_weights {tmp}/adapter.safetensors --base_weights_multiplier 1 2", "--base_weights_multiplier"),
    ("--cache_text_encoder_outputs --network_train_unet_only --caption_dropout_every_n_epochs=2", "_dropout_"),
    ("--persistent_data_loader_workers --max_data_loader_n_workers=0", "--max_data_loader_n_workers"),
    ("--resolution=1020", "multiples of 8"),
    ("--enable_bucket --min_bucket_reso=32", "--min_bucket_reso"),
    ("--enable_bucket --bucket_no_upscale --resolution=48", "too small for a bucket in steps of 64"),
    ("--lr_scheduler=cosin", "cosine_with_restarts"),
    ("--lr_scheduler=linear --lr_warmup_steps=1.5", "shares"),
    ("--shrink fro_ckpt=1,thr=-3.55 --save_model_as=ckpt", "--save_model_as"),
    ("--shrink fro_ckp=1,thr=-3.55", "fro_ckpt"),
    ("--shrink fro_ckpt=1", "recipe"),
    ("--network_args algo=ia3", "ia3"),
    ("--optimizer_type=DAdaptAdam", "not supported: --optimizer_type DAdaptAdam"),
    ("--optimizer_type=SGD", "dotted path"),
    ("--output_name=a/b", "--output_name=a/b"),
    ("--metadata_thumbnail=cover.png", "data URL"),
    ("--output_name=..", "no path"),
    ("--output_name=a\\b", "no path"),
    ("--enable_wildcard", "not supported: --enable_wildcard"),
    ("--token_warmup_step=9", "not supported: --token_warmup_step"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), REFUSED)
def test_options_that_do_not_go_together_are_refused(
    arguments: str, named: str, good: list[str], tmp_path: Path
) -> None:
    assert named in refused([*good, *arguments.format(tmp=tmp_path).split()])


@pytest.mark.parametrize(
    "arguments",
    [
        "--cache_text_encoder_outputs --network_train_unet_only",
        "--cache_latents --flip_aug",
        "--enable_bucket --max_bucket_reso=2048 --bucket_reso_steps=32",
        "--enable_bucket --max_bucket_reso=2048 --resolution=1000",
        "--noise_offset=0.05 --adaptive_noise_scale=0.01 --multires_noise_iterations=6",
        "--v_parameterization --scale_v_pred_loss_like_noise_pred --zero_terminal_snr",
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=10%",
        "--lr_scheduler=adafactor --optimizer_type=transformers.optimization.Adafactor",
        "--full_bf16 --mixed_precision=bf16",
        "--min_timestep=0 --max_timestep=1000",
        "--logging_dir={tmp}/logs --log_prefix=run",
        "--sample_prompts={tmp}/prompts.txt --sample_every_n_steps=100",
        "--base_weights {tmp}/adapter.safetensors --base_weights_multiplier 0.5",
        "--shrink fro_ckpt=1,thr=-3.55 rank=4",
        "--save_every_n_epochs=1 --save_last_n_epochs=2 --save_every_n_steps=5 --save_last_n_steps=9",
        "--max_train_epochs=3 --gradient_accumulation_steps=2",
    ],
)
def test_options_that_go_together_are_not_commented(arguments: str, good: list[str], tmp_path: Path) -> None:
    assert check(parse([*good, *arguments.format(tmp=tmp_path).split()])) == []


@pytest.mark.parametrize(
    ("name", "bad", "fine"),
    [
        ("train_batch_size", "0", "1"),
        ("vae_batch_size", "0", "1"),
        ("gradient_accumulation_steps", "0", "1"),
        ("max_train_steps", "0", "1"),
        ("max_train_epochs", "0", "1"),
        ("network_dim", "0", "1"),
        ("save_every_n_epochs", "0", "1"),
        ("save_every_n_steps", "-1", "1"),
        ("save_last_n_epochs", "0", "1"),
        ("keep_tokens", "-1", "0"),
        ("max_data_loader_n_workers", "-1", "0"),
        ("network_alpha", "-1", "0"),
        ("network_dropout", "1.5", "0"),
        ("learning_rate", "-1e-4", "1e-4"),
        ("learning_rate", "nan", "0"),
        ("unet_lr", "inf", "0"),
        ("text_encoder_lr", "-1", "0"),
        ("noise_offset", "nan", "0"),
        ("max_grad_norm", "-1", "0"),
        ("scale_weight_norms", "-1", "0"),
        ("min_snr_gamma", "-5", "0"),
        ("prior_loss_weight", "-1", "1"),
        ("multires_noise_iterations", "-1", "0"),
        ("caption_dropout_rate", "1.1", "1"),
        ("caption_tag_dropout_rate", "-0.1", "0"),
        ("min_timestep", "-1", "0"),
        ("min_timestep", "1000", "999"),
        ("max_timestep", "0", "1000"),
        ("max_timestep", "1001", "1"),
        ("seed", "-1", "0"),
        ("seed", "4294967296", "4294967295"),
        ("resolution", "1024x1024", "1024,1024"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, bad: str, fine: str, good: list[str]) -> None:
    assert f"--{name}" in refused([*good, f"--{name}={bad}"])
    check(parse([*good, f"--{name}={fine}"]))


NOTED = [
    ("--dataset_repeats=3", "--dataset_repeats"),
    ("--clip_skip=2", "--clip_skip"),
    ("--highvram", "--highvram"),
    ("--disable_mmap_load_safetensors", "--disable_mmap_load_safetensors"),
    ("--sdpa --mem_eff_attn", "--mem_eff_attn has no effect"),
    ("--xformers", "--xformers has no effect"),
    ("--skip_cache_check", "--skip_cache_check has no effect"),
    ("--mixed_precision=fp16", "--no_half_vae"),
    ("--caption_extension=txt", "--caption_extension=txt"),
    ("--base_weights {tmp}/adapter.safetensors", "--base_weights_multiplier"),
    ("--max_train_epochs=2 --max_train_steps=400", "--max_train_steps=400"),
    ("--lr_scheduler=linear --lr_warmup_steps=400 --max_train_steps=400", "--lr_warmup_steps=400"),
    ("--lr_scheduler=cosine --lr_scheduler_num_cycles=3", "cosine_with_restarts"),
    ("--multires_noise_discount=0.1", "--multires_noise_iterations"),
    ("--noise_offset_random_strength", "--noise_offset"),
    ("--zero_terminal_snr", "--v_parameterization"),
    ("--save_n_epoch_ratio=2 --save_every_n_epochs=1", "--save_n_epoch_ratio"),
    ("--save_last_n_epochs=2", "--save_every_n_epochs"),
    ("--save_last_n_steps=2", "--save_every_n_steps"),
    ("--save_last_n_steps_state=2", "--save_state"),
    ("--save_last_n_epochs_state=2", "--save_state"),
    ("--save_model_as=ckpt", "metadata"),
    ("--cache_text_encoder_outputs_to_disk --network_train_unet_only", "in memory"),
    ("--sample_every_n_steps=2", "--sample_prompts"),
    ("--sample_every_n_epochs=2", "--sample_prompts"),
    ("--sample_at_first", "--sample_prompts"),
    ("--sample_prompts={tmp}/prompts.txt", "--sample_every_n_steps"),
    ("--sample_prompts={tmp}/prompts.txt --sample_every_n_steps=0 --sample_at_first", "draws nothing"),
    ("--sample_prompts={tmp}/prompts.txt --sample_every_n_steps=5 --sample_every_n_epochs=1", "is not used"),
    ("--log_prefix=run", "--logging_dir"),
    ("--enable_bucket --bucket_no_upscale", "--bucket_no_upscale"),
    ("--enable_bucket --min_bucket_reso=300 --max_bucket_reso=2048", "no multiple of --bucket_reso_steps=64; 256 is"),
    ("--enable_bucket --max_bucket_reso=2000", "--max_bucket_reso=2000 is no multiple"),
    ("--network_alpha=8", "--network_alpha"),
    ("--text_encoder_lr 1e-4 1e-5", "--text_encoder_lr"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), NOTED)
def test_misleading_options_are_pointed_out_once(arguments: str, named: str, good: list[str], tmp_path: Path) -> None:
    (line,) = check(parse([*good, *arguments.format(tmp=tmp_path).split()]))

    assert named in line
    assert "\n" not in line


def test_only_the_default_largest_bucket_gets_a_hint(good: list[str]) -> None:
    (hint,) = check(parse([*good, "--enable_bucket"]))

    assert "--max_bucket_reso=2048" in hint
    assert check(parse([*good, "--enable_bucket", "--max_bucket_reso=2048"])) == []


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        ("--log_with=wandb", "wandb"),
        ("--optimizer_type=AdamW8bit", "bitsandbytes"),
        ("--use_8bit_adam", "bitsandbytes"),
        ("--use_lion_optimizer", "lion-pytorch"),
        ("--optimizer_type=lion", "lion-pytorch"),
        ("--optimizer_type=Prodigy", "prodigyopt"),
        ("--logging_dir=logs", "tensorboard"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_how_to_get_it(
    arguments: str, package: str, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An entry of None is Python's own way to say that a module is not there.
    monkeypatch.setattr(sys, "path", [])
    for name in list(sys.modules):
        if name.partition(".")[0] == package.replace("-", "_"):
            monkeypatch.delitem(sys.modules, name)

    assert f"pip install {package}" in refused([*good, *arguments.split()])


@pytest.mark.parametrize(("text", "expected"), [("1024", (1024, 1024)), ("1024,768", (1024, 768)), ("8, 16", (8, 16))])
def test_a_resolution_is_one_size_or_two(text: str, expected: tuple[int, int]) -> None:
    assert parse_resolution(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1024x768", "1,2,3", "0", "-8", "8,", "1e3"])
def test_other_resolutions_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--resolution="):
        parse_resolution(text)


@pytest.mark.parametrize("name", sorted(set(LEARNING_RATES) - {"adafactor"}))
def test_every_course_of_the_learning_rate_that_passes_exists(name: str) -> None:
    import torch

    arguments = ["--lr_scheduler_args", "step_rules='1:10,0.1'"] if name == "piecewise_constant" else []
    options = parse([f"--lr_scheduler={name}", "--lr_scheduler_min_lr_ratio=0.1", *arguments])
    optimizer, _ = make_optimizer(options, [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])

    assert make_scheduler(options, optimizer, 10).get_last_lr() == [pytest.approx(1, abs=1)]


def test_a_preset_file_that_is_no_toml_is_an_input_error(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "preset.toml").write_text("=")

    with pytest.raises(InputError, match=r"preset\.toml"):
        check(parse([*good, "--network_args", f"preset={tmp_path / 'preset.toml'}"]))


# --- the program ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--spda", "--sdpa"),
        ("--cache_text_encoder_outputs", "--network_train_unet_only"),
        ("--log_with=tensorboard", "--logging_dir"),
    ],
)
def test_the_program_stops_with_one_line_before_anything_heavy_is_imported(
    arguments: str, named: str, good: list[str], tmp_path: Path
) -> None:
    # Of these packages only an import fails, so that importing one would be seen.
    for package in ("torch", "diffusers", "transformers", "accelerate", "lycoris"):
        (tmp_path / f"{package}.py").write_text(f"raise SystemExit('{package} was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-m", "lorashrink.train", *good, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert 1 <= len(done.stderr.splitlines()) <= 2
    assert named in done.stderr
    assert not (tmp_path / "out").exists()
