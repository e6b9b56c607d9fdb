"""The ways to a first token that are timed side by side: the plain model, SDTP, and the published methods.

All run on the library's own engine, so that they differ in what they compute and in nothing else. A `Timed` way opens
a session on a model; a session prefills a prompt (batch 1) into a cache and extends it. What a published method does
stands in `sdtp_lib.methods`; here is how it is timed and what it computes. Knows no clock but the marks it is handed,
and no file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sdtp_lib import budget
from sdtp_lib.architectures.caches import cache_argument, cache_in, cache_lengths
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.config import PruningConfig
from sdtp_lib.latency.generation import Generation, plain_prefill, plain_step, timed_generation
from sdtp_lib.latency.measure import Stopwatch
from sdtp_lib.methods import Method
from sdtp_lib.methods.call import token_pruning
from sdtp_lib.methods.method import pass_flops
from sdtp_lib.pruning.stage import Scorer

UNPRUNED = "unpruned"


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
class Timed:
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
        Tokens per layer of each pass over the layers, for a prompt of T tokens: one list for most, two where two passes
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
        return sum(pass_flops(shape, counts) for counts in self.computed(prompt_tokens)) / 1e12


def unpruned(model: Any) -> Timed:
    """The model as it is."""
    layers = num_layers(model)
    return Timed(UNPRUNED, UNPRUNED, _plain_session, None, lambda tokens: [[tokens] * layers])


def sdtp(model: Any, config: PruningConfig, scorer: Scorer, name: str) -> Timed:
    """SDTP with ``config``: pruning by stages, one prefill, decode on its cache."""
    layers = num_layers(model)

    @contextlib.contextmanager
    def open_session(model: Any) -> Iterator[Session]:
        with token_pruning(model, config, scorer):
            yield _model_session(model)

    return Timed(
        name, "SDTP", open_session, config,
        lambda tokens: [budget.tokens_per_layer(config, layers, tokens)], scorer,
    )  # fmt: skip


def published(model: Any, method: Method, prompt_tokens: int, name: str, scorer: Scorer | None = None) -> Timed:
    """An entry of `sdtp_lib.methods` at one prompt length; ``scorer`` where it does not bring its own.

    Raises
    ------
    SpeedupOutOfReach
        If it is scaled to a speed-up that it cannot have at this length.
    """
    layers = num_layers(model)
    config = method.budget_for(model).for_prompt(prompt_tokens)
    own = method.scorer_for(model) or scorer

    @contextlib.contextmanager
    def open_session(model: Any) -> Iterator[Session]:
        with token_pruning(model, method, own):
            yield _model_session(model)

    return Timed(
        name, method.name, open_session, config, lambda tokens: method.passes(config, layers, tokens), own
    )  # fmt: skip


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
