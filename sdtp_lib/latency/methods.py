"""The ways to a first token that are timed side by side: the plain model, SDTP, and what else one could do.

Each is written down once, on the library's own engine, so that they differ in what they compute and in nothing else.
A *method* opens a session on a model; a session prefills a prompt (batch 1) into a cache and extends it. Knows no clock
but the marks it is handed, and no file.

Baselines: GemFilter (arXiv 2409.17422) runs the first layers, picks tokens by the last token's attention and starts
again on those alone; FastKV (arXiv 2502.01068) drops tokens once, half way; LazyLLM (arXiv 2407.14057) drops by stages
with attention as the score; SnapKV (arXiv 2404.14469) computes the whole prefill and shortens only the cache. The
*earlier scheme* is what the earlier reproduction of SDTP does: a pruned pass without a cache, then ``generate`` on the
shortened ids, so that a part of prefill is paid twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sdtp_lib import budget, scorers
from sdtp_lib.architectures.caches import cache_argument, cache_in, cache_lengths
from sdtp_lib.architectures.layers import describe, num_layers
from sdtp_lib.config import PruningConfig
from sdtp_lib.latency.generation import Generation, plain_prefill, plain_step, timed_generation
from sdtp_lib.latency.measure import Stopwatch
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.pruned_cache import CacheRecord, remember
from sdtp_lib.pruning.selection import select_positions
from sdtp_lib.pruning.stage import Scorer, Stage

UNPRUNED = "unpruned"
FAMILIES = ("SDTP", "attention by stages", "one-layer filter", "one-layer propagation", "KV only", "earlier scheme")


@dataclass
class Session:
    """One method at work on one model.

    Attributes
    ----------
    prefill
        ``prefill(input_ids (1, T), watch=None) -> (logits (1, .., V), cache)``.
    step
        ``step(token_ids (1, n), cache) -> (logits, cache)``; n > 1 scores a continuation.
    """

    prefill: Callable[..., tuple[torch.Tensor, Any]]
    step: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Method:
    """A named way to fill a cache.

    Attributes
    ----------
    name, family
        For rows and legends; methods of one family differ in their ratio.
    open
        ``with method.open(model) as session``.
    config
        What is pruned, None for the plain model.
    computed
        Tokens a layer of each pass over the layers, for a prompt of T tokens: one list for most, two where two passes
        are run. Layers that a pass does not reach have 0.
    scorer
        What scores the tokens, None for the plain model.
    """

    name: str
    family: str
    open: Callable[[Any], contextlib.AbstractContextManager[Session]]
    config: PruningConfig | None
    computed: Callable[[int], list[list[int]]]
    scorer: Scorer | None = None

    def generate(self, model: Any, input_ids: torch.Tensor, new_tokens: int) -> Generation:
        """Timed greedy generation; opening the session is on the clock, since a user pays for it too."""
        watch = Stopwatch(input_ids.device)
        with self.open(model) as session:
            return timed_generation(lambda watch: session.prefill(input_ids, watch), session.step, new_tokens, watch)

    def row_fields(self, model: Any, input_ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
        """One timed generation as the fields of a row; lengths and bytes are read from the cache, never assumed."""
        generation = self.generate(model, input_ids, new_tokens)
        added = new_tokens - 1
        lengths = cache_lengths(generation.cache)
        return {
            **generation.fields(),
            **{f"part_{name.replace(' ', '_')}_ms": value for name, value in generation.parts_ms.items()},
            # What the prefill left; decode adds the same number of keys to every layer of every method.
            "kv_tokens_per_layer": [length - added for length in lengths],
            "kv_bytes": generation.prompt_kv_bytes(),
        }

    def tflops(self, shape: budget.ModelShape, prompt_tokens: int) -> float:
        """Causal FLOPs of the prefill, both passes where there are two, in 10^12."""
        return sum(_pass_flops(shape, counts) for counts in self.computed(prompt_tokens)) / 1e12


def unpruned(model: Any) -> Method:
    """The model as it is."""
    layers = num_layers(model)
    return Method(UNPRUNED, UNPRUNED, _plain_session, None, lambda tokens: [[tokens] * layers])


def sdtp(model: Any, config: PruningConfig, scorer: Scorer, name: str, family: str = "SDTP") -> Method:
    """Pruning by stages, one prefill, decode on its cache. With the attention scorer it is LazyLLM's kind."""
    layers = num_layers(model)

    @contextlib.contextmanager
    def open_session(model: Any) -> Iterator[Session]:
        with token_pruning(model, config, scorer):
            yield _model_session(model)

    return Method(
        name, family, open_session, config,
        lambda tokens: [budget.tokens_per_layer(config, layers, tokens)], scorer,
    )  # fmt: skip


