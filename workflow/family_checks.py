"""The checks of a family: does the pruned model equal the masked one, are scores and counts right?

Each check takes a `Subject` (a tiny float64 model of one family and backend) and gives its largest difference. The
truth is computed by `sdtp_lib.pruning.masked_reference`, by transformers itself (``output_attentions``) or counted by
torch (`FlopCounterMode`); none of it is code that is under test. Labels have their own file, `family_labels`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from family_labels import LABEL_NAMES, label_check
from family_subject import (
    CONFIG,
    PROMPT,
    SHORTER,
    Inconsistent,
    Subject,
    Wrong,
    apart,
    attentions_of,
    equal,
    line_of,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache

from sdtp_lib import scorers
from sdtp_lib.budget import prefill_flops
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.masked_reference import NoReference, find_layers, masked_forward

FLOP_TOLERANCE = 0.01


def _kept(trace: Any, row: int = 0) -> dict[int, torch.Tensor]:
    """Stage -> kept positions of a row; nothing pruned is a fault of its own."""
    kept = {stage: p[row][p[row] >= 0].cpu() for stage, p in trace.kept_positions.items()}
    if set(kept) != set(CONFIG.layers):
        raise Wrong(f"nothing was pruned at layers {sorted(set(CONFIG.layers) - set(kept))} and nobody said so")
    if len(kept[3]) >= SHORTER:
        raise Wrong(f"{len(kept[3])} tokens were kept")
    return kept


def entry(subject: Subject) -> float:
    """Nothing is run: only what is refused by what the model is."""
    with token_pruning(subject.model, CONFIG, scorers.random(3)):
        return 0.0


def exact(subject: Subject) -> float:
    """Keep ratio 1.0 gives the plain model's logits and tokens, bit for bit."""
    whole = CONFIG.replace(keep_ratio=1.0)
    entry(subject)
    try:
        plain, generated = subject.plain(subject.tokens), subject.generate(subject.tokens)
    except Exception as error:
        raise Inconsistent(f"the plain model itself ends in {line_of(error)}") from error
    with torch.no_grad(), token_pruning(subject.model, whole, scorers.random(3)) as trace:
        found = subject.model(input_ids=subject.tokens, use_cache=False, return_dict=True).logits
        again = subject.generate(subject.tokens)
    if not trace.prefills:
        raise Wrong("no prefill was seen and nobody said so")
    if not torch.equal(found, plain):
        raise Wrong(f"keep ratio 1.0: logits off by {apart(found, plain):.1e}")
    if not all(map(torch.equal, again.logits, generated.logits)):
        raise Wrong("keep ratio 1.0: generated logits are not the plain ones")
    return 0.0


def prefill(subject: Subject) -> float:
    """Logits of the kept tokens are those of the whole prompt with the dropped ones hidden."""
    with torch.no_grad(), token_pruning(subject.model, CONFIG, scorers.random(3)) as trace:
        found = subject.model(input_ids=subject.tokens, use_cache=False, return_dict=True).logits
    kept = _kept(trace)
    _ = subject.reference_holds
    expected = masked_forward(subject.model, subject.tokens, kept, PROMPT).logits[:, kept[3]]
    return equal(found, expected, "prefill", subject.tolerance)


def decode(subject: Subject) -> float:
    """Eight greedy steps out of the pruned cache."""
    with token_pruning(subject.model, CONFIG, scorers.random(3)) as trace:
        found = subject.generate(subject.tokens)
    kept = _kept(trace)
    _ = subject.reference_holds, subject.caches_hold
    expected = subject.masked(found.sequences, kept, PROMPT)[:, PROMPT - 1 : -1]
    return equal(torch.stack(found.logits, 1), expected, "decode", subject.tolerance)


def second_turn(subject: Subject) -> float:
    """Five more tokens at once, and three steps, on the pruned cache."""
    with token_pruning(subject.model, CONFIG, scorers.random(3)) as trace:
        first = subject.generate(subject.tokens)
        longer = torch.cat([first.sequences, subject.turn], dim=1)
        name, cache = next(((n, v) for n, v in first.items() if isinstance(v, Cache)), ("", None))
        if cache is None:
            raise NoReference("generate returns no cache")
        found = subject.generate(longer, 3, **{name: cache})
    kept = _kept(trace)
    _ = subject.reference_holds, subject.caches_hold, subject.turns_hold
    expected = subject.masked(found.sequences, kept, PROMPT)[:, longer.shape[1] - 1 : -1]
    return equal(torch.stack(found.logits, 1), expected, "second turn", subject.tolerance)


