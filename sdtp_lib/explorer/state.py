"""What the explorer shows, as a plain object: choices in, `TokenFates` and numbers out. No widget, no torch.

Scores and answers come from any object with `Source`'s methods; `engine_source.EngineSource` is the one on the real
engine. Moving a choice cuts the scores of one unpruned run again (`token_fates.simulate`: approximate, no model call);
only `ExplorerState.run` asks the source to prune for real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdtp_lib import budget
from sdtp_lib.checked import one_of
from sdtp_lib.config import POSITION_MODES, PRESETS, PruningConfig
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.token_fates import TokenFates, simulate

OWN = "own"
_CHOICES = {"keep_ratio", "layers", "preset", "scorer", "prompt", "positions", "protect"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes
    ----------
    ids
        Token ids of the whole prompt, chat format included.
    question, right_answer
        What is asked and what is right, where known; plain text.
    places
        Name -> first and last token of a place worth finding, such as ``{"question": (498, 510)}``.
    """

    ids: tuple[int, ...]
    question: str = ""
    right_answer: str = ""
    places: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """One prompt seen by one scorer in a run at keep ratio 1.0: T token texts and ``{layer: (T,)}`` scores."""

    tokens: Sequence[str]
    scores: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What the engine did in a real run, dropped tokens and answer, beside the same prompt unpruned; one run each."""

    fates: TokenFates
    answer: str
    full_answer: str
    prefill_s: float
    full_prefill_s: float
    total_s: float
    full_total_s: float
    kv_bytes: int
    full_kv_bytes: int


class Source(Protocol):
    """Where prompts, scores and answers come from."""

    name: str
    num_layers: int
    shape: ModelShape | None
    prompts: Sequence[str]
    scorers: Sequence[str]
    notes: Sequence[str]

    def prompt(self, name: str) -> Prompt:
        """The prompt of this name."""
        ...

    def add_prompt(self, name: str, document: str, question: str = "", *, chat: bool = True) -> None:
        """Take a typed prompt in; ValueError where nothing can be pruned."""
        ...

    def scored(self, prompt: str, scorer: str) -> Scored:
        """The scores of an unpruned run, kept so that asking again costs nothing."""
        ...

    def run(self, prompt: str, scorer: str, config: PruningConfig, protect: Sequence[int] = ()) -> Outcome:
        """Prune for real and answer."""
        ...


class ExplorerState:
    """The explorer's choices, always a valid set of them.

    Parameters
    ----------
    source
        Prompts, scorers, scores and answers.
    prompt, scorer
        Names out of ``source``; the first of each by default.
    preset
        One of `config.PRESETS`; its layers and ratio are the start.
    keep_ratio, layers
        Replace the preset's (which then is called ``own``).
    """

    def __init__(
        self,
        source: Source,
        *,
        prompt: str | None = None,
        scorer: str | None = None,
        preset: str = "keep09",
        positions: str = "original",
        keep_ratio: float | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.prompt = one_of("prompt", prompt or source.prompts[0], source.prompts)
        self.scorer = one_of("scorer", scorer or source.scorers[0], source.scorers)
        self.preset = preset
        self.config = PruningConfig.preset(preset, source.num_layers, positions=positions)
        self.protect: tuple[int, ...] = ()
        self.outcome: Outcome | None = None
        changes = {"keep_ratio": keep_ratio, "layers": layers}
        if any(value is not None for value in changes.values()):
            self.update(**{name: value for name, value in changes.items() if value is not None})
        self._fates = self._cut(self.scorer)

    def update(self, **choices: Any) -> None:
        """Change choices: ``keep_ratio``, ``layers``, ``preset``, ``scorer``, ``prompt``, ``positions``, ``protect``.

        All of them or none: a value that cannot be is a ValueError and leaves the state as it was.
        """
        unknown = sorted(set(choices) - _CHOICES)
        if unknown:
            raise ValueError(f"unknown choice(s) {unknown}.")
        before = (self.prompt, self.scorer, self.preset, self.config, self.protect)
        try:
            self.prompt = one_of("prompt", choices.get("prompt", self.prompt), self.source.prompts)
            self.scorer = one_of("scorer", choices.get("scorer", self.scorer), self.source.scorers)
            if "preset" in choices and choices["preset"] != OWN:
                name = one_of("preset", choices["preset"], PRESETS)
                self.config = PruningConfig.preset(name, self.source.num_layers, positions=self.config.positions)
                self.preset = name
            if "prompt" in choices:
                self.protect = ()  # positions of another prompt
            self.protect = tuple(choices.get("protect", self.protect))
            changes = {name: choices[name] for name in ("keep_ratio", "layers", "positions") if name in choices}
            if isinstance(changes.get("keep_ratio"), float):
                # a slider's 0.8999999999999999 is meant as 0.9
                changes["keep_ratio"] = round(changes["keep_ratio"], 6)
            if "positions" in changes:
                one_of("positions", changes["positions"], POSITION_MODES)
            changed = self.config.replace(**{n: tuple(v) if n == "layers" else v for n, v in changes.items()})
            if changed.replace(positions=self.config.positions) != self.config:
                self.preset = OWN
            self.config = changed
            fates = self._cut(self.scorer)
        except BaseException:
            self.prompt, self.scorer, self.preset, self.config, self.protect = before
            raise
        self._fates, self.outcome = fates, None

    @property
    def scored(self) -> Scored:
        """Tokens and scores behind the picture."""
        return self.source.scored(self.prompt, self.scorer)

    @property
    def fates(self) -> TokenFates:
        """What to draw: the engine's set after `run`, the approximate one after a change."""
        return self.outcome.fates if self.outcome else self._fates

    def fates_of(self, scorer: str) -> TokenFates:
        """The approximate `TokenFates` under another scorer with the same choices."""
        return self._cut(one_of("scorer", scorer, self.source.scorers))

    def run(self) -> Outcome:
        """Prune for real with the present choices."""
        self.outcome = self.source.run(self.prompt, self.scorer, self.config, self.protect)
        return self.outcome

    def numbers(self) -> dict[str, float]:
        """Tokens, compression and shares of the unpruned cost of what is drawn.

        ``kept_tokens``, ``prompt_tokens``, ``compression_ratio`` (1/tau), ``kv_share`` and, with a known model shape,
        ``prefill_flops_share``, both in [0, 1].
        """
        fates = self.fates
        per_layer = fates.tokens_per_layer()
        numbers = {
            "prompt_tokens": fates.tokens,
            "kept_tokens": fates.kept_count,
            "compression_ratio": fates.compression_ratio(),
            "kv_share": sum(per_layer) / (fates.tokens * fates.num_layers),
        }
        if self.source.shape is not None:
            full = budget.prefill_flops(self.source.shape, [fates.tokens] * fates.num_layers)
            numbers["prefill_flops_share"] = budget.prefill_flops(self.source.shape, per_layer) / full
        return numbers

    def provenance(self) -> dict[str, Any]:
        """What an exported view was made from; no prompt text."""
        return {
            "prompt": self.prompt,
            "scorer": self.scorer,
            "preset": self.preset,
            "approximate": self.fates.approximate,
            **({"protected_tokens": len(self.protect)} if self.protect else {}),
            **{f"pruning_{name}": value for name, value in self.config.to_dict().items()},
            **self.numbers(),
        }

    def _cut(self, scorer: str) -> TokenFates:
        scored = self.source.scored(self.prompt, scorer)
        never = np.zeros(len(scored.tokens), bool)
        never[list(self.protect)] = True
        return simulate(scored.scores, self.config, self.source.num_layers, protect=never)
