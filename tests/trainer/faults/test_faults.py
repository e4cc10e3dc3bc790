"""What becomes of a run when something goes wrong: a rank killed, stopped or hung, a full disk, a loss that explodes?

Real processes, real signals. Each fault ends in the exit code and the sentence that the documents promise, and the run
can go on.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support import sabotage
from tests.support.launch import ROOT, SMALL_JOB, curve, finish, free_port, settings, start, train, wait_for_step
from tests.support.preloaded import Rank
from tests.support.s3_server import S3Server
from trainer.checkpoint import Checkpoints, read_weights
from trainer.config import load_config
from trainer.engine import State
from trainer.faults.watchdog import BEAT_SECONDS
from trainer.ranks import Ranks

LONG = 100_000  # more steps than any test waits for


def state_of(run_dir: Path) -> dict[str, object]:
    state: dict[str, object] = json.loads((run_dir / "run_state.json").read_text())
    return state


def begin(arguments: list[str], run_dir: Path) -> list[Rank]:
    """Start one rank and wait until it begins to train."""
    since = time.time()
    ranks = start(arguments, ranks=1)
    deadline = time.monotonic() + 120
    while not (run_dir / "run_state.json").exists() or float(str(state_of(run_dir).get("started", 0))) < since:
        assert time.monotonic() < deadline and ranks[0].poll() is None, finish(ranks)
        time.sleep(0.05)
    return ranks


def endless(run_dir: Path, splits: Path, **changes: object) -> list[str]:
    return settings(run_dir, splits, train__steps=LONG, **{"checkpoint__every_steps": LONG} | changes)


def test_a_killed_rank_ends_the_others_with_its_name(tmp_path: Path, splits: Path) -> None:
    ranks = start(endless(tmp_path / "run", splits, checkpoint__every_steps=2), ranks=2)
    wait_for_step(tmp_path / "run", 6, ranks)
    killed = time.monotonic()
    ranks[1].kill()
    code, text = finish(ranks)
    assert code == 78, text
    assert time.monotonic() - killed < 60
    assert "error: rank 1 on " in text and "gave no sign of life" in text
    assert "Traceback" not in text
    assert read_weights(str(tmp_path / "run/checkpoints"), "raw").checkpoints[0].step >= 2
    assert (state_of(tmp_path / "run")["state"], state_of(tmp_path / "run")["code"]) == ("failed", 78)


def test_the_killed_rank_may_be_the_first(tmp_path: Path, splits: Path) -> None:
    ranks = start(endless(tmp_path / "run", splits, limits__lost_rank_seconds=10), ranks=2)
    wait_for_step(tmp_path / "run", 3, ranks)
    ranks[0].kill()
    _, text = finish(ranks)
    assert ranks[1].returncode == 78, text
    assert "error: rank 0 is lost" in text


def test_a_stopped_rank_ends_the_job_and_everybody_writes_down_where_it_was(tmp_path: Path, splits: Path) -> None:
    ranks = start(endless(tmp_path / "run", splits, limits__lost_rank_seconds=10), ranks=2)
    wait_for_step(tmp_path / "run", 3, ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        assert ranks[0].wait(60) == 78
    finally:
        ranks[1].send_signal(signal.SIGCONT)
    code, text = finish(ranks)
    assert ranks[1].returncode == 78, text
    assert "Traceback" not in text
    assert "error: rank 1 on " in text and "gave no sign of life for 10 s" in text
    stacks = sorted((tmp_path / "run/stacks").glob("rank-00000-*.txt"))
    assert "loop.py" in stacks[0].read_text()
    assert state_of(tmp_path / "run")["code"] == 78


def test_the_stopped_rank_may_be_the_first(tmp_path: Path, splits: Path) -> None:
    ranks = start(endless(tmp_path / "run", splits, limits__lost_rank_seconds=10), ranks=2)
    wait_for_step(tmp_path / "run", 3, ranks)
    ranks[0].send_signal(signal.SIGSTOP)
    try:
        assert ranks[1].wait(60) == 78
    finally:
        ranks[0].send_signal(signal.SIGCONT)
    code, text = finish(ranks)
    assert code == 78, text
    assert "error: rank 0 is lost" in text and "Traceback" not in text


@pytest.mark.parametrize("first_to_wake", [0, 1])
def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path: Path, splits: Path, first_to_wake: int) -> None:
    """For longer than all of its limits, and the ranks wake up one after the other."""
    limits = {"lost_rank_seconds": 5, "step_seconds": 8, "checkpoint_seconds": 8, "startup_seconds": 60}
    changes = {f"limits__{name}": value for name, value in limits.items()} | {"data__read_deadline_seconds": 6}
    ranks = start(endless(tmp_path / "run", splits, **changes), ranks=2)
    for step in (0, 10):
        wait_for_step(tmp_path / "run", step + 3, ranks)
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        time.sleep(12)
        ranks[first_to_wake].send_signal(signal.SIGCONT)
        time.sleep(2)
        ranks[1 - first_to_wake].send_signal(signal.SIGCONT)
    wait_for_step(tmp_path / "run", curve(tmp_path / "run")[-1][0] + 10, ranks)
    ranks[0].send_signal(signal.SIGTERM)
    code, text = finish(ranks)
    assert [code, ranks[1].returncode] == [75, 75], text


def test_a_process_beside_the_job_cannot_end_it(tmp_path: Path, splits: Path) -> None:
    """It reaches the stores of the job, and says there what ranks say when they end."""
    ranks = start(endless(tmp_path / "run", splits), ranks=2)
    wait_for_step(tmp_path / "run", 3, ranks)
    reached: list[str] = []

    def write_to(port: int) -> None:
        with contextlib.suppress(RuntimeError):
            store = torch.distributed.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=2))
            for name in store.list_keys():
                if name.rpartition("/")[2] in ("verdict", "failed") or "beat/" in name:
                    store.set(name, "0")
                    reached.append(name)
            store.set("verdict", json.dumps({"reason": "a reason of its own", "code": 0}))

    # What is no store never answers.
    strangers = [threading.Thread(target=write_to, args=[port], daemon=True) for port in listening(ranks[0].pid)]
    for stranger in strangers:
        stranger.start()
    for stranger in strangers:
        stranger.join(3)
    assert any("beat/1" in name for name in reached), reached
    wait_for_step(tmp_path / "run", curve(tmp_path / "run")[-1][0] + 10, ranks)
    time.sleep(3 * BEAT_SECONDS)
    ranks[0].send_signal(signal.SIGTERM)
    code, text = finish(ranks)
    assert [code, ranks[1].returncode] == [75, 75], text
    assert "a reason of its own" not in text


def listening(pid: int) -> list[int]:
    """Ports on which a process listens."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in links:
                found.append(int(columns[1].rpartition(":")[2], 16))
    return found


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_starts_is_named_instead_of_waited_for(tmp_path: Path, splits: Path, absent: int) -> None:
    ranks = start(endless(tmp_path / "run", splits, limits__startup_seconds=20), ranks=2)
    ranks[absent].kill()  # long before it could reach the others
    _, text = finish(ranks)
    assert ranks[1 - absent].returncode == 78, text
    assert "Traceback" not in text
    if absent == 1:
        assert "error: rank 1 of 2 did not come in 10 s" in text
        assert (state_of(tmp_path / "run")["state"], state_of(tmp_path / "run")["code"]) == ("failed", 78)
    else:
        assert "error: rank 0 did not come to 127.0.0.1" in text
        assert "socket has timed out" not in text  # torch's own words


