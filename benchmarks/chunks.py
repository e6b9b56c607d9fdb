"""A prompt in chunks (``prefill_chunk_size``), each cut before the next: what it costs in quality, saves in memory.

    python benchmarks/chunks.py                                   # both parts
    python benchmarks/chunks.py --parts quality --samples 2
    python benchmarks/chunks.py --parts memory --memory embedded:8192 random:65536

Quality: KL of the answers' tokens to one-shot pruning and to the unpruned model, by chunk size, on samples of
``--test-sets``. Memory: growth of the resident set (GPU: of the allocator's peak) over one prefill, each measured in a
process of its own that has loaded the model and run a short prompt. ``random`` is a Llama of four layers with random
weights. One row per measurement; a run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from sdtp_lib import PruningConfig, load_model, scorers, token_pruning
from sdtp_lib.architectures import num_layers
from sdtp_lib.architectures.caches import cache_in
from sdtp_lib.commands.arguments import count
from sdtp_lib.config import PRESETS
from sdtp_lib.data.test_sets import TEST_SETS, samples_of
from sdtp_lib.evaluation.compare import sample_hash
from sdtp_lib.evaluation.divergence import continuation_logits, kl_divergence
from sdtp_lib.evaluation.tables import markdown, rows_in
from sdtp_lib.latency.memory import MemoryWatch
from sdtp_lib.records import RowWriter, content_id, project_root, provenance_of
from sdtp_lib.scorers.by_name import loaded, scorer_named

RANDOM = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1 << 20,
}  # fmt: skip


def memory_case(text: str) -> str:
    """For ``type=``: a model and how many tokens, as typed."""
    model, _, tokens = text.rpartition(":")
    if not model:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL:TOKENS, such as random:65536")
    count(tokens)
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("quality", "memory"), default=["quality", "memory"])
    parser.add_argument("--model", default="embedded", help="of the quality part: embedded, a folder or a Hub id")
    parser.add_argument("--scorers", nargs="+", type=scorer_named, default=["SDTP", "attention"], metavar="NAME[=DIR]")
    parser.add_argument("--preset", choices=list(PRESETS), default="keep08")
    parser.add_argument("--test-sets", nargs="+", choices=TEST_SETS, default=["text", "needle"])
    parser.add_argument("--samples", type=count, default=4, help="per test set")
    parser.add_argument("--prompt-tokens", type=count, default=1024)
    parser.add_argument("--chunks", type=count, nargs="+", default=[128, 256, 512], help="sizes of the quality part")
    parser.add_argument("--memory", nargs="+", type=memory_case,
                        default=["embedded:8192", "random:65536"], metavar="MODEL:TOKENS")  # fmt: skip
    parser.add_argument("--memory-chunks", type=count, nargs="+", default=[256, 1024])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "chunks")
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "TOKENS", "VARIANT", "CHUNK"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.scorers = [scorer_named(each) if isinstance(each, str) else each for each in options.scorers]
    return options


def quality(options: argparse.Namespace) -> None:
    model, tokenizer = load_model(options.model)
    config = PruningConfig.preset(options.preset, num_layers(model))
    named = loaded(options.scorers, model)
    stamp = provenance_of(model, model_name=options.model, config=config, seed=options.seed)
    with RowWriter(options.run_dir / "quality.jsonl", stamp) as writer:
        scorer_ids = writer.scored_by(named)
        for test_set in options.test_sets:
            samples = samples_of(
                test_set, tokenizer, prompt_tokens=options.prompt_tokens, count=options.samples, seed=options.seed
            )
            for sample in tqdm(samples, desc=test_set, mininterval=5):
                prompt, response = sample["prompt_ids"], sample["response_ids"]
                keys = {(name, size): f"{test_set}|{sample['id']}|{name}|{options.preset}|{size}" for name in named
                        for size in (0, *options.chunks)}  # fmt: skip
                made_from = {"sample_hash": sample_hash(sample), "config_hash": content_id(config.to_dict())}
                todo = {case for case, key in keys.items() if not writer.done(key, **made_from)}
                if not todo:
                    continue
                full, _ = continuation_logits(model, prompt, response)
                for name, scorer in named.items():
                    whole, _ = continuation_logits(model, prompt, response, config, scorer)
                    for size in (0, *options.chunks):
                        if (name, size) not in todo:
                            continue
                        chunk = size or len(prompt)  # one chunk: the same as one shot, to the bit
                        found, trace = continuation_logits(model, prompt, response, config, scorer, chunk=chunk)
                        writer.add(
                            keys[name, size], kind="chunks", cell=test_set, sample=sample["id"], scorer=name,
                            scorer_id=scorer_ids[name], preset=options.preset, **made_from,
                            chunk=size, prompt_tokens=len(prompt),
                            kl_to_one_shot_nats=kl_divergence(whole, found), kl_nats=kl_divergence(full, found),
                            tokens_per_layer=trace.tokens_per_layer, query_tokens=trace.query_tokens,
                        )  # fmt: skip


def memory(options: argparse.Namespace) -> None:
    stamp = provenance_of(seed=options.seed, threads=torch.get_num_threads())
    with RowWriter(options.run_dir / "memory.jsonl", stamp) as writer:
        for model, _, tokens in (each.rpartition(":") for each in options.memory):
            cases = [("unpruned", 0), ("one-shot", 0)]
            cases += [(kind, size) for kind in ("pruned", "unpruned") for size in options.memory_chunks]
            for variant, size in cases:
                # The random model has a schedule of its own.
                preset = "none" if variant == "unpruned" else "own" if model == "random" else options.preset
                key = f"{model}|{tokens}|{variant}|{preset}|{size}"
                if writer.done(key):
                    continue
                command = [sys.executable, __file__, "--preset", options.preset, "--seed", str(options.seed)]
                command += ["--child", model, tokens, variant, str(size)]
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                labels = {"measured": model, "prompt_tokens": int(tokens), "variant": variant}
                labels |= {"preset": preset, "chunk": size}
                if ran.returncode:
                    reason = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
                    writer.add(key, kind="failure", **labels, error=reason)
                    continue
                row = json.loads(ran.stdout.splitlines()[-1])
                writer.add(key, kind="chunk memory", **labels, **row)
                print(f"{key}: {row['memory_growth_mb']:.0f} MB in {row['seconds']:.0f} s", flush=True)


def child(options: argparse.Namespace) -> None:
    """One prefill in this process, told as JSON on the last line."""
    name, tokens, variant, size = options.child[0], int(options.child[1]), options.child[2], int(options.child[3])
    if name == "random":
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(options.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **RANDOM)).eval()
        scorer, config = scorers.attention(8), PruningConfig((1, 2, 3), 0.5)
    else:
        model, _ = load_model(name)
        scorer, config = scorer_named("SDTP").load(model) if name == "embedded" else scorers.attention(8), None
    config = config or PruningConfig.preset(options.preset, num_layers(model))
    ids = torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(options.seed)).to(model.device)
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}

    def prefill(prompt: torch.Tensor) -> tuple[object, list[int]]:
        given = settings | ({"prefill_chunk_size": size} if size else {}) | {"attention_mask": torch.ones_like(prompt)}
        if variant == "unpruned":
            return model.generate(prompt, **given), [prompt.shape[1]]
        with token_pruning(model, config, scorer) as trace:
            return model.generate(prompt, **given), trace.tokens_per_layer

    prefill(ids[:, :300])
    watch, start = MemoryWatch(model.device), time.perf_counter()
    output, counts = prefill(ids)
    seconds = time.perf_counter() - start
    cache = cache_in(output)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e6
    print(json.dumps(watch.read_mb() | {"kv_mb": kept, "seconds": seconds, "tokens_in_last_layer": counts[-1]}))


def with_preset(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Rows of an older version do not say their preset."""
    return rows.assign(preset=rows.get("preset", pandas.Series(index=rows.index, dtype=object)).fillna("not said"))


