"""What does a trained model draw for a visitor? A page on this machine to choose, drop an image, and watch.

    python -m trainer.demo --run runs/quickstart --weights ema       # then open http://127.0.0.1:8765

Everything on the page (trainer/demo_page.html) comes from this process, which listens on 127.0.0.1 only. One image is
drawn at a time; the browser gets its pixels as they are drawn, as one JSON object a line.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from numpy.typing import NDArray
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from data_pipeline.loader import evaluation_batches, open_shards
from data_pipeline.storage import DataError
from models.decoding import Decoding
from models.drawing.draw import Sampling
from models.given import Given
from trainer.command_line import run_tool
from trainer.errors import UsageError
from trainer.model_inputs import area_downsample
from trainer.pictures import enlarged, open_picture, to_picture, to_tensor
from trainer.trained_model import TrainedModel, add_data_argument, add_run_arguments, load_trained_model, own_data

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("demo_page.html")
LARGEST_UPLOAD = 10 << 20
LONGEST_UPLOAD_SECONDS = 30.0
MOST_CONNECTIONS = 64
LARGEST_PICTURE = 50_000_000
"""Pixels of an uploaded image."""
SECONDS_A_MESSAGE = 0.04
EXAMPLES = 12
# The page loads nothing from elsewhere, and no other page can frame it.
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class BadRequest(ValueError):
    """What the visitor asked for cannot be drawn; the text is one sentence for the page."""


@dataclass(frozen=True)
class Wish:
    """What a visitor wants to be drawn."""

    mode: str
    """new, complete or super-resolve."""
    seed: int
    label: int
    keep: float
    """Share of the positions that is given, in the order of generation."""
    sampling: Sampling


class Demo:
    """A trained model and the one drawing that may be under way."""

    def __init__(self, trained: TrainedModel, examples: list[bytes], class_names: list[str]) -> None:
        self.trained = trained
        self.examples = examples
        self.class_names = class_names
        self.busy = threading.Lock()
        self.stopped = threading.Event()

    @property
    def modes(self) -> list[str]:
        """What the model can do; one that super-resolves draws nothing without a small image."""
        return ["super-resolve", "complete"] if self.trained.card.model.small_size else ["new", "complete"]

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/model", self.model),
            Route("/examples/{index:int}", self.example),
            Route("/draw", self.draw, methods=["POST"]),
            Route("/stop", self.stop, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(), headers=SECURITY)

    async def model(self, request: Request) -> Response:
        config, order = self.trained.card.model, self.trained.model.generation_order
        return JSONResponse(
            {
                "run": self.trained.run,
                "step": self.trained.step,
                "size": config.image_size,
                "small": config.small_size,
                "positions": len(order),
                # The positions that are generated before a pixel is whole, by pixel.
                "whole_after": order.argsort().view(config.image_size**2, -1).amax(1).add(1).tolist(),
                "modes": self.modes,
                "classes": self.class_names,
                "guidance": config.label_dropout > 0,
                "examples": len(self.examples),
                "device": self.trained.device.type,
            },
            headers=SECURITY,
        )

    async def example(self, request: Request) -> Response:
        index = request.path_params["index"]
        if index >= len(self.examples):
            return PlainTextResponse(f"There are {len(self.examples)} examples.", 404)
        return Response(self.examples[index], media_type="image/png", headers=SECURITY)

    async def stop(self, request: Request) -> Response:
        self.stopped.set()
        return PlainTextResponse("stopping")

    async def draw(self, request: Request) -> Response:
        """One JSON object a line: what is given first, then pixels as they are drawn."""
        # First of all, since to decode a picture takes much more memory than its file: one at a time.
        if not self.busy.acquire(blocking=False):
            await _body(request, keep=False)  # or the visitor would not get the answer
            return PlainTextResponse("Another image is being drawn; stop it, or wait until it is done.", 409)
        try:
            wish = _wish(request.query_params, self)
            upload = await _body(request)
            original = await run_in_threadpool(_picture, upload, self.trained.card.model.image_size)
            if original is None and wish.mode != "new":
                raise BadRequest("Drop an image on the page first, or take one of the examples.")
            self.stopped.clear()
            drawing = _Drawing(self.trained, wish, original)
        except BaseException:
            self.busy.release()
            raise
        return _Lines(self._lines(drawing), self.busy)

    async def _lines(self, drawing: "_Drawing") -> AsyncIterator[str]:
        yield json.dumps(drawing.given()) + "\n"
        while not self.stopped.is_set():
            message = await run_in_threadpool(drawing.advance)
            yield json.dumps(message) + "\n"
            if message["done"] == message["total"]:
                return
        yield json.dumps({"stopped": True}) + "\n"


class _Lines(StreamingResponse):
    """JSON objects, one a line; releases the drawing's lock at the end, or when the visitor has gone away."""

    def __init__(self, lines: AsyncIterator[str], busy: threading.Lock) -> None:
        super().__init__(lines, media_type="application/x-ndjson", headers=SECURITY)
        self._busy = busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._busy.release()


