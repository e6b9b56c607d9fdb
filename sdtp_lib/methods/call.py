"""The one call: ``with token_pruning(model, "2x"): model.generate(...)``, for any model, budget, scorer or method.

It turns what a person says into a budget and a scorer, says once what it chose for them, and leaves the work to
`pruning.engine`.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.layers import describe, num_layers
from sdtp_lib.budget import SpeedupBudget
from sdtp_lib.config import PRESETS, PruningConfig
from sdtp_lib.methods import registry
from sdtp_lib.methods.method import MethodScorer
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning import engine
from sdtp_lib.pruning.prefill import Budget
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.pruning.trace import PruningTrace
from sdtp_lib.scorers.found import default_scorer, scorer_called, training_free_layers

_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def token_pruning(
    model: nn.Module,
    budget: str | float | PruningConfig | Any = "keep09",
    scorer: Scorer | str | None = None,
    *,
    protect: torch.Tensor | None = None,
    verify: str = "auto",
) -> Iterator[PruningTrace]:
    """Prune the prompt tokens of every prefill that ``model`` runs inside the ``with`` (arXiv 2504.04514).

    >>> with token_pruning(model, "2x") as trace:
    ...     output = model.generate(**inputs, max_new_tokens=128)
    >>> print(trace)

    Parameters
    ----------
    model
        A decoder-only causal LM of transformers in eval mode, also wrapped by PEFT.
    budget
        ``"keep09"``, ``"keep08"``, ``"keep07"``, ``"paper-low"``, ``"fast"``: a preset of `PruningConfig`. A number in
        (0, 1]: the share of the current tokens kept at each of keep09's stages. ``"2x"``: a prefill of half the FLOPs,
        solved for each prompt's length; a prompt too short for it is pruned as far as it can be, which is said. A
        `PruningConfig`. Or a method, which brings its own scorer: an entry of `sdtp_lib.methods`, or what
        `sdtp_lib.methods.named` takes: ``"fastkv"`` with its paper's budget, ``"fastkv@1.5x"`` at a prefill speed-up.
    scorer
        What says which tokens matter: `TokenPruners`, one of `sdtp_lib.scorers`, any callable from a `Stage` to scores
        (B, N); or a name: a training-free score's, a method's, a folder or Hub id of pruners. None: pruners made for
        these very weights, shipped or trained here before; else the training-free default, which is said once.
    protect : Tensor (B, T) of bool, optional
        Prompt tokens that are never dropped; see `sdtp_lib.pruning.protection`.
    verify
        ``"auto"``: what this release's list of families does not hold is checked once, pruned against masked, on this
        very model; ``"always"`` and ``"never"`` override.

    Yields
    ------
    PruningTrace
        What the last prefill kept; ``print(trace)`` is one line.

    Raises
    ------
    ValueError
        For a budget or scorer that does not exist, or layers that the model or the scorer does not have.
    PruningNotSupported
        For models, caches, attention backends and uses that cannot be pruned correctly, before any compute.
    """
    architecture = describe(model)
    wanted, scorer, around = resolved(model, budget, scorer)
    with contextlib.ExitStack() as stack:
        trace = stack.enter_context(engine.token_pruning(architecture, wanted, scorer, protect=protect, verify=verify))
        if around is not None:
            stack.enter_context(around(model, trace))
        yield trace


def resolved(model: nn.Module, budget: Any, scorer: Scorer | str | None) -> tuple[Budget, Scorer, Any]:
    """The budget, the scorer and what else is done (None: nothing) of what a person gave `token_pruning`.

    Where the schedule is free, it is the scorer's own.
    """
    around = method = None
    if inspect.isclass(budget) or inspect.isroutine(budget):
        raise ValueError(f"budget={budget.__name__} makes budgets and is none itself: call it, {budget.__name__}(...).")
    budget = method_in(budget)
    if hasattr(budget, "budget_for"):
        method, budget = budget, budget.budget_for(model)
        scorer = method.scorer_for(model) if scorer is None else scorer
        around = getattr(method, "around", None)
    if isinstance(scorer, os.PathLike):
        scorer = os.fspath(scorer)
    if isinstance(scorer, str):
        scorer = _score_of(scorer, method, model) if scorer in registry.names() else scorer_called(scorer, model)
    speedup = speedup_in(budget)
    config = None if speedup is not None else config_of(budget, num_layers(model))
    if isinstance(scorer, MethodScorer):
        scorer = _under(scorer, method, config, speedup, model)
    layers = None if config is None else getattr(config, "config", config).layers
    if scorer is None:
        scorer, missing = default_scorer(model, layers)
        if missing:
            _say_once(model, missing)
    if config is None:
        layers = getattr(scorer, "layers", None) or training_free_layers(num_layers(model))
        shape = ModelShape.from_model(model)
        config = SpeedupBudget(PruningConfig(tuple(layers)), speedup, shape, as_far_as_possible=True)
    return config, scorer, around


def method_in(budget: Any) -> Any:
    """The method that a budget's text names, perhaps at a speed-up; any other budget as it is.

    Raises
    ------
    ValueError
        For a text that names nothing: the message lists all that a budget may be called.
    """
    if not isinstance(budget, str) or budget in PRESETS or speedup_in(budget) is not None:
        return budget
    if budget.partition("@")[0] in registry.names():
        return registry.named(budget)
    known = ", ".join(registry.names())
    raise ValueError(f"{_unknown(budget)}; or a method: {known}, also at a speed-up (fastkv@1.5x).")


def _unknown(budget: str) -> str:
    return (
        f"budget={budget!r} is unknown: give {', '.join(PRESETS)}, a speed-up such as '2x', a keep ratio such as 0.8, "
        "a PruningConfig"
    )


def _score_of(name: str, budget: Any, model: nn.Module) -> Scorer | None:
    """The score of the method ``name`` under a ``budget``: a method, or None for what is none.

    Raises
    ------
    ValueError
        For a method that shortens the cache alone, under another budget than its own.
    """
    method = registry.get(name)
    scorer = method.scorer_for(model)
    if not method.ranks and not isinstance(scorer, MethodScorer) and type(budget) is not type(method):
        raise ValueError(
            f"scorer={name} shortens the KV cache alone and gives the tokens of a prefill no order: give the method as "
            f"the budget, token_pruning(model, {name!r})."
        )
    return scorer


def _under(scorer: MethodScorer, method: Any, config: Any, speedup: float | None, model: nn.Module) -> Scorer:
    """A method's score as the budget needs it: the one of the same speed-up; a ranking where the budget is not the
    method's own and says itself how many stay.

    Raises
    ------
    ValueError
        For a method that says where to cut and ranks nothing, under another budget than its own.
    """
    if method is not None:
        return scorer.at(method.speedup, model)
    if config is not None and getattr(config, "keep_mass", None) is not None:
        return scorer
    if not scorer.method.ranks:
        raise ValueError(
            f"scorer={scorer.name} decides where to cut and gives tokens no order: give the method as the budget, "
            f"token_pruning(model, {scorer.name!r})."
        )
    return scorer.at(speedup or 1.0, model)


def config_of(budget: Any, layers: int) -> Budget:
    """A preset's or a ratio's configuration; what is a budget already stays as it is."""
    if isinstance(budget, str):
        if budget not in PRESETS:
            raise ValueError(f"{_unknown(budget)}, or methods.get(...).")
        return PruningConfig.preset(budget, layers)
    if isinstance(budget, numbers.Real) and not isinstance(budget, bool):  # numpy's too
        return PruningConfig.preset("keep09", layers, keep_ratio=budget)
    if not hasattr(budget, "for_prompt"):
        raise ValueError(f"budget={budget!r} is not a PruningConfig: see PruningConfig.preset('keep09', num_layers).")
    return budget


def budget_for(budget: Any, layers: int) -> Budget | str:
    """`config_of`, but a speed-up stays the text that it is: it is solved for each prompt's length."""
    return budget if speedup_in(budget) is not None else config_of(budget, layers)


