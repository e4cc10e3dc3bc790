"""Is a script filled in with exactly what was asked for, and every mistake refused before Slurm sees it?"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import submit

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", str(ROOT / "tests/support/small_job.yaml"), "--no-check"]
SITE = ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_EXCLUDE", "GPUS_PER_NODE", "CPUS_PER_TASK", "INTERFACE")


@pytest.fixture(autouse=True)
def bare_site(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SITE, "CONTAINER", "PREFLIGHT", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)


def dry_run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert submit.main([*options, "--dry-run"]) == 0
    return capsys.readouterr().out


def flags(script: str) -> dict[str, str]:
    """What Slurm reads: the flags before the first command, the last of each name."""
    found = {}
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value.strip('"')
    return found


def test_a_training_is_filled_in_from_options_and_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = [*CONFIG, "--nodes", "6-8", "--time", "1-12", "--after", "12,13", "--interface", "ib0"]
    options += ["--set", f"run.dir={tmp_path}/my run", "--set", "tracking.uri=http://mlflow:5000"]
    options += ["--from", "the export", "--venv", str(tmp_path / "venv"), "--cpus-per-task", "12"]
    script = dry_run(capsys, *options, "--warn-seconds", "600")
    assert flags(script) == {
        "requeue": "",
        "open-mode": "append",
        "signal": "B:USR1@600",
        "job-name": "small_job",
        "time": "1-12",
        "gpus-per-node": "8",
        "cpus-per-task": "96",
        "dependency": "afterok:12:13",
        "kill-on-invalid-dep": "yes",
        "nodes": "6-8",
        "output": f"{tmp_path}/my run/logs/slurm-%j.log",
    }
    for line in (
        f"export RUN_DIR='{tmp_path}/my run'",
        f"export PYTHON={python}",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export MIN_NODES=6",
        "export TASKS_PER_NODE=8",
        "export CPUS_PER_TASK=12",
        "export WARN_SECONDS=600",
        f"set -- {' '.join(CONFIG[:2])} --set 'run.dir={tmp_path}/my run' --set tracking.uri=http://mlflow:5000"
        " --from 'the export'",
    ):
        assert line in script.splitlines()
    assert "--data-url data/quickstart/train" in script
    assert "--mlflow-uri http://mlflow:5000" in script
    assert "--checkpoint-url" not in script
    assert not (tmp_path / "my run").exists()


def test_the_site_comes_from_the_environment_and_options_win(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SBATCH_PARTITION": "a100", "SBATCH_ACCOUNT": "me", "GPUS_PER_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CONTAINER", "apptainer exec --nv train.sif")
    script = dry_run(capsys, *CONFIG, "--nodes", "2", "--time", "60", "--partition", "h100")
    assert {k: flags(script)[k] for k in ("partition", "account", "gpus-per-node", "cpus-per-task", "nodes")} == {
        "partition": "h100", "account": "me", "gpus-per-node": "4", "cpus-per-task": "4", "nodes": "2"
    }  # fmt: skip
    assert "export CONTAINER='apptainer exec --nv train.sif'" in script


@pytest.mark.skipif(shutil.which("xargs") is None, reason="needs xargs, as a node of a cluster has it")
def test_names_with_spaces_and_quotes_reach_preflight_and_the_container_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONTAINER", "apptainer exec --bind '/my data' train.sif")
    options = ["--set", "data.train_url=/my images/Ümit's", "--set", f"run.dir={tmp_path}"]
    script = dry_run(capsys, *CONFIG, *options, "--nodes", "2", "--time", "60", "--preflight", '--disk "/a b"')
    job = "".join(line for line in script.splitlines(keepends=True) if not line.startswith("#SBATCH"))
    job = job.replace('exec "$python"', "printf '%s\\n'")
    result = subprocess.run(["bash", "-c", job], capture_output=True, text=True, check=True)
    words = result.stdout.splitlines()
    for name, value in (("--data-url", "/my images/Ümit's"), ("--disk", "/a b"), ("--bind", "/my data")):
        assert (name, value) in zip(words, words[1:], strict=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*CONFIG, "--nodes", "8", "--time", "tomorrow"], "--time tomorrow: write minutes"),
        ([*CONFIG, "--nodes", "0", "--time", "5"], "--nodes 0: must be a number, or MIN-MAX"),
        ([*CONFIG, "--nodes", "8-2", "--time", "5"], "--nodes 8-2: must be"),
        ([*CONFIG, "--time", "5"], "--job train needs --nodes"),
        (["--nodes", "2", "--time", "5"], "--job train needs --config"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--after", "x"], "--after x: must be the number of a job"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--gpus-per-node", "-1"], "--gpus-per-node -1: must be at least 0"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--tasks-per-node", "3"], "one task is one GPU"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--set", "steps=3"], "--set steps=3: write it as section.key=value"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--partition", 'a"b'], "must not hold quotes"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--", "more"], "is for evaluate and pack"),
        (["--config", "none.yaml", "--nodes", "2", "--time", "5"], "none.yaml: no such config file"),
        ([*CONFIG, "--nodes", "2", "--time", "5", "--venv", "/none"], "--venv /none: cannot run /none/bin/python"),
        (["--job", "pack", "--time", "5", "--", "x"], "--job pack needs --tasks"),
        (["--job", "pack", "--tasks", "0", "--time", "5", "--", "x"], "--tasks 0: must be at least 1"),
        (["--job", "evaluate", "--time", "5"], "--job evaluate needs the program's arguments"),
    ],
)
def test_mistakes_end_in_one_sentence(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main([*options[:-2], "--dry-run", *options[-2:]] if "--" in options else [*options, "--dry-run"]) == 2
    text = capsys.readouterr().err
    assert words in text
    assert len(text.splitlines()) == 1


def test_a_config_that_the_trainer_refuses_ends_with_its_words_and_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("run: {name: x}\n")
    assert submit.main(["--config", str(tmp_path / "c.yaml"), "--nodes", "1", "--time", "5", "--dry-run"]) == 2
    assert "run.dir" in capsys.readouterr().err
    # Without --no-check the data has to be there, too.
    options = [*CONFIG[:2], "--set", f"data.train_url={tmp_path}/nowhere", "--set", "train.global_batch_images=32"]
    assert submit.main([*options, "--nodes", "1", "--time", "5", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert f"no shards at {tmp_path}/nowhere" in captured.err and captured.out == ""


def test_values_are_those_the_trainer_uses_not_those_that_stand_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain YAML would take the second of two sections `run`; the trainer refuses them."""
    text = (ROOT / "tests/support/small_job.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text)
    options = ["--config", str(tmp_path / "c.yaml"), "--no-check", "--nodes", "1", "--time", "5"]
    script = dry_run(capsys, *options, "--set", "checkpoint.url=s3://bucket/run", "--set", "run.name=a b")
    assert "--checkpoint-url s3://bucket/run" in script and flags(script)["job-name"] == "a_b"
    (tmp_path / "c.yaml").write_text(text + "run: {name: x, dir: y}\n")
    assert submit.main([*options, "--dry-run"]) == 2


def test_what_sbatch_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for sbatch that notes its input; the real one is in tests/lab."""
    tools = tmp_path / "bin"
    tools.mkdir()
    options = [*CONFIG, "--nodes", "1", "--time", "5", "--set", f"run.dir={tmp_path}/run"]
    monkeypatch.setenv("PATH", str(tools))
    assert submit.main(options) == 69
    assert "cannot run sbatch" in capsys.readouterr().err
    sbatch = tools / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\n/bin/cat > {tmp_path}/script\necho "$SBATCH_PARTITION" > {tmp_path}/partition\necho 42\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("SBATCH_PARTITION", "main")
    assert submit.main(options) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["job: 42", f"log: {tmp_path}/run/logs/slurm-42.log"]
    assert flags((tmp_path / "script").read_text())["partition"] == "main"
    assert (tmp_path / "partition").read_text() == "\n"  # Slurm would let it win over --partition
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert submit.main(options) == 69
    assert "submit: sbatch: error: invalid partition" in capsys.readouterr().err


def test_the_link_leads_to_the_run_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self) -> bytes:
            return json.dumps({"experiment": {"experiment_id": "7"}}).encode()

    tracking = {"tracking": {"uri": "http://mlflow:5000/", "experiment": "big"}}
    monkeypatch.setattr(submit.urllib.request, "urlopen", lambda *a, **k: Answer())
    assert submit.mlflow_link(tracking, str(tmp_path)) == "mlflow: http://mlflow:5000/#/experiments/7"
    (tmp_path / "run_state.json").write_text('{"mlflow_run_id": "abc"}')
    assert submit.mlflow_link(tracking, str(tmp_path)).endswith("/#/experiments/7/runs/abc")
    monkeypatch.undo()
    tracking["tracking"]["uri"] = "http://127.0.0.1:9"
    assert "made when the run begins" in submit.mlflow_link(tracking, str(tmp_path))
    tracking["tracking"]["uri"] = "sqlite:///mlflow.db"
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in submit.mlflow_link(tracking, str(tmp_path))


def test_the_scripts_are_clean(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scripts = [*ROOT.glob("cluster/*.sbatch"), ROOT / "tests/lab/run"]
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_it_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster.submit", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--dry-run" in result.stdout
