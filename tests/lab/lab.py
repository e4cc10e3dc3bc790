"""How do tests get a cluster of real machines' parts on one machine: namespaces, cables, sshd, slurmctld and slurmd?

Each node has its own network, host name, processes and /dev/shm; all share the disk. A node is a process, so killing
that process kills the node with everything on it. `tests/lab/run` puts the whole lab into namespaces of its own:
when the tests end, in whatever way, the kernel removes all of it.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD = "head"
HEAD_ADDRESS = "10.77.0.254"
BIN = Path(sys.executable).parent

SSHD_CONFIG = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
"""
SSH_CONFIG = """
Host *
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 10
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
# Process 1 of a node waits for all who lose their parent.
INIT = """
set -eu
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
echo up > {folder}/{name}.up
sleep infinity & wait
"""
SLURM_CONF = """
ClusterName=lab
SlurmctldHost={head}({head_address})
SlurmUser=root
SlurmdUser=root
SlurmctldPort=6817
SlurmdPort=6818
AuthType=auth/munge
# A requeued job waits for cred_expire before it starts again; the default is two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=20
SlurmctldTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
NodeName=n[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=preemptible Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
"""


class Node:
    """One machine: a process that holds its namespaces, reachable by its name from all others."""

    def __init__(self, lab: "Lab", number: int) -> None:
        self.lab = lab
        self.number = number
        self.name = f"n{number}"
        self.address = f"10.77.0.{number}"
        self.holder: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def boot(self) -> None:
        """Start the node with its network and its sshd; a node that was killed comes back."""
        folder = self.lab.folder
        (folder / f"{self.name}.up").unlink(missing_ok=True)
        command = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        init = INIT.format(name=self.name, folder=folder)
        with (folder / f"{self.name}.init.log").open("ab") as log:
            self.holder = subprocess.Popen([*command, "bash", "-c", init], stdin=subprocess.DEVNULL, stderr=log)
        wait_for(lambda: (folder / f"{self.name}.up").exists(), f"{self.name} to boot")
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.pid = int(children.read_text().split()[0])
        plug = ["peer", "name", "eth0", "address", f"02:00:00:00:00:0{self.number}", "netns", str(self.pid)]
        run("ip", "link", "add", self.cable, "type", "veth", *plug)  # the same address as before it was killed
        run("ip", "link", "set", self.cable, "master", "lab", "up")
        self.on("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.on("ip", "link", "set", "eth0", "up")
        self.start("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"), log=f"{self.name}.sshd.log")
        wait_for(lambda: run("ssh", self.address, "true", check=False).returncode == 0, f"sshd of {self.name}")

    @property
    def cable(self) -> str:
        """The end of the node's cable that is plugged into the switch."""
        return f"cable{self.number}"

    def inside(self, *command: str) -> list[str]:
        """A command as it runs on this node."""
        namespaces = ["nsenter", "-t", str(self.pid), "-n", "-u", "-i", "-p", "-m"]
        return [*namespaces, f"--wd={self.lab.checkout}", "--", *command]

    def on(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a short command on this node."""
        return run(*self.inside(*command), check=check)

    def start(self, *command: str, log: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        """Start a command on this node that goes on; its output is appended to a file of the lab's folder."""
        with (self.lab.folder / log).open("ab") as file:
            return subprocess.Popen(
                self.inside(*command),
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                text=True,
            )

    def processes(self, pattern: str) -> list[int]:
        """Process numbers, as this node counts them, of command lines that match a regular expression."""
        return [int(pid) for pid in self.on("pgrep", "-f", pattern, check=False).stdout.split()]

    def kill(self) -> None:
        """Cut the power: every process of the node dies at once."""
        if self.holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.holder.kill()
            self.holder.wait()
            self.holder = None
            run("ip", "link", "del", self.cable, check=False)

    def cut_cable(self) -> None:
        run("ip", "link", "set", self.cable, "down")

    def mend_cable(self) -> None:
        run("ip", "link", "set", self.cable, "up")


class Lab:
    """A head node, which is where the tests run, and some nodes on a switch."""

    def __init__(self, folder: Path, checkout: Path, nodes: int) -> None:
        """`folder` holds configurations, keys and logs; commands on nodes run in `checkout`."""
        self.folder = folder
        self.checkout = checkout
        self.nodes = [Node(self, number) for number in range(1, nodes + 1)]
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._write_configuration()
        run("hostname", HEAD)
        run("mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        run("mount", "--bind", str(self.folder / "ssh_config"), "/etc/ssh/ssh_config")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "lab", "type", "bridge")
        run("ip", "addr", "add", f"{HEAD_ADDRESS}/24", "dev", "lab")
        run("ip", "link", "set", "lab", "up")
        for node in self.nodes:
            node.boot()

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        run("ip", "link", "del", "lab", check=False)
        run("umount", "/etc/hosts", check=False)
        run("umount", "/etc/ssh/ssh_config", check=False)

    def start_slurm(self) -> None:
        """munged and slurmctld here, a slurmd on each node; returns when all nodes are idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)  # munged refuses a socket that others could replace
        options = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        options[0] = f"--socket={self.folder}/munge.sock"
        self._daemon("munged", "-F", "-f", f"--key-file={key}", "--num-threads=2", *options)
        wait_for(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", str(self.slurm_conf))
        for node in self.nodes:
            self.start_slurmd(node)
        self.wait_for_idle_nodes()

    def start_slurmd(self, node: Node) -> None:
        command = ("slurmd", "-D", "-N", node.name, "-f", str(self.slurm_conf))
        (self.folder / "spool" / node.name).mkdir(exist_ok=True)
        node.start(*command, log=f"{node.name}.slurmd.log", environment={"SLURM_CONF": str(self.slurm_conf)})

    def wait_for_idle_nodes(self, seconds: float = 120) -> None:
        def idle() -> bool:
            text = self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
            return text == ["idle"] * len(self.nodes)

        wait_for(idle, "idle Slurm nodes", seconds)

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    def slurm(self, *command: str, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of Slurm, or one that calls them, on the head node in the checkout."""
        return run(*command, check=check, cwd=self.checkout, SLURM_CONF=str(self.slurm_conf), **environment)

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job."""
        text = self.slurm("scontrol", "show", "job", number, "-o", check=False).stdout
        return dict(field.partition("=")[::2] for field in text.split() if "=" in field)

    def wait_for_job(self, number: str, states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of the states, `COMPLETED|FAILED` for example."""
        wait_for(lambda: self.job(number).get("JobState") in states.split("|"), f"job {number} to be {states}", seconds)
        return self.job(number)

    def logs(self) -> str:
        """The end of every log of the lab, for the message of a test that failed."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out.log").open("ab") as log:
            environment = os.environ | {"SLURM_CONF": str(self.slurm_conf)}
            self.daemons.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _write_configuration(self) -> None:
        folder = self.folder
        for name in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        names = [(node.address, node.name) for node in self.nodes] + [(HEAD_ADDRESS, HEAD)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in names))
        self.slurm_conf.write_text(
            SLURM_CONF.format(folder=folder, nodes=len(self.nodes), head=HEAD, head_address=HEAD_ADDRESS)
        )
        # Nothing here uses cgroups; slurmd looks for them all the same, and ends where version 2 lacks systemd.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        Path("/run/sshd").mkdir(exist_ok=True)


def run(
    *command: str, check: bool = True, cwd: Path | None = None, seconds: float = 300, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; with `check`, a failure is an error that shows what it printed."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if check and result.returncode:
        raise AssertionError(f"{shlex.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Ask until it is so, generously; the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def stopped_at_the_end(*processes: "subprocess.Popen[str]") -> Iterator[None]:
    """End processes that a failing test would leave behind."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
