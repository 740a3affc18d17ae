"""Multiple-choice scores beside lm-evaluation-harness, question by question.

    python benchmarks/harness.py --task-data FOLDER [--tasks hellaswag ...] [--limit 200]
    python benchmarks/harness.py --keep tests/harness_questions.json

A tiny Mixtral with random weights is saved as a Hugging Face folder. The harness runs it through transformers, with
its own prompts on rows in their published form; `trainer.scoring` runs it through `model.hf` on rows as they lie in
the files. Needs `pip install lm-eval accelerate`, no network. `--keep` writes into a file of questions what the
harness said of them; the test suite compares with that on machines without the harness.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASK_NAMES = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "copa")
MAX_SEQ_LEN = 512
"""Shorter than some questions, in bytes: what is too long is cut alike. The harness refuses longer answers."""


def tiny_folder(folder: Path, max_seq_len: int = MAX_SEQ_LEN) -> Path:
    """A Mixtral of two layers whose tokens are bytes, with weights of a fixed seed."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from model.config import ModelConfig, RouterConfig
    from model.hf import to_hf
    from model.lm import MoELanguageModel
    from trainer.tokenizer import printable_bytes

    config = ModelConfig(
        vocab_size=257,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=max_seq_len,
        num_experts=4,
        top_k=2,
        expert_dim=32,
        num_shared_experts=0,
        init_std=0.3,
        router=RouterConfig(score="softmax", norm_topk=True),
    )
    torch.manual_seed(11)
    to_hf(MoELanguageModel(config), folder, family="mixtral")
    tokenizer = Tokenizer(models.BPE(vocab=printable_bytes() | {"<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def published(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a shorter form as the task's authors publish it."""
    letters = ["A", "B", "C", "D", "E"]
    if task == "hellaswag":
        parts = {"ctx_a": row["ctx"], "ctx_b": ""} if "ctx" in row and "ctx_a" not in row else {}
        return {**row, **parts}
    if "gold" not in row:
        return dict(row)
    if task == "winogrande":
        one, other = row["context_options"]
        shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        before, first, second = one[:shared], one[shared:], other[shared:]
        sentence = f"{before}_ {row['continuation']}"
        return {"sentence": sentence, "option1": first, "option2": second, "answer": str(row["gold"] + 1)}
    if task == "piqa":
        goal = row["query"].removeprefix("Question: ").rstrip()
        return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
    if task == "copa":
        event, _, connector = row["query"].rpartition(" ")
        kind = {"because": "cause", "therefore": "effect"}[connector]
        two = {"choice1": row["choices"][0], "choice2": row["choices"][1]}
        return {"premise": f"{event.rstrip(',')}.", "question": kind, **two, "label": row["gold"]}
    choices = {"text": row["choices"], "label": letters[: len(row["choices"])]}
    key = "question_stem" if task == "openbookqa" else "question"
    question = row["query"].removeprefix("Question: ")
    return {key: question, "choices": choices, "answerKey": letters[row["gold"]]}


def harness_scores(
    folder: Path, rows: Mapping[str, list[dict[str, Any]]], max_seq_len: int = MAX_SEQ_LEN
) -> dict[str, list[list[float]]]:
    """Log-probability of every choice of every question, by task, as lm-evaluation-harness has it."""
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16, max_length=max_seq_len)
    configs = []
    with tempfile.TemporaryDirectory() as scratch:
        for task, each in rows.items():
            file = Path(scratch) / f"{task}.json"
            file.write_text("\n".join(json.dumps(published(task, row)) for row in each))
            configs.append(_official(task, file))
        found = lm_eval.simple_evaluate(
            model=model, tasks=configs, log_samples=True, bootstrap_iters=0, task_manager=TaskManager()
        )
    samples = found["samples"]
    return {
        task: [
            [float(answer[0]) for answer in sample["filtered_resps"]]
            for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])
        ]
        for task in rows
    }


