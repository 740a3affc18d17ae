"""The pages as a person meets them: a live run, a server started by `moeviz dash`, a headless Chromium.

Skipped with a reason where no Chromium or Chrome is found; with MOEVIZ_REQUIRE_BROWSER=1 that is a failure instead.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dashboards_run import HOSTILE

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

HERE = Path(__file__).resolve().parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 90_000
MAP = "canvas[aria-roledescription='heat map']"
TEXT = "[aria-roledescription='token text']"
STEP = re.compile(r"step ([\d\u202f]+)")


class Site(NamedTuple):
    """A server that shows a live run."""

    port: int
    browser: Any

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


def chromium() -> str:
    """Path of a browser; skips, or fails where one is required."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found:
        return found
    if os.environ.get("MOEVIZ_REQUIRE_BROWSER") == "1":
        pytest.fail(f"MOEVIZ_REQUIRE_BROWSER=1, but none of {', '.join(NAMES)} is installed")
    pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    binary = chromium()
    run = tmp_path_factory.mktemp("runs") / "fox"
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    writer = subprocess.Popen(
        [sys.executable, str(HERE / "dashboards_run.py"), str(run), "60", "0.3", "80"], env=environment
    )
    processes = [writer]
    try:
        wait_for((run / "run.duckdb").exists, "the first write")
        server = [sys.executable, "-m", "moeviz.cli", "dash", str(run), f"--port={port}"]
        processes.append(subprocess.Popen(server, env=environment, cwd=run.parent, stdout=subprocess.DEVNULL))
        wait_for(lambda: answers(port), "the start of the server")
        from playwright.sync_api import expect, sync_playwright

        expect.set_options(timeout=PATIENCE_MS)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
            yield Site(port, browser)
            browser.close()
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture
def page(site: Site) -> Iterator[Any]:
    """A fresh session; fails the test when the page threw anything."""
    context = site.browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    thrown: list[str] = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.on("console", lambda line: thrown.append(line.text) if "BidiComponent" in line.text else None)
    yield page
    problems = page.locator("[data-testid=stException]").all_inner_texts()
    context.close()
    assert thrown + problems == []


def soon(locator: Any) -> Any:
    """Playwright's assertions, which look again until they hold: a page shows a part before it fills it."""
    from playwright.sync_api import expect

    return expect(locator)


def step_of(page: Any) -> int:
    soon(page.locator(".facts")).to_contain_text(STEP)
    found = STEP.search(page.locator(".facts").inner_text())
    assert found is not None
    return int(found.group(1).replace("\u202f", ""))


def box_at_rest(page: Any, selector: str) -> dict[str, float]:
    """Where an element lies once it has stayed there for a second: parts above it may still be arriving."""
    boxes: list[dict[str, float] | None] = []

    def still() -> bool:
        boxes.append(page.locator(selector).bounding_box())
        return len(boxes) > 10 and boxes[-1] is not None and all(box == boxes[-1] for box in boxes[-10:])

    wait_for(still, f"a resting {selector}")
    assert boxes[-1] is not None
    return boxes[-1]


def test_live_page_moves_on_without_remounting_the_map(site: Site, page: Any) -> None:
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(site.url())
    page.locator(MAP).evaluate("canvas => { canvas.mark = 'kept' }")
    first = step_of(page)
    pixels = page.locator(MAP).evaluate("canvas => canvas.toDataURL()")
    wait_for(lambda: step_of(page) > first + 4, "a later step")
    assert page.locator(MAP).evaluate("canvas => canvas.mark") == "kept"
    assert page.locator(MAP).evaluate("canvas => canvas.toDataURL()") != pixels
    soon(page.locator(".state")).to_have_attribute("data-state", "live")
    assert not [url for url in fetched if "plotly" in url.lower()], "the live page must not load plotly"


def test_a_click_on_a_cell_selects_it_everywhere(site: Site, page: Any) -> None:
    page.goto(site.url())
    box = box_at_rest(page, MAP)
    page.mouse.move(box["x"] + 0.31 * box["width"], box["y"] + 0.55 * box["height"])
    told = page.locator(".tip", has_text="Expert").first.inner_text()
    layer, expert = map(int, re.findall(r"\d+", told.splitlines()[0]))
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(re.compile(f"layer={layer}&expert={expert}"))
    soon(page.get_by_label("Layer", exact=False).first).to_have_value(f"Layer {layer}")
    page.goto(site.url("loads") + "?" + page.url.partition("?")[2])
    page.get_by_role("heading", name=f"Loads of layer {layer}").wait_for()


