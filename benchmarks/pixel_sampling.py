"""What does it gain to draw PixelRNN, PixelCNN and its extensions pixel by pixel (models/pixel_decoder.py)?

    python benchmarks/pixel_sampling.py

Untrained models of the configs for CIFAR-10. The upper half of random images is known. The four rows below it are
drawn, by ours and, as far as a few steps, by whole forward passes, in turns. Values that differ end the benchmark: they
are the same images. A step of ours takes about as long anywhere, but for PixelSNAIL, whose attention has half of an
image's pixels to look at here, and PixelCNN++, whose rows are of four kinds.
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
from data_pipeline.wording import counted
from models.decoding import Decoding
from models.model import Model
from models.recompute_decoder import RecomputeDecoder
from trainer.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = (
    "cifar10_pixelcnn",
    "cifar10_gated_pixelcnn",
    "cifar10_row_lstm",
    "cifar10_diagonal_bilstm",
    "cifar10_pixelcnnpp",
    "cifar10_pixelsnail",
)
ROWS = 4
TURNS = 2
RECOMPUTED = 2
"""Steps of whole forward passes a turn."""


def steps(model: Model, images: torch.Tensor, *, recompute: bool, count: int) -> tuple[float, torch.Tensor]:
    """Seconds a step of `count` after the first, and the values drawn by the first steps."""
    length = len(model.generation_order)
    known = torch.arange(length) < length // 2
    decoder = partial(RecomputeDecoder, model) if recompute else None
    decoding = Decoding(model, len(images), seed=0, images=images, known=known, decoder=decoder)
    drawing = iter(decoding)
    next(drawing)  # ours takes what is known through the layers first
    begin = time.perf_counter()
    for _ in range(count):
        next(drawing)
    seconds = (time.perf_counter() - begin) / count
    drawn = slice(length // 2, length // 2 + RECOMPUTED + 1)
    return seconds, decoding.images.reshape(len(images), length, -1)[:, drawn]


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
        if model.initial_images:
            model.initialise(images)
        length = len(model.generation_order)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(TURNS):
            ours, drawn = steps(model, images, recompute=False, count=ROWS * length // size - 1)
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
                f"{length:,}",
                f"{ours * 1e3:.1f}",
                f"{recomputed * 1e3:,.0f}",
                f"{recomputed / ours:.0f} ({min(ratios):.0f} to {max(ratios):.0f})",
                f"{ours * length:.0f}",
            ]
        )
    header = ["config", "steps", "ms a step", "by whole forward passes", "speed-up of ours", "seconds for whole images"]
    text = f"{', '.join(versions())}; {counted(count, 'image')} of 32 x 32 at once, fp32, "
    text += f"{torch.get_num_threads()} threads. Medians of {TURNS} turns (lowest to highest).\n\n"
    command = f"python benchmarks/pixel_sampling.py --batch-images {count}"
    write_section("sampling pixel by pixel on a CPU", command, text + table(header, rows))


if __name__ == "__main__":
    main()
