"""`Method`: one published way to shorten a prefill (or its cache) - a budget, a scorer, and what else it does.

A method is a small frozen dataclass whose fields are its paper's settings; depths are shares of L, so that they carry
over to other models. ``with token_pruning(model, method)`` asks `Method.budget_for`, `Method.scorer_for` and
`Method.around`, and nothing else. It knows counting and scorers, no clock, no file and no table.

Axes: T prompt tokens, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch

from sdtp_lib import budget, checked
from sdtp_lib.architectures.attention_readings import refuse_unreadable
from sdtp_lib.architectures.layers import describe, num_layers
from sdtp_lib.config import POSITION_MODES, PruningConfig
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.provenance import content_id
from sdtp_lib.pruning.stage import QUERY_TOKENS, Scorer, Stage
from sdtp_lib.pruning.trace import PruningTrace


def depth(share: float, layers: int) -> int:
    """The layer at a share of the depth: ``depth(16 / 32, 28)`` is 14. Never the first, never beyond the last."""
    return min(layers - 1, max(1, round(share * layers)))


def depths(shares: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """The same for several stages; in a shallow model two of them may fall together."""
    return tuple(sorted({depth(share, layers) for share in shares}))


def pass_flops(shape: ModelShape, tokens_per_layer: list[int]) -> float:
    """Causal FLOPs of one pass over the layers; one that stops on the way (0 in the last) computes no logits."""
    return budget.prefill_flops(shape, tokens_per_layer, logits_positions=int(tokens_per_layer[-1] > 0))


def _speedup(field: str, value: Any) -> float:
    if not (number := checked.real_number(field, value)) >= 1:
        raise ValueError(f"{field}={number} is not a speed-up: give 1 or more, such as 2.0.")
    return number


def _positions(field: str, value: Any) -> str:
    return checked.one_of(field, value, POSITION_MODES)


# What a setting of each name may be, in whichever method it is.
_CHECKS = {
    _speedup: ("speedup",),
    _positions: ("positions",),
    checked.share: ("cut_depth", "filter_depth", "first_depth", "last_depth", "own_depth", "stages", "keep", "kv",
                    "mass", "recent", "decay"),
    checked.real_number: ("threshold", "rise"),
    checked.count_of_tokens: ("tokens", "window", "block", "chunk", "look_ahead", "layers_compared"),
    checked.count: ("least", "sinks", "ends", "layers_read"),
    checked.neighbours: ("kernel",),
}  # fmt: skip
SETTINGS = {name: check for check, names in _CHECKS.items() for name in names}


def checked_setting(field: dataclasses.Field, value: Any, check: Callable[[str, Any], Any]) -> Any:
    """A setting of a method that ``check`` lets pass: None where its type says so, a tuple of such where it says that.

    Raises
    ------
    ValueError
        Naming the setting, the value and what it may be.
    """
    kind = str(field.type)
    if value is None and "None" in kind:
        return None
    if "tuple" not in kind:
        return check(field.name, value)
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) < 1:
        raise ValueError(f"{field.name}={value!r} is no list: give one value for each stage, such as {field.default}.")
    return tuple(check(field.name, each) for each in value)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published way to shorten a prefill, under its paper's name.

    Attributes
    ----------
    name, paper
        As tables and legends show it; arXiv number.
    ranks
        Whether its score orders tokens, so that another budget can use it too.
    checks
        Setting -> what lets its values pass, or refuses them by name (`checked`); other settings are taken as they are.
    speedup
        The prefill speed-up by FLOPs that its budget is scaled to (`at_speedup`); None: the paper's own budget.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    ranks: ClassVar[bool] = True
    checks: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = SETTINGS
    speedup: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in self.checks:
                value = checked_setting(field, getattr(self, field.name), self.checks[field.name])
                object.__setattr__(self, field.name, value)

    @property
    def remark(self) -> str:
        """What a table must say beside the name, where this is not the paper's method as it stands; else empty."""
        scaled = "" if self.speedup is None else self.differs_at_speedup
        return "; ".join(filter(None, (self.differs, scaled)))

    @property
    def differs(self) -> str:
        """In what its settings are not the paper's; else empty."""
        renumbers = getattr(type(self), "positions", None) == "compact"
        return "kept tokens are not renumbered" if renumbers and self.positions != "compact" else ""

    @property
    def differs_at_speedup(self) -> str:
        """What `at_speedup` leaves as it is or replaces, where one dial does not scale the paper's rule; else empty."""
        return ""

    def that_runs_on(self, model: Any) -> Method:
        """The method as ``model`` can run it: without renumbered positions where the model cannot have them.

        A model of two rotary tables, say. `token_pruning` never does that unasked; a comparison may, and prints the
        `remark`.
        """
        renumbers = getattr(self, "positions", None) == "compact"
        return (
            dataclasses.replace(self, positions="original") if renumbers and describe(model).rotary() is None else self
        )

    def config(self, layers: int) -> PruningConfig:
        """The paper's budget for a model of ``layers`` layers."""
        raise NotImplementedError

    def config_for(self, layers: int, _prompt_tokens: int) -> PruningConfig:
        """The same for one prompt length, where it matters."""
        return self.config(layers)

    def scorer(self, _layers: int) -> Scorer | None:
        """What scores the tokens; None: the best pruners known for the model."""
        return None

    def passes(self, config: PruningConfig, layers: int, prompt_tokens: int) -> list[list[int]]:
        """Tokens that each layer computes, one list per pass over the layers."""
        return [budget.tokens_per_layer(config, layers, prompt_tokens)]

    def scaled(self, config: PruningConfig, prompt_tokens: int, power: float) -> PruningConfig:
        """The budget turned by one dial, its shape kept: what is left after each stage is raised to ``power``.

        Ratios 0.8, 0.5 at power 2 are 0.64, 0.25. Budgets in tokens count as shares of a prompt twice as long as what
        their first stage keeps.
        """
        if config.keep_tokens is None:
            ratio = config.keep_ratio
            ratio = tuple(r**power for r in ratio) if isinstance(ratio, tuple) else ratio**power
            return config.replace(keep_ratio=ratio)
        tokens = config.keep_tokens if isinstance(config.keep_tokens, tuple) else (config.keep_tokens,)
        kept = tuple(max(1, int(prompt_tokens * (each / (2 * tokens[0])) ** power + 1e-9)) for each in tokens)
        return config.replace(keep_tokens=kept if isinstance(config.keep_tokens, tuple) else kept[0])

    def prefill_flops(self, shape: ModelShape, config: PruningConfig, prompt_tokens: int) -> float:
        """Causal FLOPs of all passes, scores not counted."""
        return sum(pass_flops(shape, counts) for counts in self.passes(config, shape.num_layers, prompt_tokens))

    def flops_of(self, model: Any, prompt_tokens: int, tokens_computed: list[int]) -> float:
        """Causal FLOPs of a prefill that has run; ``tokens_computed`` per layer, of all passes, as its trace says."""
        shape = ModelShape.from_model(model)
        config = self.budget_for(model).for_prompt(prompt_tokens)
        planned = self.passes(config, shape.num_layers, prompt_tokens)
        if [sum(counts) for counts in zip(*planned, strict=True)] == list(tokens_computed):
            return self.prefill_flops(shape, config, prompt_tokens)
        return budget.prefill_flops(shape, tokens_computed)  # an adaptive budget, of one pass

    def at_speedup(self, speedup: float) -> Method:
        """The method with its budget scaled to a prefill speed-up by FLOPs, solved for each prompt's length."""
        return dataclasses.replace(self, speedup=_speedup("speedup", speedup))

    def budget_for(self, model: Any) -> PruningConfig | budget.SpeedupBudget:
        """What `token_pruning` keeps on ``model``."""
        config = self.config(num_layers(model))
        return (
            config
            if self.speedup is None
            else MethodBudget(config, self.speedup, ModelShape.from_model(model), method=self)
        )

    def scorer_for(self, model: Any) -> Scorer | None:
        """What scores the tokens of ``model``; None: the best pruners known for it."""
        found = self.scorer(num_layers(model))
        return MethodScorer(self, found) if isinstance(found, (FunctionType, MethodType)) else found

    def around(self, _model: Any, _trace: PruningTrace) -> contextlib.AbstractContextManager:
        """What else the method does, entered after ``token_pruning(model, budget, scorer)``."""
        return contextlib.nullcontext()


