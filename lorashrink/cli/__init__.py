"""The commands: parse, call one public function, print. No logic.

Nothing heavy is imported before a command needs it. A new command is one function, and its place in `COMMANDS`.
"""

from lorashrink.cli.application import app, main
from lorashrink.cli.calibrating import calibrate
from lorashrink.cli.comparing import compare
from lorashrink.cli.demonstrating import demo
from lorashrink.cli.help import CommandHelp
from lorashrink.cli.helping import help_of_command
from lorashrink.cli.inspecting import inspect
from lorashrink.cli.installing import comfyui
from lorashrink.cli.making import base_norms, convert, extract
from lorashrink.cli.merging import merge
from lorashrink.cli.overlapping import overlap
from lorashrink.cli.packing import pack, unpack
from lorashrink.cli.proving import evidence
from lorashrink.cli.refining import refine
from lorashrink.cli.reporting import report
from lorashrink.cli.resizing import resize
from lorashrink.cli.serving import ui
from lorashrink.cli.shrinking import shrink
from lorashrink.cli.sweeping import sweep
from lorashrink.cli.training import OWN_PARSER, train

# `help` lists them in the groups of `help.GROUPS`.
COMMANDS = (
    *(shrink, resize, sweep, calibrate, refine),
    *(inspect, compare, report, overlap),
    *(merge, extract, convert, pack, unpack, base_norms),
    *(demo, ui, evidence),
)

# They still work.
_OLD_NAMES = {"norms": base_norms}

for _command in COMMANDS:
    app.command(cls=CommandHelp)(_command)
for _name, _command in _OLD_NAMES.items():
    app.command(_name, cls=CommandHelp, hidden=True)(_command)
app.command(cls=CommandHelp, **OWN_PARSER)(train)
app.command("help", cls=CommandHelp)(help_of_command)
app.add_typer(comfyui, name="comfyui")

__all__ = ["COMMANDS", "app", "main"]
