"""What is the peak of the memory that real training steps allocate? Started by tests/trainer/test_memory.py.

The C library is asked, after every operator, for the bytes of its large allocations, from before the model is built.
torch's profiler would not do: buffers whose last owner is a thread of gloo are freed there, where it does not look.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from models.given import NOTHING
from models.likelihood import nats
from models.model import Recompute
from tests.support.launch import SMALL_JOB
from tests.support.mapped_memory import mapped_bytes
from trainer.config import RunConfig, load_config
from trainer.deepspeed_engine import DeepSpeedEngine, init_distributed
from trainer.ranks import ranks_from_environment

# Weights and activations of like size, so that an error in either shows.
SIZES = {
    "model.image_size": 16,
    "model.layers": 4,
    "model.width": 192,
    "model.heads": 3,
    "model.attention_width": 192,
    "model.ff_width": 768,
    "train.global_batch_images": 4,
    "train.micro_batch_images": 1,
}
# Each stage meets each precision that it has, and each choice of recomputation.
CASES = [(stage, "fp32", every) for stage, every in ((0, 0), (1, 1), (2, 2), (3, 0), (3, 1))]
CASES += [(stage, "bf16", every) for stage, every in ((1, 0), (2, 1), (2, 2), (3, 2))]
UPDATES = 2  # in the second one the optimizer's state is there


def config_of(stage: int, precision: str, every: int) -> RunConfig:
    values = SIZES | {
        "train.zero_stage": stage,
        "train.precision": precision,
        "train.activation_checkpoint_every_layers": every,
    }
    return load_config(SMALL_JOB, [f"{name}={value}" for name, value in values.items()])


def main() -> None:
    """Arguments: for each case a free port of this machine. Prints stage, precision, n and bytes, a line each."""
    gc.freeze()  # what the imports made is not looked at by each collection
    for case, port in zip(CASES, sys.argv[1:], strict=True):
        os.environ["MASTER_PORT"] = port
        # A process for each case, which inherits the imports: DeepSpeed frees an engine at a time of its own.
        if (child := os.fork()) == 0:
            measure(case)
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"{case}: ended with status {status}")


def measure(case: tuple[int, str, int]) -> None:
    ranks = ranks_from_environment()
    device = init_distributed(timedelta(seconds=120), ranks.local_rank)
    config = config_of(*case)
    every = config.train.activation_checkpoint_every_layers
    with _PeakOfMapped() as mapped:
        model = config.model.build(Recompute(every=every))
        train(DeepSpeedEngine(model, config, ranks, device), config)
    if ranks.rank == 0:
        print(json.dumps([*case, mapped.bytes]))
    torch.distributed.barrier()


def train(engine: DeepSpeedEngine, config: RunConfig) -> None:
    engine.train(True)
    for _ in range(UPDATES):
        for _ in range(engine.accumulation_steps):
            gc.collect()  # DeepSpeed leaves buffers in cycles, which are freed at a time that nobody can predict
            images = torch.zeros(1, config.model.image_size, config.model.image_size, 3, dtype=torch.uint8)
            loss = nats(config.model.output, engine.forward(images, NOTHING), images).sum() / images.numel()
            engine.backward(loss)
        engine.update(1e-3)


class _PeakOfMapped(TorchDispatchMode):
    """The most bytes that are mapped after any operator, above those mapped before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._before = 0, mapped_bytes()

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, mapped_bytes() - self._before)
        return result


if __name__ == "__main__":
    main()
