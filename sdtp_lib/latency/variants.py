"""What is timed beside the unpruned model: SDTP's presets, and what else one could do for the same prefill FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from sdtp_lib import budget, methods
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.variant import UNPRUNED, Variant
from sdtp_lib.pruning.stage import Scorer

PRESETS = ("keep09", "keep08", "keep07")
# Not asl, whose layer depends on the prompt, and not uniprefill's own budget: a row says beforehand what it computes.
SCALED = ("lazyllm", "gemfilter", "fastkv", "claa", "sliminfer", "pyramidinfer", "streamingllm")


def presets(
    model: Any, scorer: Scorer, names: Sequence[str] = PRESETS, prompt_tokens: int | None = None
) -> list[Variant]:
    """The unpruned model and SDTP with each preset, scored by ``scorer``; the same at every prompt length."""
    layers = budget.ModelShape.from_model(model).num_layers
    found = [Variant(name, PruningConfig.preset(name, layers), scorer, kind="SDTP") for name in names]
    return [Variant(UNPRUNED, kind=UNPRUNED), *found]


def alternatives(model: Any, scorer: Scorer, prompt_tokens: int, names: Sequence[str] = ("keep09",)) -> list[Variant]:
    """What else one could do, each at the causal prefill FLOPs of SDTP with the preset it stands beside.

    The published methods (`sdtp_lib.methods`) whose cost is known beforehand, less those that cannot be so fast; SnapKV
    with as many keys as SDTP leaves on average; and the earlier reproduction's scheme with the same stages. The
    preset's name is part of theirs.
    """
    shape = budget.ModelShape.from_model(model)
    found = []
    for name in names:
        config = PruningConfig.preset(name, shape.num_layers)
        counts = budget.tokens_per_layer(config, shape.num_layers, prompt_tokens)
        limit = budget.speedup_limit(shape, config, prompt_tokens)
        entries = [methods.get(each).at_speedup(limit) for each in SCALED]
        entries.append(methods.get("snapkv", tokens=round(sum(counts) / len(counts))))
        entries.append(methods.get("earlier-scheme", preset=name, pruners=scorer))
        found += [(f"{entry.name} {name}", entry) for entry in entries]
    return _within_reach(model, found, prompt_tokens)


def named(model: Any, names: Sequence[str], prompt_tokens: int, scorer: Scorer) -> list[Variant]:
    """Methods as they are typed (`sdtp_lib.methods.named`), less those that cannot be so fast at this length, with a
    warning."""
    left_out: dict[str, str] = {}
    found = _within_reach(model, [(text, methods.named(text)) for text in names], prompt_tokens, scorer, left_out)
    for name, why in left_out.items():
        warnings.warn(f"{name} is left out at {prompt_tokens} tokens: {why}", stacklevel=2)
    return found


def _within_reach(
    model: Any,
    entries: Iterable[tuple[str, methods.Method]],
    prompt_tokens: int,
    scorer: Scorer | None = None,
    left_out: MutableMapping[str, str] | None = None,
) -> list[Variant]:
    """Published methods under a name; ``scorer`` is for those that do not bring their own, ``left_out`` is filled."""
    found = []
    for name, method in entries:
        variant = Variant(name, method, method.scorer_for(model) or scorer, kind=method.name)
        try:
            variant.config(model, prompt_tokens)
        except methods.SpeedupOutOfReach as error:
            if left_out is not None:
                left_out[name] = str(error)
        else:
            found.append(variant)
    return found


def every_method(model: Any, scorer: Scorer, names: Sequence[str], prompt_tokens: int) -> list[Variant]:
    """`presets` and `alternatives` together."""
    return presets(model, scorer, names) + alternatives(model, scorer, prompt_tokens, names)
