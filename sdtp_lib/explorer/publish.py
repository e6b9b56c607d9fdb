"""The live page of the study: ``python -m sdtp_lib.explorer.publish`` writes docs/explorer.html.

Every scorer is run for real at each ratio of a grid, on the three example prompts; prefills and answers, minutes on two
cores. What they gave is kept as JSON with the options that made it, so that a page with another look needs no model
(``--again`` runs it anew); other options than those are refused, since the page would not be theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.checked import told
from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer import page
from sdtp_lib.explorer.engine_source import PRUNERS, EngineSource, fitting_scorers
from sdtp_lib.explorer.prompts import example_prompts
from sdtp_lib.explorer.state import Prompt
from sdtp_lib.files import atomic_write, shown_path
from sdtp_lib.models import load_model
from sdtp_lib.provenance import project_root, provenance_of, weights_note
from sdtp_lib.shipped import pruners_folder

CHOSEN = "synthetic, on real text; of each kind the first of a few that the unpruned model answers right"
# What decides the recorded runs, and its defaults.
OPTIONS: dict[str, Any] = {"model": "embedded", "pruners": PRUNERS, "prompt_tokens": 600}
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
    """Write the page; the last line says its size. 2 with a sentence for options that kept runs were not made by."""
    parser = argparse.ArgumentParser(prog="python -m sdtp_lib.explorer.publish", description=__doc__)
    parser.add_argument("--model", help=f"'embedded', a local folder or a Hub id{_default('model')}")
    parser.add_argument(
        "--pruners", help=f"pruners that ship, or a folder from the project's root{_default('pruners')}"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, help=f"length of the three example prompts{_default('prompt_tokens')}"
    )
    parser.add_argument("--out", default="docs/explorer.html", help="the page, from the project's root")
    parser.add_argument("--recorded", default="data/results/explorer/recorded.json", help="where runs are kept")
    parser.add_argument("--again", action="store_true", help="run the model even where recorded runs are")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    return told(lambda: _publish(options, given))


def _publish(options: argparse.Namespace, given: dict[str, Any]) -> None:
    recorded, target = (project_root() / path for path in (options.recorded, options.out))
    if options.again or not recorded.is_file():
        _write(recorded, json.dumps(_run(**{**OPTIONS, **given}), ensure_ascii=False))
    data = json.loads(recorded.read_text("utf-8"))
    _refuse_others(recorded, data, given)
    # The page needs no options of the command: what it was made by stands in its own table.
    text = page.live_page({name: value for name, value in data.items() if name != "options"})
    _write(target, text)
    print(f"{shown_path(target)}: {len(text.encode()) / 1e6:.2f} MB")


def _run(model: str, pruners: str, prompt_tokens: int) -> dict[str, Any]:
    """`record` with the model of this name, and the options that made it."""
    if pruners_folder(pruners, project_root()) is None:
        raise ValueError(f"--pruners {pruners}: neither a folder of pruners nor the name of any that ship.")
    loaded, tokenizer = load_model(model)
    found, notes = fitting_scorers(loaded, pruners)
    print("\n".join(notes))
    prompts = answered_examples(loaded, tokenizer, prompt_tokens)
    source = EngineSource(loaded, tokenizer, prompts, found, max_new_tokens=24)
    made = provenance_of(loaded, model_name=model, weights=weights_note(loaded))
    data = record(source, made={**made, "prompts": CHOSEN})
    return {**data, "options": {"model": model, "pruners": pruners, "prompt_tokens": prompt_tokens}}


def _refuse_others(recorded: Path, data: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError if kept runs were made by other options than those that were ``given``."""
    # Runs that were kept before their options were: their model stands in their provenance, the rest is the default.
    made_by = {**OPTIONS, "model": data.get("made", {}).get("model", OPTIONS["model"]), **data.get("options", {})}
    others = [name for name, value in given.items() if value != made_by[name]]
    if others:
        was, asked = (
            " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in others) for options in (made_by, given)
        )
        raise ValueError(
            f"{shown_path(recorded)} was recorded with {was}, not {asked}: give --again to run the model anew, or "
            "leave the option out."
        )


def _default(name: str) -> str:
    return f" (default: {OPTIONS[name]})"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