def refuse_impossible(field: str, budget: Any, way: str) -> None:
    """Refuse a ``budget`` that no model can have, before one is loaded, and a method, which ``way`` takes instead.

    Raises
    ------
    ValueError
        Naming ``field`` for a method, and what a budget may be for all else.
    """
    if hasattr(budget, "budget_for") or str(budget).partition("@")[0] in registry.names():
        raise ValueError(f"{field}{budget} is a method: give it {way}.")
    budget_for(budget, 28)  # any number of layers that every preset has room in


def speedup_in(budget: Any) -> float | None:
    """2.0 for ``"2x"``; None for what is no speed-up."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)x", budget.strip()) if isinstance(budget, str) else None
    if found is None:
        return None
    if (speedup := float(found[1])) < 1:
        raise ValueError(f"budget={budget!r} would be slower than the unpruned model: give '1x' or more.")
    return speedup


def _say_once(model: nn.Module, missing: str) -> None:
    said = _told.setdefault(model, set())
    if missing not in said:
        said.add(missing)
        name = getattr(model, "name_or_path", "") or "MODEL"
        warnings.warn(
            f"{missing}: tokens are scored by the pooled attention of the last 8, which needs no training. Pruners "
            f"that lose less: python -m sdtp_lib train {name}",
            stacklevel=4,
        )
