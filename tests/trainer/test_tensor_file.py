"""Are the files of tensors those of the safetensors library, written and read without a second copy of them?"""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.storage import DataError, Store
from trainer import tensor_file
from trainer.tensor_file import read_tensors, write_tensors

CASES = {
    "some": {"b|weight": torch.randn(3, 5), "a|weight": torch.randn(7), "a|exp_avg": torch.randn(2, 1, 2)},
    "a number and nothing": {"x": torch.tensor(1.5), "y": torch.empty(0, 4)},
    "an odd name": {'ä"\\\n' * 60: torch.ones(1)},
    "more than a piece": {"big": torch.randn(700_000), "small": torch.randn(3)},
    "none": {},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path), 0.0)


@pytest.mark.parametrize("tensors", CASES.values(), ids=CASES.keys())
def test_a_file_is_what_the_library_writes(store: Store, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    entry = write_tensors(store, "step/x.safetensors", tensors)
    assert (tmp_path / "step/x.safetensors").read_bytes() == safetensors.torch.save(tensors)
    assert entry["bytes"] == (tmp_path / "step/x.safetensors").stat().st_size


@pytest.mark.parametrize("request_bytes", [64, 2**20])
@pytest.mark.parametrize("tensors", CASES.values(), ids=CASES.keys())
def test_what_was_written_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor], request_bytes: int
) -> None:
    if sum(tensor.nbytes for tensor in tensors.values()) < 1e6 or request_bytes > 1e6:
        monkeypatch.setattr(tensor_file, "REQUEST_BYTES", request_bytes)
    entry = write_tensors(store, "step/x.safetensors", tensors)
    read = read_tensors(store, "step/x.safetensors", entry)
    assert read is not None and list(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].shape == tensor.shape for name, tensor in tensors.items())


def test_a_file_of_the_library_with_a_text_of_its_own_is_read(store: Store, tmp_path: Path) -> None:
    entry = write_tensors(store, "step/x.safetensors", CASES["some"])
    content = safetensors.torch.save(CASES["some"], metadata={"by": "somebody"})
    store.write("step/x.safetensors", content)
    entry |= {"bytes": len(content), "sha256": tensor_file.hashlib.sha256(content).hexdigest()}
    read = read_tensors(store, "step/x.safetensors", entry)
    assert read is not None and torch.equal(read["b|weight"], CASES["some"]["b|weight"])


def test_a_write_that_is_tried_again_begins_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient, pieces, tries = Store(str(tmp_path), 60.0), tensor_file._pieces, 0

    def interrupted(tensors: dict[str, Tensor]) -> object:
        nonlocal tries
        tries += 1
        for number, piece in enumerate(pieces(tensors)):
            if tries == 1 and number == 2:
                raise OSError(5, "Input/output error")
            yield piece

    monkeypatch.setattr(tensor_file, "_pieces", interrupted)
    entry = write_tensors(patient, "step/x.safetensors", CASES["more than a piece"])
    assert tries == 2
    assert read_tensors(store, "step/x.safetensors", entry) is not None
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["x.safetensors"]


def test_a_store_that_is_away_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_tensors(store, "step/x.safetensors", CASES["some"])

    def away(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_pipeline.storage.bytes_of", away)
    with pytest.raises(DataError, match=r"cannot read .*x\.safetensors"):
        read_tensors(store, "step/x.safetensors", entry)
