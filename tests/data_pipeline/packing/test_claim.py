"""Does a destination belong to one packing, whatever others do there at the same time?"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from data_pipeline.loader import open_shards
from data_pipeline.manifest import digest_of
from data_pipeline.pack import main
from data_pipeline.packing import claim as claims
from data_pipeline.packing import steps
from data_pipeline.packing.claim import JOURNAL, PLAN_NAME, check_claim, claim
from data_pipeline.storage import DataError, Store
from data_pipeline.verify import verify

PHOTOGRAPHS = ["--source", "photographs", "--size", "8", "--split", "train", "--images", "1500", "--workers", "1"]
COMMAND = [*PHOTOGRAPHS, "--shard-images", "512"]
SHARDS = {f"train-{number:06d}.tar" for number in range(3)}


@pytest.mark.parametrize("scheme", ["local", "s3"])
def test_of_many_plans_one_has_the_destination(scheme: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "d") if scheme == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/d[0]"
    store, together = Store(url, 30.0), Barrier(8)

    def contend(number: int) -> bool:
        together.wait()
        try:
            claim(store, {"seed": number})
        except DataError as error:
            assert error.exit_code == 2 and "holds the unfinished packing of another data set" in str(error)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        claimed = [number for number, mine in enumerate(pool.map(contend, range(8))) if mine]
    kept = json.loads(store.read(PLAN_NAME))["seed"]
    assert kept in claimed and (scheme == "s3" or claimed == [kept])
    for number in range(8):  # Swift may let two claim at the same moment: the next look decides
        if number == kept:
            check_claim(store, digest_of({"seed": number}))
        else:
            with pytest.raises(DataError, match="another data set"):
                check_claim(store, digest_of({"seed": number}))


def another_plan(store: Store) -> None:
    store.write(PLAN_NAME, json.dumps({"seed": "another"}).encode())


@pytest.mark.parametrize(("after", "written"), [("stage", set()), ("write_shards", SHARDS)])
def test_a_claim_that_is_lost_later_ends_the_packing(
    after: str,
    written: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in a store that lets two commands claim: before the first shard and before the manifest it comes out."""
    store, original = Store(str(tmp_path / "d"), 0.0), getattr(steps, after)

    def and_then(*arguments: object) -> object:
        result = original(*arguments)
        another_plan(store)
        return result

    monkeypatch.setattr(steps, after, and_then)
    assert main([*COMMAND, "--dest", store.url]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "holds the unfinished packing of another data set or of other settings; "
            "finish that one, choose another --dest, or remove it"
        )
    )
    assert set(store.names()) == written | {JOURNAL}


def test_a_packing_that_ends_between_the_look_and_the_claim_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "d"), 0.0)
    create: Callable[[Store, str, bytes], bool] = Store.create

    def after_another(store: Store, name: str, data: bytes) -> bool:
        monkeypatch.setattr(Store, "create", create)
        assert main([*COMMAND, "--dest", store.url, "--seed", "1"]) == 0
        return create(store, name, data)

    for seed, code in ((2, 2), (1, 0)):
        for name in store.names():
            store.remove(name)
        monkeypatch.setattr(Store, "create", after_another)
        assert main([*COMMAND, "--dest", store.url, "--seed", str(seed)]) == code
        shards = open_shards(store.url)
        assert shards.manifest.seed == 1 and verify(shards) == []
    assert "already packed with these settings" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["another plan", "no plan", "not JSON", "a list"])
def test_a_record_of_another_plan_is_not_taken(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished packing of an earlier version has records without a plan: its shards are written again."""
    store = Store(str(tmp_path / "d"), 0.0)
    assert main([*COMMAND, "--dest", str(tmp_path / "expected")]) == 0

    def spoil(store: Store, digest: str) -> None:
        name = claims.record_name(1)
        record = json.loads(store.read(name))
        record["sha256"] = 64 * "0"
        if damage == "no plan":
            del record["plan"]
        else:
            record["plan"] = "another"
        store.write(name, {"not JSON": b"{", "a list": b"[1]"}.get(damage, json.dumps(record).encode()))
        raise DataError("interrupted")

    with monkeypatch.context() as spoiling:
        spoiling.setattr(steps, "check_claim", spoil)
        assert main([*COMMAND, "--dest", store.url]) == 2
    assert main([*COMMAND, "--dest", store.url]) == 0
    assert open_shards(store.url).digest == open_shards(str(tmp_path / "expected")).digest
    assert verify(open_shards(store.url)) == []


def test_a_destination_with_brackets_is_no_pattern(s3_bucket: str) -> None:
    neighbour, mine = Store(f"s3://{s3_bucket}/imagenet6", 30.0), Store(f"s3://{s3_bucket}/imagenet[64]", 30.0)
    neighbour.write(f"train/{PLAN_NAME}", b"{}")
    assert main([*COMMAND, "--dest", f"{mine.url}/train"]) == 0
    assert neighbour.walk() == {f"train/{PLAN_NAME}": 2}
    assert mine.walk().keys() == {f"train/{name}" for name in SHARDS | {"manifest.json"}}
    assert verify(open_shards(f"{mine.url}/train")) == []
