"""How does a trained model leave its run: as one safetensors file and a description, which load without DeepSpeed?

    python -m trainer.export --run runs/quickstart --weights ema --to exported/quickstart

`trainer.evaluate` and `trainer.sample` take the folder as --run.
"""

import argparse
import sys
from pathlib import Path

from trainer.checkpoint import Weights
from trainer.command_line import run_tool
from trainer.errors import UsageError
from trainer.exported_model import Origin, is_exported, write_exported
from trainer.record.run_folder import RunFiles
from trainer.trained_model import add_run_arguments, load_trained_model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="new or empty folder")
    given = parser.parse_args(arguments)
    return run_tool(lambda: export(given.run, given.weights, given.last, given.to, given.checkpoint_url))


def export(run_dir: str, weights: Weights, last: int, to: Path, checkpoint_url: str | None = None) -> None:
    """Write the newest weights of a run, their average or the mean of its `last` checkpoints, to a folder.

    Raises UsageError, CheckpointError.
    """
    if is_exported(Path(run_dir)):
        raise UsageError(f"--run {run_dir}: is an exported model already; copy the folder")
    trained = load_trained_model(run_dir, weights, last, checkpoint_url)
    origin = Origin(
        run=trained.run,
        mlflow_run_id=trained.files.read_state().get("mlflow_run_id") or "",
        step=trained.step,
        weights=weights,
        checkpoints=len(trained.checkpoints),
        data_digest=trained.checkpoints[0].data_digest,
        bits_per_dim=_evaluated(trained.files, trained.step, weights),
    )
    write_exported(to, trained.card, origin, trained.model.state_dict())
    score = "not evaluated" if origin.bits_per_dim is None else f"{origin.bits_per_dim:.4f} bits/dim"
    print(f"{to}: {weights} weights of step {trained.step}, {score}")


def _evaluated(files: RunFiles, step: int, weights: Weights) -> float | None:
    """Bits per dimension that trainer.evaluate recorded for these weights at this step, the last time."""
    _, value = files.standing_points().get(f"final/{weights}_bits_per_dim", {}).get(step, (0.0, None))
    return value


if __name__ == "__main__":
    sys.exit(main())
