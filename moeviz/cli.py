"""The command line: a table of commands, one place that turns errors into one line and an exit status.

A command is a module of `moeviz.commands` with `main(argv) -> int`, imported only when it is called: `moeviz --help`
loads nothing. (`import` is a word of Python, so its module is `import_`.) Handlers are the only part of moeviz that
may import trainer, dashboards or tui, and they do it late.
"""

from __future__ import annotations

import sys
from importlib import import_module
from keyword import iskeyword
from typing import NamedTuple

from moeviz import __version__
from moeviz.errors import MoevizError


class Command(NamedTuple):
    name: str
    help: str
    group: str


COMMANDS = (
    Command(
        "demo",
        "Train a small MoE on the built-in corpus and watch its routing: the two-minute tour.",
        "train",
    ),
    Command(
        "train", "Train a MoE (presets, any option overridden), with --log-routing to record it.", "train"
    ),
    Command("prepare", "Tokenise text, JSON Lines or a data set ahead of training.", "train"),
    Command("sweep", "Train one model for each combination of values, and compare them.", "train"),
    Command("study", "Train a comparison that is ready to run: balance, architecture, experts ...", "train"),
    Command("presets", "List the models to start from: parameters, active parameters, FLOPs.", "train"),
    Command("tui", "Watch a run in the terminal, live or afterwards.", "watch"),
    Command("dash", "Open the dashboards in a browser (loopback only).", "watch"),
    Command("runs", "List the runs of a folder.", "read"),
    Command("show", "Summarise one run: shape, state, loads, metrics, alerts.", "read"),
    Command("alerts", "List the alerts of a run with their remedies, or follow them live.", "read"),
    Command("check", "Exit with 1 when a run has open alerts: for CI and job scripts.", "read"),
    Command("snapshot", "Tell what was true around one step: numbers, layers, alerts, events.", "read"),
    Command("query", "Ask a run anything in SQL (read-only).", "read"),
    Command("metrics", "Explain every metric: formula, range, value at balance, source.", "read"),
    Command("pack", "Pack a finished run into one ordinary DuckDB file.", "read"),
    Command("gc", "Delete old runs, or their token-level samples; shows what would go first.", "read"),
    Command("lake", "Put a run into a DuckLake catalogue (Postgres, SQLite) for other machines.", "read"),
    Command("import", "Make a run of routing recorded elsewhere: vLLM, Megatron, SGLang.", "read"),
    Command(
        "inspect", "Trace a text through a checkpoint: experts of every token, layer by layer.", "inspect"
    ),
    Command("analyze", "What experts are for, with nulls: domains, tokens, partners, knock-out.", "inspect"),
    Command("generate", "Let a checkpoint write on: sampling, caches, drafts of its own.", "inspect"),
    Command("eval", "Score a checkpoint: held-out text by domain, HellaSwag, ARC, PIQA ...", "inspect"),
    Command("export", "Save a checkpoint for transformers, or a run as Parquet, CSV or DuckDB.", "inspect"),
)
_GROUPS = (("train", "Train"), ("watch", "Watch"), ("read", "Read a run"), ("inspect", "Open a checkpoint"))


def _usage() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = ["moeviz: see inside a Mixture-of-Experts language model while it trains, and after.", ""]
    lines += ["usage: moeviz COMMAND [options]       (moeviz COMMAND --help explains a command)", ""]
    for group, title in _GROUPS:
        lines.append(f"{title}:")
        lines += [f"  {c.name:<{width}}  {c.help}" for c in COMMANDS if c.group == group]
        lines.append("")
    lines += [
        "In Python:",
        "  with moeviz.watch(model, 'runs/mine') as probe: ...; probe.step(loss=loss)",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):  # `deepspeed` puts it here; LOCAL_RANK says the same
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"moeviz {__version__}")
        return 0
    if argv[0] not in {command.name for command in COMMANDS}:
        return _unknown(argv[0])
    try:
        module = argv[0] + "_" if iskeyword(argv[0]) else argv[0]
        return import_module(f"moeviz.commands.{module}").main(argv[1:])
    except MoevizError as error:
        print(f"moeviz {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: not an error, and the interpreter must not complain at exit.
        sys.stderr.close()
        return 0


def _unknown(name: str) -> int:
    from difflib import get_close_matches

    near = get_close_matches(name, [command.name for command in COMMANDS], n=1)
    hint = f"did you mean `moeviz {near[0]}`?" if near else "`moeviz --help` lists the commands"
    print(f"moeviz: unknown command {name!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
