"""`moeviz dash` keeps the page on this machine and says what is wrong before a server starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moeviz.cli import main
from moeviz.commands.dash import DashArguments, free_port, is_loopback, streamlit_arguments
from moeviz.errors import MoevizError


def flags(arguments: DashArguments) -> list[str]:
    return streamlit_arguments(arguments, Path("/runs/one"), 8601)


def test_flags_keep_the_page_private() -> None:
    given = flags(DashArguments())
    assert {
        "--server.address=127.0.0.1",
        "--server.port=8601",
        "--server.headless=true",
        "--server.allowedHosts=localhost",
        "--server.allowedHosts=127.0.0.1",
        "--browser.gatherUsageStats=false",
        "--server.fileWatcherType=none",
        "--server.runOnSave=false",
    } <= set(given)
    assert given[-2:] == ["--", "--run=/runs/one"]
    assert Path(given[1]).name == "app.py"
    assert Path(given[1]).exists()


def test_other_hosts_are_allowed_only_by_name() -> None:
    given = flags(DashArguments(host="10.0.0.5", i_know=True, allow_host=("moe.example.org",)))
    hosts = [flag.partition("=")[2] for flag in given if flag.startswith("--server.allowedHosts=")]
    assert hosts == ["localhost", "127.0.0.1", "10.0.0.5", "moe.example.org"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "node7.cluster"])
def test_an_address_that_others_reach_must_be_confirmed(host: str) -> None:
    with pytest.raises(MoevizError, match="no login"):
        DashArguments(host=host)
    assert DashArguments(host=host, i_know=True).host == host


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("node7", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_port_out_of_range_is_refused() -> None:
    with pytest.raises(MoevizError, match="port=70000"):
        DashArguments(port=70000)


def test_a_busy_port_is_passed_over() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert taken < free_port("127.0.0.1", first=taken) < taken + 100


def test_an_address_of_another_machine_has_no_free_port() -> None:
    with pytest.raises(MoevizError, match="address of this machine"):
        free_port("192.0.2.1")  # TEST-NET-1: belongs to nobody


def test_a_missing_run_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dash", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("moeviz dash: no run at nothing")
