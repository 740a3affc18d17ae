"""What keeps experts evenly used: a loss on the scores, or a bias that is moved after each step.

The bias reads its own counts, summed over micro-batches and ranks by the trainer; what a probe counts never
reaches it. Loss-free balancing: Wang et al. 2024, https://arxiv.org/abs/2408.15664; z-loss: Zoph et al. 2022,
https://arxiv.org/abs/2202.08906.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.lm import ModelOutput
from model.router import routers, update_selection_bias
from trainer.config import BalanceConfig


def training_loss(output: ModelOutput, config: BalanceConfig) -> Tensor:
    """Cross-entropy plus weighted auxiliary losses, summed over layers. Scalar, nats.

    SimBal's, the contrastive loss and that of further tokens are there where the model has them. A model without
    experts has no losses of routers.
    """
    assert output.ce is not None, "a training loss needs labels"
    loss = output.ce
    if config.balance == "aux" and config.aux_coef and output.aux["balance"].numel():
        loss = loss + config.aux_coef * output.aux["balance"].sum()
    if config.z_coef and output.aux["z"].numel():
        loss = loss + config.z_coef * output.aux["z"].sum()
    if config.orthogonality_coef and "orthogonality" in output.aux:
        loss = loss + config.orthogonality_coef * output.aux["orthogonality"].sum()
    if config.contrastive_coef and "contrastive" in output.aux:
        loss = loss + config.contrastive_coef * output.aux["contrastive"]
    if config.mtp_coef and "mtp" in output.aux:
        loss = loss + config.mtp_coef * output.aux["mtp"]
    return loss


@torch.no_grad()
def move_bias(model: nn.Module, counts_LE: Tensor, config: BalanceConfig) -> None:
    """Move the selection bias against the loads of a whole step, after its optimizer step; not of frozen routers.

    Args:
        model: the language model, unwrapped.
        counts_LE: assignments of the step, all micro-batches and ranks.
    """
    if config.balance == "bias" and config.bias_step and counts_LE.numel():
        trained_L = torch.tensor([router.weight.requires_grad for router in routers(model)])
        # Where nothing was counted all loads are even, and even loads move nothing.
        update_selection_bias(model, counts_LE * trained_L[:, None].to(counts_LE.device), config.bias_step)
