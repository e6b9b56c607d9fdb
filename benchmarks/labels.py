"""Which label is right: rank agreement with removing tokens for real, and KL where the label itself is the score.

    python benchmarks/labels.py                    # about 15 minutes on 2 cores
    python benchmarks/labels.py --test-sets text needle --samples 8 --layers 4 13 22
    python benchmarks/labels.py --tables           # only print what the rows hold

The gold check removes blocks of neighbouring tokens from a layer on, one block at a time, and takes the KL of the
response (`sdtp_lib.training.labels.block_effects`). A label's agreement is its Spearman correlation with that, its
values summed by block. As an oracle a label is given to the engine as the score; ``--step-by-step`` computes it anew at
each stage, on the prompt as it is cut by then, and ``--blocks`` shares each block's gold effect out among its tokens by
the label. One row per sample, layer and label, and one per sample, setting and oracle; runs resume.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from sdtp_lib import PruningConfig, evaluation, load_model, scorers
from sdtp_lib.architectures import num_layers
from sdtp_lib.commands.arguments import amount, count
from sdtp_lib.config import PRESETS
from sdtp_lib.data.test_sets import TEST_SETS, samples_in_turn
from sdtp_lib.evaluation import tables as evaluation_tables
from sdtp_lib.evaluation.compare import sample_hash
from sdtp_lib.records import RowWriter, project_root, provenance_of
from sdtp_lib.training.labels import LABELS, block_effects, saliency_of
from sdtp_lib.training.oracles import oracle_methods, step_by_step


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub id")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, auto; default by device")
    parser.add_argument("--test-sets", nargs="+",
                        choices=TEST_SETS, default=["text", "needle", "instructions"], help="test sets")  # fmt: skip
    parser.add_argument("--samples", type=count, default=3, help="samples per test set")
    parser.add_argument("--prompt-tokens", type=count, default=512)
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--step-by-step", nargs="*", choices=LABELS, default=[], help="labels also made stage by stage")
    parser.add_argument("--blocks", nargs="*", choices=LABELS, default=[], help="labels also within gold blocks")
    parser.add_argument("--layers", type=amount, nargs="+", default=[4, 16], help="of the gold check")
    parser.add_argument("--block-tokens", type=count, default=16, help="removed together in the gold check")
    parser.add_argument("--presets", nargs="*", choices=list(PRESETS), default=["keep09", "keep07"],
                        help="at which labels serve as oracles")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "labels")
    parser.add_argument("--tables", action="store_true", help="print what the rows hold, compute nothing")
    return parser.parse_args(arguments)


def agreement(model, sample: dict, options: argparse.Namespace, writer: RowWriter, test_set: str) -> None:
    """Rows of kind ``agreement``: each label against the gold check at each layer."""
    keys = {
        (layer, label): f"gold|{test_set}|{sample['id']}|{layer}|{label}"
        for layer in options.layers
        for label in options.labels
    }
    made_from = {"block_tokens": options.block_tokens, "sample_hash": sample_hash(sample)}
    done = {key: writer.done(key, **made_from) for key in keys.values()}
    if all(done.values()):
        return
    prompt = len(sample["prompt_ids"])
    ids, response = row_of(model, sample)
    found = saliency_of(model, ids, torch.ones_like(ids), response, options.layers, options.labels)
    for layer in options.layers:
        gold = pandas.Series(gold_of(model, sample, layer, options.block_tokens).cpu().numpy())
        for label in options.labels:
            by_block = [part.sum().item() for part in found[label][layer][0, :prompt].split(options.block_tokens)]
            key = keys[layer, label]
            done[key] or writer.add(
                key, kind="agreement", cell=test_set, sample=sample["id"], layer=layer, label=label,
                rank_agreement=float(pandas.Series(by_block).corr(gold, method="spearman")), blocks=len(gold),
                **made_from,
            )  # fmt: skip


def row_of(model, sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and response as one row (1, T), and where the response is."""
    ids = torch.tensor([[*sample["prompt_ids"], *sample["response_ids"]]], device=model.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) >= len(sample["prompt_ids"]))[None].long()


_GOLD: dict[tuple, torch.Tensor] = {}  # of the sample at hand: one check serves the agreement and the oracle


