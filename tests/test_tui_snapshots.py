"""What every screen looks like, as text: stored beside this file and compared, so that a change is seen in review."""

from __future__ import annotations

import pytest
from tui_fakes import SyntheticRun
from tui_screen import Stage, check

from tui.ink import Ink

BIG, SMALL = (24, 64, 8), (4, 8, 2)
CASES = {
    "overview-80x24": ((80, 24), BIG, (), Ink()),
    "overview-120x36": ((120, 36), BIG, (), Ink()),
    "overview-200x50": ((200, 50), BIG, (), Ink()),
    "overview-no-color": ((120, 40), BIG, (), Ink(color=False)),
    "overview-ascii": ((120, 36), SMALL, (), Ink(ascii=True)),
    "overview-small-model": ((120, 36), SMALL, (), Ink()),
    "overview-paused": ((120, 36), SMALL, ("comma", "comma"), Ink()),
    "layer": ((120, 36), BIG, ("2",), Ink()),
    "layer-share": ((120, 36), SMALL, ("2", "y", "y", "s"), Ink()),
    "flow": ((120, 36), SMALL, ("3",), Ink()),
    "tokens": ((120, 36), BIG, ("4", "n"), Ink()),
    "tokens-80x24": ((80, 24), SMALL, ("4", "tab", "tab"), Ink()),
    "alerts": ((120, 36), BIG, ("5", "j"), Ink()),
    "runs": ((120, 36), BIG, ("6",), Ink()),
    "runs-80x24": ((80, 24), BIG, ("6",), Ink()),
    "latents": ((120, 36), SMALL, ("7",), Ink()),
    "help": ((100, 34), BIG, ("question_mark",), Ink()),
}


@pytest.mark.parametrize("name", CASES)
async def test_the_screen_looks_as_stored(name: str, pytestconfig: pytest.Config) -> None:
    size, shape, keys, ink = CASES[name]
    async with Stage(SyntheticRun(*shape), ink=ink).open(*size) as stage:
        for key in keys:
            await stage.press(key)
        text = stage.text
    check(name, text, pytestconfig.getoption("--update-snapshots"))


def test_a_screen_that_changed_is_reported_line_by_line() -> None:
    with pytest.raises(AssertionError, match=r"\+something else"):
        check("runs", "something else", update=False)
