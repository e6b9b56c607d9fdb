"""Where to prune and how much: the paper's Figures 4 and 5, and a search over schedules at one FLOPs budget.

    python benchmarks/schedules.py first                   # Figure 4: KL by the first pruned layer, r = 0.9, 0.8, 0.7
    python benchmarks/schedules.py stages --speedup 2.2    # Figure 5: KL by number of stages at equal prefill FLOPs
    python benchmarks/schedules.py search --speedups 1.5 2 3
                                                           # the best of a grid, chosen on training-side samples, then
                                                           # measured on held-out ones beside the even schedule
    python benchmarks/schedules.py first --scorer attention
    python benchmarks/schedules.py pairs --test-sets text needle multi_news --speedups 1.5 2
                                                           # which training-free score with which stages

A schedule is a list of layers with one keep ratio each. The learned score has only its own layers to choose from; the
simple ones take any. Speed-ups are ratios of causal prefill FLOPs (`sdtp_lib.budget.speedup_limit`). One row per sample
and schedule; runs resume. Writes a picture beside the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from schedule_search import COARSE, PROFILES, at_budget, means_by, scorer_rows, search
from tqdm import tqdm

from sdtp_lib import PruningConfig, evaluation, load_model, plots, scorers
from sdtp_lib.commands.arguments import count
from sdtp_lib.data.test_sets import TEST_SETS, samples_in_turn
from sdtp_lib.evaluation import tables as evaluation_tables
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.stage import Stage, earlier_layers
from sdtp_lib.records import RowWriter, project_root, provenance_of
from sdtp_lib.scorers.blend import strongest_neighbour
from sdtp_lib.scorers.by_name import scorer_named


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("first", "stages", "search", "pairs"))
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub id")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, auto; default by device")
    parser.add_argument("--scorer", type=scorer_named, default="SDTP", help="SDTP, SDTP=DIR, attention, recency, ...")
    parser.add_argument("--test-sets", nargs="+",
                        choices=TEST_SETS, default=["text", "needle", "instructions"], help="test sets")  # fmt: skip
    parser.add_argument("--samples", type=count, default=6, help="samples per test set")
    parser.add_argument("--prompt-tokens", type=count, default=1024)
    parser.add_argument("--speedup", type=float, default=2.2, help="of `stages`: wanted ratio of FLOPs")
    parser.add_argument("--scores", nargs="+", choices=list(training_free()), help="of `pairs`: only these")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0], help="of `search` and `pairs`")
    parser.add_argument("--starts", type=count, default=4, help="of `search`: begin at one of the first so many layers")
    parser.add_argument("--steps", type=count, nargs="+", default=[1, 2, 3], help="of `search`: use every n-th layer")
    parser.add_argument("--ends", type=count, nargs="+", default=[], metavar="LAYER", help="of `search`: no stage "
                        "beyond one of these (default: all layers that the score has)")  # fmt: skip
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(COARSE), help="of `search`: which "
                        f"stages drop most (default: {', '.join(COARSE)})")  # fmt: skip
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="keep ratios of `first`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "schedules")
    return parser.parse_args(arguments)


def by_first_layer(layers: list[int], depth: int, ratios: Sequence[float]) -> dict[str, PruningConfig]:
    """Figure 4: every third layer from a first one on, at the ratios as they are (so the cost differs)."""
    firsts = [layer for layer in layers if layer <= max(10, layers[0])]
    found = {}
    for ratio in ratios:
        for first in firsts:
            stages = [layer for layer in range(first, depth, 3) if layer in layers]
            found[f"first {first}, r={ratio}"] = PruningConfig(tuple(stages), ratio)
    return found


def by_stages(shape: ModelShape, layers: list[int], tokens: int, speedup: float) -> dict[str, PruningConfig]:
    """Figure 5: so many stages, spread evenly from the first layer on, at equal FLOPs."""
    layers = [layer for layer in layers if layer >= 4] or layers
    found = {}
    for stages in sorted({1, 2, 3, 5, 7, 10, len(layers)}):
        if stages <= len(layers):
            places = [layers[round(number * len(layers) / stages)] for number in range(stages)]
            config = at_budget(shape, sorted(set(places)), tokens, speedup)
            if config is not None:
                found[f"{stages} stages"] = config
    return found


def training_free() -> dict[str, Any]:
    """The candidates for the score that a model gets without pruners."""
    pooled, recency = scorers.attention(8, kernel=7), (scorers.recency(), 0.5)
    return {
        "recency": scorers.recency(),
        "attention": scorers.attention(8),
        "pooled": pooled,
        "pooled, earlier layers": pooled_earlier_layers,
        "pooled + recency": scorers.weighted([(pooled, 1.0), recency]),
        "pooled, earlier layers + recency": scorers.weighted([(pooled_earlier_layers, 1.0), recency]),
    }


def pooled_earlier_layers(stage: Stage) -> torch.Tensor:
    """Pooled attention of the last 8 tokens, the most over the layers since the stage before."""
    paid = stage.attention_paid(earlier_layers([stage.layer_index])[stage.layer_index], 8)
    pooled = [strongest_neighbour(each.sum(dim=2), 7).mean(dim=1) for each in paid]
    return torch.stack(pooled).amax(dim=0)


def stage_layers(depth: int) -> dict[str, range]:
    """Every third layer from the presets' layer 4, a third of the depth or half of it; every fifth from layer 4."""
    every_third = {"layer 4": 4, "a third": max(1, depth // 3), "half": depth // 2}
    return {name: range(first, depth, 3) for name, first in every_third.items()} | {"every fifth": range(4, depth, 5)}


def pairs_at(shape: ModelShape, tokens: int, speedups: Sequence[float]) -> dict[str, PruningConfig]:
    """``"1.5x, a third"`` -> that schedule at that speed-up; those that cannot be so fast are left out."""
    found = {}
    for speedup in speedups:
        for name, layers in stage_layers(shape.num_layers).items():
            config = at_budget(shape, layers, tokens, speedup)
            if config is not None:
                found[f"{speedup:g}x, {name}"] = config
    return found


def pair_tables(path: Path, configs: Sequence[str], where: str) -> dict[str, Any]:
    """Speed-up -> mean KL by (schedule, score) and test set, best geometric mean over test sets first."""
    frame = scorer_rows(path, configs, where)
    frame[["speedup", "stages"]] = frame.setting.str.split(", ", n=1, expand=True)
    return {
        speedup: means_by(part, ["stages", "scorer"]).sort_values("geometric mean").reset_index()
        for speedup, part in frame.groupby("speedup", sort=False)
    }


def summary_of(path: Path, settings: Sequence[str], where: str, scorer: str):
    """Mean KL by schedule and test set, and the geometric mean over test sets; and the rows."""
    frame = scorer_rows(path, settings, where)
    frame = frame[frame.scorer == scorer]
    wide = means_by(frame, "setting", at_least=1e-9)
    wide.insert(1, "1/tau", frame.groupby("setting").compression_ratio.mean())
    return wide, frame


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    shape = ModelShape.from_model(model)
    tokens, path = options.prompt_tokens, options.run_dir / "schedules.jsonl"
    stamp = provenance_of(model, model_name=options.model, seed=options.seed)

    def measure(configs: dict[str, PruningConfig], split: str, methods: Sequence[evaluation.Variant]) -> None:
        sizes = {"prompt_tokens": tokens, "count": options.samples, "seed": options.seed, "split": split}
        plan = samples_in_turn(options.test_sets, tokenizer, **sizes)
        with RowWriter(path, stamp) as writer, torch.inference_mode(False):
            for test_set, sample in tqdm(plan, unit="sample", desc=split):
                where = f"{test_set}|{split}|{tokens}"
                evaluation.compare_scorers(model, [sample], configs, methods, writer, test_set=where)

    if options.what == "pairs":
        configs = pairs_at(shape, tokens, options.speedups)
        found = {name: score for name, score in training_free().items() if name in (options.scores or training_free())}
        measure(configs, "heldout", [evaluation.Variant(name, scorer=score) for name, score in found.items()])
        for speedup, table in pair_tables(path, configs, f"heldout|{tokens}").items():
            print(f"\n### {speedup} by FLOPs, prompts of {tokens} tokens: KL to the unpruned model, nats per token\n")
            print(evaluation_tables.markdown(table, digits=4))
        print(f"\nrows: {path}")
        return
    scorer = options.scorer.load(model)
    layers = options.scorer.layers(scorer, shape.num_layers)
    name = options.scorer.name
    of_it = partial(measure, methods=[evaluation.Variant(name, scorer=scorer)])
    if options.what == "search":
        search(shape, layers, options, path, name, of_it, stamp)
        return
    if options.what == "first":
        configs = by_first_layer(layers, shape.num_layers, options.ratios)
    else:
        made = by_stages(shape, layers, tokens, options.speedup)
        configs = {f"x{options.speedup}: {key}": config for key, config in made.items()}
    of_it(configs, "heldout")
    found, rows = summary_of(path, configs, f"heldout|{tokens}", name)
    print(evaluation_tables.markdown(found.reset_index(), digits=4))
    print(f"rows: {path}\nfigure: {draw(rows, configs, options.what, path, stamp)}")


def draw(rows, configs: dict[str, PruningConfig], what: str, path: Path, stamp: dict) -> Path:
    import matplotlib.pyplot as plt

    with plots.use_style():
        test_sets = list(rows.cell.unique())
        size = (4.6 * len(test_sets), 3.8)
        figure, axes = plt.subplots(1, len(test_sets), figsize=size, squeeze=False, layout="constrained")
        label = "first pruned layer" if what == "first" else "stages (equal FLOPs)"
        for ax, test_set in zip(axes.flat, test_sets, strict=True):
            part = rows[rows.cell == test_set].copy()
            stages = part.setting.map(lambda key: configs[key])
            part["x"] = [c.layers[0] if what == "first" else len(c.layers) for c in stages]
            part["ratio"] = [f"r = {c.keep_ratio}" if what == "first" else test_set for c in stages]
            for number, (ratio, line) in enumerate(part.groupby("ratio", sort=False)):
                means = line.groupby("x").kl_nats.mean()
                ax.plot(means.index, means, marker="os^Dv"[number % 5], label=ratio)
            ax.set(xlabel=label, ylabel="KL to the unpruned model [nats/token]", yscale="log",
                   title=f"{test_set} (n = {part['sample'].nunique()})")  # fmt: skip
            if what == "first":
                ax.legend()
        saved = plots.save(figure, path.with_name(f"by_{what}.png"), stamp | {"rows": path.name})
        plt.close(figure)
    return saved


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
