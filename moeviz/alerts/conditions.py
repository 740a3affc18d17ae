"""When each rule raises and clears, in words whose numbers come from an AlertConfig: for people, not for the detectors.

`{name}` is a threshold of `AlertConfig`, so a page made from here states what a run is judged by, its own settings
included. m is a smoothed relative load (1: even share), sd its sampling noise with the estimated design effect.
"""

from __future__ import annotations

import string
from dataclasses import fields
from typing import NamedTuple

from moeviz.alerts.config import AlertConfig


class Condition(NamedTuple):
    """Templates over the thresholds."""

    raises: str
    clears: str


_LOAD = "{clear_after} steps in a row: "
CONDITIONS: dict[str, Condition] = {
    "EXPERT_STARVED": Condition(
        "smallest m < min({starved_cap}, {starved_scale}/√E) − {guard_sd} sd on {raise_after} steps in a row; a step "
        "counts for more, three times at most, the further below that line",
        _LOAD + "all m > {starved_clear} × the line",
    ),
    "EXPERT_DEAD": Condition(
        "smallest m < {dead_line} on {raise_after} steps in a row (kept while noise alone lifts it over the line; "
        "steps count up to three times where noise is small), once an even share would have brought "
        "{dead_assignments} assignments",
        _LOAD + "all m > {dead_clear}",
    ),
    "LOAD_SKEW": Condition(
        "excess coverage > {skew_excess} or effective utilisation < {skew_util}, {raise_after} steps in a row",
        _LOAD + "excess coverage < {skew_clear_excess} and utilisation > {skew_clear_util}",
    ),
    "ROUTING_COLLAPSE": Condition(
        "excess coverage > {collapse_excess} or effective utilisation < {collapse_util}, or a share of "
        "{collapse_dead_share} of the experts (two at least) dead, {raise_after} steps in a row",
        _LOAD + "excess coverage < {collapse_clear_excess} and utilisation > {collapse_clear_util}",
    ),
    "LOAD_DRIFT": Condition(
        "CUSUM of ln(ln E − H) over its best {drift_baseline} steps > {drift_limit} (slack {drift_slack}, a step adds "
        "{drift_clip} at most) and the utilisation fell by {drift_util_drop}",
        _LOAD + "the sum is 0",
    ),
    "BIAS_OSCILLATION": Condition(
        "lag-1 autocorrelation of the loads < {swing_autocorr} and their swing > {swing_amplitude} × its noise (design "
        "effect of {swing_design_effect} at most) and > {swing_floor} of an even share, {raise_after} steps in a row",
        _LOAD + "autocorrelation > {swing_clear_autocorr} or swing < {swing_clear_amplitude} × its noise",
    ),
    "BIAS_SATURATED": Condition(
        "span of the bias > {bias_scores} score units (or {bias_logits} × the rms logit) while the utilisation is "
        "under {bias_even_util}, {bias_after} steps in a row",
        _LOAD + "span < {bias_clear_scores} (in proportion for logits), or the utilisation back",
    ),
    "TOKENS_DROPPED": Condition(
        "drop rate > that of a balanced router + {drop_excess} (error: > {drop_error}), {raise_after} steps in a row",
        _LOAD + "under half the line",
    ),
    "ROUTER_LOGITS": Condition(
        "rms logsumexp > {lse_warning} (critical: > {lse_critical}), or z-loss > 2 (ln E)² and {logit_growth} × its "
        "lowest within {logit_growth_steps} steps or a share of {logit_growth_share} of the run, {raise_after} "
        "steps in a row",
        _LOAD + "under {lse_clear} × the lines",
    ),
    "ROUTER_HARDENED": Condition(
        "routing entropy < {hard_entropy} of ln E within the first share of {hard_share} of the planned steps, "
        "{hard_after} steps in a row",
        _LOAD + "entropy > {hard_clear_entropy}",
    ),
    "LOSS_SPIKE": Condition(
        "loss (gradient norm) > mean + {spike_sd} sd of {spike_window} steps and over their median by a share of "
        "{spike_share} ({spike_grad_share})",
        "{spike_clear_after} steps without one",
    ),
    "LOSS_DIVERGING": Condition(
        "mean of about {diverge_window} losses above its best by the larger of a share of {diverge_share} and "
        "{diverge_se} standard errors, {diverge_after} steps in a row",
        "not so on {spike_clear_after} steps in a row",
    ),
    "GRAD_EXPLOSION": Condition(
        "mean of about {explode_window} gradient norms > {explode_factor} × the median of {explode_history} (without "
        "the last {explode_recent}), {explode_after} steps in a row; or > {explode_clip} × the clipping norm, "
        "{explode_clip_after} in a row",
        "{clear_after} steps in a row: < {explode_clear} × (half of it, for the clipping norm)",
    ),
    "NONFINITE": Condition("a loss, gradient norm or sum of a router is NaN or infinite, once", "never"),
    "PROBE_CHURN": Condition(
        "churn of the fixed probe > {churn_factor} × the median of the {churn_passes} passes before, and "
        "> {churn_floor}",
        "not so",
    ),
    "EXPERTS_ALIKE": Condition(
        "mean cosine of the experts' outputs, or of the router's rows, > {alike_line} on a pass over the fixed probe",
        "< {alike_clear}",
    ),
    "ATTENTION_COLLAPSED": Condition(
        "more than a share of {head_share} of the heads has an attention entropy < {head_entropy} on the fixed probe",
        "less than {head_clear_share}",
    ),
    "LATENT_DEAD": Condition(
        "a share of more than {latent_unused} of the directions of an MLA latent, or of {slots_dead} of the slots of a "
        "key head, is not used, in any block",
        "less than {latent_unused_clear} and {slots_dead_clear} in all blocks",
    ),
    "FIVE_PERCENT": Condition(
        "an expert under {circulating_share} of one step's assignments, in layers of {circulating_experts} experts",
        _LOAD + "not so",
    ),
    "Z_LOSS_LINE": Condition(
        "weighted z-loss > {circulating_z_loss}, {raise_after} steps in a row", _LOAD + "not so"
    ),
    "GRAD_NORM_LINE": Condition(
        "gradient norm > {circulating_grad_norm}, {raise_after} steps in a row", _LOAD + "not so"
    ),
    "LOSS_RISING": Condition(
        "no new best of the smoothed loss for {circulating_loss_steps} steps", "a new best"
    ),
    "VALIDATION_GAP": Condition(
        "validation loss over the smoothed training loss by a share of {circulating_val_excess}", "not so"
    ),
}
"""By rule."""

GENERAL = {
    "arm_after": "steps that the statistics see before any load rule judges",
    "startup_steps": "load alerts are capped at warning before this step",
    "startup_warmups": "... or before so many learning-rate warm-ups, if that is later",
    "update_every": "an open alert tells of a worse peak at most once in so many steps",
    "window_min": "shortest smoothing window of the loads; small batches get a longer one",
    "design_effect_prior": "design effect that the window is planned for",
    "noise_window": "smoothing window of the estimated design effect",
}
"""Thresholds of no single rule."""


def condition_of(rule_id: str, config: AlertConfig) -> Condition:
    """The condition of a rule with its numbers. Raises KeyError for an unknown rule."""
    values = {item.name: f"{getattr(config, item.name):g}" for item in fields(config)}
    return Condition(*(template.format_map(values) for template in CONDITIONS[rule_id]))


def thresholds_of(rule_id: str) -> tuple[str, ...]:
    """Names of the thresholds that a rule has, in the order in which its condition tells them."""
    names = [
        name
        for template in CONDITIONS[rule_id]
        for _, name, _, _ in string.Formatter().parse(template)
        if name
    ]
    return tuple(dict.fromkeys(names))
