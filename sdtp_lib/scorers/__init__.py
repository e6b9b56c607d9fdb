"""All that scores tokens, behind one protocol (`sdtp_lib.pruning.stage.Scorer`); none knows the engine.

`simple` needs no training and is offered here by name: ``scorers.attention(8)``. `token_pruners` are the learned ones,
`stage_network` their network at one stage, `blend` how scores are smoothed and mixed, `words` how long words are kept
whole, `by_name` scores by their name on a command line, `found` the scorer that a model gets when nobody names one.
"""

from __future__ import annotations

from sdtp_lib.scorers.simple import attention, given, hidden_norm, name_of, random, recency, uniform, weighted

__all__ = ["attention", "given", "hidden_norm", "name_of", "random", "recency", "uniform", "weighted"]
