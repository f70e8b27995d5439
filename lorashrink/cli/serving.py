"""`ui`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink._version import __version__
from lorashrink.cli.command import Terminal, command
from lorashrink.cli.printing import print_json, say

if TYPE_CHECKING:
    from lorashrink.ui.server import Address


@command()
def ui(
    terminal: Terminal,
    folder: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Folders of LoRAs and models. The default is the current one."),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Default 8432, or a free one.")] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any other lets other machines in.")
    ] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address and open no browser.")] = False,
) -> None:
    """Show a page to browse, shrink and compare LoRAs in your browser; it runs on this machine only.

    Example: lorashrink ui loras/
    """
    from lorashrink.ui.server import serve

    def announce(address: Address) -> None:
        if terminal.as_json:
            print_json({"version": __version__, "command": "ui", "url": address.url, "port": address.port})
            return
        say(address.url)
        if not address.loopback:
            say(
                f"warning: with --host {host} everybody who reaches this machine and knows the address above can read "
                "these folders, and the connection is not encrypted",
                errors=True,
            )
        if not terminal.quiet:
            say("Open this address in your browser. Stop with Ctrl-C.", errors=True)

    serve(folder or [Path()], host=host, port=port, browser=not no_browser, announce=announce)
