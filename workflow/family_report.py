"""The sweep's rows as a support matrix: four counts, docs/support.md, a block of docs/results.md, and the
list that `verify` trusts.

A view of rows; nothing is asked here. A family is a ``model_type`` with all of its variants (``falcon:alibi``).
"""

from __future__ import annotations

import collections
import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import tables
from family_checks import ENGINE
from family_labels import LABEL_NAMES
from family_models import BACKENDS
from family_subject import ERROR, REFUSED, RIGHT, UNASKED, UNBUILT, UNPROVEN, WRONG
from result_tables import Table

from sdtp_lib.records import markdown_table, project_root, write_json

WORKS = "works"
# A family is what its worst row makes of it, in this order; the first four are the counts of the sweep.
STATES = (WRONG, ERROR, WORKS, REFUSED, UNPROVEN, UNBUILT)
SUPPORTED = "sdtp_lib/pruning/supported.json"
MATRIX = "docs/support.md"
SHOWN = 160  # characters of a reason

# Families that most readers look for, for that block.
FAMILIAR = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt_oss",
    "deepseek_v3", "olmo2", "smollm3", "gpt2", "falcon", "bloom", "mamba", "qwen3_next",
)  # fmt: skip

_HEAD = """# Which models are pruned exactly

`make sweep` writes this page. Every class of transformers' causal-LM mapping that can be built from a tiny
configuration is asked, with random weights in float64: prefill, eight decode steps, a second turn on the pruned cache
and a padded batch must equal the same model at full length with the dropped tokens masked, and keep ratio 1.0 the plain
model bit for bit. `scorers.attention` is held against `output_attentions`, labels against an explicit bias in each
layer's mask, FLOPs against what torch counts.

**Works**: all that was right, on the backends named. What is not in this list, or runs with another backend or version,
is checked on the model itself at its first `with` (`verify="auto"`).
"""

_LEGEND = """
## Families

A line for each, then its variants (`falcon:alibi`). Cells of the last three columns: **yes**; **-** (nothing was
asked); else a number that names the reason below the table. Not asked: the plain model does not agree with itself, with
padding or out of its cache, so there is nothing to hold pruning against.
"""


