"""How does storage misbehave in tests: errors, short reads, flipped bits and stalls, at a given rate?"""

import random
import threading
import time
from collections import Counter
from typing import Any

from fsspec.implementations.local import LocalFileSystem

FAULTS = ("error", "short", "flipped", "stall")


class FaultyFilesystem(LocalFileSystem):
    """The local filesystem, except that a share of all ranged reads fails in one of four ways."""

    cachable = False

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share = share
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = bytearray(super().cat_file(path, start=start, end=end, **kwargs))
        with self.lock:
            fault = self.random.choice(FAULTS) if start is not None and self.random.random() < self.share else "none"
            place = self.random.randrange(len(data))
            self.counts[fault] += 1
        if fault == "error":
            raise ConnectionResetError("connection reset by the fault injector")
        if fault == "short":
            return bytes(data[:place])
        if fault == "flipped":
            data[place] ^= 1 << (place % 8)
        if fault == "stall":
            time.sleep(0.02)
        return bytes(data)
