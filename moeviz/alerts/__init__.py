"""Collapse detection: rules over smoothed, noise-aware loads, one alert per episode.

`RouterDetector`, `ScalarDetector`, `ProbeDetector` and `LatentDetector` turn records into AlertRecords; `RULES` says
what each means; `AlertConfig` holds every threshold; `latest` and `grouped` order them for readers; `Notifier`
tells them to a `Command` or a `Webhook`.
"""

from moeviz.alerts.config import RULE_VERSION, AlertConfig, RunPlan
from moeviz.alerts.detector import RouterDetector
from moeviz.alerts.grouping import AlertGroup, alert_line, grouped, latest
from moeviz.alerts.latent_detector import LatentDetector
from moeviz.alerts.notify import Command, Notifier, Webhook
from moeviz.alerts.probe_detector import ProbeDetector
from moeviz.alerts.rules import RULES, SEVERITIES, Rule, rule
from moeviz.alerts.scalars import ScalarDetector

__all__ = [
    "RULES",
    "RULE_VERSION",
    "SEVERITIES",
    "AlertConfig",
    "AlertGroup",
    "Command",
    "LatentDetector",
    "Notifier",
    "ProbeDetector",
    "RouterDetector",
    "Rule",
    "RunPlan",
    "ScalarDetector",
    "Webhook",
    "alert_line",
    "grouped",
    "latest",
    "rule",
]
