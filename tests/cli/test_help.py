"""The help of the program and of every command, and shell completion, through the real command."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from typer.main import get_command

from lorashrink.cli import app
from lorashrink.cli.help import GROUPS
from lorashrink.recipes.explained import KEYS
from lorashrink.recipes.grammar import keys

GROUP = get_command(app)
COMMANDS = [name for name, command in GROUP.commands.items() if not command.hidden]  # type: ignore[attr-defined]


def run(*words: str, **environment: str) -> str:
    """What the command prints on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "lorashrink", *words],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def titles(text: str) -> list[str]:
    """The titles of the sections of a help text."""
    return re.findall(r"^(\w[^\n]*):$", text, re.MULTILINE)


def test_commands_stand_in_groups_in_their_order() -> None:
    text = run("--help")
    assert titles(text) == [*GROUPS, "Options"]
    listed = re.findall(r"^  ([a-z][\w-]+) ", text, re.MULTILINE)
    order = [name for names in GROUPS.values() for name in names]
    assert listed == [name for name in order if name in COMMANDS]
    assert set(listed) == set(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_h_and_the_help_command_print_the_help(command: str) -> None:
    text = run(command, "--help")
    assert text.startswith(f"Usage: python -m lorashrink {command} ")
    assert run(command, "-h") == text
    assert run("help", command) == text


def test_help_without_a_command_is_the_help_of_the_program() -> None:
    assert run("help") == run("-h") == run("--help")


def test_the_program_alone_prints_its_help() -> None:
    done = subprocess.run([sys.executable, "-m", "lorashrink"], capture_output=True, text=True, check=False)
    assert "Shrink:" in done.stdout + done.stderr


def test_the_trainer_has_its_help_too() -> None:
    assert run("help", "train") == run("train", "-h")


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_help_is_as_wide_as_the_terminal(columns: int) -> None:
    text = run("resize", "--help-all", COLUMNS=str(columns))
    lines = [line for line in text.splitlines() if not line.startswith("Example: ")]
    longest = max(map(len, lines))
    assert longest <= columns
    assert longest > min(columns, 110) - 12


def test_expert_options_are_in_the_long_help_only() -> None:
    short, long = run("resize", "--help"), run("resize", "--help-all")
    command = GROUP.commands["resize"]  # type: ignore[attr-defined]
    options = {name for item in command.params for name in item.opts if name.startswith("--")} - {"--help-all"}
    assert {name for name in options if not re.search(rf"^  .*{name}\b", long, re.MULTILINE)} == set()
    assert "--ray-transfer" not in short
    assert "--recipe" in short
    assert titles(long) == [title for title in titles(long) if title in titles(short) or title == "Expert options"]


def test_examples_are_lines_to_copy() -> None:
    for command in COMMANDS:
        assert (
            re.search(rf"^Example: lorashrink {command} ", run(command, "--help"), re.MULTILINE) or command == "train"
        )


def test_resize_explains_every_key_of_a_recipe() -> None:
    assert set(KEYS) == set(keys())
    assert all(KEYS.values())
    text = run("resize", "-h")
    assert [key for key in KEYS if not re.search(rf"^  {key} +\w", text, re.MULTILINE)] == []


def test_old_names_of_commands_work_and_are_not_listed() -> None:
    assert "norms" in run("norms", "--help")
    assert not re.search(r"^  norms ", run("--help"), re.MULTILINE)


@pytest.mark.parametrize(("typed", "expected"), [("res", ["resize"]), ("base", ["base-norms"])])
def test_bash_completes_commands(typed: str, expected: list[str]) -> None:
    variables = {"COMP_WORDS": f"lorashrink {typed}", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'lorashrink'; from lorashrink.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables, "_LORASHRINK_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected


def test_completion_can_be_installed() -> None:
    assert "complete" in run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
