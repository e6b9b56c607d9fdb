"""What the explorer shows as files that need nothing else: an HTML page, a PNG and an SVG picture, and a JSON that says
what made them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdtp_lib import records
from sdtp_lib.explorer.page import RATIOS, live_page, payload, prompt_entry
from sdtp_lib.explorer.state import ExplorerState
from sdtp_lib.extras import extra
from sdtp_lib.plots.style import save
from sdtp_lib.plots.text import text_and_map
from sdtp_lib.provenance import content_id

with extra("study"):
    from matplotlib.figure import Figure


def export_state(
    state: ExplorerState, folder: str | Path, name: str | None = None, *, against: str | None = None
) -> list[Path]:
    """Write the view of ``state`` as HTML, PNG, SVG and JSON into ``folder``; the files, in that order of kinds.

    The HTML is the live page (`page.live_page`) of this prompt: its slider moves without a kernel. What the engine was
    run at is exact in it. The default name ends in a short hash of all that the view depends on, model and prompt
    included, so that views do not overwrite each other; the same view, saved again, does.

    Parameters
    ----------
    against
        A second scorer to compare with in the page.
    """
    tokens, fates = state.scored.tokens, state.fates
    places = state.source.prompt(state.prompt).places
    ratio = state.config.keep_ratio
    name = name or _name_of(state, against)
    title = f"{state.prompt}: tokens dropped by layer, scorer {state.scorer}, keep ratio {ratio}"
    return export(
        Path(folder) / name,
        title=title,
        page=live_page(view_payload(state, title, against)),
        figure=text_and_map(tokens, fates, title, places=places),
        provenance=state.provenance(),
    )


def _name_of(state: ExplorerState, against: str | None) -> str:
    """Readable words first, cut where they are long, then 8 digits that tell views apart where words do not."""
    source, kind = state.source, "approximate" if state.fates.approximate else "engine"
    words = (state.prompt, state.scorer, state.config.keep_ratio, kind)
    content = content_id(source.name, source.prompt(state.prompt).ids, words, state.config, state.protect, against)
    return re.sub(r"[^\w.-]+", "-", "_".join(map(str, words)))[:120] + f"_{content[:8]}"


def view_payload(state: ExplorerState, title: str, against: str | None = None) -> dict[str, Any]:
    """The data of the live page that holds this prompt alone, opened at the state's own choices."""
    source, config, own = state.source, state.config, state.config.keep_ratio
    ratios = [*RATIOS] if own in RATIOS else sorted([*RATIOS, own], key=np.mean)
    names = dict.fromkeys(filter(None, [state.scorer, against]))
    scored = {scorer: source.scored(state.prompt, scorer) for scorer in names}
    outcomes = {state.scorer: {own: state.outcome}} if state.outcome else {}
    sizes = {"num_layers": source.num_layers, "ratios": ratios}
    prompt = source.prompt(state.prompt)
    entry = prompt_entry(
        state.prompt, prompt, scored, outcomes, config, shape=source.shape, protect=state.protect, **sizes
    )
    start = {"scorer": state.scorer, "ratio": ratios.index(own), "against": against or ""}
    return payload(title, [entry], config, model=source.name, start=start, made=state.provenance(), **sizes)


def export(
    path: str | Path,
    *,
    title: str,
    page: str = "",
    figure: Figure | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a view beside ``path``: ``.html`` of the page, ``.png`` and ``.svg`` of the figure, and ``.json``.

    Returns
    -------
    list of Path
        What was written; each file appears whole or not at all.
    """
    # The name may hold a dot ("..._0.9_engine"), and what follows it is no file type to be replaced.
    beside = {kind: Path(path).with_name(f"{Path(path).name}.{kind}") for kind in ("html", "png", "svg", "json")}
    beside["html"].parent.mkdir(parents=True, exist_ok=True)
    provenance = dict(provenance or {})
    written = []
    if figure is not None:
        save(figure, beside["png"], provenance, svg=True)
        written += [beside["png"], beside["svg"]]
    if page:
        with records.atomic_write(beside["html"]) as temporary:
            Path(temporary).write_text(page, encoding="utf-8")
        written.append(beside["html"])
    records.write_json(beside["json"], {"title": title, "files": [p.name for p in written], **provenance})
    return [*written, beside["json"]]
