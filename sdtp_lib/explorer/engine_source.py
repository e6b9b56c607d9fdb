"""`EngineSource`: the explorer's `Source` that runs a model.

Scores come out of one prefill at keep ratio 1.0 and are kept for every later slider move; real pruned and unpruned
answers are made on request. Seconds are of one run each, not a benchmark.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer.prompts import check_length, example_prompts, typed_prompt
from sdtp_lib.explorer.state import Outcome, Prompt, Scored
from sdtp_lib.model_shape import ModelShape, element_bytes
from sdtp_lib.models import load_model
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.token_fates import TokenFates
from sdtp_lib.records import project_root
from sdtp_lib.scorers.simple import NAMED
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.shipped import pruners_folder
from sdtp_lib.views.tokens import display_tokens

PRUNERS = "smollm2-135m-instruct"


class EngineSource:
    """Prompts and scorers around one model; see `state.Source`.

    Parameters
    ----------
    model, tokenizer
        As `load_model` returns them.
    prompts
        Name -> `Prompt`, or the token ids of a whole prompt, chat format included.
    scorers
        Name -> scorer. One that has ``layers`` (trained pruners) is only asked there, others at every layer.
    max_new_tokens
        Length of the answers.
    notes
        Sentences for the reader, such as why a scorer was left out.
    pruners
        Folder of trained pruners that `with_model` tries on another model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Mapping[str, Prompt | Sequence[int]],
        scorers: Mapping[str, Any],
        *,
        max_new_tokens: int = 32,
        notes: Sequence[str] = (),
        pruners: str | Path | None = PRUNERS,
    ) -> None:
        self.model, self.tokenizer, self.notes = model, tokenizer, tuple(notes)
        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        try:
            self.shape = ModelShape.from_model(model)
        except ValueError:  # a family whose FLOPs cannot be counted from its layers
            self.shape = None
        self._prompts = {n: p if isinstance(p, Prompt) else Prompt(tuple(p)) for n, p in prompts.items()}
        self._scorers = dict(scorers)
        self._max_new_tokens, self._pruners = max_new_tokens, pruners
        # Called with words, steps done and steps in all while the model runs.
        self.on_progress: Callable[[str, int, int], None] = lambda words, done, total: None
        self._scored: dict[tuple[str, str], Scored] = {}
        self._unpruned: dict[str, tuple[str, float, float]] = {}
        # Widgets of several pages of one kernel share the model; its engine takes one `with` and one thread at a time.
        self._lock = threading.Lock()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of the prompts."""
        return tuple(self._prompts)

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers."""
        return tuple(self._scorers)

    def prompt(self, name: str) -> Prompt:
        """The prompt of this name."""
        return self._prompts[name]

    def add_prompt(self, name: str, document: str, question: str = "", *, chat: bool = True) -> None:
        """A typed prompt under ``name``, in place of what had that name; ValueError where nothing can be pruned."""
        self._prompts[name] = typed_prompt(self.tokenizer, document, question, chat=chat)
        self._scored = {key: value for key, value in self._scored.items() if key[0] != name}
        self._unpruned.pop(name, None)

    def with_model(self, name: str) -> EngineSource:
        """A source on another model, with the example prompts; pruners that do not fit it are left out with a note.

        Raises
        ------
        OSError, ValueError
            As `load_model`.
        """
        longest = max((len(prompt.ids) for prompt in self._prompts.values()), default=1024)
        return open_source(name, pruners=self._pruners, prompt_tokens=max(300, longest), most=self._max_new_tokens)

    def scored(self, prompt: str, scorer: str) -> Scored:
        """The scores of one unpruned prefill; the first call takes a prefill, later ones nothing."""
        if (prompt, scorer) not in self._scored:
            ids = self._prompts[prompt].ids
            check_length(ids)
            rule = self._scorers[scorer]
            layers = getattr(rule, "layers", None) or range(1, self.num_layers)
            config = PruningConfig(layers=tuple(sorted(layers)), keep_ratio=1.0)
            rule = _Counted(rule, lambda layer: self.on_progress(f"scoring: {scorer}", layer, self.num_layers))
            with self._lock, torch.inference_mode(), token_pruning(self.model, config, rule) as trace:
                self.model(self._input(prompt), use_cache=True, logits_to_keep=1)
            fates = TokenFates.from_trace(trace)
            tokens = display_tokens(self.tokenizer, ids)
            self._scored[prompt, scorer] = Scored(tokens, dict(zip(fates.layers, fates.scores, strict=True)))
        return self._scored[prompt, scorer]

    def run(self, prompt: str, scorer: str, config: PruningConfig, protect: Sequence[int] = ()) -> Outcome:
        """Answer with pruning, beside the unpruned answer (which is computed once per prompt)."""
        never = None
        if protect:
            never = torch.zeros(1, len(self._prompts[prompt].ids), dtype=torch.bool, device=self.model.device)
            never[0, list(protect)] = True
        self.full_answer(prompt)
        full_answer, full_prefill_s, full_total_s = self._unpruned[prompt]
        with self._lock, token_pruning(self.model, config, self._scorers[scorer], protect=never) as trace:
            answer, prefill_s, total_s = self._answer(prompt, "answering, pruned")
        return Outcome(
            TokenFates.from_trace(trace),
            answer,
            full_answer,
            prefill_s,
            full_prefill_s,
            total_s,
            full_total_s,
            sum(trace.kv_bytes_per_layer),
            self._full_kv_bytes(len(self._prompts[prompt].ids)),
        )

    def full_answer(self, prompt: str) -> str:
        """What the model answers when nothing is dropped; computed once per prompt."""
        with self._lock:
            if prompt not in self._unpruned:
                self._unpruned[prompt] = self._answer(prompt, "answering, nothing dropped")
        return self._unpruned[prompt][0]

    def _input(self, prompt: str) -> torch.Tensor:
        return torch.tensor([self._prompts[prompt].ids], device=self.model.device)

    def _answer(self, prompt: str, words: str) -> tuple[str, float, float]:
        """Greedy answer, seconds to its first token, seconds in all."""
        ids = self._input(prompt)
        clock = _FirstToken(lambda done: self.on_progress(words, done, self._max_new_tokens))
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                streamer=clock,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        total_s = time.perf_counter() - started
        text = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text, clock.at - started, total_s

    def _full_kv_bytes(self, tokens: int) -> int:
        if self.shape is None:
            return 0
        return budget.kv_bytes(self.shape, [tokens] * self.num_layers, element_bytes(self.model.dtype))


