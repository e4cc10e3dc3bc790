"""Does the main job do what it promises, as processes of their own on real shards?"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.pack import main as pack_main
from tests.support import sabotage
from tests.support.launch import ROOT, SMALL_JOB, curve, finish, free_port, settings, start, train, wait_for_step
from tests.support.s3_server import S3Server
from tests.support.small_disk import on_small_disk
from trainer import evaluate, run, sample

STEPS = 50
LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
LAUNCHER_ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, splits: Path) -> Path:
    """The folder of an undisturbed run of one process, in fp32, with one point a step."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    new_store = f"sqlite:///{folder.parent}/new.db"  # here MLflow makes it, as for a newcomer
    train(settings(folder, splits, train__steps=STEPS, checkpoint__every_steps=20, tracking__uri=new_store))
    return folder


def test_a_finished_run_is_in_mlflow_with_everything_that_made_it(reference: Path, splits: Path) -> None:
    uri = f"sqlite:///{reference.parent}/new.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("small_job")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["model.layers"] == "2"
    assert found.data.tags["mlflow.runName"] == "small_job"
    assert found.data.tags["world_size"] == "1"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert found.data.tags["mlflow.source.git.commit"] == commit.stdout.strip()
    assert found.inputs is not None
    datasets = {
        tag.value: item.dataset
        for item in found.inputs.dataset_inputs
        for tag in item.tags
        if tag.key == "mlflow.data.context"
    }
    for context, folder in (("training", "train"), ("validation", "validation")):
        manifest = json.loads((splits / folder / "manifest.json").read_text())
        assert manifest["digest"].startswith(datasets[context].digest)
    artifacts = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "events.jsonl", "repro"} <= artifacts
    for name in ("train/bits_per_dim", "val/bits_per_dim", "optim/lr"):
        steps = [point.step for point in client.get_metric_history(found.info.run_id, name)]
        assert steps == sorted(set(steps))
        assert steps[-1] == STEPS
    state = json.loads((reference / "run_state.json").read_text())
    assert (state["state"], state["code"], state["step"]) == ("finished", 0, STEPS)


def test_the_loss_falls_and_the_last_evaluation_takes_all_images(reference: Path) -> None:
    scores = curve(reference, "val/bits_per_dim")
    assert scores[-1][1] < scores[0][1] - 0.5
    assert curve(reference, "val/images")[-1] == (STEPS, 400.0)


def test_two_processes_give_the_loss_curve_of_one(reference: Path, tmp_path: Path, splits: Path) -> None:
    train(settings(tmp_path / "run", splits, train__steps=STEPS), ranks=2)
    one, two = curve(reference), curve(tmp_path / "run")
    assert len(one) == len(two) == STEPS
    for (step, a), (other_step, b) in zip(one, two, strict=True):
        assert step == other_step
        assert abs(a - b) < 1e-3


def test_shards_on_s3_give_the_loss_curve_of_the_local_disk(
    reference: Path, tmp_path: Path, splits: Path, s3_server: S3Server
) -> None:
    url = f"s3://{s3_server.make_bucket()}/photographs"
    command = [sys.executable, "-m", "data_pipeline.pack", "--source", "photographs", "--dest", url, "--size", "8"]
    command += ["--split", "train", "--images", "3000", "--workers", "1"]
    subprocess.run(command, env=os.environ | s3_server.environment, cwd=ROOT, check=True, capture_output=True)
    arguments = settings(
        tmp_path / "run", splits, train__steps=STEPS, data__train_url=url, data__cache_dir=tmp_path / "cache"
    )
    train(arguments, environment=s3_server.environment)
    assert curve(tmp_path / "run") == curve(reference)
    blocks = json.loads((splits / "train/manifest.json").read_text())["blocks"]
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept >= sum(end - begin for _, begin, end, _, _ in blocks)