class OneCut(Method):
    """A method of one stage: at ``cut_depth`` the share ``keep`` goes on by ``_score``, the last ``window`` always."""

    def config(self, layers: int) -> PruningConfig:
        at = (depth(self.cut_depth, layers),)
        return PruningConfig(at, self.keep, sink_tokens=0, local_ratio=0.0, min_local_tokens=self.window)

    def scorer(self, _layers: int) -> Scorer:
        return self._score


@dataclass(frozen=True, eq=False)
class MethodScorer:
    """A method's score under the method's name; rows tell it by the method's settings."""

    method: Method
    score: Callable[[Stage], torch.Tensor]

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def query_tokens(self) -> int:
        """The last tokens that it reads, as its settings say."""
        return getattr(self.method, "window", QUERY_TOKENS)

    @property
    def identity(self) -> str:
        """The same at every speed-up: rows tell that by a field of its own."""
        return f"{self.name} {content_id(dataclasses.replace(self.method, speedup=None))}"

    def at(self, speedup: float | None, model: Any) -> Scorer:
        """The score of the same method whose budget is scaled to ``speedup``; None: its paper's budget.

        Some methods decide who stays under their paper's budget (scores 1 and 0), and rank under one that is scaled.
        """
        if self.method.speedup == speedup:
            return self
        return dataclasses.replace(self.method, speedup=speedup).scorer_for(model)

    def __call__(self, stage: Stage) -> torch.Tensor:
        return self.score(stage)

    def check(self, model: Any, config: PruningConfig) -> None:
        """Refuse a model whose attention weights cannot be read, before any compute."""
        refuse_unreadable(model, config.layers)


@dataclass(frozen=True)
class MethodBudget(budget.SpeedupBudget):
    """A method's budget that depends on the prompt's length: scaled to ``speedup``, or its own where that is None."""

    method: Any = None

    def _solve(self, tokens: int) -> PruningConfig:
        layers = self.shape.num_layers
        own = self.method.config_for(layers, tokens)
        if self.speedup is None:
            return own
        full = budget.prefill_flops(self.shape, [tokens] * layers)

        def reached(power: float) -> float:
            config = self.method.scaled(own, tokens, power)
            return full / self.method.prefill_flops(self.shape, config, tokens)

        low, high = 0.0, 64.0
        if self.method.passes(self.method.scaled(own, tokens, high), layers, tokens)[-1][-1] == tokens:
            return self.method.scaled(own, tokens, low)  # all of so short a prompt is protected
        if reached(high) < self.speedup:
            raise budget.SpeedupOutOfReach(
                f"speedup={self.speedup:g}: {self.method.name} prefills {tokens} tokens at most {reached(high):.2f}x "
                f"as fast with layers={list(own.layers)}: ask for less."
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(middle) >= self.speedup else (middle, high)
        return self.method.scaled(own, tokens, high)
