"""Greedy generation with its clock inside: the time to the first token apart from decode.

Knows a causal LM's forward and nothing else. No value is read from the device before the end, unless generation ends at
an end token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from sdtp_lib.architectures.caches import cache_argument, cache_in, cache_lengths, kv_bytes
from sdtp_lib.latency.measure import Stopwatch


@dataclass
class Generation:
    """What a timed generation gave.

    Attributes
    ----------
    token_ids : Tensor (B, N)
        The new tokens, the prefill's one included.
    cache
        The cache after the last step.
    parts_ms : dict
        Milliseconds by part: the prefill's parts and ``"decode"``.
    """

    token_ids: torch.Tensor
    cache: Any
    parts_ms: dict[str, float]

    def fields(self) -> dict[str, float | int | None]:
        """The row fields: TTFT, decode, end to end, tokens per second."""
        decode_ms = self.parts_ms.get("decode", 0.0)
        ttft_ms = sum(self.parts_ms.values()) - decode_ms
        steps = self.token_ids.shape[1] - 1
        return {
            "ttft_ms": ttft_ms,
            "prefill_ms": ttft_ms,
            "decode_ms": decode_ms if steps else None,
            "end_to_end_ms": ttft_ms + decode_ms,
            "new_tokens": steps + 1,
            "decode_tokens_per_s": 1e3 * self.token_ids.shape[0] * steps / decode_ms if steps else None,
        }

    def prompt_kv_bytes(self) -> int:
        """Bytes of keys and values that the prefill left: decode adds the same number of keys to every layer."""
        added = self.token_ids.shape[1] - 1
        held = zip(kv_bytes(self.cache), cache_lengths(self.cache), strict=True)
        return sum(size * (length - added) // max(1, length) for size, length in held)


def end_tokens(model: Any) -> tuple[int, ...]:
    """The ids at which ``model.generate`` stops."""
    ends = model.generation_config.eos_token_id
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


def plain_prefill(model: Any, input_ids: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, Any]:
    """One forward over the prompt (B, T) that fills a cache; logits for the last position only."""
    output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **arguments)
    return output.logits, cache_in(output)


def plain_step(model: Any, token_ids: torch.Tensor, cache: Any, **arguments: Any) -> tuple[torch.Tensor, Any]:
    """One forward over one new token per row (B, 1)."""
    cached = cache_argument(model, cache)
    output = model(input_ids=token_ids, **cached, use_cache=True, logits_to_keep=1, **arguments)
    return output.logits, cache_in(output)


@torch.inference_mode()
def prefill_and_decode(
    model: Any,
    input_ids: torch.Tensor,
    new_tokens: int,
    watch: Stopwatch | None = None,
    *,
    ends: Collection[int] = (),
) -> Generation:
    """Prefill the prompt (B, T) once, then ``new_tokens - 1`` greedy steps; as a ``with`` around it has made the model.

    Parameters
    ----------
    watch
        Started by the caller, so that whatever it sets up counts too.
    ends
        Token ids after which it stops early (batch 1): the device is waited for at each step then.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: the prefill itself gives the first token, so ask for 1 or more.")
    watch = watch or Stopwatch(input_ids.device)
    logits, cache = plain_prefill(model, input_ids)
    tokens = [logits[:, -1].argmax(dim=-1, keepdim=True)]
    watch.mark("prefill")
    for _ in range(new_tokens - 1):
        if ends and tokens[-1].item() in ends:
            break
        logits, cache = plain_step(model, tokens[-1], cache)
        tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
    watch.mark("decode")
    return Generation(torch.cat(tokens, dim=1), cache, watch.parts_ms())
