r"""How near to the limit of the machine is drawing images, and what does the window's cache gain?

    python benchmarks/sampling.py --json sampling.json
    python benchmarks/sampling.py --config configs/imagenet64_big.yaml --batch-images 64
    python benchmarks/sampling.py --run runs/quickstart

Untrained weights, random images as the beginning. At a few blocks, spread over the image, each sampler computes the
same next positions: ours dozens of them, the others one or a few, since an image takes them hours. A sampler
whose logits are not those of the full forward pass is not timed. Ours takes its steps at all of these blocks in turns,
so that whatever else the machine does meets them alike: the ratio of the medians at the last and at the first block
says whether the time of a token grows with what came before it. Rivals:

- recompute: the whole beginning goes through the model again for each position, as in the original's code;
- full cache: keys and values of all positions are kept, and a mask says which are seen; not captured as a graph.

How often looking ahead (models/image_transformer/wave_decoder.py) guesses right depends on what a model has learnt, so
that it is measured only on that of a run; the rest is then left out. A categorical one, trained in three minutes:

    python -m data_pipeline.pack --source photographs --dest data/small/train --size 16 --split train --images 12000
    python -m data_pipeline.pack --source photographs --dest data/small/validation --size 16 --split validation \
        --images 256
    python trainer/run.py --config tests/support/small_job.yaml --set run.dir=runs/small --set run.name=small \
        --set data.train_url=data/small/train --set data.validation_url=data/small/validation \
        --set model.image_size=16 --set model.input=categorical --set model.output=categorical \
        --set model.attention.query_block=96 --set model.attention.memory=96 \
        --set train.steps=700 --set train.precision=fp32

The limit: the bytes of the weights and of the keys and values that the pattern lets a query see, read once a step, at
the rate of a copy measured in between.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import versions
from benchmarks.report import table, write_json, write_section
from models.attention.local_attention import local_attention
from models.attention.pattern import Pattern, QueryBlock
from models.decoding import Decoding, Step
from models.given import Given
from models.image_transformer.decode_plan import decode_plan
from models.image_transformer.family import ImageTransformer, ImageTransformerConfig
from models.image_transformer.pixel_order import to_positions
from models.image_transformer.shape import Local2D
from models.likelihood import CategoricalOutput
from trainer.config import load_config
from trainer.model_inputs import area_downsample
from trainer.trained_model import load_trained_model

ROOT = Path(__file__).resolve().parents[1]
CPU_CONFIG, GPU_CONFIG = ROOT / "configs/cifar10_cat.yaml", ROOT / "configs/imagenet64_big.yaml"
CPU_BATCH, GPU_BATCH = 4, 64
# Ours: turns at each block beside each block of the rivals, and steps a turn; on a GPU enough to keep it busy.
CPU_TURNS, GPU_TURNS = 20, 10
CPU_STEPS, GPU_STEPS = 1, 16
# Of the norm of the logits: fp32 sums in another order, and bf16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Heads of keys: of the large model, on a CPU with fewer layers and images.
KEY_HEADS_TURNS = 30
KEY_HEADS_LAYERS, KEY_HEADS_BATCH = 2, 16
LOOK_AHEAD_IMAGES = 4


class WrongLogits(RuntimeError):
    """A sampler computes something else than the model."""


class Task:
    """A model, and images of which it is to draw the rest."""

    def __init__(self, model: ImageTransformer, batch_images: int) -> None:
        config, device = model.config, model.positions.device
        generator = torch.Generator().manual_seed(0)
        shape = (batch_images, config.image_size, config.image_size, 3)
        self.model = model
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        classes = config.num_classes
        self.given = Given(
            labels=torch.arange(batch_images, device=device) % classes if classes else None,
            small_images=area_downsample(self.images, config.small_size) if config.small_size else None,
        )
        self.values = self.model.enter(to_positions(self.images, config.input))
        self.keys_values: list[Tensor] = []
        """Of each layer, [2, B, N, L, K] in generation order."""
        self.hidden = self._forward()

    def _forward(self) -> Tensor:
        """The token of every position [B, L, D] in generation order, from the full forward pass."""
        pattern, slots = self.model.patterns[0][0], torch.arange(self.model.length, device=self.values.device)
        in_order = pattern.slot_of_rank.to(slots)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys_values.append(torch.stack([k, v]).index_select(3, in_order))
            return local_attention(q, k, v, pattern)

        return self.tokens(slots, [attend] * len(self.model.layers)).index_select(1, in_order)

    def tokens(self, slots: Tensor, attends: list[Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Tensor:
        """Tokens [B, T, D] of storage slots, given the images' values."""
        inputs = self.model.inputs(self.values, slots)
        encoded = self.model.encode(self.given.small_images)
        return self.model.hidden(inputs, slots, self.given.labels, encoded, attends)

    def check(self, name: str, logits: Tensor, rank: int) -> None:
        """Raise WrongLogits unless these [B, ...] are the model's for the position of that rank."""
        expected = self.model.head(self.hidden[:, rank : rank + 1]).flatten(1).double()
        error = (logits.flatten(1).double() - expected).norm() / expected.norm()
        if not error < TOLERANCE[self.values_dtype]:
            raise WrongLogits(f"{name} at position {rank}: logits differ by {error:.1e} of their norm; not timed")

    @property
    def values_dtype(self) -> torch.dtype:
        return self.model.head.weight.dtype


