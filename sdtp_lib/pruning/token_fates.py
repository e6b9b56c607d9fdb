"""What became of each token of one prompt: the layer it was dropped at, its position and its scores.

`TokenFates` stands between the engine's trace and everything that draws it: plain numpy, no torch, no HTML, no
plotting. `simulate` cuts the scores of one unpruned run in arithmetic alone, for sliders; it is an approximation of the
engine, since in the engine the scores of later stages depend on earlier cuts. Axis letters: T prompt tokens, S stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdtp_lib.budget import keep_count, protected_count
from sdtp_lib.config import PruningConfig

# Five stops of matplotlib's "plasma", whose lightness falls evenly: the order survives every kind of colour blindness.
_PLASMA = ((246, 215, 70), (251, 159, 58), (219, 92, 104), (163, 38, 157), (110, 12, 170))


def stage_colours(stages: int) -> list[tuple[int, int, int]]:
    """RGB (0-255) of each stage, from yellow (dropped first) over red to violet (dropped last)."""
    at = np.linspace(0, len(_PLASMA) - 1, stages) if stages > 1 else np.zeros(stages)
    channels = [np.interp(at, range(len(_PLASMA)), channel) for channel in zip(*_PLASMA, strict=True)]
    return [tuple(round(float(value)) for value in rgb) for rgb in zip(*channels, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFates:
    """One prompt's tokens after pruning.

    Parameters
    ----------
    dropped_at
        (T,) the layer before which each token was dropped; ``num_layers`` for tokens that stayed to the end.
    layers
        The S stage layers, ascending.
    num_layers
        Decoder layers of the model.
    scores
        (S, T) the score each token had at each stage; NaN where it was gone already or nothing was scored.
    approximate
        True where `simulate` made it out of an unpruned run's scores.
    """

    dropped_at: np.ndarray
    layers: tuple[int, ...]
    num_layers: int
    scores: np.ndarray
    approximate: bool = False

    def __post_init__(self) -> None:
        allowed = {*self.layers, self.num_layers}
        strange = sorted({int(layer) for layer in np.unique(self.dropped_at)} - allowed)
        if strange:
            raise ValueError(f"dropped_at names layer(s) {strange}: only stages {self.layers} drop tokens.")
        if self.scores.shape != (len(self.layers), len(self.dropped_at)):
            raise ValueError(f"scores are {self.scores.shape}, not ({len(self.layers)}, {len(self.dropped_at)}).")

    @classmethod
    def from_trace(cls, trace: Any, *, row: int = 0, num_layers: int | None = None) -> TokenFates:
        """The tokens of prompt ``row`` of a ``PruningTrace`` (or anything with its fields)."""
        num_layers = num_layers if num_layers is not None else len(trace.tokens_per_layer)
        tokens = int(_numpy(trace.prompt_lengths).reshape(-1)[row])
        layers = tuple(sorted(int(layer) for layer in trace.kept_positions))
        dropped_at = np.full(tokens, num_layers)
        scores = np.full((len(layers), tokens), np.nan)
        left = np.ones(tokens, bool)
        for stage, layer in enumerate(layers):
            kept = _numpy(trace.kept_positions[layer])[row]
            still = np.zeros(tokens, bool)
            still[kept[kept >= 0].astype(int)] = True
            dropped_at[left & ~still] = layer
            left &= still
            if layer in trace.scores:
                seen = _numpy(trace.scored_positions[layer])[row].astype(int)
                real = seen >= 0
                scores[stage, seen[real]] = _numpy(trace.scores[layer])[row][real]
        return cls(dropped_at, layers, num_layers, scores)

    @property
    def tokens(self) -> int:
        """T, the prompt's length."""
        return len(self.dropped_at)

    @property
    def kept_count(self) -> int:
        """Tokens that stayed to the last layer."""
        return int((self.dropped_at == self.num_layers).sum())

    def stage_of_token(self) -> np.ndarray:
        """(T,) index of the stage that dropped each token, S for kept ones."""
        return np.searchsorted(np.asarray([*self.layers, self.num_layers]), self.dropped_at)

    def dropped_per_stage(self) -> list[int]:
        """How many tokens each stage dropped."""
        return [int((self.dropped_at == layer).sum()) for layer in self.layers]

    def tokens_per_layer(self) -> list[int]:
        """Tokens computed in each layer."""
        return [int((self.dropped_at > layer).sum()) for layer in range(self.num_layers)]

    def compression_ratio(self) -> float:
        """1/tau: tokens over the mean number of tokens computed in a layer."""
        return self.tokens / float(np.mean(self.tokens_per_layer()))

    def layer_label(self, position: int) -> str:
        """Where one token was dropped, in words."""
        layer = int(self.dropped_at[position])
        return "kept to the end" if layer == self.num_layers else f"dropped before layer {layer}"


def simulate(
    scores: Mapping[int, Any],
    config: PruningConfig,
    num_layers: int,
    *,
    positions: Mapping[int, Any] | None = None,
    protect: Any = None,
) -> TokenFates:
    """Cut ``scores`` as the engine would if they did not depend on earlier cuts (marked approximate).

    Parameters
    ----------
    scores
        ``{layer: (T,)}`` of a run at keep ratio 1.0, at least for the layers of ``config``.
    config
        Stages, ratios and protected tokens (`budget.keep_count` decides how many stay; ties go to the later token).
    positions
        ``{layer: (T,)}`` token positions of the scores; 0..T-1 if left out.
    protect
        (T,) of bool: tokens that are never dropped, as in ``token_pruning(..., protect=)``.

    Raises
    ------
    ValueError
        If a stage of ``config`` has no scores.
    """
    missing = [layer for layer in config.layers if layer not in scores]
    if missing:
        raise ValueError(f"no scores at layer(s) {missing}: the unpruned run scored layers {sorted(scores)}.")
    config.validate_for(num_layers)
    table = np.stack([_numpy(scores[layer]).astype(float).reshape(-1) for layer in config.layers])
    if positions is not None:
        order = np.stack([np.argsort(_numpy(positions[layer]).reshape(-1)) for layer in config.layers])
        table = np.take_along_axis(table, order, axis=1)
    tokens = table.shape[1]
    dropped_at = np.full(tokens, num_layers)
    left = np.arange(tokens)
    seen = np.full(table.shape, np.nan)
    never = np.zeros(tokens, bool) if protect is None else _numpy(protect).reshape(-1).astype(bool)
    for stage, layer in enumerate(config.layers):
        seen[stage, left] = table[stage, left]
        stays = _kept(table[stage, left], config, layer, never[left])
        dropped_at[left[~stays]] = layer
        left = left[stays]
    return TokenFates(dropped_at, config.layers, num_layers, seen, approximate=True)


def _kept(scores: np.ndarray, config: PruningConfig, layer: int, never: np.ndarray) -> np.ndarray:
    """(n,) which of the n tokens kept so far stay at ``layer``; ``never`` (n,) are the ones that may not be dropped."""
    left = len(scores)
    local = max(0, protected_count(left, config) - config.sink_tokens)
    index = np.arange(left)
    protected = (index < config.sink_tokens) | (index >= left - local) | never
    keep = keep_count(left, layer, config, int(protected.sum()))
    # Last key first: protected tokens lead, then the score, then the later position.
    order = np.lexsort((-index, -np.nan_to_num(scores, nan=-np.inf), ~protected))
    stays = np.zeros(left, bool)
    stays[order[:keep]] = True
    return stays


def _numpy(values: Any) -> np.ndarray:
    """``values`` as numpy; a torch tensor (any device, bfloat16 too) comes through without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)
