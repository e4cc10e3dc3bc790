"""How small are pictures as files of a model (trainer/compress.py), beside lossless formats, and how long do they take?

    python benchmarks/compression.py --run runs/quickstart --weights ema

Crops of the quickstart's validation photographs, reduced as its training images are, of sizes that are no multiples of
a tile. Each goes to a file and back in this process; one that does not come back to the last bit ends the benchmark.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from benchmarks.attention import versions
from benchmarks.report import table, write_section
from data_pipeline.packing.sources_photographs import photographs
from models.likelihood import nats_by_channel
from trainer.compress import DEFAULT_BATCH_TILES, compressed, decompressed
from trainer.compressed_file import read_compressed
from trainer.lossless_formats import available_codecs, codec_bits_per_dim
from trainer.picture_coder import Picture
from trainer.pictures import to_tensor
from trainer.trained_model import TrainedModel, add_run_arguments, load_trained_model

SIZES = [
    *((128, 96), (97, 131), (33, 47), (75, 41), (1, 1), (64, 48), (5, 133), (31, 32), (90, 60), (17, 90)),
    *((61, 47), (120, 90), (40, 40), (133, 5), (72, 54), (32, 64), (50, 75), (23, 19), (101, 37), (48, 36)),
]
"""(width, height)."""


def pictures(count: int) -> list[torch.Tensor]:
    """uint8 [H, W, 3] each."""
    edge = max(max(size) for size in SIZES)
    (crops, *_) = photographs(split="validation", size=edge, images=count, seed=0).groups
    found = []
    for index, item in enumerate(crops.read()):
        assert isinstance(item.image, Image.Image)
        width, height = SIZES[index % len(SIZES)]
        reduced = item.image.resize((edge, edge), Image.Resampling.BOX)
        found.append(to_tensor(reduced.crop((0, 0, width, height))))
    return found


def evaluated_bits(trained: TrainedModel, pixels: torch.Tensor) -> float:
    """What the model needs for the same tiles in one forward pass in fp32, without what lies outside of the picture."""
    size = trained.model.config.image_size
    picture = Picture(pixels.shape[0], pixels.shape[1], False, size)
    nearest = picture.nearest(slice(None))
    tiles = picture.cut(pixels).flatten(1, 2).gather(1, nearest[..., None].expand(-1, -1, 3))
    tiles = tiles.view(-1, size, size, 3)
    with torch.no_grad():
        parameters = trained.model(tiles)
    cost = nats_by_channel(trained.model.config.output, parameters, tiles).double()
    inside = nearest == torch.arange(size * size)
    return cost.flatten(1, 2)[inside].sum().item() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--pictures", type=int, default=len(SIZES))
    arguments = parser.parse_args()
    trained = load_trained_model(arguments.run, arguments.weights, arguments.last, arguments.checkpoint_url)
    options = {"batch_tiles": DEFAULT_BATCH_TILES}
    images = pictures(arguments.pictures)
    num_bytes = num_streams = 0
    bits = writing = reading = 0.0
    for pixels in images:
        begin = time.perf_counter()
        content = compressed(trained, pixels, is_gray=False, label=None, **options)
        writing += time.perf_counter() - begin
        with tempfile.NamedTemporaryFile() as file:
            path = Path(file.name)
            path.write_bytes(content)
            picture = read_compressed(path)
        begin = time.perf_counter()
        back = decompressed(trained, picture, path=path, **options)
        reading += time.perf_counter() - begin
        if not torch.equal(back, pixels):
            raise SystemExit("other pixels came back")
        num_bytes += len(content)
        num_streams += sum(map(len, picture.streams))
        bits += evaluated_bits(trained, pixels)
        print(list(pixels.shape), len(content), f"{writing:.1f} s, {reading:.1f} s", flush=True)
    num_values = sum(pixels.numel() for pixels in images)
    rows = [["this model", f"{num_bytes:,}", f"{8 * num_bytes / num_values:.3f}", "1.000"]]
    for codec in available_codecs():
        total = sum(codec_bits_per_dim(codec, [pixels.numpy()]) * pixels.numel() / 8 for pixels in images)
        rows.append([codec, f"{total:,.0f}", f"{8 * total / num_values:.3f}", f"{total / num_bytes:.3f}"])
    rows.sort(key=lambda row: float(row[2]))
    text = (
        f"{', '.join(versions())}; {len(images)} pictures, {num_values // 3:,} pixels together, {trained.weights} "
        f"weights of step {trained.step}, tiles of {trained.model.config.image_size}; fp64, "
        f"{torch.get_num_threads()} threads. All came back to the last bit.\n\n"
    )
    text += table(["files", "bytes", "bits/dim", "of this model's"], rows)
    text += (
        f"\n\nThe streams have {num_streams:,} bytes, {100 * (8 * num_streams / bits - 1):+.3f}% of what one forward "
        f"pass in fp32 gives the same tiles ({bits / num_values:.4f} bits/dim); headers have "
        f"{num_bytes - num_streams:,}. Writing took {writing:.0f} s ({num_values / 3 / writing:,.0f} pixels/s), "
        f"reading {reading:.0f} s ({num_values / 3 / reading:,.0f} pixels/s)."
    )
    command = f"python benchmarks/compression.py --run {arguments.run} --weights {trained.weights}"
    write_section("compressed pictures", command, text)


if __name__ == "__main__":
    main()