class _SameSite:
    """Refuses what the pages of other sites ask for: any page that a visitor has open can send requests here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http" and _is_from_elsewhere(scope["path"], Headers(scope=scope)):
            app = PlainTextResponse("Only the page of this demo may ask for that.", 403)
        await app(scope, receive, send)


def _is_from_elsewhere(path: str, headers: Headers) -> bool:
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None and origin != f"http://{headers.get('host', '')}":
        return True
    # A link may lead to the page itself. Programs that are no browsers send neither header.
    return site not in ("same-origin", "none") and path != "/"


class _Drawing:
    """One image that is being drawn."""

    def __init__(self, trained: TrainedModel, wish: Wish, original: Tensor | None) -> None:
        model, config = trained.model, trained.card.model
        size, length = config.image_size, len(model.generation_order)
        self.original = None if original is None else original[None].to(trained.device)
        self.small = None
        if config.small_size:
            assert self.original is not None, "such a model draws nothing without an image"
            self.small = area_downsample(self.original, config.small_size)
        labels = torch.tensor([wish.label], device=trained.device) if config.num_classes else None
        completes = wish.mode == "complete"
        keep = round(wish.keep * length) if completes else 0
        known = torch.arange(length) < keep
        self.decoding = Decoding(
            model,
            1,
            seed=wish.seed,
            given=Given(labels=labels, small_images=self.small),
            images=self.original if completes else None,
            known=known,
            sampling=wish.sampling,
        )
        self.steps = iter(self.decoding)
        self.done, self.total, self.size = keep, length, size
        self.positions_a_pixel = length // size**2
        self.started = time.monotonic()
        self.known = torch.zeros(length, 1, dtype=torch.bool)
        self.known[model.generation_order, 0] = known

    def given(self) -> dict[str, Any]:
        """The first message: the image so far as RGBA (transparent where nothing is known), and what it comes from."""
        given = self.known.view(self.size, self.size, -1)
        alpha = 255 * given.any(-1, keepdim=True).to(torch.uint8)
        picture = torch.cat([self.decoding.images[0].cpu() * given, alpha], dim=-1)
        message: dict[str, Any] = {"done": self.done, "total": self.total, "picture": _base64(picture)}
        if self.original is not None:
            message["original"] = _png_url(self.original[0])
        if self.small is not None:
            message["small"] = _png_url(enlarged(self.small, self.size)[0])
        return message

    def advance(self) -> dict[str, Any]:
        """Draw for a moment; the pixels that have changed: their indices, and their colours one after the other."""
        positions = []
        until = time.monotonic() + SECONDS_A_MESSAGE
        for step in self.steps:
            self.done = step.done
            positions.append(step.positions)
            if time.monotonic() > until:
                break
        else:
            self.done = self.total
        drawn = torch.cat([torch.zeros(0, dtype=torch.int64), *positions])
        self.known[drawn] = True
        pixels = drawn.div(self.positions_a_pixel, rounding_mode="floor").unique()
        # A channel that is not drawn yet is black.
        colours = self.decoding.images[0].cpu().view(-1, 3)[pixels] * self.known.view(self.size**2, -1)[pixels]
        return {
            "done": self.done,
            "total": self.total,
            "pixels": pixels.tolist(),
            "colours": colours.flatten().tolist(),
            "seconds": round(time.monotonic() - self.started, 2),
        }


def make_app(demo: Demo) -> Starlette:
    """The application; requests must name this machine, so that no other site can read it through a visitor's DNS, and
    must not come from a page of another site."""
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    handlers = {BadRequest: _refuse, ClientDisconnect: _give_up}
    return Starlette(routes=demo.routes(), middleware=[hosts, Middleware(_SameSite)], exception_handlers=handlers)


async def _refuse(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 400)


async def _give_up(request: Request, error: Exception) -> Response:
    return Response()  # nobody reads it


def _wish(given: Mapping[str, str], demo: Demo) -> Wish:
    """The checked query of a request; BadRequest for what cannot be."""
    num_classes = demo.trained.card.model.num_classes
    mode = given.get("mode", demo.modes[0])
    if mode not in demo.modes:
        raise BadRequest(f"This model can {' and '.join(demo.modes)}, not {mode}.")
    try:
        seed, label = int(given.get("seed", "0")), int(given.get("class", "0"))
        keep, temperature = float(given.get("keep", "0.5")), float(given.get("temperature", "1"))
        sampling = Sampling(temperature=temperature, guidance=float(given.get("guidance", "1")))
    except ValueError as error:
        raise BadRequest(f"The request holds a value that cannot be used: {error}.") from None
    if not 0 <= seed < 2**53:
        raise BadRequest(f"The seed must be a number from 0 to {2**53 - 1}, not {seed}.")
    if not 0 <= keep <= 1:
        raise BadRequest(f"The share to keep must be between 0 and 1, not {keep:g}.")
    if num_classes and not 0 <= label < num_classes:
        raise BadRequest(f"The class must be between 0 and {num_classes - 1}, not {label}.")
    if sampling.is_guided and not demo.trained.card.model.label_dropout:
        raise BadRequest("This model was not trained for guidance; it must be 1.")
    return Wish(mode, seed, label, keep, sampling)


async def _body(request: Request, *, keep: bool = True) -> bytes:
    """What is uploaded; without `keep`, it is only received. Raises BadRequest for what is too large or too slow."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(LONGEST_UPLOAD_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > LARGEST_UPLOAD:
                    raise BadRequest(f"The file is larger than {LARGEST_UPLOAD >> 20} MB; choose a smaller image.")
                if keep:
                    body += chunk
    except TimeoutError:
        raise BadRequest(f"The file took longer than {LONGEST_UPLOAD_SECONDS:.0f} seconds to arrive.") from None
    return bytes(body)


