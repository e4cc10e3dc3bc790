"""How do numbers of each position of an image become a picture: maps side by side, on one scale that is shown?"""

import contextlib
import importlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

_DOTS_AN_INCH = 120
_MAP_INCHES, _SCALE_INCHES, _HEIGHT_INCHES = 2.7, 0.9, 3.2
_COLORS = "viridis"
"""Equal steps look equal, also in grey and to the colour-blind."""


def heat_map(maps: Mapping[str, np.ndarray], unit: str) -> Image.Image:
    """A picture of maps [H, W], each below its name and its mean, with the colour bar that they share.

    The lowest numbers are dark, the highest light. The scale reaches from the 1st to the 99th percentile of all maps,
    so that a few outliers do not hide the rest. The picture's size depends on the number of maps only.
    """
    values = np.concatenate([array.ravel() for array in maps.values()])
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    with _without_traces():
        # Loaded here, because matplotlib takes as long as half a second, and most uses of the trainer draw no map.
        figures: Any = importlib.import_module("matplotlib.figure")
        agg: Any = importlib.import_module("matplotlib.backends.backend_agg")
    size = (len(maps) * _MAP_INCHES + _SCALE_INCHES, _HEIGHT_INCHES)
    figure = figures.Figure(figsize=size, dpi=_DOTS_AN_INCH, layout="compressed")
    canvas = agg.FigureCanvasAgg(figure)  # draws in memory, without a screen
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for panel, (name, array) in zip(panels, maps.items(), strict=True):
        image = panel.imshow(array, cmap=_COLORS, vmin=low, vmax=high, interpolation="nearest")
        panel.set_title(f"{name}: mean {array.mean():.3f}")
        panel.set_xlabel("column, pixels")
    panels[0].set_ylabel("row, pixels")
    figure.colorbar(image, ax=list(panels), label=unit, extend="both", pad=0.01, fraction=0.12 / len(maps), aspect=16)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Let matplotlib be imported without its list of the machine's fonts in the user's home, or a message about it."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if "MPLCONFIGDIR" in os.environ:  # the user says where it may write
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]
