"""Every method at equal prefill FLOPs on the same items: KL, RULER, LongBench, time, cache and memory; resumable.

    python benchmarks/leaderboard.py --params embedded              # hours on a CPU; stop it any time
    python benchmarks/leaderboard.py --params embedded --hours 0.5  # what half an hour gives, balanced over methods
    python benchmarks/leaderboard.py --params embedded --as-measured --method sdtp     # new pruners, or a new method:
                                                                  # on the items that all others have
    python benchmarks/leaderboard.py --report                     # docs/leaderboard.md, figures, README from the rows
    python benchmarks/leaderboard.py --params gpu-llama3.1-8b     # or a YAML file of yours with these arguments
    python benchmarks/leaderboard.py --model FOLDER --name gemma-3-270m --pruners FOLDER     # another model of yours
    accelerate launch --num_processes 4 benchmarks/leaderboard.py --params gpu-qwen3-8b
    torchrun --nproc-per-node 6 benchmarks/leaderboard.py --no-times --run-dir FOLDER --fresh   # six on one GPU
    python benchmarks/leaderboard.py --report --join FOLDER/leaderboard.jsonl    # its answers and KL beside these times

The order is that of `sdtp_lib.leaderboard.plan`: item by item over all methods, 2x first. A fresh clone goes on from
the rows that are committed (``--fresh`` does not). RULER's answers are cut to the length of the right ones. With
``config:`` in the YAML file the model has random weights of these sizes: then only time, cache and memory are measured.
``--model`` beside it takes that model's own weights, and quality is measured too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from sdtp_lib import load_model, methods
from sdtp_lib.commands.arguments import amount, count
from sdtp_lib.data import ruler, ruler_texts
from sdtp_lib.data.test_sets import TEST_SETS
from sdtp_lib.latency import measure as timing
from sdtp_lib.leaderboard import committed, plan
from sdtp_lib.leaderboard.entrants import entrants
from sdtp_lib.leaderboard.measure import Measurement
from sdtp_lib.model_shape import positions
from sdtp_lib.processes import Share, share_files
from sdtp_lib.provenance import scorer_id
from sdtp_lib.records import RowWriter, project_root, provenance_of, read_rows
from sdtp_lib.scorers.found import TRAINING_FREE, scorer_called

PARAMS = Path(__file__).resolve().parent / "params"


def hours(text: str) -> float:
    """For ``type=``: how long; more than no time at all."""
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no time: give hours, such as 0.5")


def values_in(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a YAML file says, by argument."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"{path.name} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"{path.name} does not say arguments by their names, such as `lengths: [1024]`.")
    known = {action.dest for action in parser._actions} - {"help", "params"} | {"config"}
    if unknown := sorted(map(str, set(values) - known)):
        parser.error(f"{path.name}: {unknown[0]!r} is no argument of this command: see --help.")
    config = values.get("config")
    if config is not None and not (isinstance(config, dict) and "model_type" in config):
        parser.error(f"{path.name}: config: {config!r} is no model's: give model_type and sizes.")
    return values


def as_typed(values: Mapping[str, Any], file: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML file's values as a command line, so that they are checked as if they had been typed."""
    actions, typed = {action.dest: action for action in parser._actions}, []
    for name, value in values.items():
        option, nargs = actions[name].option_strings[0], actions[name].nargs
        if value is None:
            continue
        if nargs == 0 and isinstance(value, bool):
            typed += [option] * value
        elif nargs in ("+", "*") and isinstance(value, list):
            typed += [option, *map(str, value)]
        elif nargs is None and not isinstance(value, (list, dict)):
            typed.append(f"{option}={value}")
        else:
            wanted = {0: "true or false", None: "one value"}.get(nargs, "a list")
            parser.error(f"{file}: {name}: {value!r} is not {wanted}.")
    return typed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", metavar="NAME", help=f"of {', '.join(sorted(p.stem for p in PARAMS.glob('*')))}, "
                        "or a YAML file: arguments by their names, with _ for -")  # fmt: skip
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub id. In the place of the model "
                        "that a YAML file names, its random weights (config:) included")  # fmt: skip
    parser.add_argument("--name", default=None, help="what rows, page and files call the model (default: as --model)")
    parser.add_argument("--pruners", default=None, metavar="FOLDER", help="trained pruners for the methods that learn "
                        "(default: those that are found for the weights)")  # fmt: skip
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, auto; default by device")
    parser.add_argument("--lengths", type=count, nargs="+", default=[1024, 4096], help="prompt tokens")
    parser.add_argument("--items", type=amount, nargs="+", default=[24, 12], help="per KL test set, by length")
    parser.add_argument("--ruler-items", type=amount, nargs="+", default=[12, 4], help="per task, by length")
    parser.add_argument("--longbench-items", type=amount, default=12, help="per data set, at the longest length")
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 1.5, 3.0], help="by prefill FLOPs")
    parser.add_argument("--method", "--methods", dest="methods", nargs="+", default=None, metavar="NAME",
                        help="default: all, and the training-free score")  # fmt: skip
    parser.add_argument("--test-sets", nargs="*",
                        choices=TEST_SETS, default=list(plan.KL_TEST_SETS), help="KL test sets")  # fmt: skip
    parser.add_argument("--tasks", nargs="*", default=["ruler"], metavar="NAME", help="RULER's tasks or sets of them")
    parser.add_argument("--texts", nargs="+", default=[ruler_texts.EMBEDDED], help="places of RULER's essays: hub, "
                        "a folder, embedded")  # fmt: skip
    parser.add_argument("--longbench", default=None, metavar="FOLDER", help="of LongBench v1's files; without it left "
                        "out")  # fmt: skip
    parser.add_argument("--datasets", nargs="+", default=["multi_news"], help="of LongBench")
    parser.add_argument("--hours", type=hours, default=None, help="stop before the item that would begin later")
    parser.add_argument("--no-times", action="store_true", help="leave prefill times out of the rows: for several "
                        "processes on one GPU")  # fmt: skip
    parser.add_argument("--threads", type=count, default=None, help="CPU threads; rows of one file have one number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=None, help="default data/results/leaderboard, or -PARAMS, with "
                        "--model -NAME")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="do not go on from the committed rows")
    parser.add_argument("--as-measured", action="store_true", help="just the items, lengths and speed-ups that there "
                        "are rows of, whatever else is asked for: for a new method, or new pruners")  # fmt: skip
    parser.add_argument("--new-only", action="store_true", help="leave out what the committed rows have without times "
                        "from another device: answers and KL that stand in the tables already")  # fmt: skip
    parser.add_argument("--join", type=Path, nargs="+", default=[], metavar="FILE", help="rows that other machines "
                        "measured with --no-times: the report has them too")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="write page, picture, rows and README's lines; compute "
                        "nothing")  # fmt: skip
    parser.add_argument("--report-after", action="store_true", help="measure, then as --report")
    parser.add_argument("--tables", action="store_true", help="print the page, write and compute nothing")
    parser.set_defaults(config=None)
    typed = parser.parse_known_args(arguments, argparse.Namespace(model=None))[0]  # None unless --model is given
    if named := typed.params:
        path = Path(named) if Path(named).suffix in (".yaml", ".yml") else PARAMS / f"{named}.yaml"
        if not path.is_file():
            parser.error(f"--params {named}: there is no {path}.")
        values = values_in(path, parser)
        if typed.model is not None:  # what the file says of its own model is not true of another one
            values = {name: value for name, value in values.items() if name not in ("config", "name")}
        parser.set_defaults(config=values.pop("config", None))
        arguments = [*as_typed(values, path.name, parser), *(sys.argv[1:] if arguments is None else arguments)]
    options = parser.parse_args(arguments)
    called = path.stem if named and typed.model is None else options.name or options.model
    if missing := [file for file in options.join if not file.is_file()]:
        parser.error(f"--join {missing[0]}: there is no such file.")
    if options.as_measured and options.config is not None:
        parser.error("--as-measured: a model of random weights has no items: name --lengths and --items.")
    options.name = options.name or options.model
    options.run_dir = options.run_dir or project_root() / "data" / "results" / f"leaderboard{committed.suffix(called)}"
    try:
        options.tasks = ruler.resolve(options.tasks)
    except ValueError as error:
        parser.error(str(error))
    known = [*methods.names(), TRAINING_FREE]
    if unknown := [name for name in options.methods or () if name not in known]:
        parser.error(f"--method {unknown[0]} is none of {', '.join(known)}; how fast say --speedups.")
    if not all(1 < speedup < math.inf for speedup in options.speedups):
        parser.error(f"--speedups {options.speedups}: each is more than 1.")
    return options


