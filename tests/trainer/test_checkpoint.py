"""Is a checkpoint offered only when it is complete and right, and is the last good one safe?"""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.storage import Store
from tests.support.launch import ROOT, SMALL_JOB, TINY_MODEL
from tests.support.s3_server import S3Server
from trainer import checkpoint, export
from trainer.checkpoint import Checkpoint, Checkpoints, digest_of, list_complete, read_weights, to_keep
from trainer.config import CheckpointConfig, RunConfig, as_yaml, load_config
from trainer.engine import TorchEngine
from trainer.errors import CheckpointError, UsageError
from trainer.exported_model import load_exported
from trainer.ranks import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
CPU = torch.device("cpu")


@pytest.fixture
def config() -> RunConfig:
    return load_config(SMALL_JOB, [f"{name}={value}" for name, value in TINY_MODEL.items()])


@pytest.fixture
def engine(config: RunConfig) -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(config.model.build(), config)


SETTINGS = CheckpointConfig(url=None, every_steps=1, keep_last=2, keep_best=0, keep_every_steps=0, background=False)


def url_in(folder: Path) -> str:
    return str(folder / "checkpoints")


def checkpoints_in(folder: Path | str, attempt: int = 1, **changes: object) -> Checkpoints:
    url = folder if isinstance(folder, str) else url_in(folder)
    return Checkpoints(url, ALONE, CPU, dataclasses.replace(SETTINGS, **changes), attempt)


def begin(checkpoints: Checkpoints, engine: TorchEngine, config: RunConfig, step: int) -> None:
    checkpoints.save(
        engine,
        step=step,
        updates=step - 1,
        samples=8 * step,
        bits_per_dim=None,
        config=dataclasses.asdict(config),
        data_digest="d",
    )


def save(checkpoints: Checkpoints, engine: TorchEngine, config: RunConfig, step: int) -> Checkpoint | None:
    begin(checkpoints, engine, config, step)
    return checkpoints.complete()


def saved(step: int, bits_per_dim: float | None = None) -> Checkpoint:
    return Checkpoint(step, step, step, bits_per_dim, {}, "d", [])


def write_manifest(path: Path, **changes: object) -> None:
    """Change a manifest, and its digest with it."""
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))


def silent(text: str) -> None:
    pass