def one_layer_propagation(model: Any, config: PruningConfig, name: str = "one-layer propagation") -> Method:
    """Drop once: ``config`` has one layer; scores are the pooled attention of the last 8 tokens there (FastKV)."""
    return sdtp(model, config, scorers.attention(window=8, kernel=7), name, family="one-layer propagation")


def one_layer_filter(model: Any, config: PruningConfig, name: str = "one-layer filter") -> Method:
    """Two passes: layers up to ``config.layers[0]`` choose the tokens, then all layers run on those alone (GemFilter).

    The chosen tokens are renumbered 0..K-1, as GemFilter does; the last token's attention, pooled, is the score.
    """
    layers, filter_layer = num_layers(model), config.layers[0]
    scorer = scorers.attention(window=1, kernel=5)

    def kept(tokens: int) -> int:
        return budget.tokens_per_layer(config, layers, tokens)[-1]

    @contextlib.contextmanager
    def open_session(model: Any) -> Iterator[Session]:
        def prefill(input_ids: torch.Tensor, watch: Stopwatch | None = None) -> tuple[torch.Tensor, Any]:
            columns = _stop_at_stage(model, config, scorer, input_ids)
            _mark(watch, "filter pass")
            second = plain_prefill(model, input_ids[:, columns])
            _mark(watch, "second pass")
            return second

        yield Session(prefill, lambda token, cache: plain_step_all(model, token, cache))

    return Method(
        name, "one-layer filter", open_session, config,
        lambda tokens: [[tokens] * filter_layer + [0] * (layers - filter_layer), [kept(tokens)] * layers],
        scorer,
    )  # fmt: skip


def kv_only(model: Any, config: PruningConfig, name: str = "KV only") -> Method:
    """A full prefill, then a cache as short as SDTP's with ``config``, by layer: saves no prefill (SnapKV's scores).

    Layer 0 stays whole, as it does in SDTP.
    """
    layers = num_layers(model)
    watched = config.replace(keep_ratio=1.0)
    scorer = scorers.attention(window=8, kernel=7)

    @contextlib.contextmanager
    def open_session(model: Any) -> Iterator[Session]:
        with token_pruning(model, watched, scorer) as trace:

            def prefill(input_ids: torch.Tensor, watch: Stopwatch | None = None) -> tuple[torch.Tensor, Any]:
                logits, cache = plain_prefill(model, input_ids)
                _mark(watch, "prefill")
                _shorten_cache(cache, config, trace.scores, input_ids.shape[1], describe(model).backend)
                _mark(watch, "cache cut")
                return logits, cache

            yield Session(prefill, lambda token, cache: plain_step_all(model, token, cache))

    return Method(name, "KV only", open_session, config, lambda tokens: [[tokens] * layers], scorer)


