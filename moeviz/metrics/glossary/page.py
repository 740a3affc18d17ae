"""The METRICS table as one Markdown page: docs/metrics.md is what `moeviz metrics --markdown` prints."""

from __future__ import annotations

from collections.abc import Iterator

from moeviz.metrics.glossary import GROUPS, METRICS
from moeviz.metrics.metric import Metric

_HEAD = """# Metrics

Every quantity that moeviz computes, defined once: this page, `moeviz metrics NAME`, the help of the dashboards and the
docstrings of `moeviz.metrics` are the same text. Written by `moeviz metrics --markdown > docs/metrics.md`.

L layers, E routed experts of a layer, k active experts per token, N tokens of a step over all ranks; c_i assignments
of expert i, s_i = c_i / (N k) its share, r_i = E s_i its relative load; z logits, p normalised scores, w gate weights;
D design effect (how much more the loads of correlated tokens scatter), H attention heads, M latent slots. Entropies
are in nats, normalised ones go from 0 to 1. *At balance* is what a perfectly balanced, undecided or random router
shows: the value to compare with."""


def markdown_page() -> str:
    """The page, ending with a line end."""
    return "\n".join([_HEAD, "", *_contents(), *_sections()])


def _contents() -> Iterator[str]:
    live = sum(metric.live for metric in METRICS)
    yield f"{len(METRICS)} metrics, {live} of them at every step (●):"
    yield ""
    for group, metrics in GROUPS.items():
        names = ", ".join(f"{'● ' if metric.live else ''}`{metric.id}`" for metric in metrics)
        yield f"- **{group}**: {names}"
    yield ""


def _sections() -> Iterator[str]:
    for group, metrics in GROUPS.items():
        yield f"## {group.capitalize()}"
        yield ""
        for metric in metrics:
            yield from _entry(metric)


def _entry(metric: Metric) -> Iterator[str]:
    yield f"### `{metric.id}`: {metric.name}"
    yield ""
    yield metric.how_to_read
    yield ""
    for label, fact in metric.facts.items():
        yield f"- {label}: `{fact}`" if label == "formula" else f"- {label}: {fact}"
    yield ""
