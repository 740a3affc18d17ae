"""Text from a model, one token for each sequence of a batch at a time, with a key/value cache.

`stream` is the whole algorithm, an iterator; `generate` collects it. Random numbers come from a generator of
their own, so that sampling in the middle of a training run changes nothing in that run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from model.config import ModelConfig
from model.endings import Decode, Endings
from model.few_rows import compiling_few_rows
from model.kv_cache import KVCache
from model.lm import MoELanguageModel
from model.sampling import Sampling, sample
from model.speculative import Drafts, Text, check_drafts, speculate

__all__ = ["Decode", "Drafts", "NonCausalWarning", "Sampling", "before_stop", "generate", "sample", "stream"]


_FEWEST_SLOTS = 128
"""Of a compiled step's cache."""


class NonCausalWarning(UserWarning):
    """Text is drawn from a model that saw later tokens when it was trained."""


def stream(
    model: MoELanguageModel,
    prompt_ids_BS: Tensor,
    sampling: Sampling | None = None,
    *,
    attention_mask_BS: Tensor | None = None,
    decode: Decode | None = None,
    cache: KVCache | None = None,
    prefill_chunk: int | None = None,
    drafts: Drafts | None = None,
    compile: bool = False,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 [B], until all have ended or nothing more is allowed.

    A sequence that has ended goes on yielding `eos_id`, or 0 where there is none. The model is put into
    evaluation mode for each step and back afterwards.

    Args:
        model: what is sampled from.
        prompt_ids_BS: int64. Prompts of different lengths are padded on the left.
        sampling: how tokens are chosen and when a text ends.
        attention_mask_BS: 0 at padding.
        decode: turns ids into text, for `sampling.stop`.
        cache: where keys and values go, for example an int8 or a forgetting one; what it has read already
            comes before the prompt. None: a full one of just the size needed.
        prefill_chunk: read the prompt in pieces of so many tokens, in less memory. None: at once, or as much
            as fits beside what a forgetting cache keeps.
        drafts: let the model's own modules for further tokens draft, and count what becomes of it
            (`model.speculative`): the same distribution, or the same most likely tokens, in fewer passes.
        compile: compile what one token needs (`model.compiled_step`), and the products of a prompt that brings few
            rows to each expert (`model.few_rows`), at the cost of half a minute before the second token, less where
            torch finds an earlier result on disk. Hooks are compiled too, or refused.

    Raises ValueError for an empty prompt, one that leaves no room, stop texts without `decode`, padding where
    positions must be absolute, drafts of a model, or with a cache, that cannot have them, and what cannot be
    compiled: drafts, two-stage latents, caches that do not keep everything in memory. Warns
    (`NonCausalWarning`) when the model's experts depended on later tokens in training, for token by token they
    choose otherwise.
    """
    sampling = sampling or Sampling()
    batch, length = prompt_ids_BS.shape
    _check(model.config, sampling, attention_mask_BS, decode, cache)
    steps = _steps(model.config, length, sampling.max_new_tokens, cache)
    device = prompt_ids_BS.device
    if compile:
        _check_compiled(model.config, cache, drafts)
    if drafts is not None:
        check_drafts(model, cache)
    if cache is None:
        cache = KVCache(
            model.config,
            batch_size=batch,
            max_length=_roomy(model.config, length + steps) if compile else length + steps,
            device=device,
            dtype=model.dtype,
            bounded=drafts is None and not compile,
        )
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    endings = Endings(sampling, decode, batch, device)
    seen_BV = _seen(prompt_ids_BS, attention_mask_BS, model.config.vocab_size)
    mask_BC = attention_mask_BS
    if drafts is not None:
        text = Text(prompt_ids_BS, mask_BC, seen_BV, endings)
        yield from speculate(model, text, sampling, generator, cache, drafts, steps, prefill_chunk)
        return
    with compiling_few_rows() if compile else nullcontext():
        logits_BV = _read_prompt(model, prompt_ids_BS, mask_BC, cache, prefill_chunk)
    step_logits = _compiled_step(model, cache, mask_BC) if compile else None
    columns_DV = model.lm_head.columns() if step_logits is None and _columns_pay(logits_BV, steps) else None
    for step in range(steps):
        ids_B = endings.mark(sample(logits_BV, sampling, generator, seen_BV))
        yield ids_B
        if step == steps - 1 or endings.all_ended:
            return
        seen_BV.scatter_(1, ids_B[:, None], True)
        if step_logits is not None:
            logits_BV = step_logits(ids_B[:, None])
            continue
        if mask_BC is not None:
            mask_BC = torch.cat((mask_BC, mask_BC.new_ones(batch, 1)), dim=1)
        logits_BV = _next_logits(model, ids_B[:, None], mask_BC, cache, columns_DV)


def generate(
    model: MoELanguageModel,
    prompt_ids_BS: Tensor,
    sampling: Sampling | None = None,
    *,
    attention_mask_BS: Tensor | None = None,
    decode: Decode | None = None,
    cache: KVCache | None = None,
    prefill_chunk: int | None = None,
    drafts: Drafts | None = None,
    compile: bool = False,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The new tokens of every sequence, int64 [B, new]; `on_token` sees each step's [B] as it is made.

    The other arguments are those of `stream`.
    """
    columns = []
    for ids_B in stream(
        model,
        prompt_ids_BS,
        sampling,
        attention_mask_BS=attention_mask_BS,
        decode=decode,
        cache=cache,
        prefill_chunk=prefill_chunk,
        drafts=drafts,
        compile=compile,
    ):
        if on_token is not None:
            on_token(ids_B)
        columns.append(ids_B)
    return torch.stack(columns, dim=1)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop texts in it, which is left out."""
    ends = [at for at in (text.find(each) for each in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def _check(
    config: ModelConfig,
    sampling: Sampling,
    mask_BS: Tensor | None,
    decode: Decode | None,
    cache: KVCache | None,
) -> None:
    if sampling.stop and decode is None:
        raise ValueError(f"stop={sampling.stop} without decode; hand over decode=tokenizer.decode")
    if ahead := config.looks_ahead():
        warnings.warn(ahead, NonCausalWarning, stacklevel=4)
    padded = mask_BS is not None and not bool(mask_BS.all())
    streams = cache is not None and cache.forgets
    if padded and (streams or not _shiftable(config)):
        raise ValueError(
            "padding on the left moves chunks, patterns and first positions, which this model or its cache "
            "counts from the start; generate prompts of one length together"
        )


def _shiftable(config: ModelConfig) -> bool:
    """Whether attention asks for distances only, so that padding in front changes nothing."""
    absolute = config.reach.sparsity in ("fixed", "blocks") or config.reach.sink_tokens > 0
    absolute = absolute or config.block.positions == "learned"
    return config.attention != "latent" and not absolute


def _steps(config: ModelConfig, length: int, wanted: int, cache: KVCache | None) -> int:
    """Tokens that may follow a prompt of `length`, at least 1."""
    if length == 0:
        raise ValueError("the prompt has 0 tokens; give at least one, for example the end-of-text token")
    if cache is not None and cache.forgets:
        return wanted
    longest, name = config.max_seq_len, "max_seq_len"
    if cache is not None:
        length += cache.length
        if cache.max_length < longest:
            longest, name = cache.max_length, "the cache's max_length"
    if length >= longest:
        raise ValueError(
            f"the prompt has {length} tokens and {name}={longest} leaves no room; shorten the prompt"
        )
    return min(wanted, longest - length)


def _seen(ids_BS: Tensor, mask_BS: Tensor | None, vocab_size: int) -> Tensor:
    """Bool [B, V]: tokens in the prompt, padding aside."""
    counts = torch.zeros(len(ids_BS), vocab_size, device=ids_BS.device)
    real = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    return counts.scatter_add_(1, ids_BS, real.to(counts.dtype)) > 0


def _read_prompt(
    model: MoELanguageModel,
    ids_BS: Tensor,
    mask_BC: Tensor | None,
    cache: KVCache,
    prefill_chunk: int | None,
) -> Tensor:
    """Logits behind the prompt, [B, V]."""
    chunk = cache.prefill_chunk if prefill_chunk is None else prefill_chunk
    if chunk < 1:
        raise ValueError(f"prefill_chunk={chunk} is below 1; None reads the prompt at once")
    before = 0 if mask_BC is None else mask_BC.shape[1] - ids_BS.shape[1]
    for start in range(0, ids_BS.shape[1], chunk):
        piece = ids_BS[:, start : start + chunk]
        seen_mask = None if mask_BC is None else mask_BC[:, : before + start + piece.shape[1]]
        logits_BV = _next_logits(model, piece, seen_mask, cache)
    return logits_BV


def _check_compiled(config: ModelConfig, cache: KVCache | None, drafts: Drafts | None) -> None:
    if drafts is not None:
        raise ValueError(
            "compile=True and drafts do not go together, whose passes differ in length; choose one"
        )
    from model.compiled_step import check_compiled

    check_compiled(config, cache)


def _roomy(config: ModelConfig, length: int) -> int:
    """Slots for `length` tokens: the next power of two, so that few lengths are compiled.

    Dynamic RoPE is stretched for the cache's length, which then stays as it is.
    """
    dynamic = config.rope.rope_scaling == "dynamic"
    return length if dynamic else max(_FEWEST_SLOTS, 1 << (length - 1).bit_length())


def _compiled_step(
    model: MoELanguageModel, cache: KVCache, mask_BC: Tensor | None
) -> Callable[[Tensor], Tensor]:
    # Imported here: torch's compiler takes a second to load, which nobody else should wait for.
    from model.compiled_step import CompiledStep

    step = CompiledStep(model, cache, mask_BC)

    def logits(ids_B1: Tensor) -> Tensor:
        with _evaluating(model):
            return step(ids_B1)

    return logits


def _columns_pay(logits_BV: Tensor, steps: int) -> bool:
    """Whether to transpose the output matrix first, at the cost of a dozen of its products."""
    return (
        logits_BV.device.type == "cpu"
        and logits_BV.dtype == torch.float32
        and len(logits_BV) == 1
        and steps > 16
    )


@torch.no_grad()
def _next_logits(
    model: MoELanguageModel,
    ids_BS: Tensor,
    mask_BC: Tensor | None,
    cache: KVCache,
    columns_DV: Tensor | None = None,
) -> Tensor:
    columns = nullcontext() if columns_DV is None else model.lm_head.by_columns(columns_DV)
    with _evaluating(model), columns:
        output = model(ids_BS, attention_mask_BS=mask_BC, cache=cache, logits_to_keep=1)
    assert output.logits_BSV is not None
    return output.logits_BSV[:, -1]


@contextmanager
def _evaluating(model: MoELanguageModel) -> Iterator[None]:
    """Evaluation mode inside, and back."""
    training = model.training
    if training:  # to switch walks through every module: a tenth of a small model's step
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
