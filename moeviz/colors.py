"""One colour table for the terminal, the browser and exported figures.

Load is drawn diverging around the even share 1/E in log2, blue below and orange above, with a midpoint that
vanishes into the background; the five stops keep their distance under simulated deuteranopia, protanopia and
tritanopia. They are interpolated in OKLab (Ottosson 2020, https://bottosson.github.io/posts/oklab/), once, here.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

Theme = Literal["dark", "light"]

LOAD_STOPS: dict[Theme, tuple[str, ...]] = {
    "dark": ("#8ec9ff", "#2f6ea8", "#16181c", "#a55a1f", "#ffbf80"),
    "light": ("#0b3c6f", "#5b93c4", "#f4f4f2", "#d0823f", "#7a2f00"),
}
LOAD_LIMIT = 3.0
"""log2 of the relative load at which the ramp ends: 1/8 and 8 times the even share."""
LOAD_TICKS = ((-3, "1/8"), (-2, "1/4"), (-1, "1/2"), (0, "1×"), (1, "2×"), (2, "4×"), (3, "8×"))

SEQUENTIAL_STOPS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")
"""viridis (matplotlib, CC0) at even steps, for entropy, attention and counts."""

EXPERT_HUES = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#9E9E9E")
"""Okabe and Ito's order (https://jfly.uni-koeln.de/color/), the eighth a grey for `other`."""

SEVERITY_COLORS = {"info": "#56B4E9", "warning": "#E69F00", "error": "#D55E00", "critical": "#E5484D"}
SEVERITY_MARKS = {"info": "·", "warning": "▲", "error": "■", "critical": "●"}
DEAD_MARK = "×"


def hex_to_rgb(color: str) -> tuple[int, int, int]:
    """`#rrggbb` -> three integers 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def rgb_to_hex(rgb: tuple[int, int, int] | np.ndarray) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in rgb)


_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _to_oklab(rgb: np.ndarray) -> np.ndarray:
    unit = rgb / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def _from_oklab(lab: np.ndarray) -> np.ndarray:
    linear = (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    linear = np.clip(linear, 0, 1)
    unit = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.clip(np.rint(unit * 255), 0, 255).astype(np.uint8)


def ramp(stops: tuple[str, ...], size: int = 255) -> np.ndarray:
    """Interpolate hex stops evenly in OKLab. Returns uint8 [size, 3]."""
    lab = _to_oklab(np.array([hex_to_rgb(stop) for stop in stops], dtype=np.float64))
    at = np.linspace(0, len(stops) - 1, size)
    return _from_oklab(
        np.stack([np.interp(at, range(len(stops)), lab[:, axis]) for axis in range(3)], axis=1)
    )


@cache
def load_ramp(theme: Theme = "dark", size: int = 255) -> np.ndarray:
    """The diverging load table, uint8 [size, 3]; the middle entry is the even share."""
    return ramp(LOAD_STOPS[theme], size)


@cache
def sequential_ramp(size: int = 255) -> np.ndarray:
    """The sequential table, uint8 [size, 3]."""
    return ramp(SEQUENTIAL_STOPS, size)


def plotly_scale(table: np.ndarray) -> list[list[object]]:
    """A colour table as plotly and ECharts like it: [[0.0, '#rrggbb'], ... [1.0, '#rrggbb']]."""
    last = len(table) - 1
    return [[index / last, rgb_to_hex(row)] for index, row in enumerate(table)]


def load_level(load_rel: np.ndarray, noise_log2: float | np.ndarray = 0.25, size: int = 255) -> np.ndarray:
    """Relative load -> index into `load_ramp`, int16; -1 for a load of exactly 0, which is drawn as a dead mark.

    Args:
        load_rel: relative load r = E x share, any shape; NaN stays at the midpoint.
        noise_log2: half width of the band around the even share that is drawn as even, in log2 units; the expected
            sampling noise of a step is about 1.44 / sqrt(tokens x K / E).
        size: length of the table.
    """
    load_rel = np.asarray(load_rel, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.clip(np.log2(load_rel), -LOAD_LIMIT, LOAD_LIMIT)
    z = np.where(np.isnan(z) | (np.abs(z) <= noise_log2), 0.0, z)
    level = np.rint((z + LOAD_LIMIT) / (2 * LOAD_LIMIT) * (size - 1)).astype(np.int16)
    return np.where(load_rel == 0, np.int16(-1), level)
