"""What a ``with token_pruning`` says where it prunes nothing: once, with the reason, which its trace has too."""

from __future__ import annotations

import warnings

from sdtp_lib.budget import SpeedupBudget, speedup_limit
from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.plan import Budget
from sdtp_lib.pruning.trace import PruningTrace


class Remarks:
    """The remarks of one ``with``."""

    def __init__(self, config: PruningConfig, budget: Budget, trace: PruningTrace) -> None:
        self._config, self._budget, self._trace = config, budget, trace
        self._said: set[str] = set()
        self._held_before = ""

    def on_plan(self, plan: list[list[int]]) -> None:
        """Whether anything goes from a prompt, by the tokens of each row in each layer."""
        config, tokens = self._config, max(plan[0])
        self._on_short_of(plan[0])
        if plan[-1] != plan[0] or not self.wants_less():
            return
        if tokens < config.min_prompt_tokens:
            self._trace.not_pruned = (
                f"the prompt of {tokens} tokens is shorter than min_prompt_tokens={config.min_prompt_tokens}"
            )
        elif config.keep_tokens is not None:
            kept = f"keep_tokens={config.keep_tokens}"
            self._say_once("short", f"the prompt of {tokens} tokens is no longer than what is kept ({kept}).")
        else:
            self._say_once(
                "short",
                f"the prompt of {tokens} tokens is too short to prune: the first {config.sink_tokens} and at least the "
                f"last {config.min_local_tokens} tokens always stay.",
            )

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

    def on_held_before(self, tokens: int) -> None:
        """A cache that was filled before the ``with``."""
        self._held_before = self._held_before or (
            f"the cache held {tokens} token(s) before the first forward inside the `with`, and what is added to a "
            "cache is computed in full: prefill the whole prompt inside the `with`, or give a PruningConfig with "
            "prune='every'"
        )
        self._say_once("prefix", f"nothing is pruned: {self._held_before}.")

    def on_exit(self) -> None:
        """A ``with`` that saw tokens and no prefill says why."""
        if self._held_before and not self._trace.prefills:
            self._trace.not_pruned = self._held_before
            self._say_once("prefix", f"nothing was pruned: {self._held_before}.")

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
