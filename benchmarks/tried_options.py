"""What was tried over the quickstart's recipe and not kept, and what does each give after equally many FLOPs?

    python -m benchmarks.tried_options

Each option is a few lines here that change a model after it was built, so that models/ holds only what was kept. As the
changes of benchmarks/recipe.py they are paired with the same config without them, seed by seed and image by image. Runs
that were made before are not made again.

Shapes: B batch, L positions, D width, N heads, K head width.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import equal_compute
from benchmarks.equal_compute import SCORED_IMAGES, Journal, Result, Wanted, difference, wanted
from benchmarks.recipe import CATEGORICAL, FULL, PART, SEEDS, WITHOUT, Change, categorical, results_of
from benchmarks.report import table, write_section
from benchmarks.rivals import recipe, said, spread
from data_pipeline.loader import Batch
from models.attention.local_attention import local_attention
from models.head import Head
from models.image_transformer.account import account_of
from models.image_transformer.family import ImageTransformer, ImageTransformerConfig
from models.image_transformer.layer import attend_in_turn
from models.likelihood import LEVELS_PER_UNIT, MixtureOutput, mixture_nats
from models.linear import Linear
from models.model import Account, Flops, Recompute
from models.neighbours import gather, known_neighbours, stand_ins
from trainer.config import RunConfig

SECTION = "options tried over the quickstart's recipe and not kept"
COMMAND = "python -m benchmarks.tried_options"
RESULTS = Path(__file__).with_name("results") / "tried_options.jsonl"


# Options of the network.


def zero_outputs(model: ImageTransformer) -> None:
    """Every layer begins as nothing (Zhang et al. 2019)."""
    for layer in model.layers:
        nn.init.zeros_(layer.attention.out.weight)
        nn.init.zeros_(layer.feed_forward.out.weight)


def value_residual(model: ImageTransformer) -> None:
    """Later layers attend to a mix of their values and the first layer's (Zhou et al. 2024)."""
    model.shares = nn.Parameter(torch.zeros(len(model.layers)))
    first: list[Tensor] = []

    def attend(index: int, plainly: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if index == 0:
            first[:] = [v]
        else:
            share = model.shares[index].sigmoid()
            v = (1 - share) * v + share * first[0]
        return plainly(q, k, v)

    model.attends = [partial(attend, index, plainly) for index, plainly in enumerate(model.attends)]


def unet_skip(model: ImageTransformer) -> None:
    """The last layer also reads what the first one made."""
    model.skip = nn.Parameter(torch.ones(1))
    made: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda _, __, x: made.__setitem__(slice(None), [x]))
    model.layers[-1].register_forward_pre_hook(lambda _, given: (given[0] + model.skip * made[0], *given[1:]))


class SquaredReLU(nn.Module):
    """So et al. 2021: without a gate, so half as wide again for as many FLOPs."""

    def __init__(self, config: ImageTransformerConfig) -> None:
        super().__init__()
        width, ff_width = config.width, config.ff_width * 3 // 2
        self.hidden = Linear(width, ff_width, std=width**-0.5)
        self.out = Linear(ff_width, width, std=(2 * config.layers * ff_width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(x)).square())


def squared_relu(model: ImageTransformer) -> None:
    for layer in model.layers:
        layer.feed_forward = SquaredReLU(model.config)


def learned_start(model: ImageTransformer) -> None:
    """The first pixel, the first row and the first column have numbers of their own, added to the head's."""
    model.start = nn.Embedding(4, model.head.out_features)
    nn.init.zeros_(model.start.weight)
    size, plainly = model.config.image_size, model.head.forward
    kinds = (torch.arange(size * size) < size).int() + 2 * (torch.arange(size * size) % size == 0).int()
    model.head.forward = lambda x: plainly(x) + model.start(kinds)


class PlainHead(nn.Linear):
    """With almost no opinion at first."""

    def __init__(self, width: int, parameters: int) -> None:
        super().__init__(width, parameters)
        nn.init.normal_(self.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.bias)


