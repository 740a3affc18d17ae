"""What would be wrong at every step is refused at the first one, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeviz.capture.failures import ProbeError
from moeviz.capture.step_sums import StepSums
from moeviz.records import LayerInfo, LoadRecord


def check_counts(
    expected: Sequence[LayerInfo], load: LoadRecord, experts_choose: Callable[[int], bool]
) -> None:
    """Each row of counts sums to tokens x K, unless experts take as many tokens as they like.

    Args:
        expected: the layers that are here.
        load: of this process alone.
        experts_choose: whether in this layer experts choose tokens.

    Raises:
        ProbeError: a row that does not.
    """
    for layer in expected:
        total, tokens = int(load.counts_LE[layer.layer].sum()), load.tokens * layer.top_k
        if total != tokens and not experts_choose(layer.layer):
            raise ProbeError(
                f"router {layer.name} assigned {total} slots, not {load.tokens} tokens x "
                f"top_k={layer.top_k} = {tokens}: it ran more or less often than the model, or saw other "
                "tokens than input_ids and attention_mask say; watch the module that you call, or hand an "
                "adapter"
            )


def no_router_seen(expected: Sequence[LayerInfo], sums: StepSums) -> str:
    """Why a step may have missed routers that are here."""
    missing = [layer.name for layer in expected if layer.layer not in sums.layers_seen]
    return (
        f"the step saw {len(sums.layers_seen)} of {len(expected)} routers (missing: {', '.join(missing[:3])}"
        f"{', ...' if len(missing) > 3 else ''}): call the watched model itself, in train mode with gradients on, "
        "before step(); attach before torch.compile; after compiling the same class earlier in this process, call "
        "torch._dynamo.reset() first"
    )
