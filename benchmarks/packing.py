"""How much of packing is more than decoding and resizing, and how much do two cores help?

    python benchmarks/packing.py --json packing.json

Makes JPEG files of ImageNet's usual size from real photographs, then compares the packing command with a bare loop
that decodes and resizes the same files. Everything runs in turns, in processes of its own, from a warm page cache.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from benchmarks.report import table, write_json, write_section
from data_pipeline.packing.resize import to_pixels
from data_pipeline.packing.sources_photographs import photograph_at, photographs

WIDTH, HEIGHT, QUALITY = 500, 375, 95
SIZE = 64


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure packing.")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        decode_and_resize(options.decode)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        megabytes = make_photographs(work / "photographs", options.images)
        runs = run_all(work, options.repeats)
    report(runs, options, megabytes)
    return 0


def make_photographs(folder: Path, images: int) -> float:
    """JPEG files in ten class folders; returns their mean size in kilobytes."""
    (group,) = photographs(split="train", size=SIZE, images=1, seed=0).groups
    rng, total = np.random.default_rng(0), 0
    for number in range(images):
        photograph = photograph_at(group.paths[number % len(group.paths)])  # type: ignore[attr-defined]
        width = min(photograph.width, int(photograph.height / 0.75), int(rng.integers(300, 640)))
        height = int(width * 0.75)
        left, top = rng.integers(photograph.width - width + 1), rng.integers(photograph.height - height + 1)
        box = (int(left), int(top), int(left) + width, int(top) + height)
        path = folder / f"class{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.resize((WIDTH, HEIGHT), box=box).save(path, quality=QUALITY)
        total += path.stat().st_size
    return float(total / images / 1000)


def decode_and_resize(folder: Path) -> None:
    """The part that cannot be saved: what packing does to each file, and nothing else."""
    cpu, wall = time.process_time(), time.perf_counter()
    for path in sorted(folder.rglob("*.jpg")):
        to_pixels(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"), "chrabaszcz", SIZE)
    print(json.dumps({"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}))


def run_all(work: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each contestant."""
    # Packing processes are children of a server that outlives the command by a moment: make it ours then, so that
    # its time is counted.
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    source = work / "photographs"
    pack = [
        sys.executable,
        "-m",
        "data_pipeline.pack",
        "--source",
        "folder",
        "--input",
        str(source),
        "--split",
        "train",
    ]
    pack += ["--size", str(SIZE), "--shard-images", "1024"]
    idle = [sys.executable, "-c", "import data_pipeline.pack"]
    commands = {
        "decode and resize": [sys.executable, __file__, "--decode", str(source)],
        "pack, 1 process": [*pack, "--workers", "1"],
        "pack, 2 processes": [*pack, "--workers", "2"],
        "start and import": idle,
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):  # the first warms up the page cache
        for name, command in commands.items():
            if name.startswith("pack"):
                command = [*command, "--dest", str(work / f"{name}-{repeat}".replace(" ", ""))]
            before, started = getrusage(RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(
                command, cwd=Path(__file__).resolve().parents[1], check=True, capture_output=True, text=True
            )
            wall = time.perf_counter() - started
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            after = getrusage(RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            if repeat:
                measured = {"cpu_seconds": cpu, "wall_seconds": wall}
                runs[name].append(json.loads(done.stdout) if name == "decode and resize" else measured)
                print(name, json.dumps(runs[name][-1]), done.stdout.strip(), file=sys.stderr, flush=True)
    return runs


def report(runs: dict[str, list[dict[str, float]]], options: argparse.Namespace, kilobytes: float) -> None:
    """Best of each, without what starting the interpreter costs, and the two ratios."""
    start = {unit: min(run[unit] for run in runs["start and import"]) for unit in ("cpu_seconds", "wall_seconds")}
    best = {
        name: {unit: min(run[unit] for run in done) - start[unit] * name.startswith("pack") for unit in start}
        for name, done in runs.items()
        if name != "start and import"
    }
    one, two, bare = best["pack, 1 process"], best["pack, 2 processes"], best["decode and resize"]
    metrics = {
        "packing_vs_decode": bare["cpu_seconds"] / one["cpu_seconds"],
        "packing_two_core_speedup": one["wall_seconds"] / two["wall_seconds"],
    }
    rows = [
        [name, f"{options.images / b['cpu_seconds']:,.0f}", f"{options.images / b['wall_seconds']:,.0f}"]
        for name, b in best.items()
    ]
    text = (
        f"{options.images:,} JPEG files of {WIDTH} x {HEIGHT}, {kilobytes:.0f} KB on average, to {SIZE} x {SIZE}; best "
        f"of {options.repeats} runs in turns, without the {start['cpu_seconds']:.1f} s that the start takes.\n\n"
    )
    text += table(["", "images per CPU-second", "images/s"], rows)
    text += (
        f"\n\nPacking runs at {metrics['packing_vs_decode']:.2f} of decoding and resizing alone; a second process "
        f"makes it {metrics['packing_two_core_speedup']:.2f} times as fast."
    )
    print(text)
    write_section("packing", "python benchmarks/packing.py", text)
    if options.json:
        write_json(options.json, metrics, {"runs": runs})


if __name__ == "__main__":
    sys.exit(main())
