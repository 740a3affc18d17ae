"""Putting a run together: text, model, engine, recorder, and the state of a checkpoint where there is one.

The order matters. Cheap refusals come first; the seed is set just before the model draws its weights; the
recorder attaches its hooks last, so nothing it does can touch the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.lm import MoELanguageModel
from moeviz.alerts import Command, Notifier, Webhook, alert_line
from moeviz.bridges import check_trackers
from moeviz.errors import MoevizError
from moeviz.records import AlertRecord
from trainer.allocator import keep_freed_memory
from trainer.checkpoint import Checkpoint, restore
from trainer.checkpoint_folder import list_checkpoints, set_aside_after
from trainer.config import TrainConfig
from trainer.engine import Engine, build_engine, choose_device, set_threads
from trainer.engine_deepspeed_config import deepspeed_config
from trainer.frozen import freeze
from trainer.judge import JUDGE_FILE, Judge
from trainer.micro_batches import largest_that_fits
from trainer.origin import Origin, find_origin, model_from
from trainer.pipeline_layout import Layout
from trainer.process_group import agree_on, join_ranks, launched_ranks, local_rank, rank_seed
from trainer.progress import Progress
from trainer.recorder import Recorder, model_info, open_recorder, run_plan
from trainer.response_config import Response
from trainer.resume import CHECKPOINTS, check_resumable, default_folder, find_checkpoint, on_ranks, run_of
from trainer.run_lock import RunLock
from trainer.schedule import LearningRate, learning_rate_of
from trainer.standing import Standing
from trainer.text import Text, open_text


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Everything that the loop uses."""

    config: TrainConfig
    run: Path
    engine: Engine
    text: Text
    learning_rate: LearningRate
    recorder: Recorder
    notifiers: tuple[Notifier, ...]
    """Who is told about alerts besides the terminal."""
    first_step: int
    """Steps that a resumed run has behind it."""
    standing: Standing
    """What guards and interventions remember."""
    judge: Judge | None
    """Alert rules that the run acts on; None where it does not."""
    responders: Mapping[Response, Notifier]
    """Who is told about which of their alerts; on the first rank."""
    lock: RunLock | None
    """The run folder is this process's; on the first rank."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run / CHECKPOINTS

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, all ranks."""
        return self.config.data.tokens_per_step * self.engine.num_replicas

    def close(self, error: BaseException | None) -> None:
        """Finish the recording and release the engine; `error` is what ended training, if something did."""
        self.recorder.close(error)
        for notifier in (*self.notifiers, *self.responders.values()):
            notifier.close()
        self.engine.destroy()
        if self.lock is not None:
            self.lock.release()


def assemble(config: TrainConfig, progress: Progress) -> Assembly:
    """Build all parts of a run, at its beginning or at the checkpoint that `config.resume` means.

    Raises:
        MoevizError: see `trainer.train.train`.
    """
    check_trackers(config.tracking.trackers.names)
    ranks = _ranks(config)
    found = None
    if config.resume is not None:
        found = find_checkpoint(config.resume, config.run, note=progress.note)
        config = on_ranks(found, config, ranks)
        check_resumable(found, config, ranks)
        run = run_of(found)
    else:
        run = _new_folder(config)
    config = replace(config, run=run, resume=None)
    if config.engine.deepspeed_config is not None:
        deepspeed_config(config, ranks)  # refuses a file that does not fit before anything is built
    set_threads(config.engine.threads)
    if config.engine.keep_freed_memory and choose_device(config.engine.device, local_rank()).type == "cpu":
        keep_freed_memory()
    origin = find_origin(config.init_from) if config.init_from and not found else None
    start = found or origin
    text = open_text(config, tokenizer_file=start.tokenizer_file if start else None)
    engine = _engine(config, text, found, origin, progress)
    engine.module.separate_documents(text.document_end)
    lock = RunLock(run) if engine.rank == 0 else None
    try:
        return _assemble(config, run, text, engine, found, lock, progress)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _assemble(
    config: TrainConfig,
    run: Path,
    text: Text,
    engine: Engine,
    found: Checkpoint | None,
    lock: RunLock | None,
    progress: Progress,
) -> Assembly:
    """The parts that touch the run folder, which is locked now."""
    first_step = found.step if found else 0
    sequences = config.data.sequences_per_step * engine.num_replicas
    if engine.rank == 0 and (told := text.repetition(config.max_steps, sequences)):
        progress.note(told)
    if found and engine.rank == 0:
        for path in set_aside_after(run / CHECKPOINTS, found.step):
            progress.note(f"{path} holds later steps, which are trained again now; it is kept, renamed")
    notifiers = _notifiers(config, run) if engine.rank == 0 else ()

    def on_alert(alert: AlertRecord) -> None:
        progress.note(alert_line(alert))
        for notifier in notifiers:
            notifier(alert)

    standing = Standing.load(found.path) if found else Standing()
    chosen = config.engine.auto_batch and standing.micro_batch is None
    if chosen:
        standing.micro_batch = largest_that_fits(engine, text, config)
    judge = _judge(config, engine, found)
    # A pruned model begins a folder of its own with a checkpoint in it.
    is_recorded = found is not None and (run / "run.json").exists()
    recorder = open_recorder(config, run, engine, text, first_step if is_recorded else None, on_alert)
    if config.log_routing and config.architecture.num_moe_layers == 0:
        progress.note(
            "this model has no experts, so no routing: losses and the other numbers of its steps are kept"
        )
    if ahead := engine.module.config.looks_ahead():
        if engine.rank == 0:
            progress.note(ahead)
        recorder.event("not_causal", step=first_step, reason=ahead)
    if chosen:
        recorder.event(
            "micro_batch", step=first_step, sequences=standing.micro_batch, reason="largest that fits"
        )
    return Assembly(
        config=config,
        run=run,
        engine=engine,
        text=text,
        learning_rate=learning_rate_of(config, config.data.tokens_per_step * engine.num_replicas),
        recorder=recorder,
        notifiers=notifiers,
        first_step=first_step,
        standing=standing,
        judge=judge,
        responders=_responders(config, run) if engine.rank == 0 else {},
        lock=lock,
    )


