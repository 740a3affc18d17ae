"""The language model: token ids in, logits or losses out.

Module names and tensor layouts are those of Hugging Face (version 5): a Mixtral, OLMoE or Llama checkpoint
loads by `load_state_dict`, and ours loads there. `forward` measures nothing and remembers nothing. What
training needs to know about routing is returned; what a viewer needs passes between modules, for hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.contrastive import ContrastiveHead, info_nce
from model.head import HeadOutput, LMHead
from model.kv_cache import KVCache
from model.latent_attention import starting_std
from model.losses import balance_losses, expert_counts, sequence_balance_losses, z_losses
from model.masks import Reach, document_numbers, visible_in_documents
from model.mtp import MultiTokenPrediction
from model.norm import build_norm
from model.recompute import run_block
from model.rope import RopeTables, rope_tables
from model.router import Routing
from model.router_draws import DrawSource, RouterDraws


class ModelOutput(NamedTuple):
    """What one forward pass says: losses and no logits with labels, logits and no losses without."""

    logits_BSV: Tensor | None
    ce: Tensor | None
    """Scalar, nats: mean cross-entropy over the labels that are not -100. It contains no auxiliary loss."""
    token_loss_BS: Tensor | None
    """float32, nats, detached: loss of predicting `labels_BS` at each position, 0 where the label is -100."""
    aux: dict[str, Tensor]
    """Router losses per MoE layer [L], no coefficients: `balance` (1 is even), `z`, and `orthogonality` where
    the router asks for it; and the scalars `contrastive` with such a head and labels, and `mtp`, nats, mean over
    depths, where the model predicts further tokens, gradients are on and there is no cache. Empty without labels."""
    expert_counts_LE: Tensor
    """int64, detached: valid tokens that chose each expert; rows sum to N * K."""
    correct_BS: Tensor | None = None
    """Bool: whether the label is the most probable token. With labels and without gradients only."""
    passed_on_BSD: Tensor | None = None
    """Of a model that runs a part of its blocks: what those behind begin with. Then there are no logits and no `ce`,
    and what is said of MoE layers is said of its own."""


class DecoderOutput(NamedTuple):
    hidden_BSD: Tensor
    routings: tuple[Routing, ...]
    """One for each MoE layer."""


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: everything below the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        learned = config.block.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_seq_len, config.dim) if learned else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        self.draws = DrawSource(config) if config.router.draws else None
        self.recompute = False
        """Whether training recomputes each block in backward to save its activations."""
        self.span = range(config.num_layers)
        """Blocks that are run here: all, or the stage of a pipeline, whose others are run elsewhere."""
        self.document_end: int | None = None
        """Id of the token after which nothing before it is read; None: sequences are of one piece."""

    def forward(
        self,
        input_ids_BS: Tensor,
        valid_BC: Tensor | None = None,
        cache: KVCache | None = None,
        documents_BS: Tensor | None = None,
        passed_on_BSD: Tensor | None = None,
    ) -> DecoderOutput:
        hidden_BSD = self._embed(input_ids_BS, cache) if passed_on_BSD is None else passed_on_BSD
        readable = self._readable(self.documents(input_ids_BS, documents_BS, cache), valid_BC, cache)
        ropes = self._ropes(input_ids_BS.shape[1], hidden_BSD, cache)
        draws = self._draw(input_ids_BS)
        routings = []
        for index, block in enumerate(self.layers):
            layer_cache = cache.layers[index] if cache is not None else None
            rope = ropes[self.config.reach.is_local(index)]
            chance = next(draws) if self.config.is_moe(index) and draws is not None else None
            if index not in self.span:
                continue
            mask = readable[self.config.reach.is_local(index)]
            hidden_BSD, routing = run_block(
                block, self.recompute, hidden_BSD, rope, valid_BC, layer_cache, chance, mask
            )
            if routing is not None:
                routings.append(routing)
        return DecoderOutput(self.norm(hidden_BSD) if self.ends_here else hidden_BSD, tuple(routings))

    @property
    def ends_here(self) -> bool:
        """Whether the last block is among those that are run here."""
        return self.span.stop == len(self.layers)

    def documents(
        self, input_ids_BS: Tensor, documents_BS: Tensor | None, cache: KVCache | None
    ) -> Tensor | None:
        """The document of each position: as given, or by the token that ends one. None: all is one piece."""
        if documents_BS is None and self.document_end is not None and cache is None:
            return document_numbers(input_ids_BS, self.document_end)
        return documents_BS

    def _embed(self, input_ids_BS: Tensor, cache: KVCache | None) -> Tensor:
        hidden_BSD = self.embed_tokens(input_ids_BS)
        if self.embed_positions is None:
            return hidden_BSD
        start = 0 if cache is None else cache.length
        stop = start + input_ids_BS.shape[1]
        if stop > self.config.max_seq_len:
            raise ValueError(
                f"{stop} tokens exceed max_seq_len={self.config.max_seq_len}, the places that positions=learned knows; "
                "shorten the text, or train with rotary positions"
            )
        return hidden_BSD + self.embed_positions(torch.arange(start, stop, device=input_ids_BS.device))

    def _draw(self, input_ids_BS: Tensor) -> Iterator[RouterDraws] | None:
        """Each MoE layer's random numbers, in training where the config asks for some."""
        if self.draws is None or not self.training:
            return None
        return iter(self.draws(input_ids_BS.numel(), input_ids_BS.device))

    def _readable(
        self, documents_BS: Tensor | None, valid_BC: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What may be read in global layers and in local ones; None: what the core's own rule says."""
        if documents_BS is None:
            return None, None
        if cache is not None or self.config.attention == "latent":
            raise ValueError(
                "documents are told apart in whole sequences read by plain attention, not with a cache or "
                "attention=latent; leave document_ids_BS out"
            )
        reach = self.config.reach
        masks: list[Tensor | None] = [None, None]
        for layer in range(self.config.num_layers):
            local = reach.is_local(layer)
            if masks[local] is None:
                masks[local] = visible_in_documents(Reach.of(reach, layer), documents_BS, valid_BC)
        return masks[0], masks[1]

    def _ropes(self, num_new: int, like: Tensor, cache: KVCache | None) -> tuple[RopeTables, RopeTables]:
        """Angles for layers that read everything, and for local ones; what is cached may need them as well."""
        start, length = (0, num_new) if cache is None else cache.rope_range(num_new)
        total = start + length if cache is None else cache.total_length(num_new)
        everywhere = rope_tables(self.config, start, length, like, total_length=total)
        if self.config.rope.local_rope_base is None:
            return everywhere, everywhere
        return everywhere, rope_tables(self.config, start, length, like, local=True)


class MoELanguageModel(nn.Module):
    """A decoder-only Mixture-of-Experts language model, built and initialised from its config."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = LMHead(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        width = config.heads.contrastive_width
        self.contrastive = ContrastiveHead(config.dim, width) if width else None
        with torch.random.fork_rng(devices=[]):  # a seed begins the rest alike with these and without
            self.mtp = MultiTokenPrediction(config) if config.heads.mtp_depth else None
        self.init_weights()

    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        *,
        attention_mask_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        cache: KVCache | None = None,
        counts_so_far_LE: Tensor | None = None,
        sequence_labels_B: Tensor | None = None,
        logits_to_keep: int | None = None,
        passed_on_BSD: Tensor | None = None,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids_BS: int64 token ids.
            labels_BS: int64. The target *of* each position, not shifted here: `labels[b, s]` is the token
                that follows `input_ids[b, s]`; -100 is ignored. With labels the result has losses and no
                logits.
            attention_mask_BS: True or 1 for a token, False or 0 for padding (left or right). With a cache
                it covers the cached positions as well. Padding is excluded from router losses and counts;
                give it the label -100 to exclude it from the cross-entropy too.
            document_ids_BS: int64. Positions of one number, side by side, are one document: tokens read their own
                only, and it is as if each stood alone. None: what `separate_documents` says.
            cache: keys and values of earlier tokens, to which these are added.
            counts_so_far_LE: assignments of the same step's other micro-batches and ranks, as far as known;
                with router.balance_scope=global the balance loss evens out their sum with these.
            sequence_labels_B: int64, for the contrastive head: sequences of one label, for example a domain, belong
                together; -1 belongs to nothing. None: no loss.
            logits_to_keep: without labels, logits of the last positions only: text needs one. None: of all.
            passed_on_BSD: what the blocks before those of `model.span` made of these ids; None: begin with them.
        """
        valid_BC = attention_mask_BS.bool() if attention_mask_BS is not None else None
        hidden_BSD, routings = self.model(input_ids_BS, valid_BC, cache, document_ids_BS, passed_on_BSD)
        read_BSD = hidden_BSD
        if labels_BS is None and logits_to_keep is not None:
            read_BSD = hidden_BSD[:, -logits_to_keep:]
        ends = self.model.ends_here
        head = self.lm_head(read_BSD, labels_BS) if ends else HeadOutput(None, None, None, None)
        valid_T = valid_BC[:, -input_ids_BS.shape[1] :].flatten() if valid_BC is not None else None
        counts_LE = self._counts(routings, valid_T, input_ids_BS.device)
        aux: dict[str, Tensor] = {}
        if labels_BS is not None:
            aux = self._aux(routings, counts_LE, valid_T, len(input_ids_BS), counts_so_far_LE)
            if ends and self.contrastive is not None and sequence_labels_B is not None:
                aux["contrastive"] = self._contrast(hidden_BSD, valid_T, sequence_labels_B)
            if ends and self.mtp is not None and cache is None and torch.is_grad_enabled():
                documents_BS = self.model.documents(input_ids_BS, document_ids_BS, cache)
                aux["mtp"] = self._predict_further(
                    hidden_BSD, input_ids_BS, labels_BS, valid_BC, documents_BS
                )
        logits_BSV, ce, token_loss_BS, correct_BS = head
        passed_on_BSD = None if ends else hidden_BSD
        return ModelOutput(logits_BSV, ce, token_loss_BS, aux, counts_LE, correct_BS, passed_on_BSD)

    def _contrast(self, hidden_BSD: Tensor, valid_T: Tensor | None, labels_B: Tensor) -> Tensor:
        assert self.contrastive is not None
        heads = self.config.heads
        valid_BS = None if valid_T is None else valid_T.view(hidden_BSD.shape[:2])
        vectors_BP = self.contrastive(hidden_BSD, valid_BS)
        temperature, hard = heads.contrastive_temperature, heads.hard_negatives
        return info_nce(vectors_BP, labels_B, temperature=temperature, hard_negatives=hard)

    def _predict_further(
        self,
        hidden_BSD: Tensor,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        valid_BS: Tensor | None,
        documents_BS: Tensor | None,
    ) -> Tensor:
        assert self.mtp is not None
        losses_K = self.mtp.losses(
            hidden_BSD,
            input_ids_BS,
            labels_BS,
            embed=self.model.embed_tokens,
            cross_entropy=lambda hidden, labels: self.lm_head(hidden, labels).ce,
            valid_BS=valid_BS,
            documents_BS=documents_BS,
        )
        return losses_K.mean()

    def _counts(self, routings: Sequence[Routing], valid_T: Tensor | None, device: torch.device) -> Tensor:
        if not routings:
            return torch.zeros(0, self.config.num_experts, dtype=torch.int64, device=device)
        return expert_counts(routings, valid_T)

    def _aux(
        self,
        routings: Sequence[Routing],
        counts_LE: Tensor,
        valid_T: Tensor | None,
        batch_size: int,
        counts_so_far_LE: Tensor | None,
    ) -> dict[str, Tensor]:
        if not routings:
            none = torch.zeros(0, device=counts_LE.device)
            return {"balance": none, "z": none}
        router = self.config.router
        logits_LTE = torch.stack([routing.logits_TE for routing in routings])
        if router.balance_scope == "sequence":
            balance = sequence_balance_losses(router, logits_LTE, routings, batch_size, valid_T)
        else:
            if router.balance_scope == "global" and counts_so_far_LE is not None:
                counts_LE = counts_LE + counts_so_far_LE
            balance = balance_losses(router, logits_LTE, counts_LE, valid_T)
        aux = {"balance": balance, "z": z_losses(logits_LTE, valid_T)}
        orthogonal = [each.orthogonality for each in routings if each.orthogonality is not None]
        return {**aux, "orthogonality": torch.stack(orthogonal)} if orthogonal else aux

    def separate_documents(self, end_id: int | None) -> None:
        """From now on the token `end_id` ends a document, in every call without a cache; None: it does not.

        Raises ValueError for attention=latent, whose latents have read all documents before.
        """
        if end_id is not None and self.config.attention == "latent":
            raise ValueError(
                "attention=latent cannot tell documents apart; use another attention, or no mask"
            )
        self.model.document_end = end_id

    def gradient_checkpointing_enable(self) -> None:
        """Keep one activation per block and recompute the rest in backward: less memory, more time."""
        self._recompute(True)

    def gradient_checkpointing_disable(self) -> None:
        self._recompute(False)

    def _recompute(self, on: bool) -> None:
        for part in (self.model, *(self.mtp or ())):
            part.recompute = on

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights from N(0, init_std^2), those that write into the residual stream from a narrower
        one.

        There are 2 * num_layers such writes, and their variances add up: GPT-2's factor 1 / sqrt(2 *
        num_layers) keeps the stream's scale independent of depth. Norms start at 1, biases at 0, latents apart.
        """
        std = self.config.init_std
        residual_std = std / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("self_attn.latents"):
                parameter.normal_(0.0, starting_std(self.config))
            else:
                writes = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
                parameter.normal_(0.0, residual_std if writes else std)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype
