"""Attention in two stages: learned latents read the past, queries read the latents and what is near.

The sequence is cut into chunks. Stage 1 (`LatentRead`): M learned latents of each key head read all tokens
of closed chunks, a softmax over the whole past each. Stage 2 (`LatentCore`): a query reads those M means and
the keys of its own chunk up to itself, in one softmax. So nothing is read before its time, a token costs
the same at any length, and a cache is the latents and one open chunk. Non-causal ancestors: Set Transformer's
inducing points (arXiv:1810.00825) and Luna (arXiv:2106.01540).

Without chunks each latent would be a running mean of the whole past, exact at every position. That costs
more than plain attention (2,048 positions, 4 heads, one core, forward and backward: 312 ms as cumulative sums,
164 ms plain, 29 ms in chunks of 64) and reads no token exactly: after 300 steps on source code a small model
stood at 2.67 nats a byte, against 2.28 with plain attention and 2.24 in chunks of 16 or 32.

Latents begin far enough apart that their scores differ (`starting_std`). At the 0.02 of all other weights they begin
as copies, and their gradients keep them so: after 240 steps the weights of two latents had a cosine of 1.00, against
0.26 to 0.42, and the validation loss of three seeds was 0.04 and 0.07 nats a token higher and 0.02 lower.

Positions count from the start of a chunk: in it distances are exact, and latents, read without position,
stand at its start. N counts chunks, M latents, W positions of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention
from model.attention_core import AttentionCore
from model.config import ModelConfig
from model.kv_latents import NOTHING_READ, LatentCache, LatentState
from model.precision import at_least_float32
from model.rope import RopeTables, rotate

_START_SPREAD = 0.75
"""Standard deviation of a latent's scores at the start. About half and twice of it learned less in the one seed that
was tried, 3.773 and 3.781 nats a token against 3.738 (demo-slots in 2 layers of width 96, 240 steps)."""


def starting_std(config: ModelConfig) -> float:
    """Standard deviation of new latents: scores on keys of normalised input then spread by `_START_SPREAD`.

    Two latents' weights on the past have then a cosine of exp(-0.75^2) = 0.57.
    """
    key_std = 1.0 if config.qk_norm != "none" else config.init_std * config.dim**0.5
    return _START_SPREAD / key_std


class LatentRead(nn.Module):
    """Stage 1: what the latents have read before each chunk.

    A hook sees latents, keys and values. The weights of stage 1 before chunk n are the softmax of
    `latents k^T * softmax_scale` over the valid keys of positions below n * chunk; with a `before` these
    weights share their sum with it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale
        self.chunk = config.latents.latent_chunk

    def forward(
        self,
        latents_GMD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        valid_BC: Tensor | None = None,
        before: LatentState | None = None,
    ) -> LatentState:
        """States before chunk 0, 1, ... N, [B, G, N + 1, M, ...]; the last has read every closed chunk.

        N counts closed chunks. Keys come without position; the first stands at the start of a chunk.
        """
        closed = k_BGCD.shape[2] // self.chunk * self.chunk
        k_BGNWD, v_BGNWD = (x[:, :, :closed].unflatten(2, (-1, self.chunk)) for x in (k_BGCD, v_BGCD))
        scores = at_least_float32(torch.einsum("gmd,bgnwd->bgnmw", latents_GMD, k_BGNWD)) * self.softmax_scale
        if valid_BC is not None:
            valid = valid_BC[:, :closed].unflatten(1, (-1, self.chunk))[:, None, :, None]
            scores = scores.masked_fill(~valid, NOTHING_READ)
        lse_BGNM = scores.logsumexp(dim=-1)
        weights = (scores - lse_BGNM[..., None]).exp().to(v_BGNWD.dtype)
        first = _nothing(k_BGCD, latents_GMD) if before is None else before
        return _accumulate(first, weights @ k_BGNWD, weights @ v_BGNWD, lse_BGNM)


