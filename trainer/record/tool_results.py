"""Where does what a tool found out about a run go? Into the run's folder, and to the MLflow of the user's own runs."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import FilesUnsent
from trainer.record.own_runs import own_store, store_of_environment
from trainer.record.redaction import one_line
from trainer.record.run_folder import Clock, RunFiles, metric_name, place_in_run, sync_command

log = logging.getLogger(__name__)


def record_results(
    files: RunFiles, step: int, metrics: Mapping[str, float], artifacts: list[Path], folder: str = "samples"
) -> None:
    """Add what a tool found out about a run to its files and to MLflow, where artifacts go into `folder`.

    MLflow is asked only if this user trained the run here, or if the environment names a store: otherwise the files
    have it alone, and a line says so.
    """
    journal, events, last_steps = files.points(), files.happenings(), files.last_steps()
    same = {"step": step, "time": Clock(files).now(), "attempt": max(files.attempts_begun(), default=0)}
    named = {metric_name(name): float(value) for name, value in metrics.items()}
    if fresh := {name: value for name, value in named.items() if step > last_steps.get(name, -1)}:
        journal.append({**same, "metrics": fresh})
    for path in artifacts:
        place = place_in_run(files, path)
        events.append({**same, "event": "file", "text": "", "file": place, "folder": folder})
    journal.close()
    events.close()
    if not (description := files.read_description()):
        return  # an exported model, which has no run in MLflow
    uri = own_store(str(description.get("key")), files.folder) or store_of_environment()
    if uri is None:
        print(
            f"recorded in {files.folder} only, as the run was not trained here by you; to send it to MLflow: "
            f"{sync_command(files)}",
            file=sys.stderr,
        )
        return
    # Here, and not above: it imports mlflow, which takes longer than drawing an image, and most calls end before.
    from trainer.record.mlflow_mirror import MirrorInUse, catch_up

    try:
        catch_up(files, uri, end=False)
    except MirrorInUse:
        pass  # the training job sends it
    except FilesUnsent as error:
        log.warning("%s; once that is mended, %s sends the files", error, sync_command(files))
    except Exception as error:  # noqa: BLE001 (the results are in the files, whatever MLflow says)
        log.warning(
            "MLflow does not answer (%s); the results are in %s, and %s sends them",
            one_line(error), files.folder, sync_command(files),
        )  # fmt: skip
