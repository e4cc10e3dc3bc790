"""How do the bytes of an image file become an RGB image, and what was odd about them?

Nothing is rotated and nothing is repaired, as in the published small versions of ImageNet. What is unusual is counted,
so that the manifest can say how often it happened.
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from data_pipeline.storage import EXIT_CORRUPT, DataError

LARGEST_IMAGE_PIXELS = 100_000_000
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


def decode_image(data: bytes, name: str, edge: int | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """The RGB image in a file of any format of ``SUFFIXES``, and notes on what was odd about the file.

    ``edge``: width and height that the image must have, if that is known.
    DataError (exit code 65) names the file when it is damaged, absurdly large, or of a kind without an obvious
    conversion to 8-bit RGB.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF that does not parse, which a few files of ImageNet have
            image = Image.open(io.BytesIO(data), formats=tuple(SUFFIXES))
            if image.width * image.height > LARGEST_IMAGE_PIXELS:
                raise DataError(f"{name} has {image.width} x {image.height} pixels: remove it", EXIT_CORRUPT)
            if edge is not None and image.size != (edge, edge):
                raise DataError(f"{name} is {image.width} x {image.height}, not {edge} x {edge}", EXIT_CORRUPT)
            notes = tuple(oddities(image, name))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB"), notes
    except DataError:
        raise
    # Pillow's decoders raise nearly anything for damaged files (struct.error, SyntaxError, IndexError, ...).
    except Exception as error:  # noqa: BLE001
        kind = "is not an image" if isinstance(error, UnidentifiedImageError) else "is damaged"
        raise DataError(
            f"{name} {kind} ({type(error).__name__}: {error}); replace or remove it", EXIT_CORRUPT
        ) from error


def oddities(image: Image.Image, name: str) -> list[str]:
    """What is worth counting about an opened file; raises DataError for one that has no obvious 8-bit RGB."""
    # Pillow would clip 16-bit gray and cut off the lower half of other 16-bit values, both without a warning.
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    if image.mode.startswith(("I", "F")) or any("16" in mode for mode in raw_modes):
        raise DataError(
            f"{name} has {image.mode} pixels of more than 8 bits a channel: convert it to 8 bits first", EXIT_CORRUPT
        )
    notes = []
    if image.mode in UNUSUAL_MODES:
        notes.append(UNUSUAL_MODES[image.mode])
    suffix = name.lower().rpartition(".")[2]
    if suffix in sum(SUFFIXES.values(), ()) and suffix not in SUFFIXES[str(image.format)]:
        notes.append(f"{str(image.format).lower()}_named_{suffix}")
    if "exif" in image.info and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        notes.append("exif_rotation_ignored")
    if getattr(image, "n_frames", 1) > 1:
        notes.append("first_frame_of_several")
    return notes
