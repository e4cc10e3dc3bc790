"""What do runs leave behind that others can be compared with, without training them?"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tests.support.launch import SMALL_JOB, TINY_MODEL, mlflow_store
from trainer.comparison.scaling_law import Law
from trainer.config import as_yaml, load_config
from trainer.record.run_folder import RunFiles
from trainer.record.tool_results import record_results
from trainer.record.tracker import Tracker


def shards(version: str, size: int = 32, digest: str = "ab") -> SimpleNamespace:
    """Validation images as a run describes them: of a version of ImageNet, or of another data set."""
    protocol = {"name": version} | ({"imagenet_version": version} if version in ("A", "B", "C") else {})
    form = "imagenet" if version in ("A", "B", "C") else version
    manifest = SimpleNamespace(
        name=f"{form}-{size}", count=50000, image_size=size, source={"form": form}, protocol=protocol
    )
    return SimpleNamespace(url="/data", digest=digest * 32, manifest=manifest)


def make_run(folder: Path, name: str, best: float, *overrides: str, data: SimpleNamespace | None = None) -> Path:
    """A run of 40 steps as the trainer records one; `best` is its lowest validation bits/dim, at step 30."""
    (folder / name).mkdir()
    settings = [f"run.dir={folder / name}", f"run.name={name}", f"tracking.uri={mlflow_store(folder)}", *overrides]
    data = data or shards("A")
    tracker = Tracker(
        load_config(SMALL_JOB, settings),
        world_size=4,
        step=0,
        datasets={"training": shards("A", digest="cd"), "validation": data},
    )
    for step in range(1, 41):
        metrics = {"train/bits_per_dim": best + 4 / step, "perf/images_per_s": 100.0 + step, "perf/mfu": 0.4}
        tracker.log(step, metrics | {"progress/images_seen": 8.0 * step})
    for step, value in ((10, best + 1), (30, best), (40, best + 0.1)):
        tracker.log(step, {"val/bits_per_dim": value, "val/bits_per_dim_stderr": 0.01, "val/images": 50000.0})
        tracker.log_image(step, "samples", Image.new("RGB", (8, 8), (step, 100, 200)))
    tracker.close("finished", code=0, reason="", step=40)
    record_results(
        RunFiles(folder / name), 40, {"final/ema_bits_per_dim": best - 0.1, "final/ema_bits_per_dim_stderr": 0.02}, []
    )
    return folder / name


LAW = Law(3.0, 0.5, 0.5, 0.35, 0.3, (1e4, 1e6))
"""Of the runs of `make_scaling_runs`."""


def make_scaling_runs(folder: Path, *, noise: float = 0.0) -> list[Path]:
    """Runs of 4 sizes and 3 budgets that nobody trained: their configs, and the bits/dim that LAW gives them."""
    random, folders = np.random.default_rng(0), []
    for width in (8, 16, 32, 64):
        for flops in (1e10, 1e11, 1e12):
            shape = TINY_MODEL | {"model.width": width, "model.attention_width": width, "model.ff_width": 2 * width}
            settings = [*(f"{name}={value}" for name, value in shape.items()), "train.global_batch_images=8"]
            settings += ["train.micro_batch_images=1"]
            account = load_config(SMALL_JOB, settings).model.account()
            steps = round(flops / account.flops.training / 8)
            name = f"w{width}-{flops:.0e}"
            config = load_config(SMALL_JOB, [*settings, f"train.steps={steps}", f"run.name={name}"])
            bits = float(LAW.bits_per_dim(account.parameters, 8 * steps * account.positions))
            point = {"val/bits_per_dim": bits * float(np.exp(noise * random.standard_normal())), "val/images": 64.0}
            (folder / name).mkdir(parents=True)
            RunFiles(folder / name).config.write_text(as_yaml(config))
            lines = [{"step": 0, "time": 1e9, "metrics": {}}, {"step": steps, "time": 2e9, "metrics": point}]
            RunFiles(folder / name).metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            folders.append(folder / name)
    return folders
