"""The command line: ``python -m sdtp_lib COMMAND``, or ``sdtp COMMAND``. Each command is a module with a ``main``.

Loads neither torch nor a command before one is named. What is wrong with a folder, a value or a package ends as one
sentence on standard error and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from sdtp_lib.checked import told

COMMANDS = {
    "generate": ("sdtp_lib.commands.generate", "answer prompts with and without pruning, side by side"),
    "train": ("sdtp_lib.commands.train", "train token pruners for any model"),
    "compare": ("sdtp_lib.commands.compare", "every score and method on your prompts: KL, answers, prefill time"),
    "bench": ("sdtp_lib.commands.bench", "prefill and decode time by preset and prompt length"),
    "pruners": ("sdtp_lib.commands.pruners", "trained pruners at hand, and for which weights"),
    "verify": ("sdtp_lib.commands.verify", "whether pruning is exact on this very model"),
}
# Programs of their own, named in the help.
PROGRAMS = {
    "sdtp_lib.budget": "tokens, FLOPs and KV bytes, counted",
    "sdtp_lib.latency.cost_model": "times predicted for named hardware",
    "sdtp_lib.harness": "lm-evaluation-harness with pruned prompts",
    "sdtp_lib.explorer.app": "sliders in a browser, from the checkout (make app)",
    "sdtp_lib.paper": "the paper's figures beside ours",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the arguments to the command that they name; its exit code, 2 for an error that one sentence can say."""
    prog = _prog()
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(_help(prog))
        return 0
    if name == "--version":
        from sdtp_lib import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: {name!r} is no command: choose among {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        # The library's own remarks are sentences for people, who need no file and line with them.
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        return told(lambda: importlib.import_module(COMMANDS[name][0]).main(rest, f"{prog} {name}"))


def _prog() -> str:
    called = Path(sys.argv[0]).name
    return "sdtp" if called.startswith("sdtp") else "python -m sdtp_lib"


def _help(prog: str) -> str:
    lines = [
        f"usage: {prog} COMMAND ...",
        "",
        "Token pruning in the prefill of causal language models.",
        "",
        *(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()),
        "",
        f"{prog} COMMAND --help tells a command's arguments and defaults. Programs of their own:",
        "",
        *(f"  python -m {module:29}{about}" for module, about in PROGRAMS.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
