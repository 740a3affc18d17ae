"""A run with seeded latents of both kinds, and the records it was written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeviz.metrics import latent
from moeviz.records import (
    EventRecord,
    LatentInfo,
    LatentRecord,
    LayerInfo,
    LoadRecord,
    ModelInfo,
    SequenceRecord,
)
from moeviz.store.run import RunInfo, create_run, write_vocab
from moeviz.store.writer import SegmentWriter

STEPS = (0, 10, 20)
TEXTS = ("It", " was", "\n", " <b>", " 7", " foxes", ".", " Then")
S, RANK, SLOTS, GROUPS, HEADS = len(TEXTS), 10, 5, 2, 4
MLA_BLOCK, SLOT_BLOCK, CHUNK = 1, 3, 2


def model_info() -> ModelInfo:
    layers = tuple(
        LayerInfo(layer=at, name=f"layers.{at + 1}.router", block=at + 1, num_experts=4, top_k=2)
        for at in range(3)
    )
    latents = (
        LatentInfo(layer=MLA_BLOCK, name="layers.1.attn", kind="mla", width=RANK, num_heads=HEADS),
        LatentInfo(layer=SLOT_BLOCK, name="layers.3.attn", kind="two-stage", width=SLOTS, num_heads=HEADS),
    )
    return ModelInfo(family="test", layers=layers, latents=latents)


def records_of(step: int, rank: int = 0) -> list[LatentRecord]:
    """One MLA block with keys, values and queries; one block of slots. Slot 4 dies over training."""
    rng = np.random.default_rng((step, rank))
    at = {"step": step, "rank": rank, "seq": 2, "tokens": 64}
    found = []
    for name, width in (("kv", RANK), ("q", RANK + 2)):
        latents_TR = rng.normal(size=(64, width)) * np.linspace(2, 0.5 / (1 + step), width)
        values = {"latent_erank": latent.latent_erank(latents_TR)} if name == "kv" else {}
        found.append(
            LatentRecord(
                **at, layer=MLA_BLOCK, name=name, heads=(), length=S,  # type: ignore[arg-type]
                grid_XSC=latents_TR[None, :S].astype(np.float32),
                singular_XR=latent.spectrum(latents_TR)[None].astype(np.float32),
                profile_XC=latents_TR.std(axis=0)[None].astype(np.float32), values=values,
            )
        )  # fmt: skip
    read = rng.dirichlet(np.ones(S), (GROUPS, SLOTS)).transpose(0, 2, 1)
    write = rng.dirichlet(np.linspace(3, 3 / (1 + step), SLOTS), (HEADS, S))
    mass = write.mean(axis=1)
    effective = {"slot_n_eff": float(latent.slot_n_eff(mass[:, None]).mean())}
    for name, heads, grid, profile, values, first in (
        ("read", GROUPS, read, latent.slot_read_entropy(read), {"read_entropy": 0.8}, 0),
        ("write", HEADS, write[:, CHUNK:], mass, effective, CHUNK),
    ):
        found.append(
            LatentRecord(
                **at, layer=SLOT_BLOCK, name=name, heads=tuple(range(heads)), first=first, length=S - first,  # type: ignore[arg-type]
                grid_XSC=grid.astype(np.float32),
                singular_XR=np.linalg.svd(grid, compute_uv=False).astype(np.float32),
                profile_XC=profile.astype(np.float32), values=values,
            )
        )  # fmt: skip
    return found


def write_run(path: Path, *, ranks: int = 1, latents: bool = True) -> list[LatentRecord]:
    """A finished run at `path`. Returns what was written about latents."""
    create_run(path, RunInfo(name=path.name, model=model_info(), planned_steps=30, ranks=ranks))
    write_vocab(path, list(TEXTS))
    written: list[LatentRecord] = []
    for rank in range(ranks):
        writer = SegmentWriter(path, rank)
        for step in range(STEPS[-1] + 1):
            if latents and step in STEPS:
                ids_NS = np.arange(S, dtype=np.int32)[None]
                writer.write(
                    SequenceRecord(
                        step=step, rank=rank, seqs=np.array([2]), token_ids_NS=ids_NS, lengths_N=np.array([S]),
                        domains=("tales",),
                    )
                )  # fmt: skip
                written += records_of(step, rank)
                for record in records_of(step, rank):
                    writer.write(record)
                writer.flush()
            if rank == 0:
                counts = np.full((3, 4), 8, dtype=np.int64)
                writer.write(LoadRecord(step=step, rank=0, ts=float(step), tokens=16, counts_LE=counts))
        if rank == 0:
            writer.write(EventRecord(step=STEPS[-1], rank=0, ts=1.0, kind="ended"))
        writer.close()
    return written
