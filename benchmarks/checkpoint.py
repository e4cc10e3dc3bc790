"""How much of the training time do checkpoints take?

    python benchmarks/checkpoint.py --json checkpoint.json

Runs the main job of the quickstart with its checkpoints and without any, in turns, as processes of their own, from the
first to the last point of the training curve: without starting, and without the checkpoint at the end. Two figures:

- for how long the loop stood still: the time outside of steps in the intervals between two points in which a checkpoint
  was made, beyond that of the other intervals of the same run;
- what checkpoints cost in all, with the processor time of the threads that write meanwhile: the difference between the
  two kinds of run. On a machine that others use, that is smaller than what they change from run to run.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import table, write_json, write_section

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/quickstart.yaml"
NEVER = 1_000_000_000
WARM_UP_STEPS = 10


@dataclass(frozen=True)
class Loop:
    """The time of one run's loop."""

    seconds: float
    """From the first to the last point."""
    stall_seconds: float
    """Of it, outside of steps because of checkpoints: in `perf/step_ms` they do not count."""
    steps: int


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the job (2)")
    parser.add_argument("--steps", type=int, default=210, help="steps of each run (210: two checkpoints)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turns (3)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        settings = common_settings(work, options)
        run_job(settings | {"run.dir": work / "warm-up", "train.steps": WARM_UP_STEPS}, options.ranks)
        loops: dict[str, list[Loop]] = {"with checkpoints": [], "without": []}
        for repeat in range(options.repeats):
            for kind in list(loops)[:: -1 if repeat % 2 else 1]:
                folder = work / f"{kind}-{repeat}".replace(" ", "-")
                none = {"checkpoint.every_steps": NEVER} if kind == "without" else {}
                run_job(settings | {"run.dir": folder} | none, options.ranks)
                loops[kind].append(loop_of(folder, NEVER if none else checkpoints_of(folder)[0]))
                print(kind, loops[kind][-1], file=sys.stderr, flush=True)
        every, mebibytes = checkpoints_of(work / "with-checkpoints-0")
    report(loops, options, every, mebibytes)
    return 0


def common_settings(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """What both kinds of run share: a small data set, packed unless `--set` names one, and no evaluations between."""
    given = dict(override.split("=", 1) for override in options.overrides)
    for split, images in (("train", 3000), ("validation", 64)):
        if f"data.{split}_url" not in given:
            command = [sys.executable, "-m", "data_pipeline.pack", "--source", "photographs", "--split", split]
            command += ["--dest", str(work / split), "--size", "32", "--images", str(images), "--workers", "1"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {
        "data.train_url": work / "train",
        "data.validation_url": work / "validation",
        "train.steps": options.steps,
        "evaluate.every_steps": NEVER,
        "evaluate.images": 8,
        "checkpoint.every_steps": 100,
        "tracking.uri": f"sqlite:///{work}/mlflow.db",
        **given,
    }


def run_job(settings: dict[str, object], ranks: int) -> None:
    """The main job with these options, in so many processes of this machine; raises CalledProcessError."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", str(ranks)]
    command = [*launcher, "--master_port", str(port), "trainer/run.py", "--config", str(CONFIG)]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def loop_of(run_dir: Path, every_steps: int) -> Loop:
    """The times of a run's loop with a checkpoint after every so many steps, from the run's own record."""
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    points = [point for point in points if "perf/step_ms" in point["metrics"]]
    with_one, without = [], []
    for before, after in zip(points, points[1:], strict=False):
        in_steps = (after["step"] - before["step"]) * after["metrics"]["perf/step_ms"] / 1000
        # A step's point is recorded before its checkpoint is made.
        made = (after["step"] - 1) // every_steps > (before["step"] - 1) // every_steps
        (with_one if made else without).append(after["time"] - before["time"] - in_steps)
    stall = sum(with_one) - len(with_one) * statistics.median(without)
    return Loop(points[-1]["time"] - points[0]["time"], stall, points[-1]["step"] - points[0]["step"])


def checkpoints_of(run_dir: Path) -> tuple[int, float]:
    """Steps between two checkpoints of a run, and the MiB of one."""
    manifests = [json.loads(path.read_text()) for path in sorted(run_dir.glob("checkpoints/*/manifest.json"))]
    size = sum(file["bytes"] for file in manifests[-1]["files"])
    return int(manifests[-1]["config"]["checkpoint"]["every_steps"]), size / 2**20


def report(loops: dict[str, list[Loop]], options: argparse.Namespace, every: int, mebibytes: float) -> None:
    """Medians, and the shares of the loop's time."""
    median = {kind: statistics.median(loop.seconds for loop in done) for kind, done in loops.items()}
    metrics = {
        "checkpoint_stall_share": statistics.median(
            loop.stall_seconds / loop.seconds for loop in loops["with checkpoints"]
        ),
        "checkpoint_time_share": 1 - median["without"] / median["with checkpoints"],
    }
    rows = []
    for kind, done in loops.items():
        seconds = sorted(loop.seconds for loop in done)
        stall = statistics.median(loop.stall_seconds for loop in done)
        rows.append([kind, f"{median[kind]:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})", f"{stall:.3f}"])
    steps = loops["without"][0].steps
    text = (
        f"quickstart with {options.ranks} ranks, a checkpoint of {mebibytes:.1f} MiB every {every} steps; the time of "
        f"{steps} steps, medians of {options.repeats} runs in turns (least to most).\n\n"
    )
    text += table(["", "seconds", "seconds that the loop stood still for checkpoints"], rows)
    stall, difference = metrics["checkpoint_stall_share"], metrics["checkpoint_time_share"]
    text += (
        f"\n\nThe loop stands still for checkpoints {stall:.2%} of its time. The difference of the two kinds of run is "
        f"{difference:.1%}; between least and most of one kind lie {max(_spread(done) for done in loops.values()):.0%}."
    )
    print(text)
    write_section("checkpoints", "python benchmarks/checkpoint.py", text)
    if options.json:
        details = {kind: [vars(loop) for loop in done] for kind, done in loops.items()}
        write_json(options.json, metrics, {"loops": details, "every_steps": every, "mebibytes": mebibytes})


def _spread(done: list[Loop]) -> float:
    seconds = [loop.seconds for loop in done]
    return max(seconds) / min(seconds) - 1


if __name__ == "__main__":
    sys.exit(main())
