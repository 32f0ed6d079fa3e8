"""The web page on which people rate pseudo labels. It is served to this machine only; scripts/rate.py starts it.

A client names an item by its position and never sees its set, its id or a path. The images are those of the items, decoded
and encoded anew, so that the browser gets pixels and not a file's bytes.
"""

import io
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Body, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, StrictBool, StringConstraints

from mpa.analysis.ratings import ASPECTS, Ratings
from mpa.files.disk_errors import cause
from mpa.files.image_files import ImageError, open_image

PAGE = Path(__file__).with_name("rating_page")
FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
MAX_SIDE = 2000  # pixels; larger images are shown smaller
MAX_BODY = 4096  # bytes of a request; a click has some 150
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # another name that leads here is another site's
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("should be printable")
    return name


Rater = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40), AfterValidator(_printable)
]


class Click(BaseModel):
    """A rater's answer about one aspect of an item; None takes it back."""

    rater: Rater
    position: int
    aspect: Literal[ASPECTS]
    value: StrictBool | None


def application(ratings: Ratings) -> FastAPI:
    """The page, its data and its images."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    items = ratings.items

    def check(position: int) -> None:
        if not 0 <= position < len(items):
            raise HTTPException(404, f"There are {len(items)} items.")

    @app.middleware("http")
    async def only_this_page(request: Request, call_next) -> Response:
        """Forbid the page whatever it does not need."""
        response = _refusal(request) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: RequestValidationError) -> JSONResponse:
        """What is wrong, without the input: it may be of any length, and no valid Unicode."""
        return JSONResponse({"detail": [problem["msg"] for problem in error.errors()]}, 422)

    for address, (name, kind) in FILES.items():
        app.get(address)(_file(PAGE / name, kind))

    @app.get("/items")
    def start(rater: Annotated[Rater, Query()]) -> dict:
        """How many items there are, and the first that the rater has not finished."""
        left = ratings.unrated(rater)
        return {"items": len(items), "left": len(left), "next": left[0] if left else None}

    @app.get("/items/{position}")
    def show(position: Annotated[int, InPath()], rater: Annotated[Rater, Query()]) -> dict:
        check(position)
        item = items[position]
        return {"question": item.question, "answer": item.answer, "values": ratings.of(rater, position)}

    @app.post("/ratings")
    def rate(click: Annotated[Click, Body()]) -> dict:
        """Save a click; it is on the disk when the reply is sent."""
        check(click.position)
        try:
            ratings.add(click.rater, click.position, click.aspect, click.value)
        except OSError as error:
            raise HTTPException(
                507, f"{error.filename}: {cause(error) or error.strerror}. The click was not saved."
            ) from None
        return start(click.rater)

    @app.get("/images/{position}")
    def image(position: Annotated[int, InPath()]) -> Response:
        check(position)
        try:
            return Response(_png(items[position].image), media_type="image/png")
        except ImageError as error:
            raise HTTPException(404, f"This image {error}.") from None

    return app


def _refusal(request: Request) -> Response | None:
    """Of a request that another site's page makes, and of a long one, unread."""
    host = request.headers.get("host", "")
    origin, length = request.headers.get("origin"), request.headers.get("content-length", "0")
    if not LOCAL.fullmatch(host) or origin not in (None, f"http://{host}"):
        return Response("This page is only for this machine.", 403)
    if "transfer-encoding" in request.headers or not length.isdecimal():
        return Response("A request says its length.", 411)
    if len(length) > 9 or int(length) > MAX_BODY:
        return Response("This request is too long.", 413)
    return None


def _file(path: Path, kind: str):
    """A handler that answers with a file of the page."""
    content = path.read_bytes()

    def serve() -> Response:
        return Response(content, media_type=kind)

    return serve


@lru_cache(8)
def _png(path: str) -> bytes:
    image, file = open_image(path), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
