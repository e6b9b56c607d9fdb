"""What to prune: `PruningConfig`, its fields, units, checks and presets; and what cannot be: `PruningNotSupported`.

A bad *field* (a ratio outside (0, 1], an unknown preset) is a ``ValueError``. A *use* that cannot be pruned correctly
(a static cache, an encoder-decoder) is a `PruningNotSupported`. Both say what was given and what to do instead.

Pure data: knows no torch, no model and no scorer. One dial, the keep ratio; token counts, FLOPs and bytes follow from
it in `sdtp_lib.budget`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sdtp_lib.checked import one_of, real_number, whole_number

PRESETS = ("keep09", "keep08", "keep07", "paper-low", "fast")
_FAST = (0.435, 0.708, 0.765, 0.823)  # kept at its four stages
POSITION_MODES = ("original", "compact")
PRUNE_MODES = ("first", "every")


class PruningNotSupported(RuntimeError):
    """A use of the model that token pruning cannot serve correctly; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """Where and how much of a prompt is dropped during prefill (arXiv 2504.04514, section 3).

    Parameters
    ----------
    layers
        0-based indices of the decoder layers *before* which tokens are dropped, ascending. Layer 0 is refused: its
        cache is the record of how many tokens were seen.
    keep_ratio
        Share of the *current* tokens that stays at each stage, in (0, 1]; one number for all stages or one per stage.
        1.0 keeps everything and is exact.
    sink_tokens
        The first tokens of a prompt always stay (attention sinks; paper: 4).
    local_ratio
        Share of the current tokens, counted from the end, that always stays, in [0, 1] (paper: 0.1).
    min_local_tokens
        At least this many last tokens always stay, so that short prompts are left whole. With 0 and ``local_ratio=0``
        the prompt's last token may go, from which ``generate`` would go on: it is refused then.
    positions
        ``"original"`` keeps every token's position; ``"compact"`` renumbers the kept ones 0..K-1 after each stage
        (models with rotary positions, batch 1).
    keep_tokens
        A budget in tokens instead of ``keep_ratio``: how many stay at each stage; one number, or one per stage.
    keep_mass
        An adaptive budget instead of ``keep_ratio``: at each stage the best-scored tokens stay until they hold this
        share of the scores' sum, in (0, 1]. Scores must not be negative; batch 1.
    min_prompt_tokens
        Shorter prompts are left whole, without a warning.
    prune
        ``"first"`` prunes a forward with an empty cache; ``"every"`` also what is added to a cache, when it is longer
        than ``min_prompt_tokens``: after a cached prefix, in each turn.

    Raises
    ------
    ValueError
        If a field is out of its range; the message names the field, the value and the remedy.
    """

    layers: tuple[int, ...]
    keep_ratio: float | tuple[float, ...] = 0.9
    sink_tokens: int = 4
    local_ratio: float = 0.1
    min_local_tokens: int = 16
    positions: str = "original"
    keep_tokens: int | tuple[int, ...] | None = None
    keep_mass: float | None = None
    min_prompt_tokens: int = 0
    prune: str = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "keep_ratio", _checked_ratio(self.keep_ratio, len(self.layers)))
        for field in ("sink_tokens", "min_local_tokens", "min_prompt_tokens"):
            value = whole_number(field, getattr(self, field))
            if value < 0:
                raise ValueError(f"{field}={value} is negative: give a number of tokens, 0 or more.")
            object.__setattr__(self, field, value)
        local_ratio = real_number("local_ratio", self.local_ratio)
        if not 0 <= local_ratio <= 1:
            raise ValueError(f"local_ratio={local_ratio} is outside [0, 1]: give a share of the tokens, such as 0.1.")
        object.__setattr__(self, "local_ratio", local_ratio)
        one_of("positions", self.positions, POSITION_MODES)
        one_of("prune", self.prune, PRUNE_MODES)
        if self.keep_tokens is not None:
            object.__setattr__(self, "keep_tokens", _checked_tokens(self.keep_tokens, len(self.layers)))
        if self.keep_mass is not None:
            if self.keep_tokens is not None:
                raise ValueError("keep_tokens and keep_mass are two budgets: give one of them.")
            object.__setattr__(self, "keep_mass", real_number("keep_mass", self.keep_mass))
            if not 0 < self.keep_mass <= 1:
                raise ValueError(f"keep_mass={self.keep_mass} is outside (0, 1]: give a share of the scores.")

    @classmethod
    def preset(cls, name: str, num_layers: int, **changes: Any) -> PruningConfig:
        """The named setting for a model of ``num_layers`` decoder layers; ``changes`` replace single fields.

        keep09, keep08 and keep07 prune before layers ``range(4, L, 3)`` (ten stages on 32 layers, the paper's SDTP);
        paper-low before the first five of ``range(4, L, 5)`` at 0.9 (the paper's SDTP-low). fast is not the paper's:
        the FLOPs of keep07 on 30 layers with four of its stages (`front_stages`; 4, 7, 13 and 22 of 30), which keep
        0.435, 0.708, 0.765 and 0.823. At 1,024 tokens it loses less on text, long values, news and the language
        reference and is level on needles, instructions, several documents and RULER; at 4,096 tokens it loses more on
        needles (docs/method.md, "How much"; LOG.md, "Few stages that drop early").
        """
        one_of("preset", name, PRESETS)
        num_layers = whole_number("num_layers", num_layers)
        if name == "paper-low":
            layers = tuple(range(4, num_layers, 5))[:5]
            if len(layers) < 5:
                raise ValueError(
                    f"preset='paper-low' needs five stages, but num_layers={num_layers} gives {len(layers)} "
                    f"({list(layers)}): use a model of at least 25 layers, or keep09."
                )
            ratio = 0.9
        else:
            layers = tuple(range(4, num_layers, 3))
            if not layers:
                raise ValueError(
                    f"preset={name!r} prunes from layer 4 on, but num_layers={num_layers}: name the layers yourself, "
                    "PruningConfig(layers=(1,), keep_ratio=...)."
                )
            if name == "fast":
                layers = front_stages(layers)
            ratio = {"keep09": 0.9, "keep08": 0.8, "keep07": 0.7, "fast": _FAST[: len(layers)]}[name]
        return cls(**{"layers": layers, "keep_ratio": ratio, **changes})

    def ratio_at(self, layer_index: int) -> float:
        """The keep ratio of the stage before ``layer_index``."""
        stage = self.layers.index(layer_index)
        return self.keep_ratio[stage] if isinstance(self.keep_ratio, tuple) else self.keep_ratio

    def tokens_at(self, layer_index: int) -> int | None:
        """How many tokens the stage before ``layer_index`` keeps, where the budget is in tokens; else None."""
        stage = self.layers.index(layer_index)
        return self.keep_tokens[stage] if isinstance(self.keep_tokens, tuple) else self.keep_tokens

    def for_prompt(self, _tokens: int) -> PruningConfig:
        """The configuration for a prompt of so many tokens: itself (a wanted speed-up depends on the length)."""
        return self

    def validate_for(self, num_layers: int) -> None:
        """Refuse layers that a model of ``num_layers`` decoder layers does not have."""
        beyond = [layer for layer in self.layers if layer >= num_layers]
        if beyond:
            raise ValueError(
                f"layers={list(self.layers)} names {beyond}, but the model has {num_layers} decoder layers: "
                f"use indices from 1 to {num_layers - 1}."
            )

    def replace(self, **changes: Any) -> PruningConfig:
        """A copy with some fields changed, checked again; an unknown field is refused by name."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, read back by `from_dict`."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningConfig:
        """The config that `to_dict` wrote; an unknown field is refused by name."""
        if not isinstance(values, Mapping) or "layers" not in values:
            raise ValueError(f"{values!r} is no PruningConfig: give what to_dict wrote, with layers at least.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown field(s) {unknown} for PruningConfig: known are {sorted(known)}.")
        return cls(**values)


def typed_budget(text: str) -> str | float:
    """What `token_pruning` takes for what was typed: a keep ratio as a number, anything else as it is."""
    return float(text) if re.fullmatch(r"\d*\.?\d+", text) else text


def front_stages(layers: Sequence[int]) -> tuple[int, ...]:
    """The stages of ``fast`` among ``layers``: at 0, 1/9, 1/3 and 2/3 of them.

    Of keep07's nine stages 4, 7, .. 28 the first, second, fourth and seventh: 4, 7, 13, 22. Up to four are all taken.
    """
    count = len(layers)
    if count <= len(_FAST):
        return tuple(layers)
    return tuple(layers[round(count * share)] for share in (0, 1 / 9, 1 / 3, 2 / 3))


def _is_list(value: Any) -> bool:
    """Whether there is something to go through: not in a text, nor in an array or tensor of no dimension."""
    return isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def _checked_layers(layers: Any) -> tuple[int, ...]:
    if not _is_list(layers):
        raise ValueError(f"layers={layers!r} is not a list of layer indices, such as (4, 7, 10).")
    layers = tuple(whole_number("layers", layer) for layer in layers)
    if not layers:
        raise ValueError("layers=() names no layer to prune before: give at least one index, such as (4,).")
    if min(layers) < 1:
        raise ValueError(
            f"layers={list(layers)} names layer {min(layers)}: the first layer that can be pruned is 1, since the "
            "cache of layer 0 counts the tokens seen."
        )
    if any(later <= earlier for earlier, later in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"layers={list(layers)} is not strictly ascending: sort it and name each layer once.")
    return layers


def _checked_tokens(keep_tokens: Any, stages: int) -> int | tuple[int, ...]:
    fault = "keeps no token: give 1 or more."
    return _per_stage("keep_tokens", keep_tokens, stages, whole_number, lambda count: count >= 1, fault)


def _checked_ratio(keep_ratio: Any, stages: int) -> float | tuple[float, ...]:
    fault = "is outside (0, 1]: 0.9 keeps 90 % of the tokens at each stage."
    return _per_stage("keep_ratio", keep_ratio, stages, real_number, lambda ratio: 0 < ratio <= 1, fault)


def _per_stage(
    field: str, value: Any, stages: int, number: Callable[[str, Any], Any], fits: Callable[[Any], bool], fault: str
) -> Any:
    """One number for all stages, or a tuple of one for each."""
    one_for_all = not _is_list(value)
    numbers = tuple(number(field, each) for each in ((value,) if one_for_all else value))
    if not all(map(fits, numbers)):
        raise ValueError(f"{field}={value!r} {fault}")
    if one_for_all:
        return numbers[0]
    if len(numbers) != stages:
        raise ValueError(
            f"{field}={list(numbers)} has {len(numbers)} entries for {stages} layers: give one, or one for each."
        )
    return numbers
