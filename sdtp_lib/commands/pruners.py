"""``pruners``: which trained pruners are at hand, shipped and the user's own, and for which weights. Reads configs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sdtp_lib.commands import arguments as shared
from sdtp_lib.shipped import SHIPPED_FOLDER, about, pruner_folders, user_folder


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sdtp_lib pruners") -> int:
    """Run the command; 0 unless something is refused."""
    parser = shared.parser_of(prog, "List the trained pruners at hand: those that ship and those in your folder "
                              "(SDTP_PRUNERS, or sdtp/pruners of your data folder).")  # fmt: skip
    shared.add_model(parser, optional="say which were made for its very weights")
    given = parser.parse_args(arguments)
    own = _fingerprint(given) if given.model else None
    folders = pruner_folders()
    for folder in folders:
        known = about(folder)
        where = "ships" if folder.parent == SHIPPED_FOLDER else "yours"
        print(f"{folder.name}  ({where}: {folder})")
        if not known:
            print("  config.json cannot be read: train again, or remove the folder")
            continue
        layers = known.get("layers") or []
        print(f"  for {known.get('base_model') or 'a model without a name'}: {known.get('model_type')}, "
              f"{known.get('num_layers')} layers, hidden size {known.get('hidden_size')}, "
              f"weights {known.get('weights_fingerprint')}")  # fmt: skip
        print(f"  score before layers {', '.join(map(str, layers))}")
        if given.model:
            fits = own is not None and own == known.get("weights_fingerprint")
            print(f"  {'made for' if fits else 'not made for'} {given.model}" + (f" (weights {own})" if own else ""))
    print(f"{len(folders)} set(s); your folder is {user_folder()}"
          + ("" if user_folder().is_dir() else ", which does not exist yet") + ".")  # fmt: skip
    return 0


def _fingerprint(given: argparse.Namespace) -> str | None:
    from sdtp_lib.scorers.token_pruners import weights_fingerprint

    return weights_fingerprint(shared.load(given)[0])
