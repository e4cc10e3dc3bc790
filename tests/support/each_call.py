"""Is a command right whichever of its calls fails, once, in whichever way?

The method is SQLite's: the calls of an undisturbed command are written down. Then the command runs once for each of
them and each way to fail, and a second time without a fault. It must end with a code and a sentence that the manual
knows, never with success where something is missing, and leave in the end what the undisturbed command leaves.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.forks import HUNG, Ended, Forks, file_calls

EVERY_CASE = bool(os.environ.get("EVERY_FAULT"))
"""Set by `make test-faults`: each call in each way. Otherwise each kind of call fails once, in one of the ways."""
WAYS = {"EIO": 1, "ENOSPC": 2, "then SIGKILL": 3, "done, but EIO": 4, "half written, then ENOSPC": 5}
"""Their numbers in tests/support/file_calls.c."""
NEEDS_SPACE = {"open to write", "mkdir", "rename", "link", "symlink", "write", "allocate", "fsync"}
CHANGES = NEEDS_SPACE - {"fsync"} | {"unlink", "truncate"}
CODES = {0, 2, 65, 69, 73, 74, 75, 77}
SIGKILL = -9
SENTENCE = re.compile(r"^(error|pack): \S.{20,}", re.MULTILINE)
LONGEST_SECONDS = 60.0
"""Of one run of a command. Most take one second."""


def calls_of(trace: Path) -> list[str]:
    """The calls that an undisturbed command has made, in order: a verb and a path below the watched folder."""
    return trace.read_text(errors="surrogateescape").splitlines()


def verb_of(call: str) -> str:
    return call[: call.index(" /")] if " /" in call else call.strip()


def ways_of(call: str) -> list[str]:
    """How a call can fail. One that changes nothing need not be the last before a kill: the call before it was."""
    verb = verb_of(call)
    takes_part = {"EIO": True, "ENOSPC": verb in NEEDS_SPACE, "half written, then ENOSPC": verb == "write"}
    return [way for way in WAYS if takes_part.get(way, verb in CHANGES)]


def kind_of(call: str) -> str:
    """A call without the numbers in its path, which differ from step to step and from run to run.

    The files in `repro/` are alike, and so are the folders of a run that only some jobs write to.
    """
    call = re.sub(r"/repro/\w+\.\w+|/(skipped|profile|stacks|evaluation)$", "/N", call)
    return re.sub(r"[0-9a-f]{16,}|[0-9]+", "N", call)


def with_a_fault(command: Callable[[], int], root: str, number: int, way: str | None, report: str) -> int:
    """In a child: let a call below `root` fail, and write down which it was; without a way, trace all calls."""
    library = file_calls()
    if way is None:
        library.file_calls_trace(report.encode())
    library.file_calls_fail(root.encode(), number, WAYS[way] if way else 0)
    code = command()
    struck = library.file_calls_struck().decode(errors="surrogateescape")
    library.file_calls_fail(b"", 0, 0)
    if way is not None:
        Path(report).write_text(struck, errors="surrogateescape")
    return code


@dataclass
class Scenario:
    """A command that is run again and again in a folder of its own, which begins as a copy of `before`."""

    forks: Forks
    place: Path
    function: str
    """What a child runs, as module:name of tests/."""
    arguments: list[str]
    result: Callable[[Path], object]
    """What the command is for, read from the folder; raises if something is missing."""
    before: Path | None = None
    again: str | None = None
    """What the command says instead of going on where something is left: `leftover` is to be deleted then."""
    leftover: str = ""
    watched: str = ""
    """The folder in it whose calls fail; by default all of it."""
    excused: str | None = None
    """What the command says if it goes on without something of little weight, as the manual allows."""
    passed: Counter[str] = field(default_factory=Counter, init=False)
    failed: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self.folder, self.report = self.place / "folder", self.place / "report"
        self.anew()
        ended = self.run(0, None)
        assert ended.code == 0, ended.text
        self.calls = calls_of(self.report)
        self.undisturbed = self.result(self.folder)

    @property
    def name(self) -> str:
        return self.function.partition(":")[2]

    def anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before is None:
            self.folder.mkdir(parents=True)
        else:
            shutil.copytree(self.before, self.folder)

    def run(self, number: int, way: str | None) -> Ended:
        fault = {"root": str(self.folder / self.watched), "number": number, "way": way, "report": str(self.report)}
        self.report.unlink(missing_ok=True)
        return self.forks.run(self.function, seconds=LONGEST_SECONDS, arguments=self.arguments, **fault)

    def cases(self) -> Iterator[tuple[int, str]]:
        """The number of a call, from 1 on, and a way to fail; the first ones have all kinds."""
        of_kind: dict[str, list[int]] = {}
        for number, call in enumerate(self.calls, 1):
            of_kind.setdefault(kind_of(call), []).append(number)
        used: Counter[str] = Counter()
        first: dict[tuple[int, str], None] = {}
        for turn, numbers in enumerate(of_kind.values()):
            number = numbers[turn % len(numbers)]
            way = min(ways_of(self.calls[number - 1]), key=lambda way: used[way])
            used[way] += 1
            first[number, way] = None
        yield from first
        if EVERY_CASE:
            for number, call in enumerate(self.calls, 1):
                yield from ((number, way) for way in ways_of(call) if (number, way) not in first)

    def check(self, number: int, way: str) -> str | None:
        """What is wrong about this case; None if nothing is."""
        self.anew()
        first = self.run(number, way)
        struck = self.report.read_text(errors="surrogateescape") if self.report.exists() else self.calls[number - 1]
        where = f"call {number} ({struck}): {way}: exit {first.code}"
        if first.code == HUNG:
            return f"{where}: still at work after {LONGEST_SECONDS:.0f} s: {first.text[-600:]}"
        if "Traceback" in first.text:
            return f"{where}, traceback: {first.text[-1500:]}"
        if first.code not in CODES and not (first.code == SIGKILL and way == "then SIGKILL"):
            return f"{where}: {first.text[-600:]}"
        if first.code > 0 and not SENTENCE.search(first.text):
            return f"{where}: no sentence: {first.text[-600:]}"
        excused = self.excused is not None and self.excused in first.text
        if first.code == 0:
            if difference := self.difference(excused):
                return f"{where}, and {difference}: {first.text[-1500:]}"
            if not EVERY_CASE:  # to run it again would change nothing
                return None
        second = self.run(0, None)
        if self.again and second.code == 2 and self.again in second.text:
            shutil.rmtree(self.folder / self.leftover)
            second = self.run(0, None)
        if second.code != 0 or "Traceback" in second.text:
            return f"{where}; again: exit {second.code}: {second.text[-1500:]}\nfirst: {first.text[-800:]}"
        if difference := self.difference(excused):
            return f"{where}; again: {difference}: {second.text[-800:]}\nfirst: {first.text[-800:]}"
        return None

    def difference(self, excused: bool) -> str | None:
        """How the result differs from that of the undisturbed command. What is `excused` may lack pictures."""
        try:
            found = self.result(self.folder)
        except Exception as error:  # noqa: BLE001 (whatever is missing)
            return f"the result cannot be read ({type(error).__name__}: {error})"
        assert isinstance(found, dict) and isinstance(self.undisturbed, dict)
        odd = {key for key in found.keys() | self.undisturbed.keys() if found.get(key) != self.undisturbed.get(key)}
        if excused:
            odd.discard("pictures")
        if not odd:
            return None
        return f"the result differs in {sorted(odd)}: {[(found.get(k), self.undisturbed.get(k)) for k in odd]!s:.900}"

    def check_all(self) -> None:
        """Run the cases, print how many there were, and fail with what is wrong about them."""
        wrong: list[str] = []
        for number, way in self.cases():
            text = self.check(number, way)
            (self.passed if text is None else self.failed)[way] += 1
            if text is not None:
                wrong.append(text)
                print(f"WRONG {text}", flush=True)
            if (done := sum((self.passed + self.failed).values())) % 50 == 0:
                print(f"{self.name}: {done} cases, {len(wrong)} wrong", flush=True)
        print(f"\n{self.account()}", flush=True)
        if wrong:
            pytest.fail(f"{self.account()}\n" + "\n\n".join(wrong), pytrace=False)

    def account(self) -> str:
        """One line a way: how many cases there were and how many passed."""
        kinds = len({kind_of(call) for call in self.calls})
        total, passed = (sum(counter.values()) for counter in (self.passed + self.failed, self.passed))
        lines = [f"{self.name}: {len(self.calls)} calls of {kinds} kinds, {total} cases, {passed} passed"]
        for way in WAYS:
            if cases := self.passed[way] + self.failed[way]:
                lines.append(f"  {way}: {cases} cases, {self.passed[way]} passed")
        return "\n".join(lines)
