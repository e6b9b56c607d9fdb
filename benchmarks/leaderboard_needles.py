"""The needle map of the leaderboard: RULER's planted values by depth and length, unpruned and by some methods at 2x.

One item is shown in all panels or in none, so that they can be compared cell by cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas

from sdtp_lib import plots
from sdtp_lib.leaderboard import tables
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.leaderboard.plan import RULER
from sdtp_lib.leaderboard.words import GOAL_SPEEDUP
from sdtp_lib.methods.variant import UNPRUNED

PICTURE = "figures/needle-map.png"
SHOWN = (UNPRUNED, OURS, "specprefill", "attention_pooled", "streamingllm")


def needles(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Rows of the methods that are shown, on the needles that all of them answered; empty where there are none."""
    frame = tables.frame_of(rows) if rows else pandas.DataFrame()
    if "answer_depth" not in frame:
        return frame.iloc[:0]
    part = frame[(frame.sort == RULER) & frame.answer_depth.notna() & frame.score.notna()]
    part = part[part.speedup.isin((1.0, GOAL_SPEEDUP)) & part.method.isin(SHOWN)]
    asked = part.groupby(["length", "sample"]).method.transform("nunique")
    return part[asked == part.method.nunique()].assign(target_tokens=lambda found: found.length)


def draw_needles(rows: Sequence[Mapping[str, Any]], path: Path, made: Mapping[str, Any]) -> Path | None:
    """Save the map; None where no item was answered by all."""
    frame = needles(rows)
    if frame.empty:
        return None
    names = [name for name in SHOWN if name in set(frame.method)]
    titles = {name: name if name == UNPRUNED else f"{name}, {GOAL_SPEEDUP:g}x" for name in names}
    with plots.use_style():
        figure = plots.needle_maps({title: frame[frame.method == name] for name, title in titles.items()})
        items = len(frame) // len(names)
        saved = plots.save(figure, path, {**made, "items": items, "test": "RULER, tasks of planted values"})
        plt.close(figure)
    return saved
