"""A `Source` without a model: made-up scores, and a count of how often the "model" was asked."""

from __future__ import annotations

import dataclasses

import numpy as np

from sdtp_lib.explorer.state import Outcome, Prompt, Scored
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.token_fates import simulate

LAYERS = 12
NASTY = "<script>alert(1)</script>"


class MadeUpSource:
    """Scores out of a generator; the prompt "empty" has no token, "nasty" is markup."""

    num_layers = LAYERS
    scorers = ("learned", "recency")
    shape = ModelShape(LAYERS, 64, 4, 2, 16, 128, 256)
    notes: tuple[str, ...] = ()

    def __init__(self, tokens: int = 120, name: str = "made-up") -> None:
        self.tokens, self.name = tokens, name
        self.scored_calls = self.run_calls = 0
        self.prompts = ["short", "nasty", "empty"]
        self._cache: dict = {}

    def prompt(self, name):
        return Prompt(tuple(range(self.tokens)), "what is w7?", "seven", {"answer": (7, 8)})

    def add_prompt(self, name, document, question="", *, chat=True):
        if not (document + question).strip():
            raise ValueError("The prompt is empty: type a document, a question, or both.")
        self.prompts = list(dict.fromkeys([*self.prompts, name]))

    def with_model(self, name):
        if name == "none":
            raise OSError("Cannot load 'none'.")
        other = MadeUpSource(self.tokens, name)
        other.scorers = ("recency",)
        other.notes = ("The trained pruners were left out: hidden_size=64 <does> not fit.",)
        return other

    def scored(self, prompt, scorer):
        if prompt == "empty":
            raise RuntimeError("cannot reshape tensor of 0 elements")
        if (prompt, scorer) not in self._cache:
            self.scored_calls += 1
            rng = np.random.default_rng(len(prompt) + 7 * len(scorer))
            base = np.arange(self.tokens) if scorer == "recency" else rng.normal(size=self.tokens)
            layers = range(1, LAYERS) if scorer == "recency" else range(4, LAYERS, 3)
            texts = [f" w{i}" for i in range(self.tokens)]
            if prompt == "nasty":
                texts[0] = NASTY
            scores = {layer: base + 0.1 * rng.normal(size=self.tokens) for layer in layers}
            self._cache[prompt, scorer] = Scored(texts, scores)
        return self._cache[prompt, scorer]

    def run(self, prompt, scorer, config, protect=()):
        self.run_calls += 1
        rough = simulate(
            self.scored(prompt, scorer).scores, config, LAYERS, protect=np.isin(np.arange(self.tokens), protect)
        )
        fates = dataclasses.replace(rough, approximate=False)
        return Outcome(fates, "the <b>pruned</b> answer", "the full answer", 1.0, 2.0, 1.5, 3.0, 600, 1000)
