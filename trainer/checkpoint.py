"""What is in a checkpoint, when is it complete, and which one does a run go on from?

A checkpoint is a folder `step-000001000/` with one safetensors file of each rank, and a `manifest.json` that is
written last. It holds full fp32 tensors (weights, the optimizer's moments, the average of the weights), never shards of
them. So it loads at any world size and ZeRO stage. Nothing in it can execute code. A folder without a manifest is not a
checkpoint, and neither is one whose files differ from its manifest. No pointer names the newest one, so none can lie.

Each file is read once, by one rank, which hands its tensors on to the others (`LoadedCheckpoint`).
"""

import hashlib
import itertools
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.storage import DataError, Store
from data_pipeline.wording import counted
from trainer.config import RunConfig
from trainer.engine import Engine, State
from trainer.errors import REFUSED, CheckpointError, UsageError
from trainer.faults.replicas import check_replicas
from trainer.options import CheckpointConfig
from trainer.ranks import Ranks, from_all_ranks, from_rank, from_rank_0
from trainer.tensor_file import FileEntry, is_as_written, read_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
WITHOUT_DIGEST = 2
"""The format before manifests had a digest of themselves. It is read as well."""
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 << 20
"""Bytes of a manifest that is read."""
FAR_TOO_LARGE = 8
"""So many times what a model's weights take is no checkpoint of it. With all of the optimizer's state it is five."""
STORE_DEADLINE_SECONDS = 120.0
WRITES = 3
"""So many times a file is written that reads back differently."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 10.0
"""Between two tries of a checkpoint that training does not go on without."""
LARGEST_COUNT = 2**53
"""Of steps or samples."""
FAILURES_IN_A_ROW = 3
"""After so many failed checkpoints in a row the run ends: it would only have more work to lose."""
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

    def __init__(
        self,
        url: str,
        ranks: Ranks,
        device: torch.device,
        settings: CheckpointConfig,
        attempt: int,
        completed: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`device` is where loaded tensors go. `attempt` becomes part of the files' names. Rank 0 calls `completed`.

        It is called with the step of each checkpoint that is complete, before older ones are deleted.

        So two attempts that overlap (a node was lost and came back) write different files, and the manifest that comes
        last, whichever it is, describes a complete checkpoint.
        """
        self._store = Store(url.rstrip("/"), STORE_DEADLINE_SECONDS)
        self._ranks, self._device, self._settings, self._attempt = ranks, device, settings, attempt
        self._completed = completed
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
        """Copy this rank's share of the state to the host and begin to write it. Collective.

        Training may go on at once: what is written is a copy. `is_written` and `complete` tell and do the rest. `alive`
        is called after each parameter. Raises CheckpointError as `complete` does. Raises DifferentWeights, before
        anything is written, if the ranks' copies of the weights differ.
        """
        self.complete()  # never two checkpoints at once
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
        """Wait for all ranks' files, write the manifest, and delete what need not be kept. Collective.

        Returns the checkpoint that is complete now; None if nothing was being written, or if it failed. A failure is a
        warning, and older checkpoints stay. Several in a row raise CheckpointError.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        checkpoint, problem = self._finish(writing)
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

    def complete_last(self, patience_seconds: float, alive: Callable[[], None] = lambda: None) -> str | None:
        """As `complete`, where nothing else is left to be done: tries again for so long. Collective.

        Returns what went wrong, None if all is well. `alive` is called before each further try.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        deadline, pause = time.monotonic() + patience_seconds, FIRST_PAUSE_SECONDS
        while True:
            checkpoint, problem = self._finish(writing)
            if problem is None or not from_rank_0(time.monotonic() + pause < deadline):
                return problem
            if self._ranks.rank == 0 and pause == FIRST_PAUSE_SECONDS:
                log.warning("checkpoint %s was not written: %s; trying again", checkpoint.name, problem)
            time.sleep(pause)
            alive()
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            writing.write()

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that has a manifest; None if there is none. Collective."""
        try:
            complete = list_complete(self._store) if self._ranks.rank == 0 else []
        except (CheckpointError, DataError):
            complete = []
        step: int | None = from_rank_0(complete[-1].step if complete else None)
        return step

    def _finish(self, writing: "_Writing") -> tuple[Checkpoint, str | None]:
        """Wait for all ranks' files and make the checkpoint complete; returns it, and what went wrong. Collective."""
        if writing.ident is not None:
            writing.join()
        entries = from_all_ranks(writing.result)
        problem = next((entry for entry in entries if isinstance(entry, str)), None)
        checkpoint = Checkpoint(**(asdict(writing.checkpoint) | {"files": entries}))
        if problem is None:
            problem = from_rank_0(self._commit(checkpoint) if self._ranks.rank == 0 else None)
        return checkpoint, problem

    def newest(self, note: Callable[[str], None]) -> "LoadedCheckpoint | None":
        """Read the newest checkpoint whose every byte is right; None if there is none. Collective.

        Each file is read once, by one rank. `note` is told of each damaged checkpoint, and an older one is tried. What
        goes wrong on one rank is raised on all of them: DataError if the store cannot be read, CheckpointError if a
        file matches its manifest and is no file of fp32 tensors.
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
        """This rank's files of a checkpoint by their number, with None for a damaged one; and the error, if any."""
        mine: dict[int, dict[str, Tensor] | None] = {}
        try:
            for number in range(self._ranks.rank, len(checkpoint.files), self._ranks.world_size):
                mine[number] = _read(self._store, checkpoint, checkpoint.files[number])
        except (CheckpointError, DataError) as error:
            return {}, error
        return mine, None

    def _commit(self, checkpoint: Checkpoint) -> str | None:
        """Write the manifest, then tidy up. On rank 0. Returns what went wrong with the manifest."""
        manifest = {"format_version": FORMAT_VERSION} | asdict(checkpoint)
        content = json.dumps(manifest | {"digest": digest_of(manifest)}, indent=1).encode()
        path = f"{checkpoint.name}/{MANIFEST}"
        try:
            for _ in range(WRITES):
                self._store.write(path, content)
                self._store.forget(path)
                if self._store.read(path) == content:
                    break
            else:
                return _reads_differently(self._store.url_of(path))
        except DataError as error:
            return str(error)
        self._completed(checkpoint.step)
        try:
            self._tidy(checkpoint)
        except DataError as error:  # the new checkpoint is complete all the same
            log.warning("old checkpoints stay: %s", error)
        return None

    def _tidy(self, newest: Checkpoint) -> None:
        """Delete checkpoints that need not be kept, and older folders that killed attempts left without a manifest.

        In the newest folder all files stay: an older attempt that still runs may yet write a manifest for its own.
        """
        # Newer ones are damaged, or the work of another attempt: nothing is deleted because of them.
        complete = [checkpoint for checkpoint in list_complete(self._store) if checkpoint.step <= newest.step]
        kept = {checkpoint.name for checkpoint in to_keep(complete, self._settings)} | {newest.name}
        names = {checkpoint.name for checkpoint in complete}
        for folder in self._store.names():
            if not _STEP_FOLDER.fullmatch(folder) or folder in kept:
                continue
            if folder in names or folder < newest.name:  # another attempt may be writing a newer one
                try:
                    remove(self._store, folder)
                except DataError as error:
                    if error.exit_code != REFUSED:
                        raise
                    log.warning("an old checkpoint stays: %s", error)  # a link; the others can go


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
        """`contents` has the shapes of each file's tensors, by name. `mine` has this rank's files, by their number.

        Of n ranks, rank r has the files r, r + n, r + 2 n, and so on.
        """
        self.checkpoint = checkpoint
        self._ranks, self._device, self._contents, self._mine = ranks, device, contents, mine

    def put_into(self, engine: Engine) -> None:
        """Give an engine the weights and the state of the optimizer. Only once; collective."""
        engine.load_state(self.states(), self.checkpoint.updates)

    def states(self) -> Iterator[tuple[str, State]]:
        """Each parameter's name and full state on the device, in the same order on all ranks. Only once; collective.

        The rank that read a parameter sends it to the others. So a rank holds its own files and the parameter that is
        on its way. It frees a file when all of it has been sent.
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
        self.result: FileEntry | str = "its writing never began"
        """The manifest's entry of the file, or what went wrong."""
        self._store, self._name, self._tensors = store, name, tensors

    def run(self) -> None:
        self.write()

    def write(self) -> None:
        """Write the file, and read it back. After a failure it can be called again."""
        if isinstance(self.result, dict):
            return  # of another rank's failure
        path = f"{self.checkpoint.name}/{self._name}"
        try:
            for _ in range(WRITES):
                entry = write_tensors(self._store, path, self._tensors)
                if is_as_written(self._store, path, entry):
                    self.result, self._tensors = entry, {}
                    return
            self.result = _reads_differently(self._store.url_of(path))
        except Exception as error:  # noqa: BLE001 (nobody could catch it here; `complete` tells all ranks)
            self.result = str(error) or type(error).__name__


