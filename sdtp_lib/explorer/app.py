"""The explorer as a page without code cells: ``make app`` serves app/explore.ipynb on loopback, with a token.

Notebook and template are files of the checkout: an installed wheel has neither, and is told so in one sentence.
The page follows the reader's system, light or dark, and asks no other host for anything (app/voila holds its template).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sdtp_lib.checked import told
from sdtp_lib.explorer.engine_source import PRUNERS, EngineSource, default_scorers, open_source
from sdtp_lib.extras import extra
from sdtp_lib.records import project_root

__all__ = ["PRUNERS", "EngineSource", "default_scorers", "main", "open_source"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve app/explore.ipynb with Voila; the address it prints holds the token. 2 if notebook or Voila is missing."""
    parser = argparse.ArgumentParser(prog="python -m sdtp_lib.explorer.app", description=__doc__)
    parser.add_argument("--model", default="embedded", help="'embedded', a local folder or a Hub id")
    parser.add_argument("--pruners", default=PRUNERS, help="pruners that ship, or a folder from the project's root")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="length of the example prompts")
    parser.add_argument("--port", type=int, default=8866)
    parser.add_argument("--token", default=None, help="token in the address (default: a new one at each start)")
    parser.add_argument("--browser", action="store_true", help="open a browser as well")
    options = parser.parse_args(arguments)
    return told(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    folder = project_root() / "app"
    if not (folder / "explore.ipynb").is_file():
        raise FileNotFoundError("app/explore.ipynb is not here: the sliders need the checkout (make app).")
    with extra("study"):
        from voila.app import Voila
    for name in ("model", "pruners", "prompt_tokens"):
        os.environ[f"SDTP_APP_{name.upper()}"] = str(getattr(options, name))
    # Voila looks for templates below each folder of JUPYTER_PATH
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("JUPYTER_PATH")]))
    flags = [
        str(folder / "explore.ipynb"),
        f"--port={options.port}",
        "--Voila.ip=127.0.0.1",
        f"--Voila.token={options.token}" if options.token else "--Voila.auto_token=True",
        "--VoilaConfiguration.template=sdtp",
        "--VoilaConfiguration.show_tracebacks=False",
        *([] if options.browser else ["--no-browser"]),
    ]
    Voila.launch_instance(flags)


if __name__ == "__main__":
    sys.exit(main())
