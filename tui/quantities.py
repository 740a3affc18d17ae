"""Numbers as people read them: a fixed precision per quantity, the unit always there, digits in groups of three."""

from __future__ import annotations

import math

MISSING = "–"


def count(value: float) -> str:
    """12480 -> `12 480`; from ten million on `12.5 M`."""
    if not math.isfinite(value):
        return MISSING
    for limit, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e7, 1e6, "M")):
        if abs(value) >= limit:
            return f"{value / divisor:.1f} {unit}"
    return f"{value:,.0f}".replace(",", " ")


def ratio(value: float) -> str:
    """A relative load: `0.35×`, `14.2×`, `128×`."""
    if not math.isfinite(value):
        return MISSING
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}×"


def percent(share: float) -> str:
    """0.634 -> `63 %`, 0.0634 -> `6.3 %`, 0.0012 -> `0.12 %`, 0 -> `0 %`."""
    if not math.isfinite(share):
        return MISSING
    value = share * 100
    digits = 0 if value == 0 or abs(value) >= 9.95 else 1 if abs(value) >= 0.995 else 2
    return f"{value:.{digits}f} %"


def unit(value: float) -> str:
    """A number from 0 to 1 in three cells: `.97`, `1.0`. Only what is 1 to three digits reads 1.0."""
    if not math.isfinite(value):
        return "  " + MISSING
    return "1.0" if value >= 0.9995 else f".{min(round(max(value, 0.0) * 100), 99):02d}"


def fixed(value: float, digits: int = 2) -> str:
    """A fixed number of digits: `0.97`."""
    return f"{value:.{digits}f}" if math.isfinite(value) else MISSING


def number(value: float) -> str:
    """Any scalar to four significant digits: `3.117`, `0.0123`, `3.0e-04`."""
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else "inf" if value > 0 else "-inf"
    size = abs(value)
    if size >= 10000:
        return count(value)
    if size and size < 0.001:
        return f"{value:.1e}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 4 if size < 0.1 else 3
    return f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `2.5 h`, `5 d`."""
    if not math.isfinite(seconds):
        return MISSING
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"
