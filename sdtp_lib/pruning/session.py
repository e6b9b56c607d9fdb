"""What the hooks of one ``with token_pruning`` do: tell which forward is a prefill, and pass layer inputs through it.

The session decides when something is cut; `prefill` and `continuation` decide what. One thread at a time: a second one
is refused. Where a ``with`` saw tokens and pruned none, `remarks` says so.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.caches import cache_of, refuse_cache, tokens_seen, without_cache
from sdtp_lib.architectures.layers import Architecture, layer_signature, named_arguments
from sdtp_lib.architectures.row_attention import masks_by_rows, serves_rows
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.chunked_prompt import ChunkedPrompt, prompt_in_chunks
from sdtp_lib.pruning.chunks import ChunkPrefill
from sdtp_lib.pruning.continuation import ForwardPass
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.packed_prefill import PackedPrefill
from sdtp_lib.pruning.plan import Budget, prompt_lengths, shape_of, tokens_of, tokens_plan
from sdtp_lib.pruning.prefill import Prefill
from sdtp_lib.pruning.protected_columns import protected_columns
from sdtp_lib.pruning.pruned_cache import PrunedCache, remembered
from sdtp_lib.pruning.remarks import Remarks
from sdtp_lib.pruning.second_pass import SecondPass, TwoPasses, choose_by
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.pruning.trace import PruningTrace


class _FirstPassDone(Exception):  # a way out of the first pass, not an error
    """The last stage of a first pass has chosen; later layers need not run."""


class Session:
    """What the hooks of one ``with`` call; they are registered by `engine`."""

    def __init__(
        self,
        architecture: Architecture,
        config: PruningConfig,
        budget: Budget,
        scorer: Scorer,
        protect: torch.Tensor | None,
    ) -> None:
        self.architecture, self.config, self.budget, self.scorer = architecture, config, budget, scorer
        self.protect = protect
        self.trace = PruningTrace()
        self.kv: KVBudget | None = None
        self.two_passes: TwoPasses | None = None
        self._times = 1  # how often `generate` repeats each row of its prompt
        self._chunks: ChunkedPrompt | None = None  # the prompt of a `generate` that hands it over in chunks
        self._pass: ForwardPass | None = None
        self._stop_after: int | None = None  # the layer before which a first pass has found what it is for
        self._unchecked: Prefill | None = None
        # The thread whose forward is under way. Looked at and set under the lock, so that two cannot both find it free.
        self._thread: int | None = None
        self._lock = threading.Lock()
        self.remarks = Remarks(config, budget, self.trace)
        self._for_this_forward = contextlib.ExitStack()
        self._outside: dict[str, Any] = {}  # what a multimodal model was called with: ids and padding of its text

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise PruningNotSupported(
            "the model cannot be copied inside a `with token_pruning(...)`, whose hooks would go along: copy it before."
        )

    def before_model(self, names: tuple[str, ...]):
        """The hook on the causal LM: refuses what cannot be right with K columns of logits."""

        def check(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = named_arguments(names, args, kwargs)
            rows, columns = shape_of(arguments)
            seen = tokens_seen(cache_of(arguments))
            if self.architecture.is_multimodal:
                self._outside = arguments
                if isinstance(cache := cache_of(arguments), PrunedCache):
                    cache.inside = True  # it is asked for masks before the language model is called
            if columns < 2 or (seen > 0 and self.config.prune == "first") or self._chunk_comes():
                return
            if arguments.get("labels") is not None:
                raise PruningNotSupported(
                    "labels= cannot be matched to the logits of the kept tokens: compute the loss from the returned "
                    "logits and trace.kept_positions, or run the model outside token_pruning."
                )
            keep = arguments.get("logits_to_keep", 0)
            if torch.is_tensor(keep):
                raise PruningNotSupported(
                    "logits_to_keep as a tensor names columns, which pruning moves: give an int, counted from the end."
                )
            lengths = prompt_lengths(arguments.get("attention_mask"), rows, columns)
            last = max(tokens_plan(self.budget, len(self.architecture.layers), lengths)[-1])
            if keep and keep > last:
                raise PruningNotSupported(
                    f"logits_to_keep={keep} is more than the {last} tokens that reach the last layer: give at most "
                    f"{last}, or 0 for all of them."
                )

        return check

    @contextlib.contextmanager
    def in_generate(self, times: int) -> Iterator[None]:
        """Around a ``generate`` that repeats each row of its prompt so often (beams, several answers).

        Raises
        ------
        PruningNotSupported
            For a budget that may drop the last token, from which ``generate`` would go on.
        """
        if not (self.config.min_local_tokens or self.config.local_ratio) and self.remarks.wants_less():
            raise PruningNotSupported(
                "min_local_tokens=0 with local_ratio=0 may drop the prompt's last token, from which generate would go "
                "on: give min_local_tokens=1 or more."
            )
        before, self._times = self._times, times
        try:
            yield
        finally:
            self._times = before

    @contextlib.contextmanager
    def in_chunks(self, ids: Any, mask: Any, cache: Any, size: int) -> Iterator[int]:
        """Around a ``generate`` with ``prefill_chunk_size=size``: yields the size that it is to have instead.

        Raises
        ------
        PruningNotSupported, ValueError
            For what cannot be pruned chunk by chunk, and a size that leaves no room for the query tokens.
        """
        self._chunks = prompt_in_chunks(
            ids, mask, cache, size, wanted=self.budget, config=self.config, scorer=self.scorer,
            num_layers=len(self.architecture.layers), protection=self._protection,
            whole_only={"a method of two passes": self.two_passes, "a method of a KV budget": self.kv,
                        "layers that keep a state": self.architecture.with_state or None,
                        "a multimodal model": True if self.architecture.is_multimodal else None},
        )  # fmt: skip
        try:
            yield size if self._chunks is None else self._chunks.size
        finally:
            self._chunks = None

    def _chunk_comes(self) -> bool:
        return self._chunks is not None and self._chunks.pending

    def before_stack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """The hook on the decoder stack: a prefill, or a forward on what a pruned prefill left, or neither?"""
        if module.training:
            raise PruningNotSupported(
                "the model is in training mode, which pruned prefill does not serve: call model.eval()."
            )
        self._take_turn()
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        arguments = named_arguments(names, args, kwargs)
        cache = cache_of(arguments)
        if cache is not None:
            refuse_cache(cache)
        rows, columns = shape_of(arguments)
        seen = tokens_seen(cache)
        self.check_pending()
        every = self.config.prune == "every" and columns > max(1, self.config.min_prompt_tokens)
        if columns == 0:
            raise ValueError("the prompt has no tokens: give input_ids or inputs_embeds of at least one.")
        changed = None
        if self._chunk_comes():
            changed = (), self._begin_chunk(arguments, rows, cache)
        elif seen == 0 or every:
            lengths = prompt_lengths(self._padding_of(arguments), rows, columns)
            outside, tokens = self._outside.get("input_ids"), tokens_of(arguments)
            if outside is not None and outside.shape == (rows, columns):  # a multimodal model's stack gets embeddings
                tokens = outside.to(tokens.device)
            given = (self.architecture, self.budget, self.scorer, self.trace, lengths, tokens)
            protected = self._protection(rows, seen, columns)
            if self.two_passes is None or columns < 2 or seen:
                kv = None if seen else self.kv
                uneven = rows > 1 and min(lengths) < columns
                packs = uneven and kv is None and serves_rows(self.architecture, arguments)
                self._pass = (PackedPrefill if packs else Prefill)(*given, cache, protected, kv=kv)
            else:
                first = Prefill(*given, None, protected)
                self._run_first_pass(module, first, arguments)
                self._pass = SecondPass(first, cache, self.two_passes, self.kv)
        elif remembered(cache) is not None:
            self._pass = ForwardPass(self.architecture, self.config.positions == "compact", rows, columns, cache)
        elif not getattr(cache, "prefilled_inside", False):
            self.remarks.on_added(seen, columns)
        if isinstance(cache, PrunedCache):
            cache.inside = True
        if isinstance(self._pass, PackedPrefill):  # at the very end: nothing may fail between here and `after_stack`
            self._pass.masks = self._for_this_forward.enter_context(masks_by_rows(self.architecture.config))
        return changed

    def _begin_chunk(self, arguments: dict[str, Any], rows: int, cache: Any) -> dict[str, Any]:
        """The next chunk of the prompt: the stack's arguments, with the query tokens behind it."""
        whole = self._chunks
        if not whole.number:
            whole.expand(rows)
        longer = whole.with_queries(arguments)
        self._pass = ChunkPrefill(whole, self.architecture, self.budget, self.scorer, self.trace, cache)
        return longer

    def end_forward(self) -> None:
        """Take back what was put in for one forward, also where that ended early."""
        self._for_this_forward.close()

    def after_last_layer(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """The hook on the last layer's output, which is packed where its inputs were."""
        return self._pass.after_last_layer(output) if isinstance(self._pass, PackedPrefill) else None

    def after_queries(self, index: int):
        """The hook on the query projection of layer ``index``: what scorers at the next stages may read."""

        def keep(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            if isinstance(self._pass, Prefill):
                self._pass.keep_queries(index, output)

        return keep

    def _run_first_pass(self, stack: nn.Module, first: Prefill, arguments: dict[str, Any]) -> None:
        """Run ``first`` over the prompt: hooks on the layers alone, a cache of its own, as far as is needed."""
        how, last = self.two_passes, self.config.layers[-1]
        if how.scores is not None:
            choose_by(first, how.scores(without_cache(arguments)))
            return
        self._pass, self._stop_after = first, last if how.stop else None
        try:
            stack.forward(**{**without_cache(arguments), "use_cache": True})
        except _FirstPassDone:
            first.plan[last:] = [[0] * len(first.lengths)] * (len(first.plan) - last)
        finally:
            self._pass, self._stop_after = None, None
        first.check_scores()

    def after_model(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        """The hook after a multimodal model, also after an exception."""
        cache, self._outside = cache_of(self._outside), {}
        if isinstance(cache, PrunedCache):
            cache.inside = False

    def _padding_of(self, arguments: dict[str, Any]) -> Any:
        """The 2-D mask of the tokenizer, which a multimodal model turns into layers' masks before its stack sees it."""
        return (self._outside if self.architecture.is_multimodal else arguments).get("attention_mask")

    def _protection(self, rows: int, seen: int, columns: int) -> torch.Tensor | None:
        ids = self._outside.get("input_ids")
        return protected_columns(self.architecture, self.protect, ids, (rows, columns), seen, self._times)

    def _take_turn(self) -> None:
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise PruningNotSupported(
                    "a second thread runs this model while a forward inside token_pruning is under way: "
                    "one thread at a time, or a second copy of the model."
                )
            self._thread = threading.get_ident()
            self._pass = None

    def after_final_norm(self, _module: nn.Module, _args: tuple, hidden: torch.Tensor) -> torch.Tensor | None:
        """The hook on the last norm of a stack that reshapes its output to T columns: fill it up on the left."""
        if self._pass is None or self._pass.kept is None:
            return None
        return nn.functional.pad(hidden, (0, 0, self._pass.columns - hidden.shape[1], 0))

    def after_stack(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """The hook after the stack, also after an exception (then without an output)."""
        with self._lock:
            if self._thread != threading.get_ident():
                return None  # a refused second thread must not end the first one's pass
            finished, self._pass = self._pass, None
            self._thread = None
        self.end_forward()
        if finished is None:
            return None
        if isinstance(finished.cache, PrunedCache):
            finished.cache.inside = False
        queries = finished.close()
        if not isinstance(finished, Prefill):
            return None
        if output is None:
            self.trace.end_early()
            return None
        finished.finish()
        self._unchecked = finished
        if finished.cache is not None:
            finished.cache.prefilled_inside = True  # an attribute, so that copies of the cache know it too
        if finished.positions.device.type == "cpu":
            self.check_pending()
        if not self._chunk_comes():
            self.remarks.on_prefill(finished.kv is not None)
        filled_up = finished.kept is not None and self.architecture.fixed_length_norm() is not None
        if not filled_up and not queries:
            return None
        hidden = output[0][:, -finished.kept.shape[1] :] if filled_up else output[0]
        hidden = hidden[:, : hidden.shape[1] - queries]
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    def check_pending(self) -> None:
        """Complain about scores of the last prefill: at once on a CPU, elsewhere when the next forward begins."""
        unchecked, self._unchecked = self._unchecked, None
        if unchecked is not None:
            unchecked.check_scores()

    def before_layer(self, index: int, layer: nn.Module):
        """The hook on layer ``index``: cut if it is configured, then hand it inputs of the right length."""
        names = layer_signature(layer)

        def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            if self._pass is None:
                return None
            arguments = named_arguments(names, args, kwargs)
            given = self._pass.layer_arguments(index, module, arguments)
            if index == self._stop_after:
                raise _FirstPassDone
            if given is arguments:
                return None
            return (given.pop("hidden_states"),), given

        return replace
