"""How fast does MosaicML streaming deliver the same images? In a virtual environment of its own; see streaming.py."""

import json
import sys
import time
from pathlib import Path

# Python puts the folder of a script first, where streaming.py is another program.
sys.path.pop(0)

import numpy as np  # noqa: E402
import streaming  # noqa: E402
import torch  # noqa: E402

BATCH = 256


def prepare(work: Path) -> None:
    """Write the images as raw bytes, without compression or hashes: its fastest form."""
    pixels = np.load(work / "pixels.npy", mmap_mode="r")
    with streaming.MDSWriter(out=str(work / "mosaicml"), columns={"image": "bytes"}) as writer:
        for image in pixels:
            writer.write({"image": image.tobytes()})


def read(work: Path) -> dict[str, float]:
    """One shuffled pass, batches of 256."""
    size = np.load(work / "pixels.npy", mmap_mode="r").shape[1]
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=str(work / "mosaicml"), shuffle=True, batch_size=BATCH, shuffle_seed=0)
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
