"""What does it gain to draw models of masked convolutions pixel by pixel (models/pixel_decoder.py)?

    python benchmarks/pixel_sampling.py

Untrained models of the configs for CIFAR-10. Four rows of random images are known; the one below them is drawn, by ours
and, as far as a few sub-pixels, by whole forward passes, in turns. Values that differ end the benchmark: they are the
same images. Neither takes longer further down.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.attention import versions
from benchmarks.report import table, write_section
from models.decoding import Decoding
from models.model import Model
from models.recompute_decoder import RecomputeDecoder
from trainer.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("cifar10_pixelcnn", "cifar10_gated_pixelcnn", "cifar10_row_lstm", "cifar10_diagonal_bilstm")
TURNS = 2
RECOMPUTED = 2
"""Steps of whole forward passes a turn."""


def steps(model: Model, images: torch.Tensor, *, recompute: bool, count: int) -> tuple[float, torch.Tensor]:
    """Seconds a step of `count` after the first, and the sub-pixels drawn."""
    known = torch.arange(len(model.generation_order)) < 4 * 3 * model.config.image_size
    decoder = partial(RecomputeDecoder, model) if recompute else None
    decoding = Decoding(model, len(images), seed=0, images=images, known=known, decoder=decoder)
    drawing = iter(decoding)
    next(drawing)  # ours takes what is known through the layers first
    begin = time.perf_counter()
    for _ in range(count):
        next(drawing)
    seconds = (time.perf_counter() - begin) / count
    first = int(known.sum())
    return seconds, decoding.images.flatten(1)[:, first : first + RECOMPUTED + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-images", type=int, default=4)
    count = parser.parse_args().batch_images
    rows = []
    for name in CONFIGS:
        torch.manual_seed(0)
        model = load_config(ROOT / f"configs/{name}.yaml", []).model.build().eval()
        size = model.config.image_size
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(TURNS):
            ours, drawn = steps(model, images, recompute=False, count=3 * size - 1)
            recomputed, expected = steps(model, images, recompute=True, count=RECOMPUTED)
            if not torch.equal(drawn, expected):
                raise SystemExit(f"{name}: pixel by pixel, other values are drawn than by whole forward passes")
            seconds[False].append(ours)
            seconds[True].append(recomputed)
        print(name, seconds, flush=True)
        ours, recomputed = statistics.median(seconds[False]), statistics.median(seconds[True])
        ratios = [whole / part for whole, part in zip(seconds[True], seconds[False], strict=True)]
        rows.append(
            [
                name,
                f"{ours * 1e3:.1f}",
                f"{recomputed * 1e3:,.0f}",
                f"{recomputed / ours:.0f} ({min(ratios):.0f} to {max(ratios):.0f})",
                f"{ours * 3 * size * size:.0f}",
            ]
        )
    header = ["config", "ms a sub-pixel", "by whole forward passes", "speed-up of ours", "seconds for whole images"]
    text = f"{', '.join(versions())}; {count} images of 32 at once, fp32, {torch.get_num_threads()} threads. "
    text += f"Medians of {TURNS} turns (lowest to highest).\n\n"
    command = f"python benchmarks/pixel_sampling.py --batch-images {count}"
    write_section("sampling pixel by pixel on a CPU", command, text + table(header, rows))


if __name__ == "__main__":
    main()