def test_points_that_could_not_be_written_until_the_end_are_kept_elsewhere_and_said(
    tmp_path: Path, splits: Path
) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=8, tracking__system_metrics=False)
    code, text = finish(start(arguments, ranks=1, sabotage={0: sabotage.the_points_cannot_be_written}))
    assert code == 73, text
    # Those of steps 5 to 8, the last validation and the summary.
    lacking = f"{tmp_path}/run/metrics.jsonl: 6 lines could not be written (Input/output error) and are kept in "
    assert f"error: all steps are done and the weights are safe, but {lacking}" in text
    state = state_of(tmp_path / "run")
    assert (state["state"], state["code"], state["step"]) == ("failed", 73, 8)
    assert "finished:" not in text
    assert [step for step, _ in curve(tmp_path / "run")] == [1, 2, 3, 4]
    command = text.split("are kept in ")[-1].split(": ", 1)[1].splitlines()[0]
    assert command.startswith("cat ")
    subprocess.run(command, shell=True, check=True)
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 9))


def test_a_device_whose_memory_runs_out_ends_all_ranks_with_what_needs_less(tmp_path: Path, splits: Path) -> None:
    """And so does any other error of one rank: the others say whose it was, and end with its code."""
    arguments = endless(tmp_path / "run", splits, checkpoint__every_steps=4)
    ranks = start(arguments, ranks=2, sabotage={1: sabotage.the_memory_of_the_device_runs_out})
    code, text = finish(ranks)
    assert [code, ranks[1].returncode] == [70, 70] and "Traceback" not in text, text
    reason = "the device's memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.); a smaller "
    assert f"error: {reason}train.micro_batch_images" in text
    assert f"error: rank 1 on {os.uname().nodename}: {reason}" in text
    state = state_of(tmp_path / "run")
    assert (state["state"], state["code"]) == ("failed", 70) and reason in str(state["reason"])
    assert read_weights(str(tmp_path / "run/checkpoints"), "raw").checkpoints[0].step == 4


