"""Each family with every expert for every token, one choice, one expert, one that gets all and one that gets none.

Logits and gradients of ragged batches equal those of transformers, with biases far from zero where a family has any.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_model_hf import (
    FAMILIES,
)
from test_model_hf import (
    _assert_same_function as assert_same_function,
)
from test_model_hf import (
    _assert_same_gradients as assert_same_gradients,
)
from test_model_hf import (
    _logits as logits_of,
)
from test_model_hf import (
    _ragged as ragged,
)
from test_model_hf import (
    _spread as spread,
)
from torch import nn

from model.hf import from_hf

WITH_EXPERTS = [family for family in FAMILIES if family != "gpt2"]
"""GPT-2 is dense: nothing below can happen to it."""
NUM_EXPERTS = {
    "mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "olmoe": "num_experts",
    "qwen2_moe": "num_experts", "qwen3_moe": "num_experts",
}  # fmt: skip
SORTED_BY_TWO = ("deepseek_v3", "glm4_moe")
"""Their groups are ranked by their best two experts."""


@pytest.mark.parametrize(("experts", "chosen"), [(4, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_every_expert_or_one_or_the_only_one(family: str, experts: int, chosen: int, tmp_path: Path) -> None:
    changes = {NUM_EXPERTS.get(family, "n_routed_experts"): experts, "num_experts_per_tok": chosen}
    if family not in NUM_EXPERTS:
        changes |= {"n_group": 1, "topk_group": 1}
    theirs = spread(FAMILIES[family](**changes))
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    assert (ours.config.num_experts, ours.config.top_k) == (experts, chosen)
    if experts == 1 and family in SORTED_BY_TWO:
        with pytest.raises(RuntimeError, match="out of range"):
            logits_of(theirs, *ragged())  # transformers ranks groups by two experts, also where there is one
        assert bool(logits_of(ours, *ragged()).isfinite().all())
        return
    assert_same_function(ours, theirs)
    assert_same_gradients(ours, theirs, family)


@torch.no_grad()
def _favour(theirs: nn.Module, liking: float) -> None:
    """All tokens choose expert 2, or none does.

    Routers without a bias are led by a number that all tokens share: the first of the stream, which no layer changes.
    """
    theirs.get_input_embeddings().weight[:, 0] = 8.0
    for name, weight in theirs.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            outputs_first = theirs.config.model_type != "gpt_oss" or weight.ndim < 3
            stacked = weight.ndim == 3 or name.endswith("down_proj_bias")
            rows = weight if outputs_first else weight.transpose(1, 2)
            (rows[:, 0] if stacked else rows[0]).zero_()
        if "post_attention_layernorm" in name:
            weight[0] = 1.0
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            weight[:, 0] = 0
            weight[2, 0] = liking
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
            buffer[2] = liking


@pytest.mark.parametrize("liking", [5.0, -5.0], ids=["all on one", "one never"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_an_expert_with_every_token_and_an_expert_with_none(
    family: str, liking: float, tmp_path: Path
) -> None:
    theirs = spread(FAMILIES[family]())
    _favour(theirs, liking)
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    ids_BS, mask_BS = ragged()
    counts_LE = ours(ids_BS, attention_mask_BS=mask_BS).expert_counts_LE
    assert set(counts_LE[:, 2].tolist()) == {int(mask_BS.sum()) if liking > 0 else 0}
    assert_same_function(ours, theirs)
    assert_same_gradients(ours, theirs, family)
