"""`schedules.py search`: which layers drop how much at one FLOPs budget, chosen and measured on different prompts.

Candidates differ in the first and the last layer, the distance between stages, and in which stages drop most. What is
chosen on training-side samples is measured on held-out ones beside the even schedule. Knows rows by column names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas as pd

from sdtp_lib import PruningConfig, budget, evaluation, plots
from sdtp_lib.evaluation import tables as evaluation_tables
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.training.recipes import NEGLIGIBLE_NATS

# How unevenly stages drop: the share that a stage drops, relative to the first, falls or rises linearly to this.
PROFILES = {"even": 1.0, "mild": 0.6, "medium": 0.4, "early": 0.25, "late": 4.0}
# A grid that is not told otherwise; mild and medium stand between even and early.
COARSE = ("even", "early", "late")


def at_budget(
    shape: ModelShape, layers: Sequence[int], tokens: int, speedup: float, last_share: float = 1.0
) -> PruningConfig | None:
    """The schedule at ``layers`` that reaches ``speedup``; None if they cannot.

    ``last_share``: what the last stage drops, relative to the first; linear between.
    """
    steps = max(1, len(layers) - 1)
    weights = [1 + (last_share - 1) * number / steps for number in range(len(layers))]

    def config(drop: float) -> PruningConfig:
        return PruningConfig(tuple(layers), tuple(max(1e-6, 1 - drop * w / max(weights)) for w in weights))

    if budget.speedup_limit(shape, config(1 - 1e-6), tokens) < speedup:
        return None
    low, high = 0.0, 1 - 1e-6
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if budget.speedup_limit(shape, config(middle), tokens) >= speedup else (middle, high)
    return config(high)


def schedules(
    layers: Sequence[int], starts: int, steps: Sequence[int], profiles: Sequence[str], ends: Sequence[int] = ()
) -> dict[str, tuple[list[int], str]]:
    """``"from 4 every 6 to 16, early"`` -> its stages and profile; without "to" up to the last of ``layers``.

    First the even one at all layers: the others' measure. ``ends``: no stage is beyond one of these layers.
    """
    grid = itertools.product(range(min(starts, len(layers))), steps, ends or (layers[-1],), profiles)
    found = {}
    for start, step, end, profile in dict.fromkeys([(0, 1, layers[-1], "even"), *grid]):
        whole = list(layers[start::step])
        stages = [layer for layer in whole if layer <= end]
        if len(stages) > 1:
            to = "" if stages == whole else f" to {stages[-1]}"
            found[f"from {stages[0]} every {stages[1] - stages[0]}{to}, {profile}"] = (stages, profile)
        elif stages and profile == "even":
            found[f"{stages[0]} alone"] = (stages, profile)
    return found


def at_speedups(
    shape: ModelShape, plans: Mapping[str, tuple[list[int], str]], tokens: int, speedups: Sequence[float]
) -> dict[str, PruningConfig]:
    """``"2x: from 4 every 3, even"`` -> that schedule at that speed-up; those that cannot be so fast are left out."""
    found = {}
    for speedup in speedups:
        for name, (stages, profile) in plans.items():
            config = at_budget(shape, stages, tokens, speedup, PROFILES[profile])
            if config is not None:
                found[f"{speedup:g}x: {name}"] = config
    return found


def scorer_rows(path: Path, settings: Sequence[str], where: str) -> pd.DataFrame:
    """The rows of these settings on one split and length (``where``), ``cell`` being the test set alone."""
    frame = evaluation_tables.rows_in(path)
    frame = frame[(frame.kind == "scorer") & frame.setting.isin(list(settings)) & frame.cell.str.endswith(f"|{where}")]
    if frame.empty:
        raise ValueError(f"{path} has no measurement of {where}: all failed, or no budget could be had at this length.")
    return frame.assign(cell=frame.cell.str.partition("|")[0])


def means_by(rows: pd.DataFrame, by: str | list[str], at_least: float = NEGLIGIBLE_NATS) -> pd.DataFrame:
    """Items, mean KL by test set, and their geometric mean, a line for each value of the columns ``by``.

    Each test set's mean counts from ``at_least`` on, so that needles at 0.0001 or 0.0002 do not decide.
    """
    wide = rows.pivot_table(index=by, columns="cell", values="kl_nats", sort=False)
    wide["geometric mean"] = numpy.exp(numpy.log(wide + at_least).mean(axis=1))
    wide.insert(0, "items", rows.groupby(by)["sample"].count())
    return wide


def rows_of(path: Path, settings: Sequence[str], where: str, scorer: str) -> pd.DataFrame:
    """The rows of a search's candidates, with columns ``speedup`` and ``schedule``."""
    frame = scorer_rows(path, settings, where)
    frame = frame[frame.scorer == scorer].copy()
    frame[["speedup", "schedule"]] = frame.setting.str.split(": ", n=1, expand=True)
    return frame


