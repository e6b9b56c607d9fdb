"""Whether a way of adding a bias to attention scores is right, tried on the model itself with a short prompt.

Part of the door to transformers' internals (`architectures`). Knows no way itself: it is handed them. Axes: B batch, T
tokens, H heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from sdtp_lib.architectures.attention_interface import backend_named
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.config import PruningNotSupported
from sdtp_lib.load_failures import first_line

_PROBE_TOKENS = 12


def first_that_proves_right(model: nn.Module, architecture: Architecture, routes: Mapping[str, Callable]) -> str:
    """The name of the first of ``routes`` that is right on ``model``; see `attention_bias.bias_route`."""
    probe = _Probe(model, architecture)
    problems = []
    for name, route in routes.items():
        try:
            problem = probe.problem_of(route, check_odds=name == "mask")
        except Exception as error:  # whatever a family's own code raises here, it means: not this way
            problem = f"{type(error).__name__}: {first_line(error)}"
        if problem is None:
            return name
        problems.append(f"through the {name}: {problem}")
    mode = " (the model is in training mode: call model.eval())" if architecture.stack.training else ""
    raise PruningNotSupported(
        f"{architecture.model_type}: a bias on the keys of its attention could not be verified{mode}; "
        f"{'; '.join(problems)}. Use label='gradient_x_hidden' and losses on labels only, which need none."
    )


class _Probe:
    """A short prompt run with and without a bias."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        embedding = model.get_input_embeddings().weight
        special = {getattr(architecture.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
        plain = [token for token in range(3, min(len(embedding), 1000)) if token not in special]
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))[: _PROBE_TOKENS + 1]
        chosen = torch.tensor(plain)[order].to(embedding.device)
        self.ids, self.another = chosen[None, :-1], chosen[-1]
        half = model.dtype in (torch.bfloat16, torch.float16)
        self.tolerance = 5e-2 if half else 1e-4  # rotary tables and norms are float32 in float64 models too
        with torch.no_grad():
            self.plain = self._logits()

    def problem_of(self, route: Callable, check_odds: bool) -> str | None:
        """What is wrong with ``route`` on this model, or None."""
        leaves: dict[int, torch.Tensor] = {}

        def zero(index: int, key: torch.Tensor) -> torch.Tensor:
            if index in leaves:
                raise PruningNotSupported(f"layer {index} runs more than once per forward, each time with one bias.")
            leaves[index] = torch.zeros(key.shape[:3], dtype=key.dtype, device=key.device, requires_grad=True)
            return leaves[index]

        with torch.enable_grad(), route(self.architecture, zero):
            logits = self._logits()
            change = _relative_change(logits, self.plain)
            if not change <= self.tolerance:
                return f"a bias of 0 changes the logits by {change:.1e} of their spread"
            gradients = torch.autograd.grad(logits.square().sum(), list(leaves.values()), allow_unused=True)
        without = sorted({*range(len(self.architecture.layers))} - set(leaves))
        without += [index for index, gradient in zip(leaves, gradients, strict=True) if gradient is None]
        if without:
            return f"no bias reaches the scores of layers {without}"
        return self._removed_token_that_still_matters(route) or (self._odds(route) if check_odds else None)

    def _removed_token_that_still_matters(self, route: Callable) -> str | None:
        gone = _PROBE_TOKENS // 3
        other = self.ids.clone()
        other[0, gone] = self.another

        def remove(_index: int, key: torch.Tensor) -> torch.Tensor:
            bias = torch.zeros(key.shape[0], key.shape[2], dtype=key.dtype, device=key.device)
            return bias.index_fill(1, torch.tensor([gone], device=key.device), -1e4)

        with torch.no_grad(), route(self.architecture, remove):
            change = _relative_change(self._logits(other)[:, gone + 1 :], self._logits()[:, gone + 1 :])
        return (
            None if change <= self.tolerance else f"a key under a bias of -10,000 still changes logits by {change:.1e}"
        )

    def _odds(self, route: Callable) -> str | None:
        """Whether a bias b multiplies a key's odds by exp(b): not where scores are scaled after the mask is added."""
        for layer in self._one_of_each_kind():
            shift = torch.linspace(-1, 1, _PROBE_TOKENS)

            def some(index: int, key: torch.Tensor, layer=layer, shift=shift) -> torch.Tensor | None:
                return shift.to(key.device, key.dtype)[None].expand(key.shape[0], -1) if index == layer else None

            with torch.no_grad(), backend_named(self.architecture.config, "eager"):
                before = self.model(self.ids, use_cache=False, output_attentions=True).attentions
                with route(self.architecture, some):
                    after = self.model(self.ids, use_cache=False, output_attentions=True).attentions
            if not before or not after or before[layer] is None:
                return "its attention weights are not shown, so the size of a bias cannot be checked"
            last, biased = before[layer][0, :, -1].double(), after[layer][0, :, -1].double()
            seen = (last > 1e-4) & (biased > 1e-4)
            odds = ((biased.log() - last.log()) - shift.to(last.device)).masked_fill(~seen, 0)
            centre = odds.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
            wrong = float(((odds - centre).masked_fill(~seen, 0)).abs().max())
            if not wrong <= max(self.tolerance, 1e-3):
                return (
                    f"a bias b does not multiply a key's odds by exp(b) at layer {layer}: off by {wrong:.1e} in the log"
                )
        return None

    def _one_of_each_kind(self) -> list[int]:
        kinds = getattr(self.architecture.config, "layer_types", None) or [""] * len(self.architecture.layers)
        return sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())

    def _logits(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(self.ids if ids is None else ids, use_cache=False).logits.float()


def _relative_change(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of a difference of logits over that of the logits about their mean."""
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((logits - expected).detach().square().mean().sqrt() / spread)
