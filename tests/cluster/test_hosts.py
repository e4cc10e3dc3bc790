"""Is every hostfile and environment refused that DeepSpeed's launcher would misread, print or run?"""

import os
from pathlib import Path

import pytest
from deepspeed.launcher.runner import EXPORT_ENVS, fetch_hostfile
from hypothesis import given
from hypothesis import strategies as st

from cluster import hosts

ROOT = Path(__file__).resolve().parents[2]


def check(folder: Path, content: str | bytes, **environment: str) -> tuple[int, str]:
    """The exit code and the text for a hostfile of this content."""
    path = folder / "hosts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    _, problems = hosts.check(path, None, environment | {"HOME": str(folder / "home")})
    return max((p.code for p in problems), default=0), "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("node1 slots=8\n\n# spare\nnode-2.cluster.example\tslots=8  \n10.0.0.3 slots=4\n", 0, ""),
        ("worker_1 slots=2\nmy_app-worker_2.lan slots=2\n", 0, ""),
        ("-oProxyCommand=touch${IFS}owned slots=2\n", 77, ":1: '-oProxyCommand=touch${IFS}owned' would be an option"),
        ("node1 slots=1\n  -F/tmp/x slots=1\n", 77, ":2: '-F/tmp/x' would be an option of ssh"),
        ("node1;reboot slots=2\n", 77, "'node1;reboot' is not a host's name"),
        ("$(reboot) slots=2\n", 77, "is not a host's name"),
        ("node[1-4] slots=2\n", 77, "is not a host's name"),
        ("root@node1 slots=2\n", 2, "belongs in ~/.ssh/config"),
        ("node1:2222 slots=2\n", 2, "belongs in ~/.ssh/config"),
        ("10.0.0.300 slots=2\n", 2, "'10.0.0.300' is not a host's name"),
        ("node1 slots=0\n", 2, ":1: slots=0: must be 1 to 64, the GPUs of node1"),
        ("node1 slots=99999\n", 2, "slots=99999: must be 1 to 64"),
        ("node1 slots=" + "9" * 5000 + "\n", 2, "must be 1 to 64"),
        ("node1 slots=8; rm -rf x\n", 2, "nothing may follow the number"),
        ("node1 slots=8 node2 slots=8\n", 2, "nothing may follow the number"),
        ("node1 slots=8 # the good one\n", 2, "nothing may follow the number"),
        ("node1\n", 2, "'node1' is not `NAME slots=GPUS`"),
        ("node1 slots = 8\n", 2, "is not `NAME slots=GPUS`"),
        ("node1 slots=8\nnode2 slots=8\nnode1 slots=4\n", 2, ":3: node1 stands on line 1 already"),
        ("node1 slots=8\r\n", 2, "ends like a Windows text file"),
        (b"\xef\xbb\xbfnode1 slots=8\n", 2, ":1: holds bytes that are not ASCII"),
        ("node1 slots=8\nn\u043ede2 slots=8\n", 2, ":2: holds bytes that are not ASCII"),
        ("\x0c\n", 77, "is not a host's name"),
        ("", 2, "names no host"),
        ("# nothing\n", 2, "names no host"),
        (b"node1 slots=1\n" * 100_000, 2, "larger than 1 MiB"),
    ],
)
def test_a_hostfile_is_taken_or_refused_with_line_and_reason(
    content: str | bytes, code: int, words: str, tmp_path: Path
) -> None:
    found, text = check(tmp_path, content)
    assert found == code, text
    assert words in text


@given(st.text(alphabet="ab1.-_= \tslot#\n\r\x0c;$'\"", max_size=60))
def test_whatever_passes_means_the_same_to_deepspeed(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    path = tmp_path_factory.mktemp("any") / "hosts"
    path.write_bytes(content.encode())
    accepted, problems = hosts.read_hosts(path)
    if not problems:
        assert dict(fetch_hostfile(str(path))) == accepted


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    _, text = check(tmp_path, "a slots=0\nb\n-c slots=1\n")
    assert [line.split(":")[1] for line in text.splitlines()] == ["1", "2", "3"]


def test_the_expected_number_of_ranks_catches_a_mistyped_path_and_a_missing_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hosts.main(["check", str(tmp_path / "none"), "--world-size", "2"]) == 2
    assert "no such hostfile; DeepSpeed would train on this machine alone" in capsys.readouterr().err
    (tmp_path / "hosts").write_text("a slots=4\nb slots=2\n")
    assert hosts.main(["check", str(tmp_path / "hosts"), "--world-size", "8"]) == 2
    assert "gives 6 slots (a 4, b 2), and --world-size is 8" in capsys.readouterr().err
    assert hosts.main(["check", str(tmp_path / "hosts"), "--world-size", "6"]) == 0
    assert "2 hosts, 6 slots" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "hunter2", 77),
        ("MLFLOW_TRACKING_TOKEN", "hunter2", 77),
        ("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example", 77),
        ("MLFLOW_TRACKING_PASSWORD", "", 0),
        ("MLFLOW_TRACKING_URI", "https://mlflow.example", 0),
        ("MLFLOW_EXPERIMENT_NAME", "a$(touch owned)hunter2", 77),
        ("PYTHONSTARTUP", 'x"; touch hunter2; "', 77),
        ("PYTHONUNBUFFERED", "1", 0),
        ("NCCL_DEBUG", "INFO", 0),
        ("AWS_SECRET_ACCESS_KEY", "hunter2", 0),  # not forwarded, so not printed
    ],
)
def test_a_secret_that_the_launcher_would_print_is_refused_and_not_repeated(
    name: str, value: str, code: int, tmp_path: Path
) -> None:
    found, text = check(tmp_path, "node1 slots=1\n", **{name: value})
    assert found == code, text
    assert "hunter2" not in text
    assert (name in text) == (code != 0)


def test_every_variable_that_this_deepspeed_forwards_is_looked_at() -> None:
    assert set(EXPORT_ENVS) <= set(hosts.FORWARDED)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("GLOO_SOCKET_IFNAME=eth0", 0, ""),
        ("EMPTY=", 0, ""),
        ("AWS_SHARED_CREDENTIALS_FILE=/home/me/s3", 0, ""),
        ("AWS_SECRET_ACCESS_KEY=hunter2", 77, "keep it in ~/.aws/credentials"),
        ("HF_TOKEN=hunter2", 77, "a file that only you can read"),
        ("# comment", 2, "takes no comments and no empty lines"),
        ("", 2, "takes no comments and no empty lines"),
        ("A;touch x=1", 2, "is not NAME=VALUE"),
        ("A=$(touch x)", 77, "the shell of the other host would act on"),
    ],
)
def test_a_file_of_variables_is_checked_line_by_line(line: str, code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_text(f"OMP_NUM_THREADS=1\n{line}\nLAST=1\n")
    found, text = check(tmp_path, "node1 slots=1\n")
    assert found == code, text
    assert words in text
    assert "hunter2" not in text
    assert (".deepspeed_env:2" in text) == (code != 0)


def test_the_hostfile_of_the_project_passes() -> None:
    assert hosts.read_hosts(ROOT / "cluster/hosts") == ({"localhost": 1}, [])


def test_a_user_without_a_home_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_000_930_000)  # a container's, which has no name
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    assert hosts.check(tmp_path / "hosts", None, {}) == ({"node1": 8}, [])
