"""How near to the limit of the machine is a whole training step, and what does our attention gain in it?

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --config configs/imagenet64_big.yaml --set train.micro_batch_images=8

One update of a config on one GPU: forward, loss, backward and optimizer through DeepSpeed, on random images. The same
model runs in turns with the attention that a user would take otherwise; one that trains differently is not timed. The
share is the model's exact FLOPs over the rate of a matrix product measured in the same turn; what is recomputed does
not count.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.attention import Case, Clock, raster_mask, versions
from benchmarks.report import table, write_json, write_section
from data_pipeline.batch import Batch
from models.attention.local_attention import local_attention
from models.image_transformer.family import ImageTransformer
from models.image_transformer.layer import Attend
from models.image_transformer.pixel_order import grid_shape
from models.image_transformer.shape import Local2D
from models.likelihood import nats
from trainer.config import RunConfig, load_config
from trainer.deepspeed_engine import DeepSpeedEngine, init_distributed
from trainer.engine import Update
from trainer.model_inputs import model_inputs
from trainer.ranks import Ranks, ranks_from_environment

OURS = "ours"
BIG = Path(__file__).resolve().parents[1] / "configs/imagenet64_big.yaml"
# Relative difference of the first step's loss and gradient norm: bf16 keeps 8 bits, sums come in other orders.
SAME_LOSS, SAME_NORM = 2e-3, 3e-2


def with_flex(model: ImageTransformer) -> None:
    """FlexAttention, compiled, on tokens in our order and with tiles of our plan."""
    pattern = model.patterns[0][0]
    attend_by(model, lambda q, k, v: local_attention(q, k, v, pattern, backend="flex"))


def with_flex_raster(model: ImageTransformer) -> None:
    """FlexAttention, compiled, on tokens in raster order: what the order of storage is worth."""
    config, pattern = model.config, model.patterns[0][0]
    if pattern.stored_in_raster_order:
        raise NotImplementedError("the tokens are in raster order anyway")
    attention = config.attentions[0]
    assert isinstance(attention, Local2D), "the tokens of the others are in raster order"
    case = Case(
        "raster", pattern, attention.query_block, attention.memory, grid_shape(config.image_size, config.input),
        batch=1, heads=config.heads, width=config.attention_width // config.heads, dtype=torch.bfloat16,
    )  # fmt: skip
    device, length = str(model.positions.device), pattern.length
    mask = create_block_mask(raster_mask(case), None, None, length, length, device=device, _compile=device != "cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    in_raster_order(model)
    shared = config.num_key_heads != config.heads
    attend_by(model, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=shared))


def with_dense_mask(model: ImageTransformer) -> None:
    """SDPA with the whole mask."""
    mask = model.patterns[0][0].mask_in_storage_order().to(model.positions.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device), enable_gqa=shared)

    attend_by(model, attend)


def attend_by(model: ImageTransformer, attend: Attend) -> None:
    """Let all layers of the decoder attend so."""
    model.attends = [attend] * len(model.attends)


def in_raster_order(model: ImageTransformer) -> None:
    """Let the model keep its tokens in raster order; generation order and results stay."""
    pattern, slots = model.patterns[0][0], model.slot_of_position
    model.sources.copy_(model.sources[slots])
    raster = torch.arange(pattern.length)
    model.positions.copy_(raster)
    model.slot_of_position.copy_(raster)
    model.stored_in_raster_order = True


VARIANTS: dict[str, Callable[[ImageTransformer], None]] = {
    OURS: lambda model: None,
    "flex": with_flex,
    "flex_raster": with_flex_raster,
    "dense_mask": with_dense_mask,
}


class Step:
    """A model that trains, with a batch to train on."""

    def __init__(self, config: RunConfig, ranks: Ranks, device: torch.device, change: Callable[..., None]) -> None:
        torch.manual_seed(0)
        model = config.model.build(config.train.recompute)
        change(model.to(device))
        self.config = config
        self.engine = DeepSpeedEngine(model, config, ranks, device)
        self.engine.train(True)
        size, count = config.model.image_size, config.train.micro_batch_images
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        self.batch = Batch(images, labels, None, 0)

    def update(self) -> tuple[Tensor, Update]:
        """One update, as trainer/loop.py does it: its loss and what the engine says of it."""
        parameters = self.engine.forward(*model_inputs(self.batch, self.config.model))
        images = self.batch.images
        loss = nats(self.config.model.output, parameters, images).sum() / images.numel()
        self.engine.backward(loss)
        return loss.detach(), self.engine.update(config_rate(self.config))

    def seconds(self) -> float:
        synchronize(self.engine.device)
        begin = time.perf_counter()
        self.update()
        synchronize(self.engine.device)
        return time.perf_counter() - begin


def config_rate(config: RunConfig) -> float:
    """Small, so that all variants stay near each other for as long as they are timed."""
    return min(config.optimizer.peak_lr, 1e-5)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(
    config: RunConfig, ranks: Ranks, device: torch.device, names: list[str]
) -> tuple[dict[str, Step], dict[str, str]]:
    """The variants that train as ours does, and why the others are missing."""
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    expected: tuple[float, float] | None = None
    for name in names:
        try:
            step = Step(config, ranks, device, VARIANTS[name])
            first_loss, update = step.update()
            loss, norm = float(first_loss), update.gradient_norm or math.nan
        except Exception as problem:  # noqa: BLE001  a rival fails in any way; the table says how
            if name == OURS:
                raise
            missing[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
            continue
        expected = expected or (loss, norm)
        if not (abs(loss / expected[0] - 1) < SAME_LOSS and abs(norm / expected[1] - 1) < SAME_NORM):
            missing[name] = f"trains differently: loss {loss:.4f}, gradient norm {norm:.4g}, ours {expected}"
            continue
        steps[name] = step
    return steps, missing


def measure(steps: dict[str, Step], device: torch.device, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of an update of each variant and of one FLOP of a matrix product, in turns."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clock, matmuls = Clock(device.type, dtype), []
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):  # the first two compile and warm up
        matmul = statistics.median(clock.matmul() for _ in range(5)) / clock.flops
        times = {name: step.seconds() for name, step in steps.items()}
        if turn > 1:
            matmuls.append(matmul)
            for name, time_ in times.items():
                seconds[name].append(time_)
    return seconds, matmuls


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a whole training step beside other attentions.")
    parser.add_argument("--config", type=Path, default=BIG)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--name", help="of the section and the numbers; default: the config's")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    ranks = ranks_from_environment()
    device = init_distributed(timedelta(seconds=600), ranks.local_rank)
    config = load_config(options.config, options.overrides)
    # One micro-batch an update: what a GPU does where the other micro-batches are on other GPUs.
    one = dataclasses.replace(config.train, global_batch_images=config.train.micro_batch_images)
    config = dataclasses.replace(config, train=one)
    rivals = ["flex", "flex_raster"] if device.type == "cuda" else ["flex", "dense_mask"]
    steps, missing = build(config, ranks, device, [OURS, *rivals])
    seconds, matmuls = measure(steps, device, rounds=10 if device.type == "cuda" else 3)
    overrides = "".join(f" --set {override}" for override in options.overrides)
    command = f"python benchmarks/train_step.py --config configs/{options.config.name}{overrides}"
    report(options.name or options.config.stem, config, device.type, seconds, missing, matmuls, command, options.json)
    return 0


def report(
    name: str,
    config: RunConfig,
    device: str,
    seconds: dict[str, list[float]],
    missing: dict[str, str],
    matmuls: list[float],
    command: str,
    json_file: Path | None,
) -> None:
    """Medians, shares and ratios of the same turn: a table, RESULTS.md, and the JSON file."""
    images = config.train.micro_batch_images
    flops = config.model.account().flops.training * images
    metrics: dict[str, float] = {}
    rows = []
    for variant, times in seconds.items():
        shares = [flops * matmul / one for matmul, one in zip(matmuls, times, strict=True)]
        ratios = [other / one for one, other in zip(seconds[OURS], times, strict=True)]
        key = "step_share_of_matmul" if variant == OURS else f"step_speedup_vs_{variant}"
        metrics[f"{device}_{key}_{name}"] = statistics.median(shares if variant == OURS else ratios)
        median = statistics.median(times)
        rows.append(
            [
                variant,
                f"{1e3 * median:.1f} ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})",
                f"{images / median:.2f}",
                f"{statistics.median(shares):.1%}",
                f"{statistics.median(ratios):.2f}",
            ]
        )
    rows += [[variant, why, "", "", ""] for variant, why in missing.items()]
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB with all of them" if device == "cuda" else ""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    text = (
        f"{date.today()}, {where}, {', '.join(versions())}; {images} images of {config.model.image_size} an update, "
        f"{config.train.precision}, activation_checkpoint_every_layers "
        f"{config.train.activation_checkpoint_every_layers}, compiled layers: {config.train.compile}{peak}. "
        f"Matrix products run at {1e-12 / statistics.median(matmuls):.3g} TFLOP/s.\n\n"
    )
    header = ["", "update ms (least to most)", "images/s", "model FLOPs, share of matmul", "speed-up of ours"]
    text += table(header, rows)
    print(text)
    place = "a GPU" if device == "cuda" else "a CPU"
    write_section(f"training step of {name} on {place}", command, text)
    if json_file:
        write_json(json_file, metrics, {"seconds": seconds, "missing": missing, "matmul_seconds_per_flop": matmuls})


if __name__ == "__main__":
    sys.exit(main())
