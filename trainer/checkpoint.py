"""What is in a checkpoint, when is it complete, and which one does a run go on from?

A checkpoint is a folder `step-000001000/` of safetensors files, one written by each rank, and a `manifest.json`
written last. It holds full fp32 tensors (weights, Adam's moments, the average of the weights), never shards of
them, so it loads at any world size and ZeRO stage, and nothing in it can execute code. A folder without a
manifest, or whose files differ from it, is not a checkpoint.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from trainer.engine import Engine, State
from trainer.ranks import Ranks, all_sum, barrier, from_rank_0

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Weights = Literal["raw", "ema", "avg"]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the text says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its manifest says."""

    folder: str
    step: int
    samples: int
    """Training samples consumed: the whole state of the data stream."""
    config: dict[str, Any]
    """The run's resolved config, by section."""
    data_digest: str
    files: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.rsplit("/", 1)[-1]


class Checkpoints:
    """The checkpoints of one run, in a folder or under any fsspec URL. All methods are collective."""

    def __init__(self, url: str, ranks: Ranks, device: torch.device, keep_last: int) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._ranks, self._device, self._keep_last = ranks, device, keep_last

    def save(self, engine: Engine, *, step: int, samples: int, config: dict[str, Any], data_digest: str) -> None:
        """Write one checkpoint, then delete the oldest ones beyond `keep_last`."""
        folder = f"{self._root}/step-{step:09d}"
        if self._ranks.rank == 0:
            _remove(self._fs, folder)  # left by an attempt that was killed while it wrote
            self._fs.makedirs(folder, exist_ok=True)
        barrier()
        name = f"rank-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for index, (parameter, state) in enumerate(engine.state()):
            if index % self._ranks.world_size == self._ranks.rank:
                # Contiguous copies on the host: the gathered tensors are gone at the next step of the iterator.
                tensors |= {f"{parameter}|{key}": v.float().cpu().clone() for key, v in state.items()}
        content = safetensors.torch.save(tensors)
        _write(self._fs, f"{folder}/{name}", content)
        entry = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files = _from_all_ranks(entry, self._ranks.world_size)
        if self._ranks.rank == 0:
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "samples": samples,
                "data_digest": data_digest,
                "config": config,
                "files": files,
            }
            _write(self._fs, f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
            for old in list_complete(self._fs, self._root)[: -self._keep_last]:
                _remove(self._fs, old.folder)
        barrier()

    def newest(self, log: Any) -> Checkpoint | None:
        """The newest checkpoint whose every byte is right; damaged ones are passed over with one call of `log`."""
        candidates = from_rank_0(list_complete(self._fs, self._root) if self._ranks.rank == 0 else None)
        for checkpoint in reversed(candidates):
            damage = self._damage(checkpoint)
            if damage is None:
                return checkpoint
            log(f"checkpoint {checkpoint.name} is damaged ({damage}); trying an older one")
        return None

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights and optimizer state into the engine."""
        engine.load_state(read_states(self._fs, checkpoint), checkpoint.step)

    def _damage(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with a checkpoint, agreed by all ranks, each of which reads its share of the files."""
        mine = checkpoint.files[self._ranks.rank :: self._ranks.world_size]
        wrong = [file["name"] for file in mine if not _is_intact(self._fs, checkpoint.folder, file)]
        count = int(all_sum(torch.tensor([float(len(wrong))], device=self._device)).item())
        return f"{count} of {len(checkpoint.files)} files" if count else None


def list_complete(fs: fsspec.AbstractFileSystem, root: str) -> list[Checkpoint]:
    """Checkpoints under `root` that have a readable manifest, oldest first."""
    fs.invalidate_cache()
    if not fs.exists(root):
        return []
    found = []
    for folder in sorted(fs.ls(root, detail=False)):
        try:
            manifest = json.loads(fs.cat_file(f"{folder}/{MANIFEST}"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue  # being written, or killed while written
        if manifest["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: was written in checkpoint format {manifest['format_version']}; "
                f"this version reads {FORMAT_VERSION}"
            )
        del manifest["format_version"]
        found.append(Checkpoint(folder=folder.rstrip("/"), **manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def intact_of_run(run_dir: str, count: int) -> tuple[fsspec.AbstractFileSystem, list[Checkpoint]]:
    """The newest `count` complete and undamaged checkpoints of a run, newest first, for tools of one process.

    Raises CheckpointError if there is none.
    """
    fs, root = fsspec.core.url_to_fs(f"{run_dir}/checkpoints")
    intact = (
        checkpoint
        for checkpoint in reversed(list_complete(fs, root))
        if all(_is_intact(fs, checkpoint.folder, file) for file in checkpoint.files)
    )
    if found := list(itertools.islice(intact, count)):
        return fs, found
    raise CheckpointError(
        f"{run_dir}: holds no complete checkpoint; is it the folder of a run (run.dir of its config)?"
    )


def read_states(fs: fsspec.AbstractFileSystem, checkpoint: Checkpoint) -> Iterator[tuple[str, State]]:
    """Each parameter's name and full state, in the same order on every rank, one file in memory at a time."""
    for file in checkpoint.files:
        tensors = safetensors.torch.load(fs.cat_file(f"{checkpoint.folder}/{file['name']}"))
        states: dict[str, State] = {}
        for key in sorted(tensors):
            parameter, _, kind = key.partition("|")
            states.setdefault(parameter, {})[kind] = tensors[key]
        yield from states.items()


def read_weights(fs: fsspec.AbstractFileSystem, checkpoints: list[Checkpoint], weights: Weights) -> dict[str, Tensor]:
    """A model's `state_dict` from a run's checkpoints, newest first.

    raw: the newest weights. ema: their moving average; raises CheckpointError if none was kept. avg: the mean of the
    weights of all checkpoints given (the paper's checkpoint averaging).
    """
    if weights == "avg":
        sums: dict[str, Tensor] = {}
        for checkpoint in checkpoints:
            for name, state in read_states(fs, checkpoint):
                sums[name] = sums[name] + state["weight"] if name in sums else state["weight"]
        return {name: total / len(checkpoints) for name, total in sums.items()}
    kind = "ema" if weights == "ema" else "weight"
    states = dict(read_states(fs, checkpoints[0]))
    if any(kind not in state for state in states.values()):
        raise CheckpointError(f"{checkpoints[0].folder}: holds no average of the weights (optimizer.ema_decay was 0)")
    return {name: state[kind] for name, state in states.items()}


def _is_intact(fs: fsspec.AbstractFileSystem, folder: str, file: dict[str, Any]) -> bool:
    try:
        content = fs.cat_file(f"{folder}/{file['name']}")
    except FileNotFoundError:
        return False
    return len(content) == file["bytes"] and hashlib.sha256(content).hexdigest() == file["sha256"]


def _from_all_ranks(value: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _write(fs: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file; on a local disk it has reached the disk when this returns."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove(fs: fsspec.AbstractFileSystem, folder: str) -> None:
    """Delete a checkpoint, manifest first, so that one half deleted is no longer complete."""
    if fs.exists(f"{folder}/{MANIFEST}"):
        fs.rm_file(f"{folder}/{MANIFEST}")
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