def _picture(upload: bytes, size: int) -> Tensor | None:
    """The square in the middle of an uploaded image, at the model's size: uint8 [size, size, 3]; None for no upload."""
    if not upload:
        return None
    try:
        picture = open_picture(upload, LARGEST_PICTURE)
    except ValueError as error:
        raise BadRequest(f"The file {error}; choose a PNG, JPEG or WebP image.") from None
    with contextlib.suppress(Exception):  # damaged EXIF fails in many ways, and the pixels are good
        ImageOps.exif_transpose(picture, in_place=True)
    return to_tensor(_middle(picture, size))


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """The square in the middle, at this size, as RGB."""
    if picture.mode.startswith(("I", "F")):  # grey of more than 8 bits
        square = ImageOps.fit(picture.convert(picture.mode[0]), (size, size), Image.Resampling.BOX)
        return _in_8_bits(np.asarray(square, np.float64)).convert("RGB")
    transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    mode = "RGBA" if transparent else "RGB"
    if picture.mode != mode:
        picture = picture.convert(mode)
    square = ImageOps.fit(picture, (size, size), Image.Resampling.BOX)
    if transparent:  # when it is small: each copy of a large picture is hundreds of megabytes
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return square


def _in_8_bits(values: NDArray[np.float64]) -> Image.Image:
    """Grey values of 16 bits, or of any other range, which is stretched. Pillow would make all above 255 white."""
    lowest, highest = 0.0, 65535.0
    values = np.nan_to_num(values)
    if values.min() < lowest or values.max() > highest or values.max() <= 1:
        lowest, highest = values.min(), max(values.max(), values.min() + 1e-9)
    return Image.fromarray(np.uint8((values - lowest) / (highest - lowest) * 255 + 0.5))


def _base64(pixels: Tensor) -> str:
    return base64.b64encode(pixels.contiguous().numpy().tobytes()).decode()


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    to_picture(image).save(file, "PNG")
    return file.getvalue()


def _png_url(image: Tensor) -> str:
    return f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"


def prepare(trained: TrainedModel, data_url: str | None = None) -> Demo:
    """The demo of a model, with examples and names of classes where its data is at hand."""
    card = trained.card
    examples: list[bytes] = []
    names = tuple(str(number) for number in range(card.model.num_classes))
    try:
        shards = open_shards(own_data(trained, card.validation_url, data_url), read_deadline_seconds=10)
        count = min(EXAMPLES, shards.count)
        batch = next(evaluation_batches(shards, rank=0, world_size=1, batch_images=count, limit=count))
        examples = [_png(image) for image in batch.images]
        names = shards.classes if card.model.num_classes else ()
    except (DataError, UsageError) as error:
        print(f"no examples on the page, as the validation images are not at hand: {error}", file=sys.stderr)
    return Demo(trained, examples, list(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    add_data_argument(parser)
    parser.add_argument("--port", type=int, default=8765, help="port of the page (default 8765; 0: any free one)")
    arguments = parser.parse_args()
    return run_tool(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> None:
    listener = socket.socket()
    # A port whose last connections are still winding down can be taken again at once.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, arguments.port))
    except (OSError, OverflowError) as error:
        raise UsageError(f"--port: {arguments.port} cannot be used ({error}); choose another, or 0") from None
    trained = load_trained_model(arguments.run, arguments.weights, arguments.last, arguments.checkpoint_url)
    demo = prepare(trained, arguments.data_url)
    print(f"open http://{HOST}:{listener.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
    settings = uvicorn.Config(
        make_app(demo), log_level="warning", timeout_graceful_shutdown=1, limit_concurrency=MOST_CONNECTIONS
    )
    server = uvicorn.Server(settings)
    server.run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
