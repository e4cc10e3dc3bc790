"""Which blocks of the training data turned out to be damaged, and how many of them may be replaced by others?

Only a run that asks for it (``data.max_damaged_blocks``) goes on with other images in the place of damaged ones. Which
images these are depends only on the manifest and on which blocks are damaged. So all other samples keep their places,
and a run on any number of ranks sees the same.
"""

import logging
import threading
from collections.abc import Iterable, Mapping

from data_pipeline.storage import EXIT_CORRUPT, DataError

log = logging.getLogger(__name__)

SAME_ANSWERS = 5  # so many in a row are what the store holds; a passing fault gives other bytes each time


class DamagedBlocks:
    """The damaged blocks that a rank has met, with their causes; its threads share it."""

    def __init__(self, most: int) -> None:
        """``most``: how many there may be."""
        self.most = most
        self.causes: dict[int, str] = {}
        """Why each damaged block could not be read, one sentence, by its number in the manifest."""
        self._merged: set[int] = set()
        self._lock = threading.Lock()

    def add(self, number: int, cause: DataError) -> None:
        """Remember a block whose bytes are wrong, with a warning when it is new.

        Raises DataError (exit code 65) when there are now more than there may be.
        """
        with self._lock:
            if number in self.causes:
                return
            self.causes[number] = str(cause)
            self._check(self.causes)
        log.warning(
            "block %d of the training data is damaged, images of the next good block take its place (%d of at most %d, "
            "data.max_damaged_blocks): %s",
            number, len(self.causes), self.most, cause,
        )  # fmt: skip

    def snapshot(self) -> dict[int, str]:
        """The causes as they are now, to be sent to other ranks."""
        with self._lock:
            return dict(self.causes)

    def merge(self, causes_of_ranks: Iterable[Mapping[int, str]]) -> dict[int, str]:
        """Add the damaged blocks of all ranks, and return those that no earlier call had.

        Raises DataError (exit code 65) when the ranks together have met more than there may be. All ranks pass the same
        causes, so all of them raise.
        """
        found = {number: cause for causes in causes_of_ranks for number, cause in causes.items()}
        with self._lock:
            self.causes |= {number: cause for number, cause in found.items() if number not in self.causes}
            fresh = {number: cause for number, cause in sorted(found.items()) if number not in self._merged}
            self._merged |= found.keys()
            self._check(found)
        return fresh

    def _check(self, causes: Mapping[int, str]) -> None:
        if len(causes) > self.most:
            raise DataError(
                f"{len(causes)} blocks of the training data are damaged, and data.max_damaged_blocks allows "
                f"{self.most}; python -m data_pipeline.verify says how to repair them; one of them: "
                f"{list(causes.values())[-1]}",
                EXIT_CORRUPT,
            )
