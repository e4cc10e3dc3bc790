"""What is the peak of torch's allocations in real training steps? A job of its own, started by tests/test_memory.py.

The allocations that torch's profiler records are added up over three updates, from before the model is built.
"""

import gc
import itertools
import json
import os
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from models.image_transformer import ImageTransformer, num_parameters
from models.likelihood import nats
from tests.launch import QUICKSTART
from trainer import deepspeed_engine
from trainer.config import RunConfig, load_config
from trainer.deepspeed_engine import DeepSpeedEngine, init_distributed
from trainer.memory import reduce_bucket_elements
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
    return load_config(QUICKSTART, [f"{name}={value}" for name, value in values.items()])


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
    device = init_distributed(120, ranks.local_rank)
    config = config_of(*case)
    every = config.train.activation_checkpoint_every_layers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = ImageTransformer(config.model, checkpoint_every_layers=every)
        train(DeepSpeedEngine(model, config, ranks, device), config)
    if ranks.rank == 0:
        print(json.dumps([*case, _peak(recorded)]))
    torch.distributed.barrier()


def train(engine: DeepSpeedEngine, config: RunConfig) -> None:
    engine.train(True)
    for _ in range(UPDATES * engine.accumulation_steps):
        gc.collect()  # DeepSpeed leaves buffers in cycles, which are freed at a time that nobody can predict
        images = torch.zeros(1, config.model.image_size, config.model.image_size, 3, dtype=torch.uint8)
        loss = nats(config.model.output, engine.forward(images, None, None), images).sum() / images.numel()
        engine.backward(loss)
        engine.step(1e-3)


def _peak(recorded: Any) -> int:
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def _bound_the_bucket() -> None:
    written = deepspeed_engine.deepspeed_config

    def with_bucket(config: RunConfig, world_size: int) -> dict[str, Any]:
        dictionary = written(config, world_size)
        bucket = reduce_bucket_elements(num_parameters(config.model))
        dictionary["zero_optimization"].setdefault("reduce_bucket_size", bucket)
        return dictionary

    deepspeed_engine.deepspeed_config = with_bucket


if __name__ == "__main__":
    _bound_the_bucket()
    main()