def test_the_map_can_be_read_and_used_from_the_keyboard(site: Site, page: Any) -> None:
    page.goto(site.url("?layer=1&expert=3"))
    box_at_rest(page, MAP)
    page.locator(MAP).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    soon(page.locator(".quiet").first).to_contain_text("Layer 2 · Expert 4")
    soon(page.locator(".quiet").first).to_contain_text("of assignments")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("layer=2&expert=4"))
    soon(page.locator(MAP)).to_have_attribute("aria-label", re.compile("Largest: expert"))


def test_every_page_opens_from_the_navigation(site: Site, page: Any) -> None:
    page.goto(site.url())
    page.locator(MAP).wait_for()
    for name, sign in (
        ("Loads", ".js-plotly-plot"),
        ("Tokens", TEXT),
        ("Flow", ".sankey"),
        ("Attention", "canvas[aria-roledescription='attention map']"),
        ("Live overview", MAP),
    ):
        page.get_by_role("link", name=name).click()
        page.locator(sign).first.wait_for()
        assert page.locator("[data-testid=stException]").count() == 0
        page.wait_for_url(re.compile("run=fox"))


def test_a_deep_link_is_the_first_thing_a_session_opens(site: Site, page: Any) -> None:
    page.goto(site.url("loads?layer=3&live=0&step=20"))
    page.get_by_role("heading", name="Loads of layer 3").wait_for()
    page.get_by_text("Each expert at step 20").wait_for()


def test_token_text_is_never_run_as_markup(site: Site, page: Any) -> None:
    page.goto(site.url("tokens?domain=code"))
    soon(page.locator(TEXT)).to_contain_text(HOSTILE)
    assert page.locator("img[src='x']").count() == 0
    assert page.title() != "owned"


def test_the_layer_dial_recolours_in_place(site: Site, page: Any) -> None:
    page.goto(site.url("tokens?domain=stories&layer=0"))
    spans = page.locator(TEXT + " span")
    soon(page.locator(".where")).to_have_text("Layer 0")
    soon(spans).not_to_have_count(0)
    spans.first.evaluate("span => { span.mark = 'kept' }")
    before, after, where = page.locator("input.layer").evaluate(
        """dial => {
            // One task of the browser: no answer of the server can come in between.
            const root = dial.getRootNode();
            const colours = () => [...root.querySelectorAll(".text span")].map((span) => span.style.backgroundColor);
            const before = colours();
            dial.value = 2;
            dial.dispatchEvent(new Event("input", { bubbles: true }));
            return [before, colours(), root.querySelector(".where").textContent];
        }"""
    )
    assert where == "Layer 2"
    assert len(before) == len(after) > 0
    assert before != after
    assert spans.first.evaluate("span => span.mark") == "kept"
    page.locator("input.layer").dispatch_event("change")
    page.wait_for_url(re.compile("layer=2"))


def test_an_expert_filter_dims_the_other_tokens(site: Site, page: Any) -> None:
    page.goto(site.url("tokens?domain=stories&layer=1"))
    soon(page.locator(TEXT + " span")).not_to_have_count(0)
    chip = page.locator(".keys button").first
    expert = int(re.findall(r"\d+", chip.inner_text())[0])
    chip.click()
    page.wait_for_url(re.compile(f"expert={expert}"))
    soon(page.locator(".keys button[aria-pressed=true]")).to_have_count(1)
    soon(page.locator(TEXT + " span.off")).not_to_have_count(0)
    assert page.locator(TEXT + " span.off").count() < page.locator(TEXT + " span").count()


def test_only_loopback_is_listened_to(site: Site) -> None:
    """The kernel's own list of listening sockets (Linux); addresses are little-endian hex."""
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.partition(":")
            if state == "0A" and int(port, 16) == site.port:
                listening.append(address)
    assert listening == ["0100007F"]


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 101), ("localhost", 101), ("evil.example", 403)])
def test_data_is_refused_under_a_foreign_name(site: Site, host: str, status: int) -> None:
    """A page of another name, resolved to this machine, must not reach the run (DNS rebinding)."""
    request = (
        f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}:{site.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Origin: http://{host}:{site.port}\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", site.port), timeout=90) as connection:
        connection.sendall(request.encode())
        answer = connection.recv(200).decode(errors="replace")
    assert answer.startswith(f"HTTP/1.1 {status}")
