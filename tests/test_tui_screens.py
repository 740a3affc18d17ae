"""What each screen does with its keys and clicks: alerts, bars, routes, tokens."""

from __future__ import annotations

import pytest
from tui_fakes import FakeArchive, SyntheticRun
from tui_screen import Stage

from tui.drawings.token_text import TokenScene
from tui.widgets.pane import Pane


@pytest.fixture(scope="module")
def run() -> SyntheticRun:
    return SyntheticRun(6, 16, 2, steps=60)


# Alerts.


async def test_alerts_appear_with_their_remedy_when_they_are_raised(run: SyntheticRun) -> None:
    async with Stage(run, run.snapshot(20), run.snapshot()).open() as stage:
        assert "no alerts" in stage.text
        await stage.press("5")
        assert "no alert in this run so far" in stage.text
        await stage.advance()
        assert "CRITICAL" in stage.text
        remedy = run.alerts(59)[0].remedy
        assert " ".join(remedy.split()[:5]) in stage.text
        await stage.press("down")
        assert "Often heals" in stage.text


async def test_muting_and_acknowledging_stay_in_this_view(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("5", "a")
        assert "seen" in stage.text
        await stage.press("m")
        assert "muted" in stage.text
        assert "1 critical" not in stage.text
        await stage.press("1")
        assert "routing collapse" not in stage.text
        await stage.press("5", "m", "1")
        assert "routing collapse" in stage.text


async def test_enter_on_an_alert_goes_to_its_layer_and_expert(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("5", "j", "enter")
        assert stage.screen.NAME == "layer"
        assert (stage.app.eye.layer, stage.app.eye.expert) == (run.sick, run.dead[0])


# Layer, flow, tokens.


async def test_bars_are_walked_in_their_order(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("2", *["left"] * 20)
        order = (-run.loads_TLE[-1, run.sick]).argsort(kind="stable")
        assert stage.app.eye.expert == order[0]
        await stage.press("right", "right")
        assert stage.app.eye.expert == order[2]
        await stage.press("down")
        assert f"layer {run.sick + 1} · load of this step" in stage.text
        assert "last 60 ticks" in stage.text  # the history came from the archive


async def test_flow_follows_a_route_from_layer_to_layer(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("slash", "0", ".", "3", "enter", "3", "right", "right")
        assert "flow from layer 0 (rows) to layer 1 (columns)" in stage.text
        assert "E3 → E2" in stage.text
        await stage.press("enter")
        assert "flow from layer 1" in stage.text
        assert stage.app.eye.expert == 2
        await stage.press("slash", "5", "enter")
        assert "No sampled tokens go from this layer" in stage.text


async def token_view(stage: Stage) -> TokenScene:
    await stage.press("4")
    screen = stage.screen
    view = screen.view  # type: ignore[attr-defined]
    assert isinstance(view, TokenScene)
    return view


def token_styles(stage: Stage) -> list[str]:
    pane = stage.screen.query_one("#text", Pane)
    assert pane.panel is not None
    return [str(segment.style) for row in pane.panel.rows[:6] for segment in row]


async def test_tokens_are_recoloured_by_another_layer(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        view = await token_view(stage)
        colours, words = token_styles(stage), stage.text.splitlines()[3]
        await stage.press("right")
        assert stage.app.eye.layer == run.sick + 1
        assert token_styles(stage) != colours
        assert stage.text.splitlines()[3].split("│")[1] == words.split("│")[1]
        await stage.press("left")
        assert token_styles(stage) == colours
        assert view.trace is not None


async def test_sequences_the_cursor_and_one_expert_alone(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await token_view(stage)
        assert "sequence 1 of 3" in stage.text
        await stage.press("n")
        assert "sequence 2 of 3" in stage.text
        assert "Once" in stage.text
        await stage.press("l", "l")
        assert "token 2" in stage.text
        await stage.press("f")
        trace = FakeArchive(run).trace(FakeArchive(run).sequences()[1])
        expert = int(trace.experts_LSK[run.sick, 2, 0])
        share = (trace.experts_LSK[run.sick, :, 0] == expert).mean()
        assert f"E{expert}" in stage.text
        assert f"{share:.0%}".replace("%", " %") in stage.text
        await stage.press("p", "p", "p")
        assert "sequence 1 of 3" in stage.text


async def test_from_an_expert_to_its_tokens_is_one_key(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("2", "enter")
        assert stage.screen.NAME == "tokens"
        assert f"E{run.hot[0]} " in stage.text
        assert "among all choices" in stage.text


async def test_a_run_without_tokens_says_how_to_get_them(run: SyntheticRun) -> None:
    stage = Stage(run)
    stage.archive.sequences = list  # type: ignore[method-assign,assignment]
    async with stage.open():
        await stage.press("4")
        assert "--log-routing" in stage.text


# Mouse.


async def test_a_click_moves_the_cursor_and_brings_the_pane_to_the_front(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        pane = stage.screen.query_one("#map", Pane)
        assert pane.panel is not None
        assert pane.panel.spot is not None
        x, y = next((x, y) for y in range(20) for x in range(70) if pane.panel.spot(x, y) == (4, 7))
        await stage.pilot.click("#map", offset=(x + 2, y + 1))
        await stage.settle()
        assert (stage.app.eye.layer, stage.app.eye.expert) == (4, 7)
        await stage.pilot.click("#now")
        await stage.settle()
        assert stage.screen.front in ("now", "map")
