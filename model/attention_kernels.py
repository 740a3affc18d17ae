"""The kernels that are not torch's own product: flash-attn where it is installed, FlexAttention on request.

`build_core` is the one place that chooses. A kernel that cannot do what a call asks for is never asked:
padding, patterns, and sinks inside a window go to SDPA, which takes any mask.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from model.attention_config import AttentionKernel
from model.attention_core import AttentionCore, EagerCore, SdpaCore, of_one_width, with_sink_key
from model.config import ModelConfig

_FLASH_WIDTH = 256
"""Widest head that flash-attn takes."""


class FlashCore(SdpaCore):
    """flash-attn (Dao 2023) for half precision on CUDA; whatever it cannot do goes to SDPA.

    It aligns causality to the last key, as this core does, and counts a window without the query's own
    position.
    """

    def forward(
        self,
        q_BHSD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        mask: Tensor | None = None,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        if not self._fits(q_BHSD, v_BGCD, mask, sinks_H):
            return super().forward(q_BHSD, k_BGCD, v_BGCD, mask, sinks_H=sinks_H)
        width = v_BGCD.shape[-1]
        if sinks_H is not None:
            q_BHSD, k_BGCD, v_BGCD = with_sink_key(q_BHSD, k_BGCD, v_BGCD, sinks_H / self.softmax_scale)
        q_BHSD, k_BGCD, v_BGCD = of_one_width(q_BHSD, k_BGCD, v_BGCD)
        out_BSHD = _flash_attn()(
            *(x.transpose(1, 2) for x in (q_BHSD, k_BGCD, v_BGCD)),
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=(-1, -1) if self.window is None else (self.window - 1, 0),
        )
        return out_BSHD[..., :width].transpose(1, 2)

    def _fits(self, q_BHSD: Tensor, v_BGCD: Tensor, mask: Tensor | None, sinks_H: Tensor | None) -> bool:
        reach = self.reach
        if not _half_on_cuda(q_BHSD) or mask is not None or reach.sparsity != "none":
            return False
        if reach.window is not None and (reach.sink_tokens or sinks_H is not None):
            return False
        width = max(q_BHSD.shape[-1] + (8 if sinks_H is not None else 0), v_BGCD.shape[-1])
        return width <= _FLASH_WIDTH and width % 8 == 0


class FlexCore(SdpaCore):
    """torch's FlexAttention: skips the blocks of a pattern that nobody reads. Compiled on CUDA.

    On a CPU it is run uncompiled, to be tested, and has no backward: with gradients SDPA takes the call.
    """

    def forward(
        self,
        q_BHSD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        mask: Tensor | None = None,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        if q_BHSD.device.type == "cpu" and torch.is_grad_enabled():
            return super().forward(q_BHSD, k_BGCD, v_BGCD, mask, sinks_H=sinks_H)
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

        queries, keys = q_BHSD.shape[2], k_BGCD.shape[2]
        batch = mask.shape[0] if mask is not None else 1
        heads = mask.shape[1] if mask is not None and mask.dim() == 4 else 1
        blocks = create_block_mask(
            self._readable(keys - queries, mask), batch, heads, queries, keys, device=q_BHSD.device
        )
        out_BHSD, aux = _flex_attention(q_BHSD.device.type)(
            q_BHSD,
            k_BGCD,
            v_BGCD,
            block_mask=blocks,
            scale=self.softmax_scale,
            enable_gqa=q_BHSD.shape[1] != k_BGCD.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        if sinks_H is None:
            return out_BHSD
        # The sink adds exp(sink) to a denominator of exp(lse).
        return out_BHSD * (aux.lse - sinks_H[:, None]).sigmoid()[..., None].to(out_BHSD.dtype)

    def _readable(self, offset: int, mask: Tensor | None) -> Callable[..., Tensor]:
        """The rule of one call as FlexAttention wants it: (batch, head, query index, key index) -> bool."""

        def readable(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if mask is not None and mask.dim() == 4:
                return mask[b, h, query, key]
            visible = self.reach(query + offset, key)
            return visible if mask is None else visible & (mask[b, key] | (key == query + offset))

        return readable


@functools.cache
def _flash_attn() -> Callable[..., Any]:
    """flash-attn's function. Raises ModuleNotFoundError with a remedy where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "attention_kernel=flash needs flash-attn; run: pip install flash-attn, or use attention_kernel=sdpa"
        ) from error
    function: Callable[..., Any] = flash_attn_func
    return function


def flash_is_installed() -> bool:
    """Whether flash-attn can be imported; it is not imported here."""
    return importlib.util.find_spec("flash_attn") is not None


def _half_on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function) if device_type == "cuda" else function


_CORES: Mapping[AttentionKernel, type[AttentionCore]] = MappingProxyType(
    {"eager": EagerCore, "sdpa": SdpaCore, "flex": FlexCore, "flash": FlashCore}
)


def build_core(config: ModelConfig, layer: int) -> AttentionCore:
    """The core that `config.attention_kernel` names; auto: flash where it is installed, SDPA else.

    Raises ModuleNotFoundError for flash where flash-attn is not installed.
    """
    if config.attention_kernel == "auto":
        return (FlashCore if flash_is_installed() else SdpaCore)(config, layer)
    if config.attention_kernel == "flash":
        _flash_attn()
    return _CORES[config.attention_kernel](config, layer)