class _WithLoss(torch.autograd.Function):
    """A tensor as it is, to whose loss another one is added in the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.ones((), dtype=gradient.dtype)


def pixel_below(model: ImageTransformer, weight: float) -> None:
    """In training, tokens also predict the pixel below theirs."""
    output = MixtureOutput()
    model.head_below = Head(model.config.width, output, 3)
    plainly, row = model.parameters_of, model.config.image_size

    def parameters_of(x: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        parameters = plainly(x, values, positions)
        if not model.training:
            return parameters
        images = ((values + 1) * LEVELS_PER_UNIT).round()
        nats = mixture_nats(model.head_below(x[:, :-row]), images[:, row:])
        return _WithLoss.apply(parameters, weight * nats.sum() / images.numel())

    model.parameters_of = parameters_of


def attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention (Katharopoulos et al. 2020): [B, N, L, K] each."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = (k[..., None] * v[..., None, :]).cumsum(2)
    weights = (q * k.cumsum(2)).sum(-1, keepdim=True)
    return (q[..., None, :] @ states).squeeze(-2) / weights


def linear_attention(model: ImageTransformer) -> None:
    """The second head of each layer sees all pixels before."""
    for index, (pattern,) in enumerate(model.patterns):
        model.attends[index] = attend_in_turn([partial(_locally, pattern), attend_linearly])


def _locally(pattern: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return local_attention(q.contiguous(), k.contiguous(), v.contiguous(), pattern)


def _flops_of_linear_attention(model: ImageTransformer) -> int:
    """More than those of the head in its place, in the forward pass."""
    head_width = model.config.attention_width // model.config.heads
    return sum(4 * head_width * (head_width * model.length - pattern.num_pairs) for (pattern,) in model.patterns)


# Options of the categorical head.


def pair_tables(model: ImageTransformer) -> None:
    """Each sub-pixel also looks up the pair of its channel's intensities to the left and above, in 32 steps each."""
    size, width, steps = model.config.image_size, model.config.width, 32
    model.pairs = nn.Embedding(3 * steps * steps, width)
    nn.init.normal_(model.pairs.weight, std=0.1)
    near = stand_ins(known_neighbours(size, torch.arange(size * size)))[:, [0, 4]]
    found: list[Tensor] = []
    plainly = model.inputs

    def inputs(values: Tensor, slots: Tensor) -> Tensor:
        pixels = values.unflatten(1, (-1, 3)).squeeze(-1).long()
        west, north = (gather(pixels, near) * steps // 256).unbind(2)
        channels = torch.arange(3) * steps * steps
        found[:] = [(channels + west * steps + north).flatten(1)]
        return plainly(values, slots)

    model.inputs = inputs
    model.embed_input.register_forward_hook(lambda _, __, x: x + model.pairs(found[0]))


def channels_without_guesses(model: ImageTransformer) -> None:
    """A token for each pixel as in models/image_transformer/channel_tokens.py, but plain logits."""
    del model.predictors
    model.head = PlainHead(model.config.width, 256)
    model.parameters_of = lambda x, values, positions: model.head(model.channels(x, values, positions, torch.arange(3)))


# Options of the images.


def green_first(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3]; what green says of red and blue is then the larger part."""
    return images[..., [1, 0, 2]]


def differences_of_green(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> green, and red and blue less green, round the corner of 256."""
    red, green, blue = images.unbind(-1)
    return torch.stack([green, red - green + 128, blue - green + 128], dim=-1)


@dataclass(frozen=True)
class Option:
    """A line of the table."""

    name: str
    base: RunConfig
    """What is changed."""
    alter: Callable[[ImageTransformer], None] | None = None
    more_flops: Callable[[ImageTransformer], int] | None = None
    """Products of the forward pass that the account does not count."""
    images: Callable[[Tensor], Tensor] | None = None
    """Other values for the same colours, uint8 [B, H, W, 3]."""
    against: RunConfig | None = None
    """What it is compared with, where that is not `base`."""
    budget: float = PART
    """In units of the first quickstart's compute."""

    def altered(self) -> RunConfig:
        fields = {field.name: getattr(self.base.model, field.name) for field in dataclasses.fields(self.base.model)}
        return dataclasses.replace(self.base, model=AlteredConfig(**fields, option=self.name))  # type: ignore[arg-type]

    def run(self, seed: int) -> Wanted:
        """On as many FLOPs as what it is compared with."""
        config = self.altered()
        ratio = self.base.model.account().flops.training / config.model.account().flops.training
        found = wanted(self.base, self.budget * ratio, seed)
        return Wanted(dataclasses.replace(found.config, model=config.model), found.validation_images)


@dataclass(frozen=True, kw_only=True)
class AlteredConfig(ImageTransformerConfig):
    """A config whose model an option changes."""

    option: str

    def build(self, recompute: Recompute = Recompute()) -> ImageTransformer:  # noqa: B008 (immutable)
        model = super().build(recompute)
        if alter := options()[self.option].alter:
            with torch.device("cpu"):  # also where the rest is built on the meta device, for its shapes
                alter(model)
        return model

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        model = self.build()
        found = account_of(model, recompute)
        if more := options()[self.option].more_flops:
            forward = more(model)
            found = dataclasses.replace(found, parts=found.parts | {self.option: Flops(forward, 2 * forward, 0)})
        return found


@cache
def options() -> dict[str, Option]:
    """By name."""
    near = WITHOUT[-1].applied_to(recipe())
    plain_logits, (_, _, with_both, with_pixels) = categorical(), CATEGORICAL
    pixels = Change("", {**with_pixels.model, "stem": "previous"}, {}).applied_to(plain_logits)
    found = [
        Option("zero-initialised outputs", recipe(), zero_outputs),
        Option("value residual", recipe(), value_residual),
        Option("U-net skip", recipe(), unet_skip),
        Option("ReLU²", recipe(), squared_relu),
        Option("learned start", recipe(), learned_start),
        Option("pixel below, weight 0.1", recipe(), partial(pixel_below, weight=0.1)),
        Option("linear attention", recipe(), linear_attention, _flops_of_linear_attention),
        Option("linear attention, full budget", recipe(), linear_attention, _flops_of_linear_attention, budget=FULL),
        Option("linear attention beside 8 pixels", near, linear_attention, _flops_of_linear_attention),
        Option("green first", recipe(), images=green_first),
        Option("differences from green", recipe(), images=differences_of_green),
        Option("tables of pairs", plain_logits, pair_tables),
        Option("tables of pairs beside both", with_both.applied_to(plain_logits), pair_tables),
        Option("a token for each pixel, plain logits", pixels, channels_without_guesses, against=plain_logits),
    ]
    return {option.name: option for option in found}


def measure(option: Option, seed: int) -> Result:
    """Train and score it, as benchmarks/equal_compute.py does."""
    run = option.run(seed)
    with ExitStack() as stack:
        if option.images:
            for name in ("training_batches", "evaluation_batches"):
                changed = partial(_changed_batches, getattr(equal_compute, name), option.images)
                stack.enter_context(patch.object(equal_compute, name, changed))
        return equal_compute.measure(run.config, run.validation_images)


def _changed_batches(
    batches: Callable[..., Iterator[Batch]], change: Callable[[Tensor], Tensor], *arguments: Any, **keywords: Any
) -> Iterator[Batch]:
    for batch in batches(*arguments, **keywords):
        yield dataclasses.replace(batch, images=change(batch.images))


def read_results(path: Path) -> dict[tuple[str, int], Result]:
    """By option and seed, those of runs as this version makes them."""
    found: dict[tuple[str, int], Result] = {}
    known = options()
    for line in path.read_text().splitlines() if path.exists() else ():
        values = json.loads(line)
        name, seed, bits = values["option"], values["seed"], tuple(values["bits"])
        config = known[name].run(seed).config if name in known else None
        if config and config.train.steps == values["steps"]:
            mean = sum(bits) / len(bits)
            found[name, seed] = Result(
                config, values["flops"], bits, bits, mean, values["cpu_seconds"], values["commit"]
            )
    return found


def add_result(path: Path, option: Option, seed: int, result: Result) -> None:
    """One line at the end of the file."""
    values = {
        "option": option.name,
        "seed": seed,
        "steps": result.config.train.steps,
        "flops": result.flops,
        "cpu_seconds": round(result.cpu_seconds, 1),
        "commit": result.commit,
        "bits": [round(value, 4) for value in result.raw],
    }
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(values, separators=(",", ":")) + "\n")