def means_of(rows: pd.DataFrame) -> pd.DataFrame:
    """`means_by` speed-up and schedule, with 1/tau; in each speed-up the lowest first."""
    place = ["speedup", "schedule"]
    wide = means_by(rows, place)
    wide.insert(1, "1/tau", rows.groupby(place).compression_ratio.mean())
    return wide.sort_values(["speedup", "geometric mean"])


def chosen(means: pd.DataFrame, even: str) -> dict[str, list[str]]:
    """Speed-up -> the schedules that are worth held-out samples: the even one, the best there, the best everywhere."""
    logs = numpy.log(means["geometric mean"]).unstack("speedup")
    everywhere = logs.dropna().mean(axis=1).idxmin()
    return {speedup: list(dict.fromkeys((even, logs[speedup].idxmin(), everywhere))) for speedup in logs}


def beside_even(rows: pd.DataFrame, speedup: str, schedule: str, even: str) -> dict[str, tuple[float, float, float]]:
    """By test set: mean of the paired KL differences, schedule minus even, with its 95 % interval."""
    part = rows[rows.speedup == speedup]
    wide = part.pivot_table(index=["cell", "sample"], columns="schedule", values="kl_nats")
    return {
        str(cell): evaluation.paired_bootstrap(each[schedule], each[even]) for cell, each in wide.groupby(level="cell")
    }


def search(
    shape: ModelShape, layers: Sequence[int], options: Any, path: Path, scorer: str,
    measure: Callable[[Mapping[str, PruningConfig], str], None], stamp: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measure the grid on training-side samples and what it chose on held-out ones; print tables, draw the picture."""
    plans = schedules(layers, options.starts, options.steps, options.profiles, options.ends)
    even, tokens = next(iter(plans)), options.prompt_tokens
    grid = at_speedups(shape, plans, tokens, options.speedups)
    measure(grid, "train")
    means = means_of(rows_of(path, list(grid), f"train|{tokens}", scorer))
    print(f"Training side, prompts of {tokens} tokens: KL to the unpruned model, nats per token\n")
    print(evaluation_tables.markdown(means.reset_index(), digits=4))
    picked = chosen(means, even)
    held = {f"{speedup}: {name}": grid[f"{speedup}: {name}"] for speedup, names in picked.items() for name in names
            if f"{speedup}: {name}" in grid}  # fmt: skip
    measure(held, "heldout")
    rows = rows_of(path, list(held), f"heldout|{tokens}", scorer)
    print(f"\nHeld out, what was chosen beside '{even}':\n")
    print(evaluation_tables.markdown(means_of(rows).reset_index(), digits=4))
    for setting, config in held.items():
        speedup, _, name = setting.partition(": ")
        if name == even:
            continue
        print(f"\nchosen: {setting}\n  layers {list(config.layers)}, keep ratios "
              f"{[round(r, 4) for r in config.keep_ratio]}\n  KL minus that of '{even}':")  # fmt: skip
        for cell, (mean, low, high) in beside_even(rows, speedup, name, even).items():
            count = rows[(rows.cell == cell) & (rows.setting == setting)]["sample"].nunique()
            print(f"  {cell}: {mean:+.4f} [{low:+.4f}, {high:+.4f}], n = {count}")
    print(f"rows: {path}\nfigure: {draw(means, means_of(rows), even, path, stamp)}")


def draw(means: pd.DataFrame, held: pd.DataFrame, even: str, path: Path, stamp: Mapping[str, Any]) -> Path:
    """KL over prefill speed-up by FLOPs: every candidate (training side), and what was chosen (held out)."""
    import matplotlib.pyplot as plt

    with plots.use_style():
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
        candidates = means.index.get_level_values("schedule").nunique()
        sides = ((f"all {candidates} schedules, training-side prompts", means), ("chosen ones, held-out prompts", held))
        for ax, (title, table) in zip(axes, sides, strict=True):
            lines = table["geometric mean"].reset_index()
            lines["x"] = lines.speedup.str.removesuffix("x").astype(float)
            for number, (name, line) in enumerate(lines.groupby("schedule", sort=False)):
                line = line.sort_values("x")
                named = ax is axes[1] or name == even
                style = {"linewidth": 0.8, "marker": ".", "color": "gray", "alpha": 0.6}
                if named:
                    width = 2.6 if name == even else 1.6
                    style = {"linewidth": width, "marker": "os^Dv"[number % 5], "label": name}
                ax.plot(line.x, line["geometric mean"], **style)
            title = f"{title} (n = {int(table['items'].to_numpy().max())})"
            ax.set(title=title, xlabel="prefill speed-up by FLOPs", yscale="log", xticks=sorted(set(lines.x)))
            ax.xaxis.set_major_formatter(lambda value, _place: f"{value:g}x")
            for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                axis(lambda value, _place: f"{value:g}")
            ax.legend()
        axes[0].set_ylabel("KL to the unpruned model [nats/token]\n(geometric mean over test sets, lower is better)")
        saved = plots.save(figure, path.with_name("by_search.png"), dict(stamp) | {"rows": path.name})
        plt.close(figure)
    return saved
