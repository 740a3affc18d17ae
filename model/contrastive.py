"""A contrastive head: sequences that belong together get near vectors, others far ones (InfoNCE).

An auxiliary training loss beside the cross-entropy. Each sequence becomes one unit vector, the projected mean
of its tokens. Which others are its positives is the caller's to say by labels (supervised, for example the
domain of a text: arXiv:2004.11362) or by views (two halves of one document carry the same label). Everything
else in the batch is a negative; the hardest ones can be taken alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.precision import at_least_float32


def info_nce(
    vectors_BP: Tensor, labels_B: Tensor, *, temperature: float = 0.1, hard_negatives: int | None = None
) -> Tensor:
    """InfoNCE with several positives, scalar, nats (Khosla et al. 2020, arXiv:2004.11362, equation 2).

    For an anchor i with positives P(i): -mean over p in P(i) of log(exp(s_ip) / (sum of exp over all others)),
    s = cosine / temperature; mean over anchors that have a positive, 0 if none has. With n anchors of one label
    and all vectors equal it is log(B - 1).

    Args:
        vectors_BP: one vector for each sequence; its length does not matter.
        labels_B: int64; equal labels are positives of each other, -1 is nobody's positive.
        temperature: what cosines are divided by.
        hard_negatives: only the so many most similar negatives of an anchor. None: all.

    Raises ValueError for a temperature or a number of negatives that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not positive; 0.1 is usual")
    if hard_negatives is not None and hard_negatives < 1:
        raise ValueError(f"hard_negatives={hard_negatives} is below 1; None takes all")
    unit_BP = F.normalize(at_least_float32(vectors_BP), dim=-1)
    scores_BB = unit_BP @ unit_BP.t() / temperature
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    known_B = labels_B >= 0
    positive_BB = (labels_B[:, None] == labels_B) & ~itself_BB & known_B[:, None]
    hidden_BB = itself_BB
    if hard_negatives is not None:
        hidden_BB = hidden_BB | _easy(scores_BB, positive_BB | itself_BB, hard_negatives)
    log_probs_BB = scores_BB - scores_BB.masked_fill(hidden_BB, float("-inf")).logsumexp(dim=1, keepdim=True)
    num_positive_B = positive_BB.sum(dim=1)
    losses_B = -(log_probs_BB.masked_fill(~positive_BB, 0).sum(dim=1)) / num_positive_B.clamp_min(1)
    anchors_B = num_positive_B > 0
    return losses_B.masked_fill(~anchors_B, 0).sum() / anchors_B.sum().clamp_min(1)


def _easy(scores_BB: Tensor, kin_BB: Tensor, hard_negatives: int) -> Tensor:
    """bool [B, B]: negatives that are not among an anchor's most similar ones."""
    rivals_BB = scores_BB.detach().masked_fill(kin_BB, float("-inf"))
    hardest = rivals_BB.topk(min(hard_negatives, len(rivals_BB)), dim=1).indices
    return torch.ones_like(kin_BB).scatter(1, hardest, False) & ~kin_BB


class ContrastiveHead(nn.Module):
    """Hidden states of a sequence -> one vector, by a two-layer projection of their mean."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, width, bias=False)

    def forward(self, hidden_BSD: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """[B, width]; padding is left out of the mean."""
        if valid_BS is None:
            mean_BD = hidden_BSD.mean(dim=1)
        else:
            weights_BS = valid_BS.to(hidden_BSD.dtype)
            total_BD = torch.einsum("bsd,bs->bd", hidden_BSD, weights_BS)
            mean_BD = total_BD / weights_BS.sum(dim=1, keepdim=True).clamp_min(1)
        return self.out_proj(F.silu(self.in_proj(mean_BD)))
