"""Trains, scores, draws, compares: the jobs and tools of this project, and what they are made of."""

import os
from pathlib import Path

# MLflow asks a server of its makers for a configuration when it is used, unless this is set before it is imported.
# Nothing is contacted here but what the user names.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

try:
    Path.home()
except RuntimeError:
    # A user without a name and without HOME, as containers have. While MLflow is imported it asks for a home, which it
    # needs for nothing that is done here. It gets one that holds nothing, and for that time only: what stands in a home
    # is trusted (trainer/record/own_runs.py), and compilers keep what they make there.
    os.environ["HOME"] = os.devnull
    import mlflow

    del mlflow, os.environ["HOME"]
