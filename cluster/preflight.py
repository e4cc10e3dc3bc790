"""Are all machines of a job fit for it, before it burns their time? One table, the worst machine first.

    deepspeed --hostfile cluster/hosts --module cluster.preflight --hostfile cluster/hosts --run-dir runs/big \\
        --data-url s3://bucket/imagenet64/train

runs on every rank, started as the training is; cluster/train.sbatch runs it by itself. On each machine it checks code,
versions, GPUs, memory, disks, locks of killed builds, reading shards, writing checkpoints, MLflow and the clock.
Between machines it checks who reaches whom, all-reduce and all-gather, and the slowest pair. It names ranks that never
came.

exit codes: 0 all machines are fit · 2 options · 69 some are not; the last line names them: `bad nodes: n3 n7`
"""

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from cluster import links
from cluster.hosts import read_hosts
from cluster.machine_checks import Report, Wanted, check_machine

FIT, USAGE, UNFIT = 0, 2, 69
STORE_FRACTION = 0.1
"""A machine that reads shards slower than this fraction of the median is unfit."""
GROUP_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run.dir of the config, which all machines share")
    parser.add_argument("--data-url", action="append", default=[], help="folder of shards; repeatable")
    parser.add_argument("--checkpoint-url", help="checkpoint.url of the config, if it is not below the run's folder")
    parser.add_argument("--mlflow-uri", help="tracking.uri of the config")
    parser.add_argument("--disk", type=Path, action="append", default=[], help="folder that needs space; repeatable")
    parser.add_argument("--min-disk-gib", type=float, default=1.0, help="free space of run-dir and each --disk (1)")
    parser.add_argument("--min-memory-gib", type=float, default=1.0, help="free memory of each machine (1)")
    parser.add_argument("--max-clock-seconds", type=float, default=2.0, help="how wrong a clock may be (2)")
    parser.add_argument("--link-fraction", type=float, default=0.25, help="least speed of a link / usual speed (0.25)")
    parser.add_argument("--min-link-gbit", type=float, default=0.0, help="least speed of a link in Gbit/s (0)")
    parser.add_argument(
        "--wait-seconds", type=float, default=120.0, help="wait so long for ranks that start late (120)"
    )
    parser.add_argument("--store-seconds", type=float, default=30.0, help="wait so long for the answer of a store (30)")
    parser.add_argument("--nodes", nargs="+", default=[], help="names of all machines, to name those that never came")
    parser.add_argument("--hostfile", type=Path, help="the same, from a hostfile")
    parser.add_argument("--bad-nodes-to", type=Path, help="file for the names of bad machines, one a line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by DeepSpeed's launcher
    options = parser.parse_args(arguments)
    for name in ("min_disk_gib", "min_memory_gib", "max_clock_seconds", "link_fraction", "wait_seconds"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')}: must not be negative")
    return Preflight(options).run()


class Preflight:
    """One rank's part; rank 0 also collects and judges."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        environment = os.environ
        self.rank = int(environment.get("RANK", "0"))
        self.world = int(environment.get("WORLD_SIZE", "1"))
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))
        self.address = environment.get("MASTER_ADDR", "127.0.0.1")
        self.port = int(environment.get("MASTER_PORT", "29500"))
        self.node = environment.get("SLURMD_NODENAME") or socket.gethostname()
        self.patience = options.wait_seconds

    def run(self) -> int:
        """Check, meet the others, judge; the exit code, which is the same on all ranks."""
        try:
            # Rank 0 holds the store. Nobody waits here until all are there: a rank that does not come is a finding.
            self.store = TCPStore(
                self.address, self.port, None, self.rank == 0, timedelta(seconds=self.patience), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if self.rank == 0:
                say(f"{self.node}: port {self.port} is in use, perhaps by another job ({reason})")
                self._write_bad([self.node])
            else:
                say(f"{self.node}: cannot reach rank 0 at {self.address}:{self.port} ({reason})")
            return UNFIT
        try:
            self._examine()
            reports = self._collect() if self.rank == 0 else None
            self._connect(reports)
            if reports is not None:
                verdict = self._judge(reports)
                self.store.set("verdict", str(verdict))
                # The store goes with this process: the others need a moment to read the verdict.
                self._wait(lambda: self.store.add("read", 0) >= len(reports.ranks) - 1, 10.0)
                return verdict
            verdict = int(self._get("verdict"))
            self.store.add("read", 1)
            return verdict
        except (RuntimeError, ValueError) as error:  # the store is gone, and rank 0 with it
            say(f"{self.node}: rank {self.rank} lost rank 0 ({str(error).splitlines()[0]})")
            return UNFIT

    def _examine(self) -> None:
        """What this rank finds out alone, put into the store."""
        report = Report(self.node, self.rank)
        token = self.options.run_dir / f".preflight-{self.port}"
        if self.rank == 0:
            self.options.run_dir.mkdir(parents=True, exist_ok=True)
            token.write_text(self.node)
            self.store.set("token", "written")
        wanted = Wanted(
            run_dir=self.options.run_dir,
            data_urls=self.options.data_url,
            checkpoint_url=self.options.checkpoint_url,
            mlflow_uri=self.options.mlflow_uri,
            disks=self.options.disk,
            min_disk_gib=self.options.min_disk_gib,
            min_memory_gib=self.options.min_memory_gib,
            seconds=self.options.store_seconds,
        )
        check_machine(report, wanted, first_on_machine=self.local_rank == 0)
        self._get("token")
        if not token.exists():
            report.problems.append(f"mount: {self.options.run_dir} is another folder here than on rank 0's machine")
        if self.local_rank == 0:
            self.clock = links.Clock()
            own = links.address_towards(self.address, self.port)
            report.values["listens"] = [self.address if self.rank == 0 else own, self.clock.port]
        self.store.set(f"machine/{self.rank}", json.dumps(asdict(report)))

    def _collect(self) -> "Reports":
        """All reports that come in time; rank 0 tells the others who is there."""
        arrived: dict[int, Report] = {}

        def complete() -> bool:
            for rank in range(self.world):
                if rank not in arrived and self.store.check([f"machine/{rank}"]):
                    arrived[rank] = Report(**json.loads(self.store.get(f"machine/{rank}")))
            return len(arrived) == self.world

        self._wait(complete, self.patience)
        reports = Reports(arrived, [self._name_of(rank) for rank in range(self.world) if rank not in arrived])
        self.store.set("machines", json.dumps([[r.rank, r.node, r.values.get("listens")] for r in arrived.values()]))
        (self.options.run_dir / f".preflight-{self.port}").unlink(missing_ok=True)
        return reports

    def _connect(self, reports: "Reports | None") -> None:
        """Reach every machine, compare clocks, then measure among those that are reached."""
        machines = [(rank, node, listens) for rank, node, listens in json.loads(self._get("machines"))]
        leaders = {rank: (node, listens) for rank, node, listens in machines if listens}
        if self.rank in leaders:
            found: dict[str, Any] = {"unreached": [], "offset": 0.0}
            for rank, (_, (address, port)) in leaders.items():
                try:
                    offset = links.clock_offset(address, port) if rank != self.rank else 0.0
                except (OSError, ValueError):
                    found["unreached"].append(rank)
                    continue
                if rank == 0:
                    found["offset"] = -offset
            self.store.set(f"peers/{self.rank}", json.dumps(found))
        if reports is not None:
            peers = {rank: json.loads(self._get(f"peers/{rank}")) for rank in leaders}
            reports.judge_peers(peers, self.options.max_clock_seconds)
            apart = {reports.ranks[rank].node for rank in peers if peers[rank]["unreached"]}
            group = sorted(rank for rank, node, _ in machines if node not in apart)
            self.store.set("group", json.dumps(group if 0 in group else []))
        group = json.loads(self._get("group"))
        if self.rank not in group or len(group) < 2:
            return
        try:
            measured = self._measure(group, sorted(rank for rank in leaders if rank in group))
        except RuntimeError as error:
            measured = {"error": str(error).splitlines()[0]}
        self.store.set(f"links/{self.rank}", json.dumps(measured))
        if reports is not None:
            deadline = time.monotonic() + 2 * GROUP_SECONDS
            for rank in group:
                key = f"links/{rank}"
                self._wait(lambda key=key: self.store.check([key]), max(0.1, deadline - time.monotonic()))  # type: ignore[misc]
                one = json.loads(self.store.get(key)) if self.store.check([key]) else {"error": "did not end"}
                reports.add_links(rank, one)

    def _measure(self, group: list[int], leaders: list[int]) -> dict[str, Any]:
        cuda = torch.cuda.is_available()
        backend = "nccl" if cuda else "gloo"
        device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        links.join(backend, PrefixStore("links", self.store), group.index(self.rank), len(group), GROUP_SECONDS)
        try:
            speeds = links.collective_speeds(device)
            places = [group.index(rank) for rank in leaders]
            pairs = links.pair_speeds(backend, device, places) if len(leaders) > 1 else {}
        finally:
            torch.distributed.destroy_process_group()
        return speeds | {"pairs": {str(group[place]): speed for place, speed in pairs.items()}}

    def _judge(self, reports: "Reports") -> int:
        """Compare, print the table, and write the names of bad machines."""
        reports.compare()
        reports.judge_links(self.options.link_fraction, self.options.min_link_gbit)
        print(reports.table(), flush=True)
        bad = reports.bad_nodes()
        self._write_bad(bad)
        if bad:
            print(f"bad nodes: {' '.join(bad)}", flush=True)
        return UNFIT if bad else FIT

    def _write_bad(self, nodes: list[str]) -> None:
        if self.options.bad_nodes_to is not None:
            self.options.bad_nodes_to.write_text("".join(f"{node}\n" for node in nodes))

    def _name_of(self, rank: int) -> str:
        """The machine of a rank that never came, as far as anybody told us."""
        if self.options.nodes:
            return str(self.options.nodes[rank * len(self.options.nodes) // self.world])
        if self.options.hostfile is not None:
            hosts, _ = read_hosts(self.options.hostfile)
            places = [host for host, slots in hosts.items() for _ in range(slots)]
            if rank < len(places):
                return places[rank]
        return f"the machine of rank {rank}"

    def _get(self, key: str) -> str:
        # The slowest rank may use up the whole time of each earlier phase.
        self.store.wait([key], timedelta(seconds=self.patience + 3 * GROUP_SECONDS))
        return str(self.store.get(key).decode())

    def _wait(self, holds: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.05)


class Reports:
    """Everything that rank 0 knows of the machines."""

    def __init__(self, ranks: dict[int, Report], missing: list[str]) -> None:
        self.ranks = ranks
        self.missing = Counter(missing)
        self.links: dict[tuple[str, str], float] = {}
        self.speeds: dict[str, float] = {}

    def judge_peers(self, peers: dict[int, dict[str, Any]], max_clock_seconds: float) -> None:
        """Problems of machines that are not reached, and of clocks that differ from the middle one."""
        for rank, found in peers.items():
            for other in found["unreached"]:
                self.ranks[rank].problems.append(f"network: does not reach {self.ranks[other].node}")
        offsets = [peers[rank]["offset"] for rank in sorted(peers)]
        middle = statistics.median_low(offsets) if len(offsets) > 2 else offsets[0]  # of two, rank 0 is right
        for rank, found in peers.items():
            offset = found["offset"] - middle
            self.ranks[rank].values["clock_s"] = offset
            if abs(offset) > max_clock_seconds:
                where = "ahead of" if offset > 0 else "behind"
                self.ranks[rank].problems.append(f"clock: {abs(offset):.1f} s {where} the others")

    def add_links(self, rank: int, measured: dict[str, Any]) -> None:
        if "error" in measured:
            self.ranks[rank].problems.append(f"network: rank {rank} cannot exchange data ({measured['error']})")
            return
        self.speeds = {name: speed for name, speed in measured.items() if name != "pairs"}
        for other, speed in measured["pairs"].items():
            pair = sorted((self.ranks[rank].node, self.ranks[int(other)].node))
            key = (pair[0], pair[1])
            self.links[key] = min(speed, self.links.get(key, speed))

    def judge_links(self, fraction: float, least_gbit: float) -> None:
        """Problems of machines whose every link is slow, by comparison or absolutely."""
        slow = links.slow_nodes(self.links, fraction)
        for report in self._leaders():
            own = [speed for pair, speed in self.links.items() if report.node in pair]
            if own:
                report.values["link_gbit"] = max(own)
            if report.node in slow:
                report.problems.append(
                    f"link: {slow[report.node]:.3f} Gbit/s, under {fraction:g} of what is usual here"
                )
            elif own and max(own) < least_gbit:
                report.problems.append(f"link: {max(own):.3f} Gbit/s, {least_gbit:g} wanted")

    def compare(self) -> None:
        """Problems of ranks whose code or versions differ from most others, and of slow reading."""
        ranks = [self.ranks[rank] for rank in sorted(self.ranks)]
        code = _usual([report.values["code"] for report in ranks])
        known = {report.values["code"]: report.values["commit"] for report in ranks}
        for report in ranks:
            if report.values["code"] != code:
                own = f"{report.values['commit'] or 'no commit'}, digest {report.values['code']}"
                report.problems.append(f"code: {own}; the others have {known[code] or 'no commit'}, digest {code}")
        for name in ranks[0].values["versions"]:
            usual = _usual([report.values["versions"].get(name) for report in ranks])
            for report in ranks:
                if (own := report.values["versions"].get(name)) != usual:
                    report.problems.append(f"version: {name} {own}; the others have {usual}")
        speeds = [r.values["store_mb_s"] for r in ranks if "store_mb_s" in r.values]
        for report in ranks:
            speed = report.values.get("store_mb_s")
            if speed is not None and len(speeds) >= 3 and speed < STORE_FRACTION * statistics.median(speeds):
                report.problems.append(f"shards: {speed:.1f} MB/s, the others {statistics.median(speeds):.1f}")

    def bad_nodes(self) -> list[str]:
        """Names of unfit machines, the worst first."""
        return [node for node, problems, _ in self._by_badness() if problems]

    def table(self) -> str:
        """A line a machine with its values, below it what is wrong with it; the worst machine first."""
        columns = ("clock_s", "memory_gib", "disk_gib", "store_mb_s", "link_gbit")
        titles = ("clock s", "memory GiB", "disk GiB", "shards MB/s", "link Gbit/s")
        nodes = self._by_badness()
        width = max([4, *(len(node) for node, _, _ in nodes)])
        lines = [f"{'node':<{width}}  state  {'commit':<9}" + "".join(f"{title:>13}" for title in titles)]
        for node, problems, warnings in nodes:
            found = [report for report in self._leaders() if report.node == node]
            values = found[0].values if found else {}
            cells = "".join(f"{values[c]:>13.2f}" if c in values else f"{'-':>13}" for c in columns)
            lines.append(f"{node:<{width}}  {'BAD' if problems else 'ok':<5}  {values.get('commit', ''):<9}{cells}")
            lines += [f"{'':<{width}}  - {text}" for text in problems]
            lines += [f"{'':<{width}}  (warning) {text}" for text in warnings]
        if self.speeds:
            speeds = self.speeds
            lines.append(
                f"all-reduce {speeds['all_reduce']:.2f} Gbit/s, all-gather {speeds['all_gather']:.2f} Gbit/s a rank"
            )
        if self.links:
            pair, speed = min(self.links.items(), key=lambda item: item[1])
            lines.append(f"slowest pair: {pair[0]} and {pair[1]}, {speed:.3f} Gbit/s")
        return "\n".join(lines)

    def _leaders(self) -> list[Report]:
        return [report for report in self.ranks.values() if "listens" in report.values]

    def _by_badness(self) -> list[tuple[str, list[str], list[str]]]:
        problems: dict[str, list[str]] = {report.node: [] for report in self.ranks.values()}
        warnings: dict[str, list[str]] = {report.node: [] for report in self.ranks.values()}
        for rank in sorted(self.ranks):
            report = self.ranks[rank]
            # Ranks of one machine find the same.
            problems[report.node] += [text for text in report.problems if text not in problems[report.node]]
            warnings[report.node] += [text for text in report.warnings if text not in warnings[report.node]]
        for node, count in self.missing.items():
            problems.setdefault(node, []).append(f"start: {count} of its ranks did not come")
        return [
            (node, problems[node], warnings.get(node, []))
            for node in sorted(problems, key=lambda node: (-len(problems[node]), -len(warnings.get(node, [])), node))
        ]


def _usual(values: list[Any]) -> Any:
    """The most frequent value; of equally frequent ones the first, which is rank 0's."""
    return Counter(values).most_common(1)[0][0]


def say(text: str) -> None:
    print(f"preflight: {text}", file=sys.stderr, flush=True)


def end(code: int) -> None:
    """End without waiting for threads that still wait for a store."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
