"""Does a run begin at step 0 only if nothing is lost by it, and is it said what is wrong with its folder?"""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.loader import open_shards
from tests.support.launch import finish, settings, start, train
from tests.support.training_job import ALONE, config_of
from trainer.checkpoint import Checkpoint
from trainer.errors import UnfitDisk, UsageError, code_of
from trainer.record.run_folder import Journal, RunFiles
from trainer.startup import cannot_write, check_fits, check_same_classes, count_start, prepare_run_folder, why_not_anew
from trainer.typed_values import plain


def trained_to(files: RunFiles, step: int) -> None:
    journal = Journal(files.metrics)
    journal.append({"step": step, "time": 1.0, "metrics": {"train/bits_per_dim": 5.0}})
    journal.append({"step": step + 1000, "time": 1.0, "metrics": {"system/cpu": 5.0}})
    journal.close()


def test_a_new_folder_and_one_that_was_killed_before_its_first_checkpoint_begin_anew(tmp_path: Path) -> None:
    files, config = RunFiles(tmp_path), config_of(tmp_path, checkpoint__every_steps=10)
    assert why_not_anew(files, config) is None
    files.write_state(state="running", attempt=2, start_step=0, step=0)
    trained_to(files, 19)  # the first one is on its way in the background
    (tmp_path / "checkpoints/step-000000010").mkdir(parents=True)
    assert why_not_anew(files, config) is None
    files.write_state(state="stopped", step=0, reason="in the first evaluation")
    assert why_not_anew(files, config) is None


def test_a_start_notes_a_checkpoint_of_which_a_killed_attempt_had_no_time_to_tell(tmp_path: Path) -> None:
    files, config = RunFiles(tmp_path), config_of(tmp_path)
    assert count_start(files, config, 0) is None and "checkpoint_step" not in files.read_state()
    files.write_state(checkpoint_step=2)
    assert count_start(files, config, 4) is None and files.read_state()["checkpoint_step"] == 4


def test_a_disk_that_gives_errors_at_the_start_is_no_wrong_option(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    config, shards = config_of(tmp_path), open_shards(str(packed))
    (tmp_path / "run_state.json").write_text('{"step": 4}')
    monkeypatch.setattr(os, "fsync", broken)
    says = r"run.dir: cannot write to .* \(Input/output error\); the same command goes on when the disk can be used"
    with pytest.raises(UnfitDisk, match=says) as caught:
        prepare_run_folder(config, shards, ALONE)
    assert code_of(caught.value) == 73 and (tmp_path / "run_state.json").read_text() == '{"step": 4}'


def test_a_start_removes_what_killed_writers_left(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "samples").mkdir()
    torn = [tmp_path / f"{name}.unfinished-0123456789abcdef" for name in ("run_state.json", "samples/x.png")]
    for path in torn:
        path.write_text("half")
        os.utime(path, (1.0, 1.0))
    assert prepare_run_folder(config_of(tmp_path), open_shards(str(packed)), ALONE)
    assert not any(path.exists() for path in torn) and (tmp_path / "run_state.json").exists()


def test_a_broken_disk_is_told_from_a_wrong_folder(tmp_path: Path) -> None:
    def worded(number: int) -> tuple[int, str]:
        error = cannot_write(tmp_path, OSError(number, os.strerror(number)))
        return code_of(error), str(error)

    again = "the same command goes on when the disk can be used"
    assert worded(errno.EIO) == (73, f"run.dir: cannot write to {tmp_path} (Input/output error); {again}")
    assert worded(errno.ESTALE) == (73, f"run.dir: cannot write to {tmp_path} (Stale file handle); {again}")
    assert worded(errno.ENOTDIR) == (2, f"run.dir: cannot write to {tmp_path} (Not a directory)")


@pytest.mark.parametrize("known_by", ["checkpoint", "end", "points", "damaged checkpoint"])
def test_a_folder_that_knows_steps_does_not_begin_anew(tmp_path: Path, known_by: str) -> None:
    files, config = RunFiles(tmp_path), config_of(tmp_path, checkpoint__every_steps=10)
    match known_by:
        case "checkpoint":
            files.write_state(state="running", checkpoint_step=10)
        case "end":
            files.write_state(state="finished", step=12)
        case "points":
            trained_to(files, 20)
        case "damaged checkpoint":
            (tmp_path / "checkpoints/step-000000010").mkdir(parents=True)
            (tmp_path / "checkpoints/step-000000010/manifest.json").write_text("{")
    said = why_not_anew(files, config)
    assert said is not None and "nothing was deleted" in said and "choose another run.dir" in said
    assert ("step-000000010" in said) == (known_by == "damaged checkpoint")
    assert ("step 20" in said) == (known_by == "points")


@pytest.mark.parametrize("loss", ["damaged files", "no manifests", "no folder", "another URL"])
def test_a_run_whose_checkpoints_are_lost_is_refused_and_keeps_everything(
    tmp_path: Path, splits: Path, loss: str
) -> None:
    run_dir, changes = tmp_path / "run", {"train__steps": 8, "checkpoint__every_steps": 4}
    train(settings(run_dir, splits, **changes))
    attempt = json.loads((run_dir / "run_state.json").read_text())
    assert attempt["checkpoint_step"] == 8
    match loss:
        case "damaged files":
            for path in run_dir.glob("checkpoints/*/*.safetensors"):
                path.write_bytes(path.read_bytes()[:-1])
        case "no manifests":
            for path in run_dir.glob("checkpoints/*/manifest.json"):
                path.unlink()
        case "no folder":
            (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
        case "another URL":
            changes["checkpoint__url"] = str(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "step-0" in str(path)}
    points = (run_dir / "metrics.jsonl").read_bytes()
    code, text = finish(start(settings(run_dir, splits, **changes | {"train__steps": 12}), ranks=1))
    assert code == 74 and "Traceback" not in text, text
    assert f"{run_dir} has trained to step 8" in text and "nothing was deleted" in text
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert (run_dir / "metrics.jsonl").read_bytes() == points


def test_other_lanes_in_the_middle_of_an_epoch_are_refused(tmp_path: Path, packed: Path) -> None:
    """Some images would come twice, others never. Between two epochs, and for a run that is done, they may change."""
    shards = open_shards(str(packed))
    config, other = (config_of(tmp_path, train__steps=500, data__lanes=lanes) for lanes in (2, 4))
    in_the_middle = Checkpoint(100, 100, shards.count + 8, None, plain(other), shards.digest, [])
    says = "data.lanes is 2, and step-000000100 was written with 4 in the middle"
    with pytest.raises(UsageError, match=says) as caught:
        check_fits(in_the_middle, config, shards, "url")
    assert "add --set data.lanes=4" in str(caught.value) and code_of(caught.value) == 2
    check_fits(in_the_middle, other, shards, "url")
    check_fits(replace(in_the_middle, samples=2 * shards.count), config, shards, "url")
    check_fits(replace(in_the_middle, step=500), config, shards, "url")


def test_a_label_that_means_something_else_in_the_validation_set_is_refused(packed: Path) -> None:
    shards = open_shards(str(packed))
    trained, other, numbers = (
        replace(shards, manifest=replace(shards.manifest, classes=classes))
        for classes in (("ant", "bee", "cat"), ("ant", "cat", "dog"), ("0", "1", "2"))
    )
    with pytest.raises(UsageError, match="data.validation_url: label 1 is 'cat' in .* and 'bee' in ") as caught:
        check_same_classes(trained, other)
    assert code_of(caught.value) == 2
    for validation in (trained, numbers):  # nobody named the classes of shards that were indexed
        check_same_classes(trained, validation)
