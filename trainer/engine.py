"""What does the training loop need of an engine, and what is the plainest one?"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from models.given import Given
from trainer.config import RunConfig
from trainer.optimizer import build_optimizer
from trainer.options import Muon

State = dict[str, Tensor]
"""fp32 tensors of one parameter, each of the parameter's full shape: `weight`, Adam's `exp_avg` and `exp_avg_sq`,
RMSProp's `square_avg` or Muon's `momentum_buffer`, and `ema` where an average of the weights is kept."""


Outcome = Literal["applied", "rescaled", "skipped"]
"""What became of an update: made; left out while fp16 looks for its loss scale; left out because a gradient was not
finite."""


@dataclass(frozen=True)
class Update:
    """What one update did, the same on all ranks."""

    outcome: Outcome
    gradient_norm: float | None
    """Global gradient norm before clipping; None where the engine cannot know it."""


def subpixels_per_update(config: RunConfig) -> int:
    """Values whose loss one update averages."""
    return config.train.global_batch_images * 3 * config.model.image_size**2


class Engine(Protocol):
    """A model with its optimizer. Calls marked collective must be made by all ranks in the same order.

    One update: `accumulation_steps` times `forward` and `backward`, then `update`.
    """

    device: torch.device
    accumulation_steps: int
    """Micro-batches per rank and update."""

    def forward(self, images: Tensor, given: Given) -> Tensor:
        """Parameters of the output distribution (collective under ZeRO-3)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss; collective."""
        ...

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters; hooks on them see the gradients of each micro-batch."""
        ...

    def recompute(self, images: Tensor, given: Given, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Do what `forward` and `backward` do for a micro-batch, but for adding its gradients; returns its loss.

        `loss_of` makes the mean loss of the parameters of the output distribution. Collective.
        """
        ...

    def update(self, learning_rate: float) -> Update:
        """Change the weights by the mean of the gradients added since the last update, then forget these; collective.

        Where a gradient is not finite, the weights and the optimizer's state stay as they are.
        """
        ...

    def train(self, mode: bool) -> None:
        """Switch dropout and activation checkpointing on or off."""
        ...

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of which every rank holds and uses a full copy; none under ZeRO-3."""
        ...

    def state(self) -> Iterator[tuple[str, State]]:
        """The name and full state of every parameter, gathered one at a time; collective."""
        ...

    def load_state(self, states: Iterable[tuple[str, State]], updates: int) -> None:
        """Continue from what `state` gave after `updates` updates, on any number of ranks; collective."""
        ...


class TorchEngine:
    """One process, fp32, no Muon, no DeepSpeed: the oracle that DeepSpeed's losses are compared with."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.accumulation_steps = config.train.global_batch_images // config.train.micro_batch_images
        self._model = model.to(self.device)
        assert not isinstance(config.optimizer, Muon)
        self._optimizer = build_optimizer(model, config.optimizer, subpixels_per_update(config))
        self._clip = config.optimizer.clip_grad_norm

    def forward(self, images: Tensor, given: Given) -> Tensor:
        parameters: Tensor = self._model(images, given)
        return parameters

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation_steps).backward()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters()

    def recompute(self, images: Tensor, given: Given, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        loss = loss_of(self.forward(images, given))
        torch.autograd.grad(loss / self.accumulation_steps, list(self._model.parameters()), allow_unused=True)
        return loss.detach()

    def update(self, learning_rate: float) -> Update:
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or float("inf")))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return Update("applied" if math.isfinite(norm) else "skipped", norm)

    def train(self, mode: bool) -> None:
        self._model.train(mode)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters()

    def state(self) -> Iterator[tuple[str, State]]:
        for name, parameter in self._model.named_parameters():
            moments = {key: value for key, value in self._optimizer.state[parameter].items() if key != "step"}
            yield name, {"weight": parameter.detach(), **moments}

    def load_state(self, states: Iterable[tuple[str, State]], updates: int) -> None:
        parameters = dict(self._model.named_parameters())
        for name, state in states:
            moments = {key: value.to(self.device) for key, value in state.items() if key != "weight"}
            with torch.no_grad():
                parameters[name].copy_(state["weight"])
            self._optimizer.state[parameters[name]] = {"step": torch.tensor(float(updates)), **moments}
