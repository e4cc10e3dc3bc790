"""The main job: train the model of a config, or go on where the same command stopped.

deepspeed --hostfile cluster/hosts trainer/run.py --config configs/imagenet64_big.yaml
deepspeed --num_accelerators 2 trainer/run.py --config configs/quickstart.yaml --set train.steps=1000
"""

import sys
from pathlib import Path

# The launcher runs this file by its path, which puts trainer/ first on the module search path; the repository's root
# belongs there, so that `models` and `data_pipeline` are found and no file of ours can shadow a library.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import os  # noqa: E402

# Read when torch is loaded: CPU threads that wait for each other sleep instead of spinning. On a machine that other
# processes use too, spinning made steps seven times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Warnings of torch's C++ code are stack traces of sockets that a lost rank has closed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# torch's profiler logs each of its stages.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse  # noqa: E402
import logging  # noqa: E402

from trainer.faults.early_stop import end_when_asked, raise_when_asked  # noqa: E402

if __name__ == "__main__":
    end_when_asked()  # loading the libraries takes seconds

from trainer.command_line import report  # noqa: E402
from trainer.config import load_config  # noqa: E402
from trainer.errors import BUG, FINISHED, LostRank, StoppedEarly, code_of  # noqa: E402
from trainer.job import (  # noqa: E402
    announce_new_run,
    begin_from,
    begin_from_images,
    build_engine,
    build_job,
    close_job,
    explained,
    is_finished,
    join_ranks,
    newest_checkpoint,
    open_checkpoints,
    record_failure,
    resume,
    share_cores,
    start_tracker,
    tell_of_stop,
)
from trainer.loop import TrainingState, train  # noqa: E402
from trainer.profiler import parse_window  # noqa: E402
from trainer.progress import Progress  # noqa: E402
from trainer.ranks import ranks_from_environment  # noqa: E402
from trainer.record.redaction import guard_output  # noqa: E402
from trainer.record.run_folder import RunFiles  # noqa: E402
from trainer.safe_files import worded  # noqa: E402
from trainer.startup import Start, check_machine, open_data, origin_of, prepare_run_folder, print_check  # noqa: E402


def main() -> int:
    arguments = parse_arguments()
    guard_output()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    ranks = ranks_from_environment()
    try:
        raise_when_asked()
        config = load_config(arguments.config, arguments.overrides)
        profile = parse_window(arguments.profile) if arguments.profile else None
        train_shards, validation_shards = open_data(config, ranks)
        origin = origin_of(config, arguments.source)
        if arguments.check:
            print_check(config, ranks)
            return FINISHED
        check_machine(config, ranks)
        lock = prepare_run_folder(config, train_shards, ranks)
        start = Start(
            config=config,
            ranks=ranks,
            train_shards=train_shards,
            validation_shards=validation_shards,
            lock=lock,
            profile=profile,
            source=arguments.source,
            origin=origin,
        )
        return run(start)
    except StoppedEarly as stop:
        if ranks.local_rank == 0:
            print(stop, file=sys.stderr)
        return stop.exit_code
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        error = worded(error)
        code = code_of(error)
        # One sentence per machine, not per rank. Rank 1 speaks as well when a rank is lost: that may be rank 0.
        if ranks.local_rank == 0 or code == BUG or (isinstance(error, LostRank) and ranks.local_rank == 1):
            report(error)
        return code


def run(start: Start) -> int:
    """Meet the other ranks, build the parts, go on where the run stopped, train, close; returns the exit code."""
    config, ranks = start.config, start.ranks
    share_cores(ranks)
    files = RunFiles(Path(config.run.dir))
    watchdog, device = join_ranks(start, files)
    progress = Progress(enabled=ranks.rank == 0, total_steps=config.train.steps)
    tracker, state = None, TrainingState()
    try:
        engine = build_engine(config, ranks, device)
        checkpoints = open_checkpoints(start, files, device)
        newest = newest_checkpoint(start, files, checkpoints, progress)
        origin = start.origin
        if newest is None and start.source:
            origin = begin_from(start.source, engine, config)
        elif newest is None:
            begin_from_images(start, engine)
        tracker = start_tracker(start, origin, newest.checkpoint.step if newest else 0)
        if newest is None:
            announce_new_run(start, files, tracker, progress, origin)
        else:
            state = resume(start, newest, engine, progress)
        job = build_job(start, state, engine, checkpoints, files, tracker, progress, watchdog)
        finished = is_finished(newest, config) or train(job, state)
    except StoppedEarly as stop:
        tell_of_stop(stop, watchdog)
        record_failure(stop, start, files, tracker, state)
        raise
    except Exception as error:
        error = explained(error, watchdog, ranks)
        record_failure(error, start, files, tracker, state)
        raise error
    return close_job(job, state, finished=finished)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: trainer/errors.py",
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one option; repeatable",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="EXPORT_DIR",
        help="begin a new run from exported weights (trainer.export); one with a checkpoint goes on from that",
    )
    parser.add_argument(
        "--profile", metavar="FIRST:COUNT", help="write a torch profiler trace of these updates, e.g. 20:3"
    )
    parser.add_argument("--check", action="store_true", help="print the resolved config and the job's size, then stop")
    # Added by the launcher; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
