"""Result rows: one flat JSON line per measurement, with its provenance; appended one by one, read back whole.

Tables, pictures and reports are views of these rows. What counts as measured already is decided here and nowhere else:
a row whose key is there, that did not fail, and that the same model, weights, dtype, device, attention, seed and scorer
made. A file of another provenance is refused by name. A killed writer loses at most the line it was writing; a second
writer on one file is refused. Knows no torch and no model; what a row says of its origin comes from `provenance`.
"""

from __future__ import annotations

import codecs
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_lib.extras import extra
from sdtp_lib.files import atomic_write, lock_path, plain, take_lock, write_json
from sdtp_lib.provenance import commit, content_id, identity, project_root, provenance_of, scorer_id

if TYPE_CHECKING:
    import pandas

# 2: rows say the fingerprint of the weights, the kind of GPU, and which scorer, prompt and pruning they were made with.
SCHEMA_VERSION = 2
# The fields by which rows call the scorer that ``scorer_id`` describes.
_SCORER_NAMES = ("scorer", "variant", "method")
_REMEDY = "give this run a folder of its own, or move the file away"

__all__ = [
    "SCHEMA_VERSION", "OtherProvenance", "RowWriter", "atomic_write", "commit", "content_id", "join_rows", "lock_path",
    "markdown_table", "provenance_of", "project_root", "read_frame", "read_rows", "write_json",
]  # fmt: skip


class OtherProvenance(ValueError):
    """A row file was made by another model, scorer or setting than this run's: its rows must not count as done."""


class RowWriter:
    """Appends rows to one JSON-lines file, each on disk before `add` returns, and knows which are done.

    Use it as a context manager. While it is open a lock file beside the rows keeps every other process out.

    Parameters
    ----------
    path
        The ``.jsonl`` file; folders are made. Rows that are there stay and count as done, unless they tell of a
        failure: those are tried again.
    provenance
        Fields that every row repeats (see `provenance_of`). Rows that are there must agree with them
        (`provenance.identity`).
    beside
        Another row file whose rows count as done besides: one that several processes share.

    Raises
    ------
    OtherProvenance
        On entering, naming the file, what differs and the remedy.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        provenance: Mapping[str, Any],
        *,
        beside: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._provenance = dict(provenance)
        self._beside = beside
        self._done: dict[str, dict[str, Any]] = {}
        self._failed: set[str] = set()
        self._scorers: dict[str, tuple[str | None, str]] = {}  # name in rows -> its id, and the file that says so
        self._lock: int | None = None
        self._file: Any = None

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.path)
        try:
            _mend_last_line(self.path)
            for path in [self.path] if self._beside is None else [Path(self._beside), self.path]:
                self._take_over(path)
            self._file = self.path.open("a", encoding="utf-8")
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._release()

    def _release(self) -> None:
        # Removed while it is held: whoever waits on the old file sees that its name is gone and takes a new one.
        lock_path(self.path).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def _take_over(self, path: Path) -> None:
        """Count the rows of ``path`` as done, if this run could have made them."""
        rows = read_rows(path) if path.exists() else []
        _refuse_other(path.name, rows, identity(self._provenance))
        self._done |= {row["key"]: row for row in rows if "key" in row and not _is_failure(row)}
        for row in rows:
            if "scorer_id" in row:
                self._scorers[_scorer_name(row)] = row["scorer_id"], path.name

    def done(self, key: str, **made_from: Any) -> bool:
        """Whether a row of this key is in the file, from this run or from one that was stopped.

        A failure of an earlier run does not count; one of this run does.

        Parameters
        ----------
        made_from
            Fields that the row must have with these values: what else it depends on and its key does not say.

        Raises
        ------
        OtherProvenance
            If the row has others.
        """
        row = self._done.get(key)
        if row is not None:
            wanted = {name: plain(name, value) for name, value in made_from.items()}
            _refuse_other(f"{self.path.name}, row {key!r}:", [row], wanted)
        return row is not None

    def failed(self, key: str) -> bool:
        """Whether this run tried it and wrote down a failure."""
        return key in self._failed

    def scored_by(self, scorers: Mapping[str, Any]) -> dict[str, str | None]:
        """Ids for the rows' field ``scorer_id``, of scorers by the name that rows call them (None: nothing pruned).

        Call it before measuring.

        Raises
        ------
        OtherProvenance
            If the file has rows of one of these names that another scorer made.
        """
        ids = {name: scorer_id(scorer) for name, scorer in scorers.items()}
        for name, own in ids.items():
            there, file = self._scorers.get(name, (own, ""))
            if there != own:
                raise OtherProvenance(
                    f"{file} holds rows of {name!r} that were made by {there}, and this run's {name!r} is {own}: "
                    f"{_REMEDY}, or name this scorer otherwise."
                )
        return ids

    def add(self, key: str, *, kind: str = "measurement", **fields: Any) -> dict[str, Any]:
        """Append one row and return it as it will be read back.

        Parameters
        ----------
        key
            Names this row within the file: everything that tells it from the others (sample, ratio, scorer ...).
        kind
            What sort of row it is, when a file holds several; ``"failure"``: the next run tries it again.
        fields
            The measured values, units in the names. Numbers of numpy and torch are stored as plain ones, NaN as null.

        Raises
        ------
        ValueError
            A key that is already there, a field that provenance or the schema owns, or a value JSON cannot hold.
        """
        if self._file is None or self._file.closed:
            raise ValueError(f"the writer of {self.path.name} is not open: use `with RowWriter(...) as rows:`.")
        if key in self._done:
            raise ValueError(f"key={key!r} is already in {self.path.name}: ask `done(key)` first.")
        owned = sorted({"schema_version", *self._provenance}.intersection(fields))
        if owned:
            raise ValueError(f"field(s) {owned} are provenance fields of {self.path.name}: give yours other names.")
        row = {"schema_version": SCHEMA_VERSION, "key": key, "kind": kind, **self._provenance, **fields}
        return self._append({name: plain(name, value) for name, value in row.items()})

    def _append(self, row: dict[str, Any]) -> dict[str, Any]:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._done[row["key"]] = row
        if _is_failure(row):
            self._failed.add(row["key"])
        if "scorer_id" in row:
            self._scorers[_scorer_name(row)] = row["scorer_id"], self.path.name
        return row


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]], rule: str = "---") -> str:
    """A Markdown table of text cells, whose own ``|`` are escaped; ``rule`` stands under each column of the header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *body)]
    return "\n".join([lines[0], "|" + f"{rule}|" * len(header), *lines[1:]])


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows of a file. What is damaged is left out with a warning that names the line; it is never an error.

    Of several rows with one key the last counts: what failed once and succeeded later is not a failure any more.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    # Some editors begin a file with a byte-order mark.
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    half_written = lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is None:
            warnings.warn(f"{path.name}, line {number} is damaged and left out.", stacklevel=2)
        else:
            rows.append(row)
    if half_written.strip():
        # Without its newline a line may be whole or cut; a whole one counts.
        row = _parsed(half_written)
        if row is None:
            warnings.warn(f"{path.name}: the last line is half-written and dropped.", stacklevel=2)
        else:
            rows.append(row)
    last = {row["key"]: number for number, row in enumerate(rows) if "key" in row}
    return [row for number, row in enumerate(rows) if last.get(row.get("key"), number) == number]


