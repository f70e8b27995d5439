"""Prompt files in all their forms, and the samplers that they name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorashrink.errors import InputError, UsageError
from lorashrink.pictures.prompts import Prompt, read_prompts
from lorashrink.pictures.samplers import check_samplers


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_with_all_switches_is_read(tmp_path: Path) -> None:
    file = written(
        tmp_path / "p.txt", "a cat, masterpiece --n low quality, --x --w 1024 --h 832 --d 1 --l 6.0 --s 40\n"
    )
    (prompt,) = read_prompts(file, sampler="euler_a")
    assert prompt == Prompt("a cat, masterpiece", "low quality,", 1024, 832, 1, 40, 6.0, "euler_a")


def test_defaults_are_those_of_sd_scripts(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path / "p.txt", "a cat")) == (
        Prompt("a cat", "", width=512, height=512, seed=None, steps=30, scale=7.5, sampler="ddim"),
    )


def test_blank_lines_and_comments_are_no_prompts(tmp_path: Path) -> None:
    file = written(tmp_path / "p.txt", "\ufeff# first\n\n  one  \n   \n#two\n # three\n")
    assert [prompt.prompt for prompt in read_prompts(file)] == ["one", "# three"]


@pytest.mark.parametrize(
    ("switch", "field", "value"),
    [
        ("--W 1023", "width", 1016),
        ("--h 7", "height", 64),
        ("--s 0", "steps", 1),
        ("--S 5000", "steps", 1000),
        ("--d 0", "seed", 0),
        ("--l 1", "scale", 1.0),
        ("--ss k_lms", "sampler", "k_lms"),
        ("--n ugly --n bad: 1, 2", "negative", "bad: 1, 2"),
    ],
)
def test_a_switch_sets_its_field(tmp_path: Path, switch: str, field: str, value: object) -> None:
    (prompt,) = read_prompts(written(tmp_path / "p.txt", f"a cat {switch}"))
    assert prompt == replace(Prompt("a cat"), **{field: value})


@pytest.mark.parametrize("switch", ["--g 3.5", "--cn a.png", "--w wide", "--d -1", "--ss ddpm", "--l nan", "--w"])
def test_unknown_switches_and_values_are_ignored_with_a_warning(
    tmp_path: Path, switch: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "p.txt", f"first\na cat {switch} --s 5")
    assert read_prompts(file)[1] == Prompt("a cat", steps=5)
    (message,) = caplog.messages
    assert message.startswith(f"{file}: sample 01: ignored")


FORMS = {
    "p.txt": "a cat --n bad --w 64 --s 3\na dog --n bad --w 128 --s 3",
    "p.toml": """
        [prompt]
        negative_prompt = "bad"
        width = 64
        sample_steps = 3
        [[prompt.subset]]
        prompt = "a cat"
        [[prompt.subset]]
        prompt = "a dog"
        width = 128
    """,
    "p.JSON": json.dumps(
        [
            {"prompt": "a cat", "negative_prompt": "bad", "width": 64, "sample_steps": 3, "seed": None},
            "a dog --n bad --w 128 --s 3",
        ]
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_txt_toml_and_json_give_the_same_prompts(tmp_path: Path, name: str) -> None:
    cat = Prompt("a cat", "bad", width=64, steps=3)
    assert read_prompts(written(tmp_path / name, FORMS[name])) == (
        cat,
        replace(cat, prompt="a dog", width=128),
    )


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("p.txt", "\n# nothing\n", UsageError),
        ("p.json", "[]", UsageError),
        ("p.csv", "a cat", UsageError),
        ("p.json", '{"prompt": "a cat"}', InputError),
        ("p.json", "[1]", InputError),
        ("p.json", "[", InputError),
        ("p.toml", "prompt = 'a cat'", InputError),
        ("p.toml", "[prompt]\nsubset = ['a cat']", InputError),
        ("p.toml", "[prompt", InputError),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        read_prompts(written(tmp_path / name, text))


def test_a_missing_file_and_an_encoding_besides_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.txt: cannot be read"):
        read_prompts(tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt.*UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_a_text_in_place_of_a_file_is_a_prompt(tmp_path: Path) -> None:
    assert read_prompts("a cat, v1.5 --w 64 --d 3", side=128) == (Prompt("a cat, v1.5", width=64, height=128, seed=3),)
    assert [prompt.prompt for prompt in read_prompts("one\n\ntwo")] == ["one", "two"]
    file = written(tmp_path / "p.txt", "from a file")
    assert read_prompts(str(file)) == read_prompts(file)


@pytest.mark.parametrize("name", ["no.txt", "my prompts.TOML", "folder/prompts.csv"])
def test_a_text_that_looks_like_a_file_must_be_one(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        read_prompts(name)


def test_pndm_needs_four_steps() -> None:
    check_samplers([Prompt(sampler="pndm", steps=4)])
    with pytest.raises(UsageError, match="sample 00: the sampler pndm cannot draw in 3 steps"):
        check_samplers([Prompt(sampler="pndm", steps=3)])
