"""What a run does by itself when an alert is raised: nothing, unless it is told so here.

    --on-alert DEAD=reinit_router --on-alert COLLAPSE=stop

Plain data without torch; `trainer.interventions` acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from moeviz.alerts import Command, Webhook
from moeviz.errors import MoevizError

JUDGED = (
    "EXPERT_STARVED",
    "EXPERT_DEAD",
    "LOAD_SKEW",
    "ROUTING_COLLAPSE",
    "LOAD_DRIFT",
    "BIAS_OSCILLATION",
    "BIAS_SATURATED",
    "ROUTER_LOGITS",
    "LOSS_SPIKE",
    "LOSS_DIVERGING",
    "GRAD_EXPLOSION",
    "NONFINITE",
)
"""Rules that are judged in the training loop itself, from what it knows at the end of a step."""
ABOUT_EXPERTS = ("EXPERT_STARVED", "EXPERT_DEAD")
ACTIONS = ("raise_bias", "raise_aux", "reinit_router", "lower_lr", "stop")
_TELLING = ("run", "post")


class Response(NamedTuple):
    """One rule and what is done about it."""

    rule: str
    action: str
    """One of ACTIONS, or run or post."""
    target: str
    """The command or the address of run and post."""


@dataclass(frozen=True, kw_only=True)
class ResponseConfig:
    """Interventions: off unless named, each one recorded."""

    on_alert: tuple[str, ...] = ()
    """RULE=ACTION ...: do this when the alert is raised at its full severity. Actions: raise_bias and raise_aux (double
    bias_step, aux_coef), lower_lr (halve the rate), reinit_router (new router rows for the experts concerned), stop
    (with a checkpoint), run:COMMAND, post:URL (these two are not kept with the run). Example: DEAD=reinit_router"""
    respond_every: int = 200
    """Steps after which it is done again while the alert is open."""

    def __post_init__(self) -> None:
        if self.respond_every < 1:
            raise MoevizError(f"respond_every={self.respond_every} is below 1; 200 is usual")
        self.responses  # noqa: B018  # refuses what cannot be read here, before anything is built

    @property
    def responses(self) -> tuple[Response, ...]:
        """What was asked for, in order."""
        return tuple(_response(text) for text in self.on_alert)

    @property
    def kept(self) -> tuple[str, ...]:
        """Those that go into run folders: commands and addresses often hold secrets."""
        return tuple(
            text
            for text, response in zip(self.on_alert, self.responses, strict=True)
            if response.action not in _TELLING
        )


def _response(text: str) -> Response:
    name, equals, said = text.partition("=")
    action, _, target = said.partition(":")
    if not equals or action not in (*ACTIONS, *_TELLING):
        near = get_close_matches(action, ACTIONS, n=1)
        hint = f"did you mean {name}={near[0]}? " if near else ""
        raise MoevizError(
            f"on_alert={text!r} is no RULE=ACTION; {hint}actions are {', '.join(ACTIONS)}, run:COMMAND and post:URL"
        )
    rule = _rule(name, text)
    if action == "reinit_router" and rule not in ABOUT_EXPERTS:
        raise MoevizError(
            f"on_alert={text!r}: {rule} names no expert to begin anew; use it with DEAD or STARVED"
        )
    if action == "run":
        Command(target)
    if action == "post":
        Webhook(target)
    return Response(rule, action, target)


def _rule(name: str, text: str) -> str:
    """`DEAD` -> `EXPERT_DEAD`: a part of one rule's name is enough."""
    word = name.strip().upper().replace("-", "_")
    found = [rule for rule in JUDGED if rule == word] or [rule for rule in JUDGED if word and word in rule]
    if len(found) != 1:
        which = f"names {' and '.join(found)}" if found else "names no rule that training can act on"
        raise MoevizError(f"on_alert={text!r} {which}; there is {', '.join(JUDGED)}")
    return found[0]
