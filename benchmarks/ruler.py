"""RULER by lm-eval's generators and metrics; exact copies, second questions, LongBench v2: one row per item, resumable.

    python benchmarks/ruler.py --tasks offline --lengths 1024 4096 --limit 12 --presets keep09 --scorers SDTP recency
    python benchmarks/ruler.py --model Qwen/Qwen2.5-7B-Instruct --dtype bfloat16 --tasks ruler --lengths 32768 131072 \\
        --limit 50 --scorers SDTP=DIR attention
    python benchmarks/ruler.py --tasks repeat_function quote_sentence second_question longbench2 --data data.json

All variants run in turn on the same items. ``--tasks`` takes names and the sets ruler (the 13), niah, offline (no
essay, no data set), agent (copies and a second question) and longbench2. Essays and questions come from the first place
of ``--texts`` that has them, and rows say which. Prints the scores of all items and of those that the unpruned model
solves; draws the needle map. A run that was stopped goes on with the same command; on several GPUs:

    accelerate launch --num_processes 4 benchmarks/ruler.py --model Qwen/Qwen2.5-7B-Instruct --tasks ruler
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas

from sdtp_lib import checked, plots
from sdtp_lib.commands.arguments import count
from sdtp_lib.data import copying, longbench2, ruler
from sdtp_lib.evaluation.answer_run import (
    Part,
    add_arguments,
    load,
    measured,
    print_failures,
    refuse_failures_alone,
    run_parts,
)
from sdtp_lib.evaluation.answer_tables import answers_table, means_over_tasks
from sdtp_lib.evaluation.answers import FULL
from sdtp_lib.evaluation.items import copying_items, longbench2_items, ruler_items
from sdtp_lib.evaluation.tables import markdown
from sdtp_lib.model_shape import positions
from sdtp_lib.processes import Share

LONGBENCH2 = "longbench2"
CHAT_TOKENS = 64
GROUP = ["dataset", "target_tokens"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "ruler", presets=["keep09"])
    parser.add_argument("--tasks", nargs="+", default=["offline"], metavar="NAME",
                        help=", ".join((*ruler.SETS, "agent", LONGBENCH2, *ruler.TASKS, *copying.TASKS)))  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=count, default=[1024], metavar="TOKENS",
                        help=f"new tokens included: {', '.join(map(str, ruler.LENGTHS))} or others")  # fmt: skip
    parser.add_argument("--limit", type=count, default=12, help="items per task and length")
    parser.add_argument("--texts", nargs="+", default=list(ruler.PLACES), metavar="PLACE",
                        help="of essays and questions, the first that has them: hub, a folder, embedded")  # fmt: skip
    parser.add_argument("--data", default="hub", help="LongBench v2: the official data.json, its folder, or hub")
    parser.add_argument("--no-chat", action="store_true", help="RULER's prompts as lm-eval asks by default")
    parser.add_argument("--seed", type=int, default=0, help="of the items' draws")
    parser.add_argument(
        "--solved-from", type=float, default=1.0, help="the unpruned score from which an item is solved"
    )
    options = parser.parse_args(arguments)
    options.tasks = [task for name in options.tasks for task in (copying.TASKS if name == "agent" else [name])]
    own = (*copying.TASKS, LONGBENCH2)
    try:
        options.ruler = ruler.resolve([name for name in options.tasks if name not in own])
    except ValueError as error:
        parser.error(f"{error} Or {', '.join(('agent', *own))}.")
    checked.share("--solved-from", options.solved_from)
    return options


def measure(options: argparse.Namespace, path: Path, share: Share) -> None:
    for name in options.ruler:
        ruler.task(name)  # says what is not installed before a model is loaded
    model, tokenizer = load(options, share)
    longest, room = max(options.lengths), positions(model)
    if room is not None and longest > room:
        raise ValueError(f"--lengths {longest} is more than the model's {room} positions: leave it out.")

    def part(name: str, length: int) -> Part:
        if name in copying.TASKS:
            return Part(
                f"{name} at {length}",
                lambda: copying.records(name, length, options.limit, tokenizer, seed=options.seed),
                lambda records: copying_items(records, tokenizer),
            )
        return Part(
            f"{name} at {length}",
            lambda: ruler.records(
                name, length, options.limit, tokenizer, places=options.texts, seed=options.seed,
                chat=not options.no_chat,
            ),
            lambda records: ruler_items(records, tokenizer),
        )  # fmt: skip

    chosen = [*options.ruler, *(name for name in copying.TASKS if name in options.tasks)]
    parts = [part(name, length) for length in sorted(options.lengths) for name in chosen]
    if LONGBENCH2 in options.tasks:
        most = longest - longbench2.MAX_NEW_TOKENS - CHAT_TOKENS
        parts.append(Part(
            LONGBENCH2,
            lambda: longbench2.read_records(options.data)[: options.limit],
            lambda records: longbench2_items(records, tokenizer, max_tokens=most),
        ))  # fmt: skip
    run_parts(options, path, share, model, tokenizer, parts)


def two_questions_table(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Scores x 100 of the first and of the second answer, by length and variant."""
    asked = frame.dropna(subset=["first_score"])
    fields = {"first": "first_score", "second": "score", "tau": "compression_ratio"}
    means = {name: (field, "mean") for name, field in fields.items()}
    found = asked.groupby(["target_tokens", "variant"], sort=False).agg(items=("item", "count"), **means)
    found[["first", "second"]] *= 100
    return found.rename(columns={"first": "first question", "second": "second question", "tau": "1/tau"}).reset_index()


def draw_needles(frame: pandas.DataFrame, path: Path) -> None:
    """The needle map of each variant, side by side, beside the rows."""
    needles = frame[frame.dataset.isin(ruler.SETS["niah"]) & frame.answer_depth.notna()]
    if needles.empty:
        return
    with plots.use_style():
        figure = plots.needle_maps({name: needles[needles.variant == name] for name in needles.variant.unique()})
        commits = sorted(set(needles.commit))
        made = {"rows": path.name, "commits": commits, "model": needles.model.iloc[0], "items": len(needles)}
        print(f"picture: {plots.save(figure, path.with_name('needle_map.png'), made)}")
        plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path = options.run_dir / "ruler.jsonl"
    frame = measured(options, path, measure)
    if frame is None:
        return
    refuse_failures_alone(frame)
    done = frame[frame.kind == "item"]
    for column in ("target_tokens", "answer_depth", "text_source"):
        if column not in done:  # rows of LongBench v2 alone
            done = done.assign(**{column: None})
    where = f"score of at least {options.solved_from:g} unpruned"
    print(
        "\nScores x 100; paired difference to full with its 95 % bootstrap interval; of solved items (" + where + ")\n"
    )
    print(markdown(answers_table(done, against=FULL, by=GROUP, solved_from=options.solved_from), digits=2))
    official = done[done.dataset.isin(ruler.TASKS)]
    if not official.empty:
        print(f"\nRULER: mean over tasks ({len(ruler.TASKS)} make the whole benchmark)\n")
        print(markdown(means_over_tasks(official, against=FULL, solved_from=options.solved_from), digits=2))
    if "first_score" in done:
        print("\nThe question by which the prompt was pruned, and another one on the same cache\n")
        print(markdown(two_questions_table(done), digits=1))
    for source, part in done.dropna(subset=["text_source"]).groupby("text_source", sort=False):
        print(f"texts of {', '.join(part.dataset.unique())}: {source}")
    draw_needles(done, path)
    print_failures(frame)
    print(f"rows: {path}")


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
