"""`comfyui install`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.help import ProgramHelp

if TYPE_CHECKING:
    from lorashrink.node_pack import Installed

comfyui = typer.Typer(
    cls=ProgramHelp,
    help="Put nodes into ComfyUI.\n\nExample: lorashrink comfyui install ~/ComfyUI",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def print_installed(installed: Installed, terminal: Terminal) -> None:
    """Where the nodes are, and what to do now."""
    how = "links to" if installed.linked else "is a copy of"
    typer.echo(f"{installed.path} {how} {installed.source}. Restart ComfyUI; the nodes are under 'lorashrink'.")


@command(print_installed)
def install(
    terminal: Terminal,
    path: Annotated[Path, typer.Argument(help="The folder of ComfyUI, or its custom_nodes.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy the nodes; a link follows new versions.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace nodes that are there already.")] = False,
) -> object:
    """Put the nodes into ComfyUI's custom_nodes/lorashrink. ComfyUI's own Python must have lorashrink installed.

    Example: lorashrink comfyui install ~/ComfyUI
    """
    from lorashrink.node_pack import install as run

    return run(path, copy=copy, force=force)


comfyui.command("install")(install)
