"""One row of the METRICS table: what a quantity is, where it comes from, and how to read it.

One row per quantity; views take their axis labels, tooltips and reference lines from here, so that nothing is
explained twice. E experts, k experts per token, N tokens, D design effect, L layers; entropies in nats.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One quantity of the toolkit."""

    id: str
    """Its name in tables, files, functions and axis labels."""
    name: str
    """Title for people."""
    formula: str
    unit: str
    range: str
    """Lowest to highest value; for balance metrics from even to collapsed."""
    at_balance: str
    """Value of a perfectly balanced, undecided or random router: the null to compare with."""
    shape: str
    source: str
    how_to_read: str
    live: bool = False
    """Whether every training step has it, per MoE layer, in the `metrics` table of a run."""
