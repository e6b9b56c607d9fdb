"""One prefill under way: score the living tokens before a configured layer, drop the worst, shorten what follows.

This is the pruning itself (arXiv 2504.04514, section 3.3). It knows neither hooks nor where scores come from; it is
told before each layer what the model would hand to that layer, and answers what the layer gets instead.

Axes: B batch, T prompt columns, N tokens alive before a cut, K after it, D hidden size, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtp_lib import budget
from sdtp_lib.architectures.caches import cache_of, cached_keys, cached_tokens, kv_bytes
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.architectures.masks import backend_mask
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.continuation import PrefillRecord, remember
from sdtp_lib.pruning.selection import gather_tokens, select_positions
from sdtp_lib.pruning.stage import LAYERS_BACK, LayerBefore, Scorer, Stage
from sdtp_lib.pruning.trace import PruningTrace

LAST_TOKENS = 64  # inputs of each layer that stay at hand for a scorer that asks what was attended to


def tokens_plan(config: PruningConfig, num_layers: int, lengths: list[int]) -> list[list[int]]:
    """Tokens of each row in each layer (L lists of B), known before the prefill from the lengths alone."""
    by_length = {length: budget.tokens_per_layer(config, num_layers, length) for length in set(lengths)}
    return [[by_length[length][layer] for length in lengths] for layer in range(num_layers)]


class Prefill:
    """One prefill under way: which tokens are alive, and layer inputs cut to them."""

    def __init__(
        self,
        architecture: Architecture,
        config: PruningConfig,
        scorer: Scorer,
        trace: PruningTrace,
        lengths: list[int],
        columns: int,
        device: torch.device,
    ) -> None:
        plan = tokens_plan(config, len(architecture.layers), lengths)
        if config.positions == "compact" and len(lengths) > 1:
            raise PruningNotSupported(
                f"positions='compact' with a batch of {len(lengths)}: rows would need tables of their own: "
                "use batch 1 or positions='original'."
            )
        windows = [architecture.sliding_window(layer) for layer in range(config.layers[0], len(architecture.layers))]
        short = [window for window in windows if window is not None and window < columns]
        if short and architecture.backend.startswith("flash_attention") and plan[-1] != plan[0]:
            raise PruningNotSupported(
                f"attn_implementation={architecture.backend!r} counts a sliding window ({short[0]}) in kept tokens, "
                "not in original positions: load the model with attn_implementation='sdpa'."
            )
        self.architecture, self.config, self.scorer, self.trace = architecture, config, scorer, trace
        self.lengths, self.columns, self.plan = lengths, columns, plan
        self.alive = list(lengths)
        self.padded = min(lengths) < columns
        # Made here, before any compute is queued: a copy from the host later would make it wait for the device.
        self.prompt_lengths = _on_device(lengths, device)
        self.positions = torch.arange(columns, device=device).expand(len(lengths), -1)
        if self.padded:
            self.positions = (self.positions - (columns - self.prompt_lengths)[:, None]).clamp_min(-1)
        self.living: torch.Tensor | None = None  # columns (B, K) of the living tokens once some are gone
        self.last_inputs: dict[int, torch.Tensor] = {}  # of the layers since the last cut
        self.carried: dict[str, torch.Tensor] = {}  # what the scorer left for later stages, of the living tokens
        self.cache: Any = None
        self.segments: list[tuple[int, torch.Tensor, bool]] = []
        self._not_finite: list[tuple[int, torch.Tensor]] = []
        self._cut_tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[int | None, Any] = {}
        trace.begin(lengths, torch.tensor(plan))

    def layer_arguments(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments that layer ``index`` gets instead of its own; None where nothing has been cut so far."""
        self.cache = cache_of(arguments)
        full = arguments
        if self.living is not None:
            arguments = self._shortened(index, full)
        if index in self.config.layers and self._cut(index, layer, arguments):
            arguments = self._shortened(index, {**full, "hidden_states": arguments["hidden_states"]})
        if any(index < stage <= index + LAYERS_BACK for stage in self.config.layers):
            # A copy of the few: a view would keep the whole tensor alive.
            self.last_inputs[index] = arguments["hidden_states"][:, -LAST_TOKENS:].clone()
        return arguments if self.living is not None else None

    def _cut(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> bool:
        """Score the living tokens before layer ``index`` and drop the worst; False if all of them stay."""
        hidden, config, trace = arguments["hidden_states"], self.config, self.trace
        self.positions = self.positions.to(hidden.device)
        positions, valid = self.positions, self.positions >= 0
        stage = Stage(
            layer_index=index, layer=layer, hidden_states=hidden, positions=positions, valid=valid,
            position_embeddings=arguments.get("position_embeddings"),
            prompt_lengths=self.prompt_lengths.to(hidden.device), alibi=arguments.get("alibi"),
            before=self._layers_before(index, hidden), padded=self.padded,
            carried={name: values.to(hidden.device) for name, values in self.carried.items()},
        )  # fmt: skip
        scores = self._checked_scores(index, self.scorer(stage), valid)
        self.carried = stage.carried
        trace.scored_positions[index], trace.scores[index] = positions, scores
        kept = self.plan[index]
        if kept == self.alive:
            trace.kept_positions[index] = positions
            return False
        local = [budget.protected_count(count, config) - config.sink_tokens for count in self.alive]
        chosen = select_positions(scores, self.alive, kept, config.sink_tokens, local)
        self.alive, self.padded = list(kept), min(kept) < max(kept)
        self.positions = gather_tokens(positions, chosen).masked_fill(chosen < 0, -1)
        before = chosen if self.living is None else gather_tokens(self.living, chosen)
        self.living = before.masked_fill(chosen < 0, 0)
        arguments["hidden_states"] = gather_tokens(hidden, chosen)
        self.carried = {name: gather_tokens(values, chosen) for name, values in self.carried.items()}
        self._cut_tensors, self._masks, self.last_inputs = {}, {}, {}
        self.segments.append((index, self.positions, self.padded))
        trace.kept_positions[index] = self.positions
        return True

    def _layers_before(self, index: int, hidden: torch.Tensor) -> dict[int, LayerBefore]:
        found = {}
        for earlier in range(max(0, index - LAYERS_BACK), index):
            keys = cached_keys(self.cache, earlier, hidden.shape[1])
            # On another device a device_map splits the model between the two.
            if keys is not None and earlier in self.last_inputs and keys.device == hidden.device:
                found[earlier] = LayerBefore(self.architecture.layers[earlier], keys, self.last_inputs[earlier])
        return found

    def _checked_scores(self, index: int, scores: Any, valid: torch.Tensor) -> torch.Tensor:
        if not torch.is_tensor(scores) or scores.shape != valid.shape:
            found = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
            raise ValueError(
                f"the scorer returned {found} at layer {index}: return a tensor of shape {tuple(valid.shape)}, one "
                "score a living token."
            )
        scores = scores.detach().to(valid.device)
        # Read on the host when nothing is under way, so that no device waits here.
        self._not_finite.append((index, (~torch.isfinite(scores) & valid).any()))
        return scores.masked_fill(~valid, -torch.inf) if self.padded else scores

    def _shortened(self, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Layer arguments for the living tokens, out of those that the model made for all T columns."""
        architecture, hidden = self.architecture, arguments["hidden_states"]
        arguments = dict(arguments)
        tables = arguments.get("position_embeddings")
        if tables is not None:
            arguments["position_embeddings"] = tuple(self._cut_tensor(table) for table in tables)
        if torch.is_tensor(arguments.get("position_ids")):
            arguments["position_ids"] = self._cut_tensor(arguments["position_ids"])
        if arguments.get("cache_position") is not None:
            # transformers < 5.4: places in this layer's cache, which starts empty and gets the living tokens only.
            arguments["cache_position"] = arguments["cache_position"][: hidden.shape[1]]
        if self.config.positions == "compact":
            compact = torch.arange(hidden.shape[1], device=hidden.device)[None]
            arguments["position_ids"] = compact
            arguments["position_embeddings"] = architecture.rotary()(hidden, position_ids=compact)
        if arguments.get("alibi") is not None:
            arguments["alibi"] = self._cut_alibi(arguments["alibi"])
        window = architecture.sliding_window(index)
        window = window if window is not None and window < self.columns else None
        if window not in self._masks:
            positions = self.positions.to(hidden.device)
            self._masks[window] = backend_mask(
                architecture.backend, positions, positions, window=window, padded=self.padded, dtype=hidden.dtype
            )
        arguments["attention_mask"] = self._masks[window]
        return arguments

    def _cut_tensor(self, full: torch.Tensor) -> torch.Tensor:
        if full.dim() < 2 or full.shape[1] != self.columns:
            raise PruningNotSupported(
                f"a position table of shape {tuple(full.shape)} has no axis of {self.columns} tokens in second place: "
                "see CONTRIBUTING.md, 'Adding a family'."
            )
        # All layers share the same tables: cut each once a stage. The full one is kept, so that its id stays its own.
        if id(full) not in self._cut_tensors:
            self._cut_tensors[id(full)] = (full, gather_tokens(full, self.living))
        return self._cut_tensors[id(full)][1]

    def _cut_alibi(self, alibi: torch.Tensor) -> torch.Tensor:
        if id(alibi) not in self._cut_tensors:
            by_row = alibi.reshape(len(self.lengths), -1, alibi.shape[-1])
            cut = gather_tokens(by_row, self.living, dim=2).reshape(alibi.shape[0], 1, -1)
            self._cut_tensors[id(alibi)] = (alibi, cut)
        return self._cut_tensors[id(alibi)][1]

    def finish(self) -> None:
        """After the last layer: remember the cut with the cache, complete the trace."""
        if self.cache is None:
            return
        self.trace.kv_bytes_per_layer = kv_bytes(self.cache)
        if self.segments:
            compact = self.config.positions == "compact"
            held = [cached_tokens(self.cache, layer) for layer in range(len(self.plan))]
            remember(self.cache, PrefillRecord(self.columns, self.lengths, self.segments, self.plan, compact, held))

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


def _on_device(counts: list[int], device: torch.device) -> torch.Tensor:
    """Counts as a tensor; equal ones are filled in on the device, which waits for nothing."""
    if min(counts) == max(counts):
        return torch.full((len(counts),), counts[0], dtype=torch.int64, device=device)
    return torch.tensor(counts, device=device)
