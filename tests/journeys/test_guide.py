"""The guide's commands run in their order, on a tiny model; its names and numbers are those of the program."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_sdxl
import training
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.pictures.prompts import read_prompts
from lorashrink.train.command import main
from lorashrink.train.flags.checks import check
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.output.saving import adapter_path, epochs_due, run_length

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
PROMPTS = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)[0]
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
MAIN = next(words[2:] for words in COMMANDS if "--output_config" in words)

# What makes a run a matter of seconds: two steps of small pictures.
SMALL = {
    "resolution": "64,64",
    "min_bucket_reso": "32",
    "max_bucket_reso": "128",
    "max_data_loader_n_workers": "0",
    "max_train_steps": "2",
    "train_batch_size": "1",
    "gradient_accumulation_steps": "1",
    "learning_rate": "0.01",
    "unet_lr": "0.01",
    "text_encoder_lr": "0.01",
    "mixed_precision": "no",
    "save_every_n_steps": "1",
    "sample_every_n_steps": "2",
    "resume": "out/teapot-step00000001-state",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the guide speaks of."""
    tiny_sdxl.write_model(tmp_path / "base")
    tiny_sdxl.write_pictures(
        tmp_path / "pictures" / "10_red teapot",
        {"one.png": (64, 64), "two.jpg": (96, 64)},
        {"one.png": "redteapot, on a wooden table, steam", "two.jpg": "redteapot, in the snow"},
    )
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flag(word: str) -> str:
    """The name in `--name=value`; empty for what is no flag."""
    return word.partition("=")[0].removeprefix("--") if word.startswith("--") else ""


def small(words: Sequence[str]) -> list[str]:
    """The same command for the tiny model."""
    return [f"--{flag(word)}={SMALL[flag(word)]}" if flag(word) in SMALL else word for word in words]


def run(words: list[str]) -> None:
    """Run a command of the guide; what belongs to other programs, or needs several GPUs, is only looked at."""
    match words:
        case ["pip", "install", what]:
            assert what == ".[train]"
            assert "train" in importlib.metadata.metadata("lorashrink").get_all("Provides-Extra", [])
        case ["tensorboard", logs]:
            assert list(Path(logs.removeprefix("--logdir=")).rglob("*.tfevents.*"))
        case ["accelerate", "launch", *rest]:
            launch = launch_command_parser().parse_args(rest)
            assert launch.module
            assert launch.training_script == "lorashrink.train"
            assert check(parse(launch.training_script_args)) == []
        case ["lorashrink", "train", *flags] if {"--output_config", "--plan"} & set(flags):
            assert main(small(flags)) == 0
        case ["lorashrink", "train", *flags] if "--help" not in flags:
            assert check(parse(small(flags))) == []
            training.run(small(flags))
        case ["lorashrink", *rest]:
            result = CliRunner().invoke(app, rest)
            assert result.exit_code == 0, result.output
        case _:
            pytest.fail(f"the guide has a command that no test knows: {shlex.join(words)}")


def test_every_command_works_in_the_order_of_the_guide(folder: Path) -> None:
    assert read_prompts(folder / "prompts.txt")
    first = re.sub(r"--(w|h) \d+", r"--\1 64", PROMPTS.splitlines()[0])
    (folder / "prompts.txt").write_text(re.sub(r"--s \d+", "--s 2", first))
    for words in COMMANDS:
        run(words)
    original = folder / "out" / "teapot.safetensors"
    for target in ("small", "out"):
        shrunk = folder / target / "teapot_frockpt1_th-3.55.safetensors"
        assert 0 < shrunk.stat().st_size < original.stat().st_size
    assert (folder / "out" / "sample" / "teapot_000002_sheet.png").stat().st_size > 0
    assert list((folder / "logs").glob("teapot-*/loss.png"))


def test_main_command_gets_no_warning(folder: Path) -> None:
    options = parse(MAIN)
    assert check(options) == []
    assert parse(small(MAIN)) != options
    assert {flag(word) for word in MAIN} > SMALL.keys() - {"save_every_n_steps", "resume"}


def test_prompt_file_is_read_without_warnings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = read_prompts(folder / "prompts.txt")
    assert [prompt.seed for prompt in prompts] == [1, 2, 3]
    assert {(prompt.steps, prompt.scale) for prompt in prompts} == {(30, 6.0)}
    assert not caplog.records


def test_every_flag_is_one_of_the_trainer() -> None:
    trainer_flags = set(Options.__dataclass_fields__)
    of_prompts, of_others = {"n", "w", "h", "d", "s", "l", "ss"}, {"local-dir", "spda"}
    in_commands = {flag(word) for words in COMMANDS if words[:2] == ["lorashrink", "train"] for word in words}
    in_prose = set(re.findall(r"--([a-z][\w-]*)", PROSE))
    assert len(in_prose) > 40
    assert in_commands - trainer_flags == {"", "help"}
    assert in_prose - trainer_flags == of_prompts | of_others | {"help"}


def test_every_flag_of_the_main_command_is_explained() -> None:
    explained = set(re.findall(r"`--(\w+)", PROSE))
    assert {flag(word) for word in MAIN} - {""} <= explained
    for pair in MAIN[MAIN.index("--network_args") + 1 :]:
        if pair.startswith("--"):
            break
        assert f"`{pair.partition('=')[0]}`" in PROSE


def test_worked_example_has_the_numbers_of_the_program() -> None:
    """24 pictures, shown 10 times."""
    options = parse(MAIN)
    batches = 240 // options.train_batch_size
    length = run_length(options, batches)
    behind_a_step = options.train_batch_size * options.gradient_accumulation_steps
    shown = 10 * length.epochs
    section = TEXT.partition("## 7.")[2].partition("## 8.")[0]
    assert [int(number) for number in re.findall(r"= (\d+) \|", section)] == [
        *(240, batches, length.steps_per_epoch, length.epochs, behind_a_step, shown)
    ]
    saved = [adapter_path(options, epoch=epoch).name for epoch in epochs_due(options, length.epochs)]
    assert len(saved) == 2
    assert all(f"`{name}`" in PROSE for name in saved)
    assert f"`{options.output_name}_{options.sample_every_n_steps:06d}_sheet.png`" in PROSE


def test_size_and_memory_equal_those_of_the_plan(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SDXL itself: without a base its own settings are taken."""
    monkeypatch.chdir(tmp_path)
    flags = [word for word in MAIN if "config" not in word]
    memory = []
    for more in (flags, [word for word in flags if word != "--gradient_checkpointing"]):
        assert main([*more, "--plan"]) == 0
        plan = capfd.readouterr().out
        size = re.search(r"([\d.]+) MB in fp16", plan)
        total = re.search(r"^ *in all +(\d+)\.\d+$", plan, re.MULTILINE)
        assert size
        assert total
        assert f"the file has {float(size[1]):.0f} MB" in PROSE
        memory.append(total[1])
    assert f"about {memory[0]} GiB, and {memory[1]} without\n`--gradient_checkpointing`" in PROSE


def test_the_trainers_script_lies_where_the_guide_starts_it() -> None:
    (folder, script) = re.search(r"\(`cd (\S+)`\) and run `accelerate launch \"\./(\S+)\"`", PROSE).groups()
    assert (ROOT / folder / script).is_file()


def test_the_guide_is_short_and_its_sections_are_numbered() -> None:
    assert TEXT.count("\n") < 300
    numbers = [int(number) for number in re.findall(r"^## (\d+)\.", TEXT, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {int(number) for number in re.findall(r"section (\d+)", PROSE)} <= set(numbers)
