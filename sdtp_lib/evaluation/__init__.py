"""What pruning costs in quality. The programs' few names are offered here: ``evaluation.compare_scorers(...)``.

`divergence` from the unpruned model on one continuation, `methods` to compare with, `compare` variants as rows,
`answers` to tasks with a right answer, `fewshot` tasks through lm-eval, `statistics` and `tables`. Draws nothing.
"""

from __future__ import annotations

from sdtp_lib.evaluation.compare import LOSSLESS_PERPLEXITY_PERCENT, compare_scorers
from sdtp_lib.evaluation.divergence import continuation_logits, kl_divergence, mean_loss
from sdtp_lib.evaluation.methods import baseline_methods, published_methods
from sdtp_lib.evaluation.statistics import paired_bootstrap, perplexity
from sdtp_lib.methods.variant import Variant

__all__ = [
    "LOSSLESS_PERPLEXITY_PERCENT",
    "Variant",
    "baseline_methods",
    "compare_scorers",
    "continuation_logits",
    "kl_divergence",
    "mean_loss",
    "paired_bootstrap",
    "perplexity",
    "published_methods",
]
