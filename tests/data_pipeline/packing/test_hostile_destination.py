"""Is what a packing reads back at its destination data, whoever wrote it?"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.loader import open_shards
from data_pipeline.manifest import check, digest_of, read_manifest, to_json
from data_pipeline.pack import main
from data_pipeline.packing import steps
from data_pipeline.packing.claim import PLAN_NAME, Outline, check_claim, read_record, record_name
from data_pipeline.packing.tasks import read_staged
from data_pipeline.shard_format import SampleLayout
from data_pipeline.storage import DataError, Store
from data_pipeline.verify import main as verify

SIZE, IMAGES = 4, 1100
COMMAND = ["--source", "photographs", "--size", str(SIZE), "--split", "train", "--images", str(IMAGES)]
COMMAND += ["--workers", "1", "--shard-images", "512"]
STAGED = "_packing/scratch/group-000000.json"
ODD = [
    *(b"null true -1 1.5 1e999 NaN -Infinity [] {} [[]] [null] [1] {\"\":{}}".split()),
    b"1" + b"0" * 400, b"1" + b"0" * 5000, b"9223372036854775808",
    b"[" * 300 + b"]" * 300, b"[" * 99_999 + b"]" * 99_999,
    b'""', b'"80"', b'"\\u001b[2J"', b'"../../x"', b'"\\ud800"', b'"\xff\xfe"', b'"' + b"x" * 5_000 + b'"',
]  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packing that was interrupted before it wrote the manifest."""
    folder = tmp_path_factory.mktemp("unfinished") / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "write_manifest", interrupt)
        assert main([*COMMAND, "--dest", str(folder)]) == 2
    return folder


@pytest.fixture(scope="module")
def finished(unfinished: Path) -> Path:
    folder = unfinished.with_name("finished")
    shutil.copytree(unfinished, folder)
    assert main([*COMMAND, "--dest", str(folder)]) == 0
    return folder


def interrupt(*arguments: object) -> None:
    raise DataError("interrupted")


def spoiled(document: dict[str, Any], dice: random.Random) -> bytes:
    """The JSON text of a document with one thing wrong."""
    text = json.dumps(document).encode()
    how = dice.randrange(8)
    if how == 0:
        return text[: dice.randrange(len(text))]
    if how == 1:
        place = dice.randrange(len(text))
        return text[:place] + bytes([dice.randrange(256)]) + text[place + 1 :]
    if how == 2:
        return dice.choice([*ODD, b"", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text + text])
    document = json.loads(text)
    places = list(places_in(document))
    container, key = dice.choice(places[: len(document)] if dice.random() < 0.5 else places)
    if how == 3:
        del container[key]
    elif how == 4 and isinstance(container, dict):
        container["\x1b[2J"] = "\x1b[2J"
    else:
        container[key] = "HERE"
    return json.dumps(document).encode().replace(b'"HERE"', dice.choice(ODD))


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document with a key or an index of it, outer ones first."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 5)) if isinstance(value, list) else ()
    yield from ((value, key) for key in keys)
    for key in keys:
        yield from places_in(value[key])


