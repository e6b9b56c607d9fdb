"""Which attention a stage may look back at: that of the last tokens, in the few layers that ran on the same tokens.

Shared by whoever reads it at inference (`stage`), stores it with the labels (`saliency`), and learns from it
(`pruners`). Knows no model and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

ASKING_TOKENS = 16  # the prompt's last tokens, whose attention says what is asked for
LAYERS_BACK = 3  # the presets prune every third layer, so that every layer from the first stage on is looked at


def looked_back(stages: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each of ``stages`` (layers before which tokens are dropped) the `LAYERS_BACK` layers before it.

    None before the stage in front, which ran on other tokens; where there are fewer, the first of them counts again.
    """
    found, last = {}, 0
    for stage in sorted(stages):
        found[stage] = tuple(max(last, stage - back) for back in range(LAYERS_BACK, 0, -1))
        last = stage
    return found
