"""Every way to shorten a prefill under its own name, one file each, and the one call that takes any of them.

``methods.get("fastkv")``, ``methods.named("fastkv@1.5x")``, ``methods.names()``. `method` says what a method is,
`registry` lists them, `votes` holds the arithmetic that they share. `call` is what users import: ``from sdtp_lib import
token_pruning``.
"""

from __future__ import annotations

from sdtp_lib.budget import SpeedupOutOfReach
from sdtp_lib.methods.method import Method
from sdtp_lib.methods.registry import get, named, names

__all__ = ["Method", "SpeedupOutOfReach", "get", "named", "names"]
