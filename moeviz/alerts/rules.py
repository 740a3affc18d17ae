"""What each alert means and what to do about it: one row per rule, with the words that people read.

`message` and `remedy` are templates over the facts that the detectors collect when a rule fires. Thresholds
live in `AlertConfig`, the conditions in `load_rules`, `router_rules` and `scalar_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeviz.alerts.config import RULE_VERSION
from moeviz.records import Severity

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error", "critical")
"""From mild to grave."""

_BALANCE = (
    "If it lasts: raise the weight of the auxiliary loss 2 to 3 times, or the bias "
    "step u; check that the router gets gradient and that the weight is not divided by layers or by k."
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One alert rule."""

    id: str
    title: str
    severity: Severity
    escalated: Severity | None = None
    """Severity once the second, harder line of the rule is crossed."""
    watches: str
    """What `AlertRecord.value` is, in words and units."""
    worse: Literal["higher", "lower"] = "higher"
    startup_capped: bool = False
    """Whether it is capped at warning while a run starts, when imbalance is normal."""
    message: str
    remedy: str
    circulating: bool = False
    """A rule that many repeat and nobody has a source for: judged only with `AlertConfig.circulating`."""
    version: int = RULE_VERSION


RULES: tuple[Rule, ...] = (
    Rule(
        id="EXPERT_STARVED",
        title="Expert starved",
        severity="warning",
        watches="smallest smoothed load, × even share",
        worse="lower",
        startup_capped=True,
        message="Expert {lowest}, layer {layer} gets {lowest_share:.2%} of the assignments ({value:.2f}× "
        "an even share; alert line {threshold:.2f}×){others}.",
        remedy="Often heals in the first few hundred steps. " + _BALANCE,
    ),
    Rule(
        id="EXPERT_DEAD",
        title="Expert dead",
        severity="error",
        watches="smallest smoothed load, × even share",
        worse="lower",
        startup_capped=True,
        message="Expert {lowest}, layer {layer} is effectively unused since step {since}{others}.",
        remedy="It receives almost no gradient: only the balance term can bring it back, which usually "
        "takes 100 to 300 steps. Restart from a checkpoint before step {since} with stronger balancing, "
        "or set its router row to the mean of the others plus noise.",
    ),
    Rule(
        id="LOAD_SKEW",
        title="Load skewed",
        severity="warning",
        watches="concentration of the load, × alert line",
        startup_capped=True,
        message="Layer {layer} uses {n_eff:.1f} of {num_experts} experts; expert {busiest} serves "
        "{busiest_coverage:.0%} of the tokens.",
        remedy="Usual in the first hundred steps. " + _BALANCE,
    ),
    Rule(
        id="ROUTING_COLLAPSE",
        title="Routing collapsed",
        severity="critical",
        watches="concentration of the load, × alert line",
        startup_capped=True,
        message="Routing in layer {layer} has collapsed to about {n_eff:.1f} of {num_experts} experts.",
        remedy="The loss will not show this. Stop; lower the learning rate or lengthen its warm-up, "
        "balance from step 0, add a z-loss of 1e-3, start the router smaller.",
    ),
    Rule(
        id="LOAD_DRIFT",
        title="Balance drifting",
        severity="info",
        watches="CUSUM of the entropy gap, robust standard deviations",
        message="Load balance in layer {layer} has been getting worse since about step {since}.",
        remedy="Healthy late training also relaxes its balance: look at the loss and at specialisation "
        "first.",
    ),
    Rule(
        id="BIAS_OSCILLATION",
        title="Loads oscillate",
        severity="warning",
        watches="swing from step to step, × sampling noise",
        message="Loads in layer {layer} swing from step to step by {value:.1f}× their noise: {swing_cause}.",
        remedy="With a balance bias: divide its step u by 3 to 10, or update it on the counts of several batches. "
        "Without one: lower the weight of the auxiliary loss, and mix kinds of data within each batch.",
    ),
    Rule(
        id="BIAS_SATURATED",
        title="Balance bias saturated",
        severity="warning",
        watches="span of the balance bias, score units (or × rms logit)",
        message="The balance bias of layer {layer} outweighs its scores: it spans {value:.2f} (alert line "
        "{threshold:.2f}){bias_lead}.",
        remedy="The router's logits outgrow the bias: add a z-loss or weight decay on the router, raise "
        "u early.",
    ),
    Rule(
        id="TOKENS_DROPPED",
        title="Tokens dropped",
        severity="warning",
        escalated="error",
        watches="share of the assignments that were dropped",
        startup_capped=True,
        message="Layer {layer} drops {value:.1%} of its assignments; a balanced router would drop "
        "{expected_drop:.1%}.",
        remedy="Raise the capacity factor to 1.25 or more, or train without a capacity limit.",
    ),
    Rule(
        id="ROUTER_LOGITS",
        title="Router logits grow",
        severity="warning",
        escalated="critical",
        watches="rms logsumexp of the router's logits",
        message="Router logits of layer {layer} grow: logsumexp {value:.1f} (alert line "
        "{threshold:.1f}). In bfloat16 they would be rounded to {rounding:.2g}.",
        remedy="Keep the router in float32, add a z-loss of 1e-3, lower the learning rate.",
    ),
    Rule(
        id="ROUTER_HARDENED",
        title="Router decided early",
        severity="info",
        watches="routing entropy / ln E",
        worse="lower",
        message="The router of layer {layer} has already decided: routing entropy {value:.2f} of its "
        "maximum at {progress:.0%} of the run.",
        remedy="Specialisation may freeze. Lower the router's learning rate or its initialisation.",
    ),
    Rule(
        id="LOSS_SPIKE",
        title="Loss spike",
        severity="warning",
        watches="standard deviations above the rolling mean",
        message="Spike of {name} at step {step}: {level:.4g}, {value:.1f} standard deviations above its "
        "rolling mean.",
        remedy="Inspect that batch. A single spike needs nothing; repeated ones call for a lower "
        "learning rate.",
    ),
    Rule(
        id="LOSS_DIVERGING",
        title="Loss diverging",
        severity="error",
        watches="smoothed loss above its best, relative",
        message="The loss has risen {value:.1%} above its best, for {lasting} steps.",
        remedy="Go back to a checkpoint near step {since}, lower the learning rate, look at the data of "
        "those steps.",
    ),
    Rule(
        id="GRAD_EXPLOSION",
        title="Gradients explode",
        severity="error",
        watches="smoothed gradient norm, × its usual level",
        message="The gradient norm {level:.3g} is {value:.1f}× {usual}.",
        remedy="Lower the learning rate or lengthen the warm-up; clip gradients; look for router logits "
        "that grow.",
    ),
    Rule(
        id="NONFINITE",
        title="Not a number",
        severity="critical",
        watches="values that are NaN or infinite",
        message="{name} is not finite at step {step}{where}.",
        remedy="Stop: the weights may be poisoned. Restart from the last checkpoint before step {step} "
        "with a lower learning rate; keep router and loss in float32.",
    ),
    Rule(
        id="PROBE_CHURN",
        title="Routing of the probe moves again",
        severity="info",
        watches="share of the probe's decisions that changed since the last pass",
        message="Routing of the fixed probe moves again in layer {layer}: {value:.0%} of its decisions changed since "
        "the last pass, {usual:.0%} before.",
        remedy="Decisions settle as the learning rate falls. Look at what changed near step {step}: the learning rate, "
        "the mixture of data, the weight of the balance loss or the bias step.",
    ),
    Rule(
        id="EXPERTS_ALIKE",
        title="Experts alike",
        severity="info",
        watches="mean cosine of two experts' outputs, or of two rows of the router",
        message="{what} of layer {layer} are nearly the same (mean cosine {value:.2f}): balanced, perhaps, but "
        "redundant.",
        remedy="Usual right after upcycling from a dense model; it should fall from there. If it stays: fewer or "
        "smaller experts, a weaker auxiliary loss, or the orthogonality loss on the router.",
    ),
    Rule(
        id="ATTENTION_COLLAPSED",
        title="Attention collapsed",
        severity="info",
        watches="share of the heads that look at one key",
        message="{heads} of {total} heads look at hardly more than one key (entropy below {entropy:.0%} of its "
        "maximum): block.head {named}.",
        remedy="Attention logits grow: lower the learning rate or lengthen its warm-up, normalise queries and keys "
        "(qk_norm), add weight decay to their projections.",
    ),
    Rule(
        id="LATENT_DEAD",
        title="Latents hardly used",
        severity="info",
        watches="share of a block's latent directions, or slots, that is not used",
        message="Attention block {block} leaves {value:.0%} of its latents unused (alert line {threshold:.0%}); blocks "
        "over the line: {blocks}.",
        remedy="A narrower latent or fewer slots would do: see the Latents page for which. With fewer than ten tokens "
        "for each number the rank looks low: raise --latent-tokens first.",
    ),
    Rule(
        id="FIVE_PERCENT",
        title="Expert under 5 % (rule in circulation)",
        severity="warning",
        watches="smallest share of a step's assignments",
        worse="lower",
        message="The least used expert of layer {layer} got {value:.1%} of the assignments of step {step}, less than "
        "{threshold:.0%}: called routing collapse in circulation.",
        remedy="No source is known, and one step is a small sample: healthy models trip this thousands of times. "
        "EXPERT_STARVED draws the same line on smoothed loads, with their noise.",
        circulating=True,
    ),
    Rule(
        id="Z_LOSS_LINE",
        title="Weighted z-loss over 0.01 (rule in circulation)",
        severity="warning",
        watches="weighted router z-loss of the layer",
        message="The weighted z-loss of layer {layer} is {value:.3g}, over {threshold:.3g}: called unhealthy in "
        "circulation.",
        remedy="No source is known. At a weight of 1e-3 and zero logits it is 0.0043 with 8 experts but 0.0173 with "
        "64: look at lse_rms and its growth, which ROUTER_LOGITS judges.",
        circulating=True,
    ),
    Rule(
        id="GRAD_NORM_LINE",
        title="Gradient norm over 10 (rule in circulation)",
        severity="warning",
        watches="gradient norm",
        message="The gradient norm has been over {threshold:g} for {lasting} steps, now {level:.3g}: called an "
        "explosion in circulation.",
        remedy="No source is known, and the usual norm depends on the model. GRAD_EXPLOSION compares it with the "
        "run's own past.",
        circulating=True,
    ),
    Rule(
        id="LOSS_RISING",
        title="Loss rising for 5,000 steps (rule in circulation)",
        severity="warning",
        watches="steps without a new best of the smoothed loss",
        message="The smoothed loss, now {level:.4g}, has been above its best for {value:.0f} steps: called divergence "
        "in circulation.",
        remedy="No source is known, and this comes late. LOSS_DIVERGING fires within hundreds of steps.",
        circulating=True,
    ),
    Rule(
        id="VALIDATION_GAP",
        title="Validation far over training loss (rule in circulation)",
        severity="warning",
        watches="validation loss over the smoothed training loss, relative excess",
        message="The validation loss, {level:.4g} at step {step}, is {value:.0%} above the training loss: called "
        "overfitting in circulation.",
        remedy="The two are comparable only on the same mixture of data: compare domain by domain, and repeat no "
        "data more often than needed.",
        circulating=True,
    ),
)
PROBE_RULES = frozenset({"PROBE_CHURN", "EXPERTS_ALIKE", "ATTENTION_COLLAPSED"})
"""Rules that are judged on passes over the fixed probe, not on training steps."""
LATENT_RULES = frozenset({"LATENT_DEAD"})
"""Rules that are judged where latents are recorded."""
_BY_ID = {rule.id: rule for rule in RULES}


def rule(rule_id: str) -> Rule:
    """The rule with this id. Raises KeyError for an unknown one."""
    return _BY_ID[rule_id]
