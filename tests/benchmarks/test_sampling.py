"""Does the benchmark of drawing run, and does it refuse to time a sampler that computes something else?"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import report, sampling
from models.attention.pattern import QueryBlock
from models.decoding import Step
from models.image_transformer.decode_plan import decode_plan
from models.image_transformer.shape import Local1D
from tests.support.launch import SMALL_JOB, TINY_MODEL
from tests.support.tiny_model import MODERN, tiny_config

TWO_DIMENSIONS = ["model.attention=local_2d", "model.attention.query_block=[2, 4]", "model.attention.memory=[2, 2]"]


def tiny_settings(*changes: str) -> list[str]:
    values = [f"{name}={value}" for name, value in TINY_MODEL.items()]
    return [argument for value in (*values, *changes) for argument in ("--set", value)]


@pytest.mark.parametrize("changes", [[], TWO_DIMENSIONS], ids=["1d", "2d"])
def test_it_reports_ratios_and_writes_them_down(
    changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(sampling, "copy_rate", lambda device: 1e9)
    quarter = {"key_heads_speedup": 2.5, "key_heads_fewer_bytes": 3.0}
    monkeypatch.setattr(sampling, "fewer_key_heads", lambda config, batch_images, device: quarter)
    arguments = ["--config", str(SMALL_JOB), *tiny_settings(*changes), "--batch-images", "2", "--waves-size", "8"]
    assert sampling.main([*arguments, "--json", str(tmp_path / "sampling.json")]) == 0
    numbers = json.loads((tmp_path / "sampling.json").read_text())
    for key in ("sampling_vs_recompute", "sampling_vs_full_cache", "sampling_vs_bandwidth_limit"):
        assert 0 < numbers[key] < math.inf
    assert numbers["sampling_waves_fewer_steps"] > 1.3
    first, *_, last = (statistics.median(turns) for turns in numbers["details"]["turns"])
    assert numbers["time_per_token_last_over_first"] == pytest.approx(last / first)
    assert "sampling of small_job on a CPU" in (tmp_path / "RESULTS.md").read_text()
    text = capsys.readouterr().out
    assert "limit of memory" in text and "(model.key_heads) is 2.50 times as fast" in text


@pytest.mark.parametrize("sampler", [sampling.ours, sampling.recompute, sampling.full_cache])
def test_a_sampler_that_computes_something_else_is_not_timed(sampler, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    with torch.no_grad():
        task = sampling.Task(tiny_config().build().eval(), 1)
        block = task.model.patterns[0][0].blocks[2]
        assert sampler(task, block)
        task.hidden = task.hidden + 0.01
        with pytest.raises(sampling.WrongLogits, match="logits differ by .* not timed"):
            sampler(task, block)


def test_the_limit_counts_weights_once_and_what_each_image_sees() -> None:
    model = tiny_config().build()
    one, three = (sampling.bytes_a_step(model, number) for number in (1, 3))
    seen = model.patterns[0][0].mask().sum().item() / model.patterns[0][0].length
    assert (three - one) / 2 == pytest.approx(2 * 2 * seen * 16 * 4)  # layers, keys and values, width, bytes
    embeddings = sum(p.numel() for n, p in model.named_parameters() if n.startswith("embed"))
    weights = sum(p.numel() for p in model.parameters()) - embeddings
    assert one - (three - one) / 2 == pytest.approx(4 * weights)
    assert decode_plan(model.patterns[0][0], "generation").num_keys == 16


def test_positions_take_turns_so_that_a_busy_machine_meets_them_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 s for a token, 9 while the machine is busy: for a third of the time, a token at the last position 2 s."""
    torch.manual_seed(0)
    model = tiny_config().build().eval()
    with torch.no_grad():
        task = sampling.Task(model, 1)
    blocks = [model.patterns[0][0].blocks[index] for index in (0, 2, 4)]
    order: list[int] = []

    def steps(task: sampling.Task, block: QueryBlock) -> Iterator[Step]:
        for _ in range(100):
            order.append(block.start)
            yield Step(0, 0, torch.empty(0))

    def turn(at_block: Iterator[Step], count: int) -> float:
        next(at_block)
        return (2.0 if order[-1] == blocks[-1].start else 1.0) * (9 if len(order) <= 15 else 1)

    for name, fake in {"ours": steps, "turn": turn, "copy_rate": lambda device: 1e9}.items():
        monkeypatch.setattr(sampling, name, fake)
    measured = sampling.measure(task, blocks)
    assert order == [block.start for block in blocks] * (len(order) // 3)
    assert measured.medians == [1.0, 1.0, 2.0]


def test_a_quarter_of_the_heads_of_keys_leaves_a_quarter_of_the_cache_to_read() -> None:
    """Images and keys so many that the weights hardly count."""
    config = tiny_config(**MODERN, heads=4, attention=Local1D(query_block=24, memory=24))
    with torch.no_grad():
        ratios = sampling.fewer_key_heads(config, 256, torch.device("cpu"))
    assert ratios["key_heads_speedup"] > 0
    assert 3.5 < ratios["key_heads_fewer_bytes"] < 4


def test_looking_ahead_is_measured_where_it_draws_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny_config().build().eval()
    assert "times fewer steps" in sampling.looking_ahead(model, "untrained")
    seeds = iter(range(100))
    original = sampling.Decoding
    monkeypatch.setattr(sampling, "Decoding", lambda *a, **k: original(*a, **k | {"seed": next(seeds)}))
    with pytest.raises(sampling.WrongLogits, match="looking ahead: not the image"):
        sampling.looking_ahead(model, "untrained")
