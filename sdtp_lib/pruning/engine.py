"""Token pruning in prefill: ``with token_pruning(model, config, scorer): model.generate(...)``.

The engine hooks the decoder layers of one model for as long as the ``with`` lasts. A forward with an empty cache is a
prefill, which drops tokens and hands each later layer shorter inputs (`prefill`). Each layer fills its own cache, so
that holds just the kept tokens, and later forwards go on from it (`continuation`). Which is which the `session` says.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.attention_weights import query_projection
from sdtp_lib.architectures.layers import ATTENTION_BACKENDS, Architecture, before_layers, describe
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.generate_guard import guarded_generate
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.plan import Budget
from sdtp_lib.pruning.second_pass import TwoPasses
from sdtp_lib.pruning.session import Session
from sdtp_lib.pruning.stage import Scorer, name_of, refuse_uncalled
from sdtp_lib.pruning.trace import PruningTrace
from sdtp_lib.pruning.verify import check_on_entry

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()
_ACTIVE_LOCK = threading.Lock()


@contextlib.contextmanager
def token_pruning(
    model: nn.Module | Architecture,
    budget: Budget,
    scorer: Scorer,
    *,
    protect: torch.Tensor | None = None,
    verify: str = "auto",
) -> Iterator[PruningTrace]:
    """Prune the prompt tokens of every prefill that ``model`` runs inside the ``with`` (arXiv 2504.04514, section 3.3).

    Parameters
    ----------
    model
        A decoder-only causal LM of transformers in eval mode, also wrapped by PEFT; or its `Architecture`.
    budget : PruningConfig
        Before which layers, and how much stays; or a `budget.SpeedupBudget`, which decides by the prompt's length.
    scorer
        `TokenPruners`, or anything that maps a `Stage` to scores (B, N); see `sdtp_lib.scorers`.
    protect : Tensor (B, T) of bool, optional
        Tokens of the prompts inside the ``with`` that are never dropped; T counts padding, B may be 1 for all rows.
    verify
        ``"auto"``, ``"always"`` or ``"never"``: see `verify.check_on_entry`.

    Yields
    ------
    PruningTrace
        What the last prefill kept. A forward counts as a prefill when its cache is empty; with ``prune="every"`` also
        when it adds more than ``min_prompt_tokens`` to a cache. All other tokens are computed in full.

    Raises
    ------
    ValueError
        For layers that the model or the scorer does not have.
    PruningNotSupported
        For models, caches, attention backends and uses that cannot be pruned correctly, before any compute.

    Notes
    -----
    Inside, logits have the last layer's K columns, in order, rows padded on the left: ``[:, -1]`` is the last token.
    ``generate(prefill_chunk_size=C)`` cuts each chunk before the next comes, by the whole prompt's budget (`chunks`).
    Leaving the ``with``, also by an exception, leaves the model as it was.
    """
    architecture = describe(model)
    model = architecture.model
    config = _checked_config(architecture, budget, scorer, model)
    check_on_entry(model, token_pruning, architecture.model_type, architecture.backend, verify)
    session = Session(architecture, config, budget, scorer, _checked_protection(protect))
    session.trace.scorer, session.trace.model = name_of(scorer), weakref.ref(model)
    stack = architecture.stack
    with _only_session(stack, session), contextlib.ExitStack() as cleanup:
        if stack is not model:
            names = tuple(inspect.signature(type(model).forward).parameters)[1:]
            cleanup.callback(model.register_forward_pre_hook(session.before_model(names), with_kwargs=True).remove)
            if architecture.is_multimodal:
                cleanup.callback(model.register_forward_hook(session.after_model, always_call=True).remove)
        cleanup.callback(stack.register_forward_pre_hook(session.before_stack, with_kwargs=True).remove)
        cleanup.callback(stack.register_forward_hook(session.after_stack, always_call=True).remove)
        cleanup.enter_context(before_layers(architecture, range(len(architecture.layers)), session.before_layer))
        for index, layer in enumerate(architecture.layers):
            if (projection := query_projection(layer)) is not None:
                cleanup.callback(projection.register_forward_hook(session.after_queries(index)).remove)
        cleanup.callback(architecture.layers[-1].register_forward_hook(session.after_last_layer).remove)
        cleanup.callback(session.end_forward)
        if (norm := architecture.fixed_length_norm()) is not None:
            cleanup.callback(norm.register_forward_hook(session.after_final_norm).remove)
        cleanup.enter_context(guarded_generate(model, session.in_chunks, session.in_generate))
        yield session.trace
        session.check_pending()


@contextlib.contextmanager
def kv_budget(model: nn.Module, kv: KVBudget) -> Iterator[None]:
    """Inside a ``with token_pruning(model, ...)``: cut each layer's cache to ``kv`` when a prefill is done."""
    session = _session_of(model, "kv_budget")
    if session.config.positions == "compact" or (session.two_passes and session.two_passes.renumber):
        raise PruningNotSupported("a KV budget and renumbered positions cannot be combined: use positions='original'.")
    session.kv = kv
    try:
        yield
    finally:
        session.kv = None


