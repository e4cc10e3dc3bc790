"""How do the bytes of an image file become an RGB image, and what was odd about them?

Nothing is rotated and nothing is repaired, as in the published small versions of ImageNet. What is unusual is counted,
so that the manifest can say how often it happened.
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from data_pipeline.storage import EXIT_CORRUPT, DataError, lacks_memory

LARGEST_IMAGE_PIXELS = 100_000_000
BYTES_A_PIXEL = 8  # while an image is decoded and converted
EXIF_ORIENTATION = 0x0112
UNUSUAL_MODES = {
    "CMYK": "cmyk",
    "L": "gray",
    "LA": "gray",
    "1": "gray",
    "P": "palette",
    "RGBA": "alpha",
    "PA": "palette",
}
SUFFIXES = {"JPEG": ("jpg", "jpeg"), "PNG": ("png",), "WEBP": ("webp",), "BMP": ("bmp",), "TIFF": ("tif", "tiff")}
# What comes in the place of images: where in the file which bytes are, and what it is then.
OTHER_FILES = (
    (0, b"GIF8", "a GIF"),
    *((4, b"ftyp" + brand, "an AVIF") for brand in (b"avif", b"avis")),
    *((4, b"ftyp" + brand, "a HEIC") for brand in (b"heic", b"heix", b"mif1", b"msf1")),
    (4, b"ftyp", "a film"),
    (4, b"JXL ", "a JPEG XL"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (4, b"jP  ", "a JPEG 2000"),
    (0, b"<", "a web page or SVG"),
    (0, b"%PDF", "a PDF"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\x00\x05\x16\x07", "what macOS leaves beside a file"),
    (0, b"version https://git-lfs", "a pointer of Git LFS"),
)


def decode_image(data: bytes, name: str, edge: int | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """The RGB image in a file of any format of ``SUFFIXES``, and notes on what was odd about the file.

    ``edge``: width and height that the image must have, if that is known.
    DataError (exit code 65) names the file when it is damaged, absurdly large, or of a kind without an obvious
    conversion to 8-bit RGB. MemoryError stays what it is where the memory is too small for an image of that size.
    """
    needed = len(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF that does not parse, which a few files of ImageNet have
            image = Image.open(io.BytesIO(data), formats=tuple(SUFFIXES))
            if image.width * image.height > LARGEST_IMAGE_PIXELS:
                raise DataError(f"{name} has {image.width} x {image.height} pixels: remove it", EXIT_CORRUPT)
            if edge is not None and image.size != (edge, edge):
                raise DataError(f"{name} is {image.width} x {image.height}, not {edge} x {edge}", EXIT_CORRUPT)
            needed += BYTES_A_PIXEL * image.width * image.height
            notes = tuple(oddities(image, name))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB"), notes
    except DataError:
        raise
    # Pillow's decoders raise nearly anything for damaged files (struct.error, SyntaxError, IndexError, ...).
    except Exception as error:  # noqa: BLE001
        if lacks_memory(error, needed):
            raise
        what = f"is damaged ({type(error).__name__}: {error})"
        if isinstance(error, UnidentifiedImageError):
            what = f"is not an image (it is {kind_of(data)}, and {', '.join(SUFFIXES)} are read)"
        raise DataError(f"{name} {what}; replace or remove it", EXIT_CORRUPT) from error


def kind_of(data: bytes) -> str:
    """What a file seems to be that is none of the images that are read, for a message."""
    for place, begin, kind in OTHER_FILES:
        if data[place:].startswith(begin):
            return kind
    return f"something that begins with {data[:12]!r}" if data else "empty"


def oddities(image: Image.Image, name: str) -> list[str]:
    """What is worth counting about an opened file; raises DataError for one that has no obvious 8-bit RGB."""
    # Pillow would clip 16-bit gray and cut off the lower half of other 16-bit values, both without a warning.
    # Their raw mode is like RGB;16B, the first of the decoder's arguments. BGR;16 has 16 bits for a pixel.
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    raw_modes = [str(given[0]) if isinstance(given, tuple) and given else str(given) for given in arguments]
    if image.mode.startswith(("I", "F")) or any("16" in mode and mode != "BGR;16" for mode in raw_modes):
        raise DataError(
            f"{name} has {image.mode} pixels of more than 8 bits a channel: convert it to 8 bits first", EXIT_CORRUPT
        )
    notes = []
    if image.mode in UNUSUAL_MODES:
        notes.append(UNUSUAL_MODES[image.mode])
    suffix = name.lower().rpartition(".")[2]
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with another one behind it
    if suffix in sum(SUFFIXES.values(), ()) and suffix not in SUFFIXES[kind]:
        notes.append(f"{kind.lower()}_named_{suffix}")
    try:
        if "exif" in image.info and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            notes.append("exif_rotation_ignored")
    # Its parser raises nearly anything, too, and the pixels do not depend on it.
    except Exception:  # noqa: BLE001
        notes.append("exif_damaged")
    if getattr(image, "n_frames", 1) > 1:
        notes.append("first_frame_of_several")
    return notes
