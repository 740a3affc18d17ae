"""One pure definition per quantity, split by what it describes, and the METRICS table that explains them all.

`load` balance of a layer, `noise` what sampling alone would show, `losses`, `decision` the router's view of a
token, `capacity` drops, `live` everything that a training step's sums allow. numpy only.
"""

from moeviz.metrics.glossary import METRICS, by_id, live_ids
from moeviz.metrics.live import layer_shapes, live_metrics
from moeviz.metrics.metric import Metric

__all__ = ["METRICS", "Metric", "by_id", "layer_shapes", "live_ids", "live_metrics"]
