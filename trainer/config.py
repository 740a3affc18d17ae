"""Everything that decides a training run, as plain data: frozen dataclasses, one for each part of it.

No torch here, so that a command line is parsed, or refused, in a moment. Every field is a flag of `moeviz
train` (tyro, prefixes omitted): a name is used once in the tree, the model's and the policy's included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from model.config import ModelConfig, RouterConfig
from moeviz.alerts import AlertConfig, Command, Webhook
from moeviz.bridges import Tracking
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from moeviz.records import Severity
from trainer.data_mixture import parse_mixture
from trainer.engine_config import EngineConfig
from trainer.guard_config import GuardConfig, PruneConfig
from trainer.optim_config import BalanceConfig, OptimConfig, ScheduleConfig, require_rule
from trainer.response_config import ResponseConfig

__all__ = [
    "AlertingConfig",
    "BalanceConfig",
    "CheckpointConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "InputConfig",
    "OptimConfig",
    "PruneConfig",
    "ResponseConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "flag_names",
]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What is read, and in which portions; how sources are opened is `trainer.data`'s business."""

    train_data: str | tuple[str, ...] = "builtin"
    """One source or several: builtin (the embedded corpus), generated (its synthetic part), a file or folder of text or
    JSON Lines, token files, a folder of `moeviz prepare`, hf:NAME. NAME=SOURCE makes NAME the domain of all of it."""
    val_data: str | None = None
    """A file or folder to evaluate on. None: documents held out of the training data."""
    tokenizer: str = "auto"
    """auto (that of prepared data, else a byte-level BPE trained on the data), the name of a tiktoken encoding, or a
    file: a run's tokenizer, or a tokenizer.json of Hugging Face."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    bytes_per_domain: int = 560_000
    """Size of each domain of the embedded corpus."""
    domain_weights: Literal["natural", "uniform"] = "natural"
    """How often each domain is read: in proportion to its tokens, or all alike."""
    mixture: tuple[str, ...] = ()
    """NAME=SHARE ...: how often each domain is read, instead of domain_weights; domains left out are not. A source's
    name stands for all its domains."""
    document_mask: bool = False
    """A token reads its own document only, not what stands before it in the same sequence."""
    seq_len: int = 128
    """Tokens of one sequence."""
    batch_size: int = 16
    """Sequences of one micro-batch, on each rank."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            require_rule(value >= 1, f"{name}={value}", "is below 1; give a positive number")
        fraction = self.validation_fraction
        require_rule(0 <= fraction < 1, f"validation_fraction={fraction}", "is not in [0, 1); 0.05 is usual")
        parse_mixture(self.mixture)  # refuses nonsense here, before anything is built

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step on one rank."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on one rank."""
        return self.sequences_per_step * self.seq_len


