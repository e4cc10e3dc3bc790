"""Are tricky image files decoded as documented, counted, or refused by name?"""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline import decode as module
from data_pipeline.decode import decode_image
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import image_bytes, random_pixels

PIXELS = random_pixels(9, 7, 0)


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_bytes(PIXELS, "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "name", "notes"),
    [
        (image_bytes(PIXELS, "PNG"), "a.png", ()),
        (image_bytes(PIXELS, "JPEG"), "a.JPEG", ()),
        (image_bytes(PIXELS, "PNG"), "n02105855_2933.JPEG", ("png_named_jpeg",)),
        (image_bytes(PIXELS, "JPEG", "CMYK"), "a.jpg", ("cmyk",)),
        (image_bytes(PIXELS, "JPEG", "L"), "a.jpg", ("gray",)),
        (image_bytes(PIXELS, "PNG", "RGBA"), "a.png", ("alpha",)),
        (image_bytes(PIXELS, "PNG", "P"), "a.png", ("palette",)),
        (image_bytes(PIXELS, "PNG", "1"), "a.png", ("gray",)),
        (rotated_jpeg(), "a.jpg", ("exif_rotation_ignored",)),
    ],
)
def test_odd_files_are_converted_as_pillow_does_and_noted(data: bytes, name: str, notes: tuple[str, ...]) -> None:
    image, got = decode_image(data, name)
    assert got == notes
    assert (np.asarray(image) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert image.size == (7, 9), "not rotated"


def jpeg_of_two() -> bytes:
    """As many cameras write them: MPO to Pillow."""
    stream = io.BytesIO()
    first, second = (Image.fromarray(random_pixels(9, 7, seed)) for seed in (0, 1))
    first.save(stream, "MPO", save_all=True, append_images=[second])
    return stream.getvalue()


def test_a_jpeg_with_another_behind_it_is_a_jpeg() -> None:
    image, notes = decode_image(jpeg_of_two(), "a.jpg")
    assert image.size == (7, 9) and notes == ("first_frame_of_several",)
    assert decode_image(jpeg_of_two(), "a.png")[1] == ("jpeg_named_png", "first_frame_of_several")


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0", b"Exif\0\0" + bytes(range(40))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_does_not_parse_costs_no_image(kind: str, exif: bytes) -> None:
    data = image_bytes(PIXELS, kind, exif=exif)
    image, notes = decode_image(data, f"a.{kind.lower()}")
    assert image.size == (7, 9) and notes in ((), ("exif_damaged",))


@pytest.mark.parametrize(
    ("kind", "options"), [("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PNG", {})]
)
def test_no_width_makes_eight_bits_sixteen(kind: str, options: dict[str, str]) -> None:
    for width in (5, 16, 54, 72, 116, 160):  # rows of 16, 48, 164, 216, 348 and 480 bytes, and other offsets
        for height in range(1, 9):
            pixels = random_pixels(height, width, 0)
            image, _ = decode_image(image_bytes(pixels, kind, **options), "a")
            assert (np.asarray(image) == pixels).all()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (image_bytes(PIXELS, "GIF"), "a GIF"),
        (b"\0\0\0\x1cftypavif\0\0", "an AVIF"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC"),
        (b"<!doctype html>", "a web page or SVG"),
        (b"", "empty"),
        (b"hello world, hello", "something that begins with b'hello world,"),
    ],
)
def test_a_message_says_what_the_file_is_instead(data: bytes, kind: str) -> None:
    with pytest.raises(
        DataError, match=f"^a.jpg is not an image .it is {kind}.*, and JPEG, PNG, .* are read.; replace"
    ):
        decode_image(data, "a.jpg")


def test_an_animation_gives_its_first_frame() -> None:
    stream = io.BytesIO()
    frames = [Image.fromarray(random_pixels(9, 7, seed)) for seed in range(3)]
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    image, notes = decode_image(stream.getvalue(), "a.png")
    assert notes == ("first_frame_of_several",) and (np.asarray(image) == np.asarray(frames[0])).all()


@pytest.mark.parametrize("content", [b"", b"<html>no such image</html>", b"\xff\xd8\xff\xe0 cut", b"\0" * 5000])
def test_what_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^a/b.jpg is (not an image|damaged) \(.+\)") as caught:
        decode_image(content, "a/b.jpg")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_that_is_cut_off_is_not_half_gray(kind: str) -> None:
    data = image_bytes(random_pixels(64, 64, 0), kind)
    for length in (len(data) // 4, len(data) // 2, len(data) - 60):
        with pytest.raises(DataError, match="is damaged"):
            decode_image(data[:length], "x")


@pytest.mark.parametrize("colour", [0, 2, 4, 6])  # gray, RGB, gray with alpha, RGBA
def test_sixteen_bits_a_channel_are_refused_instead_of_clipped(colour: int) -> None:
    row = b"\0" + np.full(4 * {0: 1, 2: 3, 4: 2, 6: 4}[colour], 40_000, ">u2").tobytes()
    with pytest.raises(DataError, match="^x.png has .* of more than 8 bits a channel: convert it") as caught:
        decode_image(png_file(4, 4, 16, colour, row * 4), "x.png")
    assert caught.value.exit_code == 65


def png_file(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file put together by hand; Pillow does not write all kinds that there are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("edge", [12_000, 20_000, 2**31 - 1])
def test_a_png_that_would_fill_the_memory_is_refused_before_decoding(edge: int) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=f"^x.png has {edge} x {edge} pixels: remove it|^x.png is damaged .*bomb"):
        decode_image(png_file(edge, edge, 8, 2, bytes(1000)), "x.png")
    assert time.process_time() - started < 2, "decoding would take longer"


def test_absurd_dimensions_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_IMAGE_PIXELS", 62)
    with pytest.raises(DataError, match="has 7 x 9 pixels"):
        decode_image(image_bytes(PIXELS), "x")


def test_formats_that_run_programs_are_not_opened() -> None:
    """Pillow would hand PostScript to Ghostscript."""
    with pytest.raises(DataError, match="is not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 9\n%%EndComments\nshowpage\n", "x.eps")
