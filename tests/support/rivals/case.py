"""What is a reference case of the rivals, and how far from it may our code be?

A case is one .npz file: arrays that the authors' own code (or an oracle) gave, and `meta`, a JSON text of its settings.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Precision = Literal["float64", "float32"]
Quantity = Literal["output", "gradient", "initialisation", "exact"]
TOLERANCE: dict[tuple[Precision, Quantity], float] = {
    ("float64", "output"): 1e-9,
    ("float64", "gradient"): 1e-9,
    ("float64", "initialisation"): 1e-9,
    ("float32", "output"): 2e-5,
    ("float32", "gradient"): 1e-4,
    ("float32", "initialisation"): 1e-3,
    ("float64", "exact"): 0.0,
    ("float32", "exact"): 0.0,
}
"""Largest error relative to the largest reference value. The authors' own fp32 is up to 6e-7 (outputs), 7e-6
(gradients) and 1e-4 (initialisation, where a bias cancels) away from their fp64."""


class Case(NamedTuple):
    """One file of reference data."""

    name: str
    """The file's, without its ending."""
    meta: dict[str, Any]
    """Its settings; `kind` says what was run."""
    arrays: dict[str, np.ndarray]

    @property
    def kind(self) -> str:
        return str(self.meta.get("kind", ""))


class Check(NamedTuple):
    """One comparison of ours with theirs."""

    kind: str
    """Part of the report it belongs to."""
    precision: Precision
    quantity: Quantity
    error: float
    detail: str = ""
    """What was compared, for the report of a failure."""

    @property
    def passes(self) -> bool:
        return self.error <= TOLERANCE[self.precision, self.quantity]  # False for an error that is not a number


def load_case(path: Path) -> Case:
    """Raises ValueError or OSError for a file that is not one of numpy's archives with `meta`."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if "meta" not in arrays:
        raise ValueError(f"{path}: has no settings (meta)")
    return Case(path.stem, json.loads(str(arrays.pop("meta"))), arrays)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest of their values."""
    if ours.shape != theirs.shape:
        raise ValueError(f"ours is {ours.shape}, theirs {theirs.shape}")
    scale = float(np.abs(theirs).max()) or 1.0
    return float(np.abs(ours.astype(np.float64) - theirs).max()) / scale
