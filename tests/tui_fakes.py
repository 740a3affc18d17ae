"""A seeded run for tests of the terminal view: 24 layers of 64 experts with one that collapses, or any other shape."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moeviz.live import RunState, Series, Snapshot
from moeviz.metrics import by_id
from moeviz.metrics.latent import TELLING
from moeviz.records import AlertRecord, LayerInfo, ModelInfo
from tui.archive import Flow, LatentPlace, RunRow, SequenceRef, Source, TokenTrace
from tui.latents import PARTS, LatentKind, LatentSheet, LatentValue
from tui.scene import LoadHistory

TEXTS = (
    "def area(shape):\n    if shape.kind == 'circle':\n        return 3.14159 * shape.radius ** 2\n"
    "    raise ValueError(f'unknown shape {shape.kind!r}')\n\n\nprint(area(Circle(radius=2)))\n",
    "Once upon a time there was a little fox who lived beside a river. Every morning the fox went to the water, "
    "looked at the sky and asked: is it going to rain today? And every morning the river said: wait and see. "
    "One day the fox grew tired of waiting. It built a boat of reeds and leaves, and it sailed away.\n"
    "It saw 3 bridges, 17 herons and 1 very old pike, which told it that the sea is only 12 miles from here.",
    "Der Fluss ist lang, das Meer ist weit. 今日は雨が降っています。 Le renard dort sous le pont.",
)


def model_info(num_layers: int, num_experts: int, top_k: int) -> ModelInfo:
    layers = tuple(
        LayerInfo(
            layer=index,
            name=f"layers.{index}.moe.router",
            block=index,
            num_experts=num_experts,
            top_k=top_k,
            score="softmax",
        )
        for index in range(num_layers)
    )
    return ModelInfo(family="own", layers=layers, num_parameters=1_234_567)


class SyntheticRun:
    """Loads of every step from one seed; layer `sick` starts to collapse onto a few experts at `onset`."""

    def __init__(
        self,
        num_layers: int = 24,
        num_experts: int = 64,
        top_k: int = 8,
        steps: int = 160,
        sick: int | None = None,
    ) -> None:
        self.info = model_info(num_layers, num_experts, top_k)
        self.num_experts, self.top_k, self.steps = num_experts, top_k, steps
        self.sick = num_layers * 11 // 24 if sick is None else sick
        self.onset = steps // 2
        rng = np.random.default_rng(7)
        skew_LE = rng.normal(0, 0.22, (num_layers, num_experts))
        picked = rng.permutation(num_experts).tolist()
        self.hot, self.dead = sorted(picked[: top_k + 1]), sorted(picked[-2:])
        self.loads_TLE = np.stack([self._loads(rng, skew_LE, step) for step in range(steps)]).astype(
            np.float32
        )
        self.loss_T = 2.6 + 4.5 * np.exp(-np.arange(steps) / 40) + rng.normal(0, 0.02, steps)

    def _loads(self, rng: np.random.Generator, skew_LE: np.ndarray, step: int) -> np.ndarray:
        logits_LE = skew_LE + rng.normal(0, 0.06, skew_LE.shape)
        depth = max(step - self.onset, 0) / (self.steps - self.onset)
        logits_LE[self.sick, self.hot] += depth * np.linspace(6.5, 3.5, len(self.hot))
        share_LE = np.exp(logits_LE)
        if depth > 0.5:
            share_LE[self.sick, self.dead] = 0.0
        for _ in range(
            40
        ):  # no expert serves a token twice: shares end at 1 / K, the rest goes to the others
            share_LE /= share_LE.sum(axis=1, keepdims=True)
            share_LE = np.minimum(share_LE, 1 / self.top_k)
        return share_LE * self.num_experts

    def entropy_TL(self) -> np.ndarray:
        share = self.loads_TLE / self.loads_TLE.sum(axis=2, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(share > 0, share * np.log(share), 0.0)
        return (-terms.sum(axis=2) / np.log(self.num_experts)).astype(np.float32)

    def n_eff(self, step: int) -> float:
        return float(np.exp(self.entropy_TL()[step, self.sick] * np.log(self.num_experts)))

    def alerts(self, step: int) -> tuple[AlertRecord, ...]:
        first = self.onset + (self.steps - self.onset) // 3
        if step < first:
            return ()
        common = {"rule_version": 1, "layer": self.sick, "raised_step": first, "updated_step": step}
        collapse = AlertRecord(
            episode=f"ROUTING_COLLAPSE/{self.sick}/{first}",
            rule="ROUTING_COLLAPSE",
            experts=tuple(self.hot),
            severity="critical",
            cleared_step=None,
            value=0.21,
            peak=0.18,
            threshold=0.3,
            message=f"Routing in layer {self.sick} has collapsed to ~{self.n_eff(step):.1f} experts.",
            remedy="The loss will not show this. Stop; lower the learning rate or lengthen warm-up, enable balancing "
            "from step 0, add a z-loss of 1e-3, reduce the router's initialisation.",
            evidence={"n_eff": round(self.n_eff(step), 2), "excess_coverage": 0.86},
            **common,
        )
        starved = AlertRecord(
            episode=f"EXPERT_STARVED/{self.sick}/{first}",
            rule="EXPERT_STARVED",
            experts=(self.dead[0],),
            severity="warning",
            cleared_step=None,
            value=0.04,
            peak=0.0,
            threshold=0.15,
            message=f"Expert {self.dead[0]}, layer {self.sick} gets 0.1 % of assignments (0.04× an even share).",
            remedy="Often heals in the first few hundred steps. If it lasts: raise the balance coefficient 2 to 3×.",
            **common,
        )
        return (collapse, starved)

    def snapshot(
        self,
        step: int | None = None,
        *,
        state: RunState = "live",
        revision: int | None = None,
        behind: float = 0.4,
    ) -> Snapshot:
        step = self.steps - 1 if step is None else step
        upto = slice(0, step + 1)
        entropy_TL = self.entropy_TL()[upto]
        steps_T = np.arange(self.steps)[upto]
        recent = self.loads_TLE[max(step - 19, 0) : step + 1]
        shape = self.loads_TLE.shape[1:]
        return Snapshot(
            run_name="olmo-24x64",
            run_path="runs/olmo-24x64",
            info=self.info,
            state=state,
            revision=step + 1 if revision is None else revision,
            behind_seconds=behind,
            step=step,
            planned_steps=self.steps * 2,
            tokens=8192,
            load_rel_LE=self.loads_TLE[step] if step >= 0 else np.full(shape, np.nan, np.float32),
            load_rel_ema_LE=recent.mean(axis=0) if step >= 0 else np.full(shape, np.nan, np.float32),
            history_steps_T=steps_T,
            load_entropy_TL=entropy_TL,
            route_entropy_TL=np.clip(entropy_TL - 0.2, 0, 1),
            max_load_TL=self.loads_TLE[upto].max(axis=2),
            n_eff_L=np.exp(entropy_TL[-1] * np.log(self.num_experts)) if step >= 0 else np.zeros(shape[0]),
            drop_rate_L=np.zeros(shape[0], np.float32),
            scalars={
                "loss": Series(steps=steps_T, values=self.loss_T[upto]),
                "lr": Series(steps=steps_T, values=np.full(len(steps_T), 3e-4)),
                "grad_norm": Series(steps=steps_T, values=1.2 + 0.1 * np.cos(steps_T)),
                "tokens_per_second": Series(steps=steps_T, values=np.full(len(steps_T), 2310.0)),
            },
            alerts=self.alerts(step),
        )


class ListFeed:
    """Shows the snapshots it is given, one after the other as `advance` is called; an exception is raised."""

    def __init__(self, *moments: Snapshot | Exception | None) -> None:
        self.moments = list(moments)
        self.at = 0
        self.started = self.stopped = 0

    @property
    def latest(self) -> Snapshot | None:
        moment = self.moments[self.at]
        if isinstance(moment, Exception):
            raise moment
        return moment

    def advance(self) -> None:
        self.at = min(self.at + 1, len(self.moments) - 1)

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1


class FakeArchive:
    """Older loads, sequences and routes of a synthetic run."""

    def __init__(self, run: SyntheticRun) -> None:
        self.run = run
        self.closed = False
        self.asked: list[str] = []
        self.latent_kind: LatentKind | None = "mla"

    def loads(self, first_step: int, last_step: int) -> LoadHistory:
        self.asked.append("loads")
        return LoadHistory(
            np.arange(first_step, last_step + 1), self.run.loads_TLE[first_step : last_step + 1]
        )

    def sequences(self) -> list[SequenceRef]:
        self.asked.append("sequences")
        return [
            SequenceRef(
                step=self.run.steps - 1,
                rank=0,
                seq=seq,
                domain=domain,
                num_tokens=len(tokens(TEXTS[seq])),
                mean_loss=2.5 + seq,
            )
            for seq, domain in enumerate(("code", "story", "mixed"))
        ]

    def trace(self, ref: SequenceRef) -> TokenTrace:
        self.asked.append("trace")
        texts = tokens(TEXTS[ref.seq])
        rng = np.random.default_rng(ref.seq)
        num_layers, num_experts, top_k = self.run.info.num_layers, self.run.num_experts, self.run.top_k
        kinds = np.array([kind(text) for text in texts])
        scores_LSE = rng.gumbel(0, 1, (num_layers, len(texts), num_experts))
        taste_LCE = np.random.default_rng(1).normal(0, 2.2, (num_layers, 5, num_experts))
        scores_LSE += taste_LCE[:, kinds]
        experts_LSK = np.argsort(-scores_LSE, axis=2)[:, :, :top_k]
        chosen = np.exp(np.take_along_axis(scores_LSE, experts_LSK, axis=2) / 2)
        return TokenTrace(
            ref=ref,
            layers=tuple(range(num_layers)),
            experts_LSK=experts_LSK,
            weights_LSK=(chosen / chosen.sum(axis=2, keepdims=True)).astype(np.float32),
            texts=texts,
            loss_S=np.append(rng.gamma(2, 1, len(texts) - 1), np.nan),
        )

    def flow(self, layer: int) -> Flow | None:
        self.asked.append("flow")
        if layer + 1 >= self.run.info.num_layers:
            return None
        rng = np.random.default_rng(layer)
        affinity_EE = np.exp(rng.normal(0, 0.3, (self.run.num_experts,) * 2))
        affinity_EE[np.arange(self.run.num_experts), rng.permutation(self.run.num_experts)] *= 8
        counts_EE = rng.poisson(affinity_EE * 40).astype(np.float64)
        return Flow(layer=layer, next_layer=layer + 1, counts_EE=counts_EE, steps="steps 120 to 159")

    def latents(self, place: LatentPlace) -> LatentSheet | None:
        """Two blocks of the `latent_kind`: latents of 24 numbers, or 16 slots."""
        self.asked.append("latents")
        if self.latent_kind is None or place.step < 0:
            return None
        mla = self.latent_kind == "mla"
        part = PARTS[self.latent_kind][place.part]
        block = 2 if place.block is None else place.block
        rng = np.random.default_rng((block, place.part, place.head))
        texts, cols = tokens(TEXTS[0]), 24 if mla else 16
        grid_SC = rng.normal(size=(len(texts), cols)) if mla else rng.dirichlet(np.ones(cols), len(texts))
        steps = np.arange(0, place.step + 1, 10)
        profile_TC = np.abs(rng.normal(1, 0.3, (len(steps), cols))) * np.linspace(0.2, 1, len(steps))[:, None]
        names = TELLING[self.latent_kind]
        return LatentSheet(
            kind=self.latent_kind,
            part=part,
            blocks=(0, 2),
            block=block,
            step=int(steps[-1]),
            heads=() if mla else (0, 1, 2),
            head=place.head,
            tokens=1024,
            first=0,
            length=len(texts),
            texts=texts,
            grid_SC=grid_SC.astype(np.float32),
            singular_R=np.geomspace(9, 0.2, cols),
            steps_T=steps,
            profile_TC=profile_TC,
            values=tuple(
                LatentValue(by_id(name).name, 3.25 / (1 + at), by_id(name).unit, by_id(name).how_to_read)
                for at, name in enumerate(names)
            ),
        )

    def close(self) -> None:
        self.closed = True


def tokens(text: str) -> tuple[str, ...]:
    """Words with the blank before them, digits and marks one by one."""
    return tuple(re.findall(r"\n| ?[^\W\d_]+|\d| +|[^\w\s]|\w", text))


def kind(text: str) -> int:
    """Five classes that experts prefer: names, words, digits, marks, blanks."""
    bare = text.strip()
    if not bare:
        return 4
    if bare.isdigit():
        return 2
    if not bare.isalpha():
        return 3
    return 0 if bare[0].isupper() or not bare.isascii() else 1


class FakeLibrary:
    """Three runs; each opens as the synthetic one it is given."""

    def __init__(self, sources: dict[str, Source] | None = None) -> None:
        self.sources = sources or {}

    def runs(self) -> list[RunRow]:
        def row(name: str, **changes: object) -> RunRow:
            values = {
                "path": Path("runs") / name,
                "name": name,
                "state": "live",
                "step": 159,
                "planned_steps": 320,
                "shape": "24 × 64, top 8",
                "loss": 2.712,
                "worst_entropy": 0.41,
                "open_alerts": 2,
                "age_seconds": 840.0,
            }
            return RunRow(**{**values, **changes})  # type: ignore[arg-type]

        return [
            row("olmo-24x64"),
            row("demo-4x8", state="ended", step=600, planned_steps=600, shape="4 × 8, top 2", loss=1.842,
                worst_entropy=0.97, open_alerts=0, age_seconds=5400.0),
            row("broken", state="dead", step=-1, planned_steps=None, loss=float("nan"),
                worst_entropy=float("nan"), open_alerts=0, age_seconds=90_000.0),
        ]  # fmt: skip

    def open(self, path: Path) -> Source:
        return self.sources[path.name]
