"""How does a tiny ImageNet look in each form that people have it in? Real files, made from seeded pixels."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n02123045", "n15075141")


def random_pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_bytes(pixels: np.ndarray, kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def tar_bytes(files: dict[str, bytes], kind: str = "w", tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=kind, format=tar_format) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def training_files(images: int = 4) -> dict[str, dict[str, bytes]]:
    """Files of each class; PNG under the name JPEG, so that pixels come back exactly."""
    return {
        wnid: {
            f"{wnid}_{i}.JPEG": image_bytes(random_pixels(12 + i, 9 + number, 100 * number + i)) for i in range(images)
        }
        for number, wnid in enumerate(WNIDS)
    }


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def train_tar(path: Path) -> Path:
    """``ILSVRC2012_img_train.tar``; its classes lie in no particular order."""
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in reversed(training_files().items())}
    return put(path, tar_bytes(inner))
