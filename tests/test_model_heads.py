"""The contrastive loss is the published formula, written as a loop, and trains sequences of one label together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.contrastive import ContrastiveHead, info_nce
from model.head_config import HeadConfig
from model.lm import MoELanguageModel


def _loop(vectors_BP: Tensor, labels: list[int], temperature: float, hard: int | None) -> float:
    """Equation 2 of arXiv:2004.11362, one anchor at a time."""
    unit = [vector / vector.norm() for vector in vectors_BP]
    losses = []
    for i, label in enumerate(labels):
        scores = {j: float(unit[i] @ unit[j]) / temperature for j in range(len(labels)) if j != i}
        positives = [j for j in scores if label >= 0 and labels[j] == label]
        negatives = sorted((j for j in scores if j not in positives), key=lambda j: -scores[j])[:hard]
        if positives:
            total = sum(math.exp(scores[j]) for j in (*positives, *negatives))
            losses.append(-sum(math.log(math.exp(scores[p]) / total) for p in positives) / len(positives))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("hard", [None, 1, 3])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(
    "labels",
    [[0, 0, 1, 1, 1, 2, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7], [3] * 8, [0, 0, 1, 1, 2, 2, 3, 3]],
    ids=str,
)
def test_loss_is_the_published_formula(labels: list[int], temperature: float, hard: int | None) -> None:
    vectors_BP = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = info_nce(vectors_BP, torch.tensor(labels), temperature=temperature, hard_negatives=hard)
    assert float(loss) == pytest.approx(_loop(vectors_BP, labels, temperature, hard))


def test_gradients_are_those_of_the_formula_also_without_positives() -> None:
    vectors_BP = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    labels_B = torch.tensor([0, 0, 1, 1, 1, -1])
    assert torch.autograd.gradcheck(lambda v: info_nce(v, labels_B), (vectors_BP,))
    info_nce(vectors_BP, torch.arange(6)).backward()
    assert vectors_BP.grad is not None
    assert not bool(vectors_BP.grad.any())


def test_equal_vectors_cost_the_logarithm_of_the_others() -> None:
    loss = info_nce(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(math.log(4)))


def test_padding_does_not_reach_the_vector() -> None:
    head = ContrastiveHead(6, 3)
    hidden_BSD = torch.randn(2, 7, 6)
    valid_BS = torch.ones(2, 7, dtype=torch.bool)
    valid_BS[0, :3] = False
    torch.testing.assert_close(head(hidden_BSD, valid_BS)[:1], head(hidden_BSD[:1, 3:]))
    torch.testing.assert_close(head(hidden_BSD, valid_BS)[1:], head(hidden_BSD[1:]))


def test_training_brings_sequences_of_one_label_together() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=20,
        dim=16,
        num_layers=1,
        num_heads=2,
        num_experts=2,
        expert_dim=8,
        heads=HeadConfig(contrastive_width=4),
    )
    model = MoELanguageModel(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    ids_BS, labels_B = torch.randint(20, (8, 6)), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        aux = model(ids_BS, ids_BS, sequence_labels_B=labels_B).aux
        aux["contrastive"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(aux["contrastive"]))
    assert losses[-1] < 0.8 * losses[0]
    assert "contrastive" not in model(ids_BS, ids_BS).aux


@pytest.mark.parametrize(
    "values", [{"contrastive_width": -1}, {"contrastive_temperature": 0.0}, {"hard_negatives": 0}], ids=str
)
def test_refusals(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}=.*;"):
        HeadConfig(**values)
