"""Every question a view may ask a run, one function each: Store -> DataFrame with documented columns.

The functions live beside their kin in `queries_*.py`; import them from here.
"""

from __future__ import annotations

from moeviz.store.queries_analysis import analysis
from moeviz.store.queries_around import alerts_around, metrics_around, scalar_values, scalars_around
from moeviz.store.queries_latents import (
    LatentArrays,
    latent_arrays,
    latent_index,
    latent_metrics,
    latent_profiles,
    latent_spectra,
)
from moeviz.store.queries_loads import last_step, load_history, load_matrix, load_over_time, step_range
from moeviz.store.queries_paths import coactivation, expert_tokens, transitions
from moeviz.store.queries_probe import ProbePasses, probe_domains, probe_passes, probe_saturation, probe_steps
from moeviz.store.queries_runs import end_status, has_ended, list_runs, run_state, state_of, step_rhythm
from moeviz.store.queries_series import (
    alert_records,
    alert_transitions,
    alerts,
    dropped_samples,
    events,
    metric_names,
    metric_over_time,
    sampling_level,
    scalars,
)
from moeviz.store.queries_tokens import (
    TraceArrays,
    attention_index,
    attention_map,
    sequences,
    token_flow,
    token_texts,
    trace_arrays,
)

__all__ = [
    "LatentArrays",
    "ProbePasses",
    "TraceArrays",
    "alert_records",
    "alert_transitions",
    "alerts",
    "alerts_around",
    "analysis",
    "attention_index",
    "attention_map",
    "coactivation",
    "dropped_samples",
    "end_status",
    "events",
    "expert_tokens",
    "has_ended",
    "last_step",
    "latent_arrays",
    "latent_index",
    "latent_metrics",
    "latent_profiles",
    "latent_spectra",
    "list_runs",
    "load_history",
    "load_matrix",
    "load_over_time",
    "metric_names",
    "metric_over_time",
    "metrics_around",
    "probe_domains",
    "probe_passes",
    "probe_saturation",
    "probe_steps",
    "run_state",
    "sampling_level",
    "scalar_values",
    "scalars",
    "scalars_around",
    "sequences",
    "state_of",
    "step_range",
    "step_rhythm",
    "token_flow",
    "token_texts",
    "trace_arrays",
    "transitions",
]
