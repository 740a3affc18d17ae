"""A seeded run on disk for tests of the dashboards, written through the real records and the real segment writer.

Six layers of sixteen experts, top-2. Layer 3 collapses onto two experts in the second half, one expert of layer 5 is
dead from the start, text tokens go to experts by what they are (space, digit, code, word), attention maps have a
sink, a local and an induction head.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np

from moeviz.metrics.live import live_metrics
from moeviz.metrics.load import load_entropy
from moeviz.records import (
    AlertRecord,
    AttentionInfo,
    AttentionRecord,
    EventRecord,
    LayerInfo,
    LoadRecord,
    MetricRecord,
    ModelInfo,
    ScalarRecord,
    SequenceRecord,
    TokenRoutingRecord,
)
from moeviz.store.run import RunInfo, create_run, write_vocab
from moeviz.store.writer import SegmentWriter

L, E, K, H, S = 6, 16, 2, 4, 96
TOKENS = 4096
COLLAPSING, HOT = 3, (2, 9)
DEAD_LAYER, DEAD_EXPERT = 5, 4

TEXTS = {
    "stories": "Once upon a time there was a little fox who lived at the edge of the forest. Every morning she walked "
    "down to the river, counted 7 white stones, and told the old heron what she had dreamed. One day the "
    "river was gone. The fox looked at the dry bed and said: where do rivers go when nobody is watching? "
    "The heron opened one eye. They go where the stories go, he said, and closed it again. So the fox "
    "packed 3 apples and a map with 12 holes in it, and set out to find both.",
    "code": "def binary_search(items, target):\n    low, high = 0, len(items) - 1\n    while low <= high:\n        "
    "middle = (low + high) // 2\n        if items[middle] == target:\n            return middle\n        if "
    "items[middle] < target:\n            low = middle + 1\n        else:\n            high = middle - 1\n"
    "    return None\n\n<img src=x onerror=\"document.title='owned'\">\n"
    "assert binary_search([1, 3, 5, 7, 9, 11], 7) == 3\n",
    "maths": "Let f(x) = x^2 + 3x - 4. To find the roots, factor the polynomial: f(x) = (x + 4)(x - 1), so x = -4 or "
    "x = 1. The sum of the roots is -3 and their product is -4, as the coefficients promise. If 12 cows eat "
    "60 bales in 5 days, one cow eats 60 / (12 * 5) = 1 bale a day, and 20 cows eat 140 bales in 7 days.",
}


def pieces(text: str) -> list[str]:
    """Words with their leading space, digits one by one, runs of white space: what a tokenizer gives."""
    return re.findall(r"<img[^>]+>|\n[ ]*| ?[A-Za-z_]+| ?\d| ?[^\sA-Za-z_\d]| +", text)


VOCAB = sorted({piece for text in TEXTS.values() for piece in pieces(text)} | {"<pad>"})
_ID = {piece: index for index, piece in enumerate(VOCAB)}


def kind(piece: str) -> int:
    """0 white space, 1 digit, 2 punctuation, 3 word."""
    bare = piece.strip()
    return 0 if not bare else 1 if bare.isdigit() else 2 if not bare[0].isalnum() and bare[0] != "_" else 3


def model_info() -> ModelInfo:
    layers = tuple(
        LayerInfo(layer=i, name=f"blocks.{i}.moe.router", block=i, num_experts=E, top_k=K, score="softmax")
        for i in range(L)
    )
    cores = tuple(AttentionInfo(layer=i, name=f"blocks.{i}.attention.core", num_heads=8) for i in range(L))
    return ModelInfo(family="moeviz", layers=layers, attentions=cores, num_parameters=12_345_678)


HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
"""A token that a careless page would run."""


class SyntheticRun:
    """Writes one run step by step; the same seed gives the same run."""

    def __init__(
        self, path: Path, planned_steps: int = 300, *, seed: int = 0, flush_seconds: float = 1.0
    ) -> None:
        info = RunInfo(name=path.name, model=model_info(), planned_steps=planned_steps, tokenizer="words")
        create_run(path, info)
        write_vocab(path, VOCAB)
        self.writer = SegmentWriter(path, flush_seconds=flush_seconds)
        self.planned = planned_steps
        self.rng = np.random.default_rng(seed)
        self.skew_LE = self.rng.normal(0, 0.18, (L, E))
        self.taste_LkE = self.rng.normal(0, 1.6, (L, 4, E))
        self.alert: AlertRecord | None = None

    def share_LE(self, step: int) -> np.ndarray:
        """Intended load shares of a step: even but for the collapsing layer and the dead expert; at most 1/K each."""
        logits_LE = self.skew_LE + self.rng.normal(0, 0.05, (L, E))
        logits_LE[COLLAPSING, HOT] += 4.5 * self.collapse(step)
        logits_LE[DEAD_LAYER, DEAD_EXPERT] = -30
        share_LE = np.exp(logits_LE) / np.exp(logits_LE).sum(axis=1, keepdims=True)
        for _ in range(20):  # what exceeds one slot per token goes to the others
            share_LE = np.minimum(share_LE, 0.98 / K)
            share_LE /= share_LE.sum(axis=1, keepdims=True)
        return share_LE

    def collapse(self, step: int) -> float:
        """0 in the first half of the run, then rising to 1."""
        half = self.planned / 2
        return float(np.clip((step - half) / (0.3 * self.planned), 0, 1))

    def write(self, step: int, ts: float | None = None) -> None:
        ts = time.time() if ts is None else ts
        share_LE = self.share_LE(step)
        counts_LE = np.stack([self.rng.multinomial(TOKENS * K, share) for share in share_LE])
        loads = LoadRecord(
            step=step,
            rank=0,
            ts=ts,
            tokens=TOKENS,
            counts_LE=counts_LE,
            prob_sum_LE=(share_LE * TOKENS).astype(np.float32),
            token_sums={
                "entropy_nats": (TOKENS * np.log(E) * 0.8 * load_entropy(share_LE)).astype(np.float32)
            },
        )
        widths, top_k = np.full(L, E), np.full(L, K)
        self._alert(step, counts_LE)
        if step % 10 == 0:
            self._tokens(step, share_LE)
        if step % 50 == 0:
            self._attention(step)
        self.writer.write(MetricRecord(step=step, values=live_metrics(loads, widths, top_k)))
        values = {"loss": 2.1 + 4.6 * np.exp(-step / 60) + self.rng.normal(0, 0.03), "lr": 3e-4}
        values |= {
            "tokens_per_second": 21_400 + self.rng.normal(0, 300),
            "grad_norm": 1 + self.rng.gamma(2, 0.1),
        }
        self.writer.write(ScalarRecord(step=step, rank=0, ts=ts, values=values))
        self.writer.write(loads)

    def write_all(self, steps: int) -> None:
        now = time.time()
        for step in range(steps):
            self.write(step, now - 0.2 * (steps - 1 - step))
        self.writer.flush()

    def finish(self, step: int) -> None:
        self.writer.write(EventRecord(step=step, rank=0, ts=time.time(), kind="ended"))
        self.writer.close()

    def _tokens(self, step: int, share_LE: np.ndarray) -> None:
        names = list(TEXTS)
        texts = [pieces(TEXTS[name])[:S] for name in names]
        lengths_N = np.array([len(text) for text in texts])
        experts_LNSK = np.zeros((L, len(texts), S, K), np.uint16)
        weights_LNSK = np.zeros((L, len(texts), S, K), np.float32)
        for n, text in enumerate(texts):
            kinds_S = np.array([kind(piece) for piece in text])
            scores_LSE = np.log(share_LE + 1e-9)[:, None, :] + self.taste_LkE[:, kinds_S] * 0.9
            scores_LSE = scores_LSE + self.rng.gumbel(0, 0.5, scores_LSE.shape)
            chosen_LSK = np.argsort(-scores_LSE, axis=2)[:, :, :K]
            picked_LSK = np.exp(np.take_along_axis(scores_LSE, chosen_LSK, axis=2))
            experts_LNSK[:, n, : len(text)] = chosen_LSK
            weights_LNSK[:, n, : len(text)] = picked_LSK / picked_LSK.sum(axis=2, keepdims=True)
        seqs = np.arange(len(texts))
        self.writer.write(
            TokenRoutingRecord(
                step=step,
                rank=0,
                layers=np.arange(L),
                seqs=seqs,
                experts_LNSK=experts_LNSK,
                weights_LNSK=weights_LNSK,
                lengths_N=lengths_N,
            )
        )
        ids_NS = np.zeros((len(texts), S), np.int32)
        loss_NS = np.full((len(texts), S), np.nan, np.float32)
        for n, text in enumerate(texts):
            ids_NS[n, : len(text)] = [_ID[piece] for piece in text]
            loss_NS[n, : len(text) - 1] = self.rng.gamma(1.4, 1.2, len(text) - 1)
        self.writer.write(
            SequenceRecord(
                step=step,
                rank=0,
                seqs=seqs,
                token_ids_NS=ids_NS,
                lengths_N=lengths_N,
                domains=tuple(names),
                token_loss_NS=loss_NS,
            )
        )

    def _attention(self, step: int) -> None:
        for layer in range(L):
            for head in range(0, 2 * H, 2):
                for seq, text in enumerate(list(TEXTS.values())[:1]):
                    size = len(pieces(text)[:S])
                    self.writer.write(
                        AttentionRecord(
                            step=step,
                            rank=0,
                            layer=layer,
                            head=head,
                            seq=seq,
                            map_QC=attention(layer, head, pieces(text)[:S], self.rng),
                            q_len=size,
                            k_len=size,
                        )
                    )

    def _alert(self, step: int, counts_LE: np.ndarray) -> None:
        entropy = float(load_entropy(counts_LE / counts_LE.sum(axis=1, keepdims=True))[COLLAPSING])
        if entropy > 0.6 or (self.alert is not None and step % 20):
            return
        raised = step if self.alert is None else self.alert.raised_step
        self.alert = AlertRecord(
            episode=f"ROUTING_COLLAPSE/{COLLAPSING}/{raised}",
            rule="ROUTING_COLLAPSE",
            rule_version=1,
            layer=COLLAPSING,
            experts=HOT,
            severity="critical",
            raised_step=raised,
            updated_step=step,
            cleared_step=None,
            value=entropy,
            peak=entropy,
            threshold=0.6,
            message=f"Routing in layer {COLLAPSING} has collapsed to ~{np.exp(entropy * np.log(E)):.1f} experts.",
            remedy="The loss will not show this. Stop; lower LR or lengthen warm-up, enable balancing from step 0.",
        )
        self.writer.write(self.alert)


def attention(layer: int, head: int, text: list[str], rng: np.random.Generator) -> np.ndarray:
    """A causal map [S, S] with rows that sum to 1: a sink head, a local head, an induction head, a broad one."""
    size = len(text)
    q, k = np.mgrid[:size, :size]
    logits_QC = rng.normal(0, 0.4, (size, size))
    style = (head // 2 + layer) % 4
    if style == 0:
        logits_QC += 5.0 * (k == 0)
    elif style == 1:
        logits_QC -= 0.7 * np.abs(q - k - 1)
    elif style == 2:
        same = np.array([[a == b for b in ["", *text[:-1]]] for a in text])
        logits_QC += 5.0 * (same & (k <= q)) + 2.0 * (k == 0)
    logits_QC = np.where(k <= q, logits_QC, -np.inf)
    weights_QC = np.exp(logits_QC - logits_QC.max(axis=1, keepdims=True))
    return (weights_QC / weights_QC.sum(axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    import sys

    path, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    run = SyntheticRun(path, planned_steps=int(sys.argv[4]) if len(sys.argv) > 4 else 300, flush_seconds=0.25)
    run.write_all(count)
    for step in range(count, 1_000_000):
        if seconds <= 0:
            break
        time.sleep(seconds)
        run.write(step)
    run.finish(count - 1)
