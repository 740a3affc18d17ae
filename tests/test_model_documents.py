"""Several documents in one sequence: each is read as if it stood alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention_config import ReachConfig
from model.config import ModelConfig
from model.lm import MoELanguageModel
from model.masks import Reach, document_numbers, visible_in_documents

END = 3
LENGTHS = (5, 1, 9, 2)
BASE = ModelConfig(
    vocab_size=31,
    dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
    num_experts=4,
    top_k=2,
    expert_dim=16,
    init_std=0.3,
)
MODELS = {
    "gqa": BASE,
    "eager": replace(BASE, attention_kernel="eager"),
    "mla": replace(BASE, attention="mla", num_kv_heads=None),
    "window": replace(BASE, reach=ReachConfig(window=3)),
    "sinks": replace(BASE, reach=ReachConfig(window=2, sink_tokens=1)),
    "strided": replace(BASE, reach=ReachConfig(sparsity="strided", sparse_block=2)),
    "fixed": replace(BASE, reach=ReachConfig(sparsity="fixed", sparse_block=4)),
}


def documents(seed: int = 0) -> list[Tensor]:
    """Of different lengths, each ended by END, which is nowhere else."""
    torch.manual_seed(seed)
    bodies = [torch.randint(END + 1, BASE.vocab_size, (length,)) for length in LENGTHS]
    return [torch.cat((body, torch.tensor([END]))) for body in bodies]


@pytest.fixture(params=MODELS, ids=str)
def model(request: pytest.FixtureRequest) -> MoELanguageModel:
    torch.manual_seed(1)
    return MoELanguageModel(MODELS[request.param]).double()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_packed_document_gives_what_it_gives_alone(model: MoELanguageModel, recompute: bool) -> None:
    """Losses of every token, experts of every token, and the gradient of all weights."""
    model.model.recompute = recompute
    alone = documents()
    model.separate_documents(END)
    packed_1S = torch.cat(alone)[None]
    together = model(packed_1S, labels_BS=packed_1S)
    (together.ce * packed_1S.numel()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.separate_documents(None)
    losses, counts = [], 0
    for document in alone:
        output = model(document[None], labels_BS=document[None])
        (output.ce * len(document)).backward()
        losses.append(output.token_loss_BS[0])
        counts = counts + output.expert_counts_LE
    torch.testing.assert_close(together.token_loss_BS[0], torch.cat(losses), rtol=1e-5, atol=1e-5)
    assert torch.equal(together.expert_counts_LE, counts)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Angles of rotary positions are float32: further on they round differently.
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_without_the_mask_documents_are_not_alone() -> None:
    torch.manual_seed(1)
    model = MoELanguageModel(BASE)
    packed_1S = torch.cat(documents())[None]
    plain = model(packed_1S, labels_BS=packed_1S).token_loss_BS
    model.separate_documents(END)
    masked = model(packed_1S, labels_BS=packed_1S).token_loss_BS
    first = LENGTHS[0] + 1
    torch.testing.assert_close(plain[0, :first], masked[0, :first])
    assert not torch.allclose(plain[0, first:], masked[0, first:], atol=1e-3)


def test_numbers_given_by_the_caller_are_those_of_the_end_token() -> None:
    torch.manual_seed(1)
    model = MoELanguageModel(BASE)
    packed_1S = torch.cat(documents())[None]
    given = model(packed_1S, document_ids_BS=document_numbers(packed_1S, END)).logits_BSV
    model.separate_documents(END)
    torch.testing.assert_close(model(packed_1S).logits_BSV, given)


def test_the_end_belongs_to_the_document_that_it_ends() -> None:
    ids_BS = torch.tensor([[7, END, END, 8, 9, END, 5]])
    assert document_numbers(ids_BS, END).tolist() == [[0, 0, 1, 2, 2, 2, 3]]


@pytest.mark.parametrize("reach", [Reach(), Reach(window=2), Reach(window=2, sink_tokens=1)], ids=repr)
def test_the_mask_by_the_book(reach: Reach) -> None:
    """Oracle: a loop over pairs, with positions counted inside of each document."""
    documents_BS = torch.tensor([[4, 4, 4, 9, 9, 9, 2], [0, 1, 1, 1, 1, 1, 1]])
    valid_BS = torch.tensor([[True] * 6 + [False], [False, True, True, True, True, True, True]])
    visible = visible_in_documents(reach, documents_BS, valid_BS)
    for b, row in enumerate(documents_BS.tolist()):
        for q in range(7):
            for k in range(7):
                start = row.index(row[q])
                near = reach.window is None or k > q - reach.window or k - start < reach.sink_tokens
                wanted = row[q] == row[k] and k <= q and near and (bool(valid_BS[b, k]) or k == q)
                assert bool(visible[b, 0, q, k]) == wanted, (b, q, k)


def test_what_cannot_be_separated_is_refused() -> None:
    latent = MoELanguageModel(replace(BASE, attention="latent"))
    with pytest.raises(ValueError, match="attention=latent cannot tell documents apart"):
        latent.separate_documents(END)
    with pytest.raises(ValueError, match="not with a cache or attention=latent"):
        latent(torch.tensor([[1, 2]]), document_ids_BS=torch.tensor([[0, 1]]))
