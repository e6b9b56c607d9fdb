"""The command line: ``python -m sdtp_lib COMMAND``. A command is a module with a ``main``, loaded when it is asked."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("sdtp_lib.training.command", "train token pruners for any model"),
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the arguments to the command that they name."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help"):
        print("usage: python -m sdtp_lib COMMAND ...; COMMAND --help tells more\n")
        for name, (_, about) in COMMANDS.items():
            print(f"  {name:10}{about}")
        return 0
    if given[0] not in COMMANDS:
        print(f"error: {given[0]!r} is no command: choose among {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[given[0]][0]).main(given[1:])


if __name__ == "__main__":
    sys.exit(main())
