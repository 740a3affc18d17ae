"""The heavy look at a checkpoint: everything that needs a fixed probe, all experts or many forward passes.

The probe is recorded as an ordinary run (loads, token-level routing, losses), and what is found out about it goes
into the same run as the table `analysis`, each value beside what chance alone would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moeviz.capture.sites import Sites, find_sites
from moeviz.errors import MoevizError
from moeviz.inspection import findings
from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.inspection.decisions import balance_losses, decisions, pooled_loss
from moeviz.inspection.expert_weights import gradient_norms, router_rows, weights_apart
from moeviz.inspection.experts_apart import knockouts, outputs_apart
from moeviz.inspection.heads import heads
from moeviz.inspection.latents import latent_policy, latents
from moeviz.inspection.over_checkpoints import over_checkpoints
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import ModelReading, losses, read_model
from moeviz.inspection.token_classes import diets
from moeviz.metrics.importance import Removal
from moeviz.records import AnalysisRecord, AnalysisValue
from moeviz.session import watch
from moeviz.store.run import finish_run
from moeviz.store.writer import SegmentWriter

Progress = Callable[[str], None]
"""Told what was just done; called `num_ticks` times."""


def num_ticks(model: nn.Module, modes: Sequence[Removal]) -> int:
    """How often `analyze` reports progress."""
    routers = find_sites(model).routers
    return 2 + len(routers) + sum(site.num_experts for site in routers) * len(modes)


def analyze(
    checkpoint: OpenedCheckpoint,
    probe: ProbeBatch,
    run: Path,
    *,
    modes: Sequence[Removal] = (),
    against: Sequence[OpenedCheckpoint] = (),
    gradients: bool = False,
    progress: Progress = lambda text: None,
) -> tuple[AnalysisValue, ...]:
    """Analyse a checkpoint on a probe and store probe and findings as a new run.

    Args:
        checkpoint: what to look into; evaluation mode.
        probe: the tokens.
        run: folder of the new run.
        modes: ways to remove each expert in turn, one forward pass of the probe each; empty: none.
        against: other checkpoints of the same model, for saturation, churn, drift and, with two or more, the last
            fluctuation.
        gradients: also one backward pass, for the gradient at every expert.
        progress: told after every part.

    Raises:
        MoevizError: a dense model, one whose experts choose their tokens, a folder that holds a run, or a second
            checkpoint of another shape.
    """
    model = checkpoint.model.eval()
    sites = find_sites(model)
    _refuse_choosing_experts(sites)
    reading = read_model(model, sites.routers, probe.token_ids_NS, lambda: None)
    found = _of_layers(reading, sites, probe, checkpoint.token_texts, progress)
    found += findings.journeys(reading.layers)
    found += pooled_loss(reading.layers)
    found += over_checkpoints(checkpoint, reading, sites, probe, against)
    if gradients:
        found += gradient_norms(model, reading.layers, probe.token_ids_NS)
    blocks = tuple(core.layer for core in sites.info.attentions)
    vocab_size = len(checkpoint.token_texts) or int(probe.token_ids_NS.max()) + 1
    found += heads(
        model, sites.cores, blocks, probe.token_ids_NS, vocab_size, lambda: progress("attention heads")
    )
    found += latents(model, probe.token_ids_NS)
    for layer, site in enumerate(sites.routers):
        tick = _naming(progress, f"knock-out, layer {layer}")
        found += knockouts(model, site, layer, probe, reading.loss_NS, modes, tick)
    _record(checkpoint, probe, run, tuple(found))
    progress("stored")
    return tuple(found)


def _refuse_choosing_experts(sites: Sites) -> None:
    """Nearly all that is asked here is about the k experts that a token chose."""
    for site in sites.routers:
        if site.experts_choose:
            raise MoevizError(
                f"{site.name} lets experts choose their tokens, so tokens have no k experts to analyse; "
                "moeviz inspect shows what its experts take"
            )


def _of_layers(
    reading: ModelReading, sites: Sites, probe: ProbeBatch, texts: Sequence[str], progress: Progress
) -> list[AnalysisValue]:
    found: list[AnalysisValue] = []
    for layer, (one, site) in enumerate(zip(reading.layers, sites.routers, strict=True)):
        found += findings.loads(layer, one)
        found += findings.dependence(layer, one, probe)
        found += findings.domains(layer, one, probe)
        found += findings.vocabulary(layer, one, probe, texts, reading.predicted_NS)
        found += diets(layer, one, probe, texts)
        found += findings.repeats(layer, one, probe)
        found += findings.partners(layer, one)
        rows_ED = router_rows(site)
        found += decisions(layer, one, rows_ED)
        found += balance_losses(layer, one, probe)
        found += findings.alike(layer, one, rows_ED)
        found += weights_apart(layer, one)
        found += outputs_apart(layer, one)
        progress(f"layer {layer}")
    return found


def _naming(progress: Progress, text: str) -> Callable[[], None]:
    return lambda: progress(text)


def _record(
    checkpoint: OpenedCheckpoint, probe: ProbeBatch, run: Path, values: tuple[AnalysisValue, ...]
) -> None:
    """Watch the probe once more, as a run of one step, and add the findings to it."""
    watched = watch(
        checkpoint.model,
        run,
        policy=replace(latent_policy(probe.num_tokens), route_every=1, route_sequences="all"),
        when="always",
        name=f"analyze {checkpoint.name}",
        config={"inspected": str(checkpoint.path), "trained_steps": checkpoint.step, **checkpoint.config},
        vocab=list(checkpoint.token_texts),
        planned_steps=1,
        alerts=False,
        pack=False,
    )
    labels = iter(probe.domains)
    with watched as recording, torch.no_grad():
        loss_NS = losses(
            checkpoint.model,
            probe.token_ids_NS,
            before=lambda ids_BS: recording.label([next(labels) for _ in range(len(ids_BS))]),
            after=recording.token_loss,
        )
        recording.step(0, loss=float(loss_NS.mean()))
    writer = SegmentWriter(run)
    writer.write(AnalysisRecord(step=0, values=values))
    writer.close()
    finish_run(run)
