"""Statistics of paired comparisons: arrays in, numbers out.

Legend of axes, which also end the names of arrays:

    S  seeds, the unit of inference (folds are averaged within a seed before they come here)
    E  examples of the test part
    M  methods that are compared with the baseline
    B  bootstrap draws or sign flips

Differences are method minus baseline; for a loss, negative is better. Every decision of the
comparison rests on sign flips, which need no normal distribution; Student's t stands beside them.
"""

from adaptive_lora.stats.arrays import Interval
from adaptive_lora.stats.effects import Effect, paired_effect, paired_power, seeds_for_power
from adaptive_lora.stats.intervals import (
    bootstrap_interval,
    expanded_confidence,
    hierarchical_bootstrap,
)
from adaptive_lora.stats.significance import (
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
    wilcoxon,
)

__all__ = [
    "Effect",
    "Interval",
    "attainable_p",
    "benjamini_hochberg",
    "bootstrap_interval",
    "equivalence_t_test",
    "equivalence_test",
    "expanded_confidence",
    "hierarchical_bootstrap",
    "holm",
    "least_seeds",
    "noninferiority_test",
    "normality",
    "paired_effect",
    "paired_power",
    "paired_t",
    "seeds_for_power",
    "sign_flip_test",
    "step_down_max_t",
    "wilcoxon",
]
