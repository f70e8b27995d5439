"""The commands: parse, call one public function, print. No logic.

Nothing heavy is imported before a command needs it. A new command is one function, and its place in `COMMANDS`.
"""

from lorashrink.cli.application import app, main
from lorashrink.cli.calibrating import calibrate
from lorashrink.cli.comparing import compare
from lorashrink.cli.demonstrating import demo
from lorashrink.cli.inspecting import inspect
from lorashrink.cli.installing import comfyui
from lorashrink.cli.making import convert, extract, norms
from lorashrink.cli.merging import merge
from lorashrink.cli.overlapping import overlap
from lorashrink.cli.packing import pack, unpack
from lorashrink.cli.refining import refine
from lorashrink.cli.reporting import report
from lorashrink.cli.resizing import resize
from lorashrink.cli.serving import ui
from lorashrink.cli.shrinking import shrink
from lorashrink.cli.sweeping import sweep
from lorashrink.cli.training import OWN_PARSER, train

# In the order of the help.
COMMANDS = (
    *(shrink, resize, inspect, compare, overlap, sweep, calibrate, refine),
    *(merge, report, extract, convert, norms, demo, ui),
    *(pack, unpack),
)

for _command in COMMANDS:
    app.command()(_command)
app.command(**OWN_PARSER)(train)
app.add_typer(comfyui, name="comfyui")

__all__ = ["COMMANDS", "app", "main"]
