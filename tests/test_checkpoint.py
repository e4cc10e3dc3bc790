"""Is a checkpoint offered only when it is complete and right, and is the last good one safe?"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.image_transformer import ImageTransformer
from tests.launch import QUICKSTART, ROOT, TINY_MODEL
from trainer.checkpoint import CheckpointError, Checkpoints, intact_of_run, list_complete, read_weights
from trainer.config import RunConfig, load_config
from trainer.engine import TorchEngine
from trainer.ranks import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
CPU = torch.device("cpu")


@pytest.fixture
def config() -> RunConfig:
    return load_config(QUICKSTART, [f"{name}={value}" for name, value in TINY_MODEL.items()])


@pytest.fixture
def engine(config: RunConfig) -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(ImageTransformer(config.model), config)


def checkpoints_in(folder: Path, keep_last: int = 2) -> Checkpoints:
    return Checkpoints(str(folder / "checkpoints"), ALONE, CPU, keep_last)


def save(checkpoints: Checkpoints, engine: TorchEngine, config: RunConfig, step: int) -> None:
    checkpoints.save(engine, step=step, samples=8 * step, config=dataclasses.asdict(config), data_digest="d")


def silent(text: str) -> None:
    pass


def test_what_was_saved_is_what_is_read(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 3)
    fs, (checkpoint,) = intact_of_run(str(tmp_path), 1)
    assert (checkpoint.step, checkpoint.samples, checkpoint.data_digest) == (3, 24, "d")
    assert checkpoint.config["model"]["layers"] == config.model.layers
    weights = read_weights(fs, [checkpoint], "raw")
    expected = engine._model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_only_the_last_ones_are_kept(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    checkpoints = checkpoints_in(tmp_path, keep_last=2)
    for step in (1, 2, 10, 3000):
        save(checkpoints, engine, config, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000000010", "step-000003000"]


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "missing file", "short file", "flipped bit"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, damage: str
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, engine, config, 1)
    save(checkpoints, engine, config, 2)
    folder = tmp_path / "checkpoints/step-000000002"
    manifest, data = folder / "manifest.json", folder / "rank-00000-of-00001.safetensors"
    match damage:
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:100])
        case "missing file":
            data.unlink()
        case "short file":
            data.write_bytes(data.read_bytes()[:-1])
        case "flipped bit":
            content = bytearray(data.read_bytes())
            content[-100] ^= 1
            data.write_bytes(content)
    said: list[str] = []
    newest = checkpoints.newest(said.append)
    assert newest is not None and newest.step == 1
    assert intact_of_run(str(tmp_path), 1)[1][0].step == 1
    assert ("step-000000002 is damaged" in "".join(said)) == (damage not in ("no manifest", "half a manifest"))


def test_a_run_without_checkpoints_is_told_so(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path).newest(silent) is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        intact_of_run(str(tmp_path), 1)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    path = tmp_path / "checkpoints/step-000000001/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7}))
    with pytest.raises(CheckpointError, match="checkpoint format 7; this version reads 1"):
        intact_of_run(str(tmp_path), 1)


def test_the_mean_of_the_last_checkpoints_is_that_of_their_weights(
    tmp_path: Path, engine: TorchEngine, config: RunConfig
) -> None:
    checkpoints = checkpoints_in(tmp_path, keep_last=5)
    name, parameter = next(iter(engine._model.named_parameters()))
    for step, value in ((1, 9.0), (2, 1.0), (3, 3.0)):
        with torch.no_grad():
            parameter.fill_(value)
        save(checkpoints, engine, config, step)
    for count, mean in ((1, 3.0), (2, 2.0), (5, 13 / 3)):
        weights = read_weights(*intact_of_run(str(tmp_path), count), "avg")
        torch.testing.assert_close(weights[name], torch.full_like(parameter, mean).detach())


def test_an_average_that_was_not_kept_is_refused(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    with pytest.raises(CheckpointError, match=r"optimizer.ema_decay was 0"):
        read_weights(*intact_of_run(str(tmp_path), 1), "ema")


def test_killed_at_any_moment_there_is_always_a_complete_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but save is killed twenty times at random moments of it."""
    program = (
        "import itertools, dataclasses, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.test_checkpoint import ALONE, CPU, QUICKSTART, TINY_MODEL, checkpoints_in, save\n"
        "from models.image_transformer import ImageTransformer\n"
        "from trainer.config import load_config\nfrom trainer.engine import TorchEngine\n"
        "config = load_config(QUICKSTART, [f'{n}={v}' for n, v in TINY_MODEL.items()])\n"
        "engine = TorchEngine(ImageTransformer(config.model), config)\n"
        "for step in itertools.count(1):\n"
        "    save(checkpoints_in(Path(sys.argv[1])), engine, config, step)\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    for wait in range(20):
        time.sleep(0.003 * wait)
        process.send_signal(signal.SIGSTOP)  # as if killed here: what is on the disk now is what a restart finds
        fs, (checkpoint,) = intact_of_run(str(tmp_path), 1)
        assert read_weights(fs, [checkpoint], "raw")
        assert len(list_complete(fs, f"{tmp_path}/checkpoints")) >= 1
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    os.sync()
    assert intact_of_run(str(tmp_path), 1)[1][0].step >= 1
