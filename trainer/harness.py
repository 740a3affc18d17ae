"""Our models inside of lm-evaluation-harness, with all of its tasks.

    import lm_eval
    from trainer.harness import HarnessModel
    lm_eval.simple_evaluate(model=HarnessModel.open("runs/mine"), tasks=["lambada_openai", "gsm8k"])

`moeviz eval` needs no harness for the tasks that it knows, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.generate import before_stop, generate
from model.sampling import Sampling
from moeviz.errors import require
from trainer.data_progress import progress
from trainer.scoring import Pair, encode_pair, likelihoods
from trainer.text_model import TextModel, open_text_model

require("lm_eval", "harness", "lm-evaluation-harness")
from lm_eval.api.model import LM  # noqa: E402  # only once it is known to be there

_NEW_TOKENS = 256
"""Tokens of an answer where a task says no better; the harness's own default."""


class HarnessModel(LM):  # type: ignore[misc]
    """A checkpoint, ours or a Hugging Face folder, as the harness wants it."""

    def __init__(self, opened: TextModel, batch_size: int = 16) -> None:
        super().__init__()
        self.opened, self.batch_size = opened, batch_size
        self.tokenizer = opened.words()

    @classmethod
    def open(cls, path: str | Path, *, device: str = "auto", batch_size: int = 16) -> HarnessModel:
        """Open a run, a checkpoint folder, or a Hugging Face folder.

        Raises:
            MoevizError: nothing there that can be opened, or a model without a tokenizer.
        """
        return cls(open_text_model(Path(path), device=device), batch_size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of (context, continuation): log-probability in nats, and whether it is what the model would say."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        return [(each.nats, each.greedy) for each in self._judged(pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts: window after window, each token once, with one token of context."""
        limit = self.opened.module.config.max_seq_len
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for start in range(0, len(ids), limit):
                context = [ids[start - 1]] if start else [self.tokenizer.eos_id]
                pairs.append(Pair(context, ids[start : start + limit]))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, each in zip(owners, self._judged(pairs, disable_tqdm), strict=True):
            totals[owner] += each.nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first of the texts in `until`."""
        answers = []
        with progress("answers", total=len(requests), unit="items", quiet=disable_tqdm) as advance:
            for request in requests:
                answers.append(self._answer(*request.args))
                advance(1)
        return answers

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = tuple([until] if isinstance(until, str) else until)
        limit = self.opened.module.config.max_seq_len
        new = min(int(options.get("max_gen_toks", _NEW_TOKENS)), limit - 1)
        ids = (self.tokenizer.encode(context) or [self.tokenizer.eos_id])[-(limit - new) :]
        warm = bool(options.get("do_sample")) and float(options.get("temperature", 0.0)) > 0
        sampling = Sampling(
            temperature=float(options["temperature"]) if warm else 0.0,
            max_new_tokens=new,
            eos_id=self.tokenizer.eos_id,
            stop=tuple(stop for stop in stops if stop),
        )
        prompt_1S = torch.tensor([ids], device=self.opened.device)
        made = generate(self.opened.module, prompt_1S, sampling, decode=self.tokenizer.decode)
        said = [i for i in made[0].tolist() if i != self.tokenizer.eos_id]
        return before_stop(self.tokenizer.decode(said), sampling.stop)

    def _judged(self, pairs: list[Pair], quiet: bool) -> list[Any]:
        with progress("texts", total=len(pairs), unit="items", quiet=quiet) as advance:
            return likelihoods(self.opened.module, pairs, batch_size=self.batch_size, advance=advance)
