"""What trained files say about themselves: sd-scripts' keys and values, and ModelSpec's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl
from safetensors import safe_open

from lorashrink import __version__
from lorashrink.train.data.buckets import Fit
from lorashrink.train.data.scanning import Data, Dataset, Picture, Subset, scan
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.output.metadata import file_metadata, run_entries
from lorashrink.train.output.saving import run_length, save_adapter

# The names that sd-scripts' trainer writes in every run (48d368fa).
ALWAYS = set(
    shlex.split("""
    session_id training_started_at output_name learning_rate text_encoder_lr unet_lr num_train_images
    num_validation_images num_reg_images num_batches_per_epoch num_epochs gradient_checkpointing
    gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler network_module network_dim network_alpha
    network_dropout mixed_precision full_fp16 v2 base_model_version clip_skip max_token_length cache_latents seed lowram
    noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale zero_terminal_snr
    training_comment sd_scripts_commit_hash optimizer max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs
    caption_tag_dropout_rate face_crop_aug_range prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma
    debiased_estimation noise_offset_random_strength ip_noise_gamma_random_strength loss_type huber_schedule huber_scale
    huber_c fp8_base fp8_base_unet validation_seed validation_split max_validation_steps validate_every_n_epochs
    validate_every_n_steps resize_interpolation sd_model_name training_finished_at steps epoch
    """)
)
OF_FOLDERS = set(
    shlex.split("""
    batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket
    bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens dataset_dirs reg_dataset_dirs tag_frequency
    bucket_info
    """)
)
OF_DATASET_FILES = {"datasets", "tag_frequency", "dataset_dirs"}
SPEC = set(
    shlex.split(
        "sai_model_spec architecture implementation title resolution date implementation_version prediction_type"
    )
)

SIZE = (1024, 1024)
RULES = Options(shuffle_caption=True)
# Three pictures that are shown ten times, and four for regularisation.
PICTURES = Data(
    (
        Dataset(
            tuple(
                Picture(Path(f"{folder}/{number}.png"), caption, subset, Fit(SIZE, SIZE, SIZE), subset.repeats)
                for folder, captions, subset in (
                    ("10_zoë", ("zoë, hat", "zoë", "Zoë"), Subset(Path("/p/10_zoë"), 10, "zoë", False, RULES)),
                    ("1_person", ("person",) * 4, Subset(Path("/p/1_person"), 1, "person", True, RULES)),
                )
                for number, caption in enumerate(captions)
            ),
            Options(resolution="1024", train_batch_size=8, enable_bucket=True),
        ),
    ),
    (),
)


def entries_of(options: Options, data: Data = PICTURES) -> dict[str, str]:
    """The metadata of a file, with times and numbers that tests can name."""
    adamw = "torch.optim.adamw.AdamW(weight_decay=0.1)"
    run = run_entries(dataclasses.replace(options, seed=42), data, run_length(options, 20), 2, optimizer=adamw)
    run |= {"ss_session_id": 123, "ss_training_started_at": 1700000000.25}
    return file_metadata(options, run, steps=100, epoch=25, finished_at=1700003600.5)


def names(metadata: dict[str, str], beginning: str) -> set[str]:
    return {key.removeprefix(beginning) for key in metadata if key.startswith(beginning)}


def test_the_keys_are_those_of_sd_scripts() -> None:
    options = Options()
    entries = entries_of(options)
    assert names(entries, "ss_") == ALWAYS | OF_FOLDERS
    assert names(entries, "modelspec.") == SPEC
    assert len(entries) == len(ALWAYS | OF_FOLDERS) + len(SPEC)
    assert {type(value) for value in entries.values()} == {str}


def test_a_dataset_file_a_vae_and_network_arguments_change_the_keys(tmp_path: Path) -> None:
    base, vae = tmp_path / "b.ckpt", tmp_path / "v.safetensors"
    for path in (base, vae):
        path.write_bytes(path.name.encode())
    chosen = {"pretrained_model_name_or_path": str(base), "vae": str(vae)}
    entries = entries_of(Options(dataset_config="d.toml", network_args=("algo=locon",), **chosen))
    assert names(entries, "ss_") == ALWAYS | OF_DATASET_FILES | {
        "network_args", "sd_model_hash", "new_sd_model_hash", "vae_hash", "new_vae_hash", "vae_name",
    }  # fmt: skip
    assert entries["ss_sd_model_name"] == "b.ckpt"
    assert entries["ss_sd_model_hash"] == hashlib.sha256(b"").hexdigest()[:8]  # of what is at 1 MiB
    assert entries["ss_new_vae_hash"] == hashlib.sha256(b"v.safetensors").hexdigest()


def test_the_metadata_of_the_guides_command() -> None:
    options = parse(
        shlex.split("""--lowram --pretrained_model_name_or_path=/models/base-diffusers/ --train_data_dir=/training_dir
        --resolution=1024,1024 --output_dir=/output_dir --enable_bucket --network_alpha=4
        --network_module=lycoris.kohya --network_args algo=locon conv_dim=256 --network_dropout=0 --lr_scheduler=cosine
        --learning_rate=0.0001 --unet_lr=0.0001 --text_encoder_lr=0.0002 --network_dim=8 --output_name=mylora
        --scale_weight_norms=1 --mixed_precision=fp16 --caption_extension=.txt --cache_latents_to_disk
        --optimizer_type=AdamW --max_grad_norm=1 --keep_tokens=1 --multires_noise_iterations=10
        --multires_noise_discount=0.1 --gradient_accumulation_steps=6 --gradient_checkpointing --train_batch_size=8
        --max_train_steps=400 --shuffle_caption --sdpa --lr_warmup_steps=40""")
    )
    entries = entries_of(options)
    assert entries == {
        "ss_output_name": "mylora",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "0.0002",
        "ss_gradient_checkpointing": "True",
        "ss_gradient_accumulation_steps": "6",
        "ss_lr_scheduler": "cosine",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_dropout": "0.0",
        "ss_network_args": '{"algo": "locon", "conv_dim": "256", "dropout": 0.0}',
        "ss_mixed_precision": "fp16",
        "ss_full_fp16": "False",
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_clip_skip": "None",
        "ss_max_token_length": "None",
        "ss_cache_latents": "True",
        "ss_seed": "42",
        "ss_lowram": "True",
        "ss_noise_offset": "None",
        "ss_multires_noise_iterations": "10",
        "ss_multires_noise_discount": "0.1",
        "ss_adaptive_noise_scale": "None",
        "ss_zero_terminal_snr": "False",
        "ss_training_comment": "None",
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_max_grad_norm": "1.0",
        "ss_caption_dropout_rate": "0.0",
        "ss_caption_dropout_every_n_epochs": "0",
        "ss_caption_tag_dropout_rate": "0.0",
        "ss_face_crop_aug_range": "None",
        "ss_prior_loss_weight": "1.0",
        "ss_min_snr_gamma": "None",
        "ss_scale_weight_norms": "1.0",
        "ss_ip_noise_gamma": "None",
        "ss_debiased_estimation": "False",
        "ss_noise_offset_random_strength": "False",
        "ss_ip_noise_gamma_random_strength": "False",
        "ss_loss_type": "l2",
        "ss_huber_schedule": "snr",
        "ss_huber_scale": "1.0",
        "ss_huber_c": "0.1",
        "ss_fp8_base": "False",
        "ss_fp8_base_unet": "False",
        "ss_validation_seed": "None",
        "ss_validation_split": "0.0",
        "ss_max_validation_steps": "None",
        "ss_validate_every_n_epochs": "None",
        "ss_validate_every_n_steps": "None",
        "ss_resize_interpolation": "None",
        "ss_session_id": "123",
        "ss_training_started_at": "1700000000.25",
        "ss_num_train_images": "30",
        "ss_num_validation_images": "0",
        "ss_num_reg_images": "4",
        "ss_num_batches_per_epoch": "20",
        "ss_num_epochs": "100",  # 20 batches are 4 steps of 6
        "ss_max_train_steps": "400",
        "ss_lr_warmup_steps": "40",
        "ss_batch_size_per_device": "8",
        "ss_total_batch_size": "96",  # 8 pictures, 2 processes, 6 batches
        "ss_resolution": "(1024, 1024)",
        "ss_color_aug": "False",
        "ss_flip_aug": "False",
        "ss_random_crop": "False",
        "ss_shuffle_caption": "True",
        "ss_enable_bucket": "True",
        "ss_bucket_no_upscale": "False",
        "ss_min_bucket_reso": "256",
        "ss_max_bucket_reso": "1024",
        "ss_keep_tokens": "1",
        "ss_dataset_dirs": '{"10_zo\\u00eb": {"n_repeats": 10, "img_count": 3}}',
        "ss_reg_dataset_dirs": '{"1_person": {"n_repeats": 1, "img_count": 4}}',
        "ss_tag_frequency": '{"10_zo\\u00eb": {"zo\\u00eb": 3, "hat": 1}, "1_person": {"person": 4}}',
        "ss_bucket_info": '{"buckets": {"0": {"resolution": [1024, 1024], "count": 34}}, "mean_img_ar_error": 0.0}',
        "ss_sd_model_name": "/models/base-diffusers/",
        "ss_training_finished_at": "1700003600.5",
        "ss_steps": "100",
        "ss_epoch": "25",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "mylora",
        "modelspec.resolution": "1024x1024",
        "modelspec.date": "2023-11-14T23:13:20+00:00",
        "modelspec.implementation_version": f"lorashrink/{__version__}",
        "modelspec.prediction_type": "epsilon",
    }


def test_no_metadata_keeps_what_programs_need_and_what_users_wrote() -> None:
    options = Options(no_metadata=True, network_args=("algo=locon",), network_dim=8, metadata_author="Ann")
    entries = entries_of(options)
    assert names(entries, "ss_") == {
        "v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args",
    }  # fmt: skip
    assert names(entries, "modelspec.") == SPEC | {"author"}
    without = dataclasses.replace(options, network_args=())
    assert "ss_network_args" not in entries_of(without)


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (Options(), "ss_text_encoder_lr", "None"),
        (Options(text_encoder_lr=(1e-4, 2e-5)), "ss_text_encoder_lr", "0.0001"),  # as LyCORIS uses it
        (Options(lr_warmup_steps=0.1), "ss_lr_warmup_steps", "0.1"),
        (Options(max_train_epochs=3), "ss_max_train_steps", "60"),
        (Options(debiased_estimation_loss=True), "ss_debiased_estimation", "True"),
        (Options(v_parameterization=True), "modelspec.prediction_type", "v"),
        (Options(resolution="768"), "modelspec.resolution", "768x768"),
        (Options(resolution="832, 1216"), "modelspec.resolution", "832x1216"),
        (Options(), "modelspec.title", "LoRA@1700003600.5"),
        (Options(output_name="a", metadata_title="My LoRA"), "modelspec.title", "My LoRA"),
        (Options(min_timestep=0), "modelspec.timestep_range", "0,1000"),
        (Options(max_timestep=500), "modelspec.timestep_range", "0,500"),
        (Options(metadata_trigger_phrase="zoë"), "modelspec.trigger_phrase", "zoë"),
        (Options(metadata_is_negative_embedding="false"), "modelspec.is_negative_embedding", "false"),
        (Options(metadata_thumbnail="data:image/png;base64,AA=="), "modelspec.thumbnail", "data:image/png;base64,AA=="),
        (Options(training_comment="bad byte \udcff"), "ss_training_comment", "bad byte ?"),
    ],
)
def test_single_values(options: Options, key: str, value: str) -> None:
    assert entries_of(options)[key] == value


def base_entries(path: str) -> dict[str, str]:
    """The entries about the base; without hashes where it is no file."""
    entries = entries_of(Options(pretrained_model_name_or_path=path))
    return {key: value for key, value in entries.items() if "sd_model" in key}


@pytest.mark.parametrize("size", [10, 0x110000 + 5])
def test_a_base_that_is_a_file_has_both_hashes(tmp_path: Path, size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    (tmp_path / "base.safetensors").write_bytes(data)
    assert base_entries(str(tmp_path / "base.safetensors")) == {
        "ss_sd_model_name": "base.safetensors",
        "ss_sd_model_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
    }


@pytest.mark.parametrize("options", [{"no_metadata": True}, {"save_model_as": "ckpt"}, {"save_model_as": "pt"}])
def test_a_base_is_not_hashed_for_metadata_that_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "base.safetensors").write_bytes(b"base")
    monkeypatch.setattr("lorashrink.train.output.metadata.sha256_file", lambda path: pytest.fail(f"{path} was hashed"))
    entries_of(Options(pretrained_model_name_or_path=str(tmp_path / "base.safetensors"), **options))


@pytest.mark.parametrize("ending", ["", "/", "//", "/."])
def test_a_base_that_is_a_folder_has_a_name_even_with_a_slash_behind_it(tmp_path: Path, ending: str) -> None:
    (tmp_path / "base").mkdir()
    assert base_entries(f"{tmp_path}/base{ending}") == {"ss_sd_model_name": "base"}


def test_a_base_that_is_not_there_is_a_name_as_it_was_given() -> None:
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    assert base_entries(name) == {"ss_sd_model_name": name}


# --- pictures ------------------------------------------------------------------------------------


def _folders(tmp_path: Path) -> list[str]:
    tiny_sdxl.write_pictures(
        tmp_path / "train" / "3_cat",
        {"a.png": (128, 128), "b.png": (128, 256), "c.png": (130, 130)},
        {"a.png": "Cat, hat", "b.png": "cat,  , tree\nsecond, line"},
    )
    tiny_sdxl.write_pictures(tmp_path / "train" / "1_dog", {"a.png": (128, 128)}, {"a.png": "dog"})
    tiny_sdxl.write_pictures(tmp_path / "reg" / "2_pet", {"a.png": (128, 128), "b.png": (128, 128)})
    return [
        f"--train_data_dir={tmp_path}/train",
        f"--reg_data_dir={tmp_path}/reg",
        "--resolution=128",
        "--caption_extension=.txt",
        "--train_batch_size=2",
    ]


def test_pictures_are_counted_with_the_repeats_of_their_folders(tmp_path: Path) -> None:
    options = parse(
        [
            *_folders(tmp_path),
            "--enable_bucket",
            "--min_bucket_reso=70",
            "--max_bucket_reso=250",
            "--bucket_reso_steps=32",
            "--flip_aug",
        ]
    )
    entries = entries_of(options, scan(options))
    read = {
        key: json.loads(entries[f"ss_{key}"])
        for key in ("dataset_dirs", "reg_dataset_dirs", "tag_frequency", "bucket_info")
    }
    assert entries["ss_num_train_images"] == "10"  # 3 pictures 3 times, 1 once
    assert entries["ss_num_reg_images"] == "4"  # 2 pictures twice, though they are shown 10 times to even out
    assert entries["ss_resolution"] == "(128, 128)"
    assert entries["ss_flip_aug"] == "True"
    assert (entries["ss_min_bucket_reso"], entries["ss_max_bucket_reso"]) == ("64", "256")  # multiples of 32
    assert read["dataset_dirs"] == {
        "1_dog": {"n_repeats": 1, "img_count": 1},
        "3_cat": {"n_repeats": 3, "img_count": 3},
    }
    assert read["reg_dataset_dirs"] == {"2_pet": {"n_repeats": 2, "img_count": 2}}
    # The picture without a caption has its folder's words.
    assert read["tag_frequency"] == {
        "1_dog": {"dog": 1},
        "3_cat": {"cat": 3, "hat": 1, "tree": 1},
        "2_pet": {"pet": 2},
    }
    assert read["bucket_info"]["buckets"] == {
        "0": {"resolution": [96, 160], "count": 3},  # 0.6 is the bucket's aspect nearest to 0.5
        "1": {"resolution": [128, 128], "count": 17},
    }


def test_the_mean_difference_of_aspect_counts_each_picture_once() -> None:
    fits = [
        (Fit((1500, 1000), (1024, 683), (1024, 640)), 10),  # |1.6 - 1.5| = 0.1
        (Fit((1600, 1000), (1024, 640), (1024, 640)), 3),  # 0
        (Fit((512, 512), (512, 512), (512, 512)), 1),  # 0
        (Fit((500, 1000), (512, 1024), (512, 640)), 2),  # |0.8 - 0.5| = 0.3
    ]
    subset = Subset(Path("/p/1_x"), 1, "x", False, Options())
    pictures = tuple(Picture(Path("1_x/a.png"), "", subset, fit, repeats) for fit, repeats in fits)
    data = Data((Dataset(pictures, Options(resolution="1024", enable_bucket=True)),), (subset,))
    report = json.loads(entries_of(Options(), data)["ss_bucket_info"])
    assert report["mean_img_ar_error"] == pytest.approx(0.1)
    assert report["buckets"] == {
        "0": {"resolution": [512, 512], "count": 1},
        "1": {"resolution": [512, 640], "count": 2},
        "2": {"resolution": [1024, 640], "count": 13},
    }


def test_without_buckets_there_is_nothing_to_say_about_them(tmp_path: Path) -> None:
    options = parse(_folders(tmp_path))
    entries = entries_of(options, scan(options))
    assert {
        key: entries[f"ss_{key}"] for key in ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_info")
    } == {
        "enable_bucket": "False",
        "min_bucket_reso": "None",
        "max_bucket_reso": "None",
        "bucket_info": "null",
    }


def test_a_dataset_file_is_described_dataset_by_dataset(tmp_path: Path) -> None:
    _folders(tmp_path)
    (tmp_path / "d.toml").write_text(
        f"""
        [general]
        caption_extension = ".txt"
        shuffle_caption = true
        [[datasets]]
        resolution = 128
        batch_size = 4
          [[datasets.subsets]]
          image_dir = "{tmp_path}/train/3_cat"
          num_repeats = 5
          keep_tokens = 2
          [[datasets.subsets]]
          image_dir = "{tmp_path}/reg/2_pet"
          is_reg = true
          class_tokens = "pet"
        [[datasets]]
        resolution = [64, 128]
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 128
        bucket_reso_steps = 32
          [[datasets.subsets]]
          image_dir = "{tmp_path}/train/3_cat"
        """
    )
    options = parse([f"--dataset_config={tmp_path}/d.toml"])
    entries = entries_of(options, scan(options))
    first, second = json.loads(entries["ss_datasets"])
    assert entries["ss_num_train_images"] == "18"
    assert json.loads(entries["ss_dataset_dirs"]) == {
        "3_cat": {"n_repeats": 5, "img_count": 3},
        "3_cat (2)": {"n_repeats": 1, "img_count": 3},
    }
    assert list(json.loads(entries["ss_tag_frequency"])) == ["3_cat", "2_pet"]
    assert first["subsets"][0] == {
        "img_count": 3,
        "num_repeats": 5,
        "color_aug": False,
        "flip_aug": False,
        "random_crop": False,
        "shuffle_caption": True,
        "keep_tokens": 2,
        "keep_tokens_separator": "",
        "secondary_separator": None,
        "enable_wildcard": False,
        "caption_prefix": None,
        "caption_suffix": None,
        "resize_interpolation": None,
        "image_dir": "3_cat",
        "class_tokens": "",
        "is_reg": False,
    }
    assert first["subsets"][1]["is_reg"] is True
    assert {
        key: first[key] for key in ("batch_size_per_device", "num_train_images", "num_reg_images", "resolution")
    } == {
        "batch_size_per_device": 4,
        "num_train_images": 15,
        "num_reg_images": 2,
        "resolution": [128, 128],
    }
    assert (second["resolution"], second["enable_bucket"], second["min_bucket_reso"]) == ([64, 128], True, 32)
    assert first.keys() == second.keys()
    # The keys of a dataset in sd-scripts.
    assert first.keys() == {
        "is_dreambooth", "batch_size_per_device", "num_train_images", "num_reg_images", "resolution", "enable_bucket",
        "min_bucket_reso", "max_bucket_reso", "tag_frequency", "bucket_info", "resize_interpolation", "subsets",
    }  # fmt: skip


def test_the_metadata_survives_a_file(tmp_path: Path) -> None:
    options = Options(training_comment='Zoë said "yes"\n\t☃', network_args=("algo=locon",))
    entries = entries_of(options)
    path = save_adapter(tmp_path / "a.safetensors", {}, entries)
    with safe_open(path, "pt") as opened:
        read = opened.metadata()
    assert {key: text for key, text in read.items() if not key.startswith("sshs_")} == entries
    assert {key for key in read if key.startswith("sshs_")} == {"sshs_model_hash", "sshs_legacy_hash"}
