"""Floating point operations of one token, by formula; a multiplication and an addition are two.

Counted are matrix products: every weight that a token passes through, and scores and sums of attention over
the keys that a query may read on average. Norms, activations, softmax and the sorting of tokens are left
out, as is usual; they are a few percent. A backward pass is two forward passes.
"""

from __future__ import annotations

from model.config import ModelConfig


def forward_flops(config: ModelConfig, seq_len: int | None = None) -> float:
    """FLOPs of one token's forward pass, mean over a sequence of `seq_len` (default: max_seq_len)."""
    return 2 * matmul_parameters(config) + attention_flops(config, seq_len or config.max_seq_len)


def training_flops(config: ModelConfig, seq_len: int | None = None) -> float:
    """FLOPs of one token's forward and backward pass, that of modules for further tokens included."""
    return 3 * (forward_flops(config, seq_len) + mtp_flops(config, seq_len))


def mtp_flops(config: ModelConfig, seq_len: int | None = None) -> float:
    """FLOPs a token of the forward pass through modules that predict further tokens; 0 without.

    The module of depth k works on all but k positions of a sequence; each has the output matrix to itself.
    """
    length = seq_len or config.max_seq_len
    vectors = config._attention_parameters() - _attention_matrices(config)
    vectors += 5 * _norm(config) + _dense_biases(config)
    depth = config.heads.mtp_depth
    matrices = config.num_mtp_parameters() // max(depth, 1) - vectors + config.vocab_size * config.dim
    total = 0.0
    for cut in range(1, min(depth, length - 1) + 1):
        attention = _layer_attention_flops(config, config.num_layers - 1, length - cut)
        total += (2 * matrices + attention) * (length - cut) / length
    return total


def matmul_parameters(config: ModelConfig) -> int:
    """Active parameters that are multiplied: the output matrix is, looking an embedding up is not."""
    unused = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return config.num_active_parameters() - unused - _vectors(config)


def _vectors(config: ModelConfig) -> int:
    """Active parameters that are added or scale: norms, biases, sinks; and learned latents."""
    attention = config._attention_parameters() - _attention_matrices(config)
    biases = config.num_experts * config.router.router_bias
    if config.experts.expert_bias:
        biases += config.top_k * (config.experts.inward_matrices * config.expert_dim + config.dim)
    layers = config.num_layers * (2 * _norm(config) + attention) + config.num_moe_layers * biases
    layers += (config.num_layers - config.num_moe_layers) * _dense_biases(config)
    places = config.max_seq_len * config.dim if config.block.positions == "learned" else 0
    return layers + _norm(config) + places


def _norm(config: ModelConfig) -> int:
    return config.dim * (2 if config.block.norm == "layer" else 1)


def _dense_biases(config: ModelConfig) -> int:
    return config.dense_dim + config.dim if config.block.dense_layer == "gelu" else 0


def _attention_matrices(config: ModelConfig) -> int:
    heads, mla = config.num_heads, config.mla
    if config.attention != "mla":
        return 2 * config.dim * config.head_width * (heads + config.kv_heads)
    q_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    queries = config.dim * q_width
    if mla.q_lora_rank is not None:
        queries = mla.q_lora_rank * (config.dim + q_width)
    down = config.dim * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + down + up + heads * mla.v_head_dim * config.dim


def attention_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of scores and weighted sums, all layers, mean over the positions of a sequence."""
    return sum(_layer_attention_flops(config, layer, seq_len) for layer in range(config.num_layers))


def _layer_attention_flops(config: ModelConfig, layer: int, seq_len: int) -> float:
    heads = config.num_heads
    if config.attention == "mla":
        pair = 2 * heads * (config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim + config.mla.v_head_dim)
    else:
        pair = 4 * heads * config.head_width
    if config.attention == "latent":
        return _latent_flops(config, seq_len) + pair * (
            _mean_near(config, seq_len) + config.latents.num_latents
        )
    return pair * mean_keys(config, layer, seq_len)


def _latent_flops(config: ModelConfig, seq_len: int) -> float:
    """What latents read, a token: scores and means of keys and values of its chunk, and sums of the chunks' means.

    Chunk n is merged with the n before it and with what was read before the first.
    """
    latents, chunks = config.latents, seq_len // config.latents.latent_chunk
    width = latents.num_latents * config.kv_heads * config.head_width
    merged = (chunks + 1) * (chunks + 2) / 2
    return width * (6 * chunks * latents.latent_chunk + 4 * merged) / seq_len


def _mean_near(config: ModelConfig, seq_len: int) -> float:
    """Tokens of its own chunk that a query may read, mean over positions."""
    chunk = config.latents.latent_chunk
    chunks, rest = divmod(seq_len, chunk)
    return (chunks * chunk * (chunk + 1) + rest * (rest + 1)) / (2 * seq_len)


def mean_keys(config: ModelConfig, layer: int, seq_len: int) -> float:
    """Keys that a query of layer `layer` may read, mean over positions; a sparse pattern counts as full."""
    if not config.reach.is_local(layer):
        return (seq_len + 1) / 2
    window = config.reach.window
    assert window is not None
    reach = min(window + config.reach.sink_tokens, seq_len)
    return (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len