@contextlib.contextmanager
def two_passes(model: nn.Module, how: TwoPasses) -> Iterator[None]:
    """Inside a ``with token_pruning(model, ...)``: its stages choose in a first pass, then all layers run on those."""
    session = _session_of(model, "two_passes")
    if how.renumber and session.architecture.rotary() is None:
        raise PruningNotSupported(
            f"renumbered positions need one rotary table for all layers, which {session.architecture.model_type} has "
            "not: use positions='original'."
        )
    session.two_passes = how
    try:
        yield
    finally:
        session.two_passes = None


def _session_of(model: nn.Module, caller: str) -> Session:
    session = _ACTIVE.get(describe(model).stack)
    if session is None:
        raise ValueError(
            f"{caller}(model, ...) works inside a `with token_pruning(model, ...)` only: enter that first."
        )
    return session


def _checked_config(architecture: Architecture, budget: Any, scorer: Any, model: nn.Module) -> PruningConfig:
    config = getattr(budget, "config", budget)
    if not isinstance(config, PruningConfig):
        raise ValueError(f"budget={budget!r} is not a PruningConfig: see PruningConfig.preset('keep09', num_layers).")
    config.validate_for(len(architecture.layers))
    if not callable(scorer):
        raise ValueError(f"scorer={scorer!r} cannot be called: give TokenPruners or one of sdtp_lib.scorers.")
    refuse_uncalled(scorer)
    layers = getattr(scorer, "layers", None)
    if layers is not None and not set(config.layers) <= set(layers):
        raise ValueError(
            f"the config prunes before layers {list(config.layers)}, but the scorer scores layers {list(layers)}: "
            "use a config of the scorer's layers, or train pruners for yours."
        )
    if hasattr(scorer, "check"):
        scorer.check(model, config)
    if architecture.backend not in ATTENTION_BACKENDS:
        raise PruningNotSupported(
            f"attn_implementation={architecture.backend!r}: masks over kept tokens are known for "
            f"{', '.join(ATTENTION_BACKENDS)}: load the model with attn_implementation='sdpa'."
        )
    if config.positions == "compact" and architecture.rotary() is None:
        raise PruningNotSupported(
            f"positions='compact' needs one rotary table for all layers, which {architecture.model_type} has not: "
            "use positions='original'."
        )
    return config


def _checked_protection(protect: Any) -> torch.Tensor | None:
    if protect is None:
        return None
    if not torch.is_tensor(protect) or protect.dtype != torch.bool or protect.dim() != 2:
        found = f"{protect.dtype} {tuple(protect.shape)}" if torch.is_tensor(protect) else type(protect).__name__
        raise ValueError(f"protect={found}: give booleans (B, T), True for tokens that are never dropped.")
    return protect


@contextlib.contextmanager
def _only_session(stack: nn.Module, session: Session) -> Iterator[None]:
    with _ACTIVE_LOCK:
        if stack in _ACTIVE:
            raise PruningNotSupported(
                "this model is already inside a `with token_pruning(...)`, here or in another thread: leave that one "
                "first, or load a second copy of the model."
            )
        _ACTIVE[stack] = session
    try:
        yield
    finally:
        with _ACTIVE_LOCK:
            _ACTIVE.pop(stack, None)