def to_keep(complete: list[Checkpoint], settings: CheckpointConfig) -> list[Checkpoint]:
    """Those that the settings keep: the newest, the best and the permanent ones. `complete` begins with the oldest."""
    evaluated = [c for c in complete if c.bits_per_dim is not None and math.isfinite(c.bits_per_dim)]
    best = sorted(evaluated, key=lambda c: (c.bits_per_dim, -c.step))[: settings.keep_best]
    every = settings.keep_every_steps
    return [
        c
        for index, c in enumerate(complete)
        if index >= len(complete) - settings.keep_last or c in best or (every and c.step % every == 0)
    ]


def list_complete(store: Store) -> list[Checkpoint]:
    """The checkpoints of a store that have a readable manifest, oldest first. Their files are not looked at.

    Raises CheckpointError for one of another format, DataError if the store cannot be read.
    """
    found = []
    for folder in folders_with_manifest(store):
        try:
            checkpoint = _read_manifest(store, folder)
        except DataError:
            raise
        except (ValueError, RecursionError):
            checkpoint = None
        if checkpoint is not None and checkpoint.name == folder:
            found.append(checkpoint)
        else:
            log.warning("%s has a damaged manifest and is passed over", store.url_of(folder))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _read_manifest(store: Store, folder: str) -> Checkpoint | None:
    path = f"{folder}/{MANIFEST}"
    if store.size(path) > LARGEST_MANIFEST:
        return None
    return _from_manifest(json.loads(store.read(path)), store.url_of(folder))


