"""What moeviz records, told to the tracker that a team already uses: Weights & Biases, TensorBoard or trackio.

    records --> Bridged (a Sink) --> store, as ever
                   |-> digest: numbers and load pictures --> Bridge (queue, thread) --> Tracker

A tracker gets scalars, the metrics of all layers as mean, smallest and largest, the loads as a picture and a histogram,
and alerts. Token-level decisions stay with moeviz: trackers have no place for them. Nothing a tracker does, or fails
to do, reaches training.
"""

from moeviz.bridges.bridge import Bridge, Bridged, BridgeStats
from moeviz.bridges.digest import Digest
from moeviz.bridges.opening import TRACKERS, TrackedRun, Tracking, bridged, check_trackers
from moeviz.bridges.tracker import Tracker

__all__ = [
    "TRACKERS",
    "Bridge",
    "BridgeStats",
    "Bridged",
    "Digest",
    "TrackedRun",
    "Tracker",
    "Tracking",
    "bridged",
    "check_trackers",
]
