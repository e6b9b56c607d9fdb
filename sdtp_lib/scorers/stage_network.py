"""The network of one stage: hidden states and side inputs -> one score per token. `TokenPruners` holds one per stage.

Axes: B batch, n kept tokens, D hidden size, Q query tokens, H query heads, R rank, A attention inputs.

Example: SmolLM2 (D = 576, 9 attention heads), a prompt of T = 10 of which 6 tokens are left before layer 7. The network
reads hidden states (1, 6, 576) and side inputs (1, 6, S), S = 79 numbers per token:

    distance to the end          8   of positions [0, 1, 4, 7, 8, 9], as they were in the prompt: 9, 8, 5, 2, 1, 0
    query-key products           8   one per query head, with the last 32 tokens (here: all 6)
      averaged over the passage  8   of 65 neighbours (here: all 6, so six times the same mean)
    attention of 3 layers x 9   27   paid by the query tokens in layers 4, 5, 6, strongest of 7 neighbours
      averaged over the passage 27
    score at the stage before    1   of the same 6 tokens, standardised; 0 at the first stage

and gives scores (1, 6): ``out(gelu(down(norm(x)) + side(s))) + skip(s)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtp_lib.pruning.stage import QUERY_TOKENS
from sdtp_lib.scorers.blend import average_of_neighbours, strongest_neighbour

_DECAYS = (8.0, 32.0, 128.0, 512.0)  # tokens
DISTANCE_INPUTS = len(_DECAYS) + 4


@dataclass(frozen=True)
class StageInputs:
    """What the network of one stage reads.

    Attributes
    ----------
    hidden_states
        (B, n, D), the input of the stage's decoder layer.
    positions, valid
        (B, n): index of each token in its own prompt (-1 for padding), and which tokens are real; ``valid`` is None
        where all are, and the prompt ends with the row.
    prompt_lengths
        (B,) real tokens per prompt.
    attention
        (B, n, A), `Stage.attention_mass` in the layers before the stage; with the input ``"attention"``.
    memory
        (B, n), the standardised scores of the stage before; None at the first.
    """

    hidden_states: Tensor
    positions: Tensor
    valid: Tensor | None
    prompt_lengths: Tensor
    attention: Tensor | None = None
    memory: Tensor | None = None


class StagePruner(nn.Module):
    """The network of one stage: normalised hidden state and side inputs -> inner width -> score."""

    def __init__(self, owner: Any) -> None:
        """A network with the sizes and inputs of ``owner``, a `sdtp_lib.scorers.token_pruners.TokenPruners`."""
        super().__init__()
        size, width = owner.hidden_size, owner.width
        self.uses_distance, self.uses_query = "distance" in owner.features, "query" in owner.features
        self.kernel = owner.attention_kernel if "attention" in owner.features else None
        self.passage, self.uses_memory = owner.passage_tokens, "memory" in owner.features
        self.heads, self.window = owner.query_heads, owner.query_window
        self.down = nn.Linear(size, width)
        self.out = nn.Linear(width, 1)
        self.register_buffer("decays", torch.tensor(_DECAYS), persistent=False)
        self.has_side = owner.side_inputs > 0
        if self.has_side:
            self.side = nn.Linear(owner.side_inputs, width, bias=False)
            self.skip = nn.Linear(owner.side_inputs, 1, bias=False)
        if self.uses_query:
            self.query = nn.Linear(size, owner.query_rank, bias=False)
            self.key = nn.Linear(size, owner.query_rank, bias=False)

    def forward(self, inputs: StageInputs) -> Tensor:
        """Scores (B, n), float32."""
        hidden = _safe(inputs.hidden_states)
        scale = _inverse_rms(hidden)
        inner, keys = self._projected(hidden, scale)
        if not self.has_side:
            return _in_float32(self.out, F.gelu(inner))[..., 0]
        valid, length = inputs.valid, inputs.prompt_lengths.to(hidden.device)[:, None]
        distance = (length - 1 - inputs.positions).clamp_min(0)
        # Side inputs, each (B, inputs, n), in the order of the weights.
        asked = even = strongest = None
        if self.uses_query:
            asked = self._query_inputs(hidden, scale, keys, distance, valid)
        if self.kernel:
            even = _even_share(inputs.attention, valid)
            strongest = strongest_neighbour(even, self.kernel)
        asked_near = even_near = None
        if self.passage:
            both = [part for part in (asked, even) if part is not None]
            near = list(average_of_neighbours(torch.cat(both, dim=1), valid, self.passage).split(
                [part.shape[1] for part in both], dim=1
            ))  # fmt: skip
            even_near = near.pop() if even is not None else None
            asked_near = near.pop() if asked is not None else None
        shares = [part for part in (strongest, even_near) if part is not None]
        side = [_distance_inputs(distance, length, self.decays) if self.uses_distance else None, asked, asked_near]
        side += [_in_logarithms(torch.cat(shares, dim=1)) if shares else None]
        if self.uses_memory:
            side.append((torch.zeros_like(scale[..., 0]) if inputs.memory is None else inputs.memory)[:, None])
        side = torch.cat([part for part in side if part is not None], dim=1).transpose(1, 2)
        inner = inner + _in_float32(self.side, side)
        return (_in_float32(self.out, F.gelu(inner)) + _in_float32(self.skip, side))[..., 0]

    def _projected(self, hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Inner activations (B, n, width) and keys (B, n, R) of the normalised hidden states: one product, float32."""
        # Hidden states grow a hundredfold with depth and have a few huge dimensions: without a norm the first layer of
        # the pruner saturates. The norm is one number per token, so it is applied after the product, to fewer numbers.
        layers = [self.down, self.key] if self.uses_query else [self.down]
        weight = torch.cat([layer.weight for layer in layers]).to(hidden_states.dtype)
        product = F.linear(hidden_states, weight).float() * scale
        inner, keys = product.split([self.down.out_features, product.shape[-1] - self.down.out_features], dim=-1)
        return inner + self.down.bias.float(), keys

    def _query_inputs(
        self, hidden: Tensor, scale: Tensor, keys: Tensor, distance: Tensor, valid: Tensor | None
    ) -> Tensor:
        """(B, H, n): how well a token's key matches the query tokens, per head; log-mean-exp over the query tokens."""
        # Query tokens are found by position, not by column: in training a row goes on with the response. Example: a
        # prompt of 10 tokens, 6 of them kept, window 4: columns 2..5, if their distance to the end is below 4. Of
        # positions [0, 1, 4, 7, 8, 9] that leaves 7, 8, 9: token 4 was kept, but is no longer among the last four.
        if valid is None:
            last, scale, is_query = (each[:, -self.window :] for each in (hidden, scale, distance < self.window))
        else:
            columns = torch.arange(valid.shape[1], device=valid.device)
            end = (columns * valid).amax(dim=1, keepdim=True)
            places = end - torch.arange(self.window - 1, -1, -1, device=valid.device)
            within = places.clamp(min=0)
            last = hidden.gather(1, within[..., None].expand(-1, -1, hidden.shape[-1]))
            scale = scale.gather(1, within[..., None])
            is_query = (places >= 0) & valid.gather(1, within) & (distance.gather(1, within) < self.window)
        queries = F.linear(last, self.query.weight.to(last.dtype)).float() * scale
        queries, keys = (each.unflatten(-1, (self.heads, -1)) for each in (queries, keys))
        # The token axis comes last, so that the sum over the few query tokens runs along contiguous memory.
        products = (queries / math.sqrt(keys.shape[-1])).transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        products = products.masked_fill_(~is_query[:, None, :, None], -torch.inf)
        count = is_query.sum(-1).clamp(min=1).float().log()[:, None, None]
        return (products.logsumexp(2) - count).nan_to_num(0, 0, 0)