def sizes(options: argparse.Namespace) -> list[plan.Sizes]:
    """How much at each length; the last number given stands for the lengths after it."""

    def at(values: list[int], place: int) -> int:
        return values[min(place, len(values) - 1)]

    longest = max(options.lengths)
    return [
        plan.Sizes(length, at(options.items, n), at(options.ruler_items, n),
                   options.longbench_items if length == longest and options.longbench else 0)
        for n, length in enumerate(options.lengths)
    ]  # fmt: skip


def random_model(fields: dict[str, Any], dtype: str | None, device: Any) -> Any:
    """A model of these sizes with random weights, made on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=kind)
    return model.requires_grad_(False).eval()


def untrained_pruners(model: Any) -> Any:
    """Pruners of the right sizes: what scoring costs is then real."""
    from sdtp_lib import PruningConfig, TokenPruners

    text = model.config.get_text_config()
    layers = PruningConfig.preset("keep09", text.num_hidden_layers).layers
    return TokenPruners(hidden_size=text.hidden_size, layers=layers).to(model.device, model.dtype).eval()


def measure(options: argparse.Namespace, path: Path, share: Share) -> None:
    random = options.config is not None
    with timing.threads(options.threads) as threads:
        if random:
            model, tokenizer = random_model(options.config, options.dtype, share.device), None
        else:
            model, tokenizer = load_model(options.model, dtype=options.dtype, device=share.device)
        most = positions(model)
        if most and max(options.lengths) > most and not options.as_measured:
            raise ValueError(f"--lengths {max(options.lengths)}: the model has {most} positions.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which method has no pruners of its own stands in its rows
            pruners = scorer_called(options.pruners, model) if options.pruners else None
            pruners = untrained_pruners(model) if random else pruners
            left_out: dict[str, str] = {}
            found = entrants(model, options.methods, pruners=pruners, left_out=left_out)
        if share.is_first:
            for name, why in left_out.items():
                print(f"left out: {name}: {why}", file=sys.stderr)
        stamp = provenance_of(
            model, model_name=options.name, seed=options.seed, weights="random, true sizes" if random else None,
            threads=threads if model.device.type == "cpu" else None,
        )  # fmt: skip
        scorers = {each.name: scorer_id(each.scorer) for each in found}
        if options.report_after and share.is_first:
            report_root(options, stamp)  # said before the hours, not after them
        start_from_committed(options, path, share, stamp, scorers)
        kept = committed.read_committed(committed.path_of(options.name)) if options.new_only else []
        elsewhere = [
            row for row in kept if committed.of_other_device(row, stamp) and committed.of_scorers(row, scorers)
        ]
        measured = None
        if options.as_measured:
            rows = read_rows(path) if path.exists() else []
            rows = committed.read_committed(committed.path_of(options.name)) + rows
            same = [row for row in rows if committed.of_one_origin(row, stamp) or committed.of_other_device(row, stamp)]
            measured = plan.Measured(same, [each.name for each in found])
        chosen = sizes(options) if measured is None else measured.sizes()
        items = None if random else plan.Items(
            tokenizer, chosen, seed=options.seed, texts=options.texts, folder=options.longbench)  # fmt: skip
        steps = planned(options, chosen, items, measured)
        ends_at = time.monotonic() + 3600 * options.hours if options.hours else None
        with share.rows(path, stamp) as writer:
            rows = read_rows(path) if path.exists() else []
            work = Measurement(model, tokenizer, found, writer, rows, left_out=left_out, times=not options.no_times,
                               elsewhere=elsewhere)  # fmt: skip
            model(torch.arange(8, device=model.device)[None])  # what only a process's first forward pays
            bar = tqdm(share.of(steps), unit="item", desc="leaderboard", mininterval=10, disable=not share.is_first)
            for step in bar:
                if ends_at is not None and time.monotonic() > ends_at:
                    print(f"--hours {options.hours:g} are over: the same command goes on from here.", file=sys.stderr)
                    break
                bar.set_postfix_str(f"{step.test_set} at {step.length}, {step.speedup:g}x")
                timed = step.sort in (plan.TIME, plan.MEMORY)
                item = None if timed else items.of(step)
                if item is not None or timed:
                    work.run(step, item)
        if items is not None and share.is_first:
            for test_set, why in items.missing.items():
                print(f"left out: {test_set}: {why}", file=sys.stderr)


def planned(
    options: argparse.Namespace, chosen: list[plan.Sizes], items: plan.Items | None, measured: plan.Measured | None
) -> list[plan.Step]:
    """All steps in their order; with ``measured`` those alone that there are rows of."""
    if measured is None:
        if items is None:
            return plan.timing_steps(chosen, options.speedups)
        datasets = options.datasets if options.longbench else ()
        return plan.steps(chosen, options.speedups, test_sets=options.test_sets, tasks=options.tasks, datasets=datasets)
    found, lacking = measured.steps(items)
    if not found:
        raise ValueError(f"--as-measured: there are no rows of {options.name} yet: name --lengths and --items.")
    where = dict.fromkeys(f"{step.speedup:g}x at {step.length}" for step in found)
    print(f"as measured: {len(found)} steps, {', '.join(where)}", file=sys.stderr)
    if lacking:
        print(f"as measured: {lacking} that there are rows of cannot be made here (other texts, or no --longbench)",
              file=sys.stderr)  # fmt: skip
    return found


def start_from_committed(
    options: argparse.Namespace, path: Path, share: Share, stamp: dict[str, Any], scorers: dict[str, str | None]
) -> None:
    """Lay down the repository's rows that this run does not have yet and that are of this model and device, and of the
    scorers of this run (method -> id): rows of pruners that shipped before are measured again. Those of methods that
    this run does not measure are laid down as they are."""
    if options.fresh or not share.is_first:
        return
    # A run of several processes that was stopped has left its last rows in files beside it.
    files = [*share_files(path), *([path] if path.exists() else [])]
    known = {row["key"] for file in files for row in read_rows(file)}
    rows = [row for row in committed.read_committed(committed.path_of(options.name))
            if row["key"] not in known and committed.of_one_origin(row, stamp)
            and committed.of_scorers(row, scorers)]  # fmt: skip
    if rows:
        with RowWriter(path, {}) as writer:
            for row in rows:
                writer._append(row)
        print(f"goes on from {len(rows)} committed rows", file=sys.stderr)


def rows_beside(files: list[Path]) -> list[dict[str, Any]]:
    """The rows of ``--join``."""
    found = []
    for file in files:
        for row in read_rows(file):
            if lacking := [name for name in ("key", "kind", "method", "length", "speedup") if name not in row]:
                raise ValueError(f"--join {file}: row {row.get('key')!r} is none of a leaderboard: no {lacking[0]}.")
            found.append(row)
    return found


def report_root(options: argparse.Namespace, first: Mapping[str, Any], *, say: bool = True) -> Path:
    """Where the report of rows like ``first`` goes: the repository, or the run's own folder, where the
    repository has rows of their model that these would push out (another device's times)."""
    path = committed.path_of(first["model"])
    if not (lost := committed.of_other_origin(committed.read_committed(path), [first])):
        return project_root()
    if not say:
        return options.run_dir
    device = lost[0].get("device_name") or lost[0].get("device")
    print(
        f"{path.name} has {len(lost)} rows of {device}, with their times: page, picture and rows of this run go to "
        f"{options.run_dir}. To join answers and KL to those, measure with --no-times, then --report --join.",
        file=sys.stderr,
    )
    return options.run_dir


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path, share = options.run_dir / "leaderboard.jsonl", Share()
    if not (options.report or options.tables):
        measure(options, path, share)
    if not share.is_first:
        return
    rows = read_rows(path) if path.exists() else committed.read_committed(committed.path_of(options.name))
    if not rows:
        raise ValueError(f"there are no rows in {path}.")
    if beside := rows_beside(options.join):
        whole = committed.joined(beside, rows)
        print(f"{len(whole) - len(rows)} of {len(beside)} rows of --join are joined: without times, of this model, of "
              "the same scorers, not measured here", file=sys.stderr)  # fmt: skip
        rows = whole
    if (options.report or options.report_after) and not options.tables:
        from leaderboard_report import write_report

        print(write_report(rows, report_root(options, rows[0], say=options.report)))  # else `measure` has said it
    else:
        from sdtp_lib.leaderboard import page

        print(page.page(rows))
    print(f"rows: {path}")


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
