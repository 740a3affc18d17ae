"""The fused cross-entropy is F.cross_entropy of the logits, in values and gradients, chunk by chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.head
from model.head import IGNORE, LMHead, linear_cross_entropy

TOKENS, WIDTH, VOCAB = 13, 6, 29


@pytest.fixture(params=[1, 4 * VOCAB, 13 * VOCAB, 1 << 20], ids=["1 row", "4 rows", "all rows", "default"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.head, "_CHUNK_LOGITS_CPU", request.param)


def _operands(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = (torch.randn(TOKENS, WIDTH, generator=generator) * scale).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels_T[[0, 5, 12]] = IGNORE
    return hidden_TD, weight_VD, labels_T


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_cross_entropy_of_logits(dtype: torch.dtype, scale: float) -> None:
    hidden_TD, weight_VD, labels_T = _operands(dtype, scale)
    ce, token_loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, labels_T)
    logits_TV = hidden_TD @ weight_VD.t()
    expected = F.cross_entropy(logits_TV, labels_T)
    torch.testing.assert_close(ce, expected)
    torch.testing.assert_close(token_loss_T, F.cross_entropy(logits_TV, labels_T, reduction="none"))
    assert not token_loss_T.requires_grad
    for ours, theirs in zip(
        torch.autograd.grad(3 * ce, (hidden_TD, weight_VD)),
        torch.autograd.grad(3 * expected, (hidden_TD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("chunk")
def test_gradcheck() -> None:
    hidden_TD, weight_VD, labels_T = _operands(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels_T)[0], (hidden_TD, weight_VD)
    )


def test_bfloat16_stays_near_float32_and_reports_float32() -> None:
    hidden_TD, weight_VD, labels_T = _operands(torch.bfloat16)
    ce, token_loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, labels_T)
    assert ce.dtype == token_loss_T.dtype == torch.float32
    exact = F.cross_entropy(hidden_TD.double() @ weight_VD.double().t(), labels_T)
    torch.testing.assert_close(ce.double(), exact, rtol=1e-2, atol=0)
    ours, theirs = torch.autograd.grad(ce, weight_VD)[0], torch.autograd.grad(exact, weight_VD)[0]
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-3)


def test_nothing_to_predict_costs_nothing() -> None:
    hidden_TD, weight_VD, labels_T = _operands(torch.float32)
    ce, token_loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, torch.full_like(labels_T, IGNORE))
    ce.backward()
    assert ce.item() == 0
    assert not bool(token_loss_T.any())
    assert hidden_TD.grad is not None
    assert not bool(hidden_TD.grad.any())


def test_without_gradients_the_values_are_the_same() -> None:
    hidden_TD, weight_VD, labels_T = _operands(torch.float32)
    with_grad = linear_cross_entropy(hidden_TD, weight_VD, labels_T)[0]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden_TD, weight_VD, labels_T)[0], with_grad)


def test_autocast_multiplies_in_its_own_dtype() -> None:
    head = LMHead(WIDTH, VOCAB)
    hidden_BSD = torch.randn(2, 5, WIDTH)
    labels_BS = torch.randint(VOCAB, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ce = head(hidden_BSD, labels_BS).ce
    expected, _, _ = linear_cross_entropy(
        hidden_BSD.flatten(0, 1).bfloat16(), head.weight.bfloat16(), labels_BS.flatten()
    )
    assert torch.equal(ce, expected)


def test_the_custom_op_keeps_torch_s_rules() -> None:
    hidden_TD, weight_VD, labels_T = _operands(torch.float32)
    torch.library.opcheck(model.head._fused_cross_entropy, (hidden_TD, weight_VD, labels_T, True))
    with torch.no_grad():
        torch.library.opcheck(
            model.head._fused_cross_entropy, (hidden_TD.detach(), weight_VD.detach(), labels_T, False)
        )


@pytest.mark.usefixtures("chunk")
def test_correct_is_where_the_largest_logit_is_the_label() -> None:
    hidden_TD, weight_VD, labels_T = _operands(torch.float32)
    best_T = (hidden_TD @ weight_VD.t()).argmax(dim=-1)
    labels_T[1:4] = best_T[1:4]
    with torch.no_grad():
        correct_T = linear_cross_entropy(hidden_TD, weight_VD, labels_T).correct_T
    assert correct_T is not None
    assert torch.equal(correct_T, best_T == labels_T)
    assert correct_T[1:4].all()
    assert not correct_T[labels_T == IGNORE].any()
    assert linear_cross_entropy(hidden_TD, weight_VD, labels_T).correct_T is None


def test_logits_come_from_the_columns_while_they_are_there() -> None:
    torch.manual_seed(0)
    head, hidden_BSD = LMHead(6, 9), torch.randn(1, 1, 6)
    plain_BSV = head(hidden_BSD).logits_BSV
    with head.by_columns(head.columns()):
        torch.testing.assert_close(head(hidden_BSD).logits_BSV, plain_BSV)
    with head.by_columns(2 * head.columns()):  # others than the weight's: these are read, and no other
        torch.testing.assert_close(head(hidden_BSD).logits_BSV, 2 * plain_BSV)
    assert torch.equal(head(hidden_BSD).logits_BSV, plain_BSV)
