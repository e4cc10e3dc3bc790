"""What is in a checkpoint, when is it complete, and which one does a run go on from?

A checkpoint is a folder `step-000001000/` of safetensors files, one written by each rank, and a `manifest.json`
written last. It holds full fp32 tensors (weights, the optimizer's moments, the average of the weights), never shards
of them, so it loads at any world size and ZeRO stage, and nothing in it can execute code. A folder without a
manifest, or whose files differ from it, is not a checkpoint. There is no pointer to the newest one that could lie.
"""

import itertools
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.storage import DataError, Store
from trainer.config import RunConfig
from trainer.engine import Engine, State
from trainer.errors import CheckpointError, UsageError
from trainer.faults.replicas import check_replicas
from trainer.options import CheckpointConfig
from trainer.ranks import Ranks, from_all_ranks, from_rank, from_rank_0
from trainer.tensor_file import FileEntry, read_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
STORE_DEADLINE_SECONDS = 120.0
FAILURES_IN_A_ROW = 3
"""So many checkpoints may fail one after the other before the run ends: longer, and its work is at risk."""
Weights = Literal["raw", "ema", "avg"]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its manifest says."""

    step: int
    """Updates attempted: the position on every curve and in the learning rate's schedule."""
    updates: int
    """Updates applied: what Adam's bias correction counts. Fewer than `step` after skipped ones."""
    samples: int
    """Training samples consumed: the whole state of the data stream."""
    bits_per_dim: float | None
    """Validation bits/dim of these weights, if they were evaluated during training."""
    config: dict[str, Any]
    """The run's resolved config, by section."""
    data_digest: str
    files: list[FileEntry]

    @property
    def name(self) -> str:
        return f"step-{self.step:09d}"


def checkpoints_url(run_dir: str, config: RunConfig) -> str:
    """Where the checkpoints of the run in `run_dir` are."""
    return config.checkpoint.url or f"{run_dir}/checkpoints"