def _official(task: str, file: Path) -> dict[str, Any]:
    """The harness's own definition of a task, reading a local file."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    names = {"arc_easy": "arc", "arc_challenge": "arc", "copa": "super_glue/copa"}
    for path in sorted((folder / names.get(task, task)).glob("*.yaml")):
        config = _yaml(path)
        if "include" in config:
            config = {**_yaml(path.parent / config.pop("include")), **config}
        if config.get("task") == task:
            break
    else:
        raise SystemExit(f"this lm-eval has no task {task}")
    source = {"dataset_path": "json", "dataset_name": None}
    splits = {"test_split": None, "training_split": None, "validation_split": "validation"}
    return {**config, **source, **splits, "dataset_kwargs": {"data_files": {"validation": str(file)}}}


def _yaml(path: Path) -> dict[str, Any]:
    """A task's YAML with its functions."""
    import importlib.util

    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        module, _, name = str(node.value).rpartition(".")
        spec = importlib.util.spec_from_file_location(module, path.parent / f"{module}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return getattr(loaded, name)

    Loader.add_constructor("!function", function)
    config: dict[str, Any] = yaml.load(path.read_text(), Loader)  # Loader is a SafeLoader
    return config


def compare(folder: Path, rows: Mapping[str, list[dict[str, Any]]], max_seq_len: int) -> list[dict[str, Any]]:
    """One line a task: both accuracies, questions on which they differ, the largest gap in nats."""
    from trainer.questions import TASKS
    from trainer.scoring import choice_nats, score
    from trainer.text_model import open_text_model

    theirs = harness_scores(folder, rows, max_seq_len)
    opened = open_text_model(folder, device="cpu")
    lines = []
    for task, each in rows.items():
        questions = [TASKS[task].read(row) for row in each]
        as_published = [TASKS[task].read(published(task, row)) for row in each]
        assert [(q.contexts, q.continuations, q.gold) for q in questions] == [
            (q.contexts, q.continuations, q.gold) for q in as_published
        ], f"{task}: the two forms of a row are read differently"
        begin = time.process_time()
        nats = choice_nats(opened, questions)
        seconds = time.process_time() - begin
        ours, oracle = score(questions, nats), score(questions, theirs[task])
        gap = max(
            abs(a - b) for x, y in zip(nats, theirs[task], strict=True) for a, b in zip(x, y, strict=True)
        )
        differing = sum(a != b for a, b in zip(ours.picks, oracle.picks, strict=True))
        norm_differing = sum(a != b for a, b in zip(ours.norm_picks, oracle.norm_picks, strict=True))
        lines.append(
            {
                "task": task,
                "questions": len(questions),
                "acc": ours.acc,
                "harness_acc": oracle.acc,
                "acc_norm": ours.acc_norm,
                "harness_acc_norm": oracle.acc_norm,
                "differing": differing,
                "norm_differing": norm_differing,
                "largest_gap_nats": gap,
                "cpu_seconds": round(seconds, 1),
            }
        )
    return lines


def keep(file: Path, folder: Path) -> None:
    """Put the harness's word beside each question of a file: {task: {"rows": [...], "nats": [[...]]}}."""
    kept = json.loads(file.read_text())
    theirs = harness_scores(folder, {task: each["rows"] for task, each in kept.items()})
    for task, each in kept.items():
        each["nats"] = [[round(value, 4) for value in row] for row in theirs[task]]
    file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task-data", type=Path, help="folder or file of questions")
    parser.add_argument("--tasks", nargs="+", default=TASK_NAMES, choices=TASK_NAMES)
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument(
        "--max-seq-len", type=int, default=MAX_SEQ_LEN, help="tokens (bytes) that the model reads"
    )
    parser.add_argument("--out", type=Path, help="write the lines as JSON")
    parser.add_argument("--keep", type=Path, help="a file of questions to write the harness's numbers into")
    arguments = parser.parse_args()
    from trainer.data_lines import open_lines
    from trainer.questions import task_file

    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_folder(Path(scratch) / "tiny", arguments.max_seq_len)
        if arguments.keep:
            keep(arguments.keep, folder)
            return 0
        if arguments.task_data is None:
            parser.error("--task-data names where the questions are")
        rows = {}
        for task in arguments.tasks:
            lines = [line for line in open_lines(task_file(task, arguments.task_data)) if line.strip()]
            rows[task] = [json.loads(line) for line in lines[: arguments.limit]]
        found = compare(folder, rows, arguments.max_seq_len)
    for line in found:
        values = (
            f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in line.items()
        )
        print("  ".join(values))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    return int(any(line["differing"] or line["norm_differing"] for line in found))


if __name__ == "__main__":
    raise SystemExit(main())
