"""The fixed probe: the same tokens run through the model again and again while it trains, in evaluation mode.

What changes between two passes is the model alone, so saturation, churn and specialisation over training can be
told from it. Training must not notice: modes, gradients, random states, autocast's cache and compiled graphs are left
as they were, and no load or counter of the step sees these tokens.

    probe = FixedProbe(sites, probe_inputs(batch), rank=0, record=True)
    deferred = probe.run(step)              # on every rank; the weights have seen `step` optimizer steps

Shapes: N sequences of S tokens, L layers that share E and K.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeviz.capture.failures import ProbeError
from moeviz.capture.layer_groups import LayerGroup, group_layers
from moeviz.capture.micro_batch import parameter_names, read_call
from moeviz.capture.probe_decisions import DECISION_VALUES, decision_values
from moeviz.capture.probe_readings import HeadWatch, RouterWatch, drift
from moeviz.capture.reading import Reading
from moeviz.capture.reduce import scores_of, stack
from moeviz.capture.sampling import cut_rows, selection_scores
from moeviz.capture.scoring import score_of
from moeviz.capture.sites import Sites
from moeviz.capture.stages import Share, handed_in
from moeviz.capture.transfer import HostCopy
from moeviz.errors import MoevizError
from moeviz.records import ProbeRecord, SequenceRecord, TokenRoutingRecord

PASS_TOKENS = 2048
"""Tokens of one forward at most."""
_KEPT_SCORES = 2**26
"""Scores of a pass that are kept for the drift at most, 128 MB in half precision; larger probes have no drift."""
_SEED = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeInputs:
    """What the model is called with, all sequences at once, and what is known about them."""

    positional: Tensor | None
    """Token ids [N, S] as the only argument; None: `keywords` are the arguments."""
    keywords: Mapping[str, Any]
    token_ids_NS: np.ndarray
    """int32."""
    valid_NS: np.ndarray
    """bool, False at padding."""
    domains: tuple[str | None, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.domains)

    def rows(self, first: int, stop: int, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """(arguments, keyword arguments) of a forward over some of the sequences."""
        count = self.num_sequences

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value[first:stop] if value.ndim and len(value) == count else value).to(device)

        args = () if self.positional is None else (part(self.positional),)
        return args, {name: part(value) for name, value in self.keywords.items()}


def probe_inputs(batch: Any, root: nn.Module) -> ProbeInputs:
    """Take a probe as users have it, and copy it.

    Args:
        batch: token ids [N, S]; or the model's keyword arguments as a mapping, in which `domains`, if given, names
            each sequence; or an object with `token_ids_NS` and `domains` (`moeviz.inspection.ProbeBatch`).
        root: the model that will be called.

    Raises:
        MoevizError: nothing in it looks like token ids, or the domains do not fit.
    """
    keywords: dict[str, Any] = {}
    positional: Tensor | None = None
    domains: Sequence[str | None] | None = None
    if isinstance(batch, Mapping):
        keywords = {name: _copied(value) for name, value in batch.items() if name != "domains"}
        domains = batch.get("domains")
    elif hasattr(batch, "token_ids_NS"):
        positional, domains = _copied(batch.token_ids_NS), batch.domains
    else:
        positional = _copied(batch)
    given = () if positional is None else (positional,)
    call = read_call(0, parameter_names(root), given, keywords) if _are_tensors(given) else None
    if call is None or call.ids_BS is None:
        raise MoevizError(
            "probe_batch has no token ids [N, S] among its tensors; give them alone, or as input_ids in a mapping"
        )
    ids_NS = call.ids_BS.cpu().numpy()
    valid_NS = np.ones(ids_NS.shape, dtype=bool)
    if call.valid_BS is not None:
        valid_NS = call.valid_BS.cpu().numpy()
    labels = tuple([None] * len(ids_NS) if domains is None else domains)
    if len(labels) != len(ids_NS):
        raise MoevizError(
            f"probe_batch names {len(labels)} domains for {len(ids_NS)} sequences; give one for each"
        )
    return ProbeInputs(
        positional=positional,
        keywords=keywords,
        token_ids_NS=ids_NS.astype(np.int32),
        valid_NS=valid_NS,
        domains=labels,
    )


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.detach().clone() if isinstance(value, Tensor) else value


def _are_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


Part = tuple[Sequence[Sequence[int]], Mapping[str, np.ndarray]]
"""Layer groups of a stage, and its arrays by the names that `ProbePass.copy` gives them."""


@dataclass(eq=False, kw_only=True)
class ProbePass:
    """One pass on its way from the device; `materialize` runs in the writer's thread."""

    step: int
    rank: int
    inputs: ProbeInputs
    copy: HostCopy
    """`experts/G`, `weights/G` of layer group G, `values/NAME` [L], `heads/BLOCK` [H]."""
    groups: Sequence[Sequence[int]]
    value_names: Sequence[str]
    blocks: Sequence[int]
    ts: float
    droppable: bool = field(default=False, init=False)

    @property
    def nbytes(self) -> int:
        return self.copy.nbytes

    def arrays(self) -> Part:
        """What it saw, as another process can be handed it."""
        return self.groups, self.copy.arrays()

    def joined(self, parts: Sequence[Part]) -> ProbePass:
        """The pass of a whole model, from those of its stages; this one's among them."""
        arrays: dict[str, np.ndarray] = {}
        groups: list[Sequence[int]] = []
        for layers, told in parts:
            for name, values in told.items():
                kind, _, rest = name.partition("/")
                if kind in ("experts", "weights"):
                    arrays[f"{kind}/{len(groups) + int(rest)}"] = values
                elif name in arrays:
                    arrays[name] = np.where(np.isnan(arrays[name]), values, arrays[name])
                else:
                    arrays[name] = values
            groups += layers
        names = [name.partition("/") for name in arrays]
        return replace(
            self,
            copy=HostCopy({name: torch.from_numpy(values) for name, values in arrays.items()}),
            groups=groups,
            value_names=tuple(rest for kind, _, rest in names if kind == "values"),
            blocks=tuple(sorted(int(rest) for kind, _, rest in names if kind == "heads")),
        )

    def materialize(self) -> Iterator[ProbeRecord]:
        """The record of the pass."""
        arrays = self.copy.arrays()
        places = [np.flatnonzero(valid_S) for valid_S in self.inputs.valid_NS]
        lengths_N = np.array([len(place) for place in places], dtype=np.int32)
        seqs = np.arange(len(places))
        ids_NS = np.zeros((len(places), int(lengths_N.max(initial=0))), dtype=np.int32)
        for n, place in enumerate(places):
            ids_NS[n, : len(place)] = self.inputs.token_ids_NS[n, place]
        routings = []
        for group, layers in enumerate(self.groups):
            experts_LNSK = arrays[f"experts/{group}"].view(np.uint16)
            weights_LNSK = np.asarray(arrays[f"weights/{group}"], dtype=np.float32)
            routings.append(
                TokenRoutingRecord(
                    step=self.step,
                    rank=self.rank,
                    layers=np.array(layers, dtype=np.int64),
                    seqs=seqs,
                    experts_LNSK=_packed(experts_LNSK, places, ids_NS.shape[1]),
                    weights_LNSK=_packed(weights_LNSK, places, ids_NS.shape[1]),
                    lengths_N=lengths_N,
                )
            )
        yield ProbeRecord(
            step=self.step,
            rank=self.rank,
            sequences=SequenceRecord(
                step=self.step,
                rank=self.rank,
                seqs=seqs,
                token_ids_NS=ids_NS,
                lengths_N=lengths_N,
                domains=self.inputs.domains,
            ),
            routings=tuple(routings),
            layer_values={name: arrays[f"values/{name}"] for name in self.value_names},
            ts=self.ts,
            head_entropy={block: arrays[f"heads/{block}"] for block in self.blocks},
        )


