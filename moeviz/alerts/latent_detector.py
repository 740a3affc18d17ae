"""The alert about latents: attention whose latent or slots are hardly used, in any block.

Latents are recorded every n-th step, block by block, so nothing persists over records: the rule is raised by the first
block over its line and cleared when every block is well below. It is a note about the whole run, because its layers
are blocks, and dense blocks have latents as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from moeviz.alerts.config import AlertConfig
from moeviz.alerts.episodes import Episodes, Finding
from moeviz.alerts.rules import LATENT_RULES
from moeviz.records import AlertRecord, LatentRecord

_RULE = "LATENT_DEAD"
_RECENT = 20
_NAMED = 8
"""Blocks that a sentence names at most."""


class _Unused(NamedTuple):
    """What a block leaves unused: a share, and the lines for it."""

    share: float
    line: float
    calm: float


class LatentDetector:
    """Watches the latents of one run."""

    def __init__(self, config: AlertConfig | None = None) -> None:
        self.config = config or AlertConfig()
        self.episodes = Episodes()
        self.restart()

    def restart(self) -> None:
        """Forget what blocks left unused; an open episode stays open until they are calm."""
        self._blocks: dict[int, _Unused] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def observe(self, record: LatentRecord) -> list[AlertRecord]:
        """Judge one block at one step, beside the newest of every other."""
        unused = self._unused(record)
        if unused is None:
            return []
        self.episodes.tick()
        self._blocks[record.layer] = unused
        over = {block: each for block, each in self._blocks.items() if each.share > each.line}
        if over:
            return self._tell(over, record.step)
        if self.episodes.is_open(_RULE, None) and all(
            each.share < each.calm for each in self._blocks.values()
        ):
            return self.episodes.clear(_RULE, None, record.step, unused.share)
        return []

    def restore(self, alerts: Iterable[AlertRecord]) -> None:
        """Adopt the open episodes of an earlier attempt."""
        self.episodes.restore(alert for alert in alerts if alert.rule in LATENT_RULES)

    def rewind(self, step: int, last_step: int) -> list[AlertRecord]:
        """Training went back to `step`: blocks are forgotten and episodes of undone steps closed."""
        closed = self.episodes.rewind(step, last_step)
        self.restart()
        return closed

    def _unused(self, record: LatentRecord) -> _Unused | None:
        """Of the latent's directions, or of the slots; None for parts that say nothing about it."""
        config = self.config
        if record.name == "kv" and "latent_util" in record.values:
            return _Unused(1 - record.values["latent_util"], config.latent_unused, config.latent_unused_clear)
        if record.name == "write" and "slot_dead" in record.values:
            dead = record.values["slot_dead"] / record.profile_XC.shape[1]
            return _Unused(dead, config.slots_dead, config.slots_dead_clear)
        return None

    def _tell(self, over: dict[int, _Unused], step: int) -> list[AlertRecord]:
        block = max(over, key=lambda each: over[each].share / over[each].line)
        worst = over[block]
        self._recent.append(round(worst.share, 5))
        named = ", ".join(map(str, sorted(over)[:_NAMED]))
        facts = {
            "block": block,
            "blocks": named + (f" and {len(over) - _NAMED} more" if len(over) > _NAMED else ""),
        }
        finding = Finding(
            rule=_RULE,
            layer=None,
            value=worst.share,
            peak=worst.share,
            threshold=worst.line,
            facts={**facts, "layer": None, "step": step, "value": worst.share, "threshold": worst.line},
            evidence={**facts, "recent": list(self._recent)},
        )
        open_already = self.episodes.is_open(_RULE, None)
        return self.episodes.update(finding, step) if open_already else self.episodes.raise_(finding, step)