def folders_with_manifest(store: Store) -> list[str]:
    """Names of all checkpoints of a store, damaged or not, oldest first.

    Other folders are still being written, or their attempts were killed. Raises DataError.
    """
    return [f for f in store.names() if _STEP_FOLDER.fullmatch(f) and store.exists(f"{f}/{MANIFEST}")]


@dataclass(frozen=True)
class SavedWeights:
    """A model's weights as a run's checkpoints hold them."""

    state: dict[str, Tensor]
    """fp32, by name: what the model's load_state_dict takes."""
    checkpoints: tuple[Checkpoint, ...]
    """Where they come from, newest first; more than one for a mean."""


def read_weights(url: str, weights: Weights, last: int = 1, parameters: int | None = None) -> SavedWeights:
    """Weights of the newest undamaged checkpoint at a URL, for tools of one process. Each file is read once.

    raw: the weights themselves. ema: their moving average. avg: the mean of the weights of the newest `last` undamaged
    checkpoints (the paper's checkpoint averaging), or of all if there are fewer. `parameters` is how many numbers the
    model has: a checkpoint that is far too small or too large for it is not read.

    Raises UsageError if there is no checkpoint or no moving average, CheckpointError if all checkpoints are damaged, or
    one is of another size.
    """
    store = Store(url.rstrip("/"), STORE_DEADLINE_SECONDS)
    used: list[Checkpoint] = []
    sums: dict[str, Tensor] = {}
    for checkpoint in reversed(list_complete(store)):
        size, needed = sum(file["bytes"] for file in checkpoint.files), 4 * (parameters or 0)
        if needed and not needed // FAR_TOO_LARGE <= size <= needed * FAR_TOO_LARGE + LARGEST_MANIFEST:
            raise CheckpointError(
                f"{store.url_of(checkpoint.name)}: has {size:,} bytes, and the weights of the run's model take "
                f"{needed:,}"
            )
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
    if folders_with_manifest(store):
        raise CheckpointError(f"{url}: every checkpoint is damaged; copy the folder again, or train on")
    raise UsageError(f"{url}: holds no complete checkpoint; is it of the right run (run.dir of its config)?")


