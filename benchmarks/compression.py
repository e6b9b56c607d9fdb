"""The paper's Table 6: SDTP, then a smaller KV cache by heavy hitters (H2O) or SnapKV, both from kvpress.

    make bench-compression                                        # in the environment of `make test-floor`
    .venv-floor/bin/python benchmarks/compression.py --samples 8 --kv 0.4 --presets keep09 keep07

kvpress needs transformers < 5.3, so this runs in .venv-floor. Each press keeps ``--kv`` of the tokens that a layer has,
after SDTP has dropped its own; the KV share is read from the cache. KL is to the unpruned model with its whole cache.
All variants run with eager attention, which H2O reads. One row per test set, sample and variant; runs resume.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from sdtp_lib import PruningConfig, budget, evaluation, load_model
from sdtp_lib.architectures import num_layers
from sdtp_lib.commands.arguments import count
from sdtp_lib.config import PRESETS
from sdtp_lib.data.test_sets import TEST_SETS, samples_of
from sdtp_lib.evaluation import tables as evaluation_tables
from sdtp_lib.model_shape import ModelShape, element_bytes
from sdtp_lib.records import RowWriter, project_root, provenance_of
from sdtp_lib.scorers.by_name import scorer_named

PRESSES = {"H2O": "ObservedAttentionPress", "SnapKV": "SnapKVPress"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub id")
    parser.add_argument("--scorer", type=scorer_named, default="SDTP", help="SDTP, SDTP=DIR, attention, recency, ...")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["keep09"])
    parser.add_argument("--kv", type=float, default=0.4, help="share of the cached tokens that a press keeps")
    parser.add_argument("--test-sets", nargs="+", choices=TEST_SETS,
                        default=["text", "needle", "multi_key", "instructions"], help="test sets")  # fmt: skip
    parser.add_argument("--samples", type=count, default=4, help="samples per test set")
    parser.add_argument("--prompt-tokens", type=count, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "compression")
    options = parser.parse_args(arguments)
    if not 0 < options.kv < 1:
        parser.error(f"--kv {options.kv}: give the share of tokens to keep, between 0 and 1.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        import kvpress
    except ImportError:
        raise ValueError(
            "kvpress is not installed (it needs transformers < 5.3): run `make bench-compression`."
        ) from None
    model, tokenizer = load_model(options.model, attn_implementation="eager")
    scorer = options.scorer.load(model)
    layers, name = num_layers(model), options.scorer.name
    whole = {"unpruned": PruningConfig.preset(options.presets[0], layers, keep_ratio=1.0)}
    pruned = {preset: PruningConfig.preset(preset, layers) for preset in options.presets}
    presses = {
        f"{press} {100 * options.kv:g}%": partial(getattr(kvpress, kind), compression_ratio=1 - options.kv)
        for press, kind in PRESSES.items()
    }
    arounds = {press: lambda made=made: made()(model) for press, made in presses.items()}
    alone = [evaluation.Variant(press, scorer=scorer, around=around) for press, around in arounds.items()]
    behind = [evaluation.Variant(f"{name} + {press}", scorer=scorer, around=around)
              for press, around in arounds.items()]  # fmt: skip
    stamp = provenance_of(model, model_name=options.model, seed=options.seed)
    with RowWriter(options.run_dir / "compression.jsonl", stamp) as writer:
        test_sets = {
            test_set: samples_of(
                test_set, tokenizer, prompt_tokens=options.prompt_tokens, count=options.samples, seed=options.seed
            )
            for test_set in options.test_sets
        }
        plan = [(test_set, sample) for test_set, samples in test_sets.items() for sample in samples]
        for test_set, sample in tqdm(plan, unit="sample", mininterval=5):
            for configs, methods in ((whole, alone), (pruned, [evaluation.Variant(name, scorer=scorer), *behind])):
                evaluation.compare_scorers(model, [sample], configs, methods, writer, test_set=test_set)
        frame = evaluation_tables.rows_in(writer.path)
    report(frame, ModelShape.from_model(model), element_bytes(model.dtype))


def report(frame, shape: ModelShape, number_bytes: int) -> None:
    for row in frame[frame.kind == "failure"].itertuples():
        print(f"failed: {row.cell} {row.sample} {row.setting} {row.scorer}: {row.error}")
    rows = frame[frame.kind == "scorer"].copy()
    if rows.empty:
        return
    whole = [budget.kv_bytes(shape, [tokens] * shape.num_layers, number_bytes) for tokens in rows.prompt_tokens]
    rows["kv share %"] = 100 * rows.kv_bytes / whole
    summary = evaluation_tables.scorer_summary(rows)
    table = summary.pivot_table(index=["setting", "scorer"], columns="cell", values="kl_nats", sort=False)
    table.insert(0, "kv share %", rows.groupby(["setting", "scorer"], sort=False)["kv share %"].mean())
    counts = ", ".join(f"{name} n={n}" for name, n in summary.groupby("cell", sort=False)["items"].max().items())
    print(f"\nKL to the unpruned model with its whole cache, nats per token ({counts})\n")
    print(evaluation_tables.markdown(table.reset_index()))


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
