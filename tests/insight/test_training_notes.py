"""Metadata in plain words: of our own trainer's spelling, of other programs', and broken."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashrink.insight.training_notes import training_notes

# As sd-scripts writes them.
METADATA = {
    "ss_output_name": "cat",
    "modelspec.title": "A cat",
    "modelspec.author": "Ada",
    "modelspec.license": "CC0-1.0",
    "ss_training_started_at": "1700000000.5",
    "ss_training_finished_at": "1700007260.5",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_new_sd_model_hash": "31e35c80fc",
    "ss_sd_model_hash": "be9edd61",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps({"algo": "locon", "conv_dim": "256", "conv_alpha": "4"}),
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_steps": "400",
    "ss_max_train_steps": "1600",
    "ss_epoch": "3",
    "ss_num_epochs": "3",
    "ss_total_batch_size": "4",
    "ss_gradient_accumulation_steps": "2",
    "ss_learning_rate": "0.0004",
    "ss_unet_lr": "0.0003",
    "ss_text_encoder_lr": "None",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,eps=1e-06)",
    "ss_lr_scheduler": "cosine",
    "ss_lr_warmup_steps": "100",
    "ss_min_snr_gamma": "5.0",
    "ss_noise_offset": "None",
    "ss_clip_skip": "None",
    "ss_mixed_precision": "fp16",
    "ss_seed": "42",
    "ss_num_train_images": "130",
    "ss_dataset_dirs": json.dumps(
        {"2_cat": {"n_repeats": 2, "img_count": 60}, "1_dog": {"n_repeats": 1, "img_count": 10}}
    ),
    "ss_reg_dataset_dirs": json.dumps({"1_animal": {"n_repeats": 1, "img_count": 100}}),
    "ss_resolution": "(1024, 1024)",
    "ss_bucket_info": json.dumps(
        {"buckets": {"0": {"resolution": [832, 1216], "count": 20}, "1": {"resolution": [1024, 1024], "count": 110}}}
    ),
    "ss_tag_frequency": json.dumps({"2_cat": {"cat": 60, "grass": 5}, "1_dog": {"dog": 10, "grass": 3}}),
    "ss_shuffle_caption": "True",
    "ss_keep_tokens": "1",
    "ss_training_comment": "None",
}  # fmt: skip


def test_entries_of_sd_scripts_become_notes_in_order() -> None:
    notes = training_notes(METADATA)
    expected = {
        "title": "A cat",
        "author": "Ada",
        "licence": "CC0-1.0",
        "date": "2023-11-15 00:14 UTC",
        "training time": "2 h 1 min",
        "base model": "sd_xl_base_1.0.safetensors (SDXL 1.0)",
        "base hash": "SHA-256 31e35c80fc, short be9edd61",
        "network": "LyCORIS, locon (lycoris.kohya)",
        "rank and alpha": "rank 8, alpha 4.0",
        "network arguments": "algo=locon, conv_dim=256, conv_alpha=4",
        "steps": "400 of 1600 steps",
        "epochs": "3 epochs",
        "batch": "4 pictures, gradients of 2 batches together",
        "learning rate": "0.0004, UNet 0.0003",
        "optimizer": "AdamW8bit (weight_decay=0.1, eps=1e-06)",
        "schedule": "cosine, 100 steps of warm-up",
        "objective": "min-SNR gamma 5",
        "precision": "fp16",
        "seed": "42",
        "pictures": "70, 130 shown per epoch: 2_cat 60 × 2, 1_dog 10 × 1, 1_animal 100 × 1 (regularisation)"
        " (pictures × repeats)",
        "resolution": "1024×1024",
        "buckets": "2 sizes; 1024×1024 (110), 832×1216 (20)",
        "captions": "shuffled, first 1 token kept in place",
        "frequent tags": "cat (60), dog (10), grass (8)",
    }
    assert list(notes.items()) == list(expected.items())


def test_a_dataset_file_gives_the_same_notes_as_folders() -> None:
    subsets = [{"image_dir": "cats", "img_count": 60, "num_repeats": 2, "is_reg": False}]
    dataset = {
        "resolution": [512, 768],
        "batch_size_per_device": 3,
        "bucket_info": {"buckets": {"0": {"resolution": [512, 768], "count": 120}}},
        "tag_frequency": {"cats": {"cat": 60}},
        "subsets": subsets,
    }
    notes = training_notes({"ss_datasets": json.dumps([dataset])})
    assert notes == {
        "batch": "3 pictures",
        "pictures": "60: cats 60 × 2 (pictures × repeats)",
        "resolution": "512×768",
        "buckets": "1 size; 512×768 (120)",
        "frequent tags": "cat (60)",
    }


def test_a_resize_has_a_note() -> None:
    params = json.dumps({"recipe_str": "fro_ckpt=1,thr=-3.55", "rescale": 0.8})
    ours = {"lorashrink.recipe": "rank=4", "lorashrink.energy": "0.992000", "lorashrink.version": "0.3.0"}
    assert (
        training_notes({"resize_params": params})["resized"] == "fro_ckpt=1,thr=-3.55, strength × 0.8, by resize_lora"
    )
    assert training_notes(ours)["resized"] == "rank=4, 99.2 % of the energy kept, by lorashrink 0.3.0"


def test_settings_of_diffusers_have_a_note() -> None:
    settings = {"unet.r": 16, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 4}
    notes = training_notes({"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    assert notes == {"rank and alpha": "unet rank 16, alpha 8; text_encoder rank 4, alpha 4"}


def test_empty_metadata_has_no_notes() -> None:
    assert training_notes({}) == {}
    assert training_notes(dict.fromkeys(METADATA, "None")) == {}


def test_notes_are_short_and_printable() -> None:
    notes = training_notes({"modelspec.title": "a\x1b[31mred\nline", "modelspec.description": "long " * 1000})
    assert notes["title"] == r"a\x1b[31mred line"
    assert len(notes["description"]) == 240


def test_impossible_times_are_left_out() -> None:
    assert "date" not in training_notes({"ss_training_finished_at": "1e300"})


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", '"x"', "7", "{}", '{"a": 1}', '{"buckets": {"0": [3]}}', "[" * 100_000]
)
def test_broken_entries_leave_the_others_readable(text: str) -> None:
    every = {key: text for key, value in METADATA.items() if value.startswith("{")}
    notes = training_notes({**METADATA, **every, "ss_datasets": text, "resize_params": text})
    assert notes["steps"] == "400 of 1600 steps"
    assert "frequent tags" not in notes


words = st.sampled_from(
    ["a.r", "buckets", "0", "subsets", "resolution", "count", "img_count", "recipe_str", "rescale", "bucket_info"]
)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)
keys = st.sampled_from(
    [*METADATA, "ss_datasets", "resize_params", "lora_adapter_metadata", "lorashrink.energy", "ss_enable_bucket"]
)


LABELS = (
    *("title", "author", "licence", "description", "trigger words", "hint", "date", "training time", "base model"),
    *("base hash", "VAE", "network", "rank and alpha", "network arguments", "steps", "epochs", "batch"),
    *("learning rate", "optimizer", "schedule", "objective", "precision", "seed", "pictures", "resolution"),
    *("buckets", "captions", "frequent tags", "resized", "comment"),
)


@given(st.dictionaries(keys, values.map(json.dumps) | st.text(max_size=12), max_size=8))
def test_any_metadata_gives_lines_of_text(metadata: dict[str, str]) -> None:
    notes = training_notes(metadata)
    assert list(notes) == [label for label in LABELS if label in notes]
    for text in notes.values():
        assert text
        assert text == " ".join(text.split())