class Report:
    """What the rows of one sweep say."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.families: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            self.families.setdefault(row["family"].split(":")[0], []).append(row)
        self._notes: dict[str, int] = {}

    @functools.cached_property
    def state(self) -> dict[str, str]:
        """Family -> one of `STATES`."""
        return {family: _state(rows) for family, rows in self.families.items()}

    @functools.cached_property
    def count(self) -> collections.Counter[str]:
        """`STATES` -> number of families."""
        return collections.Counter(self.state.values())

    def summary(self) -> str:
        """The four counts, what else there is, and every row that must be mended."""
        first = ", ".join(f"{self.count[state]} {state}" for state in (WORKS, REFUSED, WRONG, ERROR))
        rest = ", ".join(f"{self.count[state]} {state}" for state in (UNPROVEN, UNBUILT) if self.count[state])
        bad = [
            f"{row['outcome']}: {row['family']}, {row['backend']}, {row['check']}: {row['detail']}"
            for row in self.rows
            if row["outcome"] in (WRONG, ERROR)
        ]
        return "\n".join([*bad, f"{len(self.families)} families: {first}" + (f" ({rest})" if rest else "")])

    def trusted(self) -> dict[str, list[str]]:
        """``"model_type Class"`` -> backends on which everything asked of the engine was right, in all variants."""
        asked: dict[str, dict[str, list[str]]] = {}
        for (_, backend), rows in _grouped(self.rows, "family", "backend").items():
            built = next((row for row in rows if row["check"] == "build" and row["outcome"] == RIGHT), None)
            if built is None:
                continue
            engine = {row["check"]: row["outcome"] for row in rows if row["check"] in (*ENGINE, "end")}
            right = engine.get("exact") == engine.get("prefill") == engine.get("decode") == RIGHT
            right &= set(engine.values()) <= {RIGHT, UNASKED, "done"}
            key = f"{built['model_type']} {built['class']}"
            asked.setdefault(key, {}).setdefault(backend, []).append(right)
        found = {key: sorted(b for b, rights in backends.items() if all(rights)) for key, backends in asked.items()}
        return {key: backends for key, backends in sorted(found.items()) if backends}

    def write(self) -> None:
        """The list that ships, and of the newest version in it also docs/support.md and the pages' block."""
        root, versions = project_root(), self.rows[0]
        version = ".".join(versions["transformers"].split(".")[:2])
        shipped = root / SUPPORTED
        known = json.loads(shipped.read_text(encoding="utf-8")) if shipped.exists() else {}
        swept = {name: versions[name] for name in ("transformers", "torch")} | {s: self.count[s] for s in STATES}
        known = {
            "swept": _by_version({**known.get("swept", {}), version: swept}),
            "works": _by_version({**known.get("works", {}), version: self.trusted()}),
        }
        write_json(shipped, known)
        if version != list(known["works"])[-1]:
            return
        (root / MATRIX).parent.mkdir(exist_ok=True)
        (root / MATRIX).write_text(self.matrix(known["swept"]), encoding="utf-8")
        store = root / tables.STORE
        kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
        kept["support"] = self.table(known["swept"]).to_dict()
        write_json(store, dict(sorted(kept.items())))
        tables.main(["--render-only"])

    def table(self, swept: dict[str, dict[str, Any]]) -> Table:
        """The block of docs/results.md: each version's counts, and what became of the best-known families."""
        named = collections.defaultdict(list)
        for family in FAMILIAR:
            named[self.state.get(family, UNBUILT)].append(family)
        known = "; ".join(f"{state}: {', '.join(named[state])}" for state in STATES if named[state])
        note = (
            f"Among them {known}. [{MATRIX}](support.md) has a line for each family, with the reason where it is "
            "refused."
        )
        return Table("support", "Families", COUNTED, _counts(swept), note)

    def matrix(self, swept: dict[str, dict[str, Any]]) -> str:
        """The page with a line for each family and variant."""
        self._notes = {}
        lines = [_HEAD, markdown_table(COUNTED, _counts(swept)), _LEGEND]
        body = []
        for (name,), rows in sorted(_grouped(self.rows, "family").items()):
            pruning = self._pruning(rows)
            of_kept = [self._cell(rows, names, pruning.startswith(REFUSED)) for names in (("attention",), LABEL_NAMES)]
            body.append((name, pruning, *of_kept, self._cell(rows, ("flops",))))
        lines.append(markdown_table(("model", "pruning", "attention score", "labels", "FLOPs"), body))
        lines += ["", *(f"{number}. {reason}" for reason, number in self._notes.items())]
        return "\n".join(lines) + "\n"

    def _pruning(self, rows: list[dict[str, Any]]) -> str:
        """Where it works, and in words what else came out."""
        works, reasons = [], dict[str, None]()
        for backend in BACKENDS:
            here = [row for row in rows if row["backend"] == backend]
            if any("does not support an attention implementation" in row["detail"] for row in here):
                continue
            asked = [row for row in here if row["check"] in ("entry", *ENGINE, "end") and row["outcome"] != "done"]
            worst = _worst(asked or [row for row in here if row["check"] == "build"])
            if any(row["check"] == "decode" and row["outcome"] == RIGHT for row in asked):
                works.append(backend)
            if worst and worst["outcome"] != RIGHT:
                place = f"{worst['check']} " if worst["outcome"] == UNASKED or backend in works else ""
                reasons[f"{place}{worst['outcome']}: {_reason(worst)}"] = None
        return "; ".join([f"**works** ({', '.join(works)})"] * bool(works) + list(reasons)) or "-"

    def _cell(self, rows: list[dict[str, Any]], checks: tuple[str, ...], refused: bool = False) -> str:
        rows = [row for row in rows if row["check"] in checks]
        worst = _worst(rows)
        if worst is None or worst["outcome"] == RIGHT:
            return "yes" if worst else "-"
        if refused and worst["outcome"] == REFUSED:
            return "-"
        bad = {(row["backend"], row["check"]) for row in rows if row["outcome"] != RIGHT}
        number = self._notes.setdefault(f"{worst['outcome']}: {_reason(worst)}", len(self._notes) + 1)
        return f"{'partly ' if len(bad) < len(rows) else ''}{worst['outcome']} ({number})"


COUNTED = ("transformers", "torch", *STATES)


def _counts(swept: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(str(counts[name]) for name in COUNTED) for counts in reversed(swept.values()))


def _by_version(values: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    order = [WRONG, ERROR, REFUSED, UNPROVEN, UNASKED, UNBUILT, RIGHT]
    return min(rows, key=lambda row: order.index(row["outcome"]), default=None)


def _reason(row: dict[str, Any]) -> str:
    """A row's detail without the family's own names and figures, so that families share it."""
    text = re.sub(r"^ValueError: |^said: | \(model_type=[^)]*\)| with attn_implementation='\w+'", "", row["detail"])
    text = re.sub(r"^[\w-]+ layer (\d+) \(\w+\)", r"layer \1", text)
    text = re.sub(r"^[A-Z]\w+(ForCausalLM|LMHeadModel|Generation|LM|Model|Layer|Block)\b:? (is )?", "", text)
    text = re.sub(r"(?<=layer \d) \([A-Z]\w+\)| by [\d.]+e[+-]\d+$", "", text)
    text = re.split(r": (?:use|see|its FLOPs|give) |, so its inputs|\. Try ", text)[0]
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rsplit(' ', 1)[0]} ..."


def _state(rows: list[dict[str, Any]]) -> str:
    outcomes = {row["outcome"] for row in rows}
    for state in (WRONG, ERROR):
        if state in outcomes:
            return state
    engine = [row for row in rows if row["check"] in ("entry", *ENGINE)]
    for backend in BACKENDS:
        right = {row["check"] for row in engine if row["backend"] == backend and row["outcome"] == RIGHT}
        if "decode" in right:
            return WORKS
    found = {row["outcome"] for row in engine}
    return REFUSED if REFUSED in found else UNPROVEN if found else UNBUILT


def _grouped(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found
