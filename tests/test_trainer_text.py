"""A run that mixes sources and tells documents apart: what the model reads, and that it goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from trainer.data import DataConfig, open_prepared
from trainer.text import open_text
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]
pytestmark = pytest.mark.usefixtures("no_packing")


def sentences(words: str, count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "<|endoftext|>".join(" ".join(rng.choice(words.split(), size=9)) for _ in range(count))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A prepared folder, and a file of text."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "birds.txt").write_text(sentences("gull wren lark tern swift", 80, seed=0))
    (folder / "stones.txt").write_text(sentences("slate chalk flint basalt", 80, seed=1))
    config = DataConfig(source=str(folder / "birds.txt"), vocab_size=280, validation_fraction=0.2)
    open_prepared(config, folder / "shards", quiet=True)
    return str(folder / "shards"), f"rocks={folder / 'stones.txt'}"


def test_a_mixture_is_what_steps_are_made_of(sources: tuple[str, str], tmp_path: Path) -> None:
    data = {"train_data": sources, "mixture": ("birds=0.25", "rocks=0.75")}
    text = open_text(toy(tmp_path, data=data), quiet=True)
    domains = text.batches.rows(0, 1024).domains
    assert domains.count("birds") == 256
    with pytest.raises(
        MoevizError, match=r"names 'fish', which the data has not; it has birds, rocks|rocks, birds"
    ):
        open_text(toy(tmp_path, data=data | {"mixture": ("fish=1",)}), quiet=True)


def test_how_often_a_text_is_read_is_counted_and_said(sources: tuple[str, str], tmp_path: Path) -> None:
    """Oracle: the rows themselves."""
    text = open_text(
        toy(tmp_path, data={"train_data": sources, "mixture": ("birds=1", "rocks=3")}), quiet=True
    )
    counted = text.batches.rows(0, 1024).domains
    for domain, times in text.batches.passes(1024).items():
        tokens = text.batches.shards.num_tokens("train", domain)
        assert times == pytest.approx(counted.count(domain) * 16 / tokens)
    told = text.repetition(512, 2)
    assert told is not None
    birds, rocks = (text.batches.passes(1024)[name] for name in ("birds", "rocks"))
    assert birds > rocks > 1
    assert told.startswith(f"512 steps read birds {birds:.1f} times, rocks {rocks:.1f} times")
    assert text.repetition(1, 2) is None


def test_a_run_on_both_goes_on_bit_for_bit(sources: tuple[str, str], tmp_path: Path) -> None:
    data = {"train_data": sources, "mixture": ("birds=1", "rocks=2"), "document_mask": True}
    whole = train(toy(tmp_path / "whole", data=data))
    stop = StopAfter(3)
    first = train(toy(tmp_path / "parts", data=data), progress=stop, interrupt=stop.interrupt)
    config = toy(tmp_path / "parts", data=data)
    second = train(replace(config, resume=str(tmp_path / "parts"), run=None))
    assert first.losses + second.losses == whole.losses


def test_the_mask_reaches_the_model(sources: tuple[str, str], tmp_path: Path) -> None:
    """Oracle: the loss of the first step, from the documents of its rows one by one."""
    data = {"train_data": sources[0], "document_mask": True, "seq_len": 32, "gradient_accumulation_steps": 1}
    config = toy(tmp_path / "run", data=data, max_steps=1)
    loss = train(config).losses[0]
    text = open_text(config, quiet=True)
    eos_id = text.batches.shards.eos_id
    torch.manual_seed(config.seed)
    model = MoELanguageModel(text.fit(config.architecture)).train()
    batch = text.batches.batch(0)
    nats = 0.0
    for inputs_S, labels_S in zip(batch.input_ids_BS, batch.labels_BS, strict=True):
        ends = [*(np.flatnonzero(inputs_S == eos_id) + 1).tolist(), len(inputs_S)]
        starts = [0, *ends[:-1]]
        assert len(ends) > 2, "the row holds several documents"
        for start, end in zip(starts, ends, strict=True):
            if start < end:
                one = model(
                    torch.from_numpy(inputs_S[None, start:end]), torch.from_numpy(labels_S[None, start:end])
                )
                nats += float(one.token_loss_BS.sum())
    assert loss == pytest.approx(nats / batch.labels_BS.size, rel=1e-5)


def test_a_mask_that_cannot_be_kept_is_refused(sources: tuple[str, str], tmp_path: Path) -> None:
    masked = replace(TOY.data, document_mask=True)
    with pytest.raises(MoevizError, match="use another attention, or no mask"):
        open_text(replace(TOY, data=masked, model=replace(TOY.model, attention="latent")), quiet=True)
    np.arange(900, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = replace(masked, train_data=str(tmp_path / "tokens.bin"))
    with pytest.raises(MoevizError, match="which token ends a document; name the tokenizer"):
        open_text(replace(TOY, data=tokens, model=replace(TOY.model, vocab_size=1000)), quiet=True)
