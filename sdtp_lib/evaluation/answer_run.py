"""What the commands that generate answers share: arguments, variants, and one run over several data sets.

A command brings its parts (a data set, or a task at one prompt length). Loading, sharing among processes, resuming and
variants are here, so that LongBench and RULER are measured by the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdtp_lib import methods
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.checked import typed_count
from sdtp_lib.config import PRESETS, typed_budget
from sdtp_lib.evaluation.answers import FULL, run_items
from sdtp_lib.evaluation.items import Item
from sdtp_lib.evaluation.tables import rows_in
from sdtp_lib.methods.call import budget_for
from sdtp_lib.methods.variant import Variant
from sdtp_lib.models import load_model
from sdtp_lib.processes import Share
from sdtp_lib.records import project_root, provenance_of
from sdtp_lib.scorers.by_name import loaded, scorer_named
from sdtp_lib.scorers.simple import NAMED


@dataclass(frozen=True)
class Part:
    """The items of one data set, or of one task at one prompt length.

    Attributes
    ----------
    name
        As the progress bar and messages call it.
    records
        Makes its records; an ``OSError`` (data that are not there) leaves the part out with a message.
    items
        Makes the items of some of the records.
    """

    name: str
    records: Callable[[], Sequence[Any]]
    items: Callable[[Sequence[Any]], Iterable[Item]]


def add_arguments(parser: argparse.ArgumentParser, run: str, *, presets: Sequence[str]) -> None:
    """The arguments that every such command takes; ``run`` names its folder under ``data/results``."""
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device-map", default=None)
    parser.add_argument("--presets", nargs="*", type=budget_argument, default=list(presets), metavar="BUDGET",
                        help=f"{', '.join(PRESETS)}, a speed-up such as 2x, or a keep ratio such as 0.8")  # fmt: skip
    parser.add_argument("--scorers", nargs="+", type=scorer_named, default=None, metavar="NAME[=DIR]",
                        help=f"SDTP (default), NAME=DIR, {', '.join(NAMED)}")  # fmt: skip
    parser.add_argument("--method", nargs="+", type=_method, default=[], metavar="NAME",
                        help="published methods too, as NAME (its paper's budget) or NAME@2x")  # fmt: skip
    parser.add_argument("--batch-size", type=typed_count, default=1, help="prompts per batch; times are then of whole "
                        "batches")  # fmt: skip
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / run)
    parser.add_argument("--tables", action="store_true", help="print the rows that are there, compute nothing")


def budget_argument(text: str) -> str:
    """For ``type=``: a budget as `token_pruning` takes it, by its text; a method has an argument of its own.

    Raises
    ------
    argparse.ArgumentTypeError
        For what no model can have.
    """
    try:
        budget_for(typed_budget(text), 28)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _method(text: str) -> tuple[str, methods.Method]:
    try:
        return text, methods.named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def measured(
    options: argparse.Namespace, path: Path, measure: Callable[[argparse.Namespace, Path, Share], None]
) -> Any:
    """The rows of ``path`` as a frame, after ``measure`` unless ``--tables`` was given.

    None in a process that is not the first of its launch: one prints.

    Raises
    ------
    ValueError
        If there are no rows (`rows_in`).
    """
    share = Share()
    if not options.tables:
        measure(options, path, share)
    return rows_in(path) if share.is_first else None


def load(options: argparse.Namespace, share: Share) -> tuple[Any, Any]:
    """The model on this process's device, and its tokenizer."""
    if share.count > 1 and options.device_map:
        raise ValueError("--device-map spreads one model over all devices: not with several processes.")
    return load_model(options.model, dtype=options.dtype, device=share.device, device_map=options.device_map)


def variants(options: argparse.Namespace, model: Any) -> list[Variant]:
    """The unpruned model, then each budget with each score, then the published methods."""
    layers, found = num_layers(model), [Variant(FULL)]
    chosen = loaded(options.scorers or [scorer_named("SDTP")], model)
    for preset in options.presets:
        budget = budget_for(typed_budget(preset), layers)
        found += [Variant(f"{name} {preset}", budget, scorer) for name, scorer in chosen.items()]
    return found + [Variant(name, method, method.scorer_for(model)) for name, method in options.method]


def run_parts(
    options: argparse.Namespace, path: Path, share: Share, model: Any, tokenizer: Any, parts: Iterable[Part]
) -> None:
    """Rows of all parts and variants that ``path`` does not have yet, shared among processes."""
    chosen = variants(options, model)
    stamp = provenance_of(model, model_name=options.model, seed=getattr(options, "seed", None))
    with share.rows(path, stamp) as writer:
        for part in parts:
            try:
                records = part.records()
            except OSError as error:
                print(f"{part.name} is left out: {error}", file=sys.stderr)
                continue
            records = share.of(records)
            bar = tqdm(total=len(records), desc=part.name, unit="item", mininterval=5, disable=not share.is_first)
            run_items(
                model, tokenizer, part.items(records), chosen, writer, batch_size=options.batch_size,
                progress=lambda item, bar=bar: bar.update(),
            )  # fmt: skip
            bar.close()


def refuse_failures_alone(frame: Any) -> None:
    """A ``ValueError`` where every item of ``frame`` failed, with the first one's reason: there is no table of none."""
    if not (frame.kind == "item").any():
        raise ValueError(f"all {len(frame)} measurements failed, the first: {frame.error.iloc[0]}")


def print_failures(frame: Any) -> None:
    """One line per item that failed, with its reason."""
    for row in frame[frame.kind == "failure"].itertuples():
        print(f"failed: {row.dataset} {row.item} {row.variant}: {row.error}")
