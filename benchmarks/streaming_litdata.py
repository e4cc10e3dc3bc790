"""How fast does litdata deliver the same images? Runs in a virtual environment of its own; see streaming.py."""

import json
import sys
import time
from pathlib import Path

import litdata
import numpy as np
import torch

BATCH = 256


def prepare(work: Path) -> None:
    """Write the images as raw bytes, litdata's fastest form."""
    pixels = np.load(work / "pixels.npy", mmap_mode="r")
    writer = litdata.streaming.cache.Cache(str(work / "litdata"), chunk_bytes="64MB")
    for number, image in enumerate(pixels):
        writer[number] = {"image": image.tobytes()}
    writer.done()
    writer.merge()


def read(work: Path) -> dict[str, float]:
    """One shuffled pass, batches of 256."""
    size = np.load(work / "pixels.npy", mmap_mode="r").shape[1]
    data = litdata.StreamingDataset(str(work / "litdata"), shuffle=True, seed=0, drop_last=False)
    cpu, wall, images, batch = time.process_time(), time.perf_counter(), 0, []
    for sample in data:
        batch.append(np.frombuffer(sample["image"], np.uint8))
        if len(batch) == BATCH:
            images += len(torch.from_numpy(np.stack(batch).reshape(-1, size, size, 3)))
            batch.clear()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = float(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return {"images": images, "cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": peak}


if __name__ == "__main__":
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "prepare":
        prepare(folder)
    else:
        print(json.dumps(read(folder)))
