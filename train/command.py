"""The trainer as a program: parse, check, train. The only place where its errors become exit statuses.

Nothing heavy is imported before the options are known to be good.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorashrink.errors import LorashrinkError, UsageError
from lorashrink.train.flags.options import Options, parse, write_config

if TYPE_CHECKING:
    from lorashrink.train.run.loop import Session

_log = logging.getLogger(__name__)

DONE, STOPPED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str], program: str = "lorashrink train") -> int:
    """Run the trainer and return its exit status: 0 done, 1 stopped while training, 2 not started, 130 interrupted."""
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, one
    _log_to_stderr(speaks)
    try:
        options = parse(arguments, program)
    except LorashrinkError as error:
        return _failed(error, NOTHING_DONE, speaks, debug="--debug" in arguments)
    status = NOTHING_DONE
    try:
        if options.output_config:
            _log.info("options written to %s", write_config(options))
            return DONE
        _warn(options)
        if options.plan:
            if speaks:
                sys.stdout.write(f"{_plan(options)}\n")
            return DONE
        session = _prepare(options)
        status, speaks = STOPPED, True
        session.run()
        return DONE
    except LorashrinkError as error:
        return _failed(error, status, speaks, options.debug)
    except KeyboardInterrupt:
        _log.error("interrupted; files saved before are complete")
        return INTERRUPTED


def _prepare(options: Options) -> Session:
    with _installed():
        from lorashrink.train.run.preparing import prepare
    return prepare(options)


def _plan(options: Options) -> str:
    with _installed():
        from lorashrink.train.plan import plan
    return plan(options)


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"training needs {error.name}, which is not installed"
        raise UsageError(f"{missing}: pip install 'lorashrink[train]'") from None


def _warn(options: Options) -> None:
    from lorashrink.train.flags.checks import check

    for warning in check(options):
        _log.warning(warning)


def _failed(error: LorashrinkError, status: int, speaks: bool, debug: bool) -> int:
    if speaks:
        if debug:
            traceback.print_exc()
        _log.error("%s", error)
    return status


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = {logging.WARNING: "warning: ", logging.ERROR: "lorashrink: "}.get(record.levelno, "")
        return prefix + super().format(record)


def _log_to_stderr(speaks: bool) -> None:
    """What lorashrink's own modules say, warnings of other packages not; errors from every process."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logger = logging.getLogger("lorashrink")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if speaks else logging.ERROR)
    logger.propagate = False