def tables(options: argparse.Namespace) -> None:
    if (path := options.run_dir / "quality.jsonl").exists():
        rows = with_preset(rows_in(path))
        found = rows[rows.kind == "chunks"].groupby(["preset", "scorer", "chunk"], sort=True).agg(
            samples=("sample", "count"), to_one_shot=("kl_to_one_shot_nats", "mean"), to_unpruned=("kl_nats", "mean")
        ).reset_index()  # fmt: skip
        found["chunk"] = found.chunk.map(lambda size: size or "one-shot")
        longest = int(rows.prompt_tokens.max())
        print(f"\nKL (nats per token) at prompts of at most {longest:,} tokens, by preset and chunk size\n")
        print(markdown(found, digits=4))
    if (path := options.run_dir / "memory.jsonl").exists():
        rows = with_preset(rows_in(path))
        for row in rows[rows.kind == "failure"].itertuples():
            print(f"failed: {row.measured} {row.variant} {row.chunk}: {row.error}")
        rows = rows[rows.kind == "chunk memory"]
        print("\nPeak memory of one prefill beyond what the model takes (MB), of it the cache at the end\n")
        names = ["measured", "prompt_tokens", "variant", "preset", "chunk", "memory_growth_mb", "kv_mb"]
        names += ["tokens_in_last_layer", "seconds"]
        table: pandas.DataFrame = rows[names].copy()
        table["chunk"] = table.chunk.map(lambda size: size or "none")
        print(markdown(table, digits=0))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.child:
        child(options)
        return
    for part in options.parts:
        {"quality": quality, "memory": memory}[part](options)
    tables(options)


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
