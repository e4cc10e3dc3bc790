"""How does the Image Transformer draw, token by token, without computing anything twice?

Each step feeds one token of every block of a wave (models/image_transformer/decode_plan.py) through the layers, which
see earlier tokens in caches (models/image_transformer/decode_cache.py). On CUDA a step is captured as a graph once and
then replayed.

On a CPU a product of one row takes as long as one of four, so that a step of a single image looks ahead: further tokens
take the place of padding, with guesses for the values before them. A value drawn is final when all values before it
were guessed right, and otherwise the next guess of its position (fixed-point iteration: Song et al. 2021, Wiggers and
Hoogeboom 2020). As the noise is that of the position, the image is the same to the last bit.

Where tokens are pixels whose channels are drawn one after the other, a step takes three turns: the layers once, and the
head for each channel.

Shapes: B batch, L tokens, C values of a position, R turns (positions of a token), G blocks of a wave, Q tokens of a
block, A steps computed together.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.drawing.canvas import Canvas
from models.image_transformer.decode_cache import DecodeCache
from models.image_transformer.decode_plan import Stretch, decode_plans
from models.image_transformer.layer import Attend, attend_in_turn
from models.image_transformer.network import Network
from models.linear import ROWS_OF_A_PRODUCT, product_dtype

FILLED_TOGETHER = 64
"""Known tokens that go through the layers at once."""


class WaveDecoder:
    """Draws a canvas: see Decoder."""

    def __init__(self, network: Network, canvas: Canvas, *, in_waves: bool, look_ahead: bool) -> None:
        """in_waves: decode blocks that do not see each other together, where the patterns have such blocks.
        look_ahead: compute further tokens of a single image on a CPU. Neither changes the images."""
        config, device = network.config, network.positions.device
        self._network, self._canvas = network, canvas
        # What a cache is for: a pattern, and how many patterns the heads of its layers take in turn.
        caches_of_layers = [[(pattern, len(patterns)) for pattern in patterns] for patterns in network.patterns]
        kinds = list(dict.fromkeys(kind for of_layer in caches_of_layers for kind in of_layer))
        # Neighbours may lie in other blocks of a wave.
        in_waves = in_waves and not config.sees_neighbours
        self._plans, self._stretches = decode_plans(tuple(pattern for pattern, _ in kinds), config.shift, in_waves)
        self._caches_of_layers = [[kinds.index(kind) for kind in of_layer] for of_layer in caches_of_layers]
        has_own_keys = config.num_key_heads == config.heads
        num_images, channels = len(canvas.values), canvas.values.shape[2]
        self._caches = [
            DecodeCache(
                plan,
                layers=sum(of_layer.count(index) for of_layer in self._caches_of_layers),
                batch=canvas.copies * num_images,
                key_heads=config.num_key_heads // (kinds[index][1] if has_own_keys else 1),
                head_width=config.attention_width // config.heads,
                dtype=product_dtype(network.head.weight),
                device=device,
            )
            for index, plan in enumerate(self._plans)
        ]
        # The stretch that is being decoded, at fixed addresses as a captured graph needs them.
        windows = max(len(stretch.slots) for stretch in self._stretches)
        most_steps = max(stretch.num_steps for stretch in self._stretches)
        self._turns = len(canvas.known) // network.length
        # All images have to wait for the one with the first wrong guess: already for two it hardly pays.
        can_guess = canvas.can_be_guessed and self._turns == 1
        self._look_ahead = look_ahead and can_guess and device.type == "cpu" and num_images == 1
        self._slots = torch.zeros(windows, most_steps, dtype=torch.int64, device=device)
        numbers = (self._turns, canvas.numbers_per_position)
        self._noise = torch.zeros(num_images, windows, most_steps, *numbers, dtype=torch.float64, device=device)
        guessed = most_steps + 2 * ROWS_OF_A_PRODUCT  # beyond the end of a stretch, too
        self._guesses = torch.zeros(num_images, windows, guessed, channels, dtype=torch.uint8, device=device)
        self._known = torch.zeros(windows, guessed, self._turns, dtype=torch.bool, device=device)
        self._first_steps = torch.zeros(len(self._caches), dtype=torch.int64, device=device)
        """By cache: the number, in its wave, of the stretch's first step."""
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._last_step = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_final = torch.zeros(1, dtype=torch.int64, device=device)
        """Of the tokens of each block in the last step, how many have got their value."""
        # By how many blocks are decoded together, and by turn.
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._hidden_of: dict[int, Tensor] = {}
        self._parameters: dict[tuple[int, int], Tensor] = {}
        self._last = (0, 0)

    @property
    def parameters(self) -> Tensor:
        parameters = self._parameters[self._last].unflatten(1, (self._last[0], -1))
        return parameters[:, :, : int(self._num_final)].flatten(1, 2)

    def steps(self) -> Iterator[Tensor]:
        self._encoder_kv = self._network.encode(self._canvas.given.small_images)
        storage_order = self._network.patterns[0][0].storage_order
        for stretch in self._stretches:
            positions = storage_order[stretch.slots]
            known = self._canvas.known.view(-1, self._turns)[positions]
            waves = [plan.waves[index] for plan, index in zip(self._plans, stretch.waves, strict=True)]
            for cache, wave, first in zip(self._caches, waves, stretch.first_steps, strict=True):
                if first == 0:
                    cache.enter(wave)
            self._enter(stretch, known)
            known_to_all = known.all(2).all(0).tolist()
            step = 0
            while step < stretch.num_steps:
                if known_to_all[step]:
                    stop = next((n for n in range(step, stretch.num_steps) if not known_to_all[n]), stretch.num_steps)
                    self._fill(stretch, step, stop)
                else:
                    for turn in range(self._turns):
                        stop = step + self._advance(len(stretch.slots), turn)
                        yield positions[:, step:stop].flatten() * self._turns + turn
                step = stop
            for cache, wave, first in zip(self._caches, waves, stretch.first_steps, strict=True):
                if first + stretch.num_steps == wave.num_steps:
                    cache.leave(wave)

    def _enter(self, stretch: Stretch, known: Tensor) -> None:
        """Prepare for the steps of a stretch, of which the positions `known` [G, Q, R] have their values."""
        device, (rows, steps) = self._slots.device, stretch.slots.shape
        self._slots[:rows, :steps] = stretch.slots.to(device)
        self._known[:rows, :steps], self._known[:rows, steps:] = known.to(device), False
        self._first_steps.copy_(torch.tensor(stretch.first_steps))
        self._step.fill_(0)
        self._last_step.fill_(steps - 1)
        if not known.all():
            positions = self._network.positions[self._slots[:rows, :steps]].flatten()
            turns = torch.arange(self._turns, device=device)
            noise = self._canvas.noise((positions[:, None] * self._turns + turns).flatten())
            self._noise[:, :rows, :steps] = noise.unflatten(1, (rows, steps, self._turns))
            if self._look_ahead:  # what is known is guessed right, the rest is guessed when its turn comes
                values = self._canvas.values.index_select(1, positions)
                self._guesses[:, :rows, :steps] = values.unflatten(1, (rows, steps))

    def _fill(self, stretch: Stretch, start: int, stop: int) -> None:
        """Take the tokens start..stop of each block, all of which are known, through the layers."""
        for row in range(len(stretch.slots)):
            for begin in range(start, stop, FILLED_TOGETHER):
                end = min(begin + FILLED_TOGETHER, stop)
                slots = self._slots[row, begin:end]
                attends = [
                    iter(cache.attend_several(row, first + begin, first + end))
                    for cache, first in zip(self._caches, stretch.first_steps, strict=True)
                ]
                self._hidden(self._entered(self._canvas.values), slots, self._by_layer(attends))
        self._step.fill_(stop)

    def _advance(self, rows: int, turn: int) -> int:
        """Draw the next positions of the first `rows` blocks; how many of each?"""
        self._last = (rows, turn)
        if self._slots.device.type != "cuda":
            self._draw_next(rows, turn)
            return int(self._num_final)
        if self._last not in self._graphs:
            self._graphs[self._last] = self._captured(rows, turn)
        self._graphs[self._last].replay()
        return 1  # without waiting for the step

    def _captured(self, rows: int, turn: int) -> torch.cuda.CUDAGraph:
        before = self._step.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and workspaces allocated before the capture
                self._draw_next(rows, turn)
                self._step.copy_(before)  # drawing a position again changes nothing
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as loaders, may go on with CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._draw_next(rows, turn)
        return graph

    def _draw_next(self, rows: int, turn: int) -> None:
        """One turn of a step, without a look at any value on the host."""
        network, canvas, steps = self._network, self._canvas, self._steps_together(rows)
        ahead = torch.arange(steps, device=self._step.device)
        numbers = torch.minimum(self._step + ahead, self._last_step)
        offsets = numbers - self._step  # at the end of a stretch, its last token again and again
        slots = self._slots[:rows].index_select(1, numbers)
        values = canvas.values
        if steps > 1:
            guessed = self._guesses[:, :rows].index_select(2, numbers[:-1])
            values = values.index_copy(1, network.positions[slots[:, :-1]].flatten(), guessed.flatten(1, 2))
        values, slots = self._entered(values), slots.flatten()
        if turn == 0:
            attends = [
                iter(cache.attend_steps(rows, first + numbers))
                for cache, first in zip(self._caches, self._first_steps, strict=True)
            ]
            self._hidden_of[rows] = self._hidden(values, slots, self._by_layer(attends))
        positions = network.positions[self._with_padding(slots)]
        channels = range(turn, turn + 1)
        parameters = network.parameters_of(self._hidden_of[rows], values, positions, channels)[:, : len(slots)]
        self._parameters[rows, turn] = parameters
        noise = self._noise[:, :rows, :, turn].index_select(2, numbers).flatten(1, 2)
        drawn = canvas.draw(parameters, noise).unflatten(1, (rows, steps))

        positions = network.positions[slots] * self._turns + turn
        before = canvas.values.index_select(1, positions).unflatten(1, (rows, steps))
        known = self._known[:rows, :, turn].index_select(1, numbers)
        drawn = torch.where(known[..., None], before, drawn)
        if steps > 1:
            self._check_guesses(drawn, ahead)
            drawn = drawn.where((ahead < self._num_final)[:, None], before).index_select(2, offsets)
        else:
            self._num_final.fill_(1)
        canvas.values.index_copy_(1, positions, drawn.flatten(1, 2))
        if turn == self._turns - 1:
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
        period = 3 if self._network.config.input == "categorical" else 1
        like = (self._step + steps - period + ahead % period).clamp(min=0)
        entering = numbers + steps
        known = self._known[:rows].index_select(1, entering)
        new = torch.where(known, guesses.index_select(2, entering), guesses.index_select(2, like))
        guesses.index_copy_(2, entering, new)

    def _entered(self, values: Tensor) -> Tensor:
        """Values of the canvas as the network sees them, those of each token: [copies B, L, any number]."""
        return self._network.entered(values).repeat(self._canvas.copies, 1, 1)

    def _hidden(self, values: Tensor, slots: Tensor, attends: list[Attend]) -> Tensor:
        """Hidden states of slots [T] among entered values, padded to a multiple of ROWS_OF_A_PRODUCT."""
        slots = self._with_padding(slots)
        inputs = self._network.inputs(values, slots)
        return self._network.hidden(inputs, slots, self._canvas.given.labels, self._encoder_kv, attends)

    def _with_padding(self, slots: Tensor) -> Tensor:
        return F.pad(slots, (0, self._padded(len(slots)) - len(slots)))

    def _by_layer(self, attends: list[Iterator[Attend]]) -> list[Attend]:
        """Of what each cache has for its layers, one for each layer of the network."""
        return [attend_in_turn([next(attends[cache]) for cache in caches]) for caches in self._caches_of_layers]

    def _steps_together(self, rows: int) -> int:
        return max(ROWS_OF_A_PRODUCT // (self._canvas.copies * rows), 1) if self._look_ahead else 1

    def _padded(self, tokens: int) -> int:
        """Tokens to compute for that many of each image, so that products have full rows."""
        if self._slots.device.type != "cpu":
            return tokens
        while tokens * self._canvas.copies * len(self._canvas.values) % ROWS_OF_A_PRODUCT:
            tokens += 1
        return tokens
