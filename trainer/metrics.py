"""What is every metric called, in which unit, and how is it averaged over micro-batches and ranks?

| name | unit | meaning |
|---|---|---|
| `train/bits_per_dim` | bits per sub-pixel | mean over the images since the last point, all ranks |
| `val/bits_per_dim` | bits per sub-pixel | exact, over validation images |
| `val/images` | images | how many that were |
| `optim/lr` | | learning rate of the last update |
| `optim/grad_norm` | | global gradient norm before clipping, last update |
| `perf/images_per_s` | images / s | all ranks, since the last point, without evaluation and checkpoints |
| `perf/step_ms` | ms | mean wall time of an update, likewise |
| `data/wait_fraction` | | share of that time spent waiting for the data stream, rank 0 |
| `progress/images_seen` | images | training images consumed |
| `progress/epoch` | epochs | the same, in passes over the training set |

The step of a point is the number of optimizer updates done.
"""

import math
import time

import torch
from torch import Tensor

from trainer.ranks import all_sum


class Meter:
    """Averages over the steps since the last point; the only synchronisation with the device is in `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, micro-batches
        self._images = 0
        self._steps = 0
        self._waiting = 0.0
        self._seconds = 0.0
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Begin to count time; call at the start of a step."""
        self._started = time.perf_counter()

    def waited(self, since: float) -> None:
        """Count the time since `since` (perf_counter) as waiting for data."""
        self._waiting += time.perf_counter() - since

    def add(self, loss: Tensor) -> None:
        """Add one micro-batch's mean loss, in nats per sub-pixel."""
        self._loss += torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])

    def step_done(self, images: int) -> None:
        """Count one update over `images` images of all ranks."""
        self._images += images
        self._steps += 1
        self._seconds += time.perf_counter() - self._started

    def reduce(self) -> dict[str, float]:
        """The means since the last call, and start anew; collective."""
        total, count = all_sum(self._loss).tolist()
        metrics = {
            "train/bits_per_dim": total / count / math.log(2),
            "perf/images_per_s": self._images / self._seconds,
            "perf/step_ms": 1000 * self._seconds / self._steps,
            "data/wait_fraction": self._waiting / self._seconds,
        }
        self._loss.zero_()
        self._images = self._steps = 0
        self._waiting = self._seconds = 0.0
        return metrics
