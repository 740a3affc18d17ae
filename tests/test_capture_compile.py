"""Under torch.compile: one graph, no break, the same numbers; and a clear word when it is too late to attach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from capture_models import BIASED, Kept, Trained, batches, loss_of, mixtral, small_model, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from moeviz.capture.failures import ProbeError
from moeviz.capture.probe import attach
from moeviz.policy import SamplingPolicy
from moeviz.records import AttentionRecord, LoadRecord, TokenRoutingRecord

POLICY = SamplingPolicy(route_every=2, attention_every=2, attention_heads=2)
ROUTES = SamplingPolicy(route_every=2, attention_every=0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def own() -> nn.Module:
    return small_model(num_layers=2, router=BIASED)


def hugging_face() -> nn.Module:
    return mixtral(num_hidden_layers=2)


class Run(NamedTuple):
    trained: Trained
    sink: Kept
    graphs: int


def run(model: nn.Module, policy: SamplingPolicy | None, compiled: bool = True, steps: int = 3) -> Run:
    """Train a model, watched if there is a policy, in one graph if `compiled`."""
    sink, counter = Kept(), CompileCounterWithBackend("aot_eager")
    probe = None if policy is None else attach(model, sink, policy=policy)
    if compiled:
        model.compile(backend=counter, fullgraph=True)
    after = (lambda loss: None) if probe is None else (lambda loss: probe.step(loss=loss))
    trained = train(model, list(batches(steps, 2)), after)
    if probe is not None:
        probe.close()
        assert probe.failures.count == 0
    return Run(trained, sink, counter.frame_count)


@pytest.mark.parametrize("build", [own, hugging_face])
def test_compiled_training_is_watched_in_one_graph_and_left_alone(build: Callable[[], nn.Module]) -> None:
    traced = run(build(), POLICY)
    assert traced.graphs == 2, "one graph, and one more for steps that record attention"
    torch._dynamo.reset()
    assert traced.trained.same_bits(run(build(), None).trained)
    eager = run(build(), POLICY, compiled=False)
    # The same weights at the first step; later ones differ by the rounding of other kernels.
    loads = [sink.of(LoadRecord) for sink in (eager.sink, traced.sink)]
    assert [load.tokens for load in loads[1]] == [54, 54, 54]
    assert loads[0][0].counts_LE.tolist() == loads[1][0].counts_LE.tolist()
    rows = [sink.of(TokenRoutingRecord)[0] for sink in (eager.sink, traced.sink)]
    assert (rows[0].experts_LNSK == rows[1].experts_LNSK).all()
    maps = traced.sink.of(AttentionRecord)
    assert len(maps) == 2 * 2 * 2 * 2  # steps, sequences, cores, heads
    for mine, its in zip(maps[: len(maps) // 2], eager.sink.of(AttentionRecord), strict=False):
        assert (mine.step, mine.layer, mine.head, mine.seq) == (0, its.layer, its.head, its.seq)
        torch.testing.assert_close(torch.from_numpy(mine.map_QC), torch.from_numpy(its.map_QC))


@pytest.mark.parametrize("build", [own, hugging_face])
def test_compiled_recomputation_counts_once(build: Callable[[], nn.Module]) -> None:
    plain, recomputed = build(), build()
    recomputed.gradient_checkpointing_enable()
    counts = [run(model, ROUTES, steps=2) for model in (plain, recomputed)]
    assert [one.graphs for one in counts] == [1, 1]
    for mine, its in zip(*(one.sink.of(LoadRecord) for one in counts), strict=True):
        assert mine.counts_LE.tolist() == its.counts_LE.tolist()


def test_compiled_evaluation_is_not_counted() -> None:
    model, sink = small_model(), Kept()
    probe = attach(model, sink, policy=ROUTES)
    model.compile(backend="aot_eager", fullgraph=True)
    (batch,) = next(batches(1, 1))
    for _ in range(3):
        loss_of(model, batch)
        model.eval()
        with torch.no_grad():
            model(batch.ids_BS)
        model.train()
        probe.step()
    assert [load.tokens for load in sink.of(LoadRecord)] == [27, 27, 27]


def test_blocks_compiled_one_by_one_share_a_graph_and_keep_their_own_counts() -> None:
    seen = []
    for compiled in (False, True):
        model, sink = small_model(first_dense_layers=0), Kept()
        probe = attach(model, sink, policy=ROUTES)
        if compiled:
            for block in model.model.layers:
                block.compile(backend="aot_eager", fullgraph=True)
        loss_of(model, next(batches(1, 1))[0])
        probe.step()
        seen.append(sink.of(LoadRecord)[0].counts_LE.tolist())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("how", ["wrapped", "in place", "one block"])
def test_compiled_model_is_refused(how: str) -> None:
    model: Any = small_model()
    if how == "wrapped":
        model = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        model.model.layers[1].compile(backend="aot_eager")
    with pytest.raises(ProbeError, match=r"compiled already.*first, then torch.compile"):
        attach(model, Kept())


@pytest.mark.parametrize("how", ["in place", "blocks"])
def test_graph_of_an_unwatched_twin_is_not_reused(how: str) -> None:
    """The compiler does not look for hooks when it reuses the graph of an equal model compiled before."""
    (batch,) = next(batches(1, 1))

    def compiled(model: Any) -> Any:
        for module in [model] if how == "in place" else model.model.layers:
            module.compile(backend="aot_eager")
        return model

    loss_of(compiled(small_model()), batch)
    model, sink = small_model(), Kept()
    probe = attach(model, sink)
    loss_of(compiled(model), batch)
    probe.step()
    assert sink.of(LoadRecord)[0].tokens == 27


def test_function_around_the_model_breaks_the_graph_with_a_reason() -> None:
    model = small_model()
    attach(model, Kept())
    (batch,) = next(batches(1, 1))

    def step(ids_BS: Tensor) -> Any:
        return model(ids_BS).logits_BSV

    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model, not a function around it"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(batch.ids_BS)


def test_setting_for_compiled_checkpoints_is_restored() -> None:
    import torch._dynamo.config as config

    before = config.skip_fwd_side_effects_in_bwd_under_checkpoint
    first, second = attach(small_model(), Kept()), attach(small_model(), Kept())
    first.close()
    assert config.skip_fwd_side_effects_in_bwd_under_checkpoint
    second.close()
    assert config.skip_fwd_side_effects_in_bwd_under_checkpoint == before
