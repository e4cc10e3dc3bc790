"""How does MLflow get what it could not take while it was away?

python -m trainer.tracking sync runs/quickstart
"""

import argparse
import logging
import sys
from pathlib import Path

from data_pipeline.wording import counted
from trainer.command_line import run_tool
from trainer.errors import MlflowUnreachable, UsageError
from trainer.record.mlflow_mirror import Mirror, MirrorInUse
from trainer.record.run_folder import RunFiles, read_json
from trainer.record.tracker import catch_up, one_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="send to MLflow what it does not have of a run; repeatable")
    sync.add_argument("dir", help="folder of a run (run.dir of its config)")
    arguments = parser.parse_args()
    return run_tool(lambda: _sync(RunFiles(Path(arguments.dir))))


def _sync(files: RunFiles) -> None:
    """Send what is left and say how much it was. Raises UsageError for a folder without a run, MlflowUnreachable."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not files.description.exists():
        raise UsageError(f"{files.folder}: holds no run (no {files.description.name})")
    uri = read_json(files.description)["uri"]
    unsent = Mirror(files).unsent_points()
    try:
        mirror = catch_up(files, end=True)
    except MirrorInUse as error:
        print(f"{error}; nothing to do here")
        return
    except Exception as error:
        waiting = f"{counted(unsent, 'point')} {'waits' if unsent == 1 else 'wait'}"
        raise MlflowUnreachable(f"MLflow at {uri} does not answer ({one_line(error)}); {waiting}") from error
    print(f"sent {counted(unsent, 'point')} of {files.folder} to run {mirror.run_id} of {uri}")


if __name__ == "__main__":
    sys.exit(main())
