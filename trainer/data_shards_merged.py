"""Shards of several sources as one: nothing is copied, the arrays stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moeviz.errors import MoevizError
from trainer.corpus import Split
from trainer.data_cache import digest
from trainer.data_checksums import Checks
from trainer.data_shards import Part, Shards


def merged(parts: Sequence[Shards]) -> Shards:
    """All domains of all parts.

    Raises:
        MoevizError: two parts have a domain of the same name on the same side.
    """
    if len(parts) == 1:
        return parts[0]
    arrays: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
    checks: dict[Part, Checks] = {}
    for part in parts:
        for split, domain in part.arrays:
            if (split, domain) in arrays:
                raise MoevizError(
                    f"two sources have a domain {domain!r}; tell them apart by a name before each: NAME=SOURCE"
                )
        arrays |= part.arrays
        checks |= part.checks
    return Shards(
        arrays,
        vocab_size=max(part.vocab_size for part in parts),
        eos_id=parts[0].eos_id,
        key=digest([[part.key, *part.domains] for part in parts]),
        checks=checks,
    )


def labelled(shards: Shards, label: str | None) -> Shards:
    """A single domain gets the label as its name, several get it before their own; None: as they are."""
    if label is None:
        return shards
    alone = len(shards.domains) == 1
    names = {domain: label if alone else f"{label}/{domain}" for domain in shards.domains}
    return replace(
        shards,
        arrays={(split, names[domain]): value for (split, domain), value in shards.arrays.items()},
        checks={(split, names[domain]): value for (split, domain), value in shards.checks.items()},
    )


def one_sided(shards: Shards, side: Split) -> Shards:
    """All of some shards on one side of the split.

    Raises:
        MoevizError: they are split already.
    """
    if len(shards.domains) < len(shards.arrays):
        raise MoevizError("token files with a split of their own go without other data to evaluate on")
    return replace(
        shards,
        arrays={(side, domain): value for (_, domain), value in shards.arrays.items()},
        checks={(side, domain): value for (_, domain), value in shards.checks.items()},
    )
