"""What a test asks of a model: whether anything was computed, and whether its hooks are as they were."""

from __future__ import annotations

from sdtp_lib.architectures.layers import decoder_layers


class Counter:
    """Counts calls of the decoder layers, so that a test can say that nothing was computed."""

    def __init__(self, model):
        self.calls = 0
        self.handle = decoder_layers(model)[0].register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.calls += 1


def hooks_of(model):
    """Hooks and instance attributes of every module: what a ``with`` must leave as it was."""
    counts = [
        (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_hooks_always_called))
        for module in model.modules()
    ]
    return counts, sorted(vars(model))