@dataclass(frozen=True, kw_only=True)
class AlertingConfig:
    """What is judged a problem, and who else is told; alerts are always kept in the run and printed."""

    alert_thresholds: tuple[str, ...] = ()
    """NAME=VALUE ...: thresholds of `moeviz.alerts.AlertConfig` that differ, for example starved_cap=0.3."""
    circulating_rules: bool = False
    """Also judge by rules that many repeat without a source (an expert under 5 %, gradient norm over 10 ...)."""
    on_alert_command: str | None = None
    """Run this for each alert, with it as JSON on standard input; {rule}, {severity}, {layer}, {step} are filled in.
    Not kept with the run: give it again to resume."""
    on_alert_url: str | None = None
    """Post each alert as JSON to this address, tried again when that fails. Not kept with the run."""
    alert_min_severity: Severity = "warning"
    """Mildest severity that the command and the address are told about."""

    def __post_init__(self) -> None:
        self.rules  # noqa: B018  # refuses unknown thresholds here, before anything is built
        if self.on_alert_command is not None:
            Command(self.on_alert_command)
        if self.on_alert_url is not None:
            Webhook(self.on_alert_url)

    @property
    def rules(self) -> AlertConfig:
        """Every threshold."""
        return AlertConfig(circulating=self.circulating_rules).with_thresholds(self.alert_thresholds)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Trackers that are told of scalars, metrics, load pictures and alerts, beside the run folder."""

    use_wandb: bool = False
    """Weights & Biases: as WANDB_MODE says, and offline (RUN/wandb) without an API key."""
    use_tensorboard: bool = False
    """TensorBoard: event files in RUN/tensorboard."""
    use_trackio: bool = False
    """trackio: its local database."""
    tracker_project: str = "moeviz"
    """Project of the run in W&B and trackio."""
    tracker_every: int = 10
    """Steps between two that metrics and loads are told of; scalars are told always."""

    def __post_init__(self) -> None:
        self.trackers  # noqa: B018  # refuses bad values here

    @property
    def trackers(self) -> Tracking:
        """Which trackers, and how often."""
        names = [name for name in ("wandb", "tensorboard", "trackio") if getattr(self, f"use_{name}")]
        return Tracking(names=tuple(names), project=self.tracker_project, every=self.tracker_every)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Loss on fixed held-out sequences, for each domain."""

    eval_every: int = 100
    """Evaluate every n steps, and before the first and after the last. 0: never."""
    eval_sequences: int = 32
    """Sequences of each domain, the same ones every time."""
    probe_every: int = 100
    """With --log-routing: route a fixed probe of held-out text every n steps, to see decisions settle and experts
    specialise. 0: never."""
    probe_sequences: int = 4
    """Sequences of each domain in the probe, of 64 tokens at most; a step's worth of tokens costs a third of a step."""

    def __post_init__(self) -> None:
        require_rule(self.eval_every >= 0, f"eval_every={self.eval_every}", "is negative; 0 means never")
        require_rule(self.probe_every >= 0, f"probe_every={self.probe_every}", "is negative; 0 means never")
        sequences = self.probe_sequences
        require_rule(sequences >= 1, f"probe_sequences={sequences}", "is below 1; 4 is usual")
        require_rule(
            self.eval_sequences >= 1, f"eval_sequences={self.eval_sequences}", "is below 1; 32 is usual"
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of the run's state."""

    save_every: int = 100
    """Write a checkpoint every n steps, and always after the last. 0: only then."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Keep the weights with the least validation loss too, as RUN/checkpoints/best."""

    def __post_init__(self) -> None:
        require_rule(
            self.save_every >= 0, f"save_every={self.save_every}", "is negative; 0 means at the end only"
        )
        kept = self.keep_checkpoints
        require_rule(kept >= 1, f"keep_checkpoints={kept}", "is below 1; a run keeps its newest")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Two runs with equal configs on one machine are equal to the bit."""

    preset: str = "demo"
    """Named set of defaults for everything below; `moeviz train --preset NAME --help` shows its values."""
    run: Path | None = None
    """Run folder. None: runs/<preset>-<date>-<time>."""
    resume: str | None = None
    """Continue a run or one of its checkpoints; without a value: the run of --run, else the newest."""
    init_from: str | None = None
    """Begin with the weights, the architecture and the tokenizer of a run, a checkpoint or a transformers folder,
    with a fresh optimizer and a tenth of its learning rate."""
    freeze: tuple[str, ...] = ()
    """Parts that keep their weights: router, experts, shared_experts, attention, embeddings, norms, or globs over
    parameter names."""
    train_only: tuple[str, ...] = ()
    """Parts that alone are trained."""
    max_steps: int = 400
    """Optimizer steps of the whole run."""
    max_minutes: float | None = None
    """End after so many minutes of training as if max_steps were reached, to fit a slot. None: no limit."""
    seed: int = 0
    """Decides initial weights and the order of the data."""
    log_routing: bool = False
    """Record which expert every token goes to, for `moeviz tui` and the dashboards."""
    log_every: int = 10
    """Print a line every n steps where the output is not a terminal."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    data: InputConfig = field(default_factory=InputConfig)
    """Text and batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Load balancing."""
    sampling: SamplingPolicy = field(default_factory=SamplingPolicy)
    """How much routing --log-routing records."""
    alerting: AlertingConfig = field(default_factory=AlertingConfig)
    """Alerts."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Other trackers."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Bad steps."""
    response: ResponseConfig = field(default_factory=ResponseConfig)
    """Interventions."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """Experts that leave."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine, precision, device."""

    def __post_init__(self) -> None:
        require_rule(
            self.max_steps >= 1, f"max_steps={self.max_steps}", "is below 1; give the number of steps"
        )
        minutes = self.max_minutes
        require_rule(
            minutes is None or minutes > 0,
            f"max_minutes={minutes}",
            "is not positive; leave it out for no limit",
        )
        require_rule(self.log_every >= 1, f"log_every={self.log_every}", "is below 1; 10 is usual")
        require_rule(self.seed >= 0, f"seed={self.seed}", "is negative; give 0 or a positive number")
        self._check_optimizer()
        self._check_responses()
        self._check_pruning()
        self._check_stages()
        self._check_experts()

    def _check_pruning(self) -> None:
        before = self.model.num_experts
        for step, experts in sorted(self.prune.plan.items()):
            if self.prune.grows_at(step):
                require_rule(
                    before < experts <= 2 * before,
                    f"grow_experts {step}={experts}",
                    f"is not between the {before} experts before and twice as many; grow in several steps",
                )
            else:
                require_rule(
                    self.model.top_k <= experts < before,
                    f"prune_experts {step}={experts}",
                    f"is not between top_k={self.model.top_k} and the {before} experts before, so nothing can leave",
                )
            before = experts
        engine = self.engine
        if self.prune.plan and engine.engine == "deepspeed" and engine.zero_stage == 3:
            raise MoevizError(
                "prune_experts needs whole weights, and zero_stage=3 has none; use --zero-stage 2 or less, or --engine "
                "torch"
            )
        if self.prune.plan and engine.expert_parallel > 1:
            raise MoevizError(
                f"prune_experts with expert_parallel={engine.expert_parallel}: no rank holds all experts; leave one out"
            )
        self._check_masters("prune_experts", bool(self.prune.plan))

    def _check_experts(self) -> None:
        ranks, experts = self.engine.expert_parallel, self.model.num_experts
        if ranks > 1 and self.model.num_moe_layers == 0:
            raise MoevizError(f"expert_parallel={ranks}, and this model has no experts; leave it out")
        if ranks > 1 and experts % ranks:
            raise MoevizError(
                f"expert_parallel={ranks} does not divide num_experts={experts}; every rank holds as many"
            )
        if self.engine.has_deepspeed_experts and self.engine.zero_stage and self.optim.optimizer != "adamw":
            raise MoevizError(
                f"expert_parallel={ranks} with optimizer={self.optim.optimizer} needs whole matrices; use "
                "--zero-stage 0 or --optimizer adamw"
            )
        if self.engine.expert_gate == "deepspeed":
            self._check_gate()

    def _check_gate(self) -> None:
        """DeepSpeed's gate has none of the router's variants."""
        told, router = "expert_gate=deepspeed", self.architecture.router
        if self.model.num_moe_layers == 0:
            raise MoevizError(f"{told}, and this model has no experts; leave it out")
        plain = RouterConfig(
            norm_topk=self.model.top_k > 1,
            capacity_factor=router.capacity_factor,
            drop_order=router.drop_order,
            balance_scope=router.balance_scope,
        )
        for each in fields(RouterConfig):
            wanted, asked = getattr(plain, each.name), getattr(router, each.name)
            if wanted != asked:
                how = "choose --balance aux" if each.name == "selection_bias" else f"it has {wanted}"
                raise MoevizError(
                    f"{told} with {each.name}={asked}, which DeepSpeed's gate does not know ({how}); change it, or "
                    "leave --expert-gate out"
                )
        if self.optim.optimizer == "muon":
            raise MoevizError(
                f"{told} with optimizer=muon would turn the gate as well; use --optimizer adamw"
            )
        if "reinit_router" in {response.action for response in self.response.responses}:
            raise MoevizError(
                f"{told} with on_alert reinit_router: the router is DeepSpeed's; leave one of them out"
            )
        if self.prune.plan:
            raise MoevizError(
                f"{told} with prune_experts: experts leave the model's router only; leave one out"
            )

    def _check_stages(self) -> None:
        stages, layers = self.engine.pipeline_stages, self.model.num_layers
        if stages == 1:
            return
        told = f"pipeline_stages={stages}"
        require_rule(
            stages <= layers,
            told,
            f"exceeds num_layers={layers}, and every stage needs a block; give at most {layers}",
        )
        if self.prune.plan:
            raise MoevizError(
                f"{told} with prune_experts or grow_experts: no rank has all experts; use --pipeline-stages 1"
            )
        if "reinit_router" in {response.action for response in self.response.responses}:
            raise MoevizError(
                f"{told} with on_alert reinit_router: the router may be another rank's; use another action, or "
                "--pipeline-stages 1"
            )
        if self.log_routing and self.sampling.has_budget:
            raise MoevizError(
                f"{told} with a limit on samples: each stage would thin its own and the rest not fit together; lower "
                "--route-sequences or raise --route-every instead"
            )

    def _check_responses(self) -> None:
        actions = {response.action for response in self.response.responses}
        for action, balance in (("raise_bias", "bias"), ("raise_aux", "aux")):
            if action in actions and self.balance.balance != balance:
                raise MoevizError(
                    f"on_alert {action} with balance={self.balance.balance} changes nothing; use --balance {balance}"
                )
        if "reinit_router" in actions and self.engine.engine == "deepspeed" and self.engine.zero_stage == 3:
            raise MoevizError(
                "on_alert reinit_router cannot reach divided weights; use --zero-stage 2 or less"
            )

    def _check_masters(self, what: str, wanted: bool) -> None:
        engine = self.engine
        if wanted and engine.engine == "deepspeed" and (engine.zero_stage, engine.dtype) == (0, "fp16"):
            raise MoevizError(
                f"{what} with dtype=fp16 needs the fp32 masters of ZeRO; use --zero-stage 1 or 2, or --engine torch"
            )

    def _check_optimizer(self) -> None:
        name, shape, engine = self.optim.optimizer, self.schedule.schedule, self.engine
        if name == "schedulefree" and shape != "constant":
            raise MoevizError(
                f"optimizer=schedulefree with schedule={shape} lowers the rate twice; add --schedule constant"
            )
        divided = engine.engine == "deepspeed" and engine.zero_stage == 3
        if name == "schedulefree" and divided:
            raise MoevizError(
                "optimizer=schedulefree evaluates other weights than it trains, and zero_stage=3 has neither whole; "
                "use --zero-stage 2 or less, or --engine torch"
            )
        self._check_masters(f"optimizer={name}", name == "schedulefree")

    @property
    def architecture(self) -> ModelConfig:
        """The model's config as it is built: as long as its sequences, with the bias that balancing needs."""
        model = self.model
        bias = model.router.selection_bias or self.balance.balance == "bias"
        return replace(
            model,
            max_seq_len=max(model.max_seq_len, self.data.seq_len),
            router=replace(model.router, selection_bias=bias),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data for JSON, the inverse of `from_dict`.

        Without commands and addresses for alerts: they often hold secrets, and this goes into run folders.
        """
        told_nobody = replace(self.alerting, on_alert_command=None, on_alert_url=None)
        untold = replace(self.response, on_alert=self.response.kept)
        return _plain(asdict(replace(self, alerting=told_nobody, response=untold)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Build a config from `to_dict`'s output. Raises MoevizError for an unknown field."""
        try:
            return _build(cls, data)
        except TypeError as error:
            raise MoevizError(
                f"this config does not fit this version of moeviz ({error}); use the version that wrote it"
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _build(kind: type, data: Mapping[str, Any]) -> Any:
    if kind is ModelConfig:
        return ModelConfig.from_dict(data)
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in data.items():
        hint = hints.get(name)
        if isinstance(hint, type) and is_dataclass(hint):
            value = _build(hint, value)
        elif hint == (Path | None) and value is not None:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return kind(**values)


def flag_names(kind: type = TrainConfig) -> list[str]:
    """Every flag of the command line, in the order of the fields, nested ones included."""
    hints = get_type_hints(kind)
    names: list[str] = []
    for each in fields(kind):
        hint = hints[each.name]
        if isinstance(hint, type) and is_dataclass(hint):
            names += flag_names(hint)
        else:
            names.append("--" + each.name.replace("_", "-"))
    return names
