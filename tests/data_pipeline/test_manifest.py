"""Is a manifest read back as written, and is everything that could mislead a reader refused?"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.loader import open_shards
from data_pipeline.manifest import Manifest, check, digest_of, from_json, read_manifest, to_json, write_manifest
from data_pipeline.storage import DataError, Store
from tests.support.faulty_filesystem import FAULTS, FaultyFilesystem


@pytest.fixture
def document(packed: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((packed / "manifest.json").read_text())
    return loaded


def test_a_manifest_survives_writing_and_reading(document: dict[str, Any], tmp_path: Path) -> None:
    manifest = dataclasses.replace(from_json(document), classes=('odd [ "name" ]\n', "é"))
    store = Store(str(tmp_path), 0.0)
    write_manifest(store, manifest)
    assert read_manifest(store) == (manifest, to_json(manifest)["digest"])


def test_the_digest_covers_everything(document: dict[str, Any]) -> None:
    assert document["digest"] == digest_of(document)
    for key in document.keys() - {"digest"}:
        assert digest_of(document | {key: "other"}) != document["digest"]


def test_opening_reads_nothing_but_the_manifest(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    shards = open_shards(str(tmp_path))
    assert (shards.count, shards.image_size, shards.digest) == (3000, 8, document["digest"])


def set_block(place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["blocks"][1][place] = value

    return change


def set_shard(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["shards"][0][key] = value

    return change


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update({key: value})


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        (set_key("format_version", 2), "format version 2 .* reads version 1", 2),
        (set_key("count", 2999), "the manifest says 2999", 65),
        (set_key("count", "many"), "not a valid manifest", 65),
        (set_key("blocks", []), "the blocks hold 0", 65),
        (set_key("shards", None), "not a valid manifest", 65),
        (set_key("classes", 7), "not a valid manifest", 65),
        (set_key("image", {}), "has no 'size': another version of this program wrote it", 65),
        (set_block(0, 5), "refers to shard 5", 65),
        (set_block(0, -1), "refers to shard -1", 65),
        (set_block(1, 0), "bytes for 512 samples", 65),
        (set_block(2, 10**12), "outside its shard", 65),
        (set_block(3, 10**9), "samples of", 65),
        (set_block(4, "zz"), "no checksum", 65),
        (set_shard("name", "../../etc/passwd.tar"), "not a name for a shard", 65),
        (set_shard("name", "https://elsewhere/x.tar"), "not a name for a shard", 65),
        (set_shard("sha256", "?"), "no SHA-256", 65),
        (set_shard("count", 1), "the blocks hold 3000", 65),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(
    document: dict[str, Any],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
    code: int,
) -> None:
    change(document)
    document["digest"] = digest_of(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=message) as caught:
        open_shards(str(tmp_path))
    assert caught.value.exit_code == code


def test_a_manifest_from_before_a_key_was_added_is_refused_with_what_to_do(
    document: dict[str, Any], tmp_path: Path
) -> None:
    del document["image"]["encoding"]
    document["digest"] = digest_of(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="manifest.json has no 'encoding': another version .* pack it again") as caught:
        open_shards(str(tmp_path))
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("pattern", ["train-{000000..000010}.tar", "train-*.tar", "train-000000.tar"])
def test_a_pattern_or_a_shard_instead_of_the_folder_is_explained(packed: Path, pattern: str) -> None:
    with pytest.raises(DataError, match="no shards at .*give the folder of the shards, not their names") as caught:
        open_shards(f"{packed}/{pattern}")
    assert caught.value.exit_code == 2


def test_an_edited_manifest_does_not_match_its_digest(document: dict[str, Any], tmp_path: Path) -> None:
    document["seed"] = 99
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="does not match its own digest") as caught:
        open_shards(str(tmp_path))
    assert caught.value.exit_code == 65


def test_a_manifest_that_was_read_wrong_is_read_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = open_shards(str(packed)).digest
    faulty = FaultyFilesystem(share=0.6, seed=0)
    monkeypatch.setattr(storage, "open_filesystem", lambda url: faulty)
    monkeypatch.setattr(storage, "LONGEST_DELAY_SECONDS", 0.001)
    for _ in range(20):
        assert open_shards(str(packed)).digest == right
    assert all(faulty.counts[fault] for fault in FAULTS)


def test_blocks_that_overlap_or_leave_gaps_are_refused(document: dict[str, Any]) -> None:
    manifest = from_json(document)
    check(manifest)
    swapped = (manifest.blocks[1], manifest.blocks[0], *manifest.blocks[2:])
    with pytest.raises(ValueError, match="do not follow each other"):
        check(dataclasses.replace(manifest, blocks=swapped))


def test_empty_shards_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    empty: Manifest = dataclasses.replace(from_json(document), count=0, shards=(), blocks=())
    write_manifest(Store(str(tmp_path), 0.0), empty)
    with pytest.raises(DataError, match=r"holds no images \(count 0\)") as caught:
        open_shards(str(tmp_path))
    assert caught.value.exit_code == 2


def test_what_is_missing_is_said(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards at .*/nowhere: there is no such folder") as caught:
        open_shards(str(tmp_path / "nowhere"))
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match=r"no shards at .*: there is no manifest.json; pack them first"):
        open_shards(str(tmp_path))
    (tmp_path / "train-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="holds 1 shard but no manifest.json, so it is not complete"):
        open_shards(str(tmp_path))
