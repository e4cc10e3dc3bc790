"""How does one rank go wrong in tests, in the middle of a run: its memory, its speed or its clock?

Each function is called in the rank's process before it begins (tests/support/preloaded.py); other ranks know nothing of
it. Damage to memory changes the weights that the rank computes with, in place, after an update.
"""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from data_pipeline.storage import DataError, Store
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.engine import Update
from trainer.record.run_folder import Journal

TENSOR = "layers.1.feed_forward.out.weight"
"""The tensor that is damaged where its name is of no importance."""


def one_bit_flips() -> None:
    """One bit of one weight after the fifth update, once."""
    _after_updates(_flip, lambda update: update == 5)


def one_bit_is_stuck() -> None:
    """One bit of one weight is read as 1 from the fifth update on, whatever was written."""
    _after_updates(_stick, lambda update: update >= 5)


def a_weight_becomes_nan() -> None:
    """One weight after the fifth update, once."""
    _after_updates(lambda weight: weight.view(-1)[7].fill_(float("nan")), lambda update: update == 5)


def a_gradient_is_computed_wrongly() -> None:
    """One bit of the gradient of one micro-batch after the fifth update, once."""
    flipped = []

    def flip_once(gradient: Tensor) -> Tensor:
        if flipped:
            return gradient
        flipped.append(True)
        wrong = gradient.clone()
        _flip(wrong)
        return wrong

    _after_updates(lambda weight: weight.register_hook(flip_once), lambda update: update == 5)


def the_output_layer_grows() -> None:
    """After the thirtieth update, once: the loss jumps, and is finite."""
    _after_updates(lambda weight: weight.mul_(50.0), lambda update: update == 30, "head.weight")


def forward_passes_are_slow() -> None:
    """Each takes six times as long: it is computed six times."""
    forward = DeepSpeedEngine.forward

    def forward_again(self: DeepSpeedEngine, *inputs: Tensor | None) -> Tensor:
        with torch.no_grad():
            for _ in range(5):
                forward(self, *inputs)  # type: ignore[arg-type]
        return forward(self, *inputs)  # type: ignore[arg-type]

    DeepSpeedEngine.forward = forward_again  # type: ignore[assignment, method-assign]


def a_call_never_gives_python_back() -> None:
    """After the fifth update: C code that holds Python's lock, so that no thread of the rank runs any more."""
    _after_updates(lambda weight: ctypes.PyDLL(None).sleep(600), lambda update: update == 5)


def the_memory_of_the_device_runs_out() -> None:
    """In the forward pass after the fifth update."""
    forward, full = DeepSpeedEngine.forward, []
    _after_updates(full.append, lambda update: update == 5)

    def forward_or_fail(self: DeepSpeedEngine, *inputs: Tensor | None) -> Tensor:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *inputs)  # type: ignore[arg-type]

    DeepSpeedEngine.forward = forward_or_fail  # type: ignore[assignment, method-assign]


def the_points_cannot_be_written() -> None:
    """From the fifth update on, every write to `metrics.jsonl` fails."""
    write, broken = Journal._write, []
    _after_updates(broken.append, lambda update: update == 5)

    def write_or_fail(self: Journal, data: bytes) -> None:
        if broken and self.path.name == "metrics.jsonl":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(self, data)

    Journal._write = write_or_fail  # type: ignore[method-assign]


def checkpoints_after_the_fifth_update_cannot_be_written() -> None:
    """The store says that it is full."""
    write, full = Store.write_pieces, []
    _after_updates(full.append, lambda update: update == 5)

    def write_or_fail(self: Store, name: str, pieces: Callable[[], Iterable[memoryview]]) -> int:
        if full and name.startswith("step-"):
            raise DataError("the disk is full")
        return write(self, name, pieces)

    Store.write_pieces = write_or_fail  # type: ignore[method-assign]


def it_is_asked_to_stop_before_training() -> None:
    """SIGTERM, while it looks for a checkpoint to go on from."""
    from trainer import run

    def asked(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # an exception ends this

    run.newest_checkpoint = asked


def the_clock_is_two_hours_behind() -> None:
    """What Python calls the time; clocks that only run forward know nothing of it."""
    right = time.time
    time.time = lambda: right() - 7200


def _flip(weight: Tensor) -> None:
    raw = weight.view(-1).view(torch.int16 if weight.element_size() == 2 else torch.int32)
    raw[7] ^= 1 << 3  # in the mantissa: nothing that a loss would show


def _stick(weight: Tensor) -> None:
    raw = weight.view(-1).view(torch.int16 if weight.element_size() == 2 else torch.int32)
    raw[:16] |= 1  # sixteen weights, so that some had a 0 there


def _after_updates(damage: Callable[[Tensor], object], when: Callable[[int], bool], name: str = TENSOR) -> None:
    update = DeepSpeedEngine.update
    count = 0

    def update_and_damage(self: DeepSpeedEngine, learning_rate: float) -> Update:
        nonlocal count
        done = update(self, learning_rate)
        count += 1
        if when(count):
            with torch.no_grad():
                damage(dict(self._engine.module.named_parameters())[name])
        return done

    DeepSpeedEngine.update = update_and_damage  # type: ignore[method-assign]
