"""What does each rank of several see and hold when they save and load checkpoints? A job of its own for tests.

    python -m tests.support.checkpoint_ranks FOLDER

Forks ranks that talk over gloo, without a model: their state is a function of the step. Prints one JSON object: for
each case the answers of all ranks. Needs MALLOC_MMAP_THRESHOLD_ in its environment (tests/support/mapped_memory.py).
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from data_pipeline.storage import EXIT_UNREACHABLE, DataError, Store
from tests.support.launch import SMALL_JOB
from tests.support.mapped_memory import mapped_bytes
from trainer import tensor_file
from trainer.checkpoint import Checkpoints, digest_of
from trainer.config import load_config
from trainer.engine import State
from trainer.errors import CheckpointError
from trainer.ranks import Ranks

SIZES = (1, 2, 3)
STEPS = (1, 2)
LARGE_PARAMETERS, LARGE_NUMBERS = 12, 2**18
"""Of the state by which memory is measured: so many parameters with two tensors of a MiB each."""
LARGE_REQUEST_BYTES = 2**20


class Numbers:
    """An engine whose state after a step is known, and which forgets what it is given."""

    device = torch.device("cpu")

    def __init__(self, step: int, large: bool = False) -> None:
        self.step, self.large = step, large
        self.loaded: list[tuple[str, bool]] = []
        self.peak_bytes = 0

    def state(self) -> Iterator[tuple[str, State]]:
        for index in range(LARGE_PARAMETERS if self.large else 7):
            shape = (LARGE_NUMBERS,) if self.large else (index % 3, 5) if index % 2 else (index + 1,)
            yield f"layer.{index}", {kind: self._tensor(shape, f"{index}{kind}") for kind in ("weight", "exp_avg")}

    def load_state(self, states: Iterable[tuple[str, State]], updates: int) -> None:
        expected = dict(self.state()) if not self.large else {}
        for name, state in states:
            self.peak_bytes = max(self.peak_bytes, mapped_bytes())
            same = self.large or all(torch.equal(state[kind], expected[name][kind]) for kind in expected[name])
            self.loaded.append((name, same))

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    def _tensor(self, shape: tuple[int, ...], name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.step}{name}".encode()).digest()[:4])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    folder = Path(sys.argv[1])
    answers: dict[str, list[Any]] = {}
    for files in SIZES:
        run_ranks(files, lambda ranks, files=files: save(ranks, folder / str(files)))
    for files in SIZES:
        for size in SIZES:
            answers[f"{files} files, {size} ranks"] = run_ranks(
                size, lambda ranks, f=files: load(ranks, folder / str(f))
            )
    damaged, wrong = (shutil.copytree(folder / "2", folder / name) for name in ("damaged", "wrong"))
    replace_newest(damaged, lambda content: content[:-5] + bytes([content[-5] ^ 4]) + content[-4:], tell=False)
    answers["damaged"] = run_ranks(2, lambda ranks: load(ranks, damaged))
    replace_newest(wrong, lambda content: b"not a file of tensors", tell=True)
    answers["wrong"] = run_ranks(2, lambda ranks: load(ranks, wrong))
    answers["away"] = run_ranks(2, lambda ranks: load_without_a_store(ranks, folder / "2"))
    answers["memory of saving"] = run_ranks(2, lambda ranks: save_large(ranks, folder / "large"))
    answers["memory of loading"] = run_ranks(2, lambda ranks: load_large(ranks, folder / "large"))
    print(json.dumps(answers))


def run_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each rank, in processes of their own."""
    with tempfile.TemporaryDirectory() as temporary:
        children = []
        for rank in range(size):
            if (child := os.fork()) == 0:
                place = Ranks(rank, size, rank, size)
                rendezvous = f"file://{temporary}/rendezvous"
                torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
                Path(temporary, str(rank)).write_text(json.dumps(work(place)))
                torch.distributed.barrier()
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        return [json.loads(Path(temporary, str(rank)).read_text()) for rank in range(size)]