def _nothing(k_BGCD: Tensor, latents_GMD: Tensor) -> LatentState:
    batch, (heads, latents, width) = len(k_BGCD), latents_GMD.shape
    mean = k_BGCD.new_zeros(batch, heads, latents, width)
    lse_BGM = at_least_float32(mean).new_full((batch, heads, latents), NOTHING_READ)
    return LatentState(mean, mean, lse_BGM)


def _accumulate(first: LatentState, k_BGNMD: Tensor, v_BGNMD: Tensor, lse_BGNM: Tensor) -> LatentState:
    """Merge each chunk's means into all before it: exact, as every share exp(lse_j - lse_total) is at most 1."""
    lse = torch.cat((first.lse_BGM[:, :, None].to(lse_BGNM.dtype), lse_BGNM), dim=2)
    total = torch.logcumsumexp(lse, dim=2)
    shares = total.transpose(2, 3)[..., None].neg() + lse.transpose(2, 3)[..., None, :]  # [B, G, M, N+1, N+1]
    steps = torch.arange(lse.shape[2], device=lse.device)
    shares = shares.masked_fill(steps > steps[:, None], float("-inf")).exp().to(k_BGNMD.dtype)

    def merged(start_BGMD: Tensor, x_BGNMD: Tensor) -> Tensor:
        x = torch.cat((start_BGMD[:, :, None].to(x_BGNMD.dtype), x_BGNMD), dim=2)
        return (shares @ x.transpose(2, 3)).transpose(2, 3)

    return LatentState(merged(first.k_BGMD, k_BGNMD), merged(first.v_BGMD, v_BGNMD), total)


