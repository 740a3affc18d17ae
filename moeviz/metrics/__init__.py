"""One pure definition per quantity, split by what it describes, and the METRICS table that explains them all.

`load` balance of a layer; `noise` what sampling alone would show; `losses`; `capacity` drops; `decision` the router's
view of a token; `change` over training; `coactivation`; `specialization`; `information` with its nulls; `paths` across
layers; `similarity` of experts; `importance`; `attention`; `latent`; `gradients`; `live` everything that a training
step's sums allow. numpy only.
"""

from moeviz.metrics.glossary import GROUPS, METRICS, by_id, live_ids
from moeviz.metrics.live import layer_shapes, live_metrics
from moeviz.metrics.metric import Metric

__all__ = ["GROUPS", "METRICS", "Metric", "by_id", "layer_shapes", "live_ids", "live_metrics"]
