"""A real `lorashrink ui` in a process of its own, and what it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOKEN = "token-of-the-tests-0123456789"
PATIENCE = 120.0  # seconds; machines of tests are shared


class Server:
    """The program, started with some folders."""

    def __init__(self, folders: Sequence[Path], *options: str, cache: Path, port: int = 0) -> None:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "LORASHRINK_UI_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lorashrink",
                "ui",
                *map(str, folders),
                "--no-browser",
                "--port",
                str(port),
                *options,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Background jobs of shells begin with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self._errors: str | None = None
        assert self.process.stdout
        self.first_line = self.process.stdout.readline().strip()
        self.url = self.first_line.partition("/?")[0]
        self.port = int(self.url.rpartition(":")[2])

    def request(
        self,
        path: str,
        *,
        data: bytes | None = None,
        method: str | None = None,
        token: str | None = TOKEN,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of an answer; `token` goes into the header."""
        sent = {**(headers or {}), **({"X-Lorashrink-Token": token} if token else {})}
        request = urllib.request.Request(self.url + path, data=data, headers=sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def get(self, path: str) -> Any:
        """The JSON document at a path below `/api/`."""
        status, _, body = self.request(f"/api/{path}")
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, **values: Any) -> Any:
        """What a request with these values answers."""
        status, _, body = self.request(f"/api/{path}", data=json.dumps(values).encode())
        assert status == 200, body
        return json.loads(body)

    def rows(self) -> list[dict[str, Any]]:
        """The library, once all headers are read."""
        state = until(lambda: self.get("state"), lambda state: state["library"]["unread"] == 0)
        return list(state["library"]["rows"])

    def row(self, name: str) -> dict[str, Any]:
        """The row of the file of this name."""
        (row,) = [row for row in self.rows() if row["name"] == name]
        return row

    def finished(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """A job once it is over."""
        ends = ("done", "failed", "cancelled")
        return dict(until(lambda: self.get(f"jobs/{job['id']}"), lambda job: job["state"] in ends))

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """End the program by a signal: its exit status, and what it said on stderr."""
        if self._errors is None:
            self.process.send_signal(number)
            _, self._errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, self._errors


def until(ask: Callable[[], Any], right: Callable[[Any], bool]) -> Any:
    """The first answer that is right."""
    end = time.monotonic() + PATIENCE
    while not right(answer := ask()):
        assert time.monotonic() < end, answer
        time.sleep(0.1)
    return answer