class LatentCore(AttentionCore):
    """Stage 2. Its keys are N * M latents (M for each chunk it is called with), then C - N * M tokens.

    `visible_keys` says which of them a query reads; only those are computed.
    """

    causal = False
    exchangeable = False

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.chunk, self.num_latents = config.latents.latent_chunk, config.latents.num_latents

    def num_chunks(self, num_keys: int) -> int:
        """Chunks of a call with `num_keys` keys, the last one perhaps open."""
        return -(-num_keys // (self.chunk + self.num_latents))

    def visible_keys(
        self, num_queries: int, num_keys: int, mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """A query reads the latents of its own chunk's block, and its chunk's tokens up to itself."""
        latents = self.num_chunks(num_keys) * self.num_latents
        tokens = num_keys - latents
        query_S1 = torch.arange(tokens - num_queries, tokens, device=device)[:, None]
        token_C, latent_C = torch.arange(tokens, device=device), torch.arange(latents, device=device)
        own_chunk = query_S1 // self.chunk
        near = (token_C // self.chunk == own_chunk) & (token_C <= query_S1)
        visible = torch.cat((latent_C // self.num_latents == own_chunk, near), dim=-1)[None, None]
        if mask is None:
            return visible
        own = F.pad(token_C == query_S1, (latents, 0))
        return visible & (mask[:, None, None] | own)

    def forward(
        self,
        q_BHSD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        mask: Tensor | None = None,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Returns [B, H, S, D]. `mask` is False at padding tokens and at latents that have read nothing."""
        if self.num_chunks(k_BGCD.shape[2]) == 1:
            visible = self.visible_keys(q_BHSD.shape[2], k_BGCD.shape[2], mask, q_BHSD.device)
            return self._attend(q_BHSD, k_BGCD, v_BGCD, visible)
        return self._by_chunk(q_BHSD, k_BGCD, v_BGCD, mask)

    def _attend(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, visible: Tensor) -> Tensor:
        gqa = q_BHSD.shape[1] != k_BGCD.shape[1]
        return F.scaled_dot_product_attention(
            q_BHSD, k_BGCD, v_BGCD, attn_mask=visible, scale=self.softmax_scale, enable_gqa=gqa
        )

    def _by_chunk(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, mask: Tensor | None) -> Tensor:
        """One small attention for each chunk, all in one call with chunks in the place of sequences."""
        chunks, queries = self.num_chunks(k_BGCD.shape[2]), q_BHSD.shape[2]
        tokens = k_BGCD.shape[2] - chunks * self.num_latents
        spare = chunks * self.chunk - tokens
        q_blocks = self._blocks(F.pad(q_BHSD, (0, 0, tokens - queries, spare)))
        k_blocks, v_blocks = (self._key_blocks(x, chunks, spare) for x in (k_BGCD, v_BGCD))
        valid = (
            torch.ones(1, k_BGCD.shape[2], dtype=torch.bool, device=q_BHSD.device) if mask is None else mask
        )
        valid = valid.expand(len(q_BHSD), -1)
        valid_blocks = self._key_blocks(valid[:, None, :, None], chunks, spare)[:, :, :, 0]
        step = torch.arange(self.chunk, device=q_BHSD.device)
        causal = F.pad(step <= step[:, None], (self.num_latents, 0), value=True)
        own = F.pad(step == step[:, None], (self.num_latents, 0))
        out = self._attend(q_blocks, k_blocks, v_blocks, causal & (valid_blocks[:, :, None] | own))
        out_BHSD = out.unflatten(0, (-1, chunks)).transpose(1, 2).flatten(2, 3)
        return out_BHSD[:, :, tokens - queries : tokens]

    def _blocks(self, x_BHSD: Tensor) -> Tensor:
        """[B, H, N * W, D] -> [B * N, H, W, D]."""
        return x_BHSD.unflatten(2, (-1, self.chunk)).transpose(1, 2).flatten(0, 1)

    def _key_blocks(self, x_BGCD: Tensor, chunks: int, spare: int) -> Tensor:
        """[B, G, N * M + tokens, D] -> [B * N, G, M + W, D], the last chunk filled up."""
        latents, tokens = x_BGCD.split(
            (chunks * self.num_latents, x_BGCD.shape[2] - chunks * self.num_latents), 2
        )
        near = F.pad(tokens, (0, 0, 0, spare)).unflatten(2, (-1, self.chunk))
        blocks = torch.cat((latents.unflatten(2, (chunks, -1)), near), dim=3)
        return blocks.transpose(1, 2).flatten(0, 1)


class LatentAttention(Attention):
    """Grouped-query attention whose past is M latents; Llama's parameter names, and `latents` [G, M, D]."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.latents = nn.Parameter(
            torch.zeros(config.kv_heads, config.latents.num_latents, config.head_width)
        )
        self.read = LatentRead(config)
        self.core: AttentionCore = LatentCore(config, layer)

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        valid_BC: Tensor | None = None,
        cache: LatentCache | None = None,  # type: ignore[override]
    ) -> Tensor:
        """`rope` begins at the start of the chunk in which the S new positions begin."""
        q_BHSD, k_BGSD = self._queries_and_keys(x_BSD)
        q_BHSD = rotate(q_BHSD, rope.last(x_BSD.shape[1]), self.rope_pairs)
        v_BGSD = self._split(self.v_proj(x_BSD))
        before = None
        if cache is not None:
            before = cache.state
            k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
        tokens = k_BGSD.shape[2]
        valid_BT = valid_BC[:, -tokens:] if valid_BC is not None else None
        states = self.read(self.latents.to(k_BGSD.dtype), k_BGSD, v_BGSD, valid_BT, before)
        if cache is not None:
            cache.close(k_BGSD, v_BGSD, LatentState(*(x[:, :, -1] for x in states)))
        chunks = -(-tokens // self.read.chunk)
        k_BGND, v_BGND, lse_BGN = (x[:, :, :chunks].flatten(2, 3) for x in states)
        keys = torch.cat((k_BGND.to(k_BGSD.dtype), rotate(k_BGSD, rope, self.rope_pairs)), dim=2)
        values = torch.cat((v_BGND.to(v_BGSD.dtype), v_BGSD), dim=2)
        has_read_BN = lse_BGN[:, 0] > NOTHING_READ / 2
        near_BT = has_read_BN.new_ones(len(x_BSD), tokens) if valid_BT is None else valid_BT
        heads_BHSD = self.core(q_BHSD, keys, values, torch.cat((has_read_BN, near_BT), dim=1))
        return self.o_proj(heads_BHSD.transpose(1, 2).flatten(2))
