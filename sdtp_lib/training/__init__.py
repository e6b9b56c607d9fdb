"""From samples to token pruners: labels of what each token is worth, and a network that learns to predict them.

`saliency` labels samples and keeps them on disk, `labels` says what a label is, `config` holds the recipe's fields,
`simulation` prunes softly within one forward, `losses` and `step` make a loss of it, `trainer` runs the steps.
"""
