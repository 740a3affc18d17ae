"""`moeviz generate`: let a checkpoint write on, with any of its caches, or with drafts of its own."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from model.sampling_config import Sampling
from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from model.kv_cache import KVCache
    from model.speculative import Drafts
    from trainer.text_model import TextModel

CacheKind = Literal["full", "int8", "mapped", "sinks", "heavy-hitters"]
_DESCRIPTION = """Let a checkpoint write on.

    moeviz generate runs/mine --prompt "The little fox" --temperature 0.8 --top-p 0.95
    moeviz generate runs/mine --prompt "def area(" --drafts          its modules for further tokens draft (--mtp-depth)
    moeviz generate runs/mine --compile --max-new-tokens 2000        compile the step first: a minute, then faster
    moeviz generate runs/mine --cache sinks --max-new-tokens 5000    past the trained length, in bounded memory

CHECKPOINT is a run (its newest checkpoint), one checkpoint folder, or a local Hugging Face folder. The text appears as
it is made; what it cost goes to standard error. It ends with the tokenizer's end-of-text token (or --eos-id), at a
--stop text, or after --max-new-tokens.
"""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Let a checkpoint write on."""

    checkpoint: Positional[Path]
    """A run, a checkpoint folder, or a Hugging Face folder."""
    prompt: tuple[str, ...] = ("The",)
    """What to go on from; several are written one below the other."""
    file: Path | None = None
    """Read a further prompt from this file."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen."""
    drafts: bool = False
    """Draft tokens with the model's own modules for further ones (trained with --mtp-depth): the same distribution,
    and at temperature 0 the same text, in fewer passes."""
    drafts_at_once: int | None = None
    """Tokens drafted at once at most. None: one for each module."""
    cache: CacheKind = "full"
    """Keys and values: full; int8 (a byte a number); mapped (in files); sinks (the first and the last tokens, past the
    trained length); heavy-hitters (the last ones, and those that were read most)."""
    cache_tokens: int | None = None
    """Tokens that sinks and heavy-hitters keep. None: half of the trained length."""
    cache_folder: Path | None = None
    """Folder for the files of --cache mapped."""
    prefill_chunk: int | None = None
    """Read the prompt in pieces of so many tokens, in less memory. None: at once."""
    compile: bool = False
    """Compile what one token needs: about twice as many tokens a second of a small model on a CPU. The first token
    after the prompt then waits for a minute at most, and some 10 seconds once the result is on disk; needs a C++
    compiler. Texts of up to 128 tokens, 256, 512 and so on have a program each. With --cache full or int8, without
    --drafts."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """Print one JSON object for each prompt, when it is finished."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(
        GenerateArguments,
        args=argv,
        prog="moeviz generate",
        description=_DESCRIPTION,
        config=(OmitArgPrefixes,),
    )
    prompts = _prompts(arguments)
    require("torch", "train", "generating text")
    from trainer.text_model import open_text_model

    opened = open_text_model(arguments.checkpoint, device=arguments.device, note=_warn)
    if ahead := opened.module.config.looks_ahead():
        _warn(ahead)
    for prompt in prompts:
        try:
            _write(opened, prompt, arguments)
        except ValueError as error:
            raise MoevizError(str(error)) from error
    return 0


def _warn(text: str) -> None:
    print(f"moeviz generate: {text}", file=sys.stderr)


def _prompts(arguments: GenerateArguments) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.file is not None:
        try:
            text = arguments.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MoevizError(f"cannot read {arguments.file} ({error}); give a UTF-8 file") from error
        prompts = [*(prompts if prompts != ["The"] else []), text]
    return prompts


def _write(opened: TextModel, prompt: str, arguments: GenerateArguments) -> None:
    """One text, and what it cost."""
    from model.generate import Drafts, before_stop

    words = opened.words()
    sampling = arguments.sampling
    if sampling.eos_id is None:
        sampling = replace(sampling, eos_id=words.eos_id)
    drafts = Drafts(at_once=arguments.drafts_at_once) if arguments.drafts else None
    prompt_ids = words.encode(prompt) or [words.eos_id]
    cache = _cache(opened, arguments, len(prompt_ids) + sampling.max_new_tokens)
    ids: list[int] = []
    told = "" if arguments.json else prompt
    if not arguments.json:
        print(prompt, end="", flush=True)
    began = time.perf_counter()
    for token in _tokens(opened, prompt_ids, sampling, cache, drafts, arguments):
        ids.append(token)
        if not arguments.json:
            told = _tell(told, prompt + _text(words.decode(ids), sampling, unfinished=True))
    seconds = time.perf_counter() - began
    if sampling.eos_id in ids:
        ids = ids[: ids.index(sampling.eos_id)]
    text = before_stop(words.decode(ids), sampling.stop)
    if arguments.json:
        print(json.dumps({"prompt": prompt, "text": text, **_cost(len(ids), seconds, cache, drafts)}))
        return
    _tell(told, prompt + text)
    print()
    _warn(_cost_line(len(ids), seconds, cache, drafts))