def ours(task: Task, block: QueryBlock) -> Iterator[Step]:
    """Steps from the start of a block; the first one, which captures the graph, is done and checked."""
    decoding = Decoding(
        task.model, len(task.images), seed=0, given=task.given, images=task.images,
        known=torch.arange(task.model.length) < block.start,
        decoder=partial(task.model.decoder, in_waves=False, look_ahead=False),
    )  # fmt: skip
    steps = iter(decoding)
    next(steps)
    task.check("ours", decoding.parameters[:, 0], block.start)
    return steps


def turn(steps: Iterator[Step], count: int) -> float:
    """Seconds a step of the next `count`."""
    begin = _now()
    for _ in range(count):
        next(steps)
    return (_now() - begin) / count


def recompute(task: Task, block: QueryBlock) -> float:
    """Seconds for the position in the middle of a block, from the values before it."""
    pattern, rank = task.model.patterns[0][0], (block.start + block.stop) // 2
    beginning = _beginning(pattern, rank)
    slots = torch.arange(beginning.length, device=task.values.device)
    place = int(pattern.slot_of_rank[rank])

    def step() -> Tensor:
        attends = [partial(local_attention, pattern=beginning)] * len(task.model.layers)
        return task.model.head(task.tokens(slots, attends)[:, place : place + 1])

    if task.values.device.type == "cuda":
        step()  # compiles
    begin = _now()
    logits = step()
    seconds = _now() - begin
    task.check("recompute", logits, rank)
    return seconds


def full_cache(task: Task, block: QueryBlock) -> float:
    """Seconds a step in the middle of a block."""
    pattern, rank = task.model.patterns[0][0], (block.start + block.stop) // 2
    device = task.values.device
    slot = pattern.slot_of_rank[rank : rank + 1].to(device)
    seen = torch.zeros(pattern.length, dtype=torch.bool)
    for start, stop in block.memory:
        seen[pattern.rank[start:stop]] = True
    seen[block.start : rank + 1] = True
    mask = seen[None, : rank + 1].to(device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = task.keys_values[layer]
        cache[0, :, :, rank : rank + 1], cache[1, :, :, rank : rank + 1] = k, v
        keys, values = cache[:, :, :, : rank + 1]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    attends = [partial(attend, layer) for layer in range(len(task.model.layers))]

    def step() -> Tensor:
        return task.model.head(task.tokens(slot, attends))

    task.check("full cache", step(), rank)
    count = 5
    begin = _now()
    for _ in range(count):
        step()
    return (_now() - begin) / count


def _beginning(pattern: Pattern, rank: int) -> Pattern:
    """The pattern of what is generated up to a position; up to the end of its block where storage is in cells."""
    blocks = [block for block in pattern.blocks if block.start <= rank]
    stop = rank + 1 if pattern.stored_in_raster_order else blocks[-1].stop
    blocks[-1] = dataclasses.replace(blocks[-1], stop=stop)
    # Raster positions are not asked for: slots are given to the model.
    return Pattern(torch.arange(stop), pattern.rank[:stop], tuple(blocks), pattern.causal)


def bytes_a_step(model: ImageTransformer, batch_images: int) -> float:
    """What must be read to draw one position of each image: weights once, and of each image what it sees."""
    config = model.config
    weights = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not name.startswith(("embed_", "encoder.")) and ".encoder_attention.kv." not in name
    )
    keys = model.patterns[0][0].num_pairs / model.length + 3 * config.small_size**2
    width = config.attention_width // config.heads * config.num_key_heads
    return weights + batch_images * config.layers * keys * 2 * width * model.head.weight.element_size()


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        begin = _now()
        target.copy_(source)
        seconds.append(_now() - begin)
    return 2 * source.numel() * source.element_size() / min(seconds)