def _ranks(config: TrainConfig) -> int:
    """Processes of this run."""
    launched, wanted = launched_ranks(), config.engine.num_ranks
    if wanted is not None and wanted != launched:
        raise MoevizError(
            f"num_ranks={wanted}, but {launched} processes run; `moeviz train --num-ranks {wanted}` starts them, or "
            "leave it out and use a launcher"
        )
    Layout.of(0, launched, config.engine.pipeline_stages)  # refuses what cannot be shared out
    return launched


def _notifiers(config: TrainConfig, run: Path) -> tuple[Notifier, ...]:
    options = config.alerting
    channels: list[Command | Webhook] = []
    if options.on_alert_command is not None:
        channels.append(Command(options.on_alert_command))
    if options.on_alert_url is not None:
        channels.append(Webhook(options.on_alert_url))
    severity = options.alert_min_severity
    return tuple(Notifier(channel, run=str(run), min_severity=severity) for channel in channels)


def _judge(config: TrainConfig, engine: Engine, found: Checkpoint | None) -> Judge | None:
    """The rules, as they were at the checkpoint where it has them."""
    if not config.response.on_alert:
        return None
    judge = Judge(model_info(engine), config.alerting.rules, run_plan(config))
    if found is not None and (found.path / JUDGE_FILE).exists():
        judge.load((found.path / JUDGE_FILE).read_bytes())
    return judge


def _responders(config: TrainConfig, run: Path) -> dict[Response, Notifier]:
    channels: dict[Response, Command | Webhook] = {}
    for response in config.response.responses:
        if response.action in ("run", "post"):
            channels[response] = (Command if response.action == "run" else Webhook)(response.target)
    return {each: Notifier(channel, run=str(run), min_severity="info") for each, channel in channels.items()}


def _new_folder(config: TrainConfig) -> Path:
    run = config.run or default_folder(config.preset)
    if config.run is None and launched_ranks() > 1:
        join_ranks(config.engine.rank_timeout)
        run = agree_on(run)
    if (run / "run.json").exists() or list_checkpoints(run / CHECKPOINTS):
        raise MoevizError(f"{run} already holds a run; go on with --resume {run}, or name another folder")
    return run


def _engine(
    config: TrainConfig, text: Text, found: Checkpoint | None, origin: Origin | None, progress: Progress
) -> Engine:
    torch.manual_seed(config.seed)
    if found is None:
        model = (
            model_from(origin, config.architecture, text.batches.shards.vocab_size)
            if origin
            else MoELanguageModel(text.fit(config.architecture))
        )
        engine = _built(model, config)
        if engine.rank > 0:  # all ranks have drawn the same weights; what they drop differs from here on
            torch.manual_seed(rank_seed(config.seed, engine.rank))
        return engine
    if found.text_key != text.key:
        progress.note(
            "the training text is not the one of the checkpoint: going on with the new one, not bit for bit"
        )
    engine = _built(MoELanguageModel(found.model_config), config)
    if found.num_ranks != engine.world_size:
        progress.note(
            f"{found.num_ranks} ranks before, {engine.world_size} now: each step still has "
            f"{config.data.sequences_per_step * engine.num_replicas} sequences, "
            f"{config.data.gradient_accumulation_steps} micro-batches of {config.data.batch_size} on each rank"
        )
    restore(found, engine)
    return engine


def _built(model: MoELanguageModel, config: TrainConfig) -> Engine:
    """The engine, whose optimizer knows only what is not frozen."""
    freeze(model, config.freeze, config.train_only)
    return build_engine(model, config)