@pytest.mark.parametrize(("second", "stage"), [(1, 2), (2, 3), (2, 0)])
def test_a_run_that_is_killed_goes_on_to_the_same_curve_at_any_number_of_ranks_and_stage(
    reference: Path, tmp_path: Path, splits: Path, second: int, stage: int
) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=STEPS, checkpoint__every_steps=7)
    processes = start(arguments, ranks=2)
    wait_for_step(tmp_path / "run", 10, processes)
    for process in processes:
        process.kill()
    finish(processes)
    text = train([*arguments, "--set", f"train.zero_stage={stage}"], ranks=second)
    assert "going on from step-0000000" in text
    resumed = curve(tmp_path / "run")
    assert [step for step, _ in resumed] == list(range(1, STEPS + 1))
    for (_, a), (_, b) in zip(curve(reference), resumed, strict=True):
        assert abs(a - b) < 1e-4
    assert json.loads((tmp_path / "run/run_state.json").read_text())["state"] == "finished"


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint_and_exit_code_75(
    tmp_path: Path, splits: Path
) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=100_000, checkpoint__every_steps=100_000)
    processes = start(arguments, ranks=2)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    code, text = finish(processes)
    assert [process.returncode for process in processes] == [75, 75], text
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    assert (state["state"], state["code"]) == ("stopped", 75)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == state["step"]


def test_ctrl_c_on_the_launcher_ends_with_a_checkpoint(tmp_path: Path, splits: Path) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=100_000, checkpoint__every_steps=100_000)
    launcher = [*LAUNCHER, "--num_accelerators", "2", "--master_port", str(free_port())]
    command = [*launcher, "trainer/run.py", "--config", str(SMALL_JOB), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=LAUNCHER_ENVIRONMENT, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "run", 3, [process])
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60  # the launcher may end before its ranks do
    while (state := json.loads((tmp_path / "run/run_state.json").read_text()))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (state["state"], state["code"]) == ("stopped", 75)
    assert (tmp_path / f"run/checkpoints/step-{state['step']:09d}/manifest.json").exists()


