"""The explorer on the real engine, and its page without code cells (`make app`: Voila on loopback, with a token).

`EngineSource` is the `Source` that runs a model: scores out of one prefill at keep ratio 1.0, kept for every later
slider move, and real pruned and unpruned answers on request. Seconds are of one run each, not a benchmark.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from sdtp_lib import budget, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.data.tasks import as_sample, synthetic_tasks
from sdtp_lib.explorer.state import Outcome, Scored
from sdtp_lib.model_shape import ModelShape, element_bytes
from sdtp_lib.models import load_model
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.token_fates import TokenFates
from sdtp_lib.records import project_root
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
        Name -> token ids of a whole prompt, chat format included.
    scorers
        Name -> scorer. One that has ``layers`` (trained pruners) is only asked there, others at every layer.
    max_new_tokens
        Length of the answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Mapping[str, Sequence[int]],
        scorers: Mapping[str, Any],
        *,
        max_new_tokens: int = 32,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompts, self.scorers = tuple(prompts), tuple(scorers)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        try:
            self.shape = ModelShape.from_model(model)
        except ValueError:  # a mixture of experts: its FLOPs a token do not follow from its sizes
            self.shape = None
        self._ids = {name: list(ids) for name, ids in prompts.items()}
        self._scorers = dict(scorers)
        self._max_new_tokens = max_new_tokens
        self._scored: dict[tuple[str, str], Scored] = {}
        self._unpruned: dict[str, tuple[str, float, float]] = {}
        # Widgets of several pages of one kernel share the model; its engine takes one `with` and one thread at a time.
        self._lock = threading.Lock()

    def scored(self, prompt: str, scorer: str) -> Scored:
        """The scores of one unpruned prefill; the first call takes a prefill, later ones nothing."""
        if (prompt, scorer) not in self._scored:
            rule = self._scorers[scorer]
            layers = getattr(rule, "layers", None) or range(1, self.num_layers)
            config = PruningConfig(layers=tuple(sorted(layers)), keep_ratio=1.0)
            with self._lock, torch.inference_mode(), token_pruning(self.model, config, rule) as trace:
                self.model(self._input(prompt), use_cache=True, logits_to_keep=1)
            fates = TokenFates.from_trace(trace)
            tokens = display_tokens(self.tokenizer, self._ids[prompt])
            self._scored[prompt, scorer] = Scored(tokens, dict(zip(fates.layers, fates.scores, strict=True)))
        return self._scored[prompt, scorer]

    def run(self, prompt: str, scorer: str, config: PruningConfig) -> Outcome:
        """Answer with pruning, beside the unpruned answer (which is computed once a prompt)."""
        with self._lock:
            if prompt not in self._unpruned:
                self._unpruned[prompt] = self._answer(prompt)
            full_answer, full_prefill_s, full_total_s = self._unpruned[prompt]
            with token_pruning(self.model, config, self._scorers[scorer]) as trace:
                answer, prefill_s, total_s = self._answer(prompt)
        return Outcome(
            TokenFates.from_trace(trace),
            answer,
            full_answer,
            prefill_s,
            full_prefill_s,
            total_s,
            full_total_s,
            sum(trace.kv_bytes_per_layer),
            self._full_kv_bytes(len(self._ids[prompt])),
        )

    def _input(self, prompt: str) -> torch.Tensor:
        return torch.tensor([self._ids[prompt]], device=self.model.device)

    def _answer(self, prompt: str) -> tuple[str, float, float]:
        """Greedy answer, seconds to its first token, seconds in all."""
        ids, clock = self._input(prompt), _FirstToken()
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


class _FirstToken(BaseStreamer):
    """Notes when the first new token came; `generate` hands over the prompt first. Its copy to the CPU synchronises."""

    def __init__(self) -> None:
        self._puts = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def default_scorers(pruners: str | Path | None = PRUNERS) -> dict[str, Any]:
    """Trained pruners where there are any, then the simple scorers, by name."""
    found: dict[str, Any] = {}
    folder = pruners_folder(pruners, project_root())
    if folder is not None:
        found["learned"] = TokenPruners.from_pretrained(folder)
    return found | {
        "attention": scorers.attention(),
        "recency": scorers.recency(),
        "hidden_norm": scorers.hidden_norm(),
        "random": scorers.random(),
    }


def default_source(
    model_name: str = "embedded", *, pruners: str | Path | None = PRUNERS, prompt_tokens: int = 1024, seed: int = 0
) -> EngineSource:
    """A model with one held-out synthetic prompt a task and every scorer at hand."""
    model, tokenizer = load_model(model_name)
    prompts = {}
    for task in ("needle", "multi_doc_qa", "variable_tracking"):
        sizes = {"prompt_tokens": prompt_tokens, "count": 1, "seed": seed, "split": "test"}
        (record,) = synthetic_tasks(task, tokenizer=tokenizer, **sizes)
        prompts[f"{task}, {prompt_tokens:,} tokens"] = as_sample(record, tokenizer)["prompt_ids"]
    return EngineSource(model, tokenizer, prompts, default_scorers(pruners))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve app/explore.ipynb with Voila; the address it prints holds the token."""
    parser = argparse.ArgumentParser(prog="python -m sdtp_lib.explorer.app", description=__doc__)
    parser.add_argument("--model", default="embedded", help="'embedded', a local folder or a Hub id")
    parser.add_argument("--pruners", default=PRUNERS, help="pruners that ship, or a folder from the project's root")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="length of the example prompts")
    parser.add_argument("--port", type=int, default=8866)
    parser.add_argument("--token", default=None, help="token in the address (default: a new one at each start)")
    parser.add_argument("--browser", action="store_true", help="open a browser as well")
    options = parser.parse_args(arguments)
    from voila.app import Voila

    for name in ("model", "pruners", "prompt_tokens"):
        os.environ[f"SDTP_APP_{name.upper()}"] = str(getattr(options, name))
    flags = [
        str(project_root() / "app" / "explore.ipynb"),
        f"--port={options.port}",
        "--Voila.ip=127.0.0.1",
        f"--Voila.token={options.token}" if options.token else "--Voila.auto_token=True",
        "--VoilaConfiguration.show_tracebacks=False",
        *([] if options.browser else ["--no-browser"]),
    ]
    Voila.launch_instance(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