def _read_kind(store: Store, checkpoint: Checkpoint, kind: str) -> dict[str, Tensor] | None:
    """One tensor of each parameter; None if the checkpoint is damaged. One file is in memory at a time."""
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
        # Copies, so that the rest of the file can be freed.
        found |= {parameter: tensors[f"{parameter}|{kind}"].clone() for parameter in parameters}
    return found


def remove(store: Store, folder: str) -> None:
    """Delete a checkpoint, its manifest first: what a killed process leaves of it is then no checkpoint."""
    store.remove(f"{folder}/{MANIFEST}")
    store.remove(folder)


_STEP_FOLDER = re.compile(r"step-[0-9]{9}")
_FILE_NAME = re.compile(r"rank-(?P<rank>[0-9]{5})-of-(?P<ranks>[0-9]{5})\.attempt-[0-9]+\.safetensors")


def _read(store: Store, checkpoint: Checkpoint, file: FileEntry) -> dict[str, Tensor] | None:
    """The tensors of a file, None if it is damaged. Raises as `read_tensors`."""
    return read_tensors(store, f"{checkpoint.name}/{file['name']}", file)


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says, apart from its `digest`."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _from_manifest(manifest: object, url: str) -> Checkpoint | None:
    """What a manifest says; None if it is damaged. Raises CheckpointError for one of another format."""
    if not isinstance(manifest, dict):
        return None
    manifest = dict(manifest)
    digest = manifest.pop("digest", None)
    if digest is not None and digest != digest_of(manifest):
        return None
    version = manifest.pop("format_version", None)
    if type(version) is not int:
        return None
    if version not in (WITHOUT_DIGEST, FORMAT_VERSION):
        raise CheckpointError(
            f"{url} was written in checkpoint format {version} and this version of the "
            f"trainer reads {FORMAT_VERSION}: use the version that wrote it, or another run.dir"
        )
    if (digest is None) != (version == WITHOUT_DIGEST):
        return None
    if manifest.keys() != {field.name for field in fields(Checkpoint)}:
        return None
    checkpoint = Checkpoint(**manifest)
    counts = checkpoint.step, checkpoint.updates, checkpoint.samples
    right = (
        all(type(count) is int and 0 <= count <= LARGEST_COUNT for count in counts)
        and checkpoint.updates <= checkpoint.step
        and (checkpoint.bits_per_dim is None or type(checkpoint.bits_per_dim) is float)
        and isinstance(checkpoint.config, dict)
        and isinstance(checkpoint.data_digest, str)
        and isinstance(checkpoint.files, list)
        and all(map(_is_entry, checkpoint.files))
        and _are_all(checkpoint.files)
    )
    return checkpoint if right else None


def _is_entry(file: object) -> bool:
    """Whether a manifest's entry names a file of its folder."""
    if not isinstance(file, dict) or file.keys() != FileEntry.__annotations__.keys():
        return False
    name, size, digest = file["name"], file["bytes"], file["sha256"]
    is_name = isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None
    return is_name and type(size) is int and size >= 0 and isinstance(digest, str) and len(digest) == 64


def _are_all(files: list[FileEntry]) -> bool:
    """Whether files are those of all ranks that wrote a checkpoint, so that no parameter is missing."""
    places = [_FILE_NAME.fullmatch(file["name"]) for file in files]
    found = [(int(place["rank"]), int(place["ranks"])) for place in places if place is not None]
    return bool(files) and found == [(rank, len(files)) for rank in range(len(files))]


def _reads_differently(url: str) -> str:
    return f"{url} was written {counted(WRITES, 'time')} and read back differently: does its disk or network flip bits?"


def _copy_on_host(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
