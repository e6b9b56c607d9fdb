"""The model under test, and how a check is judged: the plain model's own numbers, tolerances and outcomes.

The checks are in `family_checks` and `family_labels`. The plain model must agree with itself (its cache, its padding,
its mask) before pruning is compared with it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.masked_reference import NoReference, find_layers, masked_forward, parts_with_state

RIGHT, REFUSED, WRONG, ERROR = "right", "refused", "silently wrong", "raw error"
# No truth to hold it against; the plain model does not agree with itself (padding, cache), so there is none.
UNPROVEN, UNASKED, UNBUILT = "not proven", "not asked", "not built"
# Of the largest logit, by dtype: norms, rotary tables and eager softmax compute in float32 also in float64 models.
TOLERANCES = {torch.float64: 3e-6, torch.float32: 1e-4}
# Layers that keep a state compute it in float32 also in float64 models, and differently step by step and at once.
STATE_TOLERANCE = 2e-5
PROMPT, SHORTER, RESPONSE, DECODED, TURN = 64, 48, 8, 8, 5
CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4, local_ratio=0.0)


@dataclass(frozen=True)
class Result:
    """How one check ended; ``difference`` and ``tolerance`` in the check's own unit."""

    outcome: str
    detail: str = ""
    difference: float | None = None
    tolerance: float | None = None


class Wrong(AssertionError):
    """A claim that does not hold and of which nobody said so."""


class Inconsistent(RuntimeError):
    """The plain model does not agree with itself, so nothing can be held against it."""


@dataclass
class Subject:
    """A model under test and the prompts that it gets."""

    model: nn.Module

    @functools.cached_property
    def tokens(self) -> torch.Tensor:
        return torch.randint(5, 120, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    @functools.cached_property
    def turn(self) -> torch.Tensor:
        return torch.randint(5, 120, (1, TURN), generator=torch.Generator().manual_seed(2))

    @functools.cached_property
    def tolerance(self) -> float:
        exact = TOLERANCES[next(self.model.parameters()).dtype]
        return max(exact, STATE_TOLERANCE) if parts_with_state(self.model) else exact

    @property
    def backend(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None) or "eager")

    @torch.no_grad()
    def plain(self, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False, return_dict=True, **arguments).logits

    def positions(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``generate`` hands to a prefill, and the label pass too: left alone, RoBERTa's kin begin at 2."""
        takes = "position_ids" in inspect.signature(type(self.model).forward).parameters
        return {"position_ids": torch.arange(tokens.shape[1])[None]} if takes else {}

    def masked(self, tokens: torch.Tensor, kept: dict[int, torch.Tensor], prompt_tokens: int) -> torch.Tensor:
        """The truth for ``tokens`` that came out of ``generate``: logits at full length, dropped tokens hidden."""
        return masked_forward(self.model, tokens, kept, prompt_tokens, **self.positions(tokens)).logits

    def generate(self, tokens: torch.Tensor, new_tokens: int = DECODED, **arguments: Any) -> Any:
        arguments.setdefault("attention_mask", torch.ones_like(tokens))
        return self.model.generate(
            tokens, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True, **arguments,
        )  # fmt: skip

    @functools.cached_property
    def reference_holds(self) -> None:
        """Refuse to judge where the reference is no truth: with nothing hidden it must be the plain model."""
        plain = self.plain(self.tokens)
        if not bool(torch.isfinite(plain).all()):
            raise Inconsistent("the plain model's logits are not finite")
        nothing = masked_forward(self.model, self.tokens, {}, PROMPT).logits
        if (off := apart(nothing, plain)) > self.tolerance:
            raise NoReference(f"with nothing hidden it differs from the plain model by {off:.1e}")
        half = masked_forward(self.model, self.tokens, {1: torch.arange(0, PROMPT, 2)}, PROMPT).logits
        if apart(half, plain) < 1e2 * self.tolerance:
            raise NoReference("hiding half of the tokens changes nothing: the layers do not read their mask")

    @functools.cached_property
    def caches_hold(self) -> None:
        """The plain model must decode from its cache what it computes at full length."""
        try:
            first = self.generate(self.tokens)
            full = self.plain(first.sequences, **self.positions(first.sequences))[:, PROMPT - 1 : -1]
        except Exception as error:
            raise Inconsistent(f"the plain model itself ends in {line_of(error)}") from error
        if (off := apart(torch.stack(first.logits, 1), full)) > self.tolerance:
            raise Inconsistent(f"the plain model's decode differs from its own full forward by {off:.1e}")

    @functools.cached_property
    def turns_hold(self) -> None:
        """The plain model must compute a turn on its cache as at full length (Jamba's states begin anew there)."""
        first = self.generate(self.tokens)
        name, cache = next((name, value) for name, value in first.items() if isinstance(value, Cache))
        longer = torch.cat([first.sequences, self.turn], dim=1)
        again = self.generate(longer, 3, **{name: cache})
        full = self.plain(again.sequences, **self.positions(again.sequences))[:, longer.shape[1] - 1 : -1]
        if (off := apart(torch.stack(again.logits, 1), full)) > self.tolerance:
            raise Inconsistent(f"the plain model's second turn differs from its own full forward by {off:.1e}")


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the largest expected number (at least 1)."""
    if found.shape != expected.shape:
        raise Wrong(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    off = float((found.double() - expected.double()).abs().max()) / max(1.0, float(expected.abs().max()))
    return float("inf") if off != off else off


def equal(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> float:
    off = apart(found, expected)
    if not off <= tolerance:
        raise Wrong(f"{what}: off by {off:.1e} of the largest (tolerance {tolerance:.0e})")
    return off


def attentions_of(subject: Subject, output: Any) -> Any:
    found, layers = getattr(output, "attentions", None), len(find_layers(subject.model))
    if not found or len(found) != layers or any(a is None or a.shape[-2:] != (PROMPT, PROMPT) for a in found):
        raise NoReference("output_attentions gives no (B, H, T, T) tensor for each layer")
    return found


def judged(check: Callable[[Subject], float | None], subject: Subject) -> Result | None:
    """Run one check; None where it does not apply to this backend. Only a signal or a crash gets past this."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            off = check(subject)
        except (PruningNotSupported, ValueError) as refusal:
            ours = isinstance(refusal, PruningNotSupported) or _raised_by_us(refusal)
            return Result(REFUSED if ours else ERROR, line_of(refusal))
        except Wrong as wrong:
            spoken = [str(w.message) for w in said if "prun" in str(w.message)]
            return Result(REFUSED, f"said: {spoken[0]}"[:200]) if spoken else Result(WRONG, str(wrong))
        except Inconsistent as model:
            return Result(UNASKED, str(model))
        except NoReference as unknown:
            return Result(UNPROVEN, str(unknown))
        except Exception as error:
            return Result(ERROR, line_of(error))
    return None if off is None else Result(RIGHT, difference=off)


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "sdtp_lib" in trace.tb_frame.f_code.co_filename.replace("\\", "/").split("/")


def line_of(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PruningNotSupported) else f"{type(error).__name__}: {text}"
