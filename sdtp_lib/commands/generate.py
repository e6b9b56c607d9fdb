"""``generate``: each prompt answered by the unpruned model and by the pruned one, with times, tokens and KV bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdtp_lib.commands import arguments as shared

if TYPE_CHECKING:
    from sdtp_lib.latency.generation import Generation


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sdtp_lib generate") -> int:
    """Run the command; 0 unless something is refused."""
    parser = shared.parser_of(prog, "Answer prompts greedily with and without pruning and print both, with times. "
                              "Times are of one run each; `bench` measures.")  # fmt: skip
    shared.add_model(parser)
    shared.add_prompts(parser)
    how_much = parser.add_mutually_exclusive_group()
    shared.add_budget(how_much)
    parser.add_argument("--scorer", metavar="NAME", help="a training-free score (attention_pooled, recency, ...), or "
                        "a folder or Hub id of pruners; default: pruners made for this model, else "
                        "attention_pooled")  # fmt: skip
    how_much.add_argument("--method", type=shared.method_of, metavar="NAME", help="instead of --budget: "
                          + shared.METHOD_HELP)  # fmt: skip
    parser.add_argument("--new-tokens", type=shared.count, default=128, help="longest answer")
    given = parser.parse_intermixed_args(arguments)  # files may stand after options
    prompts = shared.prompts_of(given)
    shared.check_budget(given.budget)
    model, tokenizer = shared.load(given)
    ids_of = shared.prompt_ids(prompts, model, tokenizer, given)

    import torch

    from sdtp_lib import methods
    from sdtp_lib.latency.generation import end_tokens, prefill_and_decode
    from sdtp_lib.methods.call import token_pruning

    ends = end_tokens(model)
    budget = methods.named(given.method) if given.method else given.budget
    first = torch.tensor([next(iter(ids_of.values()))[:64]], device=model.device)
    prefill_and_decode(model, first, 2)  # what only a process's first forward pays
    for name, ids in ids_of.items():
        input_ids = torch.tensor([ids], device=model.device)
        print(f"== {name}: {len(ids):,} tokens")
        full = prefill_and_decode(model, input_ids, given.new_tokens, ends=ends)
        print(f"-- unpruned: {_cost(full)}\n{tokenizer.decode(full.token_ids[0], skip_special_tokens=True)}")
        with token_pruning(model, budget, given.scorer) as trace:
            pruned = prefill_and_decode(model, input_ids, given.new_tokens, ends=ends)
        answer = tokenizer.decode(pruned.token_ids[0], skip_special_tokens=True)
        print(f"-- {given.method or 'pruned'}: {_cost(pruned)}\n{answer}")
        print(f"-- {trace}\n", flush=True)
    return 0


def _cost(generation: Generation) -> str:
    found = generation.fields()
    text = f"prefill {found['prefill_ms']:,.0f} ms"
    if steps := found["new_tokens"] - 1:
        text += f", {steps} more tokens at {found['decode_ms'] / steps:,.1f} ms"
    return f"{text}, KV cache of the prompt {generation.prompt_kv_bytes() / 1e6:,.1f} MB"
