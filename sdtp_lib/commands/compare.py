"""``compare``: one table and one picture of what each score and method loses and saves on a person's own prompts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.commands import arguments as shared

COLUMNS = {"choice": "choice", "kl_nats": "KL [nats per token]", "same_answers": "same answer",
           "prefill_ms": "prefill [ms]", "prefill_speedup": "speed-up", "kv_share": "KV cache"}  # fmt: skip


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sdtp_lib compare") -> int:
    """Run the command; 0 unless something is refused."""
    parser = shared.parser_of(prog, "Compare every training-free score, the pruners made for this model, and every "
                              "method, on your prompts at the same prefill FLOPs: KL to the unpruned model along its "
                              "own answer, whether the answer stays the same, and prefill time.")  # fmt: skip
    shared.add_model(parser)
    shared.add_prompts(parser)
    shared.add_budget(parser)
    parser.add_argument("--only", "--method", dest="only", nargs="+", default=[], metavar="NAME",
                        help="of all choices these; default: all")  # fmt: skip
    parser.add_argument("--new-tokens", type=shared.count, default=32, help="longest answer")
    parser.add_argument("--repeats", type=shared.count, default=3, help="timed prefills of each choice, in turn")
    parser.add_argument("--answers", action="store_true", help="print every answer that differs")
    parser.add_argument("--out", type=Path, default=Path("sdtp-compare"), metavar="DIR", help="folder of the table, "
                        "the picture and the rows; those of an earlier comparison are replaced")  # fmt: skip
    given = parser.parse_intermixed_args(arguments)  # files may stand after options
    prompts = shared.prompts_of(given)
    shared.check_budget(given.budget)

    from tqdm import tqdm

    from sdtp_lib.evaluation import tables  # first, so that a missing package is said before anything is loaded
    from sdtp_lib.latency import side_by_side as compared

    shared.make_folder("--out", given.out)
    model, tokenizer = shared.load(given)
    ids_of = shared.prompt_ids(prompts, model, tokenizer, given)
    found = compared.choices(model, given.budget)
    if unknown := set(given.only) - {choice.name for choice in found}:
        raise ValueError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(choice.name for choice in found)}.")
    found = [choice for choice in found if not given.only or choice.name in given.only]
    begun = itertools.count()
    with tqdm(total=compared.steps(ids_of, found, given.repeats), unit=" step", leave=False) as bar:

        def progress(text: str) -> None:
            bar.n = next(begun)  # steps before this one: the bar is full when the last has ended
            bar.set_description(text)

        rows = compared.side_by_side(
            model, ids_of, given.budget, found, new_tokens=given.new_tokens, repeats=given.repeats, progress=progress
        )
    lines = compared.summary(rows)
    shown = tables.markdown(tables.pandas.DataFrame([_shown(line) for line in lines]))
    lengths = sorted(map(len, ids_of.values()))
    span = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    text = (
        f"{given.model}, budget {given.budget}, {len(ids_of)} prompt(s) of {span} tokens; KL along the unpruned "
        f"model's answer of up to {given.new_tokens} tokens; prefill medians of {given.repeats}, in turn.\n\n{shown}\n"
    )
    left_out = compared.refusals(rows)
    ran = [choice for choice in found if choice.name not in left_out and choice.kind == "method"]
    # Methods are scaled to the budget's cost: which remark that adds is the same at every speed-up.
    scaled = {choice.name: dataclasses.replace(choice.budget, speedup=2.0).remark for choice in ran}
    remarks = [f"\n{name}: {remark}." for name, remark in scaled.items() if remark]
    text += "".join(remarks) + ("\n" if remarks else "")
    text += "".join(f"\nLeft out: {name}: {reason}" for name, reason in left_out.items()) + ("\n" if left_out else "")
    print(text)
    if given.answers:
        _print_answers(rows, tokenizer)
    _save(given, model, rows, lines, text)
    return 0


def _shown(line: Mapping[str, Any]) -> dict[str, str]:
    values = {
        "choice": line["choice"],
        "kl_nats": f"{line['kl_nats']:.4f}",
        "same_answers": f"{line['same_answers']} of {line['prompts']}",
        "prefill_ms": f"{line['prefill_ms']:,.0f}",
        "prefill_speedup": f"{line['prefill_speedup']:.2f}x",
        "kv_share": f"{line['kv_share']:.0%}",
    }
    return {COLUMNS[name]: value for name, value in values.items()}


def _print_answers(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
    for row in rows:
        if row.get("answer_ids") and (row["kind"] == "unpruned" or not row["same_answer"]):
            answer = tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
            print(f"-- {row['prompt']}, {row['choice']}: {answer}")


def _save(given: Any, model: Any, rows: Sequence[Any], lines: Sequence[Any], text: str) -> None:
    from sdtp_lib.extras import MissingExtra, extra
    from sdtp_lib.records import atomic_write, provenance_of, write_json

    for name in ("compare.png", "compare.json"):  # this comparison may draw no picture
        (given.out / name).unlink(missing_ok=True)
    provenance = provenance_of(model, model_name=given.model, budget=given.budget, repeats=given.repeats)
    with atomic_write(given.out / "compare.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(given.out / "rows.json", {"provenance": provenance, "rows": list(rows)})
    try:
        with extra("study"):
            import pandas

            from sdtp_lib.plots import results, style
    except MissingExtra as missing:
        print(f"table and rows: {given.out}; no picture: {missing}")
        return
    frame = pandas.DataFrame([line for line in lines if line["kind"] != "unpruned"])
    if frame.empty:
        print(f"table and rows: {given.out}")
        return
    with style.use_style():
        ax = results.pareto(frame, x="prefill_ms", y="kl_nats", hue="kind", family="", text="choice")
        style.save(ax.figure, given.out / "compare.png", provenance)
    print(f"table, picture and rows: {given.out}")
