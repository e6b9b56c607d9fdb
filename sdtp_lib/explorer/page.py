"""The live page: the explorer as one HTML file that needs no kernel and loads nothing.

`prompt_entry` and `payload` pack scores and exact runs as JSON; `live_page` puts them between ``page.css`` and
``page.js``. In the browser the slider cuts again: at the ratios that the engine was run at (the marks) the sets are the
engine's own, between them they are cut from the scores of one unpruned run and called approximate. The script writes
token text as text only, so no prompt becomes markup. Axis letters: T prompt tokens, S stages. No torch here.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer.state import Outcome, Prompt, Scored
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.token_fates import simulate, stage_colours
from sdtp_lib.views.looks import ink

# What the page's slider can be moved to.
RATIOS = tuple(hundredths / 100 for hundredths in range(30, 101))
Ratio = float | tuple[float, ...]


def prompt_entry(
    name: str,
    prompt: Prompt,
    scored: Mapping[str, Scored],
    outcomes: Mapping[str, Mapping[Ratio, Outcome]],
    config: PruningConfig,
    *,
    ratios: Sequence[Ratio] = RATIOS,
    num_layers: int,
    shape: ModelShape | None = None,
    protect: Sequence[int] = (),
) -> dict[str, Any]:
    """One prompt of the page as JSON types.

    Parameters
    ----------
    scored
        Scorer -> tokens and scores of an unpruned run, at least at the layers of ``config``.
    outcomes
        Scorer -> keep ratio -> what the engine did there with the layers of ``config``; may be empty.
    config
        Stages and protected tokens; its ratio is not used.
    ratios
        The slider's positions; those of ``outcomes`` are among them.
    protect
        Positions that are never dropped.
    """
    tokens = list(next(iter(scored.values())).tokens)
    entry: dict[str, Any] = {"name": name, "tokens": tokens, "question": prompt.question, "right": prompt.right_answer}
    entry["places"] = {place: list(span) for place, span in prompt.places.items()}
    never = np.zeros(len(tokens), bool)
    never[list(protect)] = True
    entry["protect"] = list(protect)
    first = next(iter(scored.values())).scores  # how many stay follows from the ratio, not from the scores
    cuts = (simulate(first, config.replace(keep_ratio=ratio), num_layers, protect=never) for ratio in ratios)
    entry["shares"] = [_shares(cut.tokens_per_layer(), len(tokens), shape) for cut in cuts]
    entry["full_answer"] = next((o.full_answer for runs in outcomes.values() for o in runs.values()), None)
    kind = "<u2" if len(tokens) < 65536 else "<u4"
    entry["scorers"] = {
        scorer: {
            "ranks": [_packed(_ranks(one.scores[layer]), kind) for layer in config.layers],
            "exact": {
                str(ratios.index(ratio)): {"stages": _packed(run.fates.stage_of_token(), "u1"), "answer": run.answer}
                for ratio, run in outcomes.get(scorer, {}).items()
            },
        }
        for scorer, one in scored.items()
    }
    return entry


def payload(
    title: str,
    prompts: Sequence[Mapping[str, Any]],
    config: PruningConfig,
    *,
    num_layers: int,
    model: str,
    ratios: Sequence[Ratio] = RATIOS,
    start: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the page's script reads.

    Parameters
    ----------
    model
        Name and precision as the page prints them.
    start
        ``scorer`` and ``ratio`` (index into ``ratios``) that the page opens at.
    made
        Provenance, shown as a table.
    """
    colours = stage_colours(len(config.layers))
    return {
        "title": title,
        "model": model,
        "num_layers": num_layers,
        "layers": list(config.layers),
        "colours": [{"rgb": list(rgb), "ink": ink(rgb)} for rgb in colours],
        "ratios": list(ratios),
        "sink_tokens": config.sink_tokens,
        "local_ratio": config.local_ratio,
        "min_local_tokens": config.min_local_tokens,
        "prompts": list(prompts),
        "start": dict(start or {}),
        "made": {str(name): str(value) for name, value in (made or {}).items()},
    }


def live_page(data: Mapping[str, Any]) -> str:
    """The whole page around `payload`'s ``data``, as one string of HTML."""
    folder = files("sdtp_lib.explorer")
    # "<" never stands in the data as itself, so nothing in a prompt can end the script element.
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(str(data["title"])),
        "style": (folder / "page.css").read_text("utf-8"),
        "script": (folder / "page.js").read_text("utf-8"),
        "data": packed,
    }
    page = (folder / "page.html").read_text("utf-8")
    return re.sub("@(title|style|script|data)@", lambda mark: parts[mark[1]], page)


def _ranks(scores: Any) -> np.ndarray:
    """(T,) rank of each token, 0 for the highest score; of equal scores the later token leads, as in the engine."""
    scores = np.nan_to_num(np.asarray(scores, float), nan=-np.inf)
    order = np.lexsort((-np.arange(len(scores)), -scores))
    ranks = np.empty(len(scores), int)
    ranks[order] = np.arange(len(scores))
    return ranks


def _shares(per_layer: Sequence[int], tokens: int, shape: ModelShape | None) -> list[float | None]:
    """Shares of the unpruned prefill FLOPs (None where unknown) and of the KV cache."""
    flops = None
    if shape is not None:
        full = budget.prefill_flops(shape, [tokens] * len(per_layer))
        flops = round(budget.prefill_flops(shape, per_layer) / full, 4)
    return [flops, round(sum(per_layer) / (tokens * len(per_layer)), 4)]


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode("ascii")
