"""One prefill under way: score the kept tokens before a configured layer, drop the worst, shorten what follows.

This is the pruning itself (arXiv 2504.04514, section 3.3). Before each layer it is told what the model would hand to
that layer, and answers what the layer gets instead. It calls a scorer, whichever it is, and knows nothing of hooks.

Axes: B rows, T new columns (padding included), N new tokens kept so far, K after a cut, D hidden size, L layers.

Example: 10 tokens, 6 of which stay before layer 4. Layers 0 to 3 get what the model gives them. Before layer 4 the
scorer sees hidden states (1, 10, D), and the columns ``[0, 1, 4, 7, 8, 9]`` are chosen: from there on hidden states are
(1, 6, D), rotary tables are those six rows of the model's, and the mask is those rows and columns of the model's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from sdtp_lib import budget
from sdtp_lib.architectures.caches import cache_of, cached_keys, kv_bytes, without_cache
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.cut_record import Segment, record_of
from sdtp_lib.pruning.earlier_layers import EarlierLayers
from sdtp_lib.pruning.kv_budget import KVBudget, cut_cache
from sdtp_lib.pruning.plan import Budget, on_device, tokens_plan
from sdtp_lib.pruning.pruned_cache import remember
from sdtp_lib.pruning.selection import count_for_mass, gather_tokens, protected_tokens, select_positions
from sdtp_lib.pruning.stage import Scorer, Stage, name_of, real_scores
from sdtp_lib.pruning.trace import PruningTrace


class Prefill(EarlierLayers):
    """A forward that cuts: which of the new tokens are kept, and the record that the cache takes along.

    Parameters
    ----------
    tokens : Tensor (B, T) of ids, or (B, T, D) of embeddings
        What the forward is over.
    protected : Tensor (B, T) of bool, optional
        Tokens that no stage drops.
    kv
        What each layer's cache is cut to after the prefill.
    """

    def __init__(
        self,
        architecture: Architecture,
        wanted: Budget,
        scorer: Scorer,
        trace: PruningTrace,
        lengths: list[int],
        tokens: torch.Tensor,
        cache: Any = None,
        protected: torch.Tensor | None = None,
        kv: KVBudget | None = None,
    ) -> None:
        config, plan = self._planned(architecture, wanted, lengths)
        columns, device = tokens.shape[1], tokens.device
        # Of the kept tokens; a copy, since scores may be read when the caller has filled its tensor anew.
        self.token_ids = tokens.clone() if tokens.dim() == 2 else None
        super().__init__(architecture, config.positions == "compact", len(lengths), columns, cache, config.layers)
        self.config, self.scorer, self.trace, self.lengths, self.plan = config, scorer, trace, lengths, plan
        self.wanted, self.protected = wanted, None if protected is None else protected.to(device)
        self.kv, self.ran, self.keys_kept = kv, None, {}
        if config.keep_mass is not None and len(lengths) > 1:
            raise PruningNotSupported(
                f"keep_mass={config.keep_mass} with a batch of {len(lengths)}: rows would keep different numbers of "
                "tokens, known only from the scores: use batch 1 or keep_ratio."
            )
        if self.compact and len(lengths) > 1:
            raise PruningNotSupported(
                f"positions='compact' with a batch of {len(lengths)}: rows would need tables of their own: "
                "use batch 1 or positions='original'."
            )
        if plan[-1] != plan[0]:
            for index in range(config.layers[0], len(architecture.layers)):
                self._refuse_windows_over_kept_tokens(index)
        self.left = list(lengths)  # kept tokens of each row so far
        self.padded = min(lengths) < columns
        # Made here, before any compute is queued: a copy from the host later would make it wait for the device.
        self.prompt_lengths = on_device(lengths, device)
        # Rows of 10 and 8 tokens in 10 columns: positions 0 .. 9, and -1, -1, 0 .. 7.
        self.positions = torch.arange(columns, device=device).expand(len(lengths), -1)
        if self.padded:
            self.positions = (self.positions - (columns - self.prompt_lengths)[:, None]).clamp_min(-1)
        self.carried: dict[str, torch.Tensor] = {}  # what the scorer left for later stages, of the kept tokens
        self.segments: list[Segment] = []
        self._not_finite: list[tuple[int, torch.Tensor]] = []
        self.before: torch.Tensor | None = None  # tokens of each row in each layer of a first pass
        self.keeps_all = plan[-1] == plan[0] and config.keep_mass is None  # then scores wait until somebody reads them
        self._begin_trace()

    def _planned(
        self, architecture: Architecture, wanted: Budget, lengths: list[int]
    ) -> tuple[PruningConfig, list[list[int]]]:
        """The configuration, and the tokens of each row in each layer."""
        # Rows may differ in their keep ratio (a wanted speed-up), never in layers or protected ends.
        return wanted.for_prompt(max(lengths)), tokens_plan(wanted, len(architecture.layers), lengths)

    def _begin_trace(self) -> None:
        self.trace.begin(self.lengths, torch.tensor(self.plan))

    def layer_arguments(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """As in `ForwardPass`, after a cut where ``index`` is a configured layer."""
        self.cache = cache_of(arguments)
        self._score_keys()
        given = self._shortened(index, arguments)
        if index in self.stages:
            hidden = self.cut_tokens(index, layer, given)
            if hidden is not None:
                given = self._shortened(index, {**arguments, "hidden_states": hidden})
        if self.kv is not None and self.cache is not None:
            self.ran = (index, layer, dict(given))
        self._keep_for_later(index, given)
        self._look_far(index, layer, given)
        return given

    def cut_tokens(self, index: int, layer: nn.Module, given: dict[str, Any]) -> torch.Tensor | None:
        """Score the kept tokens before layer ``index``, drop the worst: hidden states (B, K, D), None if all stay."""
        hidden = given["hidden_states"]
        self.positions = self.positions.to(hidden.device)
        positions, valid = self.positions, self.positions >= 0
        known = {"before": self._layers_before(index, hidden.device), "past": self._past(index), "far": self.far}
        if self.keeps_all and not hidden.is_inference():
            self.trace.scored_positions[index] = self.trace.kept_positions[index] = positions
            read = partial(self._score_when_read, index, layer, given, known, hidden._version, _state(layer))
            self.trace.scored_when_read.append(read)
            return None
        hidden = self._by_rows(hidden)
        stage = self._stage(
            index, layer, {**given, "hidden_states": hidden}, **known,
            carried={name: values.to(hidden.device) for name, values in self.carried.items()},
        )  # fmt: skip
        version = None if hidden.is_inference() else hidden._version
        scores = self._checked_scores(index, self.scorer(stage), valid)
        if version is not None and hidden._version != version:
            raise PruningNotSupported(
                f"scorer={name_of(self.scorer)} writes into stage.hidden_states at layer {index}, which the model goes "
                "on with: let it work on a copy (hidden = stage.hidden_states.clone())."
            )
        self.carried = stage.carried
        sinks, local = self._ends(index)
        counts = self._counts(index, scores, local)
        if counts == self.left:
            self._note(index, positions, scores, positions)
            return None
        chosen = select_positions(scores, self.left, counts, sinks, local, self.protected)
        if self.protected is not None:
            self.protected = gather_tokens(self.protected, chosen) & (chosen >= 0)
        self.left, self.padded = list(counts), min(counts) < max(counts)
        self.positions = gather_tokens(positions, chosen).masked_fill(chosen < 0, -1)
        self.token_ids = None if self.token_ids is None else gather_tokens(self.token_ids, chosen)
        # `chosen` counts among the tokens left: after [0, 1, 4, 7, 8, 9] a cut to [0, 2, 4, 5] leaves 0, 4, 8, 9.
        self.kept = chosen if self.kept is None else gather_tokens(self.kept, chosen).masked_fill(chosen < 0, -1)
        self.kept_padded = self.padded
        self.carried = {name: gather_tokens(values, chosen) for name, values in self.carried.items()}
        self._cut, self.last_queries = {}, {}
        self.far = None if self.far is None else self.far.after_cut(chosen)
        self.segments.append((index, self.kept, self.padded))
        self._note(index, positions, scores, self.positions)
        return gather_tokens(hidden, chosen)

    def _ends(self, _index: int) -> tuple[int, list[int]]:
        """How many of the first tokens, and of the last ones of each row, always stay at this stage."""
        each = [self.wanted.for_prompt(length) for length in self.lengths]
        left = zip(self.left, each, strict=True)
        return self.config.sink_tokens, [budget.protected_count(count, own) - own.sink_tokens for count, own in left]

    def _note(self, index: int, positions: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor) -> None:
        """For the trace: positions before the cut at ``index``, their scores, positions after it."""
        trace = self.trace
        trace.scored_positions[index], trace.scores[index], trace.kept_positions[index] = positions, scores, kept

    @torch.no_grad()
    def _score_when_read(
        self, index: int, layer: nn.Module, given: dict[str, Any], known: dict[str, Any], version: int, weights: Any
    ) -> None:
        """The scores before layer ``index``, asked for after the prefill that dropped nothing; stages in their order.

        Raises
        ------
        PruningNotSupported
            Where the model has changed the layer's input since, or somebody the layer's weights.
        """
        if _state(layer) != weights:
            raise PruningNotSupported(
                f"the scores at layer {index} were not needed, since nothing could be dropped, and cannot be told now: "
                "the layer's weights were changed, moved or converted since. Read trace.scores before that."
            )
        if given["hidden_states"]._version != version:
            raise PruningNotSupported(
                f"the scores at layer {index} were not needed, since nothing could be dropped, and cannot be told now: "
                f"{self.architecture.model_type} writes into its hidden states. Run the prefill under "
                "torch.inference_mode(), where scores are computed at once."
            )
        given = {**given, "hidden_states": self._by_rows(given["hidden_states"])}
        stage = self._stage(index, layer, given, carried=dict(self.carried), **known)
        self.trace.scores[index] = self._checked_scores(index, self.scorer(stage), stage.valid)
        self.carried = stage.carried
        self.check_scores()

    def _stage(self, index: int, layer: nn.Module, given: dict[str, Any], **known: Any) -> Stage:
        hidden = given["hidden_states"]
        positions = self.positions.to(hidden.device)
        return Stage(
            layer_index=index, layer=layer, hidden_states=hidden, positions=positions, valid=positions >= 0,
            layer_arguments=without_cache(given), prompt_lengths=self.prompt_lengths.to(hidden.device),
            padded=self.padded, windowed=self.windowed,
            token_ids=None if self.token_ids is None else self.token_ids.to(hidden.device), **known,
        )  # fmt: skip

    def _score_keys(self) -> None:
        """Choose what the layer that ran last keeps in the cache; it is cut at the end only, since scorers read it."""
        ran, self.ran = self.ran, None
        if ran is None or ran[0] in self.architecture.state_layers or self.architecture.sliding_window(ran[0]):
            return  # a layer with a state holds no keys, and one with a window no more than that
        index, layer, given = ran
        counts = [self.kv.count(left, index, length) for left, length in zip(self.left, self.lengths, strict=True)]
        if counts != self.left:
            keys = cached_keys(self.cache, index, given["hidden_states"].shape[1])
            scores = self.kv.scorer(self._stage(index, layer, given, keys=keys))
            windows = any(self.architecture.sliding_window(each) is not None for each in range(len(self.plan)))
            # If heads keep different tokens, no one mask or position bias fits them: only where none is needed.
            by_head = given.get("alibi") is None and not (
                self.padded or windows or min(self.lengths) < self.columns or len(set(counts)) > 1
            )
            self.keys_kept[index] = self.kv.choose(scores, self.left, counts, by_head)

    def _counts(self, index: int, scores: torch.Tensor, local: list[int]) -> list[int]:
        """How many tokens of each row stay: the plan's, unless protected tokens or the scores' mass have a say."""
        config, sinks = self.config, self.config.sink_tokens
        if self.protected is None and config.keep_mass is None:
            return self.plan[index]
        least = [count + sinks for count in local]
        if self.protected is not None:
            least = protected_tokens(self.left, scores.shape[1], sinks, local, self.protected).sum(dim=1).tolist()
        if config.keep_mass is not None:
            least = [max(least[0], count_for_mass(scores[0, scores.shape[1] - self.left[0] :], config.keep_mass))]
        counts = [
            budget.keep_count(left, index, self.wanted.for_prompt(length), at_least)
            if length >= config.min_prompt_tokens
            else left
            for left, length, at_least in zip(self.left, self.lengths, least, strict=True)
        ]
        # Later layers compute these tokens, until the next stage plans anew from what is then left.
        self.plan[index:] = [counts] * (len(self.plan) - index)
        return counts

    def _checked_scores(self, index: int, scores: Any, valid: torch.Tensor) -> torch.Tensor:
        scores = real_scores(index, scores, valid)
        # Read on the host when nothing is under way, so that no device waits here.
        self._not_finite.append((index, (~torch.isfinite(scores) & valid).any()))
        return scores.masked_fill(~valid, -torch.inf) if self.padded else scores

    def finish(self) -> None:
        """After the last layer: remember the cuts with the cache, complete the trace."""
        self._score_keys()
        computed = torch.tensor(self.plan)
        self.trace.passes = [computed] if self.before is None else [self.before, computed]
        self.trace.tokens_per_row = sum(self.trace.passes)
        self._remember()

    def _remember(self) -> None:
        """The cuts go with the cache, whose bytes the trace has."""
        if self.cache is None:
            return
        self.trace.kv_bytes_per_layer = kv_bytes(self.cache)
        if not self.segments and not self.keys_kept:
            return
        record = record_of(
            self.cache, self.record, self.segments, self.seen, self.columns, self.lengths, len(self.plan),
            self.architecture, self.compact,
        )  # fmt: skip
        cut_cache(self.cache, record, self.keys_kept)
        if self.keys_kept:
            kept_keys = {layer: columns.shape[-1] for layer, columns in self.keys_kept.items()}
            self.trace.keys_per_layer = [kept_keys.get(layer, max(counts)) for layer, counts in enumerate(self.plan)]
        remember(self.cache, record)
        self.trace.kv_bytes_per_layer = kv_bytes(self.cache)

    def check_scores(self) -> None:
        """Refuse scores that were not finite. Reads the device, so the engine asks when nothing is under way."""
        if not self._not_finite:
            return
        home = self._not_finite[0][1].device
        flags = torch.stack([flag.to(home) for _, flag in self._not_finite]).tolist()
        bad = [index for (index, _), flag in zip(self._not_finite, flags, strict=True) if flag]
        self._not_finite = []
        if bad:
            raise PruningNotSupported(
                f"the scorer gave scores that are not finite at layer {bad[0]} (in all: {bad}): look for an "
                "overflow in the scorer, or load the model in float32 or bfloat16."
            )


def _state(layer: nn.Module) -> list[tuple[int, int]]:
    """Where the layer's weights lie and how often they were written to: another one, another layer."""
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in layer.parameters()]
