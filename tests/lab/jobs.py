"""Which run do the tests of whole clusters train, and how do they read what it left?"""

import json
from pathlib import Path
from typing import Any

from tests.support.launch import settings

STEPS = 80
IMAGES = {"train": 1500, "validation": 200}
CHANGES: dict[str, object] = {
    "train__steps": STEPS,
    "train__global_batch_images": 32,
    "train__micro_batch_images": 2,
    "train__zero_stage": 2,
    "evaluate__every_steps": 100_000,
    "checkpoint__every_steps": 10,
}


def arguments(run_dir: Path, data: str, **changes: object) -> list[str]:
    """`--set` options of the run on shards below an URL."""
    urls = {"data__train_url": f"{data}/train", "data__validation_url": f"{data}/validation"}
    return settings(run_dir, Path("unused"), **(CHANGES | urls | changes))


def state_of(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run_state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def last_step(run_dir: Path) -> int:
    """The last step that was recorded; -1 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue  # being written
    return -1


def same_curves(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> None:
    """Every step once, with the same loss up to the order in which ranks add."""
    assert [step for step, _ in one] == [step for step, _ in other]
    worst = max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))
    assert worst < 1e-4, worst
