"""Shares of domains in what is trained on, as they are typed: NAME=SHARE ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeviz.errors import MoevizError


def parse_mixture(words: Sequence[str]) -> dict[str, float]:
    """`("code=0.5", "stories=0.5")` -> numbers by name; they are put in proportion later.

    Raises:
        MoevizError: a word of another form, a name twice, a share below 0, or none above 0.
    """
    shares: dict[str, float] = {}
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = float("nan")
        if not (name and equals and 0 <= share < float("inf")):
            raise MoevizError(f"mixture {word!r} is not NAME=SHARE with a share of 0 or more; code=0.5 is")
        if name in shares:
            raise MoevizError(f"mixture names {name!r} twice; give each domain one share")
        shares[name] = share
    if words and not sum(shares.values()) > 0:
        raise MoevizError("every share of the mixture is 0; give at least one domain a positive one")
    return shares


def weights_of(shares: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
    """The weight of each domain.

    Args:
        shares: by domain, or by the source's name for all its domains `NAME/...` together, which then divide it in
            proportion to their tokens.
        tokens: of each domain.

    Raises:
        MoevizError: a name that no domain has.
    """
    weights: dict[str, float] = {}
    for name, share in shares.items():
        members = [name] if name in tokens else [d for d in tokens if d.startswith(f"{name}/")]
        if not members:
            raise MoevizError(
                f"the mixture names {name!r}, which the data has not; it has {', '.join(tokens)}"
            )
        total = sum(tokens[member] for member in members)
        for member in members:
            weights[member] = weights.get(member, 0.0) + share * (tokens[member] / total if total else 0.0)
    return weights
