"""The rules as a Markdown page: docs/alerts.md is what `moeviz alerts --rules --markdown` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moeviz.alerts.conditions import GENERAL, condition_of, thresholds_of
from moeviz.alerts.config import RULE_VERSION, AlertConfig
from moeviz.alerts.rules import RULES, Rule

_HEAD = """# Alerts

Rules that look at every step while a run trains, and say what is wrong, where, since when, and what to do about it.
The loss does not show a collapse of the routing; these do. They judge smoothed loads against the noise of the batch at
hand (it depends on tokens, experts, top-k and how alike the tokens of a sequence are), need a condition to persist,
and clear on a looser one, so that one problem is one alert. `benchmarks/alerts.py` counts how often they cry wolf and
how soon they see what they are for. This page is written by `moeviz alerts --rules --markdown > docs/alerts.md`.

## Reading them

```bash
moeviz alerts RUN                       # all, with remedies: open ones first, worst first
moeviz alerts RUN --open --since 2000   # open now, and active at step 2000 or later
moeviz alerts RUN --follow              # each transition once, as it happens, until the run has ended
moeviz alerts RUN --follow --json       # the same as JSON Lines, for a program
moeviz alerts RUN --rules               # the rules with the thresholds of this run
moeviz snapshot RUN --around 1200 --window 50   # what was true around a step: scalars, worst layers, alerts, events
```

`--follow` ends with the run. A run that was killed never says that it ended: when it is silent for twenty times its
usual step (two minutes at least; half of it when its process is seen to be gone from this machine) it is presumed
dead, a line says so, and the exit status is 1.

In SQL: `moeviz query RUN "SELECT * FROM alerts"`. The dashboards and `moeviz tui` show the same alerts. A rule that is
open in more than half of the layers is told as one line.

## In CI, and before the next job

```bash
moeviz check RUN                        # exit status 1 with an open alert of severity error or above
moeviz check RUN --fail-on warning      # ... or warning or above
moeviz check RUN --json                 # the verdict and every open alert as one JSON object
```

A run that ended by an error fails as well. A run without a step is an error: there is nothing to judge.

## Being told

```bash
moeviz train ... --on-alert-command 'notify-send "{severity} {rule}" "{message}"'
moeviz train ... --on-alert-url https://example.org/hook --alert-min-severity error
```

The command gets the alert as JSON on its standard input; `{rule}`, `{severity}`, `{layer}`, `{step}`, `{state}` (raised
or cleared) and `{message}` in its words are filled in. No shell is involved. The web hook gets the same JSON by POST;
network errors, status 408, 429 and 5xx are tried again, five times at most, with pauses that double from one second.
Both work in a thread of their own: training never waits for them, what fails is logged once and counted, and at the
end of a run what still waits gets five seconds. In your own loop:

```python
from moeviz.alerts import Notifier, Webhook
probe = moeviz.watch(model, "runs/mine", on_alert=Notifier(Webhook("https://example.org/hook"), run="mine"))
```

## Settings

```bash
moeviz train ... --alert-thresholds starved_cap=0.3 clear_after=100
moeviz train ... --circulating-rules
```

In your own loop: `moeviz.watch(model, run, alerts=AlertConfig(starved_cap=0.3))`. The thresholds are kept in the run
(`config.alert_rules` of run.json), each alert with the version of its rule, and a resumed run goes on with its own.
Load rules watch the training mixture only: one domain alone looks like collapse, because experts specialise."""

_FIELD = re.compile(r"\{[^}]*\}")
"""What an alert fills in."""


def markdown_page(config: AlertConfig | None = None) -> str:
    """The page, ending with a line end. `config`: thresholds to state; the defaults by default."""
    return "\n".join([_HEAD, "", *_general(config or AlertConfig()), *_rules(config or AlertConfig())])


def _general(config: AlertConfig) -> Iterator[str]:
    yield "Of no single rule:"
    yield ""
    for name, meaning in GENERAL.items():
        yield f"- `{name}` = {getattr(config, name):g}: {meaning}"
    yield ""


def _rules(config: AlertConfig) -> Iterator[str]:
    yield f"## Rules (version {RULE_VERSION})"
    yield ""
    yield "m is the smoothed relative load of an expert, 1 an even share; sd is its sampling noise; shares are 0 to 1."
    yield ""
    for rule in RULES:
        if not rule.circulating:
            yield from _entry(rule, config)
    yield "## Rules in circulation"
    yield ""
    yield "Fixed lines that many repeat and nobody has a source for; judged with `--circulating-rules` only."
    yield ""
    for rule in RULES:
        if rule.circulating:
            yield from _entry(rule, config)


def _entry(rule: Rule, config: AlertConfig) -> Iterator[str]:
    condition = condition_of(rule.id, config)
    yield f"### `{rule.id}`: {severity_of(rule)}"
    yield ""
    yield f"- watches: {rule.watches}"
    yield f"- raised: {condition.raises}"
    yield f"- cleared: {condition.clears}"
    names = thresholds_of(rule.id)
    if names:
        yield f"- thresholds: {', '.join(f'`{name}`' for name in names)}"
    yield f"- remedy: {_FIELD.sub('…', rule.remedy)}"
    yield ""


def severity_of(rule: Rule) -> str:
    """Severity in words: with its escalation, and whether the start of a run caps it."""
    then = f", then {rule.escalated}" if rule.escalated else ""
    capped = rule.startup_capped and (rule.escalated or rule.severity) != "warning"
    return rule.severity + then + (" (warning at most while a run starts)" if capped else "")
