"""`Variant`: one line of a comparison - a name, and what `token_pruning` takes to run a model under it.

What compares quality, answers or time (`evaluation`, `latency`, `leaderboard`) takes variants and puts each on the
model by `Variant.applied`. Knows no row, no clock and no prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sdtp_lib import budget as counting
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.call import config_of, method_in, resolved, speedup_in, token_pruning
from sdtp_lib.methods.method import Method
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.trace import PruningTrace

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    >>> variants = [Variant("unpruned"), Variant("recency 2x", "2x", scorers.recency())]
    >>> scores = [Variant("recency", scorer=scorers.recency()), Variant("fastkv", methods.get("fastkv"))]
    >>> at_equal_flops = [each.at(model, "2x", prompt_tokens) for each in scores]

    Attributes
    ----------
    name
        As rows, tables and legends show it.
    budget
        What `token_pruning` takes for its budget. None: the one that a comparison sets (`at`), unpruned if none does.
    scorer
        What it takes for its scorer. With ``from_sample``: a function of (model, sample, layers) that returns one.
    kind
        The group that rows and legends put it in, such as ``"oracle"`` for scores that have seen the response.
    around
        Makes a context for its runs: what else is done to the model (KV-cache compression, say).
    """

    name: str
    budget: Any = None
    scorer: Any = None
    kind: str = ""
    from_sample: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", method_in(self.budget))  # "gemfilter@2x" has two passes, as the method has

    def at(self, model: Any, cost: Any, prompt_tokens: int) -> Variant:
        """The variant at the prefill FLOPs of ``cost``, a budget: a method is scaled to them, a score gets the budget.

        Raises
        ------
        ValueError
            If a method cannot be scaled so far at any length (`SpeedupOutOfReach`), or ``cost`` is a method itself.
        """
        if isinstance(method_in(cost), Method):
            raise ValueError(f"cost={cost!r} is a method: give what it is to cost, such as '2x', a preset or a ratio.")
        if not self._method:
            return dataclasses.replace(self, budget=cost if self.budget is None else self.budget)
        speedup = speedup_in(cost)
        if speedup is None:
            config = config_of(cost, num_layers(model))
            speedup = counting.speedup_limit(ModelShape.from_model(model), config, prompt_tokens)
        return dataclasses.replace(self, budget=self._method.at_speedup(speedup))

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[PruningTrace | None]:
        """The ``with`` in which ``model`` runs this way; yields the trace, None where nothing is pruned."""
        pruned = contextlib.nullcontext() if self.budget is None else token_pruning(model, self.budget, self.scorer)
        with self.around(), pruned as trace:
            yield trace

    def config(self, model: Any, prompt_tokens: int) -> PruningConfig | None:
        """What is kept of a prompt of so many tokens; None for the unpruned model.

        Raises
        ------
        ValueError
            If its speed-up cannot be reached at this length (`SpeedupOutOfReach`).
        """
        if self.budget is None:
            return None
        own = self._method.budget_for(model) if self._method else resolved(model, self.budget, self.scorer)[0]
        return own.for_prompt(prompt_tokens)

    def passes(self, model: Any, prompt_tokens: int) -> list[list[int]]:
        """Tokens that each layer computes, counted beforehand: one list per pass over the layers."""
        config, layers = self.config(model, prompt_tokens), num_layers(model)
        if config is None:
            return [[prompt_tokens] * layers]
        if self._method:
            return self._method.passes(config, layers, prompt_tokens)
        return [counting.tokens_per_layer(config, layers, prompt_tokens)]

    def flops(self, model: Any, prompt_tokens: int, tokens_computed: list[int]) -> float:
        """Causal FLOPs of a prefill that has run, of all its passes, without scoring; ``tokens_computed`` as traced."""
        if self._method:
            return self._method.flops_of(model, prompt_tokens, tokens_computed)
        return counting.prefill_flops(ModelShape.from_model(model), tokens_computed)

    @property
    def _method(self) -> Method | None:
        return self.budget if isinstance(self.budget, Method) else None