def read_frame(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """The rows of a file as a data frame, one column per field."""
    with extra("train"):
        import pandas

    return pandas.DataFrame.from_records(read_rows(path))


def failures(rows: Iterable[Mapping[str, Any]]) -> str:
    """``"3 failed, the first: RuntimeError: ..."`` of rows that a later one did not mend; empty where none failed."""
    last = {row["key"]: row for row in rows if "key" in row}
    failed = [str(row.get("error")) for row in last.values() if _is_failure(row)]
    return f"{len(failed)} failed, the first: {failed[0]}" if failed else ""


def join_rows(
    path: str | os.PathLike[str], others: Sequence[str | os.PathLike[str]], provenance: Mapping[str, Any]
) -> None:
    """Move the rows of ``others`` to the end of ``path``, each key once, and remove the files.

    Raises
    ------
    RuntimeError
        If a process has one of the files open for writing.
    OtherProvenance
        If one of the files does not fit ``provenance``.
    """
    with RowWriter(path, provenance) as writer:
        for other in map(Path, others):
            with RowWriter(other, provenance):  # for its lock: nobody writes there any more
                for row in read_rows(other):
                    if not writer.done(row["key"]):
                        writer._append(row)
                other.unlink()


def _mend_last_line(path: Path) -> None:
    """Give a whole last line its newline and cut a half-written one off, so that appending starts on a fresh line."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    if _parsed(content[start:]) is None:
        warnings.warn(f"{path.name}: the last line is half-written and dropped.", stacklevel=4)
        os.truncate(path, start)
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def _is_failure(row: Mapping[str, Any]) -> bool:
    """Whether a row says that nothing was measured; a latency row does so by its status."""
    return row.get("kind") == "failure" or row.get("status", "ok") != "ok"


def _scorer_name(row: Mapping[str, Any]) -> str:
    return next(str(row[field]) for field in _SCORER_NAMES if field in row)


def _refuse_other(what: str, rows: Iterable[Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Refuse rows that do not agree with ``wanted``, or that are too old to say; ``what`` names them."""
    wanted = {name: plain(name, value) for name, value in wanted.items()}
    for row in rows:
        there = identity(row)
        silent = [name for name in wanted if name not in there]
        if silent:
            raise OtherProvenance(
                f"{what} holds rows that do not say their {', '.join(silent)}, so nobody can tell whether this run "
                f"made them (an older version did): {_REMEDY}."
            )
        other = [name for name, value in wanted.items() if there[name] != value]
        if other:
            differences = ", ".join(f"{name}={there[name]!r} (this run: {wanted[name]!r})" for name in other)
            raise OtherProvenance(f"{what} holds rows made with {differences}: {_REMEDY}.")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
