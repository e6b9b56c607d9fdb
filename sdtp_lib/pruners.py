"""`TokenPruners`: one small network a stage that says how much each prompt token matters (paper, section 3.2).

Knows hidden states and positions, not how its scores are used nor how they were learned. The paper's pruner is
``W2 GELU(W1 x)``, ``W1: D -> D/4``, on the token's hidden state. Two optional inputs, both cheap, tell a token what its
own hidden state cannot: how far from the end it is, and what the last tokens ask for. Axes: B batch, n tokens, D hidden
size, Q last tokens, H query heads, R rank.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sdtp_lib.blend import Blend

FEATURES = ("hidden", "distance", "query")
HEADS = ("score", "gumbel")
_DECAYS = (8.0, 32.0, 128.0, 512.0)  # tokens
_DISTANCE_INPUTS = len(_DECAYS) + 4


class TokenPruners(nn.Module, PyTorchModelHubMixin, library_name="sdtp", repo_url="https://arxiv.org/abs/2504.04514"):
    """The pruners of all stages; a scorer for `token_pruning`. Saved as safetensors with its config, and nothing else.

    Parameters
    ----------
    hidden_size
        D of the model to prune.
    layers
        0-based layers before which it can score, one network each.
    width
        Inner width, default D / 4.
    head
        ``"score"``: D/4 -> 1. ``"gumbel"``: the paper's D/4 -> 2 (drop, keep), sampled by Gumbel-softmax in training.
    features
        Inputs: ``"hidden"`` always; ``"distance"`` adds the distance to the prompt's end, ``"query"`` a low-rank
        query-key product with the last ``query_window`` tokens.
    query_rank, query_heads, query_window
        Size of the query-key term: R dimensions in all, split over H heads.
    blend
        Fields of `sdtp_lib.blend.Blend`: how the learned score is smoothed and mixed with attention and recency when
        tokens are chosen (never in training). None: the learned score alone, as in the paper.
    num_layers, model_type, base_model, weights_fingerprint
        Which model they were trained on: sizes are checked (error), the fingerprint too (warning).
    default_ratio
        The keep ratio they are meant for, for callers who name none.
    notes
        Free facts that travel in the config (data, seed, label).

    Raises
    ------
    ValueError
        For an unknown feature or head, no layers, a rank that the heads do not divide, or a blend of nothing.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        width: int | None = None,
        head: str = "score",
        features: Sequence[str] = ("hidden",),
        query_rank: int = 32,
        query_heads: int = 8,
        query_window: int = 16,
        blend: dict[str, float | int] | None = None,
        num_layers: int | None = None,
        model_type: str | None = None,
        base_model: str | None = None,
        weights_fingerprint: str | None = None,
        default_ratio: float = 0.9,
        notes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(features) - set(FEATURES))
        if unknown or "hidden" not in features:
            raise ValueError(f"features={tuple(features)} must hold 'hidden' and may add 'distance' and 'query' only.")
        if head not in HEADS:
            raise ValueError(f"head={head!r} is unknown: choose one of {', '.join(HEADS)}.")
        if not layers:
            raise ValueError("layers=() names no layer to score at: give at least one index, such as (4,).")
        if query_rank % query_heads:
            raise ValueError(f"query_rank={query_rank} is not a multiple of query_heads={query_heads}.")
        self.hidden_size, self.layers = int(hidden_size), tuple(int(layer) for layer in layers)
        self.width = int(width or max(1, hidden_size // 4))
        self.features, self.head, self.default_ratio = tuple(features), head, default_ratio
        self.query_rank, self.query_heads, self.query_window = query_rank, query_heads, query_window
        self.blend = None if blend is None else Blend(**blend)
        self.num_layers, self.model_type, self.base_model = num_layers, model_type, base_model
        self.weights_fingerprint, self.notes = weights_fingerprint, dict(notes or {})
        # String keys: module names may not hold dots and ModuleDict wants strings.
        self.stages = nn.ModuleDict({str(layer): _StagePruner(self) for layer in self.layers})

    @classmethod
    def for_model(cls, model: nn.Module, layers: Sequence[int], **options: Any) -> TokenPruners:
        """Untrained pruners with the sizes, name and fingerprint of ``model`` (a causal LM of transformers)."""
        text = model.config.get_text_config()
        described = {
            "num_layers": text.num_hidden_layers,
            "model_type": text.model_type,
            "base_model": getattr(model, "name_or_path", None) or None,
            "weights_fingerprint": weights_fingerprint(model),
        }
        return cls(text.hidden_size, layers, **{**described, **options})

    @property
    def name(self) -> str:
        """How result rows call this scorer."""
        return "learned"

    def check(self, model: nn.Module, config: Any) -> None:
        """Refuse a model of other sizes or layers without a pruner, before any compute; warn of other weights.

        Raises
        ------
        ValueError
            Naming both sizes, or both lists of layers.
        """
        lacking = [layer for layer in config.layers if layer not in self.layers]
        if lacking:
            raise ValueError(
                f"layers={list(config.layers)} names {lacking}, but these pruners were made for layers "
                f"{list(self.layers)}: prune at those, or train pruners for the missing ones."
            )
        text = model.config.get_text_config()
        for field, own, other in (
            ("hidden_size", self.hidden_size, text.hidden_size),
            ("num_layers", self.num_layers, text.num_hidden_layers),
            ("model_type", self.model_type, text.model_type),
        ):
            if own is not None and own != other:
                raise ValueError(
                    f"{field}={own} of these pruners (base model {self.base_model}) does not fit the model's {other}: "
                    "load pruners that were trained on this model, or train some."
                )
        if self.weights_fingerprint is not None and weights_fingerprint(model) != self.weights_fingerprint:
            warnings.warn(
                f"these pruners were trained on other weights of the same shape ({self.base_model}): "
                "expect worse scores, or train on this model.",
                stacklevel=2,
            )

    @torch.no_grad()
    def forward(self, stage: Any) -> Tensor:
        """Scores (B, n) of the tokens alive at ``stage``, higher is more important; float32."""
        hidden_states = stage.hidden_states
        network = self.stages[str(stage.layer_index)]
        # Under a device_map each decoder layer has its own device: its pruner moves there once.
        network.to(hidden_states.device)
        learned = network(hidden_states, stage.positions, stage.valid, stage.prompt_lengths)
        return learned if self.blend is None else self.blend(learned, stage)

    def score(
        self, layer: int, hidden_states: Tensor, positions: Tensor, valid: Tensor, prompt_lengths: Tensor
    ) -> Tensor:
        """Differentiable scores (B, n) at ``layer``.

        Parameters
        ----------
        hidden_states
            (B, n, D), the input of decoder layer ``layer``.
        positions, valid
            (B, n): index of each token in its own prompt (-1 for padding), and which tokens are real.
        prompt_lengths
            (B,) real tokens a prompt.
        """
        return self.stages[str(layer)](hidden_states, positions, valid, prompt_lengths)

    def keep_probability(
        self,
        layer: int,
        hidden_states: Tensor,
        positions: Tensor,
        valid: Tensor,
        prompt_lengths: Tensor,
        tau: float = 1.0,
    ) -> Tensor:
        """(B, n) the paper's M = GumbelSoftmax(pi), the share of "keep" in a relaxed sample; ``head="gumbel"`` only."""
        if self.head != "gumbel":
            raise ValueError("head='score' has no keep probability: make TokenPruners(..., head='gumbel').")
        logits = self.stages[str(layer)].logits(hidden_states, positions, valid, prompt_lengths)
        return F.gumbel_softmax(logits, tau=tau, dim=-1)[..., 1]

    def flops_per_token(self) -> float:
        """Floating-point operations that one stage spends on one token (a multiply-add counts 2)."""
        inputs = self.hidden_size
        extra = (_DISTANCE_INPUTS if "distance" in self.features else 0) + (
            self.query_heads if "query" in self.features else 0
        )
        flops = 2 * self.width * (inputs + extra) + 2 * (self.width + extra) * (2 if self.head == "gumbel" else 1)
        if "query" in self.features:
            flops += 2 * self.query_rank * inputs + 2 * self.query_rank * self.query_window
        if self.blend is not None:
            flops += self.blend.flops_per_token(inputs)
        return float(flops)

    def extra_repr(self) -> str:
        """For ``print(pruners)``."""
        return f"layers={list(self.layers)}, features={self.features}, head={self.head!r}, base={self.base_model!r}"


class _StagePruner(nn.Module):
    """The network of one stage: normalised hidden state and side inputs -> inner width -> score."""

    def __init__(self, owner: TokenPruners) -> None:
        super().__init__()
        size, width = owner.hidden_size, owner.width
        self.uses_distance, self.uses_query = "distance" in owner.features, "query" in owner.features
        self.heads, self.window = owner.query_heads, owner.query_window
        self.down = nn.Linear(size, width)
        outputs = 2 if owner.head == "gumbel" else 1
        self.out = nn.Linear(width, outputs)
        extra = (_DISTANCE_INPUTS if self.uses_distance else 0) + (self.heads if self.uses_query else 0)
        if extra:
            self.side = nn.Linear(extra, width, bias=False)
            self.skip = nn.Linear(extra, outputs, bias=False)
        if self.uses_query:
            self.query = nn.Linear(size, owner.query_rank, bias=False)
            self.key = nn.Linear(size, owner.query_rank, bias=False)

    def forward(self, hidden_states: Tensor, positions: Tensor, valid: Tensor, prompt_lengths: Tensor) -> Tensor:
        logits = self.logits(hidden_states, positions, valid, prompt_lengths)
        return logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]

    def logits(self, hidden_states: Tensor, positions: Tensor, valid: Tensor, prompt_lengths: Tensor) -> Tensor:
        """(B, n, 1) the score, or (B, n, 2) the paper's drop and keep logits; float32."""
        inner, keys = self._projected(hidden_states)
        if not (self.uses_distance or self.uses_query):
            return self.out(F.gelu(inner))
        distance = (prompt_lengths[:, None].to(positions.device) - 1 - positions).clamp(min=0)
        side = []
        if self.uses_distance:
            side.append(_distance_inputs(distance, prompt_lengths))
        if self.uses_query:
            side.append(self._query_inputs(hidden_states, keys, distance, valid))
        side = torch.cat(side, dim=-1)
        return self.out(F.gelu(inner + self.side(side))) + self.skip(side)

    def _projected(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Inner activations (B, n, width) and keys (B, n, R) of the normalised hidden states: one product, float32."""
        # Hidden states grow a hundredfold with depth and have a few huge dimensions: without a norm the first layer of
        # the pruner saturates. The norm is one number a token, so it is applied after the product, to fewer numbers.
        layers = [self.down, self.key] if self.uses_query else [self.down]
        weight = torch.cat([layer.weight for layer in layers]).to(hidden_states.dtype)
        product = F.linear(_safe(hidden_states), weight).float() * _inverse_rms(_safe(hidden_states))
        inner, keys = product.split([self.down.out_features, product.shape[-1] - self.down.out_features], dim=-1)
        return inner + self.down.bias.float(), keys

    def _query_inputs(self, hidden_states: Tensor, keys: Tensor, distance: Tensor, valid: Tensor) -> Tensor:
        """(B, n, H): what the last tokens look for, per head; log-mean-exp over the last ``query_window`` tokens."""
        # The prompt's last tokens, wherever they stand: in training the response comes after them in the same row.
        columns = torch.arange(valid.shape[1], device=valid.device)
        end = (columns * valid).amax(dim=1, keepdim=True)
        places = end - torch.arange(self.window - 1, -1, -1, device=valid.device)
        within = places.clamp(min=0)
        last = _safe(hidden_states.gather(1, within[..., None].expand(-1, -1, hidden_states.shape[-1])))
        asks = (places >= 0) & valid.gather(1, within) & (distance.gather(1, within) < self.window)
        queries = F.linear(last, self.query.weight.to(last.dtype)).float() * _inverse_rms(last)
        queries, keys = (each.unflatten(-1, (self.heads, -1)) for each in (queries, keys))
        products = torch.einsum("bqhr,bnhr->bnhq", queries, keys) / math.sqrt(keys.shape[-1])
        products = products.masked_fill(~asks[:, None, None, :], -torch.inf)
        count = asks.sum(-1).clamp(min=1).float().log()[:, None, None]
        pooled = products.logsumexp(-1) - count
        return torch.where(torch.isfinite(pooled), pooled, torch.zeros_like(pooled))


def weights_fingerprint(model: nn.Module) -> str:
    """A short hash of the first numbers of the embedding, the same in float32 and bfloat16 and on any device."""
    sample = model.get_input_embeddings().weight.detach()[:64, :64].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def _inverse_rms(hidden_states: Tensor) -> Tensor:
    """(B, n, 1), float32: one over the root mean square of each token's hidden state."""
    norms = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norms.square() / hidden_states.shape[-1] + 1e-6)


def _safe(hidden_states: Tensor) -> Tensor:
    """The same direction within float16's range: there, a product of large hidden states could overflow."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    return (hidden_states.float() * _inverse_rms(hidden_states)).to(torch.float16)


def _distance_inputs(distance: Tensor, prompt_lengths: Tensor) -> Tensor:
    """(B, n, 8) smooth functions of the distance to the end (tokens) and of the place in the prompt."""
    distance = distance.float()
    length = prompt_lengths.to(distance.device)[:, None].float().clamp(min=1)
    decays = [torch.exp(-distance / scale) for scale in _DECAYS]
    place = [
        torch.log1p(distance) / 4,
        distance / length,
        # At padding the place would be -1 and its logarithm -inf, which times a zero gradient is still NaN.
        torch.log1p((length - 1 - distance).clamp(min=0)) / 4,
        (length.log() / 4).expand_as(distance),
    ]
    return torch.stack([*decays, *place], dim=-1)