def wave_steps(image_size: int, device: torch.device) -> dict[str, float]:
    """One image of a small 2D model with the shift inside each block, block after block and in waves."""
    config = load_config(ROOT / "tests/support/small_job.yaml", []).model
    config = dataclasses.replace(
        config,
        image_size=image_size,
        input="categorical",
        output=CategoricalOutput(),
        attention=Local2D(
            query_block=(image_size // 8, image_size // 2), memory=(image_size // 8, image_size // 4), shift="block"
        ),
    )
    torch.manual_seed(0)
    model = config.build().to(device).eval()
    with torch.no_grad():
        model.head.weight.mul_(10)  # images with structure: some values are much likelier than others
    images, seconds, steps = [], [], []
    for in_waves in (True, False):
        decoding = Decoding(model, 1, seed=0, decoder=partial(model.decoder, in_waves=in_waves, look_ahead=False))
        begin = _now()
        steps.append(sum(1 for _ in decoding))
        seconds.append(_now() - begin)
        images.append(decoding.images)
    if not torch.equal(*images):
        raise WrongLogits("waves: not the image that is drawn block after block; not timed")
    return {"waves_fewer_steps": steps[1] / steps[0], "waves_speedup": seconds[1] / seconds[0]}


def fewer_key_heads(config: ImageTransformerConfig, batch_images: int, device: torch.device) -> dict[str, float]:
    """Steps of a model with a quarter of the heads of keys, in turns with those of one with all of them; how good their
    images are is another question."""
    steps, bytes_read = [], []
    for key_heads in (config.heads, config.heads // 4):
        torch.manual_seed(0)
        model = dataclasses.replace(config, key_heads=key_heads).build().to(device).eval()
        if device.type == "cuda":
            model.bfloat16()
        decoder = partial(model.decoder, in_waves=False, look_ahead=False)
        steps.append(iter(Decoding(model, batch_images, seed=0, decoder=decoder)))
        turn(steps[-1], 1)
        bytes_read.append(bytes_a_step(model, batch_images))
    turns: list[list[float]] = [[], []]
    for _ in range(KEY_HEADS_TURNS):
        for seconds, of_model in zip(turns, steps, strict=True):
            seconds.append(turn(of_model, GPU_STEPS if device.type == "cuda" else CPU_STEPS))
    all_heads, fewer = (statistics.median(seconds) for seconds in turns)
    return {"key_heads_speedup": all_heads / fewer, "key_heads_fewer_bytes": bytes_read[0] / bytes_read[1]}


@torch.no_grad()
def looking_ahead(model: ImageTransformer, weights: str) -> str:
    """Draw single images with and without, in turns; raises WrongLogits where they differ."""
    labels = torch.zeros(1, dtype=torch.int64) if model.config.num_classes else None
    steps, seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    for seed in range(LOOK_AHEAD_IMAGES):
        images = []
        for look_ahead in (True, False):
            decoder = partial(model.decoder, look_ahead=look_ahead)
            decoding = Decoding(model, 1, seed=seed, given=Given(labels=labels), decoder=decoder)
            begin = _now()
            steps[look_ahead] += sum(1 for _ in decoding)
            seconds[look_ahead] += _now() - begin
            images.append(decoding.images)
        if not torch.equal(*images):
            raise WrongLogits("looking ahead: not the image that is drawn value after value; not timed")
    return (
        f"{date.today()}, {torch.get_num_threads()} threads, {', '.join(versions())}; {LOOK_AHEAD_IMAGES} single "
        f"images, {weights}. Looking ahead draws the same images in {steps[False] / steps[True]:.2f} times fewer "
        f"steps, {seconds[False] / seconds[True]:.2f} times as fast: {1e3 * seconds[True] / steps[True]:.2f} ms a "
        f"step, not {1e3 * seconds[False] / steps[False]:.2f}."
    )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Measured(NamedTuple):
    """Seconds a step by block, and what was measured in between."""

    turns: list[list[float]]
    """Of ours: each turn at each block."""
    rivals: dict[str, list[float]]
    copy_rates: list[float]
    """Bytes a second."""

    @property
    def means(self) -> dict[str, list[float]]:
        """By block, ours first: an image takes the mean, whatever the machine did meanwhile."""
        return {"ours": [statistics.mean(turns) for turns in self.turns], **self.rivals}

    @property
    def medians(self) -> list[float]:
        """Of ours by block."""
        return [statistics.median(turns) for turns in self.turns]


@torch.no_grad()
def measure(task: Task, blocks: list[QueryBlock]) -> Measured:
    """Ours at all blocks in turns, and then the rivals at one of them, for each block."""
    rivals = {"recompute": recompute, "full cache": full_cache}
    on_gpu = task.values.device.type == "cuda"
    turns, count = (GPU_TURNS, GPU_STEPS) if on_gpu else (CPU_TURNS, CPU_STEPS)
    steps_left = task.model.length - blocks[-1].start - 1
    turns = min(turns, steps_left // (count * len(blocks)))
    steps = [ours(task, block) for block in blocks]
    measured = Measured([[] for _ in blocks], {name: [] for name in rivals}, [])
    for block in blocks:
        measured.copy_rates.append(copy_rate(task.values.device))
        for _ in range(turns):
            for seconds, at_block in zip(measured.turns, steps, strict=True):
                seconds.append(turn(at_block, count))
        for name, sampler in rivals.items():
            measured.rivals[name].append(sampler(task, block))
    return measured


def main(arguments: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Measure drawing images beside other ways to do it, and the limit.")
    parser.add_argument("--config", type=Path, default=GPU_CONFIG if on_gpu else CPU_CONFIG)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--batch-images", type=int, default=GPU_BATCH if on_gpu else CPU_BATCH)
    parser.add_argument("--blocks", type=int, default=3, help="query blocks at which to measure (default 3)")
    parser.add_argument("--waves-size", type=int, default=64, help="image size for waves of blocks (default 64)")
    parser.add_argument("--run", help="a trained run or exported model, to measure looking ahead on a CPU instead")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if on_gpu else "cpu")
    if options.run:
        trained = load_trained_model(options.run, "raw")
        config = trained.config
        text = looking_ahead(
            trained.model.cpu(),
            f"step {trained.step} of a {config.model.output} model, size {config.model.image_size}, "
            f"{config.model.layers} layers {config.model.width} wide",
        )
        print(text)
        write_section(f"looking ahead, {config.run.name}", f"python benchmarks/sampling.py --run {options.run}", text)
        return 0
    config = load_config(options.config, options.overrides).model
    torch.manual_seed(0)
    model = config.build().to(device).eval()
    if on_gpu:
        model.bfloat16()
    with torch.no_grad():
        task = Task(model, options.batch_images)
    all_blocks = model.patterns[0][0].blocks
    chosen = {round(index * (len(all_blocks) - 1) / max(options.blocks - 1, 1)) for index in range(options.blocks)}
    measured = measure(task, [all_blocks[index] for index in sorted(chosen)])
    ratios = wave_steps(options.waves_size, device)
    big = load_config(GPU_CONFIG, [] if on_gpu else [f"model.layers={KEY_HEADS_LAYERS}"]).model
    ratios |= fewer_key_heads(big, GPU_BATCH if on_gpu else KEY_HEADS_BATCH, device)

    overrides = "".join(f" --set {override}" for override in options.overrides)
    command = (
        f"python benchmarks/sampling.py --config configs/{options.config.name}{overrides} "
        f"--batch-images {options.batch_images}"
    )
    starts = [all_blocks[index].start for index in sorted(chosen)]
    report(options.config.stem, config, task, starts, measured, ratios, command, options.json)
    return 0


def report(
    name: str,
    config: ImageTransformerConfig,
    task: Task,
    starts: list[int],
    measured: Measured,
    ratios: dict[str, float],
    command: str,
    json_file: Path | None,
) -> None:
    """Means over the blocks, and ratios of them, and medians of ours: a table, RESULTS.md, and the JSON file."""
    batch, length = len(task.images), task.model.length
    on_gpu = task.values.device.type == "cuda"
    mean = {sampler: statistics.mean(times) for sampler, times in measured.means.items()}
    medians = measured.medians
    rate = statistics.median(measured.copy_rates)
    limit = bytes_a_step(task.model, batch) / rate
    metrics = {
        "sampling_vs_recompute": mean["recompute"] / mean["ours"],
        "sampling_vs_full_cache": mean["full cache"] / mean["ours"],
        "sampling_vs_bandwidth_limit": limit / mean["ours"],
        "time_per_token_last_over_first": medians[-1] / medians[0],
        **{f"sampling_{key}": value for key, value in ratios.items()},
    }
    plan = decode_plan(task.model.patterns[0][0], config.shift, in_waves=False)
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    text = (
        f"{date.today()}, {where}, {', '.join(versions())}; {batch} images of {config.image_size} at once, {length} "
        f"positions, {task.values_dtype}. A copy runs at {rate / 1e9:.3g} GB/s. The cache holds {plan.num_keys} of "
        f"{length} positions.\n\n"
    )
    header = ["", "images/s", "ms a step", *(f"ms at {start}" for start in starts), "speed-up of ours"]
    rows = [
        [
            sampler,
            _significant(batch / (length * mean[sampler])),
            _significant(1e3 * mean[sampler]),
            *(_significant(1e3 * each) for each in times),
            _significant(mean[sampler] / mean["ours"]),
        ]
        for sampler, times in measured.means.items()
    ]
    at_blocks = [_significant(1e3 * median) for median in medians]
    rows.insert(1, ["ours, median", "", _significant(1e3 * statistics.mean(medians)), *at_blocks, ""])
    rows.append(
        [
            "limit of memory",
            _significant(batch / (length * limit)),
            _significant(1e3 * limit),
            *("" for _ in starts),
            _significant(limit / mean["ours"]),
        ]
    )
    part = f"imagenet64_big, {GPU_BATCH} images"
    if not on_gpu:
        part = f"{KEY_HEADS_LAYERS} layers of imagenet64_big, {KEY_HEADS_BATCH} images"
    text += table(header, rows)
    text += (
        f"\n\nOurs took {len(measured.turns[0])} turns at each position, one position after the other. Time per token, "
        f"the last of these positions over the first: {medians[-1] / medians[0]:.3f} (medians; minima "
        f"{min(measured.turns[-1]) / min(measured.turns[0]):.3f})."
        "\n\nA small 2D model with the shift inside each block draws the same image in waves of blocks in "
        f"{ratios['waves_fewer_steps']:.2f} times fewer steps, {ratios['waves_speedup']:.2f} times as fast."
        f"\n\nOf {part}, a step with a quarter of the heads of keys (model.key_heads) is "
        f"{ratios['key_heads_speedup']:.2f} times as fast (medians of {KEY_HEADS_TURNS} turns each), and must read "
        f"{ratios['key_heads_fewer_bytes']:.2f} times fewer bytes."
    )
    print(text)
    write_section(f"sampling of {name} on a {'GPU' if on_gpu else 'CPU'}", command, text)
    if json_file:
        details = {**measured._asdict(), "limit_seconds": limit, "starts": starts}
        write_json(json_file, metrics, details)


def _significant(number: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 0
    return f"{number:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