class Checkpoints:
    """The checkpoints of one run, in a folder or under any URL that the data pipeline can open."""

    def __init__(self, url: str, ranks: Ranks, device: torch.device, settings: CheckpointConfig, attempt: int) -> None:
        """`attempt` is in the names of files: two attempts that overlap (a node that was lost and came back) write
        different files, and whichever manifest comes last is complete."""
        self._store = Store(url.rstrip("/"), STORE_DEADLINE_SECONDS)
        self._ranks, self._device, self._settings, self._attempt = ranks, device, settings, attempt
        self._writing: _Writing | None = None
        self._failures = 0

    def save(
        self,
        engine: Engine,
        *,
        step: int,
        updates: int,
        samples: int,
        bits_per_dim: float | None,
        config: dict[str, Any],
        data_digest: str,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state to the host and begin to write it; collective. `is_written` and `complete` finish it.

        Training may go on at once: what is written are copies. Raises CheckpointError as `complete` does, and
        DifferentWeights, before anything is written, if the ranks' copies of the weights are not the same.
        """
        self.complete()  # never two at once
        check_replicas(engine.replicas())
        tensors: dict[str, Tensor] = {}
        for index, (parameter, state) in enumerate(engine.state()):
            if index % self._ranks.world_size == self._ranks.rank:
                # Copies: the gathered tensors are gone at the next step of the iterator.
                tensors |= {f"{parameter}|{kind}": _copy_on_host(tensor) for kind, tensor in state.items()}
            alive()
        checkpoint = Checkpoint(step, updates, samples, bits_per_dim, config, data_digest, files=[])
        name = f"rank-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.attempt-{self._attempt}.safetensors"
        self._writing = _Writing(self._store, checkpoint, name, tensors)
        if self._settings.background:
            self._writing.start()
        else:
            self._writing.run()

    def is_written(self) -> bool:
        """Whether this rank has nothing more to write."""
        return self._writing is None or not self._writing.is_alive()

    def complete(self) -> Checkpoint | None:
        """Wait for all ranks' files and write the manifest; the checkpoint that is complete now, None if there was
        nothing to do or it failed. Collective.

        Then deletes what need not be kept. Raises CheckpointError after several failures in a row; a single one is a
        warning, and the checkpoints before it stay.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        if writing.ident is not None:
            writing.join()
        entries = from_all_ranks(writing.result)
        problem = next((entry for entry in entries if isinstance(entry, str)), None)
        checkpoint = Checkpoint(**(asdict(writing.checkpoint) | {"files": entries}))
        if problem is None:
            problem = from_rank_0(self._commit(checkpoint) if self._ranks.rank == 0 else None)
        if problem is None:
            self._failures = 0
            return checkpoint
        self._failures += 1
        text = f"checkpoint {checkpoint.name} was not written: {problem}"
        if self._failures >= FAILURES_IN_A_ROW:
            raise CheckpointError(f"{text}; {self._failures} checkpoints in a row have failed")
        if self._ranks.rank == 0:
            log.warning("%s; training goes on, and the checkpoints before it stay", text)
        return None

    def newest(self, note: Callable[[str], None]) -> "LoadedCheckpoint | None":
        """Read the newest checkpoint whose every byte is right: each file once, by one rank. Collective.

        Damaged ones are passed over with one call of `note`. What goes wrong on one rank is raised on all: DataError if
        the store cannot be read, CheckpointError for a file that is as it was written and holds no tensors of ours.
        """
        candidates = from_rank_0(list_complete(self._store) if self._ranks.rank == 0 else None)
        for checkpoint in reversed(candidates):
            mine, problem = self._read_share(checkpoint)
            shapes = {number: tensors and _shapes(tensors) for number, tensors in mine.items()}
            answers = from_all_ranks((shapes, problem))
            for _, problem in answers:
                if problem is not None:
                    raise problem
            contents = [answers[number % self._ranks.world_size][0][number] for number in range(len(checkpoint.files))]
            if damaged := contents.count(None):
                mine.clear()  # before the next one is read
                note(
                    f"checkpoint {checkpoint.name} is damaged ({damaged} of {len(checkpoint.files)} files); "
                    "trying an older one"
                )
            else:
                return LoadedCheckpoint(checkpoint, self._ranks, self._device, contents, mine)
        return None

    def _read_share(self, checkpoint: Checkpoint) -> tuple[dict[int, dict[str, Tensor] | None], Exception | None]:
        """This rank's files of a checkpoint by their number, None for a damaged one; and what went wrong."""
        mine: dict[int, dict[str, Tensor] | None] = {}
        try:
            for number in range(self._ranks.rank, len(checkpoint.files), self._ranks.world_size):
                mine[number] = _read(self._store, checkpoint, checkpoint.files[number])
        except (CheckpointError, DataError) as error:
            return {}, error
        return mine, None

    def _commit(self, checkpoint: Checkpoint) -> str | None:
        """Make a written checkpoint complete, then tidy up; on rank 0. Returns what went wrong."""
        manifest = {"format_version": FORMAT_VERSION} | asdict(checkpoint)
        try:
            self._store.write(f"{checkpoint.name}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        except DataError as error:
            return str(error)
        try:
            self._tidy(checkpoint)
        except DataError as error:  # untidy, and safe
            log.warning("old checkpoints stay: %s", error)
        return None

    def _tidy(self, newest: Checkpoint) -> None:
        """Delete checkpoints that need not be kept, and older folders that killed attempts left without a manifest.

        Other files in the newest folder stay: an older attempt that still runs may complete them.
        """
        complete = list_complete(self._store)
        kept = {checkpoint.name for checkpoint in to_keep(complete, self._settings)} | {newest.name}
        names = {checkpoint.name for checkpoint in complete}
        for folder in self._store.names():
            if not _STEP_FOLDER.fullmatch(folder) or folder in kept:
                continue
            if folder in names or folder < newest.name:  # a newer one without a manifest may be an attempt at work
                remove(self._store, folder)


class LoadedCheckpoint:
    """A checkpoint that has been read and is right: each rank holds the tensors of the files that it read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranks: Ranks,
        device: torch.device,
        contents: list[dict[str, tuple[int, ...]]],
        mine: dict[int, dict[str, Tensor] | None],
    ) -> None:
        """`contents` are the shapes of each file's tensors by name, and `mine` this rank's files by their number.

        Of n ranks, rank r has the files r, r + n, r + 2 n, and so on.
        """
        self.checkpoint = checkpoint
        self._ranks, self._device, self._contents, self._mine = ranks, device, contents, mine

    def put_into(self, engine: Engine) -> None:
        """Continue from this checkpoint, as `states`: once, and collective."""
        engine.load_state(self.states(), self.checkpoint.updates)

    def states(self) -> Iterator[tuple[str, State]]:
        """Each parameter's name and full state, in the same order on all ranks, on the device. Once, and collective.

        The rank that read a parameter hands it on to the others. So a rank holds its own files and the parameter on its
        way; a file is let go when all of it has been handed on.
        """
        for number, shapes in enumerate(self._contents):
            source, tensors = number % self._ranks.world_size, self._mine.pop(number, None) or {}
            for parameter, names in itertools.groupby(sorted(shapes), lambda name: name.partition("|")[0]):
                state = {}
                for name in names:
                    kind = name.partition("|")[2]
                    if source == self._ranks.rank:
                        state[kind] = tensors[name].to(self._device, copy=True)
                    else:
                        state[kind] = torch.empty(shapes[name], dtype=torch.float32, device=self._device)
                    from_rank(source, state[kind])
                yield parameter, state


class _Writing(threading.Thread):
    """One rank's file of one checkpoint on its way to the store."""

    def __init__(self, store: Store, checkpoint: Checkpoint, name: str, tensors: dict[str, Tensor]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.checkpoint = checkpoint
        self.result: FileEntry | str = "it was never begun"
        """The manifest's entry of the file, or what went wrong."""
        self._store, self._name, self._tensors = store, name, tensors

    def run(self) -> None:
        try:
            self.result = write_tensors(self._store, f"{self.checkpoint.name}/{self._name}", self._tensors)
        except Exception as error:  # noqa: BLE001 (of a thread: told to the others by `complete`)
            self.result = str(error) or type(error).__name__
        self._tensors = {}


def to_keep(complete: list[Checkpoint], settings: CheckpointConfig) -> list[Checkpoint]:
    """Of complete checkpoints, oldest first, those that the settings keep: newest, best and permanent ones."""
    evaluated = [c for c in complete if c.bits_per_dim is not None and math.isfinite(c.bits_per_dim)]
    best = sorted(evaluated, key=lambda c: (c.bits_per_dim, -c.step))[: settings.keep_best]
    every = settings.keep_every_steps
    return [
        c
        for index, c in enumerate(complete)
        if index >= len(complete) - settings.keep_last or c in best or (every and c.step % every == 0)
    ]


def list_complete(store: Store) -> list[Checkpoint]:
    """Checkpoints of a store that have a readable manifest, oldest first.

    Raises CheckpointError for one written by a later version, DataError if the store cannot be read.
    """
    found = []
    for folder in store.names():
        if not _STEP_FOLDER.fullmatch(folder) or not store.exists(f"{folder}/{MANIFEST}"):
            continue  # being written, or killed while written
        try:
            manifest = json.loads(store.read(f"{folder}/{MANIFEST}"))
            version = manifest.pop("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{store.url_of(folder)} was written in checkpoint format {version} and this version of the "
                    f"trainer reads {FORMAT_VERSION}: use the version that wrote it, or another run.dir"
                )
            checkpoint = Checkpoint(**manifest)
            if checkpoint.name == folder and all(map(_is_entry, checkpoint.files)):
                found.append(checkpoint)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            log.warning("%s has a damaged manifest and is passed over", store.url_of(folder))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


@dataclass(frozen=True)
class SavedWeights:
    """A model's weights as a run's checkpoints hold them."""

    state: dict[str, Tensor]
    """fp32, by name: what the model's load_state_dict takes."""
    checkpoints: tuple[Checkpoint, ...]
    """Where they come from, newest first; more than one for a mean."""


def read_weights(url: str, weights: Weights, last: int = 1) -> SavedWeights:
    """The weights of the newest undamaged checkpoint at a URL, for tools of one process. Each file is read once.

    raw: the weights. ema: their moving average; raises UsageError if none was kept. avg: the mean of the weights of the
    `last` undamaged checkpoints (the paper's checkpoint averaging), or of all if there are fewer.

    Raises UsageError if there is no checkpoint, CheckpointError if all are damaged.
    """
    store = Store(url.rstrip("/"), STORE_DEADLINE_SECONDS)
    used: list[Checkpoint] = []
    sums: dict[str, Tensor] = {}
    for checkpoint in reversed(list_complete(store)):
        found = _read_kind(store, checkpoint, "ema" if weights == "ema" else "weight")
        if found is None:
            continue
        used.append(checkpoint)
        sums = {name: sums[name] + weight for name, weight in found.items()} if sums else found
        if len(used) == (last if weights == "avg" else 1):
            break
    if used:
        state = {name: total / len(used) for name, total in sums.items()} if weights == "avg" else sums
        return SavedWeights(state, tuple(used))
    if any(_STEP_FOLDER.fullmatch(folder) and store.exists(f"{folder}/{MANIFEST}") for folder in store.names()):
        raise CheckpointError(f"{url}: every checkpoint is damaged; copy the folder again, or train on")
    raise UsageError(f"{url}: holds no complete checkpoint; is it of the right run (run.dir of its config)?")


def _read_kind(store: Store, checkpoint: Checkpoint, kind: str) -> dict[str, Tensor] | None:
    """One tensor of each parameter, with one file in memory at a time; None if the checkpoint is damaged."""
    found: dict[str, Tensor] = {}
    for file in checkpoint.files:
        tensors = _read(store, checkpoint, file)
        if tensors is None:
            return None
        parameters = dict.fromkeys(name.partition("|")[0] for name in tensors)
        if any(f"{parameter}|{kind}" not in tensors for parameter in parameters):
            raise UsageError(
                f"{store.url_of(checkpoint.name)}: holds no average of the weights (optimizer.ema_decay was 0)"
            )
        # Copies: the rest of the file is let go.
        found |= {parameter: tensors[f"{parameter}|{kind}"].clone() for parameter in parameters}
    return found


def remove(store: Store, folder: str) -> None:
    """Delete a checkpoint, manifest first, so that one half deleted is no longer complete."""
    store.remove(f"{folder}/{MANIFEST}")
    store.remove(folder)


_STEP_FOLDER = re.compile(r"step-[0-9]{9}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*\.safetensors")  # no way out of the folder


def _read(store: Store, checkpoint: Checkpoint, file: FileEntry) -> dict[str, Tensor] | None:
    """The tensors of a file, None if it is damaged. Raises as `read_tensors`."""
    return read_tensors(store, f"{checkpoint.name}/{file['name']}", file)


def _is_entry(file: FileEntry) -> bool:
    """Whether a manifest's entry may be followed. Raises KeyError or TypeError for one that is no entry at all."""
    return bool(_FILE_NAME.fullmatch(file["name"])) and file["bytes"] >= 0 and len(file["sha256"]) == 64


def _copy_on_host(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
