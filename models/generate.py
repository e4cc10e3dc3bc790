"""How are images drawn from the model, position by position?

Each step feeds one token of every block of a wave (models/decode_plan.py) through the layers, which see earlier tokens
in a cache (models/decode_cache.py), and draws a value (models/draw.py) with noise of its own (models/keyed_noise.py).
On CUDA a step is captured as a graph once and then replayed.

On a CPU a product of one row takes as long as one of four, so that a step of a single image looks ahead: further tokens
take the place of padding, with guesses for the values before them. A value drawn is final when all values before it
were guessed right, and otherwise the next guess of its position (fixed-point iteration: Song et al. 2021, Wiggers and
Hoogeboom 2020). As the noise is that of the position, the image is the same to the last bit.

Shapes: B batch, L positions, C values per position, G blocks of a wave, Q tokens of a block, A steps computed together.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decode_cache import DecodeCache
from models.decode_plan import Wave, decode_plan
from models.draw import Sampling, draw
from models.image_transformer import ImageTransformer
from models.keyed_noise import keyed_uniforms
from models.layer import Attend
from models.likelihood import CategoricalOutput
from models.linear import product_dtype
from models.pixel_order import to_images, to_positions

ROWS_OF_A_PRODUCT = 4
"""On a CPU, rows of a matrix product come in fours: then each is the same to the last bit, whatever the others are and
however many (oneMKL computes the last one to three rows in another order, which depends on the number of threads)."""
FILLED_TOGETHER = 64
"""Tokens of what is given that go through the layers at once."""


class Step(NamedTuple):
    """What one step has done."""

    done: int
    """Positions that have their value, those given included."""
    total: int
    positions: Tensor
    """int64 on the CPU: raster positions that were drawn (or given) in this step, as many of each of G blocks."""


def generate(
    model: ImageTransformer,
    num_images: int,
    *,
    seed: int,
    first_image: int = 0,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    prefix: Tensor | None = None,
    keep: int = 0,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    in_waves: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw uint8 [B, H, W, 3] with B = num_images; see Decoding. progress(done, total) is called after each step."""
    decoding = Decoding(
        model,
        num_images,
        seed=seed,
        first_image=first_image,
        labels=labels,
        condition=condition,
        prefix=prefix,
        keep=keep,
        sampling=sampling,
        in_waves=in_waves,
    )
    for step in decoding:
        if progress is not None:
            progress(step.done, step.total)
    return decoding.images


