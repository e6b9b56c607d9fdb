"""What trained pruners are worth on held-out prompts, beside scores that need no training: a table and one sentence.

Each line is a kind of prompt and a keep ratio: the mean KL of the learned score, of the best training-free score there,
and of recency, and the paired difference to the best one with its bootstrap interval. The best training-free score is
chosen after the fact, on these very prompts: the comparison favours it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.compare import compare_scorers
from sdtp_lib.evaluation.methods import baseline_methods
from sdtp_lib.evaluation.statistics import paired_bootstrap
from sdtp_lib.methods.variant import Variant
from sdtp_lib.processes import Share
from sdtp_lib.records import markdown_table, read_rows
from sdtp_lib.training.saliency import own_response

RATIOS = (0.9, 0.8, 0.7)
LEARNED = "learned"
TRAINING_FREE = ("attention, pooled", "attention", "attention + recency", "recency")
FEW = 8  # prompts of a kind below which no interval is worth believing


@dataclasses.dataclass(frozen=True)
class Line:
    """One kind of prompt at one keep ratio; KL in nats per token.

    Attributes
    ----------
    kind, keep_ratio, prompts
        What was measured, on how many prompts.
    learned, best, recency
        Mean KL of the learned score, of the training-free score ``best_name``, and of recency.
    difference, low, high
        Mean of learned minus best over prompts, and its 95 % paired bootstrap interval.
    """

    kind: str
    keep_ratio: float
    prompts: int
    learned: float
    best_name: str
    best: float
    recency: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"better"`` or ``"worse"`` where the interval excludes 0, else ``"open"``; few prompts never say better."""
        if self.high < 0 and self.prompts >= FEW:
            return "better"
        return "worse" if self.low > 0 else "open"


def measure(
    model: Any,
    pruners: Any,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    layers: Sequence[int],
    rows: Path,
    provenance: Mapping[str, Any],
    share: Share,
    progress: Any = None,
) -> list[Line]:
    """The table of ``pruners`` on ``samples`` (kind -> prompts); rows are resumable and shared among processes.

    A sample without response gets the unpruned model's own answer.
    """
    configs = {f"r={ratio}": PruningConfig(layers=tuple(layers), keep_ratio=ratio) for ratio in RATIOS}
    free = [method for method in baseline_methods() if method.name in TRAINING_FREE]
    methods = [Variant(LEARNED, scorer=pruners), *free]
    with share.rows(rows, provenance) as writer:
        for kind, some in samples.items():
            for sample in share.of(some):
                if "own_tokens" in sample and "response_ids" not in sample:
                    answer = own_response(model, sample["prompt_ids"], sample["own_tokens"])
                    sample = {**sample, "response_ids": answer}
                compare_scorers(model, [sample], configs, methods, writer, test_set=kind, progress=progress)
    return table(read_rows(rows))


def table(rows: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Lines of rows that `measure` wrote, by kind in their order; prompts that lack a score are left out."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["kind"] == "scorer":
            by_sample = found.setdefault((row["cell"], row["setting"]), {})
            by_sample.setdefault(row["sample"], {})[row["scorer"]] = row["kl_nats"]
    lines = []
    for (kind, setting), by_sample in found.items():
        names = [name for name in TRAINING_FREE if any(name in values for values in by_sample.values())]
        whole = [values for values in by_sample.values() if {LEARNED, *names} <= set(values)]
        if not whole or not names:
            continue
        mean = {name: sum(values[name] for values in whole) / len(whole) for name in (LEARNED, *names)}
        best = min(names, key=mean.__getitem__)
        learned, free = [values[LEARNED] for values in whole], [values[best] for values in whole]
        difference, low, high = paired_bootstrap(learned, free)
        recency = mean.get("recency", math.nan)
        lines.append(Line(kind, float(setting[2:]), len(whole), mean[LEARNED], best, mean[best], recency, difference,
                          low, high))  # fmt: skip
    return sorted(lines, key=lambda line: (line.kind, -line.keep_ratio))


def as_text(lines: Sequence[Line], markdown: bool = False) -> str:
    """The table for a terminal, or as Markdown."""
    head = ("prompts", "keep ratio", "n", "learned", "best training-free score", "recency", "difference (95 %)", "")
    body = [
        (
            line.kind, f"{line.keep_ratio:g}", str(line.prompts), f"{line.learned:.4f}",
            f"{line.best:.4f} ({line.best_name})", f"{line.recency:.4f}",
            f"{line.difference:+.4f} ({line.low:+.4f}, {line.high:+.4f})", line.verdict,
        )
        for line in lines
    ]  # fmt: skip
    if markdown:
        return markdown_table(head, body)
    widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in (head, *body))  # fmt: skip


def in_words(lines: Sequence[Line]) -> str:
    """Whether the pruners are worth using, for a person: where they are better, where not, and what would help."""
    if not lines:
        return "Nothing was measured: no held-out prompts."
    few = min(line.prompts for line in lines)
    named = {verdict: _named([line for line in lines if line.verdict == verdict])
             for verdict in ("better", "worse", "open")}  # fmt: skip
    parts = []
    if named["worse"]:
        parts.append(f"NOT better than the best training-free score on {named['worse']}: prefer that there.")
    if named["better"]:
        everywhere = not named["worse"] and not named["open"]
        where = "everywhere it was measured" if everywhere else f"on {named['better']}"
        parts.append(f"Better than the best training-free score {where}.")
    elif not named["worse"]:
        parts.append("NOT shown to be better than the best training-free score.")
    if named["open"]:
        parts.append(f"Open on {named['open']}: the intervals hold 0, or the prompts are few.")
    if few < FEW:
        parts.append(f"More samples: had {few} held-out prompts of some kinds.")
    return " ".join(parts)


def _named(lines: Sequence[Line]) -> str:
    """``"text at 0.9, 0.8; own at 0.7"``; empty for no lines."""
    ratios: dict[str, list[str]] = {}
    for line in lines:
        ratios.setdefault(line.kind, []).append(f"{line.keep_ratio:g}")
    return "; ".join(f"{kind} at {', '.join(some)}" for kind, some in ratios.items())
