"""What training frees is kept for the next step, and for nobody who did not ask: by the system's page faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import TOY, corpus_cache

from trainer.allocator import keep_freed_memory
from trainer.config import TrainConfig

__all__ = ["corpus_cache"]

_BLOCK, _TIMES = 40 << 20, 5
_PAGES = _TIMES * (_BLOCK // os.sysconf("SC_PAGE_SIZE"))
"""Page faults of taking that block anew each time."""
_COUNT = f"""
import json, resource
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({_TIMES}):
        b"x" * {_BLOCK}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
"""


def _glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError):
        return False


pytestmark = pytest.mark.skipif(not _glibc(), reason="the C library here is not glibc")


def child(code: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a fresh process prints as JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD"):
        inherited.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _COUNT + code],
        env=inherited | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_freed_memory_is_handed_out_again_once_told() -> None:
    told = child("""
from trainer.allocator import keep_freed_memory
before = faults()
told = keep_freed_memory()
faults()
print(json.dumps(dict(before=before, told=told, after=faults())))
""")
    assert told["told"]
    assert told["before"] >= _PAGES
    assert told["after"] < _PAGES / 100


def test_what_is_kept_can_be_given_back() -> None:
    told = child("""
from trainer.allocator import give_back, keep_freed_memory
keep_freed_memory()
faults()
kept = resident()
give_back()
print(json.dumps(dict(kept=kept, left=resident())))
""")
    assert told["kept"] - told["left"] > 0.9 * _BLOCK  # the system counts pages roughly


_ASKED = """
from trainer.allocator import keep_freed_memory
told = keep_freed_memory()
faults()
print(json.dumps(dict(told=told, after=faults())))
"""


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}],
    ids=str,
)
def test_what_the_user_told_glibc_stands(variables: Mapping[str, str]) -> None:
    asked = child(_ASKED, variables)
    assert not asked["told"]
    assert asked["after"] >= _PAGES


def test_tunables_of_other_parts_of_glibc_do_not_count() -> None:
    assert child(_ASKED, {"GLIBC_TUNABLES": "glibc.pthread.rseq=1"})["told"]


_OTHER = """
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
static char *next, *end;
void *aligned_alloc(size_t alignment, size_t size) {   /* from a region that is never given back */
    if (!next || next + size + alignment + 16 > end) {
        size_t region = size + alignment + (64UL << 20);
        next = mmap(0, region, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        end = next + region;
    }
    char *place = (char *)(((size_t)next + 16 + alignment - 1) / alignment * alignment);
    ((size_t *)place)[-1] = size;
    next = place + size;
    return place;
}
void *memalign(size_t alignment, size_t size) { return aligned_alloc(alignment, size); }
int posix_memalign(void **out, size_t alignment, size_t size) { *out = aligned_alloc(alignment, size); return 0; }
void *malloc(size_t size) { return aligned_alloc(16, size); }
void *calloc(size_t count, size_t size) { return malloc(count * size); }
void free(void *place) {}
size_t malloc_usable_size(void *place) { return place ? ((size_t *)place)[-1] : 0; }
void *realloc(void *place, size_t size) {
    size_t before = malloc_usable_size(place);
    return place ? memcpy(malloc(size), place, before < size ? before : size) : malloc(size);
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build another allocator with")
def test_another_allocator_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text(_OTHER)
    library = tmp_path / "other.so"
    build = ["cc", "-O1", "-fno-builtin", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "other.c")]
    subprocess.run(build, check=True, timeout=120)
    assert not child(_ASKED, {"LD_PRELOAD": str(library)})["told"]


def test_a_preloaded_library_without_an_allocator_does_not_count() -> None:
    assert child(_ASKED, {"LD_PRELOAD": "libm.so.6"})["told"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "confstr", refuse)  # as musl's and macOS's does
    assert not keep_freed_memory({})


def test_watching_a_model_changes_no_process() -> None:
    told = child("""
import torch, tempfile, moeviz
from model.config import ModelConfig
from model.lm import MoELanguageModel
import trainer.train
model = MoELanguageModel(ModelConfig(vocab_size=64, dim=16, num_layers=1, num_heads=2, num_experts=4, expert_dim=16))
with tempfile.TemporaryDirectory() as folder:
    with moeviz.watch(model, folder + "/run") as probe:
        ids = torch.zeros(1, 5, dtype=torch.int64)
        model(ids, ids).ce.backward()
        probe.step()
print(json.dumps(dict(after=faults())))
""")
    assert told["after"] >= _PAGES


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus_cache: None) -> dict[bool, dict[str, Any]]:
    """A short training with the memory kept and without, each in its own process."""
    folder = tmp_path_factory.mktemp("allocator")
    return {keep: _trained(replace(TOY, run=folder / str(keep)), keep) for keep in (True, False)}


def _trained(config: TrainConfig, keep: bool) -> dict[str, Any]:
    words = replace(config, engine=replace(config.engine, keep_freed_memory=keep)).to_dict()
    return child(f"""
from trainer.config import TrainConfig
from trainer.train import train
done = train(TrainConfig.from_dict({words!r}))
faults()
recorded = json.loads((done.run / "run.json").read_text())["config"]["engine"]["keep_freed_memory"]
print(json.dumps(dict(losses=done.losses, after=faults(), recorded=recorded)))
""")


def test_training_keeps_memory_unless_told_not_to(runs: dict[bool, dict[str, Any]]) -> None:
    assert runs[True]["after"] < _PAGES / 100
    assert runs[False]["after"] >= _PAGES


def test_the_losses_are_the_same_bits(runs: dict[bool, dict[str, Any]]) -> None:
    assert len(runs[True]["losses"]) == TOY.max_steps
    assert runs[True]["losses"] == runs[False]["losses"]


def test_a_run_says_what_it_was_told(runs: dict[bool, dict[str, Any]]) -> None:
    assert {keep: run["recorded"] for keep, run in runs.items()} == {True: True, False: False}
