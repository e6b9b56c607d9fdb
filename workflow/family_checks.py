"""What is asked of a family: is the pruned model the masked one, are scores, labels and counts what they say?

Each check takes a `Subject` (a tiny float64 model of one family and backend) and ends in an outcome. The truth is
computed by `sdtp_lib.pruning.masked_reference`, by transformers itself (``output_attentions``, an explicit bias in the
mask) or counted by torch (`FlopCounterMode`); none of it is code that is under test.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from sdtp_lib import PruningConfig, PruningNotSupported, compute_saliency, scorers, token_pruning
from sdtp_lib.budget import prefill_flops
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.masked_reference import (
    NoReference,
    changed_masks,
    find_layers,
    hidden_keys,
    is_added,
    masked_forward,
)

RIGHT, REFUSED, WRONG, ERROR = "right", "refused", "silently wrong", "raw error"
# No truth to hold it against; the plain model does not agree with itself (padding, cache), so there is none.
UNPROVEN, UNASKED, UNBUILT = "not proven", "not asked", "not built"
# Of the largest logit, by dtype: norms and rotary tables compute in float32 also in float64 models.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
LABEL_TOLERANCE = 1e-4  # of the largest label: labels are float32
FLOP_TOLERANCE = 0.01
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
        return TOLERANCES[next(self.model.parameters()).dtype]

    @property
    def backend(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None) or "eager")

    @torch.no_grad()
    def plain(self, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False, return_dict=True, **arguments).logits

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
        if (off := _apart(nothing, plain)) > self.tolerance:
            raise NoReference(f"with nothing hidden it differs from the plain model by {off:.1e}")
        half = masked_forward(self.model, self.tokens, {1: torch.arange(0, PROMPT, 2)}, PROMPT).logits
        if _apart(half, plain) < 1e2 * self.tolerance:
            raise NoReference("hiding half of the tokens changes nothing: the layers do not read their mask")

    @functools.cached_property
    def caches_hold(self) -> None:
        """The plain model must decode from its cache what it computes at full length."""
        try:
            first = self.generate(self.tokens)
            full = self.plain(first.sequences)[:, PROMPT - 1 : -1]
        except Exception as error:
            raise Inconsistent(f"the plain model itself ends in {_line(error)}") from error
        if (off := _apart(torch.stack(first.logits, 1), full)) > self.tolerance:
            raise Inconsistent(f"the plain model's decode differs from its own full forward by {off:.1e}")


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the largest expected number (at least 1)."""
    if found.shape != expected.shape:
        raise Wrong(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    off = float((found.double() - expected.double()).abs().max()) / max(1.0, float(expected.abs().max()))
    return float("inf") if off != off else off


def _equal(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> float:
    off = _apart(found, expected)
    if not off <= tolerance:
        raise Wrong(f"{what}: off by {off:.1e} of the largest (tolerance {tolerance:.0e})")
    return off


def _kept(trace: Any, row: int = 0) -> dict[int, torch.Tensor]:
    """Stage -> kept positions of a row; nothing pruned is a fault of its own."""
    kept = {stage: p[row][p[row] >= 0].cpu() for stage, p in trace.kept_positions.items()}
    if set(kept) != set(CONFIG.layers):
        raise Wrong(f"nothing was pruned at layers {sorted(set(CONFIG.layers) - set(kept))} and nobody said so")
    if len(kept[3]) >= SHORTER:
        raise Wrong(f"{len(kept[3])} tokens were kept")
    return kept


# --- the checks


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
        raise Inconsistent(f"the plain model itself ends in {_line(error)}") from error
    with torch.no_grad(), token_pruning(subject.model, whole, scorers.random(3)) as trace:
        found = subject.model(input_ids=subject.tokens, use_cache=False, return_dict=True).logits
        again = subject.generate(subject.tokens)
    if not trace.prefills:
        raise Wrong("no prefill was seen and nobody said so")
    if not torch.equal(found, plain):
        raise Wrong(f"keep ratio 1.0: logits off by {_apart(found, plain):.1e}")
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
    return _equal(found, expected, "prefill", subject.tolerance)


def decode(subject: Subject) -> float:
    """Eight greedy steps out of the pruned cache."""
    with token_pruning(subject.model, CONFIG, scorers.random(3)) as trace:
        found = subject.generate(subject.tokens)
    kept = _kept(trace)
    _ = subject.reference_holds, subject.caches_hold
    expected = masked_forward(subject.model, found.sequences, kept, PROMPT).logits[:, PROMPT - 1 : -1]
    return _equal(torch.stack(found.logits, 1), expected, "decode", subject.tolerance)


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
    _ = subject.reference_holds, subject.caches_hold
    expected = masked_forward(subject.model, found.sequences, kept, PROMPT).logits[:, longer.shape[1] - 1 : -1]
    return _equal(torch.stack(found.logits, 1), expected, "second turn", subject.tolerance)


def padded(subject: Subject) -> float:
    """A batch of two prompts, the shorter one padded on the left: prefill and three steps, each row as if alone."""
    if subject.backend == "eager" and subject.tolerance == TOLERANCES[torch.float64]:
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
    if (off := _apart(plain.logits[0][1:], alone.logits[0])) > subject.tolerance:
        raise Inconsistent(f"the plain model's padded row differs from the row alone by {off:.1e}")
    worst = 0.0
    for row, (start, length) in enumerate(((0, PROMPT), (gap, SHORTER))):
        sequence = found.sequences[row : row + 1, start:]
        expected = masked_forward(subject.model, sequence, kept[row], length).logits[:, length - 1 : -1]
        got = torch.stack(found.logits, 1)[row : row + 1]
        worst = max(worst, _equal(got, expected, f"padded batch, row {row}", subject.tolerance))
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
        paid = _attentions(subject, output)[stage]
        here = kept[max(kept)] if kept else torch.arange(PROMPT)
        expected = paid[0, :, -4:].mean(dim=(0, 1))[here]
        worst = max(worst, _equal(trace.scores[stage][0], expected, f"attention at layer {stage}", subject.tolerance))
        kept[stage] = trace.kept_positions[stage][0].cpu()
    return worst


def _attentions(subject: Subject, output: Any) -> Any:
    found, layers = getattr(output, "attentions", None), len(find_layers(subject.model))
    if not found or len(found) != layers or any(a is None or a.shape[-2:] != (PROMPT, PROMPT) for a in found):
        raise NoReference("output_attentions gives no (B, H, T, T) tensor for each layer")
    return found


def flops(subject: Subject) -> float | None:
    """`budget.prefill_flops` is what torch counts in one plain eager forward."""
    if subject.backend != "eager":
        return None
    from torch.utils.flop_counter import FlopCounterMode

    shape = ModelShape.from_model(subject.model)
    said = prefill_flops(shape, [PROMPT] * shape.num_layers, causal=False, logits_positions=PROMPT)
    with FlopCounterMode(display=False) as counter:
        subject.plain(subject.tokens)
    counted = counter.get_total_flops()
    if abs(said / counted - 1) > FLOP_TOLERANCE:
        raise Wrong(f"FLOPs: said {said:.4g}, counted {counted:.4g} ({said / counted - 1:+.1%})")
    return abs(said / counted - 1)


# --- labels against an explicit bias in the mask


def label_check(name: str) -> Callable[[Subject], float | None]:
    """The check of one label, on one sample of a prompt and eight response tokens."""

    def check(subject: Subject) -> float | None:
        stages, prompt = list(CONFIG.layers), PROMPT - RESPONSE
        ids = subject.tokens[0].tolist()
        sample = {"id": "0", "prompt_ids": ids[:prompt], "response_ids": ids[prompt:]}
        with tempfile.TemporaryDirectory() as folder:
            row = compute_saliency(subject.model, [sample], stages, name, cache_dir=folder, progress=False)[0]
        found = {stage: torch.tensor(row[f"layer_{stage}"])[:prompt] for stage in stages}
        _ = subject.reference_holds
        expected = _expected_label(subject, name, stages)
        worst = 0.0
        for stage in stages:
            # In units of the largest: whether a loss is summed or averaged is not the point here.
            said, true = found[stage].double(), expected[stage][:prompt].double()
            said, true = said / said.max().clamp_min(1e-30), true / true.max().clamp_min(1e-30)
            worst = max(worst, _equal(said, true, f"{name} at layer {stage}", LABEL_TOLERANCE))
        return worst

    check.__doc__ = f"The label {name!r} against an explicit bias in each layer's mask."
    return check


def _expected_label(subject: Subject, name: str, stages: list[int]) -> dict[int, torch.Tensor]:
    model, tokens, first = subject.model, subject.tokens, PROMPT - RESPONSE
    if name == "attention_entropy":
        output = _eager_attentions(subject)
        share = {stage: -torch.xlogy(a, a).mean(1)[0, first:] for stage, a in enumerate(output)}
        return {stage: share[stage].mean(0) for stage in stages}
    layers, dtype = find_layers(model), next(model.parameters()).dtype
    if name == "gradient_x_hidden":
        scale = {s: torch.zeros(1, PROMPT, 1, dtype=dtype, requires_grad=True) for s in stages}

        def scaled(stage: int):
            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
                if args:
                    return (args[0] * (1 + scale[stage]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + scale[stage])}

            return hook

        handles = [layers[s].register_forward_pre_hook(scaled(s), with_kwargs=True) for s in stages]
        try:
            gradients = torch.autograd.grad(_loss(model, tokens, first, name), list(scale.values()))
        finally:
            for handle in handles:
                handle.remove()
        return {s: g[0, :, 0].abs() for s, g in zip(stages, gradients, strict=True)}
    groups = _kv_heads(subject) if name == "removal_by_head" else 1
    heads = int(model.config.get_text_config().num_attention_heads)
    bias = [torch.zeros(1, groups, 1, PROMPT, dtype=dtype, requires_grad=True) for _ in layers]

    def add(index: int, mask: Any, hidden: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(PROMPT, dtype=torch.bool)
        mask = hidden_keys(mask, nothing, hidden.dtype)
        if mask.dim() != 4:
            raise NoReference(f"its masks have {mask.dim()} axes: a bias for each head cannot be put into them")
        if not is_added(mask):
            visible = mask == mask[..., :1, :1]  # a token sees itself
            mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)
        return mask + bias[index].repeat_interleave(heads // groups if groups > 1 else 1, dim=1)

    with changed_masks(model, add):
        loss = _loss(model, tokens, first, name)
    gradients = [g[0, :, 0] for g in torch.autograd.grad(loss, bias)]
    expected = {}
    for stage in stages:
        below = gradients[stage:]
        if name == "removal_joint":
            expected[stage] = sum(g.sum(0) for g in below).abs()
        else:
            expected[stage] = sum(g.abs().sum(0) for g in below)
    return expected


def _loss(model: nn.Module, tokens: torch.Tensor, first: int, name: str) -> torch.Tensor:
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False, return_dict=True).logits[0, first - 1 : -1]
        loss = nn.functional.cross_entropy(logits.double(), tokens[0, first:], reduction="none")
        if name != "removal_odds":
            return loss.sum()
        signs = torch.randint(0, 2, (RESPONSE,), generator=torch.Generator().manual_seed(20250404)).mul(2).sub(1)
        return ((-loss - (-torch.expm1(-loss)).clamp(min=1e-4).log()) * signs).sum()


def _eager_attentions(subject: Subject) -> Any:
    config = subject.model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            output = subject.model(input_ids=subject.tokens, use_cache=False, output_attentions=True, return_dict=True)
    finally:
        config._attn_implementation = before
    return _attentions(subject, output)


def _kv_heads(subject: Subject) -> int:
    """Heads of the keys that attention computes with: a latent cache holds fewer."""
    heads = int(subject.model.config.get_text_config().num_attention_heads)
    layer = find_layers(subject.model)[1]
    groups = [g for module in layer.modules() if isinstance(g := getattr(module, "num_key_value_groups", None), int)]
    return heads // groups[0] if groups else heads


LABEL_NAMES = ("gradient_x_hidden", "removal", "removal_by_head", "removal_joint", "removal_odds", "attention_entropy")
CHECKS: dict[str, Callable[[Subject], float | None]] = {
    "exact": exact, "prefill": prefill, "decode": decode, "second turn": second_turn, "padded": padded,
    "attention": attention, **{name: label_check(name) for name in LABEL_NAMES}, "flops": flops,
}  # fmt: skip
ENGINE = ("exact", "prefill", "decode", "second turn", "padded")
QUICK = ("exact", "decode")


def judged(check: Callable[[Subject], float | None], subject: Subject) -> Result | None:
    """Run one check; None where it does not apply to this backend. Only a signal or a crash gets past this."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            off = check(subject)
        except (PruningNotSupported, ValueError) as refusal:
            ours = isinstance(refusal, PruningNotSupported) or _raised_by_us(refusal)
            return Result(REFUSED if ours else ERROR, _line(refusal))
        except Wrong as wrong:
            spoken = [str(w.message) for w in said if "prun" in str(w.message)]
            return Result(REFUSED, f"said: {spoken[0]}"[:200]) if spoken else Result(WRONG, str(wrong))
        except Inconsistent as model:
            return Result(UNASKED, str(model))
        except NoReference as unknown:
            return Result(UNPROVEN, str(unknown))
        except Exception as error:
            return Result(ERROR, _line(error))
    return None if off is None else Result(RIGHT, difference=off)


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "sdtp_lib" in trace.tb_frame.f_code.co_filename.replace("\\", "/").split("/")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PruningNotSupported) else f"{type(error).__name__}: {text}"
