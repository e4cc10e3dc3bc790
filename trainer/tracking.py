"""How does MLflow get what it could not take while it was away?

python -m trainer.tracking sync runs/quickstart

It goes to the store that the run was trained with. For a run that you have not trained on this machine, name yours with
--to: a store that somebody else's folder names would get your files and credentials.
"""

import argparse
import logging
import sys
from pathlib import Path

from data_pipeline.wording import counted
from trainer.command_line import run_tool
from trainer.errors import FilesUnsent, MlflowUnreachable, RefusedStore, UnsafeFile, UsageError
from trainer.record.mlflow_mirror import SQLITE, Mirror, MirrorInUse, catch_up
from trainer.record.own_runs import is_store, own_store, store_of_environment
from trainer.record.redaction import one_line
from trainer.record.run_folder import RunFiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="send to MLflow what it does not have of a run; repeatable")
    sync.add_argument("dir", help="folder of a run (run.dir of its config)")
    sync.add_argument("--to", metavar="URI", help="the store to send to, for a run that you have not trained here")
    arguments = parser.parse_args()
    return run_tool(lambda: _sync(RunFiles(Path(arguments.dir)), arguments.to))


def _sync(files: RunFiles, to: str | None) -> None:
    """Send what is left and say how much it was.

    Raises UsageError for a folder without a run or a store that nobody named, RefusedStore, MlflowUnreachable,
    FilesUnsent.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not (description := files.read_description()):
        raise UsageError(f"{files.folder}: holds no run (no {files.description.name})")
    uri = to or own_store(str(description.get("key"))) or store_of_environment()
    if uri is None:
        raise UsageError(
            f"{files.folder}: was not trained here by you, and a store that its files name may be anybody's; name "
            f"yours with --to (the files name {str(description.get('uri'))[:200]!r})"
        )
    if not is_store(uri):
        raise UsageError(f"--to {uri}: must begin with sqlite:///, http:// or https:// and hold no password")
    if uri.startswith(SQLITE) and Path(uri.removeprefix(SQLITE)).resolve().is_relative_to(files.folder.resolve()):
        raise UsageError(f"--to {uri}: lies in the run's folder, which may be somebody else's; name a store outside")
    print(f"sending {files.folder} to {uri}", flush=True)
    unsent = Mirror(files, uri).unsent_points()
    try:
        mirror = catch_up(files, uri, end=True)
    except MirrorInUse as error:
        print(f"{error}; nothing to do here")
        return
    except (FilesUnsent, RefusedStore, UnsafeFile):
        raise
    except Exception as error:
        waiting = f"{counted(unsent, 'point')} {'waits' if unsent == 1 else 'wait'}"
        raise MlflowUnreachable(f"MLflow at {uri} does not answer ({one_line(error)}); {waiting}") from error
    print(f"sent {counted(unsent, 'point')} of {files.folder} to run {mirror.run_id} of {uri}")


if __name__ == "__main__":
    sys.exit(main())
