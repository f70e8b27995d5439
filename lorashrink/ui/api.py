"""What can be asked over HTTP: the page's files, and `/api/`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from importlib.resources import files
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lorashrink.errors import InputError, LorashrinkError, UsageError, explained
from lorashrink.text import json_in, printable
from lorashrink.ui.application import Application
from lorashrink.ui.guard import Guard

_MOST_JSON = 1 << 20  # bytes of a request

_Ask = Callable[[str, Mapping[str, Any]], Any]
_Handler = Callable[[Request], Awaitable[Response]]

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def server_app(
    application: Application, token: str, *, names: Collection[str] = (), any_address: bool = False
) -> ASGIApp:
    """The application as an ASGI app behind its guard. `names`, `any_address`: as for `Guard`."""

    async def upload(request: Request) -> Response:
        return _Json({"id": await application.upload(request.query_params.get("name", ""), request.stream())})

    async def download(request: Request) -> Response:
        path = application.library.get(request.path_params["id"]).path
        if not path.is_file():
            raise InputError(f"{path.name}: is a folder, and folders cannot be downloaded. Copy it from the disk.")
        real = os.path.realpath(path)  # which was checked, wherever the path leads by now
        return FileResponse(real, media_type="application/octet-stream", filename=printable(path.name))

    async def picture(request: Request) -> Response:
        path = application.picture(request.path_params["id"], request.path_params["name"])
        return FileResponse(path, media_type="image/png")

    # What is asked by GET or POST and answered with JSON: from the id in the path, and the query or the document.
    gets: Mapping[str, _Ask] = {
        "/api/state": lambda identity, values: application.state(whole_number(values.get("since", 0))),
        "/api/adapters/{id}": lambda identity, values: application.adapter(identity),
        "/api/adapters/{id}/curve": lambda identity, values: application.curve(identity, values),
        "/api/adapters/{id}/at": lambda identity, values: application.at(identity, goal_of_query(values)),
        "/api/jobs/{id}": lambda identity, values: application.jobs.get(identity).document(),
    }
    posts: Mapping[str, _Ask] = {
        "/api/rescan": lambda identity, values: application.library.scan(),
        "/api/measure": lambda identity, values: application.measure(
            ids_of(values), everything=values.get("all") is True
        ),
        "/api/shrink": lambda identity, values: application.shrink(values).document(),
        "/api/pictures": lambda identity, values: application.draw(values).document(),
        "/api/jobs/{id}/cancel": lambda identity, values: application.cancel(identity),
        "/api/jobs/{id}/undo": lambda identity, values: application.undo(identity),
    }
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name}", page),
            Route("/api/upload", _refusing(upload), methods=["PUT"]),
            Route("/api/files/{id}", _refusing(download)),
            Route("/api/pictures/{id}/{name}", _refusing(picture)),
            *(Route(path, _answering(ask), methods=["GET"]) for path, ask in gets.items()),
            *(Route(path, _answering(ask), methods=["POST"]) for path, ask in posts.items()),
        ]
    )
    return Guard(app, token=token, names=names, any_address=any_address)


def _answering(ask: _Ask) -> _Handler:
    """A handler that answers with JSON."""

    async def handle(request: Request) -> Response:
        values = await values_of(request)
        return _Json(await run_sync(ask, request.path_params.get("id", ""), values))

    return _refusing(handle)


def _refusing(handler: _Handler) -> _Handler:
    """A handler whose errors become documents with an error and a status."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except LorashrinkError as error:
            return _Json({"error": str(error)}, status_code=400)
        except Exception as error:
            return _Json({"error": str(explained(request.url.path, error))}, status_code=500)

    return handle


async def page(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params.get("name", "index.html")
    kind = _TYPES.get(f".{name.rpartition('.')[2]}")
    if name not in _STATIC or kind is None:
        return Response("not found", status_code=404)
    return Response(_STATIC[name], media_type=kind)


_STATIC = {
    item.name: item.read_bytes() for item in files("lorashrink.ui").joinpath("static").iterdir() if item.is_file()
}


class _Json(Response):
    """A JSON document in ASCII, since names of files may be no text in any encoding."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


# --- what a request holds -------------------------------------------------------------------------


async def values_of(request: Request) -> Mapping[str, Any]:
    """The query of a GET, or the JSON object of a POST. Raises UsageError."""
    if request.method != "POST":
        return dict(request.query_params)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_JSON:
            raise UsageError(f"the request is larger than {_MOST_JSON} bytes.")
    values = json_in(body or b"{}")
    if not isinstance(values, dict):
        raise UsageError("the request is no JSON object.")
    return values


def goal_of_query(values: Mapping[str, Any]) -> dict[str, Any]:
    """A goal from a query, where all values are texts."""
    value = values.get("value", "")
    if values.get("by") in ("size", "rank"):
        with contextlib.suppress(ValueError):  # the goal is refused as it is
            return {**values, "value": float(value)}
    return dict(values)


def whole_number(value: Any) -> int:
    """Raises UsageError."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"'{str(value)[:50]}' is no whole number.") from None


def ids_of(values: Mapping[str, Any]) -> list[str]:
    """The list of ids in a document. Raises UsageError."""
    identities = values.get("ids", [])
    if not isinstance(identities, list):
        raise UsageError("ids is a list of ids.")
    return list(map(str, identities))
