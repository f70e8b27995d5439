"""Who may talk to the server: checks of each request, and the headers of each answer."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-lorashrink-token"

# The page loads its own files and nothing else, and no other page may hold it in a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets a request through to `app` if its Host, its Origin and, below `/api/`, its token are right.

    The Host is a loopback address; `names` are further ones. This keeps out pages of other sites whose names
    point to this machine (DNS rebinding). If `any_address` is set, the Host may be any IP address.
    """

    def __init__(self, app: ASGIApp, *, token: str, names: Collection[str] = (), any_address: bool = False) -> None:
        self.app, self.token, self.names, self.any_address = app, token, frozenset(names), any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI does."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self.refusal_of(Request(scope))
        if refusal is None:
            await self.app(scope, receive, send_with_headers)
        else:
            status, error, hint = refusal
            response = JSONResponse({"error": error, "hint": hint}, status_code=status)
            await response(scope, receive, send_with_headers)

    def refusal_of(self, request: Request) -> tuple[int, str, str] | None:
        """(status, error, what to do) of a request that is not let through, else None."""
        host = request.headers.get("host", "")
        is_own = False
        with contextlib.suppress(ValueError):  # it is no host, or no address
            name = urlsplit(f"//{host}").hostname or ""
            is_own = name == "localhost" or name in self.names
            is_own = is_own or bool(ipaddress.ip_address(name).is_loopback or self.any_address)
        if not is_own:
            return 403, f"the Host {host[:100]!r} is not this server", "Open the address that lorashrink ui printed."
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "the request comes from another site", "Open the address that lorashrink ui printed."
        token = request.headers.get(TOKEN_HEADER) or request.query_params.get("token", "")
        if request.url.path.startswith("/api/") and not hmac.compare_digest(token.encode(), self.token.encode()):
            return 401, "the token is missing or wrong", "Open the address that lorashrink ui printed when it started."
        return None
