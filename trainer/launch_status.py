"""What the launcher and the ranks agree on, without torch."""

from __future__ import annotations

import socket

LOST_STATUS = 75
"""Exit status of a rank that ended because another one did."""
LAUNCHED = "MOEVIZ_LAUNCHED"
"""Variable that is set where `moeviz train --num-ranks` started the process."""


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
