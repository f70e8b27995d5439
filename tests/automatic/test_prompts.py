"""Prompts that an adapter is tried with: from its metadata, from files beside it, or from the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorashrink_example
from lorashrink.automatic.prompts import trial_of
from lorashrink.calibration.models import PROMPTS
from lorashrink.errors import UsageError

STYLE = lorashrink_example.path("loras", "style.safetensors")
EXAMPLE = lorashrink_example.path()

HEART = EXAMPLE / "loras" / "heart.safetensors"


def adapter_with(path: Path, metadata: dict[str, str]) -> Path:
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_{side}.weight": torch.ones(4, 4) for side in ("up", "down")}
    save_file(tensors, path, metadata)
    return path


def texts(source: Path, prompts: str | Path | None = None) -> list[str]:
    return [prompt.prompt for prompt in trial_of(source, prompts, side=64, scale=5.0).prompts]


@pytest.mark.parametrize(("source", "word"), [(STYLE, "sks style"), (HEART, "heart")])
def test_every_prompt_calls_what_the_adapter_was_taught(source: Path, word: str) -> None:
    trial = trial_of(source, None, side=64, scale=5.0)
    assert len(trial.prompts) == 6
    assert all(word in prompt.prompt for prompt in trial.prompts)
    assert len({prompt.prompt for prompt in trial.prompts}) == 6
    assert {(prompt.width, prompt.height, prompt.scale) for prompt in trial.prompts} == {(64, 64, 5.0)}


def test_tags_are_joined_with_the_trigger_word(tmp_path: Path) -> None:
    tags = {"mychar": 20, "1girl": 11, "smile": 9, "hat": 7, "outdoors": 5, "night": 4, "rain": 3}
    metadata = {"ss_tag_frequency": json.dumps({"10_mychar": tags}), "ss_num_train_images": "20"}
    prompts = texts(adapter_with(tmp_path / "a.safetensors", metadata))
    assert prompts
    assert all("mychar" in prompt for prompt in prompts)


def test_trigger_words_of_civitai_come_before_guesses(tmp_path: Path) -> None:
    source = adapter_with(tmp_path / "a.safetensors", {})
    (tmp_path / "a.civitai.info").write_text(json.dumps({"trainedWords": ["zxc person"]}))
    assert texts(source) == [f"zxc person, {plain}" for plain in PROMPTS[:6]]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"b": "c"}}', "[" * 100_000, '{"a": {" ": 1}}'])
def test_metadata_that_make_no_sense_leave_usual_prompts(tmp_path: Path, text: str) -> None:
    source = adapter_with(tmp_path / "a.safetensors", {"ss_tag_frequency": text, "ss_num_train_images": "x"})
    assert texts(source) == list(PROMPTS[:6])


def test_prompts_of_a_file_count_if_they_call_the_adapter() -> None:
    trial = trial_of(STYLE, EXAMPLE / "prompts.txt", side=64, scale=5.0)
    assert trial.calling == tuple("sks style" in prompt.prompt for prompt in trial.prompts) == (True, True, True, False)


def test_a_text_is_a_prompt_drawn_from_several_seeds() -> None:
    trial = trial_of(STYLE, "a cat, sks style", side=64, scale=5.0)
    assert {prompt.prompt for prompt in trial.prompts} == {"a cat, sks style"}
    assert len({prompt.seed for prompt in trial.prompts}) == len(trial.prompts) == 6


def test_a_missing_file_is_not_taken_for_a_prompt() -> None:
    with pytest.raises(UsageError, match="no such file"):
        trial_of(STYLE, "prompts.txt", side=64, scale=5.0)
