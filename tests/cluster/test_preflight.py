"""Does preflight judge machines by what is usual, name those that never came, and agree on all ranks?"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.machine_checks import Report
from cluster.preflight import Reports
from tests.support.launch import ROOT, free_port
from tests.support.s3_server import S3Server


def reports(count: int = 4, missing: tuple[str, ...] = ()) -> Reports:
    """So many machines of one rank each that are alike."""
    values = {"code": "aaaa", "commit": "c1", "versions": {"torch": "2.13"}, "listens": ["10.0.0.1", 1]}
    ranks = {r: Report(f"n{r}", r, values | {"store_mb_s": 100.0, "versions": {"torch": "2.13"}}) for r in range(count)}
    return Reports(ranks, list(missing))


def peers(count: int, **offsets: float) -> dict[int, dict[str, object]]:
    return {r: {"unreached": [], "offset": offsets.get(f"n{r}", 0.0)} for r in range(count)}


def test_machines_that_are_alike_are_fit() -> None:
    found = reports()
    found.compare()
    found.judge_peers(peers(4, n1=0.01), 2.0)
    found.judge_links(0.25, 0.0)
    assert found.bad_nodes() == []
    assert "BAD" not in found.table()


def test_the_odd_one_out_is_named_even_if_it_is_rank_0() -> None:
    for odd in (0, 2):
        found = reports()
        found.ranks[odd].values |= {"code": "bbbb", "commit": "c2"}
        found.ranks[3].values["versions"]["torch"] = "2.12"
        found.compare()
        assert found.ranks[odd].problems == ["code: c2, digest bbbb; the others have c1, digest aaaa"]
        assert found.ranks[3].problems == ["version: torch 2.12; the others have 2.13"]
        assert sorted(found.bad_nodes()) == sorted([f"n{odd}", "n3"])


def test_of_two_machines_the_one_that_differs_from_rank_0_is_named() -> None:
    found = reports(2)
    found.ranks[0].values["code"] = "bbbb"
    found.compare()
    assert found.bad_nodes() == ["n1"]


def test_a_slow_store_a_wrong_clock_and_an_unreached_machine_are_named() -> None:
    found = reports()
    found.ranks[1].values["store_mb_s"] = 1.0
    found.compare()
    others = peers(4, n2=-3600.0)
    others[3]["unreached"] = [0]
    found.judge_peers(others, 2.0)
    assert found.ranks[1].problems == ["shards: 1.0 MB/s, the others 100.0"]
    assert found.ranks[2].problems == ["clock: 3600.0 s behind the others"]
    assert found.ranks[3].problems == ["network: does not reach n0"]


def test_when_rank_0s_own_clock_is_off_it_is_rank_0_that_is_named() -> None:
    found = reports()
    found.judge_peers(peers(4, n1=50.0, n2=50.1, n3=49.9), 2.0)
    assert found.bad_nodes() == ["n0"]


def test_of_two_clocks_rank_0s_is_taken_for_right() -> None:
    for offset in (-50.0, 50.0):
        found = reports(2)
        found.judge_peers(peers(2, n1=offset), 2.0)
        assert found.bad_nodes() == ["n1"]


def test_the_table_shows_the_worst_machine_first_and_each_problem_once() -> None:
    found = reports(missing=("n9", "n9"))
    found.ranks[2].problems += ["disk: full", "memory: full"]
    found.ranks[4] = Report("n2", 4, {}, ["disk: full"])  # the second rank of a machine
    found.ranks[1].warnings.append("MLflow does not answer")
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[1:] if line[0] == "n"] == ["n2", "n9", "n1", "n0", "n3"]
    assert sum("disk: full" in line for line in lines) == 1
    assert any("start: 2 of its ranks did not come" in line for line in lines)
    assert found.bad_nodes() == ["n2", "n9"]


def test_links_are_judged_by_comparison_and_absolutely() -> None:
    found = reports(3)
    for rank, pairs in {0: {"1": 10.0, "2": 1.0}, 1: {"0": 11.0, "2": 0.9}, 2: {"0": 1.1, "1": 1.0}}.items():
        found.add_links(rank, {"all_reduce": 3.0, "all_gather": 2.0, "pairs": pairs})
    found.judge_links(0.25, 0.0)
    assert found.bad_nodes() == ["n2"]
    assert "slowest pair: n1 and n2, 0.900 Gbit/s" in found.table()
    pair = reports(2)
    pair.add_links(0, {"all_reduce": 1.0, "all_gather": 1.0, "pairs": {"1": 1.0}})
    pair.judge_links(0.25, 0.0)
    assert pair.bad_nodes() == []  # two machines alone tell nothing
    pair.judge_links(0.25, 5.0)
    assert sorted(pair.bad_nodes()) == ["n0", "n1"]


WITH_A_CLOCK_TWO_HOURS_BEHIND = (
    "import sys, time\n"
    "right = time.time\n"
    "time.time = lambda: right() - 7200\n"
    "from cluster import preflight\n"
    "preflight.end(preflight.main(sys.argv[1:]))\n"
)


def preflight(
    run_dir: Path,
    *options: str,
    ranks: int = 2,
    port: int | None = None,
    program_of_m1: tuple[str, str] = ("-m", "cluster.preflight"),
    environment_of_m0: dict[str, str] | None = None,
    environment_of_m1: dict[str, str] | None = None,
) -> tuple[list[int], str]:
    """Exit codes and output of real ranks on this machine that call themselves m0, m1, ..."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "LOCAL_RANK": "0"}
    place |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    of_rank = {0: environment_of_m0 or {}, 1: environment_of_m1 or {}}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                *(program_of_m1 if rank == 1 else ("-m", "cluster.preflight")),
                *("--run-dir", str(run_dir), "--min-disk-gib", "0", *options),
            ],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "SLURMD_NODENAME": f"m{rank}"} | of_rank[rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=250)[0] for process in processes]
    return [process.returncode for process in processes], "".join(texts)