def checkpoints(ranks: Ranks, folder: Path) -> Checkpoints:
    settings = load_config(SMALL_JOB, ["checkpoint.keep_last=2", "checkpoint.background=false"]).checkpoint
    return Checkpoints(str(folder), ranks, torch.device("cpu"), settings, attempt=1)


def save(ranks: Ranks, folder: Path) -> None:
    for step in STEPS:
        write(checkpoints(ranks, folder), Numbers(step))


def write(to: Checkpoints, engine: Numbers) -> None:
    step = engine.step
    to.save(engine, step=step, updates=step, samples=step, bits_per_dim=None, config={}, data_digest="")  # type: ignore[arg-type]
    assert to.complete() is not None


def load(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Which step this rank loaded, whether each parameter was right, what it was told and how much it read."""
    read, notes = counted_reads(), []
    try:
        loaded = checkpoints(ranks, folder).newest(notes.append)
    except (CheckpointError, DataError) as error:
        return {"error": str(error), "code": error.exit_code}
    assert loaded is not None
    engine = Numbers(loaded.checkpoint.step)
    loaded.put_into(engine)  # type: ignore[arg-type]
    return {"step": engine.step, "loaded": engine.loaded, "notes": notes, "read": read}


def load_without_a_store(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The same where the store does not answer one rank."""

    def away(*_: object) -> bytes:
        raise DataError("the store is away", EXIT_UNREACHABLE)

    if ranks.rank == 1:
        Store.size = away  # type: ignore[method-assign, assignment]
    return load(ranks, folder)


def counted_reads() -> dict[str, int]:
    """How many bytes of each file of tensors this process reads from now on; kept current."""
    read: dict[str, int] = {}
    whole = Store.read

    def counting(self: Store, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        data = whole(self, name, begin, end)
        if name.endswith(".safetensors"):
            read[name] = read.get(name, 0) + len(data)
        return data

    Store.read = counting  # type: ignore[method-assign]
    return read


def replace_newest(folder: Path, change: Callable[[bytes], bytes], *, tell: bool) -> None:
    """Change rank 1's file of the newest checkpoint, and where `tell` is true, its manifest with it."""
    manifest_path = folder / f"step-{STEPS[-1]:09d}/manifest.json"
    manifest = json.loads(manifest_path.read_text())
    entry = manifest["files"][1]
    content = change((manifest_path.parent / entry["name"]).read_bytes())
    (manifest_path.parent / entry["name"]).write_bytes(content)
    if tell:
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest_path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))


def save_large(ranks: Ranks, folder: Path) -> int:
    """The most bytes that writing holds, beyond what the engine has."""
    peak, before = [0], mapped_bytes()
    write_pieces = Store.write_pieces

    def sampling(self: Store, name: str, pieces: Callable[[], Iterator[memoryview]]) -> int:
        def sampled() -> Iterator[memoryview]:
            for piece in pieces():
                peak[0] = max(peak[0], mapped_bytes() - before)
                yield piece

        return write_pieces(self, name, sampled)

    Store.write_pieces = sampling  # type: ignore[method-assign, assignment]
    write(checkpoints(ranks, folder), Numbers(1, large=True))
    return peak[0]


def load_large(ranks: Ranks, folder: Path) -> int:
    """The most bytes that loading holds."""
    peak, before = [0], mapped_bytes()
    read = Store.read

    def sampling(self: Store, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        data = read(self, name, begin, end)
        peak[0] = max(peak[0], mapped_bytes() - before)
        return data

    Store.read = sampling  # type: ignore[method-assign]
    tensor_file.REQUEST_BYTES = LARGE_REQUEST_BYTES
    engine = Numbers(1, large=True)
    loaded = checkpoints(ranks, folder).newest(print)
    assert loaded is not None
    loaded.put_into(engine)  # type: ignore[arg-type]
    return max(peak[0], engine.peak_bytes - before)


if __name__ == "__main__":
    main()