def gold_of(model, sample: dict, layer: int, block_tokens: int) -> torch.Tensor:
    """What removing each block from ``layer`` on costs, nats per response token: (blocks,)."""
    key = (sample["id"], layer, block_tokens)
    if key not in _GOLD:
        for other in [other for other in _GOLD if other[0] != sample["id"]]:
            del _GOLD[other]
        ids, response = row_of(model, sample)
        _GOLD[key] = block_effects(model, ids, response, layer, block_tokens)
    return _GOLD[key]


def within_blocks(label: str, layers: list[int], block_tokens: int) -> evaluation.Variant:
    """An oracle: the gold effect of a token's block, shared out by ``label``; of the last of ``layers`` so far."""

    def from_sample(model, sample, stages):
        ids, response = row_of(model, sample)
        prompt = len(sample["prompt_ids"])
        found = saliency_of(model, ids, torch.ones_like(ids), response, stages, label)
        scores = {}
        for stage in stages:
            checked = max([layer for layer in layers if layer <= stage] or layers[:1])
            gold = gold_of(model, sample, checked, block_tokens)
            parts = found[stage][:, :prompt].split(block_tokens, dim=1)
            shares = [part / part.sum().clamp(min=1e-30) * effect for part, effect in zip(parts, gold, strict=True)]
            scores[stage] = torch.cat(shares, dim=1)
        return scorers.given(scores)

    # What rows call the scorer that made them: a function's name alone would say neither layers nor blocks.
    from_sample.identity = f"{label} within gold blocks of {block_tokens} tokens at layers {layers}"
    name = f"oracle: {label}, within gold blocks"
    return evaluation.Variant(name, scorer=from_sample, kind="oracle", from_sample=True)


def measure(options: argparse.Namespace, path: Path) -> None:
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    depth = num_layers(model)
    configs = {preset: PruningConfig.preset(preset, num_layers=depth) for preset in options.presets}
    stamp = provenance_of(model, model_name=options.model, seed=options.seed)
    sizes = {"prompt_tokens": options.prompt_tokens, "count": options.samples, "seed": options.seed}
    plan = samples_in_turn(options.test_sets, tokenizer, **sizes)
    with RowWriter(path, stamp) as writer, torch.inference_mode(False):
        for test_set, sample in tqdm(plan, unit="sample"):
            agreement(model, sample, options, writer, test_set)
            oracles = oracle_methods(options.labels)
            oracles += [within_blocks(label, sorted(options.layers), options.block_tokens) for label in options.blocks]
            evaluation.compare_scorers(model, [sample], configs, oracles, writer, test_set=test_set)
            for preset, config in configs.items():
                steps = [step_by_step(label, config) for label in options.step_by_step]
                evaluation.compare_scorers(model, [sample], {preset: config}, steps, writer, test_set=test_set)


def by_test_set(rows: pandas.DataFrame, name: str, value: str) -> pandas.DataFrame:
    """The mean of ``value``: one row per ``name``, one column per test set, whose head counts its samples."""
    wide = rows.pivot_table(index=name, columns="cell", values=value, sort=False)
    counts = rows.groupby("cell")["sample"].nunique()
    wide.columns = [f"{test_set} (n={counts[test_set]})" for test_set in wide.columns]
    return wide.reset_index()


def report(path: Path) -> None:
    frame = evaluation_tables.rows_in(path)
    gold = frame[frame.kind == "agreement"]
    if len(gold):
        print("\nSpearman correlation with the gold check, mean over samples and layers\n")
        print(evaluation_tables.markdown(by_test_set(gold, "label", "rank_agreement")))
    oracles = frame[frame.kind == "scorer"]
    for setting, part in oracles.groupby("setting", sort=False) if len(oracles) else ():
        print(f"\n{setting}: KL with the label given as the score, nats per token\n")
        table = by_test_set(part, "scorer", "kl_nats")
        print(evaluation_tables.markdown(table, bold_lowest=list(table.columns[1:])))
    for row in frame[frame.kind == "failure"].itertuples():
        print(f"failed: {row.key}: {row.error}")
    print(f"\nrows: {path}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path = options.run_dir / "labels.jsonl"
    if not options.tables:
        measure(options, path)
    report(path)


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