def _in_float32(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """The layer on float32 inputs, whatever dtype its weights were cast to (``pruners.to(torch.bfloat16)``)."""
    return F.linear(inputs, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def _inverse_rms(hidden_states: Tensor) -> Tensor:
    """(B, n, 1), float32: one over the root mean square of each token's hidden state."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    norms = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=wide).float()
    return torch.rsqrt(norms.square() / hidden_states.shape[-1] + 1e-6)


def _safe(hidden_states: Tensor) -> Tensor:
    """The same direction within float16's range: there, a product of large hidden states could overflow."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    return (hidden_states.float() * _inverse_rms(hidden_states)).to(torch.float16)


def _even_share(mass: Tensor, valid: Tensor | None) -> Tensor:
    """(B, A, n) attention (B, n, A) in units of an even share, float32: 1 if all kept tokens got the same."""
    tokens = mass.shape[1] if valid is None else valid.sum(dim=1).clamp(min=1).float()[:, None, None]
    return mass.float().transpose(1, 2) * (tokens / QUERY_TOKENS)


def _in_logarithms(share: Tensor) -> Tensor:
    """Attention in even shares on a log scale: about -1.3 for none (0.01 is the floor), 1 for an even share."""
    return 0.5 * (share + 0.01).log() + 1.0


def _distance_inputs(distance: Tensor, prompt_lengths: Tensor, decays: Tensor) -> Tensor:
    """(B, 8, n) smooth functions of the distance to the end (B, n) and of the place in the prompt of (B, 1) tokens."""
    distance, length = distance.float()[:, None], prompt_lengths.float().clamp(min=1)[:, None]
    place = [
        torch.exp(-distance / decays.float()[:, None]),
        torch.log1p(distance) / 4,
        distance / length,
        # At padding the place would be -1 and its logarithm -inf, which times a zero gradient is still NaN.
        torch.log1p((length - 1 - distance).clamp(min=0)) / 4,
        (length.log() / 4).expand_as(distance),
    ]
    return torch.cat(place, dim=1)
