"""What can be asked over HTTP: the page's files, and `/api/`."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from importlib.resources import files
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lorashrink.errors import InputError, LorashrinkError, UsageError, explained
from lorashrink.text import printable
from lorashrink.ui.application import Application
from lorashrink.ui.guard import Guard

_MOST_JSON = 1 << 20  # bytes of a request

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def server_app(
    application: Application, token: str, *, names: Collection[str] = (), any_address: bool = False
) -> ASGIApp:
    """The application as an ASGI app behind its guard. `names`, `any_address`: as for `Guard`."""

    def answer(ask: Callable[[Request, Mapping[str, Any]], Any]) -> Callable[[Request], Awaitable[Response]]:
        """A handler that answers with JSON; errors become documents with an error and a status."""

        async def handle(request: Request) -> Response:
            try:
                values = await _values(request)
                return _Json(await run_sync(ask, request, values))
            except Exception as error:
                return _refused(request, error)

        return handle

    async def upload(request: Request) -> Response:
        try:
            identity = await application.upload(request.query_params.get("name", ""), request.stream())
            return _Json({"id": identity})
        except ClientDisconnect:
            raise
        except Exception as error:
            return _refused(request, error)

    async def download(request: Request) -> Response:
        try:
            path = application.library.get(request.path_params["id"]).path
            if not path.is_file():
                raise InputError(f"{path.name}: is a folder, and folders cannot be downloaded. Copy it from the disk.")
            real = os.path.realpath(path)  # which was checked, wherever the path leads by now
            return FileResponse(real, media_type="application/octet-stream", filename=printable(path.name))
        except LorashrinkError as error:
            return _refused(request, error)

    async def picture(request: Request) -> Response:
        try:
            path = application.picture(path_id(request), request.path_params["name"])
            return FileResponse(path, media_type="image/png")
        except LorashrinkError as error:
            return _refused(request, error)

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        kind = _TYPES.get(f".{name.rpartition('.')[2]}")
        if name not in _STATIC or kind is None:
            return Response("not found", status_code=404)
        return Response(_STATIC[name], media_type=kind)

    def path_id(request: Request) -> str:
        return str(request.path_params["id"])

    get, post = ["GET"], ["POST"]
    routes = [
        ("/api/state", get, lambda request, values: application.state(_whole(values.get("since", 0)))),
        ("/api/rescan", post, lambda request, values: application.library.scan()),
        (
            "/api/measure",
            post,
            lambda request, values: application.measure(_ids(values), everything=values.get("all") is True),
        ),
        ("/api/adapters/{id}", get, lambda request, values: application.adapter(path_id(request))),
        ("/api/adapters/{id}/curve", get, lambda request, values: application.curve(path_id(request), values)),
        ("/api/adapters/{id}/at", get, lambda request, values: application.at(path_id(request), _goal(values))),
        ("/api/shrink", post, lambda request, values: application.shrink(values).document()),
        ("/api/pictures", post, lambda request, values: application.draw(values).document()),
        ("/api/jobs/{id}", get, lambda request, values: application.jobs.get(path_id(request)).document()),
        ("/api/jobs/{id}/cancel", post, lambda request, values: application.cancel(path_id(request))),
        ("/api/jobs/{id}/undo", post, lambda request, values: application.undo(path_id(request))),
    ]
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name}", page),
            Route("/api/upload", upload, methods=["PUT"]),
            Route("/api/files/{id}", download),
            Route("/api/pictures/{id}/{name}", picture),
            *(Route(path, answer(ask), methods=methods) for path, methods, ask in routes),
        ]
    )
    return Guard(app, token=token, names=names, any_address=any_address)


_STATIC = {
    item.name: item.read_bytes() for item in files("lorashrink.ui").joinpath("static").iterdir() if item.is_file()
}


class _Json(Response):
    """A JSON document in ASCII, since names of files may be no text in any encoding."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


async def _values(request: Request) -> Mapping[str, Any]:
    """The query of a GET, or the JSON object of a POST. Raises UsageError."""
    if request.method != "POST":
        return dict(request.query_params)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_JSON:
            raise UsageError(f"the request is larger than {_MOST_JSON} bytes.")
    try:
        values = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UsageError("the request is no JSON object.")
    return values


def _goal(values: Mapping[str, Any]) -> dict[str, Any]:
    """A goal from a query, where all values are texts."""
    value = values.get("value", "")
    if values.get("by") in ("size", "rank"):
        try:
            return {**values, "value": float(value)}
        except ValueError:
            pass  # the goal is refused as it is
    return dict(values)


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"'{str(value)[:50]}' is no whole number.") from None


def _ids(values: Mapping[str, Any]) -> list[str]:
    identities = values.get("ids", [])
    if not isinstance(identities, list):
        raise UsageError("ids is a list of ids.")
    return list(map(str, identities))


def _refused(request: Request, error: Exception) -> Response:
    expected = isinstance(error, LorashrinkError)
    text = str(error if expected else explained(request.url.path, error))
    return _Json({"error": text}, status_code=400 if expected else 500)
