"""From a model to token pruners: labels of how much each token matters, and networks that learn to predict them.

Start with `run` (`train_pruners`: the whole way) and `recipes` (what decides the outcome). `prompts` chooses what is
trained and measured on, `saliency` labels it and keeps labels on disk, `labels` says what a label is, `oracles` the KL
of a label used as the score; `config` holds the fields of a training, `simulation` prunes softly within one forward,
`losses` and `step` make a loss of it, `trainer` runs the steps; `verdict` measures the outcome, `card` writes it down.
The command line is `commands.train`.
"""
