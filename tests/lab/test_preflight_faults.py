"""Does preflight find each fault on real machines, and name the machine that has it and no other?"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.lab import BIN, HEAD_ADDRESS, Lab, Node, run
from tests.support.launch import free_port

pytestmark = pytest.mark.timeout(600)
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


def preflight(
    lab: Lab, folder: Path, data: str, *arguments: str, nodes: int = 3, **special: dict[str, str]
) -> tuple[set[int], str]:
    """The exit codes and output of preflight on so many of the lab's machines; `n2={...}` adds to n2's environment."""
    names = [node.name for node in lab.nodes]
    command = [sys.executable, "-m", "cluster.preflight", "--run-dir", str(folder / "run"), "--nodes", *names]
    command += ["--data-url", f"{data}/train", "--min-disk-gib", "0.01", *arguments]
    place = {"MASTER_ADDR": lab.nodes[0].address, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(names))}
    log = lab.folder / f"{folder.name}.log"
    processes = [
        node.start(*command, log=log.name, environment=place | {"RANK": str(rank)} | special.get(node.name, {}))
        for rank, node in enumerate(lab.nodes[:nodes])
    ]
    codes = {process.wait(400) for process in processes}
    return codes, log.read_text()


def assert_bad(result: tuple[set[int], str], *expected: str) -> None:
    """These machines, and no others, are named in the last line, and every rank's exit code confirms it."""
    codes, text = result
    assert codes == {69}, text
    (line,) = (line for line in text.splitlines() if line.startswith("bad nodes: "))
    names = line.removeprefix("bad nodes: ").split()
    rows = [line.split()[0] for line in text.splitlines() if line.split()[1:2] in (["BAD"], ["ok"])]
    assert rows[: len(names)] == names, text  # the worst first
    assert sorted(names) == sorted(expected), text


@contextmanager
def on(node: Node, do: str, undo: str) -> Iterator[None]:
    """A fault, made by a shell command on a machine and taken back."""
    node.on("bash", "-c", do)
    try:
        yield
    finally:
        node.on("bash", "-c", undo)


def test_machines_that_are_fit_pass_with_a_table(lab: Lab, data: str, tmp_path: Path) -> None:
    codes, text = preflight(lab, tmp_path, data, "--checkpoint-url", f"{data}/checkpoints")
    assert codes == {0}, text
    assert "bad nodes" not in text
    for words in ("shards MB/s", "link Gbit/s", "all-reduce", "slowest pair: n"):
        assert words in text


def test_the_documented_command_starts_it_by_the_hostfile(lab: Lab, data: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=2\n")
    command = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--master_port", str(free_port())]
    command += ["--module", "cluster.preflight", "--hostfile", str(hosts), "--run-dir", str(tmp_path / "run")]
    process = lab.nodes[0].start(*command, "--data-url", f"{data}/train", log="preflight-deepspeed.log")
    assert process.wait(300) == 0, lab.logs()
    assert "slowest pair: n1 and n2" in (lab.folder / "preflight-deepspeed.log").read_text()


def test_another_revision_of_the_code_is_found(lab: Lab, data: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(lab.checkout, other)
    with (other / "trainer/loop.py").open("a") as file:
        file.write("# another revision\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    run("git", *identity, "commit", "-q", "-a", "-m", "Another revision", cwd=other)
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=other).stdout.strip()
    with on(lab.nodes[2], f"mount --bind {other} {lab.checkout}", f"umount -l {lab.checkout}"):
        result = preflight(lab, tmp_path, data)
    assert_bad(result, "n3")
    assert f"- code: {commit}, digest" in result[1]


def test_a_full_disk_is_found(lab: Lab, data: str, tmp_path: Path) -> None:
    disk = tmp_path / "scratch"
    disk.mkdir()
    fill = f"mount -t tmpfs -o size=16m tmpfs {disk} && ! cat /dev/zero > {disk}/full 2>/dev/null"
    with on(lab.nodes[1], fill, f"umount {disk}"):
        result = preflight(lab, tmp_path, data, "--disk", str(disk))
    assert_bad(result, "n2")
    assert f"- disk: 0.00 GiB free in {disk}" in result[1]


def test_a_machine_without_a_route_to_the_store_is_found(lab: Lab, data: str, tmp_path: Path) -> None:
    route = f"unreachable {HEAD_ADDRESS}/32"
    with on(lab.nodes[1], f"ip route add {route}", f"ip route del {route}"):
        result = preflight(lab, tmp_path, data)
    assert_bad(result, "n2")
    assert f"- shards at {data}/train: " in result[1]


def test_a_slow_link_is_found(lab: Lab, data: str, tmp_path: Path) -> None:
    shape = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "20mbit", "burst", "64k", "latency", "400ms")
    if lab.nodes[2].on(*shape, check=False).returncode:
        pytest.skip("this kernel cannot shape traffic (no tbf)")
    try:
        result = preflight(lab, tmp_path, data)
    finally:
        lab.nodes[2].on("tc", "qdisc", "del", "dev", "eth0", "root")
    assert_bad(result, "n3")
    assert "- link: 0.0" in result[1]
    assert "slowest pair: n1 and n3" in result[1] or "slowest pair: n2 and n3" in result[1]


def test_a_clock_that_is_off_is_found(lab: Lab, data: str, tmp_path: Path) -> None:
    wrong = {"LD_PRELOAD": FAKETIME, "FAKETIME": "-90s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    result = preflight(lab, tmp_path, data, n2=wrong)
    assert_bad(result, "n2")
    assert "- clock: 90." in result[1] or "- clock: 89." in result[1]
    assert "behind the others" in result[1]


def test_a_machine_that_sees_another_folder_is_found(lab: Lab, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with on(lab.nodes[1], f"mount -t tmpfs tmpfs {folder}", f"umount {folder}"):
        result = preflight(lab, tmp_path, data)
    assert_bad(result, "n2")
    assert "is another folder here than on rank 0's machine" in result[1]


def test_a_machine_that_never_comes_and_one_with_a_stale_lock_are_named(lab: Lab, data: str, tmp_path: Path) -> None:
    lock = tmp_path / "extensions/py311/shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    names = tmp_path / "bad"
    result = preflight(
        lab, tmp_path, data, "--wait-seconds", "40", "--bad-nodes-to", str(names), nodes=2, n2=extensions
    )
    assert_bad(result, "n2", "n3")
    assert f"a killed build left {lock} 60 minutes ago; remove it" in result[1]
    assert "- start: 1 of its ranks did not come" in result[1]
    assert sorted(names.read_text().split()) == ["n2", "n3"]


def test_an_occupied_port_is_named(lab: Lab, tmp_path: Path) -> None:
    code = "import socket, time; s = socket.create_server(('', 29444)); print('up', flush=True); time.sleep(600)"
    with subprocess.Popen(lab.nodes[0].inside(sys.executable, "-c", code), stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        place = ["env", "RANK=0", "WORLD_SIZE=1", "MASTER_PORT=29444"]
        result = lab.nodes[0].on(
            *place, sys.executable, "-m", "cluster.preflight", "--run-dir", str(tmp_path / "run"), check=False
        )
        lab.nodes[0].on("pkill", "-f", "create_server")
    assert result.returncode == 69
    assert "preflight: n1: port 29444 is in use" in result.stderr
