"""The hooks: they detach, assign to a fixed slot, and sleep outside of training forwards. Nothing else.

Under torch.compile a hook is traced into the graph: it may assign tensors to a slot and must not append,
count or print, or every step recompiles. In eager mode the same assignment goes through a guard that keeps
errors away from training and recognises recomputation: backward runs again through checkpointed blocks,
after the forward of the root has ended (the switch is off) or inside a graph task of autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeviz.capture.attention import choose_heads, select
from moeviz.capture.reading import AttentionCall, CoreSite, Handle, Observe, Reading, RouterSite

_REASON = "moeviz counts the forwards of the watched model: compile the model, not a function around it"


@dataclass(eq=False)
class Switch:
    """Whether the hooks are awake. Plain attributes: torch.compile guards on them, one graph for each value."""

    awake: bool = False
    attending: bool = False
    latents: bool = False
    rows_N: Tensor | None = None
    """Sequences whose attention is recorded, on the device of the inputs."""
    latent_rows_N: Tensor | None = None
    """Sequences whose latents are recorded."""


@dataclass(eq=False)
class RouterSlot:
    """Where the hook of one router puts what it read."""

    reading: Reading | None = None


@dataclass(eq=False)
class CoreSlot:
    """Where the hook of one attention core puts the chosen rows."""

    call: AttentionCall | None = None


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: true for exactly the recomputed calls."""
    return torch._C._current_graph_task_id() != -1


def hook_router(site: RouterSite, slot: RouterSlot, switch: Switch, guarded: Callable[..., None]) -> Handle:
    """Attach to a router; `guarded(module, args, kwargs, output)` takes over outside of compiled code."""
    read = site.read

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not switch.awake:
            return
        if torch.compiler.is_compiling():
            slot.reading = read(module, args, kwargs, output)
        else:
            guarded(module, args, kwargs, output)

    return site.module.register_forward_hook(hook, with_kwargs=True)


def hook_core(site: CoreSite, slot: CoreSlot, switch: Switch, num_heads: int, guarded: Observe) -> Handle:
    """Attach to an attention core; `guarded(call)` takes over outside of compiled code."""

    def observe(call: AttentionCall) -> None:
        if torch.compiler.is_compiling():
            assert switch.rows_N is not None
            slot.call = select(call, switch.rows_N, choose_heads(call.q_BHSD.shape[1], num_heads))
        else:
            guarded(call)

    def wanted() -> bool:
        return switch.attending

    return site.attach(observe, wanted)


def hook_root(
    root: nn.Module,
    begin: Callable[[tuple[Any, ...], dict[str, Any]], None],
    end: Callable[[], None],
) -> list[Handle]:
    """Call `begin(args, kwargs)` before and `end()` after every forward of the root, outside of compiled code."""

    @torch.compiler.disable(reason=_REASON)
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin(args, kwargs)

    @torch.compiler.disable(reason=_REASON)
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        end()

    return [
        root.register_forward_pre_hook(before, with_kwargs=True),
        root.register_forward_hook(after, with_kwargs=True),
    ]


def forget_graphs(root: nn.Module) -> None:
    """Drop the compiled graphs of the model's classes.

    torch.compile reuses the graph of an equal model that was compiled earlier in this process, and does not look
    whether hooks came since: without this, a watched run after an unwatched one would see nothing.
    """
    if "torch._dynamo" not in sys.modules:
        return
    import torch._dynamo.eval_frame as eval_frame

    reset_code = getattr(eval_frame, "reset_code", None)
    forwards = {type(module).forward for module in root.modules()}
    for code in {forward.__code__ for forward in forwards if hasattr(forward, "__code__")}:
        if reset_code is not None:
            reset_code(code)


class CompiledCheckpointing:
    """While a probe is attached: torch.compile may trace a hook inside activation checkpointing.

    A compiled checkpoint refuses side effects, because a recomputation would replay them. A hook wants exactly
    what the setting offers: the assignment once, in the forward.
    """

    _NAME = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    _users = 0
    _before = False

    def __init__(self) -> None:
        import torch._dynamo.config as config

        kind = type(self)
        self._config = config if hasattr(config, self._NAME) else None
        if self._config is not None:
            if kind._users == 0:
                kind._before = getattr(config, self._NAME)
                setattr(config, self._NAME, True)
            kind._users += 1

    def remove(self) -> None:
        if self._config is not None:
            type(self)._users -= 1
            if type(self)._users == 0:
                setattr(self._config, self._NAME, type(self)._before)
            self._config = None