def test_a_rank_whose_threads_all_stand_still_is_named_by_the_others(tmp_path: Path, splits: Path) -> None:
    arguments = endless(tmp_path / "run", splits, limits__lost_rank_seconds=8)
    ranks = start(arguments, ranks=2, sabotage={1: sabotage.a_call_never_gives_python_back})
    assert ranks[0].wait(120) == 78
    assert ranks[1].poll() is None  # the launcher kills it
    ranks[1].kill()
    _, text = finish(ranks)
    assert f"error: rank 1 on {os.uname().nodename} gave no sign of life for 8 s" in text
    assert curve(tmp_path / "run")[-1][0] >= 4
    assert list((tmp_path / "run/stacks").glob("rank-00000-*.txt"))


def test_a_rank_that_hangs_is_named_with_its_phase(tmp_path: Path, splits: Path, s3_server: S3Server) -> None:
    url = f"s3://{s3_server.make_bucket()}/photographs"
    command = [sys.executable, "-m", "data_pipeline.pack", "--source", "photographs", "--dest", url, "--size", "8"]
    command += ["--split", "train", "--images", "3000", "--workers", "1"]
    subprocess.run(command, env=os.environ | s3_server.environment, cwd=ROOT, check=True, capture_output=True)
    arguments = endless(
        tmp_path / "run", splits, data__train_url=url, data__read_deadline_seconds=600, limits__step_seconds=5
    )
    ranks = start(arguments, ranks=2, environment=s3_server.environment)
    wait_for_step(tmp_path / "run", 1, ranks)
    s3_server.pause()
    try:
        code, text = finish(ranks)
    finally:
        s3_server.resume()
    assert [code, ranks[1].returncode] == [78, 78], text
    assert "made no progress for 5 s (limits.step_seconds); this rank's stacks are in " in text
    assert "run the same command to go on" in text
    for rank in range(2):
        (stacks,) = (tmp_path / "run/stacks").glob(f"rank-{rank:05d}-*.txt")
        assert str(stacks) in text and "loop.py" in stacks.read_text()
    assert state_of(tmp_path / "run")["code"] == 78


def test_a_second_job_on_the_same_folder_is_told_who_holds_it(tmp_path: Path, splits: Path) -> None:
    arguments = endless(tmp_path / "run", splits)
    first = start(arguments, ranks=1)
    wait_for_step(tmp_path / "run", 2, first)
    code, text = finish(start(arguments, ranks=1))
    assert code == 73
    assert f"run.dir: {tmp_path}/run is in use by process {first[0].pid} on {os.uname().nodename}" in text
    first[0].send_signal(signal.SIGTERM)
    assert finish(first)[0] == 75


def test_an_attempt_that_was_superseded_ends_without_writing(tmp_path: Path, splits: Path) -> None:
    ranks = start(endless(tmp_path / "run", splits, checkpoint__every_steps=2), ranks=2)
    wait_for_step(tmp_path / "run", 3, ranks)
    deadline = time.monotonic() + 60
    while "mlflow_run_id" not in state_of(tmp_path / "run"):  # what the attempt writes there itself comes first
        assert time.monotonic() < deadline, finish(ranks)
        time.sleep(0.05)
    # What a later attempt on another machine does, where this one's lock cannot be seen.
    state = state_of(tmp_path / "run")
    (tmp_path / "run/new_state").write_text(json.dumps(state | {"attempt": 2, "state": "running"}))
    os.replace(tmp_path / "run/new_state", tmp_path / "run/run_state.json")
    code, text = finish(ranks)
    assert code == 80, text
    assert "a newer attempt at this run has taken over" in text
    assert state_of(tmp_path / "run")["state"] == "running"


