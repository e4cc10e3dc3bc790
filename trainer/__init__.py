"""Trains, scores, draws, compares: the jobs and tools of this project, and what they are made of."""

import os

# MLflow asks a server of its makers for a configuration when it is used, unless this is set before it is imported.
# Nothing is contacted here but what the user names.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
