"""How do numbers of each position of an image become a picture: maps side by side, on one scale that is shown?"""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Nine points of matplotlib's viridis: equal steps look equal, also without colours.
_COLORS = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip
_MAP_PIXELS = 256
_GAP, _TITLE, _BAR = 16, 28, 18
_TEXT_SIZE = 16


def heat_map(maps: Mapping[str, np.ndarray], unit: str) -> Image.Image:
    """A picture of maps [H, W] with their names, dark for the lowest number of all and light for the highest.

    The scale reaches from the 1st to the 99th percentile, so that a few outliers do not hide the rest.
    """
    values = np.concatenate([array.ravel() for array in maps.values()])
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    font = ImageFont.load_default(_TEXT_SIZE)
    height = max(array.shape[0] for array in maps.values())
    enlarge = max(1, _MAP_PIXELS // height)
    tall = height * enlarge
    panels = [_colored(array, low, high).repeat(enlarge, axis=0).repeat(enlarge, axis=1) for array in maps.values()]
    width = sum(panel.shape[1] + _GAP for panel in panels) + _GAP
    canvas = Image.new("RGB", (width, _TITLE + tall + 2 * _GAP + _BAR + _TITLE), "white")
    pen = ImageDraw.Draw(canvas)
    left = _GAP
    for (name, array), panel in zip(maps.items(), panels, strict=True):
        pen.text((left, 6), f"{name}: {array.mean():.3f}", fill="black", font=font)
        canvas.paste(Image.fromarray(panel), (left, _TITLE))
        left += panel.shape[1] + _GAP
    top, length = _TITLE + tall + _GAP, width - 2 * _GAP
    scale = _colored(np.linspace(low, high, length)[None].repeat(_BAR, axis=0), low, high)
    canvas.paste(Image.fromarray(scale), (_GAP, top))
    below = top + _BAR + 4
    pen.text((_GAP, below), f"{low:.2f}", fill="black", font=font)
    pen.text((width // 2, below), unit, fill="black", font=font, anchor="ma")
    pen.text((width - _GAP, below), f"{high:.2f}", fill="black", font=font, anchor="ra")
    return canvas


def _colored(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 [H, W, 3]."""
    place = np.clip((array - low) / max(high - low, 1e-12), 0, 1) * (len(_COLORS) - 1)
    steps = np.arange(len(_COLORS))
    return np.stack([np.interp(place, steps, _COLORS[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)