def earlier_scheme(model: Any, config: PruningConfig, scorer: Scorer, name: str = "earlier scheme") -> Method:
    """A pruned pass without a cache to find the last stage's tokens, then a plain prefill of those (renumbered)."""
    layers = num_layers(model)

    def computed(tokens: int) -> list[list[int]]:
        counts = budget.tokens_per_layer(config, layers, tokens)
        return [counts, [counts[-1]] * layers]

    @contextlib.contextmanager
    def open_session(model: Any) -> Iterator[Session]:
        def prefill(input_ids: torch.Tensor, watch: Stopwatch | None = None) -> tuple[torch.Tensor, Any]:
            with token_pruning(model, config, scorer) as trace:
                model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
            columns = trace.kept_positions[config.layers[-1]][0]
            _mark(watch, "pruned pass")
            second = plain_prefill(model, input_ids[:, columns])
            _mark(watch, "second pass")
            return second

        yield Session(prefill, lambda token, cache: plain_step_all(model, token, cache))

    return Method(name, "earlier scheme", open_session, config, computed, scorer)


def plain_step_all(model: Any, token_ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """A step of one token (its logits), or of a whole continuation (logits of every position)."""
    if token_ids.shape[1] == 1:
        return plain_step(model, token_ids, cache)
    output = model(input_ids=token_ids, **cache_argument(model, cache), use_cache=True)
    return output.logits, cache_in(output)


def _model_session(model: Any) -> Session:
    return Session(
        lambda input_ids, watch=None: plain_prefill(model, input_ids),
        lambda token, cache: plain_step_all(model, token, cache),
    )


@contextlib.contextmanager
def _plain_session(model: Any) -> Iterator[Session]:
    yield _model_session(model)


def _mark(watch: Stopwatch | None, name: str) -> None:
    if watch is not None:
        watch.mark(name)


class _Reached(Exception):  # a way out of the forward, not an error
    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores


def _stop_at_stage(model: Any, config: PruningConfig, scorer: Scorer, input_ids: torch.Tensor) -> torch.Tensor:
    """Columns chosen before layer ``config.layers[0]``, without running that layer or any later one."""

    def leave(stage: Stage) -> torch.Tensor:
        raise _Reached(scorer(stage))

    try:
        with token_pruning(model, config, leave):
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    except _Reached as reached:
        tokens = input_ids.shape[1]
        kept = budget.keep_count(tokens, config.layers[0], config)
        local = budget.protected_count(tokens, config) - config.sink_tokens
        return select_positions(reached.scores, [tokens], [kept], config.sink_tokens, [local])[0]
    raise ValueError(f"layers={list(config.layers)}: no stage was reached, so nothing was chosen.")


def _shorten_cache(
    cache: Any, config: PruningConfig, scores: dict[int, torch.Tensor], tokens: int, backend: str
) -> None:
    """Cut each layer's keys and values to what ``config`` would have kept there, chosen by ``scores`` of all tokens."""
    layers = len(cache.layers)
    plan = budget.tokens_per_layer(config, layers, tokens)
    columns, kept, alive = None, [], tokens
    for index, layer in enumerate(cache.layers):
        if index in config.layers and plan[index] < alive:
            living = scores[index] if columns is None else scores[index][:, columns]
            local = budget.protected_count(alive, config) - config.sink_tokens
            chosen = select_positions(living, [alive], [plan[index]], config.sink_tokens, [local])[0]
            columns, alive = chosen if columns is None else columns[chosen], plan[index]
        if columns is not None:
            layer.keys, layer.values = layer.keys[:, :, columns], layer.values[:, :, columns]
        kept.append(None if columns is None else columns[None])
    if columns is not None:
        remember(
            cache,
            CacheRecord(
                tokens, 1, kept, [False] * layers, any_padding=False, held=plan, compressed=False, compact=False,
                backend=backend,
            ),  # fmt: skip
        )


def _pass_flops(shape: budget.ModelShape, counts: list[int]) -> float:
    whole = budget.prefill_flops(shape, counts)
    # A pass that stops half way computes no logits.
    return whole if counts[-1] else whole - 2 * shape.head_weights
