"""`moeviz dash`: the dashboards in a browser, on this machine only unless someone insists.

Streamlit listens on every interface and accepts any Host header unless told otherwise. Everything that keeps a page
private is passed as a flag here, so that no configuration file of the user's can undo it by accident.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from moeviz.errors import MoevizError, require

FIRST_PORT = 8501
_PORTS_TRIED = 100


@dataclass(frozen=True, kw_only=True)
class DashArguments:
    """Open the dashboards in a browser (loopback only).

    From another machine: ssh -L 8501:localhost:8501 HOST, then open http://localhost:8501 here.
    """

    run: Positional[str | None] = None
    """Run folder, or its name under the runs folder; the newest run when left out."""
    runs: Path = Path("runs")
    """Folder that holds run folders."""
    port: int | None = None
    """Port to listen on. None: the first free one from 8501."""
    host: str = "127.0.0.1"
    """Address to listen on. The dashboards have no login: another address than loopback needs --i-know."""
    allow_host: tuple[str, ...] = ()
    """Further host names that a browser may address, for a proxy or a --host of your own."""
    i_know: bool = False
    """Confirm that everyone who reaches --host may see the runs and the text in them."""
    base_url: str = ""
    """Path under which a proxy serves the dashboards."""
    open: bool = False
    """Open a browser window."""

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise MoevizError(
                f"port={self.port} is not between 1 and 65535; leave it out for the first free one"
            )
        if not is_loopback(self.host) and not self.i_know:
            raise MoevizError(
                f"host={self.host} can be reached from other machines and the dashboards have no login; tunnel with "
                "`ssh -L 8501:localhost:8501 HOST`, or add --i-know"
            )


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(DashArguments, args=argv, prog="moeviz dash", config=(tyro.conf.FlagCreatePairsOff,))
    require("streamlit", "dash", "the dashboard")
    require("plotly", "dash", "the dashboard")
    from moeviz.store.catalog import resolve_run

    path = resolve_run(arguments.run, arguments.runs).resolve()
    port = free_port(arguments.host) if arguments.port is None else arguments.port
    print(f"run {path}", flush=True)
    if not is_loopback(arguments.host):
        print(
            f"warning: everyone who reaches {arguments.host}:{port} sees this run",
            file=sys.stderr,
            flush=True,
        )
    from streamlit.web import cli

    cli.main(streamlit_arguments(arguments, path, port), prog_name="streamlit", standalone_mode=False)
    return 0


def streamlit_arguments(arguments: DashArguments, run: Path, port: int) -> list[str]:
    """What `streamlit` is called with; flags win over every configuration file and environment variable."""
    import dashboards

    assert dashboards.__file__ is not None
    hosts = dict.fromkeys(("localhost", "127.0.0.1", arguments.host, *arguments.allow_host))
    return [
        "run",
        str(Path(dashboards.__file__).parent / "app.py"),
        f"--server.address={arguments.host}",
        f"--server.port={port}",
        *(f"--server.allowedHosts={host}" for host in hosts),
        f"--server.headless={'false' if arguments.open else 'true'}",
        f"--server.baseUrlPath={arguments.base_url}",
        "--server.fileWatcherType=none",
        "--server.runOnSave=false",
        "--browser.gatherUsageStats=false",
        "--",
        f"--run={run}",
    ]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost is taken for reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str, first: int = FIRST_PORT) -> int:
    """The first port from `first` that nobody listens on.

    Raises:
        MoevizError: none in a hundred, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, first + _PORTS_TRIED):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise MoevizError(
        f"no free port from {first} to {first + _PORTS_TRIED - 1} on {host}; give --port, or an address of this machine"
    )
