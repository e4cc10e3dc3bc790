"""Does every rank make progress? If one hangs or is lost, the whole job ends within the limits and names it.

Nothing else would end it. A collective waits for a lost rank up to its own timeout, and the launcher notices only
processes that end. Each rank has two threads. One exchanges signs of life with rank 0 over a TCP store of their own;
when a cable is cut, it may get stuck itself. The other only looks at clocks. When a limit is over, it writes down where
every thread is and ends the process.

Time for which this process itself was suspended counts for nobody. And whoever can reach the store cannot end the job:
what ranks say there is signed.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed

from trainer.awake_clock import AwakeClock
from trainer.errors import HANG
from trainer.faults.signed_store import SignedStore
from trainer.options import LimitsConfig
from trainer.ranks import Ranks, from_rank_0

Phase = Literal["startup", "step", "checkpoint"]

BEAT_SECONDS = 2.0
DEAD_SECONDS = 8.0
"""How long a rank may be silent after a collective has failed on another one, which means that somebody is gone."""
STORE_SECONDS = 30.0
SECRET_BYTES = 32
LARGEST_REASON_CHARACTERS = 2000
PUBLISH_SECONDS = 3.0
"""How long a rank stays after it has told the others why the job ends: they may be reading it from its store."""


@dataclass(frozen=True)
class Verdict:
    """Why the job cannot go on, and the exit code for it."""

    reason: str
    code: int

    def as_text(self) -> str:
        return json.dumps(asdict(self))


def verdict_from(text: str) -> Verdict:
    """What another rank said. One that cannot be understood is a verdict as well, and 0 is no code to end with."""
    try:
        said = json.loads(text)
        reason, code = said["reason"], said["code"]
    except (ValueError, TypeError, KeyError):
        reason, code = None, None
    if not isinstance(reason, str) or type(code) is not int or not 0 < code < 256:
        return Verdict("another rank has ended, and what it said about it cannot be understood", HANG)
    return Verdict(reason[:LARGEST_REASON_CHARACTERS], code)


class Watchdog:
    """Ends the process with exit code 78 when this rank, or another one, makes no progress."""

    def __init__(
        self, limits: LimitsConfig, ranks: Ranks, stacks: Path, record: Callable[[Verdict], None] = lambda verdict: None
    ) -> None:
        """Begin to watch, in the phase `startup`.

        The stacks of all threads go to the file `stacks`. `record` is called with the verdict on rank 0, or on rank 1
        if rank 0 is the one that is lost.
        """
        self._limits, self._ranks, self._stacks, self._record = limits, ranks, stacks, record
        self._phase: Phase = "startup"
        self._clock = AwakeClock()
        self._progress = self._contact = self._clock.now()
        self._store: SignedStore | None = None
        self._verdict: Verdict | None = None
        self._failed = False
        self._closed = threading.Event()
        self._tripping = threading.Lock()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def connect(self) -> None:
        """Begin to exchange signs of life with the other ranks. Collective; torch.distributed must be initialised."""
        if self._ranks.world_size == 1:
            return
        # On a port of its own, which rank 0 tells the others: the store of the process group has MASTER_PORT.
        store = None
        if self._ranks.rank == 0:
            store = torch.distributed.TCPStore(
                os.environ["MASTER_ADDR"], 0, None, True, timedelta(seconds=STORE_SECONDS), wait_for_workers=False
            )
        # The store listens where others can reach it. The secret goes the way of the weights.
        port, secret = from_rank_0((store.port, secrets.token_bytes(SECRET_BYTES)) if store else None)
        store = store or torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], port, None, False, timedelta(seconds=STORE_SECONDS), wait_for_workers=False
        )
        self._store = SignedStore(store, secret)
        self._store.set(f"host/{self._ranks.rank}", socket.gethostname())
        self._contact = self._clock.now()
        threading.Thread(target=self._exchange, name="signs of life", daemon=True).start()

    def phase(self, phase: Phase) -> None:
        """Enter a phase, whose limit holds until the next call of `phase` or `alive`."""
        self._phase, self._progress = phase, self._clock.now()

    def alive(self) -> None:
        """This rank made progress: the time limit of its phase starts again."""
        self._progress = self._clock.now()

    def close(self) -> None:
        """Stop watching: the work is done, or the process ends for a known reason."""
        self._closed.set()

    def failed(self, reason: str, code: int) -> None:
        """Tell the other ranks why this one ends, so that they end for the same reason."""
        self._failed = True
        if self._store is not None:
            self._publish_for_a_while(Verdict(f"rank {self._ranks.rank} on {socket.gethostname()}: {reason}", code))

    def verdict_of_the_others(self) -> Verdict | None:
        """After a collective has failed here: why another rank ended, or which one is gone. None if all seem well.

        Waits for the answer a little longer than DEAD_SECONDS.
        """
        self._failed = True
        begun = self._clock.now()
        patience = DEAD_SECONDS + 3 * BEAT_SECONDS
        self._progress = begun + patience  # the phase's limit must not end this wait
        while self._verdict is None and self._clock.since(begun) < patience and self._store is not None:
            time.sleep(0.2)
        if self._verdict is not None and self._ranks.rank == 0:
            time.sleep(PUBLISH_SECONDS)  # the others read it from this rank's store
        return self._verdict

    def _watch(self) -> None:
        limits = {
            "startup": self._limits.startup_seconds,
            "step": self._limits.step_seconds,
            "checkpoint": self._limits.checkpoint_seconds,
        }
        while not self._closed.wait(0.5):
            silent, stuck = self._clock.since(self._contact), self._clock.since(self._progress)
            if self._verdict is not None and not self._failed:
                self._trip(self._verdict)
            elif stuck > limits[self._phase]:
                self._trip(
                    Verdict(
                        f"rank {self._ranks.rank} on {socket.gethostname()} made no progress for {stuck:.0f} s "
                        f"(limits.{self._phase}_seconds)",
                        HANG,
                    )
                )
            elif self._store is not None and silent > (
                DEAD_SECONDS if self._failed else self._limits.lost_rank_seconds
            ):
                self._verdict = Verdict(
                    f"rank 0 is lost: rank {self._ranks.rank} on {socket.gethostname()} had no answer from "
                    f"{os.environ['MASTER_ADDR']} for {silent:.0f} s",
                    HANG,
                )

    def _exchange(self) -> None:
        """Send and look for signs of life until closed. A store that fails counts as one that does not answer."""
        beats: dict[int, tuple[str | None, float]] = {}
        count = 0
        while not self._closed.wait(BEAT_SECONDS):
            store = self._store
            assert store is not None
            try:
                count += 1
                store.set(f"beat/{self._ranks.rank}", str(count))
                if self._failed:
                    store.set("failed", "1")
                if self._ranks.rank == 0:
                    self._contact = self._clock.now()
                    self._look_at_others(store, beats)
                if (said := store.get("verdict")) is not None:
                    self._verdict = verdict_from(said)
                    return
                self._contact = self._clock.now()
            except torch.distributed.DistNetworkError:  # closed for good; the other thread watches the time
                return
            except RuntimeError:  # no answer in time
                continue

    def _look_at_others(self, store: SignedStore, beats: dict[int, tuple[str | None, float]]) -> None:
        # Once a rank has said that its collective failed, somebody is gone: the others need not wait as long.
        limit = DEAD_SECONDS if store.get("failed") is not None else self._limits.lost_rank_seconds
        lost = []
        for rank in range(1, self._ranks.world_size):
            beat = store.get(f"beat/{rank}")
            if rank not in beats or beats[rank][0] != beat:
                beats[rank] = (beat, self._clock.now())
            elif self._clock.since(beats[rank][1]) > limit:
                lost.append(f"rank {rank} on {store.get(f'host/{rank}') or 'an unknown host'}")
        if lost:
            self._verdict = Verdict(f"{', '.join(lost)} gave no sign of life for {limit:.0f} s", HANG)
            store.set("verdict", self._verdict.as_text())

    def _trip(self, verdict: Verdict) -> None:
        """Tell the others, write down where every thread is, and end this process at once."""
        with self._tripping:
            if self._closed.is_set():
                return
            with contextlib.suppress(OSError):
                self._stacks.parent.mkdir(parents=True, exist_ok=True)
                with self._stacks.open("w") as file:
                    file.write(f"{verdict.reason}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            if self._ranks.rank == 0 or (self._ranks.rank == 1 and verdict.reason.startswith("rank 0")):
                with contextlib.suppress(Exception):
                    self._record(verdict)
            note = f"error: {verdict.reason}; this rank's stacks are in {self._stacks}; run the same command to go on\n"
            sys.stderr.write(note)
            sys.stderr.flush()
            self._publish_for_a_while(verdict)
            os._exit(verdict.code)

    def _publish_for_a_while(self, verdict: Verdict) -> None:
        """Tell the others, and give them time to read it: the store may live in this process."""

        def publish() -> None:
            if self._store is not None:
                with contextlib.suppress(RuntimeError):
                    self._store.set("verdict", verdict.as_text())

        threading.Thread(target=publish, daemon=True).start()  # with a cut cable it never returns
        time.sleep(PUBLISH_SECONDS)
