"""Does the page draw what the model draws, refuse in sentences what it cannot, and work in a real browser?"""

import asyncio
import base64
import http.client
import io
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from models.decoding import generate
from models.drawing.draw import Sampling
from models.given import Given
from tests.conftest import pack_photographs
from tests.support.browser import CHROMIUM, Browser
from tests.support.tiny_model import random_images
from tests.support.tiny_run import CLASSES, SUPER_RESOLUTION, tiny_run
from trainer import demo
from trainer.demo import HOST, Demo, make_app, prepare
from trainer.model_inputs import area_downsample
from trainer.pictures import to_picture
from trainer.trained_model import TrainedModel

SECONDS = 60.0
FOUR_VALUES = {"model__input": "categorical", "model__output": "categorical"}


class Server:
    """A demo that is served by a thread of this process."""

    def __init__(self, served: Demo) -> None:
        self.demo = served
        self.listener = socket.socket()
        self.listener.bind((HOST, 0))
        self.port: int = self.listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(make_app(served), log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        until = time.monotonic() + SECONDS
        while not self.server.started:
            assert time.monotonic() < until
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)

    def open(self, method: str, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
        """The answer to a request, of which only the head has been read."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=SECONDS)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse()

    def get(self, path: str) -> bytes:
        answer = self.open("GET", path)
        assert answer.status == 200
        return answer.read()

    def draw(self, body: bytes = b"", **wish: object) -> list[dict[str, Any]]:
        """All messages of a drawing."""
        answer = self.open("POST", f"/draw?{urlencode(wish)}", body)
        text = answer.read().decode()
        assert answer.status == 200, text
        return [json.loads(line) for line in text.splitlines()]

    def refusal(self, body: bytes = b"", **wish: object) -> str:
        """The sentence that a drawing is refused with."""
        answer = self.open("POST", f"/draw?{urlencode(wish)}", body)
        assert answer.status == 400
        return answer.read().decode()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        pack_photographs(str(folder / split), images=8, split=split)
    return folder


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves models, each until the test ends."""
    servers: list[Server] = []

    def start(trained: TrainedModel, examples: list[bytes] | None = None, names: list[str] | None = None) -> Server:
        servers.append(Server(Demo(trained, examples or [], names or [])))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def png(image: Tensor, **options: Any) -> bytes:
    file = io.BytesIO()
    to_picture(image).save(file, "PNG", **options)
    return file.getvalue()


def painted(messages: list[dict[str, Any]], size: int = 8) -> Tensor:
    """The image uint8 [size, size, 3] after all messages, as the page paints it."""
    canvas = decoded(messages[0], size)[..., :3].reshape(-1, 3).clone()
    for message in messages[1:]:
        canvas[message["pixels"]] = torch.tensor(message["colours"], dtype=torch.uint8).view(-1, 3)
    return canvas.view(size, size, 3)


def decoded(first: dict[str, Any], size: int = 8) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(first["picture"])), dtype=torch.uint8).view(size, size, 4)


def test_a_new_image_comes_as_the_pixels_of_the_model(tmp_path: Path, data: Path, serve: Any) -> None:
    trained = tiny_run(tmp_path / "run", data)
    messages = serve(trained).draw(mode="new", seed=3, temperature=0.8)
    assert (decoded(messages[0]) == 0).all()
    assert sum(len(message["pixels"]) for message in messages[1:]) == 64
    assert [message["done"] for message in messages] == sorted(message["done"] for message in messages)
    assert messages[-1]["done"] == messages[-1]["total"] == 64
    assert torch.equal(painted(messages), generate(trained.model, 1, seed=3, sampling=Sampling(temperature=0.8))[0])


def test_sub_pixels_are_shown_as_they_come(tmp_path: Path, data: Path, serve: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "SECONDS_A_MESSAGE", 0.0)
    trained = tiny_run(tmp_path / "run", data, **FOUR_VALUES)
    messages = serve(trained).draw(mode="new", seed=3)
    assert 192 / 4 < len(messages) - 1 < 192  # one to four at a time
    assert messages[1]["done"] == 1
    image = generate(trained.model, 1, seed=3)[0]
    red = image[0, 0].clone()
    red[1:] = 0
    assert messages[1]["colours"] == red.tolist()
    assert torch.equal(painted(messages), image)


