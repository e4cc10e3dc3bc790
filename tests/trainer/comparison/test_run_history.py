"""Is the history of a run the same from its folder and from MLflow, and does it count work and not pauses?"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag

from tests.support.launch import free_port, mlflow_store
from trainer import compare
from trainer.comparison.mlflow_history import history_of_run, open_store
from trainer.comparison.published import data_set_key
from trainer.comparison.run_history import RunHistory, history_of_folder
from trainer.errors import UNAVAILABLE, MlflowUnreachable, code_of
from trainer.record.run_folder import RunFiles


def test_a_folder_and_mlflow_tell_the_same(two_runs: list[Path]) -> None:
    folder = history_of_folder(two_runs[0])
    client = mlflow.MlflowClient(mlflow_store(two_runs[0].parent))
    run_id = RunFiles(two_runs[0]).read_state()["mlflow_run_id"]
    run = history_of_run(client, run_id)
    found, expected = dict(compare.results([run])), dict(compare.results([folder]))
    assert found.keys() == expected.keys()
    # All but the words for the status, and hours, because MLflow rounds times to milliseconds.
    same = [name for name in expected if name != "status" and "hours" not in name]
    assert len(same) >= 10
    assert [found[name] for name in same] == [expected[name] for name in same]
    assert run.wall_hours() == pytest.approx(folder.wall_hours(), abs=0.01 / 3600)
    assert run.rank_hours() == pytest.approx(folder.rank_hours(), abs=0.04 / 3600)
    assert run.params == folder.params
    assert run.curves.keys() == folder.curves.keys()
    for name, curve in run.curves.items():
        np.testing.assert_array_equal(curve.steps, folder.curves[name].steps)
        np.testing.assert_array_equal(curve.values, folder.curves[name].values)
        np.testing.assert_allclose(curve.times, folder.curves[name].times, rtol=0, atol=0.01)
    assert {step: read() for step, read in run.pictures["samples"].items()} == {
        step: read() for step, read in folder.pictures["samples"].items()
    }
    assert data_set_key(run.data) == data_set_key(folder.data) == "imagenet32-A"


def test_pauses_between_attempts_are_no_work() -> None:
    curve = SimpleNamespace(steps=np.array([1.0, 2.0, 3.0, 4.0]), times=np.array([100.0, 200.0, 5000.0, 5100.0]))
    history = RunHistory(
        name="", place="", status="", params={"train.global_batch_images": "8"},
        curves={"train/bits_per_dim": curve},  # type: ignore[dict-item]
        attempts=[{"started": 50.0, "world_size": 4}, {"started": 4900.0, "world_size": 2}],
    )  # fmt: skip
    assert history.wall_hours() * 3600 == pytest.approx(150 + 200)
    assert history.rank_hours() == pytest.approx((4 * 150 + 2 * 200) / 3600)
    np.testing.assert_allclose(history.working_hours(curve.times) * 3600, [50, 150, 250, 350])
    images = history.images_seen(curve.steps)
    assert images is not None
    np.testing.assert_array_equal(images, [8, 16, 24, 32])


def test_a_server_that_is_away_is_a_missing_service_and_not_bad_data() -> None:
    with pytest.raises(MlflowUnreachable, match="--uri: MLflow at http://127.0.0.1:.* does not answer") as caught:
        open_store(f"http://127.0.0.1:{free_port()}")
    assert code_of(caught.value) == UNAVAILABLE


class GoesAway(BaseHTTPRequestHandler):
    """A server that says which experiments there are, and then breaks every connection."""

    def do_POST(self) -> None:
        if not self.path.endswith("/experiments/search"):
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"experiments": []}')

    def do_GET(self) -> None:
        pass

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_goes_away_while_it_is_read_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), GoesAway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    try:
        for arguments in (["0" * 32], ["--experiment", "mine"]):
            monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--uri", uri])
            assert compare.main() == UNAVAILABLE
            text = capsys.readouterr().err
            assert f"error: --uri: MLflow at {uri} has stopped answering" in text and text.count("\n") == 1, text
    finally:
        server.shutdown()
        server.server_close()


def test_odd_tags_of_a_run_in_mlflow_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mlflow.MlflowClient(mlflow_store(tmp_path))
    experiment = client.create_experiment("theirs")
    for odd in ("x", "nan", "inf", "-1", "1" * 400):
        tags = {"attempt.1.started": "5.0", "attempt.1.world_size": "2"}
        tags |= {"attempt.2.started": odd, "attempt.2.world_size": odd}
        run_id = client.create_run(experiment, tags=tags, run_name="\x1b[2J").info.run_id
        client.log_metric(run_id, "train/bits_per_dim", 3.0, step=1)
        client.log_param(run_id, "train.steps", odd)
        client.log_param(run_id, "train.global_batch_images", odd)
        data = Dataset(name="x", digest="y", source_type="z", source="{}")
        about = [InputTag("mlflow.data.context", "validation"), InputTag("version", "A"), InputTag("form", "cifar10")]
        client.log_inputs(run_id, datasets=[DatasetInput(data, about)])
        assert history_of_run(client, run_id).attempts == [{"started": 5.0, "world_size": 2}]
    page = ["--experiment", "theirs", "--uri", mlflow_store(tmp_path), "--html", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", ["compare", *page])
    assert compare.main() == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
