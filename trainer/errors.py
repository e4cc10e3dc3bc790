"""Which errors end a command, and with which exit code?

Every error class of trainer/ that ends a command is here, and carries its exit code. This file imports nothing of ours.

All exit codes of the project (trainer, data_pipeline, cluster):

  0  finished
  2  wrong option or config, or the wrong folder
 65  damaged data
 69  a service or a machine does not answer: storage, MLflow, Slurm, a node
 70  a bug of ours; a device's memory ran out; or the run was started again and again and got no further
 73  cannot write there: no space, no permission, a disk with errors, or another job holds the run's folder
 74  a checkpoint or an exported model cannot be read or written
 75  not done yet, run the same command again: stopped on request, or other tasks have not finished their share
 76  training diverged
 77  refused for safety
 78  a rank hangs or is lost
 79  the ranks' weights differ
 80  superseded: a newer attempt at the run has taken over
 81  a device gives another result when it computes the same again
130  Ctrl-C outside of training

Launchers lose exit codes and signals, so `run_state.json` in the run's folder says the same. `data_pipeline` and
`cluster` cannot import this file and hold copies; tests/trainer/test_errors.py keeps them equal.
"""

FINISHED = 0
USAGE = 2
CORRUPT = 65
UNAVAILABLE = 69
BUG = 70
CANNOT_WRITE = 73
CHECKPOINT = 74
STOPPED = 75
DIVERGED = 76
REFUSED = 77
HANG = 78
DIFFERENT_WEIGHTS = 79
SUPERSEDED = 80
IRREPRODUCIBLE = 81
INTERRUPTED = 130


class UsageError(ValueError):
    """The user asked for something that cannot be done here. The text is one sentence."""

    exit_code = USAGE


class ConfigError(ValueError):
    """The configuration cannot be used. The text says what to change, one problem per line."""

    exit_code = USAGE


class UnsafeFile(OSError):
    """A file or folder of a run is a link, a device or too large: it is not opened. The text is one sentence."""

    exit_code = USAGE


class RefusedStore(RuntimeError):
    """What an MLflow store answers, or what it is, would make the trainer write where nobody asked it to."""

    exit_code = REFUSED


class MlflowUnreachable(RuntimeError):
    """MLflow does not answer, and the command cannot do without it."""

    exit_code = UNAVAILABLE


class FilesUnsent(RuntimeError):
    """MLflow has the numbers of a run, but not its files. The exit code is that of the cause, where it has one."""

    def __init__(self, reason: str, exit_code: int = UNAVAILABLE) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class StoppedEarly(BaseException):
    """A signal asked a job to stop before it trains. No Exception: libraries catch those and go on."""

    def __init__(self, reason: str, exit_code: int = STOPPED) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class OutOfMemory(RuntimeError):
    """A device has no memory left. The text says what needs less of it."""

    exit_code = BUG


class NoProgress(RuntimeError):
    """The run was started again and again and got no further."""

    exit_code = BUG


class RunInUse(RuntimeError):
    """Another job writes to the run's folder."""

    exit_code = CANNOT_WRITE


class RunFolderFull(RuntimeError):
    """There is no space left for the run's folder."""

    exit_code = CANNOT_WRITE


class RecordIncomplete(RuntimeError):
    """Points or events of a run could not be written to its folder. The text says how many, and where they are."""

    exit_code = CANNOT_WRITE


class UnfitDisk(RuntimeError):
    """A disk gives errors, is full or must not be written to. The text names the file."""

    exit_code = CANNOT_WRITE


class CheckpointError(RuntimeError):
    """A checkpoint or an exported model cannot be read or written. The text says which and why."""

    exit_code = CHECKPOINT


class Diverged(RuntimeError):
    """The loss is no longer a number."""

    exit_code = DIVERGED


class LostRank(RuntimeError):
    """Another rank of the job is gone or has failed. This rank ends with the exit code of that one."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class DamagedPicture(ValueError):
    """The file of a compressed picture is incomplete or changed. The text is one sentence."""

    exit_code = CORRUPT


class DifferentWeights(RuntimeError):
    """The ranks' copies of the weights differ. The text names ranks, hosts and tensors."""

    exit_code = DIFFERENT_WEIGHTS


class Irreproducible(RuntimeError):
    """A rank computed a micro-batch twice with different results, and the text names rank, host and tensors. Or a
    compressed picture was written where other numbers come out."""

    exit_code = IRREPRODUCIBLE


class Superseded(RuntimeError):
    """A newer attempt at the run has taken over."""

    exit_code = SUPERSEDED


def is_foreseen(error: BaseException) -> bool:
    """Whether an error carries an exit code: then its text is meant for the user. All others are bugs."""
    return hasattr(error, "exit_code")


def code_of(error: BaseException) -> int:
    """The exit code of an error; BUG for one that carries none."""
    code: int = getattr(error, "exit_code", BUG)
    return code
