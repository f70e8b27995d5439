"""Start and stop of the server: one process, loopback unless the user says otherwise."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.errors import UsageError
from lorashrink.files.disk import discard_unfinished
from lorashrink.signals import handled

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8432
TOKEN_VARIABLE = "LORASHRINK_UI_TOKEN"  # programs that start the server may set the token

_PACKAGES = ("starlette", "uvicorn")
_SHORTEST_TOKEN = 16
_STOP_SECONDS = 3  # that open connections get to end


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens."""

    url: str  # with the token
    host: str
    port: int
    loopback: bool

    @classmethod
    def of(cls, listener: socket.socket, host: str, token: str) -> Address:
        """The address of a socket that was opened for `host`."""
        number = listener.getsockname()[1]
        bound = ipaddress.ip_address(listener.getsockname()[0])
        shown = "127.0.0.1" if bound.is_unspecified else host
        shown = f"[{shown}]" if ":" in shown else shown
        return cls(f"http://{shown}:{number}/?token={token}", host, number, bound.is_loopback)


def serve(
    folders: Sequence[str | Path],
    *,
    host: str = DEFAULT_HOST,
    port: int | None = None,
    browser: bool = True,
    announce: Callable[[Address], None] = lambda address: None,
) -> None:
    """Serve the page about the adapters in some folders, until SIGTERM, SIGINT or SIGHUP ends it.

    port: default is 8432, or a free one if that is taken; 0 is a free one. announce: called with the address when
    the server listens and before it answers. The token is that of the variable LORASHRINK_UI_TOKEN, or a new one.

    Raises UsageError if a package, a folder or the address is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"the page needs {' and '.join(missing)}: pip install 'lorashrink[ui]'")
    from lorashrink.ui.api import server_app
    from lorashrink.ui.application import Application

    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    if len(token) < _SHORTEST_TOKEN:
        raise UsageError(f"{TOKEN_VARIABLE}: a token has at least {_SHORTEST_TOKEN} characters.")
    with contextlib.closing(listen(host, port)) as listener, Application(folders) as application:
        address = Address.of(listener, host, token)
        names = () if address.loopback else (host, socket.gethostname())
        app = server_app(application, token, names=names, any_address=not address.loopback)
        with _ended_by_signals(app) as server:
            announce(address)
            if browser:
                threading.Thread(target=webbrowser.open, args=(address.url,), daemon=True).start()
            server.run(sockets=[listener])
    discard_unfinished()


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at an address of this machine. Raises UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in (DEFAULT_PORT, 0) if port is None else (port,):
        try:
            return socket.create_server((host, number), family=family)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
    option = f"--port {port}" if port is not None else f"--host {host}"
    raise UsageError(f"{option}: cannot be listened on ({reason}). Choose another one, or leave the option out.")


@contextlib.contextmanager
def _ended_by_signals(app: ASGIApp) -> Iterator[uvicorn.Server]:
    """A server that signals end, which are the usual way to do so: no error follows from them."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Do nothing: they are captured already."""
            yield

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
        http="h11",
        ws="none",
        loop="asyncio",
    )
    server = Server(config)
    with handled(server.handle_exit):
        yield server