class Decoding:
    """The drawing of a batch of images: iterate once, and look at `images` at any time in between."""

    def __init__(
        self,
        model: ImageTransformer,
        num_images: int,
        *,
        seed: int,
        first_image: int = 0,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        prefix: Tensor | None = None,
        keep: int = 0,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        in_waves: bool = True,
        look_ahead: bool = True,
    ) -> None:
        """The noise of an image depends on (seed, first_image + its index) alone: neither on the batch it is drawn in
        nor on the order of drawing. labels int64 [B] and condition uint8 [B, h, w, 3] as in ImageTransformer.forward.
        The first `keep` positions in generation order are taken from `prefix`, uint8 [B, H, W, 3].

        in_waves: decode blocks that do not see each other together, where the pattern has such blocks.
        look_ahead: compute further tokens of a single image on a CPU. Neither changes the images.
        Raises ValueError for arguments that do not fit the model or each other.
        """
        config, pattern = model.config, model.pattern
        device = model.positions.device
        if not 0 <= keep <= pattern.length:
            raise ValueError(f"keep: {keep} is not between 0 and the image's {pattern.length} positions")
        if keep and prefix is None:
            raise ValueError(f"keep: {keep} positions, but no prefix is given to take them from")
        for name, given in (("labels", labels), ("condition", condition), ("prefix", prefix)):
            if given is not None and len(given) != num_images:
                raise ValueError(f"{name}: {len(given)} images, but {num_images} are to be drawn")
        if prefix is None:
            prefix = torch.zeros(num_images, config.image_size, config.image_size, 3, dtype=torch.uint8, device=device)
        model.check_inputs(prefix, labels, condition)
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_classes:
            raise ValueError(
                f"labels: from {labels.min()} to {labels.max()}, but classes are 0 to {config.num_classes - 1}"
            )
        self._copies = 1
        if sampling.is_guided:
            if not config.label_dropout:
                raise ValueError(
                    f"guidance: {sampling.guidance}, but the model knows no images without a class (label_dropout is 0 "
                    "in its config); choose 1"
                )
            assert labels is not None, "a model with label_dropout has classes"
            # Each image is decoded twice, with its class and without, from the same values.
            self._copies = 2
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
            condition = None if condition is None else condition.repeat(2, 1, 1, 1)
        self._model, self._sampling, self._keep = model, sampling, keep
        self._seed, self._image_numbers = seed, first_image + torch.arange(num_images, device=device)
        self._labels, self._condition = labels, condition
        self._values = to_positions(prefix, config.input).clone()

        self._plan = plan = decode_plan(pattern, config.shift, in_waves)
        weight = model.head.weight
        self._cache = DecodeCache(
            plan,
            layers=config.layers,
            batch=self._copies * num_images,
            key_heads=config.num_key_heads,
            head_width=config.attention_width // config.heads,
            dtype=product_dtype(weight),
            device=device,
        )
        # The wave that is being decoded, at fixed addresses as a captured graph needs them.
        windows, most_steps = plan.num_windows, max(wave.num_steps for wave in plan.waves)
        channels = self._values.shape[2]
        noises = (256 * channels,) if isinstance(config.output, CategoricalOutput) else (4,)
        # All images have to wait for the one with the first wrong guess: already for two it hardly pays.
        self._look_ahead = look_ahead and device.type == "cpu" and num_images == 1
        self._slots = torch.zeros(windows, most_steps, dtype=torch.int64, device=device)
        self._noise = torch.zeros(num_images, windows, most_steps, *noises, dtype=torch.float64, device=device)
        guessed = most_steps + 2 * ROWS_OF_A_PRODUCT  # beyond the end of a block, too
        self._guesses = torch.zeros(num_images, windows, guessed, channels, dtype=torch.uint8, device=device)
        self._num_given = torch.zeros(windows, 1, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._last_step = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_final = torch.zeros(1, dtype=torch.int64, device=device)
        """Of the tokens of each block in the last step, how many have got their value."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._parameters: dict[int, Tensor] = {}
        self._num_rows = 0

    @property
    def images(self) -> Tensor:
        """uint8 [B, H, W, 3]; what is not drawn yet is as in the prefix, or black."""
        return to_images(self._values, self._model.config.image_size)

    @property
    def parameters(self) -> Tensor:
        """What the values of the last step were drawn from, in the order of its positions: [B, positions, C, 256] or
        [B, positions, 10 mixtures]; overwritten by the next step."""
        parameters = self._parameters[self._num_rows].unflatten(1, (self._num_rows, -1))
        return parameters[:, :, : int(self._num_final)].flatten(1, 2)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        model, length = self._model, self._model.pattern.length
        was_training = model.training
        model.eval()
        try:
            self._encoder_kv = model.encode(self._condition)
            done = self._keep
            for wave in self._plan.waves:
                num_given = [min(max(self._keep - block.start, 0), wave.num_steps) for block in wave.blocks]
                positions = model.pattern.storage_order[wave.slots]
                self._enter(wave, num_given)
                step = min(num_given)
                while step < wave.num_steps:
                    stop = step + self._advance(len(wave.blocks))
                    done += sum(max(stop - max(given, step), 0) for given in num_given)
                    yield Step(done, length, positions[:, step:stop].flatten())
                    step = stop
                self._cache.leave(wave)
        finally:
            model.train(was_training)

    def _enter(self, wave: Wave, num_given: list[int]) -> None:
        """Prepare a wave, and take through the layers what is given of all its blocks."""
        device, rows, steps = self._slots.device, len(wave.blocks), wave.num_steps
        self._cache.enter(wave)
        self._slots[:rows, :steps] = wave.slots.to(device)
        self._num_given[:rows, 0] = torch.tensor(num_given, device=device)
        self._step.fill_(min(num_given))
        self._last_step.fill_(steps - 1)
        if min(num_given) < steps:
            positions = self._model.positions[self._slots[:rows, :steps]].flatten()
            noise = keyed_uniforms(self._seed, self._image_numbers, positions, self._noise.shape[3])
            self._noise[:, :rows, :steps] = noise.unflatten(1, (rows, steps))
            # What is given is guessed right, the rest is guessed when its turn comes.
            self._guesses[:, :rows, :steps] = self._values.index_select(1, positions).unflatten(1, (rows, steps))
        for row in range(rows):
            for start in range(0, min(num_given), FILLED_TOGETHER):
                stop = min(start + FILLED_TOGETHER, min(num_given))
                slots = self._slots[row, start:stop]
                self._hidden(self._inputs(slots), slots, self._cache.attend_several(row, start, stop))

    def _advance(self, rows: int) -> int:
        """Draw the next positions of the first `rows` blocks; how many of each?"""
        self._num_rows = rows
        if self._slots.device.type != "cuda":
            self._draw_next(rows)
            return int(self._num_final)
        if rows not in self._graphs:
            self._graphs[rows] = self._captured(rows)
        self._graphs[rows].replay()
        return 1  # without waiting for the step

    def _captured(self, rows: int) -> torch.cuda.CUDAGraph:
        before = self._step.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and workspaces allocated before the capture
                self._draw_next(rows)
                self._step.copy_(before)  # drawing a position again changes nothing
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as loaders, may go on with CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._draw_next(rows)
        return graph

    def _draw_next(self, rows: int) -> None:
        """One step, without a look at any value on the host."""
        model, steps = self._model, self._steps_together(rows)
        ahead = torch.arange(steps, device=self._step.device)
        numbers = torch.minimum(self._step + ahead, self._last_step)
        offsets = numbers - self._step  # at the end of a block, its last token again and again
        slots = self._slots[:rows].index_select(1, numbers)
        inputs = self._inputs(slots[:, 0])[:, :, None]
        if steps > 1:
            guessed = self._guesses[:, :rows].index_select(2, numbers[1:] - 1)
            inputs = torch.cat([inputs, guessed.where((offsets[1:] > 0)[:, None], inputs)], dim=2)
        slots = slots.flatten()
        hidden = self._hidden(inputs.flatten(1, 2), slots, self._cache.attend_steps(rows, numbers))
        parameters = model.head(hidden)[:, : len(slots)]
        parameters, without_class = parameters.chunk(2) if self._copies == 2 else (parameters, None)
        self._parameters[rows] = parameters
        noise = self._noise[:, :rows].index_select(2, numbers).flatten(1, 2)
        if isinstance(model.config.output, CategoricalOutput):
            noise = noise.unflatten(2, (-1, 256))
        drawn = draw(model.config.output, parameters, noise, self._sampling, without_class).unflatten(1, (rows, steps))

        positions = model.positions[slots]
        before = self._values.index_select(1, positions).unflatten(1, (rows, steps))
        drawn = torch.where((numbers < self._num_given[:rows])[..., None], before, drawn)
        if steps > 1:
            self._check_guesses(drawn, ahead)
            drawn = drawn.where((ahead < self._num_final)[:, None], before).index_select(2, offsets)
        else:
            self._num_final.fill_(1)
        self._values.index_copy_(1, positions, drawn.flatten(1, 2))
        self._step += self._num_final

    def _check_guesses(self, drawn: Tensor, ahead: Tensor) -> None:
        """How many of the values [B, G, A, C] that were drawn are final? They all are the next guesses, and values of
        the same channel those of the positions after them."""
        rows, steps = drawn.shape[1:3]
        guesses, numbers = self._guesses[:, :rows], self._step + ahead
        right = (guesses.index_select(2, numbers) == drawn).all(3).all(1).all(0)
        num_right = right[:-1].long().cumprod(0).sum()
        torch.minimum(1 + num_right, self._last_step + 1 - self._step, out=self._num_final)
        guesses.index_copy_(2, numbers, drawn)
        period = 3 if self._model.config.input == "categorical" else 1
        like = (self._step + steps - period + ahead % period).clamp(min=0)
        entering = numbers + steps
        given = (entering < self._num_given[:rows])[..., None]
        new = torch.where(given, guesses.index_select(2, entering), guesses.index_select(2, like))
        guesses.index_copy_(2, entering, new)

    def _inputs(self, slots: Tensor) -> Tensor:
        """uint8 [B, T, C]: what the tokens of slots [T] get of the values before them."""
        return self._values.index_select(1, self._model.sources[slots].clamp(min=0))

    def _hidden(self, inputs: Tensor, slots: Tensor, attends: list[Attend]) -> Tensor:
        """Of as many tokens as make full rows of products."""
        padding = self._padded(len(slots)) - len(slots)
        inputs = F.pad(inputs, (0, 0, 0, padding)).repeat(self._copies, 1, 1)
        return self._model.hidden(inputs, F.pad(slots, (0, padding)), self._labels, self._encoder_kv, attends)

    def _steps_together(self, rows: int) -> int:
        return max(ROWS_OF_A_PRODUCT // (self._copies * rows), 1) if self._look_ahead else 1

    def _padded(self, tokens: int) -> int:
        """Tokens to compute for that many of each image, so that products have full rows."""
        if self._slots.device.type != "cpu":
            return tokens
        while tokens * self._copies * len(self._values) % ROWS_OF_A_PRODUCT:
            tokens += 1
        return tokens


def consistency(images: Tensor, condition: Tensor) -> Tensor:
    """How far each super-resolved image, averaged over areas of the small image's size, is from the small image: [B].

    Root mean square difference, intensities on [0, 1]; 0 is perfect. images uint8 [B, H, W, 3], condition [B, h, w, 3].
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), condition.shape[1]).permute(0, 2, 3, 1)
    return ((small - condition) / 255).square().mean((1, 2, 3)).sqrt()