def test_a_link_among_old_checkpoints_stays_and_the_others_go(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has moved one to another disk: what the link leads to is not deleted."""
    checkpoints, folder = checkpoints_in(tmp_path), tmp_path / "checkpoints"
    for step in (1, 2):
        assert save(checkpoints, engine, config, step)
    (folder / "step-000000001").rename(tmp_path / "moved")
    (folder / "step-000000001").symlink_to(tmp_path / "moved")
    for step in (3, 4):
        assert save(checkpoints, engine, config, step)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-00000000{step}" for step in (1, 3, 4)]
    assert (tmp_path / "moved/manifest.json").exists() and "a link leads out of" in caplog.text


def test_what_was_saved_is_what_is_read(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 3)
    saved = read_weights(url_in(tmp_path), "raw")
    (checkpoint,) = saved.checkpoints
    assert (checkpoint.step, checkpoint.updates, checkpoint.samples, checkpoint.data_digest) == (3, 2, 24, "d")
    assert checkpoint.config["model"]["layers"] == config.model.layers
    weights = saved.state
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
    manifest, data = folder / "manifest.json", folder / "rank-00000-of-00001.attempt-1.safetensors"
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
    assert newest is not None and newest.checkpoint.step == 1
    assert read_weights(url_in(tmp_path), "raw").checkpoints[0].step == 1
    assert ("step-000000002 is damaged" in "".join(said)) == (damage not in ("no manifest", "half a manifest"))


def test_the_best_and_the_permanent_ones_are_kept_besides() -> None:
    complete = [saved(10, 3.0), saved(20, 5.0), saved(30, 4.0), saved(40), saved(50, float("nan")), saved(60, 6.0)]
    settings = dataclasses.replace(SETTINGS, keep_last=1, keep_best=2, keep_every_steps=20)
    assert [checkpoint.step for checkpoint in to_keep(complete, settings)] == [10, 20, 30, 40, 60]
    settings = dataclasses.replace(SETTINGS, keep_last=3)
    assert [checkpoint.step for checkpoint in to_keep(complete, settings)] == [40, 50, 60]


def test_written_in_the_background_it_holds_the_weights_of_the_moment_of_saving(
    tmp_path: Path, engine: TorchEngine, config: RunConfig
) -> None:
    checkpoints = checkpoints_in(tmp_path, background=True)
    expected = {name: weight.clone() for name, weight in engine._model.state_dict().items()}
    begin(checkpoints, engine, config, 1)
    with torch.no_grad():
        for parameter in engine._model.parameters():
            parameter.fill_(7.0)
    assert list_complete(Store(url_in(tmp_path), 1.0)) == []  # nothing is offered before all ranks agree
    complete = checkpoints.complete()
    assert complete is not None and complete.step == 1 and checkpoints.is_written()
    weights = read_weights(url_in(tmp_path), "raw").state
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_attempts_at_one_step_leave_a_complete_checkpoint_whichever_is_last(
    tmp_path: Path, engine: TorchEngine, config: RunConfig
) -> None:
    old, new = checkpoints_in(tmp_path, attempt=1), checkpoints_in(tmp_path, attempt=2)
    begin(old, engine, config, 5)
    save(new, engine, config, 5)
    assert read_weights(url_in(tmp_path), "raw").checkpoints[0].files[0]["name"].endswith("attempt-2.safetensors")
    old.complete()
    assert read_weights(url_in(tmp_path), "raw").checkpoints[0].files[0]["name"].endswith("attempt-1.safetensors")


def test_what_killed_attempts_left_is_cleared_away(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    begin(checkpoints_in(tmp_path), engine, config, 4)  # killed before its manifest
    save(checkpoints_in(tmp_path, attempt=2), engine, config, 5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_checkpoints_and_keeps_the_last_good_one(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this machine forbids mounting")
    try:
        checkpoints = checkpoints_in(small)
        assert save(checkpoints, engine, config, 1) is not None
        (small / "filler").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_bsize))
        for step in (2, 3):
            assert save(checkpoints, engine, config, step) is None
        assert "step-000000002 was not written" in caplog.text and "disk is full" in caplog.text
        with pytest.raises(CheckpointError, match="3 checkpoints in a row have failed"):
            save(checkpoints, engine, config, 4)
        assert read_weights(url_in(small), "raw").checkpoints[0].step == 1
        (small / "filler").unlink()
        assert save(checkpoints, engine, config, 5) is not None
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_disk_that_fails_costs_a_checkpoint_and_keeps_the_last_good_one(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(checkpoint, "STORE_DEADLINE_SECONDS", 0.1)
    checkpoints = checkpoints_in(tmp_path)
    assert save(checkpoints, engine, config, 1) is not None
    for step, code in ((2, errno.EIO), (3, errno.ESTALE)):

        def failing(descriptor: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            assert save(checkpoints, engine, config, step) is None
        assert f"step-{step:09d} was not written" in caplog.text and os.strerror(code) in caplog.text
        assert read_weights(url_in(tmp_path), "raw").checkpoints[0].step == 1
    assert save(checkpoints, engine, config, 4) is not None
    left = sorted(path.name for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert left == 2 * ["manifest.json"] + 2 * ["rank-00000-of-00001.attempt-1.safetensors"]


@pytest.mark.parametrize("where", ["rank-", "manifest"])
def test_a_disk_that_flips_a_bit_now_and_then_costs_a_second_write(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    flips = bits_flip(monkeypatch, where, [True, False])
    checkpoints = checkpoints_in(tmp_path)
    assert save(checkpoints, engine, config, 1) is not None
    assert next(flips, None) is None
    newest = checkpoints.newest(silent)
    assert newest is not None and newest.checkpoint.step == 1


@pytest.mark.parametrize("where", ["rank-", "manifest"])
def test_a_disk_that_flips_bits_costs_checkpoints_and_keeps_the_last_good_ones(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, monkeypatch: pytest.MonkeyPatch, where: str, caplog: Any
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    for step in (1, 2):
        assert save(checkpoints, engine, config, step) is not None
    bits_flip(monkeypatch, where, itertools.repeat(True))
    for step in (3, 4):
        assert save(checkpoints, engine, config, step) is None
        assert f"step-{step:09d} was not written" in caplog.text and "read back differently" in caplog.text
    with pytest.raises(CheckpointError, match="3 checkpoints in a row have failed"):
        save(checkpoints, engine, config, 5)
    weights = read_weights(url_in(tmp_path), "avg", 2)
    assert [checkpoint.step for checkpoint in weights.checkpoints] == [2, 1]


def bits_flip(monkeypatch: pytest.MonkeyPatch, where: str, when: Iterable[bool]) -> Iterator[bool]:
    """Flip one bit of files whose name begins with `where` when they are put in their place, as `when` says."""
    replace, flips = os.replace, iter(when)

    def flip_and_replace(source: str, place: str) -> None:
        if Path(place).name.startswith(where) and next(flips):
            content = bytearray(Path(source).read_bytes())
            content[len(content) // 2] ^= 1
            Path(source).write_bytes(content)
        replace(source, place)

    monkeypatch.setattr(os, "replace", flip_and_replace)
    return flips


def test_damaged_checkpoints_that_are_newer_do_not_push_good_ones_out(
    tmp_path: Path, engine: TorchEngine, config: RunConfig
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    for step in (1, 2, 8, 9):
        save(checkpoints_in(tmp_path, keep_last=4), engine, config, step)
    for path in (tmp_path / "checkpoints").glob("step-00000000[89]/*.safetensors"):
        path.write_bytes(b"")
    assert save(checkpoints, engine, config, 3) is not None  # the run went on from step 2
    assert [checkpoint.step for checkpoint in read_weights(url_in(tmp_path), "avg", 9).checkpoints] == [3, 2]


def test_a_flipped_bit_anywhere_in_a_manifest_sends_the_run_to_the_older_checkpoint(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(checkpoints_in(tmp_path), engine, config, step)
    path = tmp_path / "checkpoints/step-000000002/manifest.json"
    content, chance = path.read_bytes(), random.Random(0)
    version = content.index(b'"format_version": ') + len(b'"format_version": ')
    places = [(version, bit) for bit in range(8)]
    places += [(chance.randrange(len(content)), chance.randrange(8)) for _ in range(200)]
    for place, bit in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        caplog.clear()
        assert [found.step for found in list_complete(Store(url_in(tmp_path), 1.0))] == [1], (place, bit)
        assert caplog.messages == [f"{path.parent} has a damaged manifest and is passed over"]
    path.write_bytes(content)
    assert [found.step for found in list_complete(Store(url_in(tmp_path), 1.0))] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": None},
        {"files": ["rank-00000-of-00001.attempt-1.safetensors"]},
        {"samples": -8},
        {"samples": 16.0},
        {"samples": "16"},
        {"updates": True},
        {"updates": 3},
        {"bits_per_dim": "3.0"},
        {"config": []},
        {"data_digest": None},
        {"format_version": "3"},
        {"more": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_manifest_that_says_something_odd_is_damaged(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, changes: dict[str, object], sealed: bool
) -> None:
    """With a digest of what it says, and as in the format that had none."""
    for step in (1, 2):
        save(checkpoints_in(tmp_path), engine, config, step)
    path = tmp_path / "checkpoints/step-000000002/manifest.json"
    if sealed:
        write_manifest(path, **changes)
    else:
        manifest = json.loads(path.read_text()) | {"format_version": 2} | changes
        del manifest["digest"]
        path.write_text(json.dumps(manifest))
    assert [found.step for found in list_complete(Store(url_in(tmp_path), 1.0))] == [1]


def test_a_manifest_of_the_format_without_a_digest_is_read_if_it_names_the_files_of_all_ranks(
    tmp_path: Path, engine: TorchEngine, config: RunConfig
) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    folder = tmp_path / "checkpoints/step-000000001"
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 2}
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert [found.step for found in list_complete(Store(url_in(tmp_path), 1.0))] == [1]
    manifest["files"][0]["name"] = "rank-00000-of-00002.attempt-1.safetensors"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert list_complete(Store(url_in(tmp_path), 1.0)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_a_disk_that_becomes_read_only_costs_a_checkpoint(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(checkpoint, "STORE_DEADLINE_SECONDS", 0.1)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], check=False).returncode:
        pytest.skip("this machine forbids mounting")
    try:
        checkpoints = checkpoints_in(disk)
        assert save(checkpoints, engine, config, 1) is not None
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert save(checkpoints, engine, config, 2) is None
        assert "Read-only file system" in caplog.text
        assert read_weights(url_in(disk), "raw").checkpoints[0].step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_that_is_due_while_another_is_written_waits_for_it(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = []
    write = Store.write_pieces

    def slowly(self: Store, name: str, pieces: Any) -> int:
        writing.append(name)
        time.sleep(0.2)
        assert writing[-1] == name, "two writers"
        return write(self, name, pieces)

    monkeypatch.setattr(Store, "write_pieces", slowly)
    checkpoints = checkpoints_in(tmp_path, background=True, keep_last=3)
    for step in (1, 2, 3):
        begin(checkpoints, engine, config, step)
        assert not checkpoints.is_written()
    checkpoints.complete()
    assert [found.step for found in list_complete(Store(url_in(tmp_path), 1.0))] == [1, 2, 3]


def test_a_checkpoint_on_s3_that_is_incomplete_is_passed_over(
    engine: TorchEngine, config: RunConfig, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_server.make_bucket()}/checkpoints"
    checkpoints, said = checkpoints_in(url, keep_last=3), []
    for step in (1, 2, 3):
        assert save(checkpoints, engine, config, step) is not None
    store = Store(url, 10.0)
    store.remove("step-000000003/manifest.json")
    store.remove("step-000000002/rank-00000-of-00001.attempt-1.safetensors")
    newest = checkpoints.newest(said.append)
    assert newest is not None and newest.checkpoint.step == 1
    assert said == ["checkpoint step-000000002 is damaged (1 of 1 files); trying an older one"]


def test_checkpoints_on_s3(
    engine: TorchEngine, config: RunConfig, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_server.make_bucket()}/run/checkpoints"
    checkpoints = checkpoints_in(url, background=True, keep_last=1)
    for step in (1, 2):
        assert save(checkpoints, engine, config, step) is not None
    saved = read_weights(url, "avg", last=2)
    assert [checkpoint.step for checkpoint in saved.checkpoints] == [2] and saved.state
    with pytest.raises(UsageError, match="s3://not-there/checkpoints: holds no complete checkpoint"):
        read_weights("s3://not-there/checkpoints", "raw")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    path = tmp_path / "checkpoints/step-000000001/manifest.json"
    (entry,) = json.loads(path.read_text())["files"]
    write_manifest(path, files=[entry | {"name": "../../secret.safetensors"}])
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        read_weights(url_in(tmp_path), "raw")


def test_a_tampered_file_with_a_matching_manifest_is_refused_without_running_it(
    tmp_path: Path, engine: TorchEngine, config: RunConfig
) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    folder = tmp_path / "checkpoints/step-000000001"
    executed = tmp_path / "executed"
    overlapping = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a|weight": overlapping, "b|weight": overlapping | {"data_offsets": [4, 12]}}).encode()
    tampered = [pickle.dumps(Payload(executed)), (2**62).to_bytes(8, "little") + b"{}", b""]
    tampered.append(len(header).to_bytes(8, "little") + header + bytes(12))
    for content in tampered:
        entry = json.loads((folder / "manifest.json").read_text())["files"][0]
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / entry["name"]).write_bytes(content)
        write_manifest(folder / "manifest.json", files=[entry])
        with pytest.raises(CheckpointError, match="attempt-1.safetensors"):
            read_weights(url_in(tmp_path), "raw")
    assert not executed.exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_run_without_checkpoints_is_told_so(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path).newest(silent) is None
    with pytest.raises(UsageError, match="holds no complete checkpoint"):
        read_weights(url_in(tmp_path), "raw")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("none", 0, ""),
        ("flipped bit", 74, "every checkpoint is damaged"),
        ("half a manifest", 74, "every checkpoint is damaged"),
        ("no manifest", 2, "holds no complete checkpoint"),
        ("no config", 2, "holds no run"),
    ],
)
def test_a_tool_ends_with_74_for_damage_and_with_2_for_a_folder_without_a_checkpoint(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, capsys: Any, damage: str, code: int, words: str
) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    manifest = tmp_path / "checkpoints/step-000000001/manifest.json"
    match damage:
        case "flipped bit":
            data = manifest.with_name("rank-00000-of-00001.attempt-1.safetensors")
            data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:100])
        case "no manifest":
            manifest.unlink()
        case "no config":
            (tmp_path / "config.yaml").unlink()
    assert export.main(["--run", str(tmp_path), "--to", str(tmp_path / "exported")]) == code
    assert words in capsys.readouterr().err


def test_an_export_reads_each_file_once_and_says_where_it_comes_from(
    tmp_path: Path, engine: TorchEngine, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_in(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        save(checkpoints, engine, config, step)
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    requested: dict[str, int] = {}
    read = Store.read

    def counting(self: Store, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        data = read(self, name, begin, end)
        requested[name] = requested.get(name, 0) + len(data)
        return data

    monkeypatch.setattr(Store, "read", counting)
    arguments = ["--run", str(tmp_path), "--weights", "avg", "--last", "2", "--to", str(tmp_path / "exported")]
    assert export.main(arguments) == 0
    origin = load_exported(tmp_path / "exported").origin
    assert (origin.step, origin.checkpoints, origin.data_digest) == (3, 2, "d")
    files = {name: size for name, size in Store(url_in(tmp_path), 1.0).walk().items() if name.endswith(".safetensors")}
    assert requested.pop("model.safetensors") == (tmp_path / "exported/model.safetensors").stat().st_size
    found = {name: size for name, size in requested.items() if name.endswith(".safetensors")}
    assert found == {name: size for name, size in files.items() if not name.startswith("step-000000001")}


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    path = tmp_path / "checkpoints/step-000000001/manifest.json"
    write_manifest(path, format_version=7)
    with pytest.raises(CheckpointError, match="checkpoint format 7 and this version of the trainer reads 3"):
        read_weights(url_in(tmp_path), "raw")


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
        weights = read_weights(url_in(tmp_path), "avg", last=count).state
        torch.testing.assert_close(weights[name], torch.full_like(parameter, mean).detach())


def test_an_average_that_was_not_kept_is_refused(tmp_path: Path, engine: TorchEngine, config: RunConfig) -> None:
    save(checkpoints_in(tmp_path), engine, config, 1)
    with pytest.raises(UsageError, match=r"optimizer.ema_decay was 0"):
        read_weights(url_in(tmp_path), "ema")


def test_killed_at_any_moment_there_is_always_a_complete_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but save is killed twenty times at random moments of it."""
    program = (
        "import itertools, dataclasses, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.trainer.test_checkpoint import ALONE, CPU, SMALL_JOB, TINY_MODEL, checkpoints_in, save\n"
        "from trainer.config import load_config\n"
        "from trainer.engine import TorchEngine\n"
        "config = load_config(SMALL_JOB, [f'{n}={v}' for n, v in TINY_MODEL.items()])\n"
        "engine = TorchEngine(config.model.build(), config)\n"
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
        assert read_weights(url_in(tmp_path), "raw").state
        assert len(list_complete(Store(url_in(tmp_path), 1.0))) >= 1
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    os.sync()
    assert read_weights(url_in(tmp_path), "raw").checkpoints[0].step >= 1
