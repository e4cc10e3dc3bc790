"""How do tests get a real S3 server: OpenStack Swift, from pip alone, without root, in a temporary folder?

python -m tests.support.s3_server FOLDER      # serve until interrupted; prints what to put into the environment
"""

import contextlib
import ctypes
import getpass
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

SERVERS = ("account", "container", "object", "proxy")
KEY, SECRET = "test:tester", "testing"
START_SECONDS = 60.0

SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = test
swift_hash_path_suffix = test
[storage-policy:0]
name = default
default = yes
"""

STORAGE_CONF = """
[DEFAULT]
devices = {folder}/srv
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}/etc
log_udp_host =
disable_fallocate = true
[pipeline:main]
pipeline = {server}-server
[app:{server}-server]
use = egg:swift#{server}
"""

PROXY_CONF = """
[DEFAULT]
bind_ip = {address}
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}/etc
[pipeline:main]
pipeline = {pipeline} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
"""
PIPELINE = (
    "catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth copy slo dlo versioned_writes symlink"
)
PLAIN_FILTERS = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "bulk",
    "copy",
    "slo",
    "dlo",
    "symlink",
)


class S3Server:
    """Swift's account, container, object and proxy servers on free ports, the proxy on an address of one's choice.

    Objects live in the folder, so a server that was killed has them again after the next ``start``.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self.ports = dict(zip(SERVERS, free_ports(len(SERVERS)), strict=True))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.buckets = 0
        # The kernel ends a child with the thread that started it, so all children come from one that stays.
        self.starter = ThreadPoolExecutor(1)
        self._configure()

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.ports['proxy']}"

    @property
    def environment(self) -> dict[str, str]:
        """What s3fs and every other client of S3 reads."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the servers and wait until the S3 endpoint answers."""
        self.starter.submit(self._start).result()

    def _start(self) -> None:
        for server in SERVERS:
            program = Path(sys.executable).with_name(f"swift-{server}-server")
            with (self.folder / f"{server}.log").open("ab") as log:
                command = [sys.executable, str(program), str(self.folder / "etc" / f"{server}-server.conf"), "-v"]
                self.processes.append(
                    # Its own session, so that its children die with it; and it dies with the tests.
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        preexec_fn=die_with_parent,
                    )
                )
        deadline = time.monotonic() + START_SECONDS
        while not (self._answers() and all(is_listening(self.ports[name]) for name in SERVERS[:3])):
            ended = [process.args for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1000:] for path in self.folder.glob("*.log"))
                self.stop()
                raise RuntimeError(f"the S3 server did not start ({ended or 'timeout'}):\n{logs}")
            time.sleep(0.05)

    def stop(self, with_signal: int = signal.SIGTERM) -> None:
        """End all servers, with SIGKILL if asked, and wait until they are gone."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, with_signal)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()

    def kill(self) -> None:
        """SIGKILL, as when the machine dies."""
        self.stop(signal.SIGKILL)

    def pause(self) -> None:
        """Stop answering without closing a connection."""
        for process in self.processes:
            os.killpg(process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGCONT)

    def filesystem(self) -> fsspec.AbstractFileSystem:
        """A client of its own, for looking at what the code under test did."""
        client = {"endpoint_url": self.endpoint, "region_name": "us-east-1"}
        return fsspec.filesystem(
            "s3", key=KEY, secret=SECRET, client_kwargs=client, use_listings_cache=False, skip_instance_cache=True
        )

    def make_bucket(self) -> str:
        """The name of a new, empty bucket."""
        self.buckets += 1
        name = f"bucket-{self.buckets}"
        self.filesystem().mkdir(name)
        return name

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthcheck", timeout=1) as answer:
                return bool(answer.read() == b"OK")
        except (urllib.error.URLError, OSError):
            return False

    def _configure(self) -> None:
        etc = self.folder / "etc"
        for folder in (etc, self.folder / "srv" / "d1"):
            folder.mkdir(parents=True, exist_ok=True)
        (etc / "swift.conf").write_text(SWIFT_CONF)
        for server in SERVERS:
            text = PROXY_CONF if server == "proxy" else STORAGE_CONF
            fields = {"folder": self.folder, "port": self.ports[server], "server": server, "user": getpass.getuser()}
            text = text.format(**fields, pipeline=PIPELINE, address=self.address)
            if server == "proxy":
                text += "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in PLAIN_FILTERS)
            (etc / f"{server}-server.conf").write_text(text)
        # In another process: importing swift patches things, and its builder logs.
        ports = ",".join(f"{server}={self.ports[server]}" for server in SERVERS[:3])
        subprocess.run([sys.executable, "-c", BUILD_RINGS, str(etc), ports], check=True, stdin=subprocess.DEVNULL)


BUILD_RINGS = """
import sys
from swift.common.ring import RingBuilder
etc, ports = sys.argv[1:]
for server, port in (pair.split("=") for pair in ports.split(",")):
    builder = RingBuilder(4, 1, 1)  # 2**4 partitions, one replica
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1.0})
    builder.rebalance()
    builder.get_ring().save(f"{etc}/{server}.ring.gz")
"""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def die_with_parent() -> None:
    """Between fork and exec: ask the kernel for SIGKILL when the process that started us ends."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    server = S3Server(Path(sys.argv[1]).resolve())
    server.start()
    for name, value in server.environment.items():
        print(f"export {name}={value}")
    print(f"# bucket: s3://{server.make_bucket()}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()
    server.stop()


if __name__ == "__main__":
    main()
