"""The trainer as a program: parse, check, train. The only place where its errors become exit statuses.

Nothing heavy is imported before the options are known to be good.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from lorashrink.errors import LorashrinkError
from lorashrink.text import printable
from lorashrink.train.flags.options import parse, write_config

_log = logging.getLogger(__name__)

DONE, STOPPED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str], program: str = "lorashrink train") -> int:
    """Run the trainer and return its exit status: 0 done, 1 stopped while training, 2 not started, 130 interrupted."""
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, the first
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logger = logging.getLogger("lorashrink")  # not those of other packages
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if speaks else logging.ERROR)
    logger.propagate = False
    status, debug = NOTHING_DONE, "--debug" in arguments
    try:
        options = parse(arguments, program)
        debug = options.debug
        if options.output_config:
            _log.info("options written to %s", write_config(options))
            return DONE
        from lorashrink.train.flags.checks import check

        for warning in check(options):
            _log.warning(warning)
        from lorashrink.train.run.preparing import plan, prepare

        if options.plan:
            if speaks:
                sys.stdout.write(f"{plan(options)}\n")
            return DONE
        session = prepare(options)
        status, speaks = STOPPED, True
        session.run()
        return DONE
    except LorashrinkError as error:
        if speaks:
            if debug:
                traceback.print_exc()
            _log.error("%s", error)
        return status
    except ModuleNotFoundError as error:
        _log.error("training needs %s, which is not installed: pip install 'lorashrink[train]'", error.name)
        return status
    except KeyboardInterrupt as stop:
        _log.error("interrupted %s", f"{stop}" or "at once; files saved before are complete")
        return INTERRUPTED


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = {logging.WARNING: "warning: ", logging.ERROR: "lorashrink: "}.get(record.levelno, "")
        return printable(prefix + super().format(record), keep="\n\t")  # no name can drive the terminal
