"""Latents on the device: what hooks keep of them, and the few numbers that travel to the host.

Of MLA a bounded number of tokens and, for each of keys and values, the square of the up-projection (R x R instead of
its H * D rows): that is enough to know the spectrum of what attention reads. Of two-stage attention the scores of the
slots and the weights on the slots, for chosen sequences and heads. Nothing here waits for the device.

Shapes: B batch, S sequence, R numbers of a latent, N chosen sequences, J chosen heads, G key heads, M slots, W
positions of a chunk, C keys of a core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeviz.capture.attention import choose_heads, pattern, select
from moeviz.capture.hooks import Switch
from moeviz.capture.latent_sites import LatentSite, boundary
from moeviz.capture.reading import AttentionCall, Handle
from moeviz.capture.transfer import index_tensor

HEADS = 8
"""Query heads of a layer at most whose stages are recorded, spread evenly over all."""
SHOWN_TOKENS = 128
"""Tokens of the sequence that is shown: the first ones."""
_NOTHING = -1e30
"""Score of a token that no slot may read: finite, so that differences of two of them are numbers."""


class Stages(NamedTuple):
    """What the hooks on one two-stage attention saw, of the chosen sequences and heads."""

    latents_GMD: Tensor
    k_NGSD: Tensor
    valid_NS: Tensor | None
    call: AttentionCall | None = None
    """Of the core; comes second."""


@dataclass(eq=False)
class LatentSlot:
    """Where the hooks of one attention layer put what they saw. Tensors are detached."""

    latents: dict[str, Tensor] = field(default_factory=dict)
    """MLA: `kv` and perhaps `q`, [B, S, R]."""
    stages: Stages | None = None

    def clear(self) -> None:
        self.latents = {}
        self.stages = None


def hook_latents(
    site: LatentSite, slot: LatentSlot, switch: Switch, failed: Callable[[Exception], None]
) -> list[Handle]:
    """Attach to an attention layer. Outside of compiled code what goes wrong is told to `failed`."""
    attach = _hook_mla if site.kind == "mla" else _hook_stages

    def guarded(work: Callable[[], None]) -> None:
        if not switch.latents:
            return
        if torch.compiler.is_compiling():
            work()
            return
        try:
            work()
        except Exception as error:
            failed(error)

    return attach(site.module, slot, switch, guarded)


def _hook_mla(
    attention: nn.Module, slot: LatentSlot, switch: Switch, guarded: Callable[[Callable[[], None]], None]
) -> list[Handle]:
    def seen(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            def keep() -> None:
                slot.latents[name] = output.detach()

            guarded(keep)

        return hook

    handles: list[Handle] = [boundary(attention).register_forward_hook(seen("kv"))]
    queries = getattr(attention, "q_a_layernorm", None)
    if isinstance(queries, nn.Module):
        handles.append(queries.register_forward_hook(seen("q")))
    return handles


def _hook_stages(
    attention: Any, slot: LatentSlot, switch: Switch, guarded: Callable[[Callable[[], None]], None]
) -> list[Handle]:
    def before_read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def keep() -> None:
            slot.stages = _reading(args, kwargs, switch.latent_rows_N)

        guarded(keep)

    def before_core(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def keep() -> None:
            if slot.stages is not None:
                slot.stages = slot.stages._replace(
                    call=_core_call(module, args, kwargs, switch.latent_rows_N)
                )

        guarded(keep)

    return [
        attention.read.register_forward_pre_hook(before_read, with_kwargs=True),
        attention.core.register_forward_pre_hook(before_core, with_kwargs=True),
    ]


def _reading(args: tuple[Any, ...], kwargs: dict[str, Any], rows_N: Tensor | None) -> Stages | None:
    """The arguments of stage 1, of the chosen sequences; None when it goes on from a cache."""
    given = dict(zip(("latents_GMD", "k_BGCD", "v_BGCD", "valid_BC", "before"), args, strict=False)) | kwargs
    if given.get("before") is not None or rows_N is None:
        return None
    k_BGSD, valid_BS = given["k_BGCD"].detach(), given.get("valid_BC")
    rows_N = rows_N.to(k_BGSD.device)
    return Stages(
        given["latents_GMD"].detach(),
        k_BGSD.index_select(0, rows_N),
        None if valid_BS is None else valid_BS.detach().index_select(0, rows_N),
    )


def _core_call(
    core: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows_N: Tensor | None
) -> AttentionCall:
    """The arguments of stage 2, of the chosen sequences and heads."""
    assert rows_N is not None
    q_BHSD, k_BGCD = args[:2]
    mask = args[3] if len(args) > 3 else kwargs.get("mask")
    visible = core.visible_keys(q_BHSD.shape[2], k_BGCD.shape[2], mask, q_BHSD.device)
    call = AttentionCall(q_BHSD, k_BGCD, core.softmax_scale, visible, causal=False)
    return select(call, rows_N, choose_heads(q_BHSD.shape[1], HEADS))


def take_tokens(latents_BSR: Tensor, valid_BS: Tensor | None, room: int) -> dict[str, Tensor]:
    """`tokens` [n, R] of at most `room` places, evenly over the micro-batch; `valid` [n] where there is padding."""
    places = latents_BSR.shape[0] * latents_BSR.shape[1]
    count = min(places, room)
    at = index_tensor([index * places // count for index in range(count)], latents_BSR.device)
    taken = {"tokens": latents_BSR.flatten(0, 1).index_select(0, at).float()}
    if valid_BS is not None:
        taken["valid"] = valid_BS.to(latents_BSR.device).flatten().index_select(0, at)
    return taken


def show_tokens(latents_BSR: Tensor, rows_N: Tensor) -> Tensor:
    """Latents of the first tokens of the first chosen sequence, [S', R]."""
    row = rows_N[:1].to(latents_BSR.device)
    return latents_BSR[:, :SHOWN_TOKENS].index_select(0, row)[0].float()


def reads_of(attention: Any) -> dict[str, Tensor]:
    """W^T W, float32 [R, R], of the up-projections to keys (`keys`) and values (`values`).

    Empty where the weight is not here (ZeRO-3 keeps it elsewhere), not a plain matrix, or of unknown split.
    """
    weight = getattr(attention.kv_b_proj, "weight", None)
    nope = _width(attention, "qk_nope_head_dim", "nope")
    values = _width(attention, "v_head_dim", "v_width")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return {}
    if not nope or not values or len(weight) == 0 or len(weight) % (nope + values):
        return {}
    up_HOR = weight.detach().float().unflatten(0, (-1, nope + values))
    parts = {"keys": up_HOR[:, :nope], "values": up_HOR[:, nope:]}
    return {name: torch.einsum("hor,hoq->rq", part, part) for name, part in parts.items()}


def _width(attention: Any, *names: str) -> int:
    found = next((getattr(attention, name) for name in names if hasattr(attention, name)), 0)
    return found if isinstance(found, int) else 0


def stage_weights(stages: Stages, chunk: int, slots: int) -> dict[str, Tensor]:
    """`scores` [N, G, M, S] of the slots for every token, and `writes` [N, J, S, M], the weights on own slots.

    The weights of stage 1 before a chunk are the softmax of `scores` over the tokens of earlier chunks. Weights of
    stage 2 sum with those on the chunk's own tokens to 1.
    """
    call = stages.call
    assert call is not None
    scores = torch.einsum("gmd,ngsd->ngms", stages.latents_GMD.float(), stages.k_NGSD.float()) * call.scale
    if stages.valid_NS is not None:
        scores = scores.masked_fill(~stages.valid_NS.bool().to(scores.device)[:, None, None], _NOTHING)
    chunks = -(-call.q_BHSD.shape[2] // chunk)
    writes = [pattern(_own_chunk(call, at, chunks, chunk, slots))[..., :slots] for at in range(chunks)]
    return {"scores": scores, "writes": torch.cat(writes, dim=2)}


def _own_chunk(call: AttentionCall, at: int, chunks: int, chunk: int, slots: int) -> AttentionCall:
    """The queries of one chunk with the only keys that they see: their slots, then the chunk's own tokens."""
    queries = slice(at * chunk, (at + 1) * chunk)
    tokens = slice(chunks * slots + queries.start, chunks * slots + queries.stop)
    own = slice(at * slots, (at + 1) * slots)
    assert call.mask is not None
    mask = call.mask[:, :, queries]
    return call._replace(
        q_BHSD=call.q_BHSD[:, :, queries],
        k_BGCD=torch.cat((call.k_BGCD[:, :, own], call.k_BGCD[:, :, tokens]), dim=2),
        mask=torch.cat((mask[..., own], mask[..., tokens]), dim=-1),
    )