def _packed(values_LNSK: np.ndarray, places: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Valid tokens first: what a reader expects of a sequence."""
    packed = np.zeros((*values_LNSK.shape[:2], width, values_LNSK.shape[3]), dtype=values_LNSK.dtype)
    for n, place in enumerate(places):
        packed[:, n, : len(place)] = values_LNSK[:, n, place]
    return packed


class FixedProbe:
    """Runs one probe through one model."""

    def __init__(
        self,
        sites: Sites,
        inputs: ProbeInputs,
        *,
        rank: int = 0,
        record: bool = True,
        share: Share | None = None,
    ) -> None:
        """
        Args:
            record: whether this rank keeps what it sees. All ranks run the probe: ZeRO-3 gathers weights together.
            share: the layers that are here, where several processes hold the model; the first is told of all of them.
        """
        self._sites, self._inputs, self._rank, self._record = sites, inputs, rank, record
        self._share = share or Share(layers=frozenset(range(len(sites.routers))))
        groups = [
            group
            for group in group_layers(sites.routers)
            if not any(site.experts_choose for site in group.sites)
        ]
        self._groups = [group for group in groups if self._share.layers.issuperset(group.layers)]
        if not groups:
            raise ProbeError(
                "the experts of this model choose their tokens, so a token has no choice that could change; "
                "leave probe_batch out"
            )
        self._before: dict[int, Tensor] = {}

    @property
    def inputs(self) -> ProbeInputs:
        return self._inputs

    def run(self, step: int) -> ProbePass | None:
        """One pass. None where this rank does not record.

        Raises:
            ProbeError: a router did not run as often as the model.
        """
        root = self._sites.root
        valid_NS = None if self._inputs.valid_NS.all() else torch.from_numpy(self._inputs.valid_NS)
        rows = max(1, PASS_TOKENS // self._inputs.token_ids_NS.shape[1])
        device = next(each.device for each in root.parameters() if not each.is_meta)
        with ExitStack() as stack_, apart_from_training(root):
            watches = [RouterWatch(root, site, self._record) for site in self._sites.routers]
            for watch in watches:
                stack_.callback(watch.remove)
            first_valid = None if valid_NS is None else valid_NS[:rows]
            heads = HeadWatch(self._sites.cores if self._record else (), first_valid)
            stack_.callback(heads.remove)
            for first in range(0, self._inputs.num_sequences, rows):
                args, keywords = self._inputs.rows(first, first + rows, device)
                root(*args, **keywords)
            with torch.autocast(device.type, enabled=False):
                seen = self._pass(step, watches, heads, device) if self._record else None
        if self._share.group is None:
            return seen
        parts = handed_in(None if seen is None else seen.arrays(), self._share.group)
        return seen.joined([part for part in parts if part is not None]) if seen and parts else None

    def _pass(
        self, step: int, watches: list[RouterWatch], heads: HeadWatch, device: torch.device
    ) -> ProbePass:
        tensors: dict[str, Tensor] = {}
        drift_L = torch.full((len(watches),), float("nan"), device=device)
        decided_RL = torch.full((len(DECISION_VALUES), len(watches)), float("nan"), device=device)
        for index, group in enumerate(self._groups):
            readings = [self._joined(watches[layer]) for layer in group.layers]
            experts, weights, probs_LTE, values_RL = self._decisions(group, readings)
            tensors[f"experts/{index}"], tensors[f"weights/{index}"] = experts, weights
            layers = torch.tensor(group.layers)
            drift_L[layers] = self._drift(index, probs_LTE).to(device)
            decided_RL[:, layers] = values_RL.to(device)
        values = {"probe_drift": drift_L, **dict(zip(DECISION_VALUES, decided_RL, strict=True))}
        names = {"router_cos": "cosine_mean", "router_cos_max": "cosine_max", "pes": "alike"}
        for name, attribute in names.items():
            each = [getattr(watch, attribute) for watch in watches]
            if any(value is not None for value in each):
                nan = torch.full((), float("nan"), device=device)
                values[name] = torch.stack([nan if value is None else value.to(device) for value in each])
        tensors |= {f"values/{name}": value for name, value in values.items()}
        blocks = {self._sites.info.attentions[at].layer: found for at, found in heads.entropies.items()}
        tensors |= {f"heads/{block}": found for block, found in blocks.items()}
        return ProbePass(
            step=step,
            rank=self._rank,
            inputs=self._inputs,
            copy=HostCopy({name: tensor.detach() for name, tensor in tensors.items()}),
            groups=[group.layers for group in self._groups],
            value_names=tuple(values),
            blocks=tuple(blocks),
            ts=time.time(),
        )

    def _joined(self, watch: RouterWatch) -> Reading:
        """The readings of all forwards of a pass as one."""
        readings = watch.readings
        tokens = sum(len(reading.logits_TE) for reading in readings)
        if tokens != self._inputs.token_ids_NS.size:
            raise ProbeError(
                f"router {watch.site.name} saw {tokens} tokens of a probe of {self._inputs.token_ids_NS.size}; "
                "it must see every token of the probe once"
            )
        return Reading(
            torch.cat([reading.logits_TE for reading in readings]),
            torch.cat([reading.weights_TK for reading in readings]),
            torch.cat([reading.expert_ids_TK for reading in readings]),
        )

    def _decisions(self, group: LayerGroup, readings: list[Reading]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids int16, weights half) [L, N, S, K] by falling selection score, scores [L, T, E], `decision_values`."""
        decisions = stack(readings)
        if not group.checked:
            group.score, group.checked = score_of(decisions, group.score), True
        shape = self._inputs.token_ids_NS.shape
        rows_N = torch.arange(shape[0], device=decisions.logits_LTE.device)
        bias_LE = group.bias()
        rank_LTK = selection_scores(decisions, group.score, bias_LE)
        experts, weights = cut_rows(decisions, rows_N, shape, rank_LTK)
        probs_LTE = scores_of(decisions.logits_LTE, group.score).probs_LTE
        values_RL = decision_values(
            decisions, group.score, probs_LTE, bias_LE, self._valid_T(probs_LTE.device)
        )
        return experts, weights.half(), probs_LTE, values_RL

    def _valid_T(self, device: torch.device) -> Tensor | None:
        """False at padding; None where there is none."""
        if self._inputs.valid_NS.all():
            return None
        return torch.from_numpy(self._inputs.valid_NS.reshape(-1)).to(device)

    def _drift(self, group: int, probs_LTE: Tensor) -> Tensor:
        """How far the scores of valid tokens moved since the last pass, [L]; NaN at the first one."""
        if probs_LTE.numel() > _KEPT_SCORES:
            return probs_LTE.new_full((len(probs_LTE),), float("nan"))
        valid_T = self._valid_T(probs_LTE.device)
        if valid_T is not None:
            probs_LTE = probs_LTE[:, valid_T]
        before_LTE = self._before.get(group)
        self._before[group] = probs_LTE.half()
        if before_LTE is None:
            return probs_LTE.new_full((len(probs_LTE),), float("nan"))
        return drift(before_LTE, self._before[group])


@contextmanager
def apart_from_training(root: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and everything as it was afterwards, to the bit.

    Modes are set on the modules themselves: a model may override `train`. Stochastic layers that ignore the mode draw
    the same numbers in every pass. Compiled modules run uncompiled, so that no graph is added.
    """
    training = [module for module in root.modules() if module.training]
    devices = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    caches = torch.is_autocast_cache_enabled()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _uncompiled():
            for module in training:
                module.training = False
            # A weight that is cast without gradients must not be found by the next forward of training.
            torch.set_autocast_cache_enabled(False)
            torch.default_generator.manual_seed(_SEED)
            for index in devices:
                torch.cuda.default_generators[index].manual_seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)
            yield
    finally:
        for module in training:
            module.training = True
        torch.set_autocast_cache_enabled(caches)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _uncompiled() -> Any:
    set_stance = getattr(torch.compiler, "set_stance", None)
    if "torch._dynamo" not in sys.modules or set_stance is None:
        return nullcontext()
    return set_stance("force_eager")
