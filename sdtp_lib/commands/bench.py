"""``bench``: prefill and decode time by preset and prompt length, measured in turn; a door to `latency.run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdtp_lib.commands import arguments as shared
from sdtp_lib.config import PRESETS, PruningConfig


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sdtp_lib bench") -> int:
    """Run the command; 0 unless something is refused."""
    parser = shared.parser_of(prog, "Time the unpruned model and each preset in turn and print medians beside the "
                              "limit by FLOPs. Rows are kept: the same command goes on after a kill. Nothing else "
                              "should run on the machine meanwhile.")  # fmt: skip
    shared.add_model(parser)
    parser.add_argument("--presets", nargs="+", default=["keep09", "keep08", "keep07"], metavar="PRESET",
                        help=", ".join(PRESETS))  # fmt: skip
    parser.add_argument("--method", type=shared.method_of, nargs="+", default=[], metavar="NAME",
                        help="timed too, in turn with the presets: " + shared.METHOD_HELP)  # fmt: skip
    parser.add_argument("--lengths", type=shared.count, nargs="+", default=[1024, 2048, 4096], metavar="T",
                        help="prompt tokens")  # fmt: skip
    parser.add_argument("--new-tokens", type=shared.count, default=64, help="generated, the prefill's included")
    parser.add_argument("--repeats", type=shared.count, default=3, help="measured repetitions")
    parser.add_argument("--scorer", metavar="NAME", help="as in `generate`: its time is part of the prefill")
    parser.add_argument("--out", type=Path, default=Path("sdtp-bench"), metavar="DIR", help="folder of the rows")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.presets if name not in PRESETS]:
        raise ValueError(f"--presets {' '.join(unknown)}: choose among {', '.join(PRESETS)}.")
    shared.make_folder("--out", given.out)
    from sdtp_lib.latency import report  # first, so that a missing package is said before anything is loaded

    model, _ = shared.load(given)

    import torch
    from tqdm import tqdm

    from sdtp_lib.latency import run, variants
    from sdtp_lib.model_shape import ModelShape, positions
    from sdtp_lib.pruning.stage import name_of
    from sdtp_lib.records import RowWriter, provenance_of, read_rows
    from sdtp_lib.scorers.found import default_scorer, scorer_called

    most, longest = positions(model), max(given.lengths) + given.new_tokens - 1
    if most and longest > most:
        raise ValueError(f"--lengths {max(given.lengths)} with --new-tokens {given.new_tokens} is more than the "
                         f"model's {most} positions: give less.")  # fmt: skip
    layers = ModelShape.from_model(model).num_layers
    configs = [PruningConfig.preset(name, layers) for name in given.presets]
    if given.scorer is None:
        scorer, why = default_scorer(model, sorted({layer for config in configs for layer in config.layers}))
        print(f"scorer: {name_of(scorer)}" + (f" ({why})" if why else ""))
    else:
        scorer = scorer_called(given.scorer, model)
    threads = torch.get_num_threads() if model.device.type == "cpu" else None
    writer = RowWriter(given.out / "bench.jsonl", provenance_of(model, model_name=given.model, seed=0, threads=threads))
    with writer, tqdm(unit=" run") as bar:
        run.run(
            model, writer,
            lambda tokens: variants.presets(model, scorer, given.presets)
            + variants.named(model, given.method, tokens, scorer),
            given.lengths,
            new_tokens=given.new_tokens, repeats=given.repeats, progress=run.progress_on(bar),
        )  # fmt: skip
    rows = [row for row in read_rows(writer.path) if row.get("kind") == "latency"]
    asked = [row for row in rows if row["prompt_tokens"] in given.lengths and row["new_tokens"] == given.new_tokens]
    others = len(rows) - len(asked)
    print(report.markdown(asked))
    more = f" ({others} more there, of other prompt lengths or numbers of new tokens, are not shown)" if others else ""
    print(f"rows: {writer.path}{more}")
    return 0
