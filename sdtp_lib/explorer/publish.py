"""The live page of the study: ``python -m sdtp_lib.explorer.publish`` writes docs/explorer.html.

Every scorer is run for real at each ratio of a grid, on the three example prompts; prefills and answers, minutes on two
cores. What they gave is kept as JSON, so that a page with another look needs no model (``--again`` runs it anew).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer import page
from sdtp_lib.explorer.engine_source import PRUNERS, EngineSource, fitting_scorers
from sdtp_lib.explorer.prompts import example_prompts
from sdtp_lib.explorer.state import Prompt
from sdtp_lib.models import load_model
from sdtp_lib.provenance import project_root, provenance_of, weights_note
from sdtp_lib.records import atomic_write

CHOSEN = "synthetic, on real text; of each kind the first of a few that the unpruned model answers right"
GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def answered_examples(model: Any, tokenizer: Any, prompt_tokens: int, seeds: int = 8) -> dict[str, Prompt]:
    """The example prompts; of each the first of ``seeds`` that the unpruned model answers right, else the first."""
    first, chosen = example_prompts(tokenizer, prompt_tokens), {}
    for seed in range(seeds):
        prompts = example_prompts(tokenizer, prompt_tokens, seed=seed)
        source = EngineSource(model, tokenizer, {n: p for n, p in prompts.items() if n not in chosen}, {})
        chosen |= {n: prompts[n] for n in source.prompts if prompts[n].right_answer in source.full_answer(n)}
        if len(chosen) == len(first):
            break
    return {name: chosen.get(name, prompt) for name, prompt in first.items()}


def record(source: EngineSource, *, grid: Sequence[float] = GRID, made: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run every prompt of ``source`` with every scorer at every ratio of ``grid``; the page's data."""
    config = PruningConfig.preset("keep09", source.num_layers)
    prompts = []
    for name in source.prompts:
        scored = {scorer: source.scored(name, scorer) for scorer in source.scorers}
        outcomes = {}
        for scorer in source.scorers:
            outcomes[scorer] = {r: source.run(name, scorer, config.replace(keep_ratio=r)) for r in grid}
            print(f"{name}: {scorer} at {len(grid)} ratios", flush=True)
        prompts.append(
            page.prompt_entry(
                name,
                source.prompt(name),
                scored,
                outcomes,
                config,
                num_layers=source.num_layers,
                shape=source.shape,
            )
        )
    note = weights_note(source.model)
    return page.payload(
        "Which prompt tokens does the model still read?",
        prompts,
        config,
        num_layers=source.num_layers,
        model=source.name if note in source.name or note == "as published" else f"{source.name} ({note})",
        start={"scorer": source.scorers[0], "ratio": page.RATIOS.index(0.8)},
        made=made,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; the last line says its size."""
    parser = argparse.ArgumentParser(prog="python -m sdtp_lib.explorer.publish", description=__doc__)
    parser.add_argument("--model", default="embedded", help="'embedded', a local folder or a Hub id")
    parser.add_argument("--pruners", default=PRUNERS, help="pruners that ship, or a folder from the project's root")
    parser.add_argument("--prompt-tokens", type=int, default=600, help="length of the three example prompts")
    parser.add_argument("--out", default="docs/explorer.html", help="the page, from the project's root")
    parser.add_argument("--recorded", default="data/results/explorer/recorded.json", help="where runs are kept")
    parser.add_argument("--again", action="store_true", help="run the model even where recorded runs are")
    options = parser.parse_args(arguments)
    recorded, target = (project_root() / path for path in (options.recorded, options.out))
    if options.again or not recorded.is_file():
        model, tokenizer = load_model(options.model)
        found, notes = fitting_scorers(model, options.pruners)
        print("\n".join(notes))
        prompts = answered_examples(model, tokenizer, options.prompt_tokens)
        source = EngineSource(model, tokenizer, prompts, found, max_new_tokens=24)
        made = provenance_of(model, model_name=options.model, weights=weights_note(model))
        data = record(source, made={**made, "prompts": CHOSEN})
        _write(recorded, json.dumps(data, ensure_ascii=False))
    text = page.live_page(json.loads(recorded.read_text("utf-8")))
    _write(target, text)
    print(f"{target.relative_to(project_root())}: {len(text.encode()) / 1e6:.2f} MB")
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