def _tokens(
    opened: TextModel,
    prompt_ids: list[int],
    sampling: Sampling,
    cache: KVCache | None,
    drafts: Drafts | None,
    arguments: GenerateArguments,
) -> Iterator[int]:
    import torch

    from model.generate import NonCausalWarning, stream

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonCausalWarning)  # said once for all prompts
        prompt_1S = torch.tensor([prompt_ids], device=opened.device)
        options: dict[str, Any] = {"cache": cache, "drafts": drafts, "compile": arguments.compile}
        options["prefill_chunk"] = arguments.prefill_chunk
        decode = opened.words().decode
        for ids_1 in stream(opened.module, prompt_1S, sampling, decode=decode, **options):
            yield int(ids_1)


def _text(text: str, sampling: Sampling, *, unfinished: bool) -> str:
    """What of a text can be shown already: not half a character, nor what may turn out to be a stop text."""
    from model.generate import before_stop

    held = max((len(stop) for stop in sampling.stop), default=1) - 1 if unfinished else 0
    shown = before_stop(text, sampling.stop)
    if shown == text and held:
        shown = shown[:-held]
    return shown.rstrip("\ufffd")


def _tell(told: str, text: str) -> str:
    """Print what is new, and return all that was printed."""
    if not text.startswith(told):
        return told
    print(text[len(told) :], end="", flush=True)
    return text


def _cache(opened: TextModel, arguments: GenerateArguments, length: int) -> KVCache | None:
    """None: the model makes a full one of just the size."""
    from model.kv_cache import KVCache
    from model.kv_eviction import HeavyHitters, SinksAndRecent

    kind, config = arguments.cache, opened.module.config
    if kind == "full":
        return None
    options: dict[str, Any] = {"storage": kind, "max_length": min(length, config.max_seq_len)}
    options["bounded"] = not (arguments.drafts or arguments.compile)
    if kind == "mapped":
        if arguments.cache_folder is None:
            raise MoevizError("--cache mapped keeps its files somewhere; name a folder with --cache-folder")
        arguments.cache_folder.mkdir(parents=True, exist_ok=True)
        options["folder"] = arguments.cache_folder
    if kind in ("sinks", "heavy-hitters"):
        budget = arguments.cache_tokens or config.max_seq_len // 2
        if not 8 <= budget < config.max_seq_len:
            raise MoevizError(
                f"--cache-tokens {budget} is not between 8 and the {config.max_seq_len - 1} that fit beside a new one"
            )
        half = budget // 2
        kept = HeavyHitters(heavy=half, recent=budget - half)
        options = {"eviction": SinksAndRecent(sinks=4, recent=budget - 4) if kind == "sinks" else kept}
    return KVCache(config, batch_size=1, device=opened.device, dtype=opened.module.dtype, **options)


def _cost(tokens: int, seconds: float, cache: KVCache | None, drafts: Drafts | None) -> dict[str, Any]:
    told: dict[str, Any] = {"tokens": tokens, "seconds": round(seconds, 4)}
    if cache is not None:
        told["cache_bytes"] = cache.num_bytes
    if drafts is not None:
        told["drafts"] = {
            "proposed": drafts.proposed,
            "accepted": drafts.accepted,
            "acceptance": round(drafts.acceptance, 4),
            "tokens_per_pass": round(drafts.tokens_per_pass, 4),
        }
    return told


def _cost_line(tokens: int, seconds: float, cache: KVCache | None, drafts: Drafts | None) -> str:
    parts = [f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.0f} a second)"]
    if drafts is not None:
        parts.append(
            f"{drafts.accepted} of {drafts.proposed} drafts kept ({drafts.acceptance:.0%}), "
            f"{drafts.tokens_per_pass:.2f} tokens a pass"
        )
    if cache is not None:
        parts.append(f"cache of {cache.num_bytes / 1024:,.0f} KiB")
    return "; ".join(parts)