def make_missing(path: Path) -> None:
    """Make the runs that the file lacks, seed after seed."""
    made = read_results(path)
    for seed in SEEDS:
        for option in options().values():
            if (option.name, seed) not in made:
                print(f"{option.name}, seed {seed}", file=sys.stderr, flush=True)
                add_result(path, option, seed, measure(option, seed))


def table_of(path: Path, journal: Journal) -> str:
    """A line for each option that has a result."""
    header = ["option", "parameters", "images", "seeds", "bits/dim", "without it", "difference", "CPU s"]
    made, lines = read_results(path), []
    for option in options().values():
        found = [made[option.name, seed] for seed in SEEDS if (option.name, seed) in made]
        if not found:
            continue
        config, base = found[0].config, results_of(option.against or option.base, option.budget, journal)
        lines.append(
            [
                option.name,
                f"{config.model.account().parameters:,}",
                f"{config.train.steps * config.train.global_batch_images:,}",
                f"{len(found)}",
                spread([result.raw_mean for result in found]),
                spread([result.raw_mean for result in base]) if base else "–",
                said(difference(found, base)),
                f"{sum(result.cpu_seconds for result in found) / len(found):.0f}",
            ]
        )
    return table(header, lines)


def write(path: Path, journal: Journal) -> None:
    """The table, as a section of RESULTS.md."""
    made = read_results(path)
    missing = sum((name, seed) not in made for name in options() for seed in SEEDS)
    left = (
        f"Of the runs of this section {missing} are not made yet; the same command makes them.\n\n" if missing else ""
    )
    text = f"""{left}On an eighth of the first quickstart's FLOPs, where nothing else is said. The first {SCORED_IMAGES}
crops, raw weights. Differences are those of the same seeds and crops; ±: their standard error over seeds (where there
are two or more) and over crops, added in squares. What an option is stands in `benchmarks/tried_options.py`.
A token for each pixel is kept for logits around guesses, which end far lower.

{table_of(path, journal)}"""
    write_section(SECTION, COMMAND, text)


def main() -> int:
    make_missing(RESULTS)
    write(RESULTS, Journal())
    return 0


if __name__ == "__main__":
    sys.exit(main())
