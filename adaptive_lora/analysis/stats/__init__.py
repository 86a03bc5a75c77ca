"""Statistics of paired comparisons: arrays in, numbers out.

Legend of axes, which also end the names of arrays:

    S  seeds, the unit of inference (folds are averaged within a seed before they come here)
    E  examples of the test part
    M  methods that are compared with the baseline
    B  bootstrap draws or sign flips
    K  points of one front, or adapter sites
    N  simulated studies

Differences are method minus baseline; for a loss, negative is better. Every decision of the
comparison rests on sign flips, which need no normal distribution. Intervals over few seeds are
Student's t, since no bootstrap of them covers as often as asked.
"""

from adaptive_lora.analysis.stats.efficiency import (
    first_reached,
    front_gain,
    front_share,
    mean_agreement,
    pareto_front,
    rank_agreement,
)
from adaptive_lora.analysis.stats.intervals import (
    STUDENT,
    Interval,
    bootstrap_interval,
    expanded_confidence,
    few_seeds,
    interval_of_draws,
    mean_interval,
    t_interval,
)
from adaptive_lora.analysis.stats.power import (
    Correction,
    Effect,
    checked_seeds,
    examples_for_new_examples,
    examples_for_power,
    fewest_seeds,
    paired_effect,
    paired_power,
    seeds_for_power,
    sign_flip_ps,
    simulated_power,
    wilson_interval,
)
from adaptive_lora.analysis.stats.racing import RACE_RULE, RaceRule, nearest_passes, standing
from adaptive_lora.analysis.stats.ratio import FIELLER, ratio_of_means
from adaptive_lora.analysis.stats.sequential import (
    REPEATED,
    Looks,
    repeated_interval,
    sequential_p,
    sequential_sign_flip,
)
from adaptive_lora.analysis.stats.significance import (
    EXACT_SEEDS,
    attainable_p,
    benjamini_hochberg,
    equivalence_t_test,
    equivalence_test,
    holm,
    least_seeds,
    noninferiority_test,
    normality,
    paired_t,
    sign_flip_test,
    step_down_max_t,
    symmetry,
    wilcoxon,
)
from adaptive_lora.analysis.stats.two_way import (
    Components,
    hierarchical_bootstrap,
    two_way_interval,
    variance_components,
)

__all__ = [
    "EXACT_SEEDS", "FIELLER", "RACE_RULE", "REPEATED", "STUDENT", "Components", "Correction", "Effect", "Interval",
    "Looks", "RaceRule", "attainable_p",
    "benjamini_hochberg", "bootstrap_interval", "checked_seeds", "equivalence_t_test", "equivalence_test",
    "examples_for_new_examples", "examples_for_power", "expanded_confidence", "few_seeds", "fewest_seeds",
    "first_reached", "front_gain", "front_share", "hierarchical_bootstrap", "holm", "interval_of_draws",
    "least_seeds", "mean_agreement", "mean_interval", "nearest_passes", "noninferiority_test", "normality",
    "paired_effect",
    "paired_power", "paired_t", "pareto_front", "rank_agreement", "ratio_of_means", "repeated_interval",
    "seeds_for_power", "sequential_p", "sequential_sign_flip", "sign_flip_ps",
    "sign_flip_test", "simulated_power", "standing", "step_down_max_t", "symmetry", "t_interval",
    "two_way_interval", "variance_components", "wilcoxon", "wilson_interval",
]  # fmt: skip