def test_odd_records_of_shards_and_groups_are_passed_over(unfinished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(unfinished, folder)
    store, dice = Store(str(folder), 0.0), random.Random(0)
    record, staged = (json.loads((folder / name).read_bytes()) for name in (record_name(0), STAGED))
    shard = Outline(0, "train-000000.tar", record["count"], SampleLayout(SIZE).stride, record["plan"])
    expected, taken = read_record(store, shard), 0
    assert expected is not None
    for _ in range(300):
        (folder / record_name(0)).write_bytes(spoiled(record, dice))
        found = read_record(store, shard)
        taken += found is not None
        assert found is None or (found.blocks and found.count == expected.count and len(found.sha256) == 64)
        (folder / STAGED).write_bytes(spoiled(staged, dice))
        group = read_staged(str(folder / "_packing/scratch"), 0, SIZE)
        assert group is None or (len(group.labels) == len(staged["labels"]) and max(group.labels) < 10**8)
    assert taken < 60, "an additional key and a digit of a checksum are all that can be taken"


def test_an_odd_plan_is_another_packings(unfinished: Path, tmp_path: Path) -> None:
    store, dice = Store(str(tmp_path), 0.0), random.Random(1)
    plan = json.loads((unfinished / PLAN_NAME).read_bytes())
    digest = digest_of(plan)
    for _ in range(200):
        store.write(PLAN_NAME, spoiled(plan, dice))
        with pytest.raises(DataError) as caught:
            check_claim(store, digest)
        assert caught.value.exit_code in (2, 65) and len(str(caught.value)) < 1000


def test_an_odd_manifest_is_refused(finished: Path, tmp_path: Path) -> None:
    store, dice, taken = Store(str(tmp_path), 0.0), random.Random(2), 0
    manifest = json.loads((finished / "manifest.json").read_bytes())
    for _ in range(400):
        text = spoiled(manifest, dice)
        try:
            document = json.loads(text)
            text = json.dumps(document | {"digest": digest_of(document)}).encode()
        except (AttributeError, TypeError, ValueError, RecursionError):
            pass  # then its digest cannot be right, either
        store.write("manifest.json", text)
        try:
            found, _ = read_manifest(store)
        except DataError as error:
            assert error.exit_code in (2, 65) and len(str(error)) < 1000
            continue
        taken += 1
        check(found)
        assert to_json(found) and sum(shard.bytes for shard in found.shards) / 1e6 < 100
    assert taken < 100


def spoil_record(folder: Path) -> None:
    record = json.loads((folder / record_name(1)).read_bytes())
    (folder / record_name(1)).write_text(json.dumps(record | {"name": "../\x1b[2J.tar", "count": 10**400}))


def lose_a_shard(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def nest_the_plan(folder: Path) -> None:
    (folder / PLAN_NAME).write_text('{"a":' * 50_000 + "1" + "}" * 50_000)


def link(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return spoil


def pipe(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (spoil_record, 0, "is passed over, and its shard is written again: count: "),
        (lose_a_shard, 0, "train-000001.tar is not there, or has another size"),
        (pipe(record_name(0)), 0, "is passed over, and its shard is written again"),
        (pipe(STAGED), 0, "is a link or another special file"),
        (link(STAGED), 0, "is a link or another special file"),
        (link(record_name(0)), 77, "is a link, and links are not followed in the journal"),
        (link("_packing"), 77, "is a link, and links are not followed in the journal"),
        (link("_packing/scratch"), 77, "is a link, and links are not followed in the journal"),
        (nest_the_plan, 65, "is not JSON: Invalid JSON: recursion limit exceeded"),
        (pipe(PLAN_NAME), 65, "is not JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_packing_goes_on_or_refuses_with_a_sentence(
    spoil: Callable[[Path], None],
    code: int,
    says: str,
    unfinished: Path,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "d"
    shutil.copytree(unfinished, folder)
    spoil(folder)
    outside = {path: path.read_bytes() for path in tmp_path.rglob("outside*") if path.is_file()}
    assert main([*COMMAND, "--dest", str(folder)]) == code
    assert says in caplog.text + capsys.readouterr().err
    assert {path: path.read_bytes() for path in outside} == outside
    if code == 0:
        assert open_shards(str(folder)).digest == open_shards(str(finished)).digest
        assert verify([str(folder)]) == 0


def test_names_in_a_manifest_do_not_steer_the_terminal(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "d"
    shutil.copytree(finished, folder)
    document = json.loads((folder / "manifest.json").read_bytes())
    document["name"] = document["split"] = "\x1b[2J\x07"
    document["source"] |= {"oddities": {"\x1b[2J": 3}, "skipped": ["\x1b]0;x\x07"], "packed_with": ["\x1b[2J"]}
    (folder / "manifest.json").write_text(json.dumps(document | {"digest": digest_of(document)}))
    assert main([*COMMAND, "--dest", str(folder)]) == 0
    assert verify([str(folder)]) == 0
    os.truncate(folder / "train-000000.tar", 1)
    assert verify([str(folder)]) == 65
    printed = capsys.readouterr()
    assert "\\x1b]0;x\\x07" in printed.out and "--rewrite train-000000.tar" in printed.out
    assert not {"\x1b", "\x07"} & set(printed.out + printed.err)
