"""SGLang's dumps open as runs that say, count for count and token for token, what its recorder was shown."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeviz.cli import main
from moeviz.errors import MoevizError
from moeviz.imports.importing import import_recording, read_recording, sniff
from moeviz.store import run as run_module
from moeviz.store.queries import alerts, coactivation, load_matrix, metric_names, sequences, trace_arrays
from moeviz.store.reader import open_run

LAYERS, E, P, K, SLOTS = 4, 6, 8, 2, 8
"""Layer 0 is dense, 2 of 6 experts have a replica, and the recorder keeps 8 slots a token whatever K is."""
ROUTED = (1, 2, 3)
EXTEND, DECODE = 1, 2


@pytest.fixture(autouse=True)
def without_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing replaces the views anyway; writing them takes a process of its own."""
    monkeypatch.setattr(run_module, "write_views", lambda path: True)


class Server:
    """What SGLang's recorder is shown, and the files that it makes of it."""

    def __init__(self, ranks: int = 1, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.ranks = ranks
        extra = [self.rng.permutation(E)[: P - E] for _ in range(LAYERS)]
        self.map_LP = torch.tensor(np.array([self.rng.permutation([*range(E), *more]) for more in extra]))
        self.passes: list[dict[str, Any]] = []

    def forward(self, lengths: list[int], mode: int = EXTEND, padding: int = 0) -> None:
        """A pass of every rank; a decode has one token of each request."""
        for rank in range(self.ranks):
            tokens = sum(lengths) + rank
            ids = torch.full((LAYERS, tokens + padding, SLOTS), -1, dtype=torch.int32)
            for layer in ROUTED:
                for token in range(tokens):
                    chosen = self.rng.permutation(E)[:K]
                    for slot, expert in enumerate(chosen):
                        replicas = (self.map_LP[layer] == int(expert)).nonzero().flatten()
                        ids[layer, token, slot] = replicas[self.rng.integers(len(replicas))]
            extend = [*lengths[:-1], lengths[-1] + rank] if mode == EXTEND else None
            self.passes.append(
                {
                    "forward_pass_id": 100 + len(self.passes) // self.ranks,
                    "rank": rank,
                    "gatherer_key": "primary",
                    "input_ids": self.rng.integers(0, 50, tokens + padding).tolist(),
                    "positions": list(range(tokens + padding)),
                    "extend_seq_lens": extend,
                    "forward_mode": mode,
                    "topk_ids_of_layer": ids,
                    "misc_objects": [],
                    "global_physical_count": self.physical(ids),
                }
            )

    def physical(self, ids: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros((LAYERS, P), dtype=torch.int32)
        for layer in range(LAYERS):
            counts[layer] = torch.bincount(ids[layer][ids[layer] >= 0].flatten(), minlength=P)[:P].int()
        return counts

    def logical(self, step: int) -> np.ndarray:
        """Counts of a pass over all ranks, recounted from the ids: [routed layers, E]."""
        counts = np.zeros((len(ROUTED), E), dtype=int)
        for one in self.of(step):
            for at, layer in enumerate(ROUTED):
                physical = one["topk_ids_of_layer"][layer].flatten().tolist()
                named = Counter(int(self.map_LP[layer, expert]) for expert in physical if expert >= 0)
                counts[at] += [named[expert] for expert in range(E)]
        return counts

    def of(self, step: int) -> list[dict[str, Any]]:
        return [one for one in self.passes if one["forward_pass_id"] == step]

    def dump_records(self, folder: Path, mode: str) -> list[Path]:
        folder.mkdir(exist_ok=True)
        kept = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
        files = []
        for rank in range(self.ranks):
            records = [
                one if mode == "per_token" else {key: one[key] for key in kept}
                for one in self.passes
                if one["rank"] == rank
            ]
            files.append(folder / f"expert_distribution_recorder_1732000000.{rank}_{rank}.pt")
            torch.save({"records": records, "last_physical_to_logical_map": self.map_LP}, files[-1])
        return files

    def dump_stat(self, file: Path, steps: list[int], buffer: int) -> Path:
        counts = torch.zeros((buffer, LAYERS, E), dtype=torch.int32)
        for at, step in enumerate(steps):
            counts[at, list(ROUTED)] = torch.tensor(self.logical(step), dtype=torch.int32)
        content = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
        torch.save(content, file)
        return file


def loads(store: Any, step: int) -> np.ndarray:
    return load_matrix(store, step)["count"].to_numpy().reshape(len(ROUTED), E)


def test_token_dumps_of_two_ranks_open_with_every_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(ranks=2)
    server.forward([3, 5, 3])
    server.forward([1] * 4, mode=DECODE)
    server.dump_records(tmp_path / "dumps", "per_token")
    assert main(["import", str(tmp_path / "dumps"), "--run", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "sglang-dump, 2 steps, 3 layers x 6 experts, top-2" in captured.out
    assert "summed over ranks" in captured.err
    assert "1/K" in captured.err
    with open_run(tmp_path / "run") as store:
        assert [(one.block, one.name) for one in store.info.model.layers] == [
            (block, f"layers.{block}") for block in ROUTED
        ]
        for step in (100, 101):
            np.testing.assert_array_equal(loads(store, step), server.logical(step))
        found = sequences(store)
        assert found[found["step"] == 100].sort_values(["rank", "seq"])["n_tokens"].tolist() == [
            3,
            5,
            3,
            3,
            5,
            4,
        ]
        assert set(found[found["step"] == 101]["n_tokens"]) == {1}
        for rank, one in enumerate(server.of(100)):
            shown = one["topk_ids_of_layer"][list(ROUTED), 3:8, :K]
            expected = [
                [[int(server.map_LP[layer, expert]) for expert in token] for token in rows]
                for layer, rows in zip(ROUTED, shown.tolist(), strict=True)
            ]
            trace = trace_arrays(store, 100, 1, rank)
            assert trace.experts_LSK.tolist() == expected
            np.testing.assert_allclose(trace.weights_LSK, 1 / K, atol=0.002)
        ids = store.sql("SELECT token_ids FROM sequences WHERE step = 100 AND rank = 1 AND seq = 1")
        assert ids["token_ids"][0].tolist() == server.of(100)[1]["input_ids"][3:8]
        assert len(coactivation(store, 0)) > 0
        assert len(metric_names(store)) > 0
        assert alerts(store).empty


def test_padding_after_the_last_sequence_is_no_token(tmp_path: Path) -> None:
    server = Server()
    server.forward([2, 4], padding=3)
    (file,) = server.dump_records(tmp_path / "dumps", "per_token")
    import_recording(file, tmp_path / "run")
    with open_run(tmp_path / "run") as store:
        assert sequences(store)["n_tokens"].tolist() == [2, 4]
        np.testing.assert_array_equal(loads(store, 100), server.logical(100))


def test_pass_dumps_sum_over_ranks_and_need_the_number_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(ranks=3)
    for tokens in (4, 6, 5):
        server.forward([tokens])
    files = server.dump_records(tmp_path / "dumps", "per_pass")
    assert main(["import", str(tmp_path / "dumps"), "--run", str(tmp_path / "run")]) == 1
    assert "give --top-k (the counts of every layer and pass are multiples of 6" in capsys.readouterr().err
    made = import_recording(tmp_path / "dumps", tmp_path / "run", top_k=K)
    assert not any("no file of ranks" in note or "approximate" in note for note in made.recording.notes)
    with open_run(tmp_path / "run") as store:
        for step in (100, 101, 102):
            np.testing.assert_array_equal(loads(store, step), server.logical(step))
        tokens = store.sql("SELECT DISTINCT step, tokens FROM expert_load ORDER BY step")["tokens"].tolist()
        assert tokens == [3 * 4 + 3, 3 * 6 + 3, 3 * 5 + 3]
        assert sequences(store).empty
    files[1].unlink()
    partial = read_recording(tmp_path / "dumps", "sglang-dump", top_k=K)
    assert "no file of ranks [1]: their tokens are missing" in partial.notes
    doubtful = read_recording(tmp_path / "dumps", "sglang-dump", top_k=5)
    assert any("or --top-k is wrong" in note for note in doubtful.notes)


def test_stat_dumps_follow_one_another_without_their_empty_passes(tmp_path: Path) -> None:
    server = Server()
    for tokens in (2, 3, 4):
        server.forward([tokens])
    (tmp_path / "dumps").mkdir()
    server.dump_stat(tmp_path / "dumps" / "expert_distribution_recorder_9.5.pt", [100, 101], buffer=5)
    server.dump_stat(tmp_path / "dumps" / "expert_distribution_recorder_10.25.pt", [102], buffer=1)
    made = import_recording(tmp_path / "dumps", tmp_path / "run", top_k=K)
    assert any("recorder_9.5.pt: 3 of 5 passes are empty" in note for note in made.recording.notes)
    with open_run(tmp_path / "run") as store:
        for step, source in enumerate((100, 101, 102)):
            np.testing.assert_array_equal(loads(store, step), server.logical(source))


def test_faulty_records_are_named_and_cost_nothing_else(tmp_path: Path) -> None:
    server = Server()
    for tokens in (2, 3, 4, 5, 6):
        server.forward([tokens])
    broken: list[tuple[str, Any]] = [
        ("global_physical_count", torch.zeros((LAYERS, P + 1), dtype=torch.int32)),
        ("topk_ids_of_layer", torch.full((LAYERS, 4, SLOTS), P, dtype=torch.int32)),
        ("extend_seq_lens", [9]),
        ("forward_pass_id", 100),
    ]
    for one, (key, value) in zip(server.passes[1:], broken, strict=True):
        one[key] = value
    (file,) = server.dump_records(tmp_path / "dumps", "per_token")
    recording = read_recording(file, "sglang-dump")
    assert recording.steps == [100]
    assert [fault.line for fault in recording.faults] == [2, 3, 4, 5]
    said = "\n".join(map(str, recording.faults))
    assert (
        f"{file.name}, record 2: global_physical_count of shape (4, 9) does not fit the map of (4, 8)" in said
    )
    assert "expert ids 8 to 8 are outside 0 to 7" in said
    assert "extend_seq_lens sums to 9, with 5 tokens" in said
    assert "pass 100 of rank 0 was there before" in said


class Harmful:
    """Runs a function of its choice when it is unpickled the ordinary way."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "expert_distribution_recorder_1.pt"
    torch.save({"logical_count": Harmful(tmp_path / "ran")}, file)
    assert sniff(file) == sniff(tmp_path) == "sglang-dump"
    with pytest.raises(MoevizError, match="it could run code"):
        import_recording(file, tmp_path / "run")
    file.write_bytes(pickle.dumps({"records": []}, protocol=2))
    with pytest.raises(MoevizError, match="cannot be read"):
        import_recording(file, tmp_path / "run")
    assert not (tmp_path / "ran").exists()
    for content, problem in (
        ({"records": []}, "is no dump of SGLang"),
        ([1], "holds list instead of a dump"),
        ({"logical_count": torch.zeros(2, LAYERS, E, dtype=torch.int32)}, "holds no count"),
        ({"logical_count": torch.rand(2, LAYERS, E)}, "instead of whole numbers"),
    ):
        torch.save(content, file)
        with pytest.raises(MoevizError, match=problem):
            import_recording(file, tmp_path / "run", top_k=K)
    assert not (tmp_path / "run").exists()
