"""An attempt of a training run has ended: is the run done, does it start again, or is that hopeless?

Launchers lose exit codes and signals: `deepspeed` returns 0 when the kernel killed its helper, and 1 when a rank ended
well after SIGTERM. What decides is `run_state.json`, which rank 0 writes into the run's folder when it begins and ends.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FINISHED, USAGE, CORRUPT, UNAVAILABLE, BUG = 0, 2, 65, 69, 70
STOPPED, DIVERGED, REFUSED, SUPERSEDED = 75, 76, 77, 80
HOPELESS = {USAGE, CORRUPT, DIVERGED, REFUSED, SUPERSEDED}
"""Exit codes of the trainer that end a run: starting it again would end in the same way."""

State = dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """What happens next, the exit code if that is the end, and why."""

    next: Literal["done", "again", "end"]
    code: int
    reason: str


def read_state(run_dir: Path) -> State:
    """`run_state.json` of a run; empty before its first attempt, or when it cannot be read."""
    try:
        state = json.loads((run_dir / "run_state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def furthest_step(run_dir: Path) -> int:
    """The highest step that any attempt has recorded."""
    furthest = None
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            for line in file:
                # The last attempt may have gone back, and may not have come so far again.
                if (step := _step_of(line)) is not None:
                    furthest = max(step, furthest or 0)
    except OSError:
        pass
    return int(read_state(run_dir).get("step", 0)) if furthest is None else furthest


def _step_of(line: bytes) -> int | None:
    """The step of a point; None for half a line, and for one of the machine, which counts minutes."""
    try:
        point = json.loads(line)
        if point["metrics"] and all(name.startswith("system/") for name in point["metrics"]):
            return None
        return int(point["step"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def decide(before: State, after: State, code: int, *, leaving: bool) -> Decision:
    """What `run_state.json` before and after an attempt, and its exit code, say about the next one.

    `leaving`: Slurm wanted the machines back, so no user asked for the stop.
    """
    said_how_it_ended = after.get("ended") is not None and after.get("ended") != before.get("ended")
    if said_how_it_ended:
        state, code = after.get("state"), int(after.get("code", BUG))
        reason = str(after.get("reason", "no reason given")) + (f" (step {after['step']})" if "step" in after else "")
        if state == "finished":
            return Decision("done", FINISHED, reason)
        if state == "stopped":
            return Decision("again" if leaving else "end", STOPPED, reason)
        return Decision("end" if code in HOPELESS else "again", code or BUG, reason)
    if leaving:
        return Decision("again", STOPPED, "the machines were taken away before the ranks could stop by themselves")
    began = after.get("started") != before.get("started")
    if code in HOPELESS and not began:
        return Decision("end", code, "the ranks ended before training began; their logs say why")
    return Decision("again", code or BUG, "the ranks ended without saying why" if began else "training did not begin")


class Attempts:
    """The list of all attempts of a run, `attempts.jsonl` in its folder: who began when, at which step, and the end."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "attempts.jsonl"

    def began(self, name: str) -> None:
        self._append(attempt=name, began=time.time(), step=furthest_step(self.run_dir))

    def ended(self, name: str, decision: Decision, *, leaving: bool) -> None:
        self._append(
            attempt=name,
            ended=time.time(),
            next=decision.next,
            code=decision.code,
            reason=decision.reason,
            leaving=leaving,
            step=furthest_step(self.run_dir),
        )

    def without_progress(self) -> int:
        """How many attempts in a row, up to now, brought the run no step further.

        An attempt that had to leave its machines early does not count: it had no time.
        """
        lines = self._read()
        left = {line["attempt"] for line in lines if line.get("leaving")}
        begins = [line["step"] for line in lines if "began" in line and line["attempt"] not in left]
        step, count = furthest_step(self.run_dir), 0
        while begins and begins.pop() == step:
            count += 1
        return count

    def _read(self) -> list[State]:
        lines = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue  # half a line of a machine that died
        return lines

    def _append(self, **entry: object) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
