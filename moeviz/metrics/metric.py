"""One row of the METRICS table: what a quantity is, where it comes from, and how to read it.

One row per quantity; views take their axis labels, tooltips and reference lines from here, `moeviz metrics` prints it,
docs/metrics.md is written from it, and `defines` ends the docstring of the function with it: nothing is explained
twice. E experts, k experts per token, N tokens, D design effect, L layers; entropies in nats.
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
    analysis: tuple[str, ...] = ()
    """Names under which `moeviz analyze` stores it in the table `analysis` of the run that it makes."""
    recorded: str = ""
    """Where else it is found: tables, queries, commands, functions."""

    @property
    def places(self) -> str:
        """Where a run or a command has it."""
        found = ["table metrics, every step"] if self.live else []
        if self.recorded:
            found.append(self.recorded)
        if self.analysis:
            found.append(f"moeviz analyze, table analysis: {', '.join(self.analysis)}")
        return "; ".join(found)

    @property
    def facts(self) -> dict[str, str]:
        """What there is to say in short, by label, in the order of every page that explains it."""
        return {
            "formula": self.formula,
            "unit": self.unit,
            "range": self.range,
            "at balance": self.at_balance,
            "shape": self.shape,
            "source": self.source,
            "where": self.places,
        }

    @property
    def text(self) -> str:
        """All of it as plain text."""
        lines = [f"{self.id}: {self.name}", *(f"    {label}: {fact}" for label, fact in self.facts.items())]
        return "\n".join([*lines, f"    {self.how_to_read}"])

    @property
    def help(self) -> str:
        """All of it as Markdown, for a tooltip."""
        facts = "\n".join(f"- {label}: {_plain(fact)}" for label, fact in self.facts.items())
        return f"**{self.name}** (`{self.id}`)\n\n{_plain(self.how_to_read)}\n\n{facts}"


def _plain(text: str) -> str:
    """Text whose signs Markdown leaves alone."""
    for sign in "\\*_[]<>$|#":
        text = text.replace(sign, f"\\{sign}")
    return text