@pytest.mark.parametrize("kind", [{}, FOUR_VALUES], ids=["pixels", "sub-pixels"])
def test_an_uploaded_image_is_completed(kind: dict[str, object], tmp_path: Path, data: Path, serve: Any) -> None:
    trained = tiny_run(tmp_path / "run", data, **kind)
    original = random_images(1, 8)[0]
    messages = serve(trained).draw(png(original), mode="complete", keep=0.25, seed=1)
    given = decoded(messages[0])
    assert torch.equal(given[:2, :, :3], original[:2]) and (given[:2, :, 3] == 255).all()
    assert (given[2:] == 0).all()
    length = len(trained.model.generation_order)
    assert messages[0]["done"] == length // 4
    known = torch.arange(length) < length // 4
    assert torch.equal(painted(messages), generate(trained.model, 1, seed=1, images=original[None], known=known)[0])


def test_the_middle_of_a_large_image_is_shrunk_and_super_resolved(tmp_path: Path, data: Path, serve: Any) -> None:
    trained = tiny_run(tmp_path / "run", data, **SUPER_RESOLUTION)
    middle = random_images(1, 8)[0]
    large = torch.full((16, 24, 3), 99, dtype=torch.uint8)
    large[:, 4:20] = middle.repeat_interleave(2, 0).repeat_interleave(2, 1)
    server = serve(trained)
    messages = server.draw(png(large), mode="super-resolve", seed=2)
    small = area_downsample(middle[None], 4)
    assert torch.equal(painted(messages), generate(trained.model, 1, seed=2, given=Given(small_images=small))[0])
    assert messages[0]["small"].startswith("data:image/png") and messages[0]["original"].startswith("data:image/png")
    assert json.loads(server.get("/model"))["modes"] == ["super-resolve", "complete"]


def test_a_class_is_drawn_with_guidance(tmp_path: Path, data: Path, serve: Any) -> None:
    trained = tiny_run(tmp_path / "run", data, **CLASSES)
    with torch.no_grad():
        trained.model.embed_class.weight.mul_(20)
    server = serve(trained, names=list("abcde"))
    messages = server.draw(mode="new", seed=2, guidance=2.5, **{"class": 3})
    given = Given(labels=torch.tensor([3]))
    expected = generate(trained.model, 1, seed=2, given=given, sampling=Sampling(guidance=2.5))
    assert torch.equal(painted(messages), expected[0])
    assert json.loads(server.get("/model"))["classes"] == list("abcde")


