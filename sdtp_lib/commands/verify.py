"""``verify``: whether pruning is exact on this very model. The first ``with`` asks it where a family is not listed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sdtp_lib.commands import arguments as shared


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sdtp_lib verify") -> int:
    """Run the command; 0 if the pruned model is the masked one, else what differs is refused with the figures."""
    parser = shared.parser_of(prog, "Run one short prompt pruned, and at full length with the dropped tokens masked "
                              "out, and compare: what token_pruning(..., verify='always') does.")  # fmt: skip
    shared.add_model(parser)
    parser.add_argument("--repeats", type=shared.count, default=1, help="times that it is run; above 1: median time")
    given = parser.parse_args(arguments)
    model, _ = shared.load(given)

    from sdtp_lib.methods.call import token_pruning
    from sdtp_lib.pruning.verify import supported, trusted, verify_pruning

    backend = model.config._attn_implementation
    listed = trusted(model, model.config.get_text_config().model_type, backend)
    print(f"{type(model).__name__} with {backend}: " + ("in" if listed else "not in") +
          f" this release's list of families that were swept (transformers {', '.join(supported())})")  # fmt: skip
    found = [verify_pruning(model, token_pruning, again=True) for _ in range(given.repeats)]
    print(found[-1])
    if given.repeats > 1:
        seconds = [one.seconds for one in found]
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(f"median of {given.repeats}: {middle:.2f} s ({low:.2f} to {high:.2f})")
    return 0
