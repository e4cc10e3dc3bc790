"""How do tests get a disk that is really full: a small filesystem in memory that only one command sees?"""

import shutil
import subprocess
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size="$1"k none "$2" && shift 2 && exec "$@"'
REMOUNT = 'mount -o remount,size="$1"k "$2"'


def on_small_disk(folder: Path, kilobytes: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with ``folder`` on a disk of so many kilobytes; ``grow KILOBYTES`` in it changes the size.

    In namespaces of its own, so no rights are needed; skips the test where the kernel does not give them out.
    """
    folder.mkdir()
    alone = ["unshare", "--map-root-user", "--mount"]
    try_out = [*alone, "sh", "-c", MOUNT, "sh", "64", str(folder), "true"]
    if shutil.which("unshare") is None or subprocess.run(try_out, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small filesystem")
    grow = f'grow() {{ sh -c \'{REMOUNT}\' sh "$1" "{folder}"; }}\n'
    command = [
        *alone,
        "sh",
        "-c",
        MOUNT,
        "sh",
        str(kilobytes),
        str(folder),
        "sh",
        "-c",
        grow + script,
        "sh",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)
