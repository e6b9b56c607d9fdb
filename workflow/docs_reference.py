"""The reference of the public face as Markdown, from docstrings: what `sdtp_lib` exports, and its modules' functions.

NumPy's sections become lists. What is not in ``__all__``, or begins with an underscore, is no part of the public face.
"""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import sdtp_lib

SECTIONS = ("Parameters", "Returns", "Raises", "Attributes", "Yields", "Notes", "Examples")


def markdown() -> str:
    """One heading per public name, its signature, its docstring; modules last."""
    names = [name for name in sdtp_lib.__all__ if not name.startswith("__")]
    modules = [name for name in names if inspect.ismodule(getattr(sdtp_lib, name))]
    letters = "B (batch), T (prompt tokens), K (kept tokens), D (hidden size), L (layers), S (stages)"
    parts = ["# Reference", "", f"What `from sdtp_lib import ...` offers. Shapes are in the letters {letters}.", ""]
    for name in names:
        if name not in modules:
            parts += entry(name, getattr(sdtp_lib, name), "##")
    for name in modules:
        module = getattr(sdtp_lib, name)
        parts += [f"## {name}", "", body(inspect.getdoc(module) or ""), ""]
        for inner, value in public(module):
            parts += entry(f"{name}.{inner}", value, "###")
    return "\n".join(parts)


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """Functions and classes that a module offers: its ``__all__``, else what it defines itself."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    ]
    found = [(name, getattr(module, name)) for name in names if not name.startswith("_")]
    return [(name, value) for name, value in found if inspect.isfunction(value) or inspect.isclass(value)]


def entry(name: str, value: Any, level: str) -> list[str]:
    """Heading, signature and docstring of one name; of a class also its public methods."""
    own = value.__name__ if hasattr(value, "__name__") else name
    call = ["```python", f"{own}{signature(value)}", "```"]
    parts = [f"{level} {name}", "", *call, "", body(inspect.getdoc(value) or ""), ""]
    if inspect.isclass(value):
        offered = len(parts)
        for inner, method in vars(value).items():
            method = getattr(method, "__func__", method)
            if inspect.isfunction(method) and not inner.startswith("_"):
                first = (inspect.getdoc(method) or "").partition("\n\n")[0].replace("\n", " ")
                parts += [f"- `{inner}{signature(method)}`: {body(first)}"]
            elif isinstance(method, property) and not inner.startswith("_"):
                parts += [f"- `{inner}`: {body((inspect.getdoc(method) or '').partition(chr(10) * 2)[0])}"]
        if parts[offered:]:
            parts.insert(offered, "\n**Methods and properties**\n")
        parts += [""]
    return parts


def signature(value: Any) -> str:
    """The parameters without their annotations, which the text explains."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in found.parameters.items()
        if name != "self"
    ]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r"<(?:function|class)? ?'?([\w.]+)'?(?: at 0x[0-9a-f]+)?>", r"\1", text)  # no address in a page


def body(text: str) -> str:
    """A NumPy docstring as Markdown."""
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    lines = text.splitlines()
    parts: list[str] = []
    section = ""
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.strip() in SECTIONS and i + 1 < len(lines) and set(lines[i + 1].strip()) == {"-"}:
            section = line.strip()
            parts += ["", f"**{section}**", ""]
            i += 2
            continue
        if section in SECTIONS[:5] and line and not line.startswith(" "):
            parts.append(f"- `{line.strip()}`")
        elif section in SECTIONS[:5]:
            parts.append(f"  {line.strip()}" if line.strip() else "")
        else:
            parts.append(line if not line.startswith("    ") or not parts or parts[-1] == "" else line)
        i += 1
    return "\n".join(parts)
