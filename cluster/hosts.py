"""Is this hostfile safe to give to `deepspeed`, and is nothing in the environment that its launcher would print?

    python -m cluster.hosts check cluster/hosts --world-size 16 && deepspeed --hostfile cluster/hosts trainer/run.py ...

DeepSpeed only warns of a hostfile that is not there and then trains on one machine. It hands names that begin with a
dash to ssh as options, which can run a program. It ignores text behind the slots. And it puts the variables that it
forwards on pdsh's command line, where everybody sees them in the log and in `ps`. This check refuses all of that.

exit codes: 0 usable · 2 cannot be used (the text says why) · 77 refused for safety
"""

import argparse
import ipaddress
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

USABLE, UNUSABLE, REFUSED = 0, 2, 77
MAX_BYTES = 1 << 20
MAX_SLOTS = 64
"""More GPUs than any machine has: a larger number is a typing error that starts that many processes."""
FORWARDED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of the names of variables that DeepSpeed 0.19 sends to other machines (NCCL: with CUDA)."""
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")
_LINE = re.compile(r"(\S+)[ \t]+slots=(\d+)[ \t]*")
_SECRET = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|PRIVATE|(?:^|_)KEY(?:$|_)", re.IGNORECASE)
_URL_WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]*@", re.IGNORECASE)
SHELL_CHARACTERS = frozenset(";&|<>(){}'*?[]")
_SHELL = re.compile(r"[\"$`\\\x00-\x1f]")
"""The launcher puts values between double quotes, where these keep their meaning for the shell."""


@dataclass(frozen=True)
class Problem:
    """Why something is refused: where, in one sentence, and with which exit code."""

    where: str
    text: str
    code: int = UNUSABLE

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def read_hosts(path: Path) -> tuple[dict[str, int], list[Problem]]:
    """The slots of each host of a hostfile, in its order, and everything that is wrong with the file."""
    if not path.is_file():
        return {}, [Problem(str(path), "no such hostfile; DeepSpeed would train on this machine alone")]
    try:
        content = path.read_bytes()
    except OSError as error:
        return {}, [Problem(str(path), f"cannot be read ({error.strerror})")]
    if len(content) > MAX_BYTES:
        return {}, [Problem(str(path), "is larger than 1 MiB, so it is not a hostfile")]
    try:
        lines = content.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        return {}, [
            Problem(f"{path}:{at}", "holds bytes that are not ASCII (a byte order mark?); save it as plain text")
        ]
    hosts: dict[str, int] = {}
    problems = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t") or line.lstrip(" \t").startswith("#"):
            continue
        where = f"{path}:{number}"
        host, slots, found = _read_line(line, where)
        problems += found
        if host in first_line:
            problems.append(Problem(where, f"{host} stands on line {first_line[host]} already; give it one line"))
        elif host:
            first_line[host] = number
            hosts[host] = slots
    if not hosts and not problems:
        problems.append(Problem(str(path), "names no host; write one `NAME slots=GPUS` a line"))
    return hosts, problems


def _read_line(line: str, where: str) -> tuple[str, int, list[Problem]]:
    if "\r" in line:
        return "", 0, [Problem(where, "ends like a Windows text file; convert it with `sed -i 's/\\r$//' FILE`")]
    host = re.split(r"[ \t]", line.strip(" \t"), maxsplit=1)[0]
    if host.startswith("-"):
        return (
            "",
            0,
            [Problem(where, f"{host!r} would be an option of ssh; a host's name begins with a letter", REFUSED)],
        )
    if not _is_host(host):
        text = f"{host!r} is not a host's name or IPv4 address; a user's name or a port belongs in ~/.ssh/config"
        return "", 0, [Problem(where, text, REFUSED if _SHELL.search(host) or set(host) & SHELL_CHARACTERS else 2)]
    match = _LINE.fullmatch(line.strip(" \t"))
    if match is None:
        return "", 0, [Problem(where, f"{line.strip()!r} is not `NAME slots=GPUS`; nothing may follow the number")]
    slots = int(match[2][:9])
    if not 1 <= slots <= MAX_SLOTS:
        return host, 0, [Problem(where, f"slots={match[2]}: must be 1 to {MAX_SLOTS}, the GPUs of {host}")]
    return host, slots, []


def _is_host(text: str) -> bool:
    if re.fullmatch(r"[\d.]+", text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            return False
        return True
    return len(text) <= 253 and _NAME.fullmatch(text) is not None


def environment_problems(environment: Mapping[str, str]) -> Iterator[Problem]:
    """What the launcher would print, or change on its way through two shells, of the variables that it forwards."""
    for name, value in sorted(environment.items()):
        if name.startswith(FORWARDED):
            yield from _value_problems("environment", name, value)


def environment_file_problems(folders: Sequence[Path], name: str) -> Iterator[Problem]:
    """The same for the files of variables (`.deepspeed_env`) in the home and the current folder."""
    for path in dict.fromkeys(folder / name for folder in folders):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            where = f"{path}:{number}"
            key, equals, value = line.partition("=")
            if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                yield Problem(where, f"{line!r} is not NAME=VALUE; the launcher takes no comments and no empty lines")
            else:
                yield from _value_problems(where, key, value)


def _value_problems(where: str, name: str, value: str) -> Iterator[Problem]:
    # The value is not repeated here: this text ends up in logs too.
    if value and _SECRET.search(name) and not name.endswith(("_FILE", "_PATH")):
        home = "~/.mlflow/credentials" if name.startswith("MLFLOW") else "~/.aws/credentials"
        if not name.startswith(("MLFLOW", "AWS")):
            home = "a file that only you can read"
        yield Problem(
            where, f"{name} would be printed by the launcher; unset it, and keep it in {home} on each host", REFUSED
        )
    elif _URL_WITH_PASSWORD.search(value):
        yield Problem(where, f"{name} is a URL with a password, which the launcher would print; take it out", REFUSED)
    elif _SHELL.search(value):
        text = f'{name} holds one of " $ ` \\ or a control character, which the shell of the other host would act on'
        yield Problem(where, f"{text}; unset it or choose another value", REFUSED)


def check(path: Path, world_size: int | None, environment: Mapping[str, str]) -> tuple[dict[str, int], list[Problem]]:
    """The hosts of a file and every reason not to launch on them with this environment."""
    hosts, problems = read_hosts(path)
    total = sum(hosts.values())
    if not problems and world_size is not None and total != world_size:
        listed = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        problems.append(Problem(str(path), f"gives {total} slots ({listed}), and --world-size is {world_size}"))
    problems += environment_problems(environment)
    # Unlike Path's, this expanduser raises nothing for a user without a home.
    folders = [Path(os.path.expanduser(environment.get("HOME", "~"))), Path()]
    problems += environment_file_problems(folders, environment.get("DS_ENV_FILE", ".deepspeed_env"))
    return hosts, problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="check")
    checking = commands.add_parser("check", help="check a hostfile and the environment before `deepspeed` sees them")
    checking.add_argument("file", type=Path, metavar="FILE", help="lines of `NAME slots=GPUS`, see cluster/hosts")
    checking.add_argument("--world-size", type=int, metavar="N", help="how many ranks the job is meant to have")
    options = parser.parse_args(arguments)
    hosts, problems = check(options.file, options.world_size, os.environ)
    for problem in problems:
        print(f"hosts: {problem}", file=sys.stderr)
    if problems:
        return max(problem.code for problem in problems)
    slots = sum(hosts.values())
    print(f"{options.file}: {len(hosts)} host{'s' * (len(hosts) != 1)}, {slots} slot{'s' * (slots != 1)}")
    return USABLE


if __name__ == "__main__":
    sys.exit(main())
