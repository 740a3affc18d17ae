"""The Latents screen shows the block, part and head that keys choose, from a run on disk as from a fake."""

from __future__ import annotations

import numpy as np
import pytest
from latent_runs import MLA_BLOCK, SLOT_BLOCK, STEPS, TEXTS, records_of, write_run
from tui_fakes import TEXTS as FAKE_TEXTS
from tui_fakes import SyntheticRun, tokens
from tui_screen import Stage

from tui.archive import LatentPlace
from tui.drawings.latent_sheet import draw_latent_facts, draw_latent_picture, draw_latent_time
from tui.ink import Ink
from tui.latents import LatentView
from tui.lines import text_of
from tui.store_source import StoreArchive


def stage(kind: str | None, ink: Ink | None = None) -> Stage:
    made = Stage(SyntheticRun(4, 8, 2), ink=ink)
    made.archive.latent_kind = kind  # type: ignore[assignment]
    return made


async def test_keys_choose_block_and_part() -> None:
    shown = stage("mla")
    async with shown.open(140, 40) as on:
        await on.press("7")
        assert "block 2" in on.text
        assert "latents of keys and values" in on.text
        assert "Latent dimensions (entropy)" in on.text
        await on.press("up")
        assert "block 0 · latents" in on.text
        await on.press("up")  # the first one stays
        assert "block 0 · latents" in on.text
        await on.press("t")
        assert "latents of queries" in on.text


async def test_keys_choose_head_and_stage() -> None:
    shown = stage("two-stage")
    async with shown.open(140, 40) as on:
        await on.press("7")
        assert "head 0 · stage 1" in on.text
        await on.press("right", "right", "right")
        assert "head 2 · stage 1" in on.text
        await on.press("t")
        assert "head 0 · stage 2" in on.text
        assert "mass of each slot" in on.text


async def test_tokens_scroll_and_stop_at_the_end() -> None:
    shown = stage("mla")
    async with shown.open(100, 30) as on:
        await on.press("7")
        assert "tokens 0 to" in on.text
        for _ in range(9):
            await on.press("pagedown")
        last = len(tokens(FAKE_TEXTS[0]))
        assert f"to {last - 1} of {last}" in on.text
        for _ in range(9):
            await on.press("pageup")
        assert "tokens 0 to" in on.text


async def test_without_latents_the_screen_says_how_to_get_some() -> None:
    shown = stage(None)
    async with shown.open() as on:
        await on.press("7")
        assert "demo-mla" in on.text
        assert "demo-slots" in on.text


async def test_the_screen_is_asked_again_for_another_step() -> None:
    shown = stage("mla")
    async with shown.open() as on:
        await on.press("7")
        before = on.archive.asked.count("latents")
        await on.press("comma")
        assert on.archive.asked.count("latents") == before + 1


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> StoreArchive:
    path = tmp_path_factory.mktemp("runs") / "latents"
    write_run(path)
    return StoreArchive(path)


def test_a_run_on_disk_gives_what_was_written(archive: StoreArchive) -> None:
    kv, q, read, write = records_of(10)
    for block, part, head, record in (
        (MLA_BLOCK, 0, 0, kv), (MLA_BLOCK, 1, 0, q), (SLOT_BLOCK, 0, 1, read), (None, 1, 3, write),
    ):  # fmt: skip
        sheet = archive.latents(LatentPlace(block=block, part=part, head=head, step=17))
        assert sheet is not None
        assert (sheet.part, sheet.block, sheet.step, sheet.head) == (record.name, record.layer, 10, head)
        span = np.ptp(record.grid_XSC[head])
        assert np.abs(sheet.grid_SC - record.grid_XSC[head]).max() <= span / 510 + 1e-6
        assert sheet.steps_T.tolist() == [0, 10]
        np.testing.assert_allclose(sheet.profile_TC[-1], record.profile_XC.mean(axis=0), rtol=1e-6)
        assert sheet.texts == TEXTS[record.first :]
    assert archive.latents(LatentPlace(step=-1)) is None
    assert {value.name for value in archive.latents(LatentPlace(step=STEPS[-1])).values} == {  # type: ignore[union-attr]
        "Effective slots",
        "Reading entropy",
    }


@pytest.mark.parametrize("ink", [Ink(), Ink(ascii=True), Ink(color=False), Ink(theme="light")])
@pytest.mark.parametrize("size", [(20, 4), (60, 12), (150, 40)])
def test_drawings_fill_any_rectangle(archive: StoreArchive, ink: Ink, size: tuple[int, int]) -> None:
    for place in (
        LatentPlace(block=MLA_BLOCK, step=20),
        *(LatentPlace(part=part, step=20) for part in (0, 1)),
    ):
        view = LatentView(sheet=archive.latents(place), first_row=3)
        for draw in (draw_latent_picture, draw_latent_time, draw_latent_facts):
            panel = draw(view, ink, *size)
            assert len(panel.rows) == size[1]
            assert all(sum(segment.cell_length for segment in row) == size[0] for row in panel.rows)
            if ink.ascii:
                assert text_of(panel.rows).isascii()


def test_a_token_of_the_picture_is_named_and_marked(archive: StoreArchive) -> None:
    view = LatentView(sheet=archive.latents(LatentPlace(block=MLA_BLOCK, step=20)))
    lines = text_of(draw_latent_picture(view, Ink(color=False), 80, 12).rows).splitlines()
    kv = records_of(20)[0].grid_XSC[0]
    top = np.quantile(np.abs(kv), 0.99)
    at = TEXTS.index(" foxes")
    cells = lines[1 + at][13:].split()
    assert lines[1 + at].startswith("foxes")
    expected = [
        "#" if v > 0.6 else "+" if v > 0.2 else "=" if v < -0.6 else "-" if v < -0.2 else "."
        for v in kv[at] / top
    ]
    differs = sum(a != b for a, b in zip(cells, expected, strict=True))
    assert differs <= 1  # a value at a border may be rounded across
