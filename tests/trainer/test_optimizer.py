"""Do the schedules have the shapes of their definitions, and is each parameter optimised once?"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.support.launch import SMALL_JOB
from trainer.config import load_config
from trainer.optimizer import build_optimizer, learning_rate
from trainer.options import AdamW, Cosine, Exponential, Noam, RMSProp, Rsqrt, Schedule, SummedAdam, WarmupStableDecay


def config(**changes: object) -> AdamW:
    optimizer = load_config(SMALL_JOB, []).optimizer
    assert isinstance(optimizer, AdamW)
    return dataclasses.replace(optimizer, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("base", "width", "warmup"), [(0.5, 512, 4000), (0.2, 512, 12000), (0.1, 256, 4000)])
def test_noam_is_the_schedule_of_tensor2tensor(base: float, width: int, warmup: int) -> None:
    noam = config(schedule=Noam(warmup_steps=warmup), peak_lr=10 * base / math.sqrt(width * warmup))
    for step in (0, 1, 100, warmup - 1, warmup, 10 * warmup, 1_000_000):
        original = 0.002 * base * 5000 * width**-0.5 * min((step + 1) * warmup**-1.5, (step + 1) ** -0.5)
        assert learning_rate(noam, step, 10**6) == pytest.approx(original, rel=1e-9)


def test_rsqrt_is_constant_and_then_decays() -> None:
    rsqrt = config(schedule=Rsqrt(warmup_steps=100), peak_lr=1.0)
    assert learning_rate(rsqrt, 0, 1000) == learning_rate(rsqrt, 99, 1000) == 1.0
    assert learning_rate(rsqrt, 399, 1000) == pytest.approx(0.5)


def test_cosine_and_wsd_rise_linearly_to_the_peak_and_end_at_their_fraction() -> None:
    cosine: Schedule = Cosine(warmup_steps=100, final_lr_fraction=0.1)
    for schedule in (cosine, WarmupStableDecay(warmup_steps=100, decay_steps=200, final_lr_fraction=0.1)):
        c = config(schedule=schedule, peak_lr=1.0)
        assert learning_rate(c, 0, 1000) == pytest.approx(0.01)
        assert learning_rate(c, 49, 1000) == pytest.approx(0.5)
        assert max(learning_rate(c, step, 1000) for step in range(1000)) == pytest.approx(1.0)
        assert learning_rate(c, 999, 1000) == pytest.approx(0.1)
    assert learning_rate(config(schedule=Cosine(warmup_steps=0), peak_lr=1.0), 499, 1000) == pytest.approx(0.5)
    wsd = config(schedule=WarmupStableDecay(warmup_steps=0, decay_steps=200), peak_lr=1.0)
    assert [learning_rate(wsd, step, 1000) for step in (0, 798, 899)] == pytest.approx([1.0, 1.0, 0.5])


def test_exponential_decays_before_every_update() -> None:
    authors = config(schedule=Exponential(factor=0.999995), peak_lr=1e-3)
    rate = 1e-3
    for step in range(1000):
        rate *= 0.999995
        assert learning_rate(authors, step, 1000) == pytest.approx(rate, rel=1e-9)
    with pytest.raises(ValueError, match="factor: must be above 0 and at most 1, not 1.1"):
        Exponential(factor=1.1)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, kept = build_optimizer(model, config(weight_decay=0.3), 1).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in kept["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert len({id(p) for p in [*decayed["params"], *kept["params"]]}) == len(list(model.parameters()))


def test_without_decay_it_is_adam() -> None:
    c = config(weight_decay=0.0, ema_decay=0.0)
    weights = [nn.Parameter(torch.full((2, 2), 0.5)) for _ in range(2)]
    ours = build_optimizer(nn.ParameterList(weights[:1]), c, 1)
    adam = torch.optim.Adam(weights[1:], lr=c.peak_lr, betas=(c.beta1, c.beta2), eps=c.eps)
    for gradient in (0.3, -2.0, 0.01):
        for weight, optimizer in zip(weights, (ours, adam), strict=True):
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_summed_adam_makes_the_updates_of_a_summed_loss_with_eps_inside_the_root() -> None:
    """Written out, with gradients so small that eps is most of the root. The mean is over 4 images of 8x8."""
    subpixels, rate = 4 * 8 * 8 * 3, 0.01
    c = SummedAdam(peak_lr=rate, schedule=Exponential(factor=1.0), beta1=0.9, beta2=0.99, eps=1e-6, ema_decay=0.5)
    weight = nn.Parameter(torch.zeros(()))
    ours = build_optimizer(nn.ParameterList([weight]), c, subpixels)
    expected = mean = square = average = 0.0
    for step, summed in enumerate((3e-3, -1e-3, 2e-3), start=1):
        mean, square = 0.9 * mean + 0.1 * summed, 0.99 * square + 0.01 * summed**2
        expected -= rate * (mean / (1 - 0.9**step)) / math.sqrt(square / (1 - 0.99**step) + 1e-6)
        average = expected if step == 1 else (average + expected) / 2
        weight.grad = torch.tensor(summed / subpixels)
        ours.step()
        assert weight.item() == pytest.approx(expected, rel=1e-5)
        assert ours.state[weight]["ema"].item() == pytest.approx(average, rel=1e-5)


def test_rmsprop_divides_gradients_by_their_average_size() -> None:
    c = RMSProp(peak_lr=0.01, schedule=Cosine(warmup_steps=0), decay=0.9, eps=1e-6, ema_decay=0.5)
    weight = nn.Parameter(torch.zeros(()))
    ours = build_optimizer(nn.ParameterList([weight]), c, 1)
    expected = square = 0.0
    for gradient in (3e-3, -1e-3, 2e-3):
        square = 0.9 * square + 0.1 * gradient**2
        expected -= 0.01 * gradient / (math.sqrt(square) + 1e-6)
        weight.grad = torch.tensor(gradient)
        ours.step()
        assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert ours.state[weight].keys() >= {"square_avg", "ema"}
    with pytest.raises(ValueError, match="decay: must be at least 0 and below 1, not 1.0"):
        RMSProp(peak_lr=0.01, schedule=Cosine(warmup_steps=0), decay=1.0)
