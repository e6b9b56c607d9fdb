"""Result rows: one flat JSON line a measurement, with its provenance; appended one by one, read back whole.

Tables, pictures and reports are views of these rows. A killed writer loses at most the line it was writing; a second
writer on one file is refused. Knows no torch and no model; what a row says of its origin comes from `provenance`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_lib.provenance import commit, passport, project_root

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 1

__all__ = [
    "SCHEMA_VERSION", "RowWriter", "atomic_write", "commit", "join_rows", "lock_path", "passport", "project_root",
    "read_frame", "read_rows", "write_json",
]  # fmt: skip


class RowWriter:
    """Appends rows to one JSON-lines file, each on disk before `add` returns, and knows which are done.

    Use it as a context manager. While it is open a lock file beside the rows keeps every other process out.

    Parameters
    ----------
    path
        The ``.jsonl`` file; folders are made. Rows that are there stay and count as done.
    passport
        Fields that every row repeats (see `passport`).
    known
        Keys that count as done besides: rows that other files hold.
    """

    def __init__(self, path: str | os.PathLike[str], passport: Mapping[str, Any], *, known: Iterable[str] = ()) -> None:
        self.path = Path(path)
        self._passport = dict(passport)
        self._known = set(known)
        self._done: set[str] = set()
        self._lock: int | None = None
        self._file: Any = None

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        try:
            _mend_last_line(self.path)
            there = read_rows(self.path) if self.path.exists() else []
            self._done = self._known | {row["key"] for row in there if "key" in row}
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

    def done(self, key: str) -> bool:
        """Whether a row of this key is in the file, from this run or from one that was stopped."""
        return key in self._done

    def add(self, key: str, *, kind: str = "measurement", **fields: Any) -> dict[str, Any]:
        """Append one row and return it as it will be read back.

        Parameters
        ----------
        key
            Names this row within the file: everything that tells it from the others (sample, ratio, scorer ...).
        kind
            What sort of row it is, when a file holds several.
        fields
            The measured values, units in the names. Numbers of numpy and torch are stored as plain ones, NaN as null.

        Raises
        ------
        ValueError
            A key that is already there, a field that the passport or the schema owns, or a value JSON cannot hold.
        """
        if self._file is None or self._file.closed:
            raise ValueError(f"the writer of {self.path.name} is not open: use `with RowWriter(...) as rows:`.")
        if key in self._done:
            raise ValueError(f"key={key!r} is already in {self.path.name}: ask `done(key)` first.")
        owned = sorted({"schema_version", *self._passport}.intersection(fields))
        if owned:
            raise ValueError(f"field(s) {owned} belong to the passport of {self.path.name}: give them other names.")
        row = {"schema_version": SCHEMA_VERSION, "key": key, "kind": kind, **self._passport, **fields}
        row = {name: _plain(name, value) for name, value in row.items()}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._done.add(key)
        return row


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows of a file. What is damaged is left out with a warning that names the line; it is never an error.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
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
    return rows


def read_frame(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """The rows of a file as a data frame, one column a field."""
    import pandas

    return pandas.DataFrame.from_records(read_rows(path))


def join_rows(path: str | os.PathLike[str], others: Sequence[str | os.PathLike[str]]) -> None:
    """Move the rows of ``others`` to the end of ``path``, each key once, and remove the files.

    Raises
    ------
    RuntimeError
        If a process has one of the files open for writing.
    """
    with RowWriter(path, {}) as writer:
        for other in map(Path, others):
            with RowWriter(other, {}):  # for its lock: nobody writes there any more
                for row in read_rows(other):
                    if not writer.done(row["key"]):
                        writer.add(**{name: value for name, value in row.items() if name != "schema_version"})
                other.unlink()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder and with the same suffix, which becomes ``path`` if the body succeeds.

    Whoever reads ``path`` sees the old content or the new, never half of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    # mkstemp makes files for their owner alone; results follow the user's umask like everything else.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, atomically; values as in `RowWriter.add`."""
    text = json.dumps(_plain("content", content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock_path(path: str | os.PathLike[str]) -> Path:
    """The lock file of a row file."""
    path = Path(path)
    return path.with_name(path.name + ".lock")


def _take_lock(path: Path) -> int:
    """An open descriptor that holds the lock; the kernel lets go of it when the process dies, however it dies."""
    lock = lock_path(path)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RuntimeError(
                f"{path.name} is being written by {owner}: wait for it, or give this run a folder of its own."
            ) from None
        try:
            ours = os.fstat(descriptor).st_ino == os.stat(lock).st_ino
        except FileNotFoundError:
            ours = False
        if ours:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


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


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _plain(name: str, value: Any) -> Any:
    """``value`` in JSON's types."""
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"{name}={value} cannot be stored: a row holds finite numbers, or NaN for a missing one.")
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if isinstance(value, os.PathLike):
        path = Path(value)
        root = project_root()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    raise ValueError(f"{name} is a {type(value).__name__}, which a row cannot hold: give numbers, strings or lists.")
