"""Who takes part in the leaderboard: the methods of the registry and this project's training-free default.

Each keeps what reaches a wanted prefill speed-up by FLOPs, or says that it cannot reach it. Runs no model.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from sdtp_lib import methods
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.methods.variant import Variant
from sdtp_lib.provenance import content_id
from sdtp_lib.scorers.found import TRAINING_FREE, default_scorer, scorer_called, training_free_layers

OURS = "sdtp"
OWN = (OURS, "sdtp-low", "sdtp-fast")  # its other schedules are no rivals
# Methods that trained pruners score where the model has some; all others need no training.
LEARNED = ("sdtp", "sdtp-low", "sdtp-fast", "earlier-scheme")


def settings(entrant: Variant) -> str:
    """A hash of the method's settings, its scorer's own numbers left out (rows say those by ``scorer_id``).

    The default's schedule is a rule for every depth; its layers of 32 stand for it.
    """
    return content_id(list(training_free_layers(32)) if entrant.budget is None else entrant.budget)


def out_of_reach(entrant: Variant, model: Any, speedup: float, tokens: int) -> str:
    """Why the speed-up cannot be reached on a prompt of so many tokens; empty where it can."""
    try:
        entrant.at(model, f"{speedup}x", tokens).config(model, tokens)
    except methods.SpeedupOutOfReach as error:
        return str(error)
    return ""


def entrants(
    model: Any,
    names: Sequence[str] | None = None,
    *,
    pruners: Any = None,
    left_out: MutableMapping[str, str] | None = None,
) -> list[Variant]:
    """All methods of the registry and the training-free default, each with the scorer that it gets on ``model``.

    ``pruners`` replaces the learned scorer that would be found, for every method that learns. ``left_out`` is filled
    with the methods that this model cannot have, and why.

    Raises
    ------
    ValueError
        For a name that is not known, or one of ``names`` that this model cannot have.
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
            found.append(Variant(name, scorer=scorer_called(name, model)))
            continue
        method = methods.get(name).that_runs_on(model)
        scorer = method.scorer_for(model)
        if scorer is None:
            try:
                layers = method.config(num_layers(model)).layers
            except ValueError as error:  # a preset that needs more layers
                if names is not None:
                    raise
                if left_out is not None:
                    left_out[name] = str(error)
                continue
            fits = pruners is not None and set(layers) <= set(getattr(pruners, "layers", layers))
            scorer = pruners if fits else default_scorer(model, layers)[0]
        found.append(Variant(name, method, scorer))
    return found
