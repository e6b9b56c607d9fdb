"""Files that are written whole or not at all, in JSON's types, and files that one process at a time may write.

Knows no rows and no model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdtp_lib.provenance import project_root


class BeingWritten(RuntimeError):
    """Another process holds the lock of a file; the text says which process, and the remedy."""


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


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path``, which becomes ``path`` if the body succeeds; what was there stays until then.

    Raises
    ------
    FileExistsError
        If there is something already and ``force`` does not say that it may go; before the body runs.
    """
    path = Path(path)
    refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    try:
        yield temporary
        refuse_existing(path, force)
        old = temporary.with_name(temporary.name + ".old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: str | os.PathLike[str], force: bool) -> None:
    """Raise `FileExistsError` if ``path`` holds something and ``force`` does not say that it may be replaced."""
    path = Path(path)
    if not force and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already, and nothing is overwritten: give another folder, or force.")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, atomically; values as in `plain`."""
    text = json.dumps(plain("content", content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock_path(path: str | os.PathLike[str]) -> Path:
    """The lock file that stands beside ``path`` while a process writes it."""
    path = Path(path)
    return path.with_name(path.name + ".lock")


def locked(descriptor: int) -> bool:
    """Whether this process holds the lock of an open file now; the kernel drops it with the last holder of the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def take_lock(path: Path) -> int:
    """An open descriptor that holds the lock of ``path``; the kernel drops it when the process dies.

    Raises
    ------
    BeingWritten
        If another process, or another writer of this one, holds it.
    """
    lock = lock_path(path)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if not locked(descriptor):
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BeingWritten(
                f"{path.name} is being written by {owner}: wait for it, or give this run a folder of its own."
            )
        try:
            ours = os.fstat(descriptor).st_ino == os.stat(lock).st_ino
        except FileNotFoundError:
            ours = False
        if ours:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def shown_path(path: str | os.PathLike) -> str:
    """A path as it is printed and stored: from the project's root where it lies there, so no page names a machine."""
    path, root = Path(path), project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def plain(name: str, value: Any) -> Any:
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
        return {str(key): plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(name, item) for item in value]
    if isinstance(value, os.PathLike):
        return shown_path(value)
    raise ValueError(f"{name} is a {type(value).__name__}, which a row cannot hold: give numbers, strings or lists.")