@pytest.mark.parametrize("way", ["stop file", "budget"])
def test_other_ways_to_stop_end_with_a_checkpoint(tmp_path: Path, splits: Path, way: str) -> None:
    changes = {"limits__run_minutes": 0.05} if way == "budget" else {}
    ranks = start(endless(tmp_path / "run", splits, **changes), ranks=2)
    if way == "stop file":
        wait_for_step(tmp_path / "run", 2, ranks)
        (tmp_path / "run/stop").touch()
    code, text = finish(ranks)
    assert code == 75, text
    state = state_of(tmp_path / "run")
    assert state["state"] == "stopped"
    assert state["reason"] == ("reached limits.run_minutes" if way == "budget" else "found the file `stop`")
    assert not (tmp_path / "run/stop").exists()
    assert (tmp_path / f"run/checkpoints/step-{state['step']:09d}/manifest.json").exists()


def test_a_stop_in_the_middle_of_an_evaluation_is_followed_at_once(tmp_path: Path, splits: Path) -> None:
    arguments = endless(
        tmp_path / "run", splits, evaluate__every_steps=3, evaluate__images=None, evaluate__batch_images=1
    )
    ranks = begin(arguments, tmp_path / "run")
    ranks[0].send_signal(signal.SIGTERM)  # the first evaluation, before the first step, takes 400 batches
    code, text = finish(ranks)
    assert code == 75, text


def test_a_loss_that_explodes_is_skipped_rolled_back_and_given_up(tmp_path: Path, splits: Path) -> None:
    run_dir = tmp_path / "run"
    train(settings(run_dir, splits, train__steps=4))
    before = {name: tensors["weight"] for name, tensors in _saved_by(run_dir).items()}
    arguments = settings(
        run_dir,
        splits,
        train__steps=LONG,
        optimizer__schedule__kind="wsd",
        optimizer__schedule__decay_steps=0,
        optimizer__schedule__warmup_steps=0,
        optimizer__peak_lr=1e30,
        limits__skipped_updates=3,
        checkpoint__every_steps=LONG,
    )
    code, text = finish(start(arguments, ranks=2))
    assert code == 76, text
    assert "3 updates in a row" in text and "the last checkpoint is untouched. Try a smaller optimizer.peak_lr" in text
    assert "back to the weights of step-000000004 after 3 skipped updates" in text
    assert state_of(run_dir)["code"] == 76
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.count("roll_back") == 1 and names.count("skipped_update") == 6
    kept = sorted((run_dir / "skipped").glob("*.safetensors"))
    assert safetensors.torch.load_file(kept[0])["images"].shape == (4, 8, 8, 3)
    after = {name: tensors["weight"] for name, tensors in _saved_by(run_dir).items()}
    assert all(before[name].equal(after[name]) for name in before)


def test_a_learning_rate_far_too_high_without_clipping_ends_in_a_sentence(tmp_path: Path, splits: Path) -> None:
    changes = {"optimizer__peak_lr": 1e3, "optimizer__clip_grad_norm": 0, "optimizer__schedule__warmup_steps": 0}
    arguments = settings(tmp_path / "run", splits, train__steps=30, train__precision="bf16", **changes)
    code, text = finish(start(arguments, ranks=1))
    assert code == 76, text
    assert "Traceback" not in text and "Try a smaller optimizer.peak_lr" in text


