"""What a ``with token_pruning`` says where it prunes nothing: once, with the reason, which its trace has too.

Asked when a prefill has ended, since protected tokens and what the scores say are known then only. Everything is read
from counts on the host: no device waits. A keep ratio of 1 and ``"1x"`` ask for nothing and are not remarked on.
"""

from __future__ import annotations

import warnings

from sdtp_lib import budget as counting
from sdtp_lib.budget import SpeedupBudget, speedup_limit
from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.plan import Budget
from sdtp_lib.pruning.trace import PruningTrace


class Remarks:
    """The remarks of one ``with``."""

    def __init__(self, config: PruningConfig, budget: Budget, trace: PruningTrace) -> None:
        self._config, self._budget, self._trace = config, budget, trace
        self._said: set[str] = set()

    def on_prefill(self, cuts_keys: bool) -> None:
        """After a prefill, of a prompt in chunks after the last: whether anything went, and if nothing did, why.

        ``cuts_keys`` says whether each layer's cache has a budget of its own.
        """
        trace = self._trace
        self._on_short_of(trace.prompt_lengths)
        if trace.passes[-1][-1].tolist() != trace.prompt_lengths or trace.keys_per_layer:
            return
        tokens = max(trace.prompt_lengths)
        config = self._budget.for_prompt(tokens)
        if not self.wants_less():
            trace.not_pruned = self._whole_cache(tokens) if cuts_keys else ""
        elif getattr(self._budget, "speedup", None) != 1:
            trace.not_pruned = self._whole_prompt(tokens, config)
        if trace.not_pruned and tokens >= config.min_prompt_tokens:
            self._say_once("whole", f"{trace.not_pruned}.")

    def _whole_prompt(self, tokens: int, config: PruningConfig) -> str:
        """Why all of a prompt's tokens reach the last layer."""
        if tokens < config.min_prompt_tokens:
            return f"the prompt of {tokens} tokens is shorter than min_prompt_tokens={config.min_prompt_tokens}"
        if counting.protected_count(tokens, config) == tokens:
            first = f"the first {config.sink_tokens} and " if config.sink_tokens else ""
            last = counting.local_count(tokens, config.local_ratio, config.min_local_tokens)
            return f"the prompt of {tokens} tokens is too short to prune: {first}the last {last} tokens always stay"
        each = config.keep_tokens
        if each is not None and counting.tokens_per_layer(config, len(self._trace.passes[-1]), tokens)[-1] == tokens:
            kept = f"keep_tokens={each}" if isinstance(each, int) else f"keep_tokens={min(each)} or more"
            return f"the prompt of {tokens} tokens is no longer than what is kept ({kept})"
        if config.keep_mass is not None:
            return (
                f"the scores of {self._trace.scorer} leave out none of the prompt's {tokens} tokens "
                f"(keep_mass={config.keep_mass:g}; protected tokens stay in any case)"
            )
        return (
            f"all {tokens} tokens of the prompt are protected (by protect=, as places of images and the like, or as "
            "its first and last ones)"
        )

    def _whole_cache(self, tokens: int) -> str:
        """Why a budget for the cache alone has cut nothing."""
        if not self._trace.kv_bytes_per_layer:
            return "only the KV cache is to be cut, and the forward has none (use_cache=False)"
        return f"the prompt of {tokens} tokens is no longer than what the KV cache of each layer keeps"

    def _on_short_of(self, lengths: list[int]) -> None:
        """A wanted speed-up that some row cannot have, because it is short."""
        wanted = self._budget
        if not isinstance(wanted, SpeedupBudget) or not wanted.as_far_as_possible:
            return
        for tokens in sorted(set(lengths)):
            own = wanted.for_prompt(tokens)
            reached = speedup_limit(wanted.shape, own, tokens, pruner_width=0)
            if own.keep_ratio != 1.0 and reached < wanted.speedup:
                self._say_once(
                    "slower",
                    f"a prompt of {tokens} tokens is too short for '{wanted.speedup:g}x': it is pruned to the "
                    f"tokens that always stay (the first {self._config.sink_tokens}, at least the last "
                    f"{self._config.min_local_tokens}), {reached:.2f}x fewer FLOPs.",
                )
                return

    def on_added(self, held: int, added: int) -> None:
        """Tokens were added to a cache that had been filled before the ``with``, and are computed in full."""
        config = self._config
        if config.prune == "first":
            reason = (
                f"the cache held {held} token(s) before the first forward inside the `with`, and what is added to a "
                "cache is computed in full: prefill the whole prompt inside the `with`, or give a PruningConfig with "
                "prune='every'"
            )
        elif config.min_prompt_tokens > 1:
            reason = (
                f"what was added to the cache ({added} tokens) is no longer than min_prompt_tokens="
                f"{config.min_prompt_tokens}"
            )
        else:
            reason = f"one token was added to a cache that held {held}, and a prompt's last token always stays"
        if not self._trace.prefills:
            self._trace.not_pruned = self._trace.not_pruned or reason
        if config.prune == "first" or config.min_prompt_tokens <= 1:
            self._say_once("prefix", f"nothing is pruned: {reason}.")

    def wants_less(self) -> bool:
        """Whether the budget asks for anything to be dropped."""
        config = self._config
        if config is not self._budget or config.keep_tokens is not None or config.keep_mass is not None:
            return True
        return any(config.ratio_at(layer) < 1 for layer in config.layers)

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, stacklevel=3)
