"""`train`, whose flags are parsed by the trainer itself."""

from __future__ import annotations

from typing import Any

import typer

# Because the trainer's flags are those of another program.
OWN_PARSER: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def train(context: typer.Context) -> None:
    """Train an SDXL LoRA with the options of sd-scripts.

    Example: lorashrink train --config_file settings.toml
    """
    from lorashrink.train.command import main as run

    raise typer.Exit(run(context.args))
