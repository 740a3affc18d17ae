"""Every threshold of the alert rules, in one frozen object, and what the rules must know about the run.

The defaults were set on two public models' loads and simulated (benchmarks/alerts.py). Bump `RULE_VERSION`
with a change of meaning: it is stored with each alert, so that old runs are read as they were judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from moeviz.errors import MoevizError

RULE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """Thresholds of the rules. Loads are relative (1 = even share); durations count records, not steps."""

    raise_after: int = 10
    """A condition must hold this many records in a row to raise an alert."""
    clear_after: int = 50
    """The looser clear condition must hold this many records in a row to clear it."""
    arm_after: int = 50
    """Records that the statistics see before any load rule judges."""
    startup_steps: int = 300
    """Until this step (or `startup_warmups` learning-rate warm-ups) load alerts are capped at warning."""
    startup_warmups: float = 3.0
    update_every: int = 50
    """An open alert reports a worse peak or other experts at most once in this many records."""

    window_min: int = 20
    """Shortest smoothing window of the loads; small batches get a longer one."""
    design_effect_prior: float = 4.0
    """Design effect that the window is planned for."""
    noise_window: int = 50
    """Smoothing window of the estimated design effect."""
    guard_sd: float = 3.0
    """A smoothed load must be this many of its standard deviations below a line to count as below."""

    starved_cap: float = 0.4
    starved_scale: float = 1.2
    """EXPERT_STARVED below min(cap, scale / sqrt(E)) of an even share."""
    starved_clear: float = 1.25
    """... and cleared above this multiple of that line."""
    dead_line: float = 0.02
    dead_clear: float = 0.1
    dead_assignments: float = 140.0
    """EXPERT_DEAD judges once an even share would have brought this many assignments."""
    skew_excess: float = 0.5
    skew_util: float = 0.6
    """LOAD_SKEW above this excess coverage v or below this effective utilisation u."""
    skew_clear_excess: float = 0.4
    skew_clear_util: float = 0.7
    collapse_excess: float = 0.8
    collapse_util: float = 0.3
    collapse_clear_excess: float = 0.5
    collapse_clear_util: float = 0.6
    collapse_dead_share: float = 0.25
    """ROUTING_COLLAPSE also when this share of the experts (at least two) is dead."""

    drift_baseline: int = 200
    """Records whose median entropy gap is the baseline of LOAD_DRIFT."""
    drift_limit: float = 25.0
    drift_slack: float = 1.0
    drift_clip: float = 6.0
    """CUSUM of the entropy gap in robust standard deviations: alarm line, allowance, largest single step."""
    drift_util_drop: float = 0.05
    """LOAD_DRIFT also needs the utilisation to have fallen this far below its baseline."""
    swing_autocorr: float = -0.35
    swing_clear_autocorr: float = -0.2
    swing_amplitude: float = 2.0
    swing_clear_amplitude: float = 1.5
    """BIAS_OSCILLATION: lag-1 autocorrelation of the loads, and swing in sampling standard deviations ..."""
    swing_design_effect: float = 10.0
    """... that a design effect of at most this explains, because an oscillation inflates it to hundreds ..."""
    swing_floor: float = 0.1
    """... but at least this share of an even load: in large batches a harmless alternation stands out too."""

    bias_scores: float = 0.5
    bias_clear_scores: float = 0.4
    bias_logits: float = 3.0
    """BIAS_SATURATED: span of the bias in score units, or in multiples of the rms of the logits."""
    bias_even_util: float = 0.9
    """BIAS_SATURATED: effective utilisation from which on the bias does its work, however large it is."""
    bias_after: int = 50
    drop_excess: float = 0.01
    drop_error: float = 0.1
    """TOKENS_DROPPED: warning above a balanced router's drops plus this, error above that."""
    lse_warning: float = 15.0
    lse_critical: float = 30.0
    lse_clear: float = 0.7
    logit_growth: float = 2.0
    """ROUTER_LOGITS: also when the z-loss is past twice (ln E)^2 and grew by this factor ..."""
    logit_growth_steps: int = 500
    logit_growth_share: float = 0.05
    """... within this many steps or this share of the planned ones, whichever is longer."""
    hard_entropy: float = 0.1
    hard_clear_entropy: float = 0.15
    hard_share: float = 0.1
    hard_after: int = 50
    """ROUTER_HARDENED: routing entropy below the line within this share of the planned steps."""

    spike_window: int = 128
    spike_sd: float = 6.0
    spike_share: float = 0.02
    spike_grad_share: float = 1.0
    spike_clear_after: int = 5
    """LOSS_SPIKE: standard deviations above the rolling mean, and share above the rolling median (loss, gradients)."""
    diverge_window: int = 50
    diverge_share: float = 0.02
    diverge_se: float = 4.0
    diverge_after: int = 100
    """LOSS_DIVERGING: smoothed loss above its best by max(share, standard errors) for this long."""
    explode_window: int = 20
    explode_history: int = 1000
    explode_recent: int = 50
    explode_factor: float = 5.0
    explode_clear: float = 2.0
    explode_after: int = 20
    """GRAD_EXPLOSION: smoothed gradient norm over the median of the history without its most recent part."""
    explode_clip: float = 10.0
    explode_clip_after: int = 50
    """... or over this multiple of the clipping norm for this long."""

    churn_passes: int = 5
    churn_factor: float = 2.0
    churn_floor: float = 0.1
    """PROBE_CHURN above this multiple of the median of so many passes before, and above the floor."""
    alike_line: float = 0.9
    alike_clear: float = 0.85
    """EXPERTS_ALIKE: mean cosine of experts' outputs (`pes`) or of the router's rows."""
    head_entropy: float = 0.05
    """ATTENTION_COLLAPSED: `attn_entropy` below which a head counts ..."""
    head_share: float = 0.5
    head_clear_share: float = 0.4
    """... and the share of all heads."""

    latent_unused: float = 0.9
    latent_unused_clear: float = 0.88
    """LATENT_DEAD: 1 - `latent_util` of an MLA block ..."""
    slots_dead: float = 0.25
    slots_dead_clear: float = 0.2
    """... and share of `slot_dead` among the slots of a two-stage one."""

    circulating: bool = False
    """Also judge by rules that many repeat and nobody has a source for (`Rule.circulating`)."""
    circulating_experts: int = 8
    circulating_share: float = 0.05
    """FIVE_PERCENT: an expert below this share of one step's assignments, in layers of this many experts."""
    circulating_z_loss: float = 0.01
    """Z_LOSS_LINE: weighted z-loss of a layer above this."""
    circulating_grad_norm: float = 10.0
    """GRAD_NORM_LINE: gradient norm above this for `raise_after` steps."""
    circulating_loss_steps: int = 5000
    """LOSS_RISING: no new best of the smoothed loss for more than this many steps."""
    circulating_val_excess: float = 0.2
    """VALIDATION_GAP: validation loss above the smoothed training loss by this share."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "swing_autocorr" and item.name != "swing_clear_autocorr" and value < 0:
                raise MoevizError(f"{item.name}={value} is negative; thresholds of alerts are 0 or more")
        if self.churn_passes < 1:
            raise MoevizError(f"churn_passes={self.churn_passes} is below 1; 5 is the default")
        if self.raise_after < 1 or self.clear_after < 1:
            raise MoevizError(
                f"raise_after={self.raise_after}, clear_after={self.clear_after}: both must be at least 1"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AlertConfig:
        """Read what another version may have written: thresholds that no longer exist are left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def with_thresholds(self, settings: Iterable[str]) -> AlertConfig:
        """Change thresholds given as `NAME=VALUE`, as on a command line.

        Raises:
            MoevizError: an unknown name, a value that is no number or not allowed.
        """
        defaults = {item.name: getattr(self, item.name) for item in fields(self)}
        changes: dict[str, Any] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            name = name.strip().replace("-", "_")
            changes[name] = _number(name, text, defaults.get(name))
        return replace(self, **changes)


def _number(name: str, text: str, default: Any) -> int | float:
    if default is None or isinstance(default, bool):
        names = [item.name for item in fields(AlertConfig) if item.type not in (bool, "bool")]
        near = get_close_matches(name, names, n=3) or names
        raise MoevizError(f"{name!r} is no threshold of the alert rules; there is {', '.join(near)}")
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise MoevizError(f"{name}={text}: this threshold is {kind}; its default is {default}") from None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What some rules must know about the run; a rule that misses its number does not judge."""

    planned_steps: int | None = None
    warmup_steps: int = 0
    """Learning-rate warm-up, which lengthens the start-up window."""
    grad_clip: float | None = None
    """Norm that gradients are clipped to."""
    capacity_factor: float | None = None
    """Where it is not given it is read off the drops."""
    bias_step: float | None = None
    """u of the loss-free balancing rule; where it is not given it is read off the bias."""
    z_coef: float | None = None
    """Weight of the router z-loss in the training loss."""

    def startup_end(self, config: AlertConfig) -> int:
        """First step at which load alerts keep their full severity."""
        return int(max(config.startup_steps, config.startup_warmups * self.warmup_steps))
