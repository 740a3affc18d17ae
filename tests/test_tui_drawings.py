"""Drawings are functions of a scene: what they say and how they colour it, against independent recounts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from rich.cells import cell_len
from tui_fakes import FakeArchive, SyntheticRun

from moeviz.colors import load_ramp, rgb_to_hex
from moeviz.live import Series, Snapshot
from tui import quantities
from tui.drawings.alert_list import draw_alert_detail, draw_alert_list, draw_alert_table
from tui.drawings.entropy_rows import draw_entropy_rows
from tui.drawings.flow_map import FlowScene, draw_flow_map, draw_routes, strongest_routes
from tui.drawings.layer_bars import bar_order, draw_layer_bars
from tui.drawings.layer_facts import draw_expert_facts, draw_layer_facts, draw_top_experts
from tui.drawings.load_map import draw_load_map
from tui.drawings.now_panel import draw_now_panel
from tui.drawings.run_table import draw_run_table
from tui.drawings.status_line import Status, draw_keys, draw_status, draw_tabs
from tui.drawings.token_path import draw_shared, draw_token_path, shared_LS
from tui.drawings.token_text import NUM_HUES, TokenScene, draw_token_text, hues_of, layout, printable
from tui.heat import fit, half_lines, pool_extreme
from tui.ink import LEVELS, Ink
from tui.lines import Line, Panel, Summary, chart, resample, sparkline, text_of
from tui.scene import SCALES, Eye, LayerHistory, Scene, coverage_LE, noise_log2_L
from tui.screens.overview import map_height

SHAPES = ((24, 64, 8), (4, 8, 2), (61, 256, 8))
SIZES = ((20, 5), (41, 9), (76, 20), (118, 31), (196, 46))


def scene_of(run: SyntheticRun, **eye: object) -> Scene:
    history = LayerHistory(np.arange(run.steps), run.loads_TLE[:, eye.get("layer", run.sick)])
    return Scene(
        snapshot=run.snapshot(),
        eye=Eye(**{"layer": run.sick, "expert": run.hot[0], **eye}),  # type: ignore[arg-type]
        history=history,
    )


@pytest.fixture(scope="module")
def run() -> SyntheticRun:
    return SyntheticRun(24, 64, 8)


@pytest.fixture(scope="module")
def small() -> SyntheticRun:
    return SyntheticRun(4, 8, 2)


def panels(run: SyntheticRun, ink: Ink, width: int, height: int) -> dict[str, Panel]:
    """Every drawing of every screen at one size."""
    archive = FakeArchive(run)
    tokens = TokenScene(archive.trace(archive.sequences()[2]), layer=1, token=4, total=3)
    flow = FlowScene(archive.flow(0), 1, 2)
    drawn: dict[str, Panel] = {}
    for scale in SCALES:
        scene = scene_of(run, scale=scale)
        for draw in (draw_load_map, draw_layer_bars):
            drawn[f"{draw.__name__} {scale}"] = draw(scene, ink, width, height)
    for draw in (
        draw_entropy_rows,
        draw_now_panel,
        draw_alert_list,
        draw_layer_facts,
        draw_top_experts,
        draw_expert_facts,
    ):
        drawn[draw.__name__] = draw(scene, ink, width, height)
    alerts = scene.snapshot.alerts
    drawn["alert table"] = draw_alert_table(scene, ink, width, height, alerts, 1)
    drawn["alert detail"] = draw_alert_detail(scene, ink, width, height, alerts[0])
    for draw_tokens in (draw_token_text, draw_token_path, draw_shared):
        drawn[draw_tokens.__name__] = draw_tokens(tokens, ink, width, height)
    for draw_flow in (draw_flow_map, draw_routes):
        drawn[draw_flow.__name__] = draw_flow(flow, ink, width, height)
    drawn["runs"] = draw_run_table([], 0, "", "no runs", ink, width, height)
    return drawn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_drawing_fills_its_rectangle_exactly(
    shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    for name, panel in panels(SyntheticRun(*shape, steps=30), Ink(), *size).items():
        assert len(panel.rows) == size[1], name
        for row in panel.rows:
            assert sum(cell_len(segment.text) for segment in row) == size[0], name


def test_ascii_draws_seven_bit_characters_only(run: SyntheticRun, small: SyntheticRun) -> None:
    ink = Ink(ascii=True)
    rows = [row for one in (run, small) for panel in panels(one, ink, 118, 30).values() for row in panel.rows]
    status = Status(run_name="é·run", latest=run.snapshot(), held_step=3)
    rows += [draw_status(status, ink, 118), draw_keys([("←→", "Cell")], ink, 40)]
    assert text_of(rows).isascii()


# The map.


def colors_of(panel: Panel, line: int, start: int, count: int) -> list[tuple[str, str, str]]:
    """(glyph, foreground, background) of `count` cells of a row."""
    cells = [
        (char, segment.style.color.name, segment.style.bgcolor.name)  # type: ignore[union-attr]
        for segment in panel.rows[line]
        for char in segment.text
    ]
    return cells[start : start + count]


def test_half_blocks_carry_the_colours_of_both_layers(run: SyntheticRun) -> None:
    ramp = [rgb_to_hex(color) for color in load_ramp("dark", LEVELS)]
    scene = scene_of(run, layer=23, expert=63)
    panel = draw_load_map(scene, Ink(), 75, 14)
    loads = scene.snapshot.load_rel_LE
    band = noise_log2_L(scene.snapshot)[0]
    for layer in range(0, 22, 2):
        for expert, (glyph, top, bottom) in enumerate(colors_of(panel, 1 + layer // 2, 3, 64)):
            for color, load in ((top, loads[layer, expert]), (bottom, loads[layer + 1, expert])):
                if loads[layer : layer + 2, expert].min() == 0:
                    assert glyph in "ˣₓ"
                    continue
                log = math.log2(load)
                level = 0.0 if abs(log) <= band else min(max(log, -3), 3)
                assert color == ramp[round((level + 3) / 6 * (LEVELS - 1))], (layer, expert)


def test_a_dead_expert_is_a_cross_and_never_a_colour(run: SyntheticRun) -> None:
    panel = draw_load_map(scene_of(run, layer=0, expert=0), Ink(), 75, 14)
    line = colors_of(panel, 1 + run.sick // 2, 3, 64)
    crosses = [expert for expert, (glyph, _, _) in enumerate(line) if glyph in "ˣₓ×"]
    assert crosses == np.flatnonzero(run.loads_TLE[-1, run.sick] == 0).tolist() == run.dead


def test_the_reading_gives_the_ratio_and_the_share_of_tokens(small: SyntheticRun) -> None:
    scene = scene_of(small, layer=2, expert=5)
    load = float(small.loads_TLE[-1, 2, 5])
    reading = text_of(draw_load_map(scene, Ink(), 76, 20).rows[-1:])
    assert reading.startswith(f"L2 E5   {load:.2f}×  {load * 2 / 8:.0%}".replace("%", " % of tokens"))


def test_glyphs_say_the_sign_that_grey_cannot(run: SyntheticRun) -> None:
    panel = draw_load_map(scene_of(run, layer=0, expert=0), Ink(color=False), 75, 26)
    for layer in range(24):
        line = "".join(segment.text for segment in panel.rows[1 + layer])[3:67]
        for load, glyph in zip(run.loads_TLE[-1, layer].tolist(), line, strict=True):
            wanted = (
                "x" if load == 0 else "#" if load > 4 else "+" if load > 2 else "-" if load < 0.5 else "."
            )
            assert glyph == wanted


def test_pooled_experts_are_named_and_the_most_uneven_stands_for_its_group() -> None:
    run = SyntheticRun(5, 256, 8)
    panel = draw_load_map(scene_of(run, layer=0, expert=0), Ink(color=False), 75, 10)
    assert "4 experts a cell" in panel.note
    line = "".join(segment.text for segment in panel.rows[1 + run.sick])[2:66]
    for cell, glyph in enumerate(line):
        loads = run.loads_TLE[-1, run.sick, 4 * cell : 4 * cell + 4]
        if (loads == 0).any():
            assert glyph == "x"


def test_layers_that_do_not_fit_scroll_and_are_named() -> None:
    run = SyntheticRun(61, 8, 2, steps=4)
    panel = draw_load_map(scene_of(run, layer=60, expert=0), Ink(), 60, 12)
    assert "of 61" in panel.note
    assert "60" in text_of(panel.rows)


def test_a_click_lands_on_the_layer_and_expert_that_is_drawn_there(small: SyntheticRun) -> None:
    panel = draw_load_map(scene_of(small), Ink(), 76, 20)
    assert panel.spot is not None
    assert panel.spot(0, 0) is None
    spots = {panel.spot(x, y) for x in range(76) for y in range(20)} - {None}
    assert spots == {(layer, expert) for layer in range(4) for expert in range(8)}


def test_share_and_change_scales_show_what_they_say(small: SyntheticRun) -> None:
    scene = scene_of(small, scale="share", layer=0)
    assert np.allclose(coverage_LE(scene.snapshot), small.loads_TLE[-1] * 2 / 8)
    assert "%" in text_of(draw_load_map(scene, Ink(), 76, 20).rows[1:-2])
    loading = draw_load_map(replace(scene, eye=replace(scene.eye, scale="change")), Ink(), 76, 20)
    assert "loading" in loading.title


# Pooling and fitting.


def test_pooling_keeps_the_value_farthest_from_the_centre() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 17))
    values[0, 3:6] = np.nan
    pooled = pool_extreme(values, 3)
    for row in range(5):
        for group in range(6):
            members = [value for value in values[row, 3 * group : 3 * group + 3] if not math.isnan(value)]
            if members:
                assert pooled[row, group] == max(members, key=abs)
            else:
                assert math.isnan(pooled[row, group])


@pytest.mark.parametrize("marks", [False, True])
def test_a_fitted_grid_stays_inside_and_shows_the_cursor(marks: bool) -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        rows, columns, width, height = (int(n) for n in rng.integers(1, [90, 300, 140, 50]))
        cursor = int(rng.integers(rows))
        grid = fit(rows, columns, width, height, cursor=cursor, marks=marks)
        assert grid.width <= width
        assert grid.lines <= height
        assert grid.num_cells * grid.pool >= columns
        assert grid.first_row <= cursor < grid.first_row + grid.num_rows
        assert 0 <= grid.line_of(cursor) < grid.lines
        assert grid.num_rows == rows or grid.num_rows + 2 > height * (1 if marks else 2) - 1


def test_equal_neighbours_share_a_segment() -> None:
    levels = np.zeros((2, 64), int)
    levels[1, 10:20] = 7
    (row,) = half_lines(levels, Ink().load)
    assert [len(segment.text) for segment in row] == [10, 10, 44]


# Curves.


def test_a_fixed_range_keeps_flat_noise_flat() -> None:
    noise = 0.97 + 0.002 * np.random.default_rng(0).normal(size=40)
    assert len(set(sparkline(noise, 0.0, 1.0, 40))) == 1


def test_a_chart_is_as_high_as_its_values() -> None:
    lines = chart(np.array([0.0, 0.25, 0.5, 1.0, np.nan]), 0.0, 1.0, 5, 4)
    heights = [sum(line[at] != " " for line in lines) for at in range(5)]
    assert heights == [1, 1, 2, 4, 0]


def test_resampling_keeps_the_worst_value() -> None:
    values = np.ones(1000)
    values[637] = -4.0
    assert resample(values, 30, "min").min() == -4.0
    assert len(resample(values, 30, "min")) == 30


@pytest.mark.parametrize(("keep", "reduce"), [("mean", np.nanmean), ("min", np.nanmin), ("max", np.nanmax)])
def test_resampling_reduces_neighbouring_stretches(
    keep: Summary, reduce: Callable[[np.ndarray], float]
) -> None:
    values = np.random.default_rng(2).normal(size=47)
    values[3], values[10:16] = np.nan, np.nan
    short = resample(values, 9, keep)
    edges = [47 * at // 9 for at in range(10)]
    for piece, (start, stop) in zip(short, pairwise(edges), strict=True):
        stretch = values[start:stop]
        assert math.isnan(piece) if np.isnan(stretch).all() else piece == pytest.approx(reduce(stretch))
    assert np.isnan(short[2])


def test_entropy_rows_show_the_worst_of_neighbours(run: SyntheticRun) -> None:
    panel = draw_entropy_rows(
        scene_of(run), Ink(), 80, 5
    )  # 24 layers in 4 lines of two rows each: 3 layers a row
    assert panel.note == "3 layers a row, the worst shown"
    worst = quantities.unit(float(run.entropy_TL()[-1].min()))
    assert worst in text_of(panel.rows)


def test_the_now_panel_names_the_worst_places(run: SyntheticRun) -> None:
    text = text_of(draw_now_panel(scene_of(run), Ink(), 37, 14).rows)
    loads = run.loads_TLE[-1]
    layer, expert = np.unravel_index(loads.argmax(), loads.shape)
    assert f"L{layer} E{expert}" in text
    assert f"{run.entropy_TL()[-1].min():.2f}" in text
    recent = run.loads_TLE[-20:].mean(axis=0)
    assert f"of {24 * 64:,}".replace(",", " ") in text
    dead = next(line for line in text.splitlines() if line.startswith("dead"))
    assert dead.split()[-1] == str((recent < 0.02).sum())


def test_a_loss_that_is_not_a_number_is_called_so(run: SyntheticRun) -> None:
    shot = run.snapshot()
    values = shot.scalars["loss"].values.copy()
    values[-1] = np.nan
    broken = {**shot.scalars, "loss": replace(shot.scalars["loss"], values=values)}
    text = text_of(draw_now_panel(Scene(snapshot=replace(shot, scalars=broken)), Ink(), 37, 14).rows)
    assert "NaN" in text


# One layer.


def test_bars_are_sorted_by_load_or_by_number(run: SyntheticRun) -> None:
    order = bar_order(scene_of(run))
    loads = run.loads_TLE[-1, run.sick, order]
    assert (np.diff(loads) <= 0).all()
    assert bar_order(scene_of(run, by_id=True)).tolist() == list(range(64))


def test_bars_point_up_above_the_even_share_and_down_below(small: SyntheticRun) -> None:
    scene = scene_of(small, layer=small.sick, by_id=True)
    panel = draw_layer_bars(scene, Ink(), 78, 21)
    even = next(at for at, row in enumerate(panel.rows) if "1×" in row[0].text)
    lines = ["".join(segment.text for segment in row) for row in panel.rows]
    cell = (78 - 6) // 8
    for expert, load in enumerate(small.loads_TLE[-1, small.sick].tolist()):
        column = 6 + expert * cell + cell // 2 - 1
        above, below = lines[even - 1][column], lines[even + 1][column]
        if load > 1.3:
            assert (above, below) == ("█", " ")
        elif 0 < load < 0.7:
            assert (above, below) == (" ", "█")
        elif load == 0:
            assert "×" in lines[-3][6 + expert * cell : 6 + (expert + 1) * cell]


def test_a_layer_with_fewer_experts_than_the_widest_shows_only_its_own() -> None:
    run = SyntheticRun(3, 8, 2, steps=5)
    layers = (run.info.layers[0], replace(run.info.layers[1], num_experts=5), run.info.layers[2])
    run.info = replace(run.info, layers=layers)
    run.loads_TLE[:, 1, 5:] = np.nan
    scene = scene_of(run, layer=1, expert=2)
    assert len(bar_order(scene)) == 5
    assert "of 5" in text_of(draw_layer_facts(scene, Ink(), 40, 12).rows)
    assert "nan" not in text_of(draw_load_map(scene, Ink(), 76, 12).rows)


# Tokens.


def test_text_survives_its_layout() -> None:
    texts = ("He", " said", ":", "\n", " 今日", "は", " a-very-long-token-that-does-not-fit", " end")
    for width in (7, 12, 40):
        lines = layout(texts, width)
        assert all(sum(cell_len(piece.text) for piece in line) <= width for line in lines)
        for token, text in enumerate(texts):
            assert "".join(
                piece.text for line in lines for piece in line if piece.token == token
            ) == printable(text)
    assert layout(("a\n", "b"), 40)[1][0].token == 1


def test_token_text_cannot_steer_a_terminal() -> None:
    hostile = "\x1b[31mred\x07\u202eevil\u200b\x9b2J\r\n\t\ufeff\u2028x"
    shown = printable(hostile)
    assert all(char.isprintable() and cell_len(char) > 0 for char in shown)
    assert len(shown) == len(hostile)


def test_at_most_seven_hues_and_the_chosen_expert_is_orange(run: SyntheticRun) -> None:
    archive = FakeArchive(run)
    scene = TokenScene(archive.trace(archive.sequences()[0]), layer=3)
    hues = hues_of(scene)
    tops = scene.top_experts_S.tolist()
    assert len(hues) == NUM_HUES
    least = min(tops.count(expert) for expert in hues)
    assert all(tops.count(expert) <= least for expert in set(tops) - set(hues))
    assert hues_of(replace(scene, only=tops[0])) == {tops[0]: 0}


def test_shared_experts_are_the_overlap_of_the_chosen_sets(run: SyntheticRun) -> None:
    archive = FakeArchive(run)
    trace = archive.trace(archive.sequences()[1])
    shared = shared_LS(TokenScene(trace, token=6))
    for layer in (0, 7, 23):
        own = set(trace.experts_LSK[layer, 6].tolist())
        for token in range(0, len(trace.texts), 9):
            other = set(trace.experts_LSK[layer, token].tolist())
            assert shared[layer, token] == len(own & other) / 8
    assert (shared[:, 6] == 1).all()


def test_the_path_of_a_token_lists_its_experts_in_every_layer(small: SyntheticRun) -> None:
    archive = FakeArchive(small)
    trace = archive.trace(archive.sequences()[0])
    lines = text_of(draw_token_path(TokenScene(trace, token=3), Ink(), 40, 12).rows).splitlines()
    for layer in range(4):
        experts, weights = trace.experts_LSK[layer, 3], trace.weights_LSK[layer, 3]
        said = lines[2 + layer].replace("▸", " ").split()
        assert said == [
            f"L{layer}",
            *(
                word
                for e, w in zip(experts, weights, strict=True)
                for word in (str(e), quantities.unit(float(w)))
            ),
        ]


# Flow.


def test_lift_is_one_when_layers_are_independent(run: SyntheticRun) -> None:
    flow = FakeArchive(run).flow(0)
    assert flow is not None
    rows, columns = np.arange(1, 65), np.arange(3, 67)
    assert np.allclose(replace(flow, counts_EE=np.outer(rows, columns)).lift_EE, 1.0)


def test_routes_are_more_frequent_than_chance_and_carry_traffic(run: SyntheticRun) -> None:
    flow = FakeArchive(run).flow(2)
    assert flow is not None
    routes = strongest_routes(flow, 12)
    total = flow.counts_EE.sum()
    for source, target, lift, share in routes:
        joint = flow.counts_EE[source, target] / total
        chance = flow.counts_EE[source].sum() / total * flow.counts_EE[:, target].sum() / total
        assert lift == pytest.approx(joint / chance)
        assert share == joint
        assert lift > 1
    assert [route[2] for route in routes] == sorted((route[2] for route in routes), reverse=True)


@pytest.mark.parametrize("shape", [(1, 4, 2), *SHAPES, (48, 64, 8)])
@pytest.mark.parametrize("marks", [False, True])
def test_map_and_entropy_rows_share_the_height(shape: tuple[int, int, int], marks: bool) -> None:
    scene = Scene(snapshot=SyntheticRun(*shape, steps=3).snapshot())
    for height in range(27, 70):
        lines = map_height(scene, Ink(color=not marks), 75, height)
        assert 5 <= lines <= height - 5  # a frame, an axis and at least two lines of rows remain
        least = shape[0] if marks else (shape[0] + 1) // 2
        assert lines >= min(least + 4, height - 7)


# Words.


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (quantities.count(12480), "12 480"),
        (quantities.count(2.345e9), "2.3 G"),
        (quantities.ratio(14.23), "14.2×"),
        (quantities.ratio(0.354), "0.35×"),
        (quantities.ratio(math.nan), "–"),
        (quantities.percent(0.634), "63 %"),
        (quantities.percent(0.0012), "0.12 %"),
        (quantities.unit(0.9996), "1.0"),
        (quantities.unit(0.998), ".99"),
        (quantities.unit(0.605), ".60"),
        (quantities.number(3.1172), "3.117"),
        (quantities.number(3e-4), "3.0e-04"),
        (quantities.number(math.inf), "inf"),
        (quantities.duration(0.43), "0.4 s"),
        (quantities.duration(400), "7 min"),
        (quantities.duration(90_000), "25.0 h"),
    ],
)
def test_numbers_carry_their_units(said: str, wanted: str) -> None:
    assert said == wanted


def state_line(shot: Snapshot, **changes: object) -> str:
    status = Status(run_name="mine", latest=shot, behind_seconds=shot.behind_seconds, **changes)  # type: ignore[arg-type]
    return text_of([draw_status(status, Ink(), 140)])


def test_each_state_has_its_own_words(run: SyntheticRun) -> None:
    assert "live 0.4 s behind" in state_line(run.snapshot())
    assert "stale 41 s behind" in state_line(run.snapshot(state="stale", behind=41))
    assert "ended 5 min ago" in state_line(run.snapshot(state="ended", behind=300))
    assert "presumed dead no write for 3 min" in state_line(run.snapshot(state="dead", behind=170))
    assert "waiting for the first step" in state_line(run.snapshot(-1, state="waiting"))
    assert "paused at 12" in state_line(run.snapshot(), held_step=12)


def test_the_top_line_counts_alerts_by_severity(run: SyntheticRun) -> None:
    assert "1 critical" in state_line(run.snapshot())
    assert "1 warning" in state_line(run.snapshot())
    muted = frozenset(alert.episode for alert in run.snapshot().alerts)
    assert "no alerts" in state_line(run.snapshot(), muted=muted)


def test_a_line_is_never_wider_than_it_may_be() -> None:
    for width in range(12):
        row = (
            Line(Ink(), width)
            .put("今日は")
            .put("x", width=3)
            .to(7)
            .put("long words", align="right", width=20)
            .row()
        )
        assert sum(cell_len(segment.text) for segment in row) == width


def test_tabs_name_every_screen_even_when_narrow() -> None:
    tabs = (("a", "1", "Overview"), ("b", "2", "Layer"), ("c", "3", "Tokens"))
    assert "Overview" in text_of([draw_tabs(tabs, "a", Ink(), 34)])
    assert "3 Toke" in text_of([draw_tabs(tabs, "a", Ink(), 34)])


def test_churn_of_the_probe_is_a_number_of_now_where_there_is_one(small: SyntheticRun) -> None:
    scene = scene_of(small)
    assert "probe churn" not in text_of(draw_now_panel(scene, Ink(), 76, 20).rows)
    churn = Series(steps=np.array([100, 200]), values=np.array([0.4, 0.125]))
    scalars = {**scene.snapshot.scalars, "probe_churn": churn}
    probed = replace(scene, snapshot=replace(scene.snapshot, scalars=scalars))
    lines = text_of(draw_now_panel(probed, Ink(), 76, 20).rows).splitlines()
    assert [line.split()[:4] for line in lines if "probe churn" in line] == [["probe", "churn", "12", "%"]]
