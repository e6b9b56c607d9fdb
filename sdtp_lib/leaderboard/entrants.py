"""`Entrant`: one line of the leaderboard, a method of the registry or this project's training-free default.

Each says what it keeps for a wanted prefill speed-up by FLOPs, or that it cannot reach it. Runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtp_lib import budget, methods
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods import Method
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.provenance import content_id
from sdtp_lib.pruning.stage import name_of
from sdtp_lib.scorers.found import TRAINING_FREE, default_scorer, scorer_called, training_free_layers

UNPRUNED = "unpruned"
OURS = "sdtp"
# What this project needs no training for; all others but those in `LEARNED` are published methods.
LEARNED = ("sdtp", "sdtp-low", "earlier-scheme")


@dataclass(frozen=True)
class Entrant:
    """A way to shorten a prefill.

    Attributes
    ----------
    name
        As rows, tables and legends show it.
    method
        An entry of `sdtp_lib.methods`; None for a score on this project's own schedule.
    scorer
        What scores the tokens.
    """

    name: str
    method: Method | None
    scorer: Any

    @property
    def scored_by(self) -> str:
        """The name of what scores the tokens: learned pruners, or a score that needs no training."""
        return name_of(self.scorer)

    @property
    def settings(self) -> str:
        """A hash of the method's settings, its scorer's own numbers left out (rows say those by ``scorer_id``)."""
        return content_id(self.method if self.method is not None else "schedule of the default")

    def budget(self, model: Any, speedup: float) -> Any:
        """What `token_pruning` takes for its budget.

        Raises
        ------
        ValueError
            If the method cannot reach the speed-up at any length.
        """
        if self.method is not None:
            return self.method.at_speedup(speedup)
        stages = PruningConfig(training_free_layers(num_layers(model)))
        return budget.SpeedupBudget(stages, speedup, ModelShape.from_model(model))

    def out_of_reach(self, model: Any, speedup: float, tokens: int) -> str:
        """Why the speed-up cannot be reached on a prompt of so many tokens; empty where it can."""
        try:
            wanted = self.budget(model, speedup)
            wanted = wanted.budget_for(model) if isinstance(wanted, Method) else wanted
            wanted.for_prompt(tokens)
        except ValueError as error:
            return str(error)
        return ""

    def flops(self, model: Any, wanted: Any, tokens: int, computed: list[int]) -> float:
        """Causal FLOPs of a prefill that has run, of all its passes; scoring not counted."""
        if isinstance(wanted, Method):
            return wanted.flops_of(model, tokens, computed)
        return budget.prefill_flops(ModelShape.from_model(model), computed)


def entrants(model: Any, names: Sequence[str] | None = None, *, pruners: Any = None) -> list[Entrant]:
    """All methods of the registry and the training-free default, each with the scorer that it gets on ``model``.

    ``pruners`` replaces the learned scorer that would be found, for every method that learns.

    Raises
    ------
    ValueError
        For a name that is not known.
    """
    known = [*methods.names(), TRAINING_FREE]
    for name in names or ():
        if name not in known:
            raise ValueError(f"method={name!r} is unknown: choose among {', '.join(known)}.")
    found = []
    for name in known:
        if names is not None and name not in names:
            continue
        if name == TRAINING_FREE:
            found.append(Entrant(name, None, scorer_called(name, model)))
            continue
        method = methods.get(name)
        scorer = method.scorer_for(model)
        if scorer is None:
            layers = method.config(num_layers(model)).layers
            fits = pruners is not None and set(layers) <= set(getattr(pruners, "layers", layers))
            scorer = pruners if fits else default_scorer(model, layers)[0]
        found.append(Entrant(name, method, scorer))
    return found
