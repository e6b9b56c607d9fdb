"""Result rows of a run as tables: what README and the sweep report show. Views only; nothing is measured here.

Rows of a known kind go through the library's own summaries (`latency_report`, `evaluation_tables`); rows of any other
kind are averaged over what varies least. A table keeps where its rows come from.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.provenance import called
from sdtp_lib.records import markdown_table, provenance_of, read_rows

# What says where a row comes from, and so never is a result.
ORIGIN = {
    "schema_version", "key", "kind", "notebook", "folder", "scorer_id", "sample_hash", "config_hash", *provenance_of()
}  # fmt: skip
AT_MOST_GROUPS = 12
RESULTS = "data/results/"
# Numbers that a run is given, not measures.
SETTINGS = {"prompt_tokens", "keep_ratio", "new_tokens", "threads", "salient_above", "top_share"}


BOLD = re.compile(r"^\*\*(.*)\*\*$")
PLACES = {"prompt", "new tokens"}  # numbers that name a row
WIDEST = 11  # columns that fit a page of 1280 pixels


def run_name(given: str) -> str:
    """A run's name under data/results/, from the name or from the path that a shell completes to."""
    return str(Path(given)).removeprefix(RESULTS)


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: text cells, first row the header, and a sentence on where the numbers come from."""

    name: str
    title: str
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    note: str

    def markdown(self) -> str:
        """GitHub's Markdown, the note under it; the note alone where there are no columns."""
        if not self.header:
            return self.note
        return "\n".join([markdown_table(self.header, self.body), "", self.note])

    def html(self) -> str:
        """A heading, a table and its note, escaped."""
        title, note = html.escape(self.title), html.escape(self.note)
        return f"<h3>{title}</h3>{''.join(map(self._table, self._parts()))}<p class=note>{note}</p>"

    def _parts(self) -> list[list[int]]:
        """The columns of each table that is shown: a wide one is cut, the columns that name its rows repeated."""
        columns = list(range(len(self.header)))
        if len(columns) <= WIDEST:
            return [columns]
        numbers = [i for i in columns if i and self.header[i] not in PLACES]
        named = next((i for i in numbers if all(_is_number(row[i]) for row in self.body)), 1)
        named = min(named, WIDEST // 2)
        rest, step = columns[named:], WIDEST - named
        return [columns[:named] + rest[i : i + step] for i in range(0, len(rest), step)]

    def _table(self, columns: Sequence[int]) -> str:
        head = "".join(f"<th>{html.escape(self.header[i])}</th>" for i in columns)
        cells = [[BOLD.sub(r"<b>\1</b>", html.escape(row[i])) for i in columns] for row in self.body]
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Table:
        """The table that `to_dict` wrote."""
        body = tuple(tuple(row) for row in values["body"])
        return cls(**{**values, "header": tuple(values["header"]), "body": body})


def rows_of(run: Path) -> list[dict[str, Any]]:
    """All rows of notebooks under a run's folder, each with its notebook and the folder (the sweep's cell) it lies in.

    What a notebook's own tools write beside them (`heldout.jsonl` of a training run) has no number and is left out. So
    are rows of a folder whose notebook has no stamp, where `make study` began it there or stamped it in another folder:
    it was not finished, or is no cell of the sweep any more. A run without any stamp was made by hand: all rows count.
    """
    stamped = {(path.parent.parent, path.name[:3]) for path in run.rglob(".stamps/*.json")}
    elsewhere = {number for _, number in stamped}
    rows, unfinished = [], set(unfinished_of(run)) if stamped else set()
    for path in sorted(run.rglob("[0-9][0-9]_*.jsonl")):
        folder = path.parent.relative_to(run).as_posix()
        number = path.name[:3]  # what a notebook writes begins with its number, whatever the rest
        if (path.parent, number) not in stamped and (number in elsewhere or (folder, number) in unfinished):
            continue
        rows += [{**row, "notebook": path.stem, "folder": "" if folder == "." else folder} for row in read_rows(path)]
    return rows


def stamps_of(run: Path) -> list[dict[str, Any]]:
    """What the runner wrote of each finished notebook: parameters, seconds, commit, executed copy."""
    return [
        {**json.loads(path.read_text(encoding="utf-8")), "folder": path.parent.parent.relative_to(run).as_posix()}
        for path in sorted(run.rglob(".stamps/*.json"))
    ]


def unfinished_of(run: Path) -> dict[tuple[str, str], str]:
    """(folder, number such as ``04_``) -> name of each notebook that `make study` began and that has no stamp yet, with
    its folder where that is a sweep's cell."""
    found = {}
    for path in sorted(run.rglob(".stamps/*.begun")):
        if not path.with_name(path.read_text(encoding="utf-8").strip()).is_file():
            folder = path.parent.parent.relative_to(run).as_posix()
            found[folder, path.stem[:3]] = path.stem if folder == "." else f"{path.stem} [{folder}]"
    return found


def refuse_unfinished(run: Path) -> None:
    """Raise `FileNotFoundError`, naming them, where notebooks of a run were begun and are not finished."""
    if left := unfinished_of(run):
        raise FileNotFoundError(
            f"data/results/{run.name}: {', '.join(left.values())} failed or is not finished: run `make study` first."
        )


def by_folder(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the folder (the sweep's cell) they lie in: another model, seed or setting, so never averaged together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("folder") or "", []).append(row)
    return found


def origin(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on model, device, versions and commit of rows; where they differ, all values are named."""

    def values(name: str) -> str:
        found = dict.fromkeys(called(str(row[name])) for row in rows if row.get(name) is not None)
        return "/".join(found)

    weights = f" ({values('weights')})" if values("weights") else ""
    what = [values("model") + weights, values("device"), values("dtype")]
    versions = [f"{name} {values(name)}" for name in ("torch", "transformers", "commit", "seed") if values(name)]
    dates = sorted({str(row["utc"])[:10] for row in rows if row.get("utc")})
    when = f"measured {dates[0]}" + (f" to {dates[-1]}" if dates[1:] else "") if dates else ""
    return "; ".join(filter(None, [", ".join(filter(None, what)), ", ".join(versions), when])) + "."


def latency_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Prefill, decode and end to end beside the limit, one line per prompt length and method.

    Where rows lie in several folders, or differ in how many tokens were generated, each line says which.
    """
    from sdtp_lib.latency.report import several_new_tokens, summary

    rows = [row for row in rows if row.get("kind") == "latency"]
    if not rows:
        return None
    generated = "/".join(map(str, sorted({row["new_tokens"] for row in rows if row.get("new_tokens")})))
    cells = by_folder(rows)
    lines = [(folder, line) for folder, own in cells.items() for line in summary(own)]
    folders, several = len(cells) > 1, several_new_tokens(line for _, line in lines)
    header = (
        *(["folder"] if folders else []), "prompt", *(["new tokens"] if several else []), "method",
        "prefill ms", "prefill speed-up", "limit", "share of the limit",
        f"decode ms ({generated} tokens)", "end to end ms", "end-to-end speed-up", "KV cache", "1/tau",
    )  # fmt: skip
    body = []
    for folder, line in lines:
        place = [*([folder] if folders else []), f"{line['prompt_tokens']:,}"]
        place += [*([str(line["new_tokens"] or "")] if several else []), line["method"]]
        if line["status"] != "ok":
            body.append((*place, line["status"], *[""] * (len(header) - len(place) - 1)))
            continue
        body.append((
            *place, number(line["prefill_ms"]),
            times(line.get("prefill_speedup")), times(line.get("prefill_limit")),
            number(line.get("prefill_share_of_limit")), number(line.get("decode_ms")),
            number(line.get("end_to_end_ms")), times(line.get("end_to_end_speedup")),
            f"-{line['kv_reduction_percent']:.0f} %" if line.get("kv_reduction_percent") else "",
            number(line.get("compression_ratio")),
        ))  # fmt: skip
    repeats = sorted({line["repetitions"] for _, line in lines})
    note = (
        f"Medians of {'/'.join(map(str, repeats))} repetitions taken in turn; a speed-up is the median of ratios to "
        "the unpruned run of the same turn. "
    )
    return Table("latency", "Time by prompt length", header, tuple(body), note + origin(rows))


def scorer_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """KL to the unpruned model by scorer, one line per data set and budget; the best of each line is marked."""
    import pandas

    from sdtp_lib.evaluation.tables import scorer_summary

    rows = [row for row in rows if row.get("kind") == "scorer"]
    if not rows:
        return None
    by = [*(["folder"] if len(by_folder(rows)) > 1 else []), "cell", "setting"]
    lines = scorer_summary(pandas.DataFrame(rows), by=by)
    scorers = list(dict.fromkeys(lines.scorer))
    body = []
    for place, part in lines.groupby(by, sort=False):
        values = dict(zip(part.scorer, part.kl_nats, strict=True))
        best = min((value for value in values.values() if not math.isnan(value)), default=None)
        shown = [f"**{values[s]:.3f}**" if values.get(s) == best else number(values.get(s), 3) for s in scorers]
        body.append((*map(str, place), str(int(part["items"].iloc[0])), *shown))
    lengths = sorted({int(row["prompt_tokens"]) for row in rows if row.get("prompt_tokens")})
    span = f" Prompts of {' to '.join(f'{n:,}' for n in sorted({lengths[0], lengths[-1]}))} tokens." if lengths else ""
    note = (
        "KL to the unpruned model's next-token distributions, nats per token, lower is better; the best is bold."
        f"{span} "
    )
    header = (*by[:-2], "data", "budget", "items", *scorers)
    return Table("scorers", "How far the output moves, by scorer", header, tuple(body), note + origin(rows))


def other_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Rows of every other kind: means of their numbers over the fields that tell groups of rows apart."""
    import pandas

    tables = []
    kinds = dict.fromkeys(
        (row["notebook"], row["kind"]) for row in rows if row.get("kind") not in ("latency", "scorer")
    )
    for notebook, kind in kinds:
        own = [row for row in rows if (row["notebook"], row.get("kind")) == (notebook, kind)]
        frame = pandas.DataFrame([{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in own])
        fields = [name for name in frame if name not in ORIGIN]
        settings = [name for name in fields if name.startswith("pruning_") or name in SETTINGS]
        measured = [name for name in fields if name not in settings and pandas.api.types.is_numeric_dtype(frame[name])]
        names = [name for name in fields if name not in measured and name not in settings]
        # What names single items is averaged over.
        names = [name for name in names if frame[name].nunique() * 2 <= len(frame)]
        groups = [name for name in [*settings, *names] if 1 < frame[name].nunique() <= AT_MOST_GROUPS]
        if not measured:
            continue
        groups = (["folder"] if frame.folder.nunique() > 1 else []) + groups[:4]
        body = tuple(
            (*map(str, named), *(mean(part[name]) for name in measured)) for named, part in _grouped(frame, groups)
        )
        header = tuple(name.replace("_", " ") for name in [*groups, *measured])
        tables.append(
            Table(f"{notebook}-{kind}", f"{notebook}: {kind}", header, body, f"Means of {len(own)} rows. {origin(own)}")
        )
    return tables


def _grouped(frame: Any, groups: Sequence[str]) -> list[tuple[tuple, Any]]:
    return list(frame.groupby(list(groups), sort=False)) if groups else [((), frame)]


def mean(values: Any) -> str:
    """The mean of a column as a cell; a flag reads ``yes``, ``no`` or how many of how many."""
    values = values.dropna()
    if len(values) and values.map(lambda value: isinstance(value, bool)).all():
        true = int(values.sum())
        return {0: "no", len(values): "yes"}.get(true, f"{true} of {len(values)}")
    return number(float(values.mean()) if len(values) else None, 4)


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[*]{0,2}[-+]?[\d.,]+(?:x| %)?[*]{0,2}|yes|no|\d+ of \d+|", cell))


def number(value: Any, digits: int = 2) -> str:
    """A number short enough for a table; empty where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """A ratio as ``1.67x``."""
    return "" if value is None or math.isnan(value) else f"{value:.2f}x"
