"""Which runs does the user name to be compared: folders, ids in MLflow, an experiment?"""

import argparse
import re
from pathlib import Path

from trainer.comparison.run_history import RunHistory, history_of_folder
from trainer.errors import UsageError

RUN_ID = re.compile(r"[0-9a-f]{32}")
DEFAULT_URI = "sqlite:///mlflow.db"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that name runs."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run (run.dir), or id of a run in MLflow")
    parser.add_argument("--experiment", help="also the newest 50 runs of this MLflow experiment")
    parser.add_argument("--filter", default="", help="of these, only the runs that match this filter of MLflow's")
    parser.add_argument("--uri", default=DEFAULT_URI, help=f"the MLflow store that has them ({DEFAULT_URI})")


def chosen_runs(arguments: argparse.Namespace) -> list[RunHistory]:
    """The runs that these options name, each once. Raises UsageError where there is none, or where one is not found."""
    if not arguments.runs and not arguments.experiment:
        raise UsageError("name at least one run: its folder or its id in MLflow, or --experiment")
    if arguments.experiment or not all(Path(run).is_dir() for run in arguments.runs):
        # Here, and not above: it imports mlflow, which takes longer than to compare folders.
        from trainer.comparison.mlflow_history import histories_of_experiment, history_of_run, open_store
    found = []
    for run in arguments.runs:
        if Path(run).is_dir():
            found.append(history_of_folder(Path(run)))
        elif RUN_ID.fullmatch(run):
            found.append(history_of_run(open_store(arguments.uri), run))
        else:
            raise UsageError(f"{run}: is neither the folder of a run nor an id of MLflow (32 hexadecimal digits)")
    if arguments.experiment:
        known = {run.place for run in found}
        more = histories_of_experiment(open_store(arguments.uri), arguments.experiment, arguments.filter)
        found += [run for run in more if run.place not in known]
    return found