def test_the_hostfile_command_trains_the_big_config_shrunk_to_this_machine(tmp_path: Path, splits: Path) -> None:
    big = [
        "model.output=predictor_categorical",
        "train.precision=bf16",
        "train.activation_checkpoint_every_layers=1",
        "run.world_size=1",
    ]
    command = [*LAUNCHER, "--hostfile", "cluster/hosts", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), "trainer/run.py", "--config", "configs/imagenet64_big.yaml"]
    command += settings(tmp_path / "run", splits) + [a for setting in big for a in ("--set", setting)]
    result = subprocess.run(
        command, cwd=ROOT, env=LAUNCHER_ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(curve(tmp_path / "run")) == 6


CATEGORICAL = {"model.input": "categorical", "model.output": "categorical"}
VARIANTS = {
    "2D": CATEGORICAL
    | {"model.attention": "local_2d", "model.attention.query_block": "[4, 12]", "model.attention.memory": "[2, 6]"},
    "class-conditional": {"model.num_classes": 12, "model.block": "paper", "model.norm": "post", "model.dropout": 0.1},
    "super-resolution": CATEGORICAL
    | {"model.super_resolution.small_size": 2, "model.super_resolution.encoder_layers": 1, "train.zero_stage": 3},
    "channels of pixels": {
        "model.output": "predictor_categorical",
        "model.stem": "neighbourhood",
        "train.zero_stage": 3,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_is_trained_scored_and_sampled_by_the_commands(
    variant: str, tmp_path: Path, splits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(
        settings(
            folder,
            splits,
            train__steps=3,
            train__precision="bf16",
            optimizer__ema_decay=0.5,
            tracking__sample_every_steps=2,
            tracking__sample_images=3,
            **VARIANTS[variant],
        ),
        ranks=2,
    )
    (drawn_in_training,) = (folder / "samples").glob("*.png")
    with Image.open(drawn_in_training) as picture:
        assert picture.width > 2 * 128  # three images on two ranks, in two columns
    for weights in ("raw", "ema", "avg"):
        monkeypatch.setattr(sys, "argv", ["evaluate", "--run", str(folder), "--weights", weights])
        assert evaluate.main() == 0
    raw, ema = (curve(folder, f"final/{weights}_bits_per_dim")[0][1] for weights in ("raw", "ema"))
    assert raw != ema
    assert raw == pytest.approx(curve(folder, "val/bits_per_dim")[-1][1], rel=0.01)  # bf16 there, fp32 here

    for arguments in ([], ["--complete-half"]):
        monkeypatch.setattr(sys, "argv", ["sample", "--run", str(folder), "--n", "4", *arguments])
        assert sample.main() == 0
    pictures = sorted(set((folder / "samples").glob("*.png")) - {drawn_in_training})
    assert len(pictures) == 2
    for path in pictures:
        with Image.open(path) as picture:
            assert len(picture.getcolors(1 << 20) or []) > 50
    state = json.loads((folder / "run_state.json").read_text())
    artifacts = mlflow.MlflowClient(state["mlflow_uri"]).list_artifacts(state["mlflow_run_id"], "samples")
    assert sorted(Path(artifact.path).name for artifact in artifacts) == [path.name for path in pictures]
    assert ("consistency" in capsys.readouterr().out) == (variant == "super-resolution")


def test_tools_say_what_is_wrong_with_what_they_are_given(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text((reference / "config.yaml").read_text())
    for tool, arguments, words in (
        (sample, ["--run", str(tmp_path / "none")], "holds no run"),
        (evaluate, ["--run", str(tmp_path / "empty")], "holds no complete checkpoint"),
        (evaluate, ["--run", str(reference), "--weights", "avg", "--last", "0"], "--last: must be at least 1"),
        (sample, ["--run", str(reference), "--n", "0"], "--n: must be at least 1"),
        (sample, ["--run", str(reference), "--temperature", "0"], "--temperature: must be above 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        assert tool.main() == 2
        text = capsys.readouterr().err
        assert words in text
        assert len(text.splitlines()) == 1


# What a newcomer gets wrong first. These fail before any process group exists, so they run in this process.


def failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str, ranks: int = 1
) -> str:
    """The message of a job that must end with exit code 2 and no traceback."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if "MASTER_PORT" not in os.environ:
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(sys, "argv", ["trainer/run.py", *arguments])
    assert run.main() == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1
    return text


def test_mistakes_of_a_first_run_end_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: Path
) -> None:
    def fail(**changes: object) -> str:
        ranks = int(str(changes.pop("ranks", 1)))
        arguments = ["--config", str(SMALL_JOB), *settings(tmp_path / "run", splits, **changes)]
        return failure(capsys, monkeypatch, *arguments, ranks=ranks)

    assert "no such config file" in failure(capsys, monkeypatch, "--config", "configs/none.yaml")
    assert "did you mean train.steps?" in fail(train__step=3)
    assert f"no shards at {tmp_path}/nothing" in fail(data__train_url=tmp_path / "nothing")
    assert "8x8, and model.image_size is 16" in fail(model__image_size=16)
    assert "holds 3,000 images, too few" in fail(train__global_batch_images=4096)
    assert "16 or 24 would be" in fail(train__global_batch_images=20, ranks=2)
    assert "wants 4 ranks (run.world_size) and was launched with 1" in fail(run__world_size=4)
    assert "classes, and model.num_classes is 5" in fail(model__num_classes=5)
    monkeypatch.setenv("CXX", "/bin/false")
    offload = {
        "train__zero_stage": 3,
        "train__offload_parameters__kind": "nvme",
        "train__offload_parameters__dir": tmp_path,
    }
    assert "needs a C++ compiler and the package libaio-dev" in fail(**offload, train__precision="bf16")
    assert "offload_parameters: nvme needs precision bf16 or fp16" in fail(**offload, train__precision="fp32")
    (tmp_path / "unlabelled").mkdir()
    for index in range(8):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"unlabelled/{index}.png")
    pack = ["--source", "folder", "--input", str(tmp_path / "unlabelled"), "--dest", str(tmp_path / "shards")]
    assert pack_main([*pack, "--size", "8", "--split", "train", "--workers", "1"]) == 0
    capsys.readouterr()
    text = fail(data__train_url=tmp_path / "shards", model__num_classes=12)
    assert f"{tmp_path}/shards holds images without labels, and model.num_classes is 12; set it to 0" in text
    (tmp_path / "file").write_text("")
    assert f"cannot write to {tmp_path}/file/run" in fail(run__dir=tmp_path / "file/run")
    text = fail(run__dir=tmp_path / "other", checkpoint__url=tmp_path / "file/checkpoints")
    assert f"checkpoint.url: cannot write to {tmp_path}/file/checkpoints (Not a directory)" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_before_training_ends_at_once(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    splits: Path,
    number: signal.Signals,
    code: int,
) -> None:
    def ask_and_be_interrupted(config: object, ranks: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(run, "check_machine", ask_and_be_interrupted)
    arguments = settings(tmp_path / "run", splits)
    monkeypatch.setattr(sys, "argv", ["trainer/run.py", "--config", str(SMALL_JOB), *arguments])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
    assert run.main() == code
    sentence = f"stopped on request ({number.name}) before training began; the same command starts it again\n"
    assert capsys.readouterr().err == sentence and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_libraries_are_loaded_ends_at_once(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "trainer/run.py", "--config", str(SMALL_JOB)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )
    deadline = time.monotonic() + 60
    while not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert text == f"stopped on request ({number.name}) before training began; the same command starts it again\n"


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_rank_that_is_asked_to_stop_before_training_stops_the_others(tmp_path: Path, splits: Path) -> None:
    arguments = settings(tmp_path / "run", splits)
    ranks = start(arguments, ranks=2, sabotage={1: sabotage.it_is_asked_to_stop_before_training})
    code, text = finish(ranks)
    assert (code, ranks[1].returncode) == (75, 75), text
    assert "stopped on request (SIGTERM) before training began" in text and "Traceback" not in text
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    assert (state["state"], state["code"]) == ("stopped", 75)
    assert state["reason"].startswith("rank 1 on ")


def test_bf16_on_a_gpu_without_it_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100-SXM2-16GB")
    arguments = settings(tmp_path / "run", splits, train__precision="bf16")
    text = failure(capsys, monkeypatch, "--config", str(SMALL_JOB), *arguments)
    assert "train.precision: Tesla V100-SXM2-16GB (compute capability 7.0) has no bf16" in text
    assert "take fp16 or fp32" in text and not (tmp_path / "run").exists()


def test_empty_shards_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: Path
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = settings(tmp_path / "run", splits, data__train_url=tmp_path / "empty")
    assert f"no shards at {tmp_path}/empty" in failure(capsys, monkeypatch, "--config", str(SMALL_JOB), *arguments)


def test_a_port_in_use_is_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: Path
) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        text = failure(capsys, monkeypatch, "--config", str(SMALL_JOB), *settings(tmp_path / "run", splits), ranks=2)
    assert f"port {port} of this machine is in use" in text
    assert f"--master_port {port + 1}" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path, splits: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    code = (
        "import os, sys\n"
        "from trainer.startup import prepare_run_folder\nfrom trainer.config import load_config\n"
        "from trainer.ranks import Ranks\nfrom trainer.errors import UsageError\n"
        "class Data: digest = 'x'\n"
        "os.setuid(65534)\n"
        f"config = load_config({str(SMALL_JOB)!r}, ['run.dir={locked}/run'])\n"
        "try: prepare_run_folder(config, Data(), Ranks(0, 1, 0, 1))\n"
        "except UsageError as error: print(error); sys.exit(2)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert f"run.dir: cannot write to {locked}/run (Permission denied)" in result.stdout


@pytest.mark.parametrize("filled", ["cat /dev/zero", "head -c 32768 /dev/zero"])
def test_a_folder_on_a_full_disk_is_refused_with_exit_code_73(tmp_path: Path, splits: Path, filled: str) -> None:
    disk = tmp_path / "disk"
    run_dir = disk / "run"
    arguments = ["--config", str(SMALL_JOB), *settings(tmp_path / "run", splits, run__dir=run_dir)]
    fill = f'mkdir "$1/run" && {filled} > "$1/filler" 2> /dev/null; shift; exec "$@"'
    result = on_small_disk(disk, 64, fill, str(disk), sys.executable, str(ROOT / "trainer/run.py"), *arguments)
    assert result.returncode == 73, result.stderr
    assert f"error: run.dir: no space is left in {run_dir}" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_folder_of_another_run_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reference: Path, splits: Path
) -> None:
    arguments = settings(reference, splits, train__steps=STEPS, model__ff_width=32)
    text = failure(capsys, monkeypatch, "--config", str(SMALL_JOB), *arguments)
    assert f"run.dir: {reference} holds another run: model.ff_width 16 there, 32 here; choose another run.dir" in text


def test_check_prints_config_size_and_deepspeeds_part_without_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments = ["--config", str(SMALL_JOB), "--check", *settings(tmp_path / "run", splits)]
    monkeypatch.setattr(sys, "argv", ["trainer/run.py", *arguments])
    assert run.main() == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text.partition("\nparameters:")[0])
    assert shown["model"]["layers"] == 2
    assert '"gradient_accumulation_steps": 2' in text
    assert not (tmp_path / "run").exists()