def test_a_nan_on_one_rank_is_skipped_on_all_names_the_rank_and_is_mended_by_the_last_checkpoint(
    tmp_path: Path, splits: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = settings(
        run_dir, splits, train__steps=14, train__zero_stage=0, limits__skipped_updates=3, checkpoint__every_steps=4
    )
    code, text = finish(start(arguments, ranks=2, sabotage={1: sabotage.a_weight_becomes_nan}))
    assert code == 0, text
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    skipped = [event for event in events if event["event"] == "skipped_update"]
    assert [(event["step"], event["ranks"]) for event in skipped] == [(6, [1]), (7, [1]), (8, [1])]
    assert "step 6: the loss of rank 1 is not finite; the update is skipped (training images 40-48)" in text
    assert "step 8: back to the weights of step-000000004 after 3 skipped updates" in text
    assert {path.name.split("-0.")[0] for path in (run_dir / "skipped").iterdir()} == {
        f"step-{step:09d}-rank-00001" for step in (6, 7, 8)
    }
    assert state_of(run_dir)["state"] == "finished"


def test_a_loss_that_jumps_is_a_warning_and_an_event(tmp_path: Path, splits: Path) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=36, train__zero_stage=0)
    code, text = finish(start(arguments, ranks=1, sabotage={0: sabotage.the_output_layer_grows}))
    assert code == 0, text
    assert "warning: step 31: the loss jumped to " in text
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    spikes = [event for event in events if event["event"] == "loss_spike"]
    assert spikes[0]["step"] == 31 and spikes[0]["bits_per_dim"] > 6


def test_a_checkpoint_that_is_damaged_on_one_of_two_ranks_is_passed_over_by_both(tmp_path: Path, splits: Path) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=8, checkpoint__every_steps=4)
    assert f"a new run: {tmp_path}/run/checkpoints holds no checkpoint" in train(arguments, ranks=2)
    (file,) = (tmp_path / "run/checkpoints/step-000000008").glob("rank-00001-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    text = train([*arguments, "--set", "train.steps=10"], ranks=2)
    assert text.count("checkpoint step-000000008 is damaged (1 of 2 files); trying an older one") == 1
    assert "going on from step-000000004" in text
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 11))


def test_clocks_that_differ_by_hours_change_nothing(tmp_path: Path, splits: Path) -> None:
    """Rank 1 is behind at first, and then rank 0, whose files seem to come from the future."""
    arguments, begun = settings(tmp_path / "run", splits), time.monotonic()
    for wrong, steps in ((1, 4), (0, 8)):
        behind = {wrong: sabotage.the_clock_is_two_hours_behind}
        code, text = finish(start([*arguments, "--set", f"train.steps={steps}"], ranks=2, sabotage=behind))
        assert code == 0, text
    assert "going on from step-000000004" in text
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 9))
    ((_, hours),) = curve(tmp_path / "run", "final/gpu_hours")[-1:]
    assert 0 < hours < 2 * (time.monotonic() - begun) / 3600


def test_the_lock_of_a_build_that_was_killed_is_not_waited_for(tmp_path: Path, splits: Path) -> None:
    """DeepSpeed compiles an operator at start, if it is let, and waits for ever where such a lock lies."""
    for name in ("deepspeed_shm_comm", "deepspeed_ccl_comm", "async_io"):
        for folder in (
            tmp_path / "extensions",
            tmp_path / f"extensions/py{sys.version_info[0]}{sys.version_info[1]}_cpu",
        ):
            (folder / name).mkdir(parents=True)
            (folder / name / "lock").touch()
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    train(settings(tmp_path / "run", splits, train__steps=2), ranks=2, environment=environment)


def test_starts_without_progress_end_after_a_few(tmp_path: Path, splits: Path) -> None:
    arguments = endless(tmp_path / "run", splits, limits__starts_without_progress=3)
    for _ in range(3):
        ranks = begin(arguments, tmp_path / "run")
        ranks[0].kill()
        finish(ranks)
    code, text = finish(start(arguments, ranks=1))
    assert code == 70, text
    assert "3 starts in a row got no further than step 0" in text and "Traceback" not in text
    ranks = begin([*arguments, "--set", "optimizer.peak_lr=1e-4"], tmp_path / "run")  # something was changed
    ranks[0].kill()


