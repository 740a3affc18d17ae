"""Options of the test command."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write what the screens show now as what they should show",
    )


@pytest.fixture(scope="session", autouse=True)
def compiled_sums() -> None:
    """Sums come from compiled code in all tests, not from a moment on: they differ by rounding."""
    try:
        from moeviz.capture.host_sums import compile_now
    except ImportError:
        return  # an environment without torch
    compile_now()
