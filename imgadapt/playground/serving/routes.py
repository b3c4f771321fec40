"""Routes: pictures, adapters and what was made of them, by ids; nothing that a client sends is a path."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.desk import public
from imgadapt.playground.house import House
from imgadapt.playground.serving.sessions import owner_of

_KEPT = {"cache-control": "private, max-age=3600"}
_SIDES = (64, 1024)
"""Pixels of a thumbnail that may be asked for."""


def routes(house: House) -> list[Route]:
    """All of them, for an application of Starlette or FastAPI that stands behind a Guard."""
    shown = _Shown(house)
    return [
        Route("/health", _health),
        Route("/pictures/{id}", _answered(shown.picture)),
        Route("/cards/{id}/preview", _answered(shown.preview)),
        Route("/cards/{id}/file", _answered(shown.adapter)),
        Route("/converted/{id}", _answered(shown.converted)),
        Route("/grids/{id}/export", _answered(shown.grid)),
        Route("/pictures", shown.accept, methods=["POST"]),
        Route("/restore", shown.restore, methods=["POST"]),
    ]


async def _health(request: Request) -> Response:
    return JSONResponse({"ok": True})


def _answered(find: Callable[[str, Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that says the same of all that is not there, not whole, or another's."""

    async def endpoint(request: Request) -> Response:
        id = request.path_params["id"]
        nothing = PlainTextResponse("there is nothing here", status_code=404)
        if not re.fullmatch(r"[0-9a-z]{8,40}", id):
            return nothing
        try:
            return await run_in_threadpool(find, id, request)
        except (ImgadaptError, OSError):
            return nothing

    return endpoint


class _Shown:
    """The endpoints of a house."""

    def __init__(self, house: House) -> None:
        self.house, self.playground = house, house.playground

    def picture(self, id: str, request: Request) -> Response:
        side = request.query_params.get("side")
        picture = self.playground.album.get(id, self.playground.whose(owner_of(request.headers)))
        if side is None:
            return _file(picture.path, f"{id}.png", "image/png", inline=True)
        return Response(self.playground.album.thumbnail(id, _side(side)), media_type="image/webp", headers=_KEPT)

    def preview(self, id: str, request: Request) -> Response:
        library = self.playground.library
        small = library.preview_of(library.get(id), _side(request.query_params.get("side", "512")))
        if small is None:
            raise ConfigError("it has no preview that can be shown")
        return Response(small, media_type="image/webp", headers=_KEPT)

    def adapter(self, id: str, request: Request) -> Response:
        return _file(*self.playground.library.download(id), "application/octet-stream")

    def converted(self, id: str, request: Request) -> Response:
        made = self.house.converter.get(id, self.playground.whose(owner_of(request.headers)))
        return _file(made.path, made.name, "application/octet-stream")

    def grid(self, id: str, request: Request) -> Response:
        return _file(self.house.grids.export(id, owner_of(request.headers)), f"grid-{id}.zip", "application/zip")

    async def accept(self, request: Request) -> Response:
        """A picture from outside, as the body: its id."""
        owner, data = owner_of(request.headers), await self._body(request)
        if data is None:
            return self._too_large()

        def keep() -> dict[str, Any]:
            picture = self.playground.album.accept(data, owner=owner)
            size = {"width": picture.width, "height": picture.height}
            return {"id": picture.id, "url": f"/pictures/{picture.id}", **size}

        return await _said(keep)

    async def restore(self, request: Request) -> Response:
        """What a picture, as the body, says of how it was made."""
        owner, data = owner_of(request.headers), await self._body(request)
        if data is None:
            return self._too_large()

        def read() -> dict[str, Any]:
            found = self.playground.restore(data, owner=owner)
            asked = found.request.model_dump(mode="json")
            return {"request": asked, "lacks": list(found.lacks), "exact": found.exact}

        return await _said(read)

    async def _body(self, request: Request) -> bytes | None:
        """All of it; None: more than a picture may have."""
        most, data = self.playground.settings.limits.upload, bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                return None
        return bytes(data)

    def _too_large(self) -> Response:
        most = self.playground.settings.limits.upload
        return JSONResponse({"error": f"a picture may have {most:,} bytes"}, 413, {"connection": "close"})


async def _said(work: Callable[[], dict[str, Any]]) -> Response:
    """What work finds, or its error, as JSON."""
    try:
        return JSONResponse(await run_in_threadpool(work))
    except ImgadaptError as error:
        return JSONResponse({"error": public(str(error))}, status_code=400)


def _side(text: str) -> int:
    """Pixels; all but a few sizes are rounded, so that nobody makes a thousand of one picture."""
    if not re.fullmatch(r"\d{1,5}", text):
        raise ConfigError("side is a number of pixels")
    least, most = _SIDES
    return min(max(least, 1 << (int(text) - 1).bit_length() if int(text) > 1 else least), most)


def _file(path: Path, name: str, media: str, *, inline: bool = False) -> Response:
    """A file under a name that is none of the server's."""
    if not path.is_file():
        raise ConfigError("it is gone")
    safe = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]+', "_", name).strip(". ")[:150] or "file"
    kind = "inline" if inline else "attachment"
    return FileResponse(path, filename=safe, media_type=media, content_disposition_type=kind, headers=_KEPT)
