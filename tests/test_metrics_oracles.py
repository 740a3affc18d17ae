"""Every metric of the catalogue has a test against something that does not compute it: the list, held to both.

An oracle is another library (transformers, scikit-learn, scipy), a loop over tokens in float64, or numbers that were
published. The last tests are oracles of quantities that have theirs nowhere else.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from metrics_routing import ListSink, load_record, model
from test_metrics_table import definitions

from moeviz.derive import DeriveSink
from moeviz.metrics import METRICS, latent, load
from moeviz.records import MetricRecord

HERE = Path(__file__).parent
ORACLES: dict[str, tuple[str, ...]] = {
    "capture_reduce::sums_equal_a_loop_over_tokens": ("load_count",),
    "metrics_load::shares_sum_to_one_and_coverage_to_k": ("load_share", "load_rel", "coverage"),
    "metrics_load::each_metric_equals_its_plain_definition": (
        "load_cv", "maxvio_batch", "min_load", "load_entropy", "n_eff", "n_eff2", "eff_util", "excess_cov", "gini",
        "load_chi2",
    ),
    "metrics_laws::identities_between_metrics": ("load_imbalance",),
    "derive::accumulated_violation_covers_its_window_and_forgets_what_is_older": ("maxvio_global",),
    "metrics_noise::floors_match_drawn_routing": ("maxvio_floor",),
    "metrics_noise::excess_variation_does_not_depend_on_the_batch_size": ("cv2_excess",),
    "metrics_oracles::importance_is_the_variance_of_gate_sums": ("importance_cv2",),
    "metrics_oracles::starved_and_dead_experts_are_those_of_a_plain_average": ("n_starved", "n_dead"),
    "alerts_load::correlated_tokens_are_told_from_imbalance": ("design_effect",),
    "metrics_noise::expected_drop_matches_a_simulated_limit_and_the_documented_values": (
        "drop_rate", "expected_drop",
    ),
    "metrics_noise::the_capacity_factor_can_be_read_off_the_drops": ("overflow",),
    "metrics_noise::a_token_is_dropped_when_it_loses_all_experts": ("token_drop",),
    "metrics_losses::aux_switch_is_the_mixtral_loss_of_one_layer_over_k": ("aux_switch",),
    "metrics_losses::aux_hf_is_the_mixtral_loss_of_all_layers": ("aux_hf",),
    "metrics_losses::balance_has_the_documented_value_of_each_library": ("aux_gshard",),
    "metrics_losses::aux_seq_is_the_switch_loss_over_k": ("aux_seq",),
    "metrics_losses::z_loss_is_the_switch_z_loss": ("z_loss", "lse_rms"),
    "metrics_losses::router_orthogonality_is_zero_for_orthonormal_rows_only": ("router_orth",),
    "metrics_losses::bias_spans_ignore_padding_and_a_common_shift": ("bias_range", "bias_rms"),
    "metrics_losses::decisions_equal_a_loop_over_tokens": (
        "route_entropy", "route_conf", "margin", "margin12", "gate_eff", "gate_mass", "logit_rms", "logit_max",
        "lse_mean",
    ),
    "metrics_losses::routing_information_vanishes_in_collapse_and_in_indecision": ("route_mi",),
    "metrics_losses::update_ratio_is_relative": ("router_update_ratio",),
    "inspection_findings::decisions_are_those_of_the_logits": ("router_norm",),
    "metrics_tokens::saturation_is_the_mean_overlap_of_sets": ("saturation", "flip1"),
    "metrics_tokens::random_routing_is_saturated_by_chance_only": ("saturation_adj",),
    "probe_history::churn_and_flips_count_valid_tokens_of_consecutive_passes": ("churn",),
    "metrics_tokens::last_fluctuation_is_the_last_step_that_differs": ("last_fluctuation",),
    "metrics_tokens::jensen_shannon_is_scipys_squared": ("probe_drift",),
    "metrics_tokens::coactivation_counts_every_pair_of_every_token": ("coactivation",),
    "metrics_tokens::the_released_script_misses_pairs_that_are_not_adjacent_in_rank": ("coactivation_norm",),
    "metrics_tokens::lift_is_one_for_independent_experts_whatever_their_load": ("coactivation_lift",),
    "metrics_tokens::published_maxima_of_domain_specialisation": ("domain_spec",),
    "metrics_information::published_normalised_information": ("nmi_domain",),
    "metrics_information::mutual_information_is_sklearns": ("mi_domain", "mi_token", "mi_pos", "mi_layer"),
    "metrics_information::entropies_obey_the_chain_rule": ("cond_entropy_layer",),
    "metrics_tokens::domain_information_given_the_token_removes_what_vocabulary_explains": (
        "mi_domain_given_token",
    ),
    "metrics_tokens::a_token_seen_once_is_fully_specialised_on_each_of_its_experts": ("vocab_spec",),
    "metrics_tokens::vocabulary_specialisation_equals_a_loop": ("vocab_spec_layer",),
    "metrics_tokens::expert_token_entropy_is_that_of_each_column": ("expert_token_entropy",),
    "metrics_tokens::repeats_have_the_nulls_of_mixtral_table_5": ("repeat_first", "repeat_any"),
    "metrics_tokens::transitions_are_conditional_probabilities": ("transition",),
    "metrics_tokens::paths_are_counted_as_tuples": ("path_entropy",),
    "metrics_similarity::cosines_are_those_of_every_pair": ("router_cos", "expert_w_cos"),
    "metrics_similarity::cka_ignores_rotations_and_sees_independence": ("linear_cka",),
    "metrics_similarity::pes_is_the_mean_cosine_over_tokens_and_pairs": ("pes",),
    "metrics_similarity::representation_collapse_equals_its_definition": ("rc",),
    "metrics_similarity::coupling_is_spearmans_correlation_with_ties": ("coupling",),
    "metrics_similarity::knockout_is_a_paired_test": ("knockout",),
    "metrics_similarity::reap_is_the_mean_over_routed_tokens": ("reap",),
    "metrics_attention::entropy_is_the_mean_normalised_entropy_of_rows": ("attn_entropy",),
    "metrics_attention::sinks_and_previous_token_heads_are_recognised": ("sink_mass", "sink_rate", "prev_token"),
    "metrics_attention::patterns_of_repeated_tokens_equal_loops": ("induction", "duplicate"),
    "metrics_attention::redundancy_is_one_for_equal_heads_and_zero_for_disjoint_ones": ("head_redundancy",),
    "metrics_attention::distance_counts_tokens_back": ("attn_distance",),
    "metrics_attention::participation_ratio_is_that_of_the_covariance": ("latent_pr", "latent_dim90"),
    "metrics_oracles::effective_ranks_are_those_of_singular_values": (
        "latent_erank", "latent_erank_k", "latent_erank_v", "latent_q_erank", "latent_util",
    ),
    "metrics_attention::a_constant_dimension_is_dead": ("latent_dead",),
    "metrics_oracles::slots_are_paid_what_a_loop_adds_up": ("slot_share",),
    "metrics_attention::slots_mirror_experts": ("slot_n_eff", "slot_dead", "read_entropy", "write_entropy"),
    "metrics_attention::copied_slots_overlap_and_lower_the_rank_of_the_map": ("slot_overlap", "eff_map_rank"),
    "inspection_findings::outputs_and_weights_of_experts_are_compared_pair_by_pair": ("expert_w_norm",),
    "inspection_findings::gradients_are_those_of_a_backward_pass": ("grad_norm_expert", "grad_per_token"),
    "metrics_similarity::clipping_and_ratios": ("update_ratio", "clip_frac"),
    "metrics_similarity::spike_score_counts_points_far_above_their_own_past": ("spike_score",),
}  # fmt: skip
"""Test (`FILE::NAME`, without `test_`) -> the metrics that it holds to an oracle."""
LAWS = {
    "renaming the experts": "metrics_laws::renaming_experts_leaves_every_number_of_a_layer",
    "renaming the experts, per expert": "metrics_laws::renaming_experts_permutes_every_metric_of_an_expert",
    "padding": "capture_reduce::padding_that_holds_nan_changes_nothing",
    "micro-batches": "capture_reduce::micro_batches_add_up",
    "even routing": "metrics_load::even_routing_reads_as_even",
    "total collapse": "metrics_load::total_collapse_reaches_the_end_of_every_scale",
    "a checkpoint with itself": "metrics_tokens::a_checkpoint_is_saturated_with_itself",
    "rows of co-activation": "metrics_tokens::rows_of_coactivation_sum_to_k_minus_one",
    "coverage within a domain": "metrics_tokens::domain_specialisation_sums_to_k",
    "a token seen once": "metrics_tokens::a_token_seen_once_is_fully_specialised_on_each_of_its_experts",
    "balance of a collapsed layer": "metrics_losses::the_auxiliary_loss_reads_balanced_in_total_collapse",
    "balance is no minimum": "metrics_losses::the_auxiliary_loss_is_not_bounded_by_its_value_at_balance",
    "pooled layers": "metrics_losses::pooling_layers_hides_that_each_has_collapsed",
    "pairs adjacent in rank": "metrics_tokens::the_released_script_misses_pairs_that_are_not_adjacent_in_rank",
    "256 even experts": "metrics_laws::an_even_layer_of_256_experts_is_neither_cold_nor_dead",
    "top-2 to top-8": "metrics_laws::every_assignment_of_a_token_counts_from_top_2_to_top_8",
    "published loads": "metrics_load::published_models_read_as_documented",
    "published loads of five domains": "metrics_laws::published_mixture_of_five_domains_reads_as_documented",
    "published information": "metrics_information::published_information_about_domains",
    "published information across layers": "metrics_information::published_information_across_layers",
}
"""What must hold whatever the routing, what once misled others, and what was published."""


@cache
def words(test: str) -> frozenset[str]:
    """Every name and string that a test speaks of, its module's own functions included."""
    file, _, name = test.partition("::")
    tree = ast.parse((HERE / f"test_{file}.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert f"test_{name}" in functions, f"there is no {test}"
    found: set[str] = set()
    todo = [f"test_{name}"]
    while todo:
        for node in ast.walk(functions.pop(todo.pop())):
            text = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)
            if isinstance(text, str):
                found.add(text)
                todo += [text] if text in functions and text not in todo else []
    return frozenset(found)


def test_every_metric_has_an_oracle() -> None:
    held = [metric for metrics in ORACLES.values() for metric in metrics]
    assert sorted(held) == sorted({metric.id for metric in METRICS})


@pytest.mark.parametrize("test", ORACLES)
def test_an_oracle_speaks_of_what_it_holds(test: str) -> None:
    functions = definitions()
    for metric in ORACLES[test]:
        names = {metric, f"{metric}_L", *(function.__name__ for function in functions.get(metric, []))}  # type: ignore[attr-defined]
        names |= {"counts_LE"} if metric == "load_count" else set()
        assert names & words(test), metric


@pytest.mark.parametrize("law", LAWS)
def test_laws_and_counter_examples_are_tests(law: str) -> None:
    assert words(LAWS[law])


# Oracles of what has none elsewhere.


def test_importance_is_the_variance_of_gate_sums() -> None:
    weight_sum_LE = np.random.default_rng(0).gamma(2, size=(3, 7))
    weight_sum_LE[2, 5:] = 0
    expected = [np.var(row) / np.mean(row) ** 2 for row in (*weight_sum_LE[:2], weight_sum_LE[2, :5])]
    found_L = load.importance_cv2(weight_sum_LE, np.array([7, 7, 5]))
    np.testing.assert_allclose(found_L, expected, rtol=1e-12)


def test_starved_and_dead_experts_are_those_of_a_plain_average() -> None:
    """n_starved, n_dead: experts whose average load, exponential over W = 20, is below 1.2 / sqrt(16) and 0.02."""
    rng, sink = np.random.default_rng(4), ListSink()
    derived = DeriveSink(sink, model(2, 16, 2))
    means = [[0.0] * 16 for _ in range(2)]
    for step in range(160):
        odds_E = np.ones(16)
        odds_E[:2], odds_E[2] = (0.25, 0) if step > 60 else (1, 1)
        counts_LE = rng.multinomial(2 * 8192, odds_E / odds_E.sum(), size=2)
        derived.write(load_record(step, counts_LE, 2))
        weight = max(2 / 21, 1 / (step + 1))
        for layer, mean in enumerate(means):
            for expert in range(16):
                load_rel = counts_LE[layer, expert] * 16 / counts_LE[layer].sum()
                mean[expert] += weight * (load_rel - mean[expert])
        values = sink.of(MetricRecord)[-1].values
        assert values["n_starved"].tolist() == [sum(m < 0.3 for m in mean) for mean in means]
        assert values["n_dead"].tolist() == [sum(m < 0.02 for m in mean) for mean in means]
    assert values["n_starved"].tolist() == [3, 3]
    assert values["n_dead"].tolist() == [1, 1]


def test_effective_ranks_are_those_of_singular_values() -> None:
    """Through a projection they are those of the projected latents, which `erank_through` never makes."""
    rng = np.random.default_rng(1)
    latents_NC = rng.normal(size=(90, 5)) @ rng.normal(size=(5, 5)) + 3
    into_WC = rng.normal(size=(11, 5))

    def by_hand(values_NX: np.ndarray) -> float:
        sizes = np.linalg.svd(values_NX - values_NX.mean(axis=0), compute_uv=False)
        shares = [size / sizes.sum() for size in sizes if size > 1e-9]
        return float(np.exp(-sum(share * np.log(share) for share in shares)))

    assert latent.latent_erank(latents_NC) == pytest.approx(by_hand(latents_NC))
    assert latent.latent_util(latents_NC) == pytest.approx(by_hand(latents_NC) / 5)
    through = latent.erank_through(latents_NC, into_WC.T @ into_WC)
    assert through == pytest.approx(by_hand(latents_NC @ into_WC.T), rel=1e-6)


def test_slots_are_paid_what_a_loop_adds_up() -> None:
    write_HSM = np.random.default_rng(2).random((2, 6, 3)) / 4
    paid = [sum(sum(token) for token in head) / 6 for head in write_HSM.tolist()]
    np.testing.assert_allclose(latent.slot_share(write_HSM), paid)
