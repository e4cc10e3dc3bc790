"""How many images per CPU-second does streaming give, beside its peers and the limit, on the same pixels?

    python benchmarks/streaming.py --json streaming.json

Packs crops of real photographs, then lets every contestant deliver shuffled uint8 batches of 256 from a warm page
cache, each in a process of its own with one reader. The peers that clash with this project's dependencies get a
throwaway virtual environment on top of this one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import webdataset

from benchmarks.report import table, write_json, write_section
from data_pipeline.loader import open_shards, train_batches
from data_pipeline.pack import main as pack_main
from data_pipeline.shard_format import decode_samples

BATCH, LANES, FETCH_THREADS = 256, 8, 2
HERE = Path(__file__).resolve().parent

# What the two peers need of packages besides those of this project; their own declared dependencies include a
# torchvision that does not load beside a CPU build of torch, and clients of storage that is not read here.
PEERS = {
    "litdata": [["--no-deps", "litdata==0.2.76"], ["lightning-utilities", "obstore", "tifffile", "boto3", "requests"]],
    "mosaicml": [
        ["--no-deps", "mosaicml-streaming==0.13.0", "catalogue", "zstd", "python-snappy", "cramjam", "Brotli", "tqdm"],
        ["numpy<2.2", "transformers<5"],
    ],
}
TORCHVISION_STUB = {
    "__init__.py": "",
    "datasets.py": "class VisionDataset: ...\nclass CIFAR10: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "def to_tensor(image): raise NotImplementedError\n",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure streaming beside its peers.")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=64, help="edge of the images in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder to keep the data in for another run")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options.contestant, options.work)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        runs, failures = run_all(work, options.images, options.size, options.repeats)
    report(runs, failures, options)
    return 0


def run_all(
    work: Path, images: int, size: int, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Measurements of every contestant, and why a peer is missing."""
    arguments = ["--source", "photographs", "--split", "train", "--size", str(size), "--images", str(images)]
    if code := pack_main([*arguments, "--dest", str(work / "shards")]):
        raise SystemExit(code)
    if not (work / "labels.npy").exists():
        pixels, labels = stored_images(work / "shards")
        np.save(work / "pixels.npy", pixels)
        np.save(work / "labels.npy", labels)
    commands = {name: [sys.executable, __file__, "--contestant", name, "--work", str(work)] for name in CONTESTANTS}
    failures = {}
    for peer in PEERS:
        try:
            python = peer_python(peer, work)
            script = [str(python), str(HERE / f"streaming_{peer}.py")]
            if not (work / peer).exists():
                subprocess.run([*script, "prepare", str(work)], check=True, capture_output=True, text=True)
            commands[peer] = [*script, "read", str(work)]
        except subprocess.CalledProcessError as error:
            failures[peer] = (error.stderr or error.stdout or str(error)).strip().splitlines()[-1]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(repeats):  # in turns, so that a busy moment does not hit one of them alone
        for name, command in commands.items():
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    return runs, failures


def peer_python(peer: str, work: Path) -> Path:
    """The interpreter of a virtual environment that sees this one's packages under its own."""
    folder = work / f"venv-{peer}"
    python = folder / "bin" / "python"
    if python.exists():
        return python
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    for arguments in PEERS[peer]:
        subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True, capture_output=True, text=True)
    for name, text in TORCHVISION_STUB.items():
        (packages / "torchvision" / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / "torchvision" / name).write_text(text)
    return python


def measure(name: str, work: Path) -> dict[str, float]:
    """One pass of a contestant of this file over the data."""
    batches = CONTESTANTS[name](work)
    cpu, wall, images = time.process_time(), time.perf_counter(), 0
    for batch in batches:
        assert batch.dtype == torch.uint8 and batch.shape[-1] == 3
        images += len(batch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = peak_megabytes()
    return {"images": images, "cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": peak}


def peak_megabytes() -> float:
    """Most memory this process held; getrusage would count the parent's."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def stored_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 [N, S, S, 3] and labels int64 [N] of a packed set."""
    shards = open_shards(str(folder))
    size, parts = shards.image_size, []
    for block in shards.manifest.blocks:
        data = shards.store.read(shards.manifest.shards[block.shard].name, block.begin, block.end)
        parts.append(decode_samples(data, size))
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images.reshape(-1, size, size, 3), labels


def ours(work: Path) -> Iterator[torch.Tensor]:
    """This project's loader: checksums on, one epoch."""
    shards = open_shards(str(work / "shards"))
    batches = train_batches(
        shards,
        seed=0,
        lanes=LANES,
        consumed_samples=0,
        rank=0,
        world_size=1,
        global_batch_images=BATCH,
        micro_batch_images=BATCH,
        fetch_threads=FETCH_THREADS,
        prefetch_batches=4,
    )
    for _ in range(shards.count // BATCH):
        yield next(batches).images


def memmap(work: Path) -> Iterator[torch.Tensor]:
    """The limit: no format and no checksums, memory-mapped arrays in random order; the indexing copies every image."""
    pixels, labels = (np.load(work / f"{name}.npy", mmap_mode="r") for name in ("pixels", "labels"))
    order = np.random.default_rng(0).permutation(len(pixels))
    for first in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[first : first + BATCH]
        images, _ = torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows])
        yield images


def stock_webdataset(work: Path) -> Iterator[torch.Tensor]:
    """webdataset as its documentation shows it, on the same shards."""
    urls = [str(path) for path in sorted((work / "shards").glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode().to_tuple("npy", "cls")
    for images, _ in data.batched(BATCH, partial=False):
        yield torch.from_numpy(images)


CONTESTANTS = {"ours": ours, "memmap": memmap, "webdataset": stock_webdataset}


def report(runs: dict[str, list[dict[str, float]]], failures: dict[str, str], options: argparse.Namespace) -> None:
    """Rates of the best run of each, ratios, the spread, and the reasons of missing peers."""
    rates = {name: sorted(run["images"] / run["cpu_seconds"] for run in done) for name, done in runs.items()}
    best = {name: values[-1] for name, values in rates.items()}
    metrics = {f"streaming_vs_{name}": best["ours"] / rate for name, rate in best.items() if name != "ours"}
    rows = [
        [
            name,
            f"{best[name]:,.0f}",
            f"{rates[name][0]:,.0f}",
            f"{max(run['images'] / run['wall_seconds'] for run in runs[name]):,.0f}",
            f"{best['ours'] / best[name]:.2f}",
            f"{max(run['peak_mb'] for run in runs[name]):,.0f}",
        ]
        for name in sorted(best, key=lambda name: -best[name])
    ]
    header = ["", "images per CPU-second (best)", "worst", "images/s", "speed-up of ours", "peak MB"]
    text = f"{options.images:,} images of {options.size} x {options.size}, best of {options.repeats} runs in turns.\n\n"
    text += table(header, rows) + "".join(f"\n\n{peer} could not be measured: {why}" for peer, why in failures.items())
    print(text)
    write_section("streaming", "python benchmarks/streaming.py", text)
    if options.json:
        details: dict[str, Any] = {"runs": runs, "not_measured": failures}
        write_json(options.json, metrics, details)


if __name__ == "__main__":
    sys.exit(main())