class _Counted:
    """A scorer that says at which layer it is asked; all else is the scorer's own."""

    def __init__(self, scorer: Any, tell: Callable[[int], None]) -> None:
        self._scorer, self._tell = scorer, tell

    def __call__(self, stage: Any) -> torch.Tensor:
        self._tell(stage.layer_index)
        return self._scorer(stage)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)


class _FirstToken(BaseStreamer):
    """Notes when the first new token came; `generate` hands over the prompt first. Its copy to the CPU synchronises."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._puts, self._tell = 0, tell
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._tell(self._puts)
        self._puts += 1
        if self._puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def open_source(
    name: str, *, pruners: str | Path | None = PRUNERS, prompt_tokens: int = 1024, seed: int = 0, most: int = 32
) -> EngineSource:
    """A model by name (`load_model`), the example prompts, every scorer that fits; answers of ``most`` tokens."""
    model, tokenizer = load_model(name)
    found, notes = fitting_scorers(model, pruners)
    prompts = example_prompts(tokenizer, prompt_tokens, seed=seed)
    return EngineSource(model, tokenizer, prompts, found, max_new_tokens=most, notes=notes, pruners=pruners)


def default_scorers(pruners: str | Path | None = PRUNERS) -> dict[str, Any]:
    """Trained pruners where there are any, then the simple scorers, by name."""
    found: dict[str, Any] = {}
    folder = pruners_folder(pruners, project_root())
    if folder is not None:
        found["learned"] = TokenPruners.from_pretrained(folder)
    return found | {name: NAMED[name]() for name in ("attention", "recency", "hidden_norm", "random")}


def fitting_scorers(model: Any, pruners: str | Path | None = PRUNERS) -> tuple[dict[str, Any], list[str]]:
    """`default_scorers` without pruners that do not fit ``model``, and a sentence for each that was left out.

    A sentence too for pruners that are named and are not there.
    """
    found, notes = default_scorers(pruners), []
    learned = found.get("learned")
    if learned is None and pruners:
        notes.append(f"There are no trained pruners {pruners}: no folder of pruners and no name of any that ship.")
    if learned is not None:
        try:
            learned.check(model, PruningConfig(layers=learned.layers, keep_ratio=1.0))
        except ValueError as error:
            del found["learned"]
            notes.append(f"The trained pruners in {pruners} were left out: {error}")
    return found, notes