def test_checkpoints_at_a_url_belong_to_one_run(tmp_path: Path, splits: Path, s3_server: S3Server) -> None:
    url = f"s3://{s3_server.make_bucket()}/checkpoints"
    changes = {"checkpoint__url": url, "checkpoint__every_steps": 2, "train__steps": 4}
    train(settings(tmp_path / "run", splits, **changes), environment=s3_server.environment)
    other = settings(tmp_path / "other", splits, **changes | {"train__steps": 6})
    text = train(other, environment=s3_server.environment)  # moved: a folder of its own, the same checkpoints
    assert "going on from step-000000004" in text
    different = settings(tmp_path / "different", splits, **changes, model__ff_width=24)
    code, text = finish(start(different, ranks=1, environment=s3_server.environment))
    assert code == 74
    assert "model.ff_width 16 there, 24 here" in text
    missing = settings(tmp_path / "missing", splits, **changes | {"checkpoint__url": "s3://no-such-bucket/x"})
    code, text = finish(start(missing, ranks=1, environment=s3_server.environment))
    assert code == 2
    assert "checkpoint.url: cannot write to s3://no-such-bucket/x: there is no bucket no-such-bucket" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_during_training_ends_the_run_with_the_last_checkpoint_intact(
    tmp_path: Path, splits: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this machine forbids mounting")
    try:
        arguments = endless(tmp_path / "run", splits, checkpoint__url=small / "run", checkpoint__every_steps=3)
        ranks = start(arguments, ranks=1)
        wait_for_step(tmp_path / "run", 5, ranks)
        status = os.statvfs(small)
        (small / "filler").write_bytes(bytes(status.f_bavail * status.f_bsize))
        code, text = finish(ranks)
        assert code == 74, text
        assert "was not written" in text and "disk is full" in text and "3 checkpoints in a row have failed" in text
        assert read_weights(f"{small}/run", "raw").checkpoints[0].step >= 3
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_launcher_that_is_killed_stops_its_ranks_with_a_checkpoint(tmp_path: Path, splits: Path) -> None:
    """DeepSpeed's launcher leaves its ranks behind when the kernel kills it, and the front process says 0."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port"]
    command = [*launcher, str(free_port()), "trainer/run.py", "--config", str(SMALL_JOB)]
    command += endless(tmp_path / "run", splits)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "run", 3, [process])
    found = subprocess.run(["pgrep", "-f", "deepspeed.launcher.launch"], capture_output=True, text=True, check=True)
    ours = [pid for pid in found.stdout.split() if str(tmp_path) in Path(f"/proc/{pid}/cmdline").read_text()]
    for pid in ours:
        os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while state_of(tmp_path / "run")["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    state = state_of(tmp_path / "run")
    assert [state[name] for name in ("state", "code", "reason")] == ["stopped", 75, "the launcher died"]
    assert read_weights(str(tmp_path / "run/checkpoints"), "raw").checkpoints[0].step == state["step"]
    process.communicate(timeout=60)


@pytest.mark.parametrize("sizes", [(1,), (1, 2)], ids=["one rank", "one and two ranks in turns"])
def test_killed_at_twenty_random_moments_a_run_ends_like_one_left_alone(
    tmp_path: Path, splits: Path, sizes: tuple[int, ...]
) -> None:
    """In a step, in a checkpoint, in an evaluation, at the start: always the same weights, the same curve."""
    changes = {"train__steps": 60, "checkpoint__every_steps": 3, "evaluate__every_steps": 7}
    changes |= {"limits__starts_without_progress": 100, "train__micro_batch_images": 2}
    train(settings(tmp_path / "alone/run", splits, **changes))
    chance = random.Random(len(sizes))
    arguments = settings(tmp_path / "killed/run", splits, **changes)
    for kill in range(20):
        ranks = start(arguments, ranks=sizes[kill % len(sizes)])
        time.sleep(chance.uniform(0.1, 3.0))
        for rank in ranks:
            rank.kill()
        finish(ranks)
    train(arguments, ranks=sizes[0])
    alone, killed = (_saved_by(tmp_path / name / "run") for name in ("alone", "killed"))
    for name, tensors in alone.items():
        for key, value in tensors.items():
            if sizes == (1,):
                assert value.equal(killed[name][key]), (name, key)
    expected, found = curve(tmp_path / "alone/run"), curve(tmp_path / "killed/run")
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 61))
    for (_, a), (_, b) in zip(expected, found, strict=True):
        assert a == b if sizes == (1,) else abs(a - b) < 1e-4


def _saved_by(run_dir: Path) -> dict[str, State]:
    """What a run's newest checkpoint holds."""
    config, alone = load_config(run_dir / "config.yaml", []), Ranks(0, 1, 0, 1)
    loaded = Checkpoints(str(run_dir / "checkpoints"), alone, torch.device("cpu"), config.checkpoint, 1).newest(print)
    assert loaded is not None
    return dict(loaded.states())