def test_two_ranks_agree_that_all_is_well(packed: Path, tmp_path: Path) -> None:
    codes, text = preflight(tmp_path / "run", "--data-url", str(packed), "--mlflow-uri", "http://127.0.0.1:9")
    assert codes == [0, 0], text
    assert "slowest pair: m0 and m1" in text
    assert "(warning) MLflow at http://127.0.0.1:9 does not answer" in text
    assert list((tmp_path / "run").iterdir()) == []


def test_two_ranks_agree_that_something_is_wrong(tmp_path: Path) -> None:
    codes, text = preflight(tmp_path / "run", "--data-url", f"{tmp_path}/none", "--bad-nodes-to", f"{tmp_path}/bad")
    assert codes == [69, 69], text
    assert f"- shards at {tmp_path}/none: FileNotFoundError" in text
    assert (tmp_path / "bad").read_text() == "m0\nm1\n"


def test_a_machine_with_a_wrong_clock_and_without_the_keys_of_the_store_is_named(
    packed: Path, tmp_path: Path, s3_server: S3Server
) -> None:
    bucket = s3_server.make_bucket()
    s3_server.filesystem().put(str(packed), f"{bucket}/train", recursive=True)
    keys = s3_server.environment
    codes, text = preflight(
        tmp_path / "run",
        *("--data-url", f"s3://{bucket}/train"),
        program_of_m1=("-c", WITH_A_CLOCK_TWO_HOURS_BEHIND),
        environment_of_m0=keys,
        environment_of_m1=keys | {"AWS_SECRET_ACCESS_KEY": "the one of somebody else"},
    )
    assert codes == [69, 69], text
    assert "bad nodes: m1\n" in text
    assert f"- shards at s3://{bucket}/train: " in text
    (clock,) = [line for line in text.splitlines() if "clock: " in line]
    assert "behind the others" in clock and 7190 < float(clock.split()[2]) < 7210


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        codes, text = preflight(tmp_path / "run", "--bad-nodes-to", f"{tmp_path}/bad", ranks=1, port=port)
    assert codes == [69]
    assert f"preflight: m0: port {port} is in use, perhaps by another job" in text
    assert (tmp_path / "bad").read_text() == "m0\n"


def test_a_rank_that_never_comes_is_named_by_those_that_did(tmp_path: Path) -> None:
    codes, text = preflight(
        tmp_path / "run",
        *("--wait-seconds", "8", "--nodes", "m0", "m1"),
        program_of_m1=("-c", "pass"),
    )
    assert codes == [69, 0], text
    assert "- start: 1 of its ranks did not come" in text and "bad nodes: m1\n" in text


def test_a_limit_that_makes_no_sense_is_refused() -> None:
    command = [sys.executable, "-m", "cluster.preflight", "--run-dir", "x", "--max-clock-seconds", "-1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--max-clock-seconds: must not be negative" in result.stderr


@pytest.mark.parametrize("late", ["n2", "n3"])
def test_a_rank_that_never_came_is_named_after_its_machine(late: str) -> None:
    assert reports(2, missing=(late,)).bad_nodes() == [late]