def test_pictures_of_every_kind_are_read(tmp_path: Path, data: Path, serve: Any) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    image = to_picture(random_images(1, 8)[0])
    for mode, kind in (("RGB", "JPEG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("1", "PNG"), ("CMYK", "JPEG")):
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        assert server.draw(file.getvalue(), mode="complete")[-1]["done"] == 64
    nothing = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(nothing, "PNG")
    given = decoded(server.draw(nothing.getvalue(), mode="complete", keep=1)[0])
    assert (given == 255).all()  # what is transparent is white


def test_grey_of_many_bits_goes_from_black_to_white() -> None:
    ramp = np.tile(np.linspace(0, 1, 8), (8, 1))
    whites = {"I;16": 65535, "I;16B": 65535, "I": 1 << 30, "F": 1.0}
    for (mode, white), kind in zip(whites.items(), ("PNG", "TIFF", "TIFF", "TIFF"), strict=True):
        values = (ramp * white).astype({"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode])
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind)
        pixels = demo._picture(file.getvalue(), 8)
        assert pixels is not None
        assert pixels[3, :, 1].tolist() == [0, 36, 73, 109, 146, 182, 219, 255], mode


def test_a_picture_with_damaged_exif_or_odd_colours_is_drawn() -> None:
    whole = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(whole, "JPEG")
    exif = b"Exif\0\0" + bytes(range(40))  # no table of EXIF begins like that
    head = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big")
    damaged = whole.getvalue()[:2] + head + exif + whole.getvalue()[2:]
    assert demo._picture(damaged, 8) is not None
    colours = io.BytesIO()
    Image.new("LAB", (8, 8)).save(colours, "TIFF")
    assert demo._picture(colours.getvalue(), 8) is not None


def test_what_cannot_be_drawn_is_refused_in_a_sentence(
    tmp_path: Path, data: Path, serve: Any, monkeypatch: Any
) -> None:
    server = serve(tiny_run(tmp_path / "run", data, **CLASSES))
    whole = png(random_images(1, 8)[0])
    assert "is not an image that can be read" in server.refusal(b"hello", mode="complete")
    assert "is not an image that can be read" in server.refusal(whole[: len(whole) // 2], mode="complete")
    assert server.refusal(mode="complete") == "Drop an image on the page first, or take one of the examples."
    assert server.refusal(mode="super-resolve") == "This model can new and complete, not super-resolve."
    assert "must be between 0 and 4, not 5" in server.refusal(mode="new", **{"class": 5})
    assert "must be between 0 and 1, not nan" in server.refusal(whole, mode="complete", keep="nan")
    assert "temperature: must be above 0" in server.refusal(mode="new", temperature=0)
    assert "a value that cannot be used" in server.refusal(mode="new", seed="x")
    assert "The seed must be a number from 0" in server.refusal(mode="new", seed=-1)
    monkeypatch.setattr(demo, "LARGEST_PICTURE", 63)
    assert "has 8 x 8 pixels; more than 63 are not read" in server.refusal(whole, mode="complete")
    monkeypatch.setattr(demo, "LARGEST_UPLOAD", 1 << 20)
    assert "larger than 1 MB" in server.refusal(bytes(2 << 20), mode="complete")
    plain = serve(tiny_run(tmp_path / "plain", data))
    assert "was not trained for guidance" in plain.refusal(mode="new", guidance=2)
    # After all that, the next visitor is served.
    assert plain.draw(mode="new")[-1]["done"] == 64


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Drawings go on only while this is set."""
    go_on = threading.Event()
    advance = demo._Drawing.advance

    def waiting(drawing: Any) -> dict[str, Any]:
        assert go_on.wait(SECONDS)
        return advance(drawing)

    monkeypatch.setattr(demo._Drawing, "advance", waiting)
    monkeypatch.setattr(demo, "SECONDS_A_MESSAGE", 0.0)
    yield go_on
    go_on.set()


def test_one_image_at_a_time_and_a_stopped_one_makes_room(
    tmp_path: Path, data: Path, serve: Any, held: threading.Event
) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    first = server.open("POST", "/draw?mode=new")
    assert json.loads(first.readline())["done"] == 0
    second = server.open("POST", "/draw?mode=new")
    assert second.status == 409
    assert second.read() == b"Another image is being drawn; stop it, or wait until it is done."
    assert server.open("POST", "/stop").status == 200
    held.set()
    messages = [json.loads(line) for line in first.read().splitlines()]
    assert messages[-1] == {"stopped": True} and len(messages) < 64
    assert server.draw(mode="new")[-1]["done"] == 64


def test_a_visitor_who_leaves_makes_room(tmp_path: Path, data: Path, serve: Any, held: threading.Event) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    connection = http.client.HTTPConnection(HOST, server.port, timeout=SECONDS)
    connection.request("POST", "/draw?mode=new")
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    held.set()
    until = time.monotonic() + SECONDS
    while (answer := server.open("POST", "/draw?mode=new")).status == 409:
        assert time.monotonic() < until
    assert json.loads(answer.read().splitlines()[-1])["done"] == 64


def test_the_page_names_no_other_host_and_other_hosts_cannot_name_it(tmp_path: Path, data: Path, serve: Any) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    answer = server.open("GET", "/")
    policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "").replace("xmlns='http://www.w3.org/", "")
    assert server.open("GET", "/", host="evil.example").status == 400
    assert server.open("GET", "/", host=f"localhost:{server.port}").status == 200


def test_pages_of_other_sites_are_refused(tmp_path: Path, data: Path, serve: Any) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    own = f"http://{HOST}:{server.port}"
    for path in ("/draw?mode=new", "/stop"):
        for origin in (
            "https://evil.example",
            "null",
            f"http://{HOST}:1",
            f"https://{HOST}:{server.port}",
            f"{own}.evil.example",
        ):
            assert server.open("POST", path, origin=origin).status == 403
        for site in ("cross-site", "same-site"):
            assert server.open("POST", path, sec_fetch_site=site).status == 403
    assert server.open("GET", "/model", sec_fetch_site="cross-site").status == 403
    assert server.open("GET", "/", sec_fetch_site="cross-site").status == 200  # somebody follows a link
    assert not server.demo.stopped.is_set()
    answer = server.open("POST", "/draw?mode=new", origin=own, sec_fetch_site="same-origin")
    assert answer.status == 200
    answer.read()


def test_a_picture_is_not_decoded_while_another_is_drawn(
    tmp_path: Path, data: Path, serve: Any, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    first = server.open("POST", "/draw?mode=new")
    first.readline()

    def decode(content: bytes, max_pixels: int) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(demo, "open_picture", decode)
    assert server.open("POST", "/draw?mode=complete", png(random_images(1, 8)[0])).status == 409
    held.set()
    first.read()


def test_visitors_who_leave_are_no_error(
    tmp_path: Path, data: Path, serve: Any, held: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    for request in (b"Content-Length: 100000\r\n\r\nhalf", b"Content-Length: 0\r\n\r\n"):
        with socket.create_connection((HOST, server.port), timeout=SECONDS) as visitor:
            visitor.sendall(b"POST /draw?mode=new HTTP/1.1\r\nHost: 127.0.0.1\r\n" + request)
            time.sleep(0.2)
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave at once
        held.set()
        until = time.monotonic() + SECONDS
        while server.demo.busy.locked():
            assert time.monotonic() < until
            time.sleep(0.01)
        held.clear()
    held.set()
    assert server.draw(mode="new")[-1]["done"] == 64
    assert not caplog.records


def test_a_slow_upload_makes_room(tmp_path: Path, data: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LONGEST_UPLOAD_SECONDS", 0.2)
    server = serve(tiny_run(tmp_path / "run", data))
    with socket.create_connection((HOST, server.port), timeout=SECONDS) as visitor:
        visitor.sendall(b"POST /draw?mode=new HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n")
        assert visitor.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.draw(mode="new")[-1]["done"] == 64


def test_a_format_that_pillow_gives_to_a_program_is_not_read(tmp_path: Path, data: Path, serve: Any) -> None:
    server = serve(tiny_run(tmp_path / "run", data))
    script = io.BytesIO()
    Image.new("RGB", (8, 8)).save(script, "EPS")
    assert "is not an image that can be read" in server.refusal(script.getvalue(), mode="complete")


def test_the_data_gives_examples_and_names_and_may_be_away(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_hand = prepare(tiny_run(tmp_path / "run", data))
    assert len(at_hand.examples) == 8
    with Image.open(io.BytesIO(at_hand.examples[0])) as picture:
        assert picture.size == (8, 8)
    away = prepare(tiny_run(tmp_path / "away", tmp_path / "nowhere", **CLASSES))
    assert away.examples == [] and away.class_names == ["0", "1", "2", "3", "4"]
    assert "no examples on the page" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        for value, words in ((port, "choose another, or 0"), (70000, "choose another, or 0")):
            monkeypatch.setattr(sys, "argv", ["demo", "--run", str(tmp_path), "--port", str(value)])
            assert demo.main() == 2
            assert words in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["demo", "--run", str(tmp_path), "--port", "0"])
    assert demo.main() == 2
    assert "holds no run" in capsys.readouterr().err


DROP = """{
    const bytes = Uint8Array.from(atob('%s'), (character) => character.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], '%s'));
    document.dispatchEvent(new DragEvent('drop', { dataTransfer: files, cancelable: true }));
}"""
CANVAS = "Array.from(context.getImageData(0, 0, 8, 8).data)"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome (apt-get install chromium)")
def test_a_visitor_draws_completes_and_is_told_of_mistakes_in_a_real_browser(
    tmp_path: Path, data: Path, serve: Any
) -> None:
    trained = tiny_run(tmp_path / "run", data)
    original = random_images(1, 8)[0]
    served = serve(trained, examples=[png(image) for image in random_images(2, 8, seed=5)])
    url = f"http://{HOST}:{served.port}/"

    async def canvas(page: Browser) -> Tensor:
        return torch.tensor(await page.run(CANVAS), dtype=torch.uint8).view(8, 8, 4)

    async def visit() -> None:
        async with Browser() as page:
            await page.open(url)
            await page.wait_for("$('modes').children.length == 2 && $('examples').children.length == 2")
            assert await page.run("getComputedStyle($('image-field')).display") == "none"
            await page.run("$('seed').value = 7; $('go').click()")
            await page.wait_for("state.finished == 1")
            assert torch.equal((await canvas(page))[..., :3], generate(trained.model, 1, seed=7)[0])
            assert await page.run("$('gallery').querySelectorAll('img').length") == 1

            # A dropped image changes to completing; the canvas shows what the model will be given.
            await page.run(DROP % (base64.b64encode(png(original)).decode(), "a.png"))
            await page.wait_for("state.mode == 'complete' && state.picture")
            await page.run("$('keep').value = 0.25; $('keep').dispatchEvent(new Event('input', { bubbles: true }))")
            shown = await canvas(page)
            assert torch.equal(shown[:2, :, :3], original[:2]) and (shown[2:, :, 3] == 0).all()
            assert await page.run("$('keep-out').textContent") == "25 %"
            await page.run("$('go').click()")
            await page.wait_for("state.finished == 2")
            expected = generate(trained.model, 1, seed=7, images=original[None], known=torch.arange(64) < 16)[0]
            assert torch.equal((await canvas(page))[..., :3], expected)

            await page.run("$('examples').children[1].click()")
            await page.wait_for("$('examples').children[1].getAttribute('aria-pressed') == 'true'")
            await page.run(DROP % (base64.b64encode(b"hello").decode(), "a.txt"))
            await page.wait_for("$('status').className == 'bad'")
            assert "not an image" in await page.run("$('status').textContent")
            assert page.complaints == []
            assert all(asked.startswith((url, "data:", f"blob:{url}")) for asked in page.requests)

    asyncio.run(asyncio.wait_for(visit(), 240))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome (apt-get install chromium)")
def test_a_visitor_stops_a_drawing_in_a_real_browser(
    tmp_path: Path, data: Path, serve: Any, held: threading.Event
) -> None:
    served = serve(tiny_run(tmp_path / "run", data))

    async def visit() -> None:
        async with Browser() as page:
            await page.open(f"http://{HOST}:{served.port}/")
            await page.wait_for("$('modes').children.length == 2")
            await page.run("$('go').click()")
            await page.wait_for("state.drawing && state.begin === 0")
            assert await page.run("$('go').textContent") == "Stop"
            await page.run("$('go').click()")
            until = time.monotonic() + SECONDS
            while not served.demo.stopped.is_set():
                assert time.monotonic() < until
                await asyncio.sleep(0.01)
            held.set()
            await page.wait_for("!state.drawing")
            assert await page.run("$('status').textContent") == "Stopped."
            await page.run("$('go').click()")
            await page.wait_for("state.finished == 1")

    asyncio.run(asyncio.wait_for(visit(), 240))