def padded(subject: Subject) -> float:
    """A batch of two prompts, the shorter one padded on the left: prefill and three steps, each row as if alone."""
    if subject.backend == "eager" and next(subject.model.parameters()).dtype == torch.float64:
        # Eager softmax is float32: the lowest float64 becomes -inf there, and a row of padding NaN, pruned or not.
        subject = Subject(copy.deepcopy(subject.model).to(torch.float32))
    rows, mask = subject.tokens.repeat(2, 1), torch.ones(2, PROMPT, dtype=torch.long)
    short = subject.tokens[:, -SHORTER:].flip(1)
    gap = PROMPT - SHORTER
    rows[1, :gap], rows[1, gap:], mask[1, :gap] = 0, short, 0
    with token_pruning(subject.model, CONFIG, scorers.random(3)) as trace:
        found = subject.generate(rows, 3, attention_mask=mask)
    kept = _kept(trace, 0), _kept(trace, 1)
    _ = subject.reference_holds, subject.caches_hold
    plain, alone = subject.generate(rows, 3, attention_mask=mask), subject.generate(short, 3)
    if (off := apart(plain.logits[0][1:], alone.logits[0])) > subject.tolerance:
        raise Inconsistent(f"the plain model's padded row differs from the row alone by {off:.1e}")
    worst = 0.0
    for row, (start, length) in enumerate(((0, PROMPT), (gap, SHORTER))):
        sequence = found.sequences[row : row + 1, start:]
        expected = subject.masked(sequence, kept[row], length)[:, length - 1 : -1]
        got = torch.stack(found.logits, 1)[row : row + 1]
        worst = max(worst, equal(got, expected, f"padded batch, row {row}", subject.tolerance))
    return worst


def attention(subject: Subject) -> float | None:
    """`scorers.attention` at both stages is what ``output_attentions`` reports."""
    if subject.backend != "eager":
        return None
    with torch.no_grad(), token_pruning(subject.model, CONFIG, scorers.attention(4)) as trace:
        subject.model(input_ids=subject.tokens, use_cache=False)
    worst, kept = 0.0, {}
    for stage in CONFIG.layers:
        if stage not in trace.scores:
            raise Wrong(f"nothing was scored at layer {stage} and nobody said so")
        output = masked_forward(subject.model, subject.tokens, kept, PROMPT, output_attentions=True)
        paid = attentions_of(subject, output)[stage]
        here = kept[max(kept)] if kept else torch.arange(PROMPT)
        expected = paid[0, :, -4:].mean(dim=(0, 1))[here]
        worst = max(worst, equal(trace.scores[stage][0], expected, f"attention at layer {stage}", subject.tolerance))
        kept[stage] = trace.kept_positions[stage][0].cpu()
    return worst


def flops(subject: Subject) -> float | None:
    """`budget.prefill_flops` is what torch counts in one plain eager forward.

    Not of what a layer with a state does with it: that is as many FLOPs as its chunks make of it, or none that torch
    counts. There the matrices and convolutions are compared.
    """
    if subject.backend != "eager":
        return None
    shape = ModelShape.from_model(subject.model)
    said = prefill_flops(shape, [PROMPT] * shape.num_layers, causal=False, logits_positions=PROMPT)
    said -= PROMPT * sum(layer.state_flops for layer in shape.layers)
    with FlopCounterMode(display=False) as counter:
        subject.plain(subject.tokens)
    by_module, counted = counter.get_flop_counts(), counter.get_total_flops()
    paths = {module: path for path, module in subject.model.named_modules()}
    for layer, module in zip(shape.layers, find_layers(subject.model), strict=True):
        if layer.state_flops:
            # What the layer multiplies itself; linear parts do it as well, where their inputs are not contiguous.
            parts = [module, *(part for part in module.modules() if isinstance(part, torch.nn.Linear))]
            named = (by_module.get(f"{type(subject.model).__name__}.{paths[part]}", {}) for part in parts)
            whole, *linear = (ops.get(torch.ops.aten.bmm, 0) for ops in named)
            counted -= whole - sum(linear) - layer.flops_per_pair * PROMPT**2
    if abs(said / counted - 1) > FLOP_TOLERANCE:
        raise Wrong(f"FLOPs: said {said:.4g}, counted {counted:.4g} ({said / counted - 1:+.1%})")
    return abs(said / counted - 1)


CHECKS: dict[str, Callable[[Subject], float | None]] = {
    "exact": exact, "prefill": prefill, "decode": decode, "second turn": second_turn, "padded": padded,
    "attention": attention, **{name: label_check(name) for name in LABEL_NAMES}, "flops": flops,
}  # fmt: skip
ENGINE = ("exact", "prefill", "decode", "second turn", "padded")
QUICK = ("exact", "decode")
