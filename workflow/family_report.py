"""The sweep's rows as a support matrix: four counts, docs/support.md, README's block and the list that `verify` trusts.

A view of rows; nothing is asked here. A family is a ``model_type`` with all of its variants (``falcon:alibi``).
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Iterable
from typing import Any

import tables
from family_checks import ENGINE
from family_labels import LABEL_NAMES
from family_models import BACKENDS
from family_subject import ERROR, REFUSED, RIGHT, UNASKED, UNBUILT, UNPROVEN, WRONG
from result_tables import Table

from sdtp_lib.records import project_root, write_json

WORKS = "works"
# A family is what its worst row makes of it, in this order; the first four are the counts of the sweep.
STATES = (WRONG, ERROR, WORKS, REFUSED, UNPROVEN, UNBUILT)
SUPPORTED = "sdtp_lib/pruning/supported.json"
MATRIX = "docs/support.md"
SHOWN = 160  # characters of a reason

_HEAD = """# Which models are pruned exactly

`make sweep` writes this page. Every class of transformers' causal-LM mapping that can be built from a tiny
configuration is asked, with random weights in float64: prefill, eight decode steps, a second turn on the pruned cache
and a padded batch must equal the same model at full length with the dropped tokens masked, and keep ratio 1.0 the plain
model bit for bit. `scorers.attention` is held against `output_attentions`, labels against an explicit bias in each
layer's mask, FLOPs against what torch counts.

Cells: **yes**, **-** (the family does not have this backend, or nothing was asked), or a number that names the reason
below the table. What is not in this list, or runs with another backend or version, is checked on the model itself at
its first `with` (`verify="auto"`).
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
        """docs/support.md, README's block and the list that ships, for the version that was swept."""
        root, versions = project_root(), self.rows[0]
        (root / MATRIX).parent.mkdir(exist_ok=True)
        (root / MATRIX).write_text(self.matrix(), encoding="utf-8")
        shipped = root / SUPPORTED
        known = json.loads(shipped.read_text(encoding="utf-8"))["works"] if shipped.exists() else {}
        known[".".join(versions["transformers"].split(".")[:2])] = self.trusted()
        write_json(shipped, {"torch": versions["torch"], "works": dict(sorted(known.items()))})
        store = root / tables.STORE
        kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
        kept["support"] = self.table().to_dict()
        write_json(store, dict(sorted(kept.items())))
        tables.main(["--render-only"])

    def table(self) -> Table:
        """README's block: counts and the families that work."""
        names = ", ".join(sorted(family for family, state in self.state.items() if state == WORKS))
        body = tuple((state, str(self.count[state])) for state in (WORKS, REFUSED, WRONG, ERROR, UNPROVEN, UNBUILT))
        note = f"Works: {names}. {self._versions()} [{MATRIX}]({MATRIX}) has a line for each family, with the reasons."
        return Table("support", "Families", ("families of transformers' causal-LM mapping", "number"), body, note)

    def _versions(self) -> str:
        return f"transformers {self.rows[0]['transformers']}, torch {self.rows[0]['torch']}."

    def matrix(self) -> str:
        """The page with a line for each family and variant."""
        self._notes = {}
        lines = [_HEAD, self._versions() + f" {self.summary().splitlines()[-1]}.", ""]
        header = ("model", *BACKENDS, "attention score", "labels", "FLOPs")
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for (name,), rows in sorted(_grouped(self.rows, "family").items()):
            by_backend = [self._engine([row for row in rows if row["backend"] == backend]) for backend in BACKENDS]
            others = [self._cell(rows, names) for names in (("attention",), LABEL_NAMES, ("flops",))]
            lines.append("| " + " | ".join([name, *by_backend, *others]) + " |")
        lines += ["", *(f"{number}. {reason}" for reason, number in self._notes.items())]
        return "\n".join(lines) + "\n"

    def _engine(self, rows: list[dict[str, Any]]) -> str:
        if any("does not support an attention implementation" in row["detail"] for row in rows):
            return "-"
        return self._cell(rows, ("entry", *ENGINE, "end"), "build")

    def _cell(self, rows: list[dict[str, Any]], checks: tuple[str, ...], otherwise: str = "") -> str:
        asked = [row for row in rows if row["check"] in checks and row["outcome"] not in (RIGHT, "done")]
        if not asked and not any(row["outcome"] == RIGHT for row in rows if row["check"] in checks):
            asked = [row for row in rows if row["check"] == otherwise]
            if not asked:
                return "-"
        if not asked:
            return "yes"
        worst = min(asked, key=lambda row: [WRONG, ERROR, REFUSED, UNPROVEN, UNASKED, UNBUILT].index(row["outcome"]))
        same = [row["check"] for row in asked if row["outcome"] == worst["outcome"]]
        partly = "" if len(set(same)) == len({row["check"] for row in rows if row["check"] in checks}) else "partly "
        reason = worst["detail"].replace("|", "\\|")[:SHOWN]
        number = self._notes.setdefault(f"{worst['outcome']}: {reason}", len(self._notes) + 1)
        return f"{partly}{worst['outcome']} ({number})"


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
