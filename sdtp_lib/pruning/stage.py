"""What a scorer sees at one pruning stage: the kept tokens, and the attention paid by the prompt's last tokens.

That attention can be computed in the layer to come, or read in the few layers that ran since the last cut: their cached
keys belong to the same tokens.

Axes: B batch, N kept tokens, D hidden size, H heads, G key-value heads, w query tokens.

Example: T = 10, a cut before layer 4 keeps 6 tokens, and the next stage is layer 7. There ``hidden_states`` is
(1, 6, D), ``positions`` [0, 1, 4, 7, 8, 9], and ``before`` has layers 4, 5 and 6 with their cached keys (1, G, 6, d).
Layer 3 is not among them: its keys are of all ten tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from sdtp_lib.architectures.attention_readings import attention_received
from sdtp_lib.architectures.attention_weights import (
    attention_from_cached_keys,
    attention_from_last,
    mask_rows,
    projected_queries,
)
from sdtp_lib.config import PruningNotSupported

if TYPE_CHECKING:
    from sdtp_lib.pruning.far_sight import FarSight

LAYERS_AT_HAND = 4  # layers since the last cut whose attention a scorer may read
QUERY_TOKENS = 16  # query tokens: the prompt's last ones, whose attention shows what is asked for
LAYERS_BACK = 3  # layers that a stage reads; presets prune every third, so each from the first stage on is read once


def earlier_layers(stages: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each of ``stages`` (layers before which tokens are dropped) the earlier layers whose attention it reads.

    They are the `LAYERS_BACK` layers in front of it, but none from before the previous stage, which ran on other
    tokens; where there are fewer, the first of them counts again: stages 4 and 6 read (1, 2, 3) and (4, 4, 5).
    """
    found, last = {}, 0
    for stage in sorted(stages):
        found[stage] = tuple(max(last, stage - back) for back in range(LAYERS_BACK, 0, -1))
        last = stage
    return found


class Scorer(Protocol):
    """Any callable from a stage to one score per token.

    A scorer may also have ``check(model, config)``, called once on entry and free to raise `ValueError`; ``layers``,
    the only stages that it can score; and ``query_tokens``, how many of the last tokens it reads (`query_tokens`).
    """

    def __call__(self, stage: Stage) -> torch.Tensor:
        """Scores (B, N), higher is more important; what stands at padding is ignored."""
        ...


def refuse_uncalled(scorer: Any) -> None:
    """Refuse a function that makes scorers (``scorers.attention`` instead of ``scorers.attention(8)``), or a class.

    Raises
    ------
    ValueError
        For a class, or a function that says that it returns a `Scorer`.
    """
    name = getattr(scorer, "__name__", "")
    if inspect.isclass(scorer):
        raise ValueError(f"scorer={name} is a class, not a scorer: give an object of it.")
    returns = getattr(scorer, "__annotations__", {}).get("return") if inspect.isroutine(scorer) else None
    if returns is Scorer or str(returns).rpartition(".")[2] == "Scorer":
        raise ValueError(f"scorer={name} makes a scorer and is none itself: call it, {name}(...).")


def real_scores(layer_index: int, scores: Any, valid: torch.Tensor) -> torch.Tensor:
    """What a scorer returned before a layer, detached, as floating-point numbers where ``valid`` (B, N) is.

    Raises
    ------
    ValueError
        For what is not one real number per token.
    """
    if not torch.is_tensor(scores) or scores.shape != valid.shape or scores.is_complex():
        found = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise ValueError(
            f"the scorer returned {found} at layer {layer_index}: return a tensor of shape {tuple(valid.shape)}, one "
            "real score per kept token."
        )
    scores = scores.detach().to(valid.device)
    return scores if scores.is_floating_point() else scores.to(torch.float32)


def name_of(scorer: Any) -> str:
    """A short name of a scorer for rows and legends."""
    return getattr(scorer, "name", None) or getattr(scorer, "__name__", type(scorer).__name__)


def query_tokens(scorer: Any) -> int:
    """How many of the prompt's last tokens a scorer reads, by its attribute of that name; `QUERY_TOKENS` unless told.

    Where a prompt comes in chunks they go with each.
    """
    return max(1, int(getattr(scorer, "query_tokens", QUERY_TOKENS)))


@dataclass(frozen=True)
class LayerBefore:
    """What is kept of a layer that has just run, so that its attention can still be read.

    Attributes
    ----------
    layer : Module
        That decoder layer.
    keys : Tensor (B, G, N, d)
        Its cached keys.
    last_queries : Tensor (B, w, H * d)
        Its queries of the last w tokens, as they were projected: before norm and rotation.
    mask_rows : Tensor (B or 1, 1 or H, w, N), RowMask or None
        The last w rows of its mask, or a `RowMask` that gives them; None where it had none.
    """

    layer: nn.Module
    keys: torch.Tensor
    last_queries: torch.Tensor
    mask_rows: Any = None


@dataclass(frozen=True)
class Stage:
    """The kept tokens before one decoder layer of a prefill.

    What is shown is fixed, but for two dictionaries that are state: ``read`` and ``carried`` are written to.

    Attributes
    ----------
    layer_index : int
        0-based index of the layer before which tokens are dropped.
    layer : Module
        That decoder layer.
    hidden_states : Tensor (B, N, D)
        What enters it; rows are padded on the left. The model goes on with it: never write into it (under
        ``torch.inference_mode`` nobody notices).
    positions : Tensor (B, N) of int64
        0-based position of each token among its row's own prompt tokens, -1 for padding.
    valid : Tensor (B, N) of bool
        False for padding.
    layer_arguments : Mapping
        All that the layer would be called with for these tokens if none were dropped, by name: its mask (None, or
        (B or 1, 1 or H, N, N) boolean or additive, or a backend's own form), position tables and ids, alibi. Without
        the cache.
    prompt_lengths : Tensor (B,) of int64
        Prompt tokens of each row, before any pruning.
    token_ids : Tensor (B, N) of int64, optional
        The kept tokens' ids; None where the prompt came as embeddings, or in a second pass.
    before : Mapping
        Layers since the last cut, by index, whose cached keys are all there and match the kept tokens.
    read : dict
        State: attention that was read already, by layer and window, since the parts of a score may ask for the same.
    carried : dict
        State that a scorer passes to its later stages, (B, N) tensors by name; cut to the kept tokens.
    padded : bool
        Whether there may be padding at all, known without asking the device.
    past : (Tensor, Tensor) or None
        Keys and values (B, G, S, d) of this layer that the cache held before this prefill: a prefix, earlier turns.
        Attention is shared out over them too; positions, lengths and scores are of the new tokens only.
    keys : Tensor (B, G, N, d), optional
        This layer's own cached keys, where it has run already (for a KV budget).
    queries : int or None
        Where these are a chunk of a prompt with the query tokens behind it: how many of those.
    windowed : frozenset of int
        Layers that see a window only, in families where others see all tokens.
    far : FarSight or None
        In such families, the last layer that saw all tokens and has run.
    """

    layer_index: int
    layer: nn.Module
    hidden_states: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    layer_arguments: Mapping[str, Any]
    prompt_lengths: torch.Tensor
    before: Mapping[int, LayerBefore] = field(default_factory=dict)
    read: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    carried: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    padded: bool = True
    past: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    keys: torch.Tensor | None = None
    queries: int | None = None
    windowed: frozenset[int] = frozenset()
    far: FarSight | None = field(default=None, repr=False)
    token_ids: torch.Tensor | None = field(default=None, repr=False)

    @property
    def position_embeddings(self) -> Any:
        """The (cos, sin) that the layer will be handed, or None where positions enter otherwise."""
        return self.layer_arguments.get("position_embeddings")

    @property
    def alibi(self) -> torch.Tensor | None:
        """BLOOM's position bias (B * H, 1, N), or None."""
        return self.layer_arguments.get("alibi")

    def attention_from_last(self, window: int) -> torch.Tensor:
        """Attention (B, H, w, N) that the last ``window`` tokens would pay at this layer if all tokens stayed.

        A layer that sees a window pays nothing to tokens further back: these get 0, which says nothing about them in
        a family whose other layers see all tokens (`attention_mass` reads those instead).
        """
        self._refuse_more_queries(window)
        queries = None if self.keys is None else projected_queries(self.layer, self.hidden_states[:, -window:])
        if queries is not None:
            mask = mask_rows(self.layer_arguments.get("attention_mask"), window, self.positions.shape[1])
            return attention_from_cached_keys(
                [self.layer], [queries], [self.keys], self.position_embeddings, [mask], self.padding_mask
            )[0]
        return attention_from_last(
            self.layer, self.hidden_states, self.layer_arguments, window, self.padding_mask, self.past
        )

    def attention_just_paid(self, window: int) -> torch.Tensor:
        """Attention (B, H, w, N) that the last ``window`` tokens paid one layer earlier, from the keys cached there.

        Costs no key projection. Where those keys are not at hand (a first layer, a cache that holds others, families
        with one fused projection, a layer with a window): `attention_from_last`.
        """
        (paid,) = self._paid_at([self.layer_index - 1], window)
        return self.attention_from_last(window) if paid is None else paid

    def attention_paid(self, layers: Sequence[int], window: int) -> list[torch.Tensor]:
        """For each of earlier ``layers`` the attention (B, H, w, N) that the last ``window`` tokens paid there.

        Where a layer's keys are not at hand (more than `LAYERS_AT_HAND` back, before a cut, fused projections, a
        window), this stage's own layer stands for all of them.
        """
        paid = self._paid_at(layers, window)
        if any(each is None for each in paid):
            return [self.attention_from_last(window)] * len(layers)
        return paid

    def attention_received(self, window: int | Sequence[int] | None = None, rise: float = 1.0) -> torch.Tensor:
        """Attention (B, H, N) that the last ``window`` tokens (one number, one per row, all) would pay here, summed.

        Read by chunks of queries: long windows need no T x T tensor. ``rise`` weighs the queries from 1 for the first
        to ``rise`` for the last.
        """
        if self.queries is not None:
            raise PruningNotSupported(
                "prefill_chunk_size with a scorer that reads what all tokens attend to: those of later chunks are not "
                "there yet: use another scorer, or leave prefill_chunk_size out."
            )
        if self.past is not None:
            raise PruningNotSupported(
                "prune='every' with a scorer that reads what all tokens attend to, after tokens that a cache held: "
                "give another scorer, or prune='first'."
            )
        rows, tokens = self.positions.shape
        windows = [window or tokens] * rows if window is None or isinstance(window, int) else window
        return attention_received(self.layer, self.hidden_states, self.layer_arguments, self.valid, windows, rise)

    def attention_mass(self, layers: Sequence[int], window: int) -> torch.Tensor:
        """(B, N, H x layers): attention to each token in each head of earlier ``layers``, from ``window`` query tokens.

        Where a layer's keys are not at hand, this stage's own layer stands for all of them. Where each of them sees a
        window only, in a family with layers that see all tokens, the last such layer that has run (``far``) stands for
        the first of them: learned scores then tell near from far, which a single window cannot. Where keys of ``past``
        get attention too, all is scaled by keys over tokens, so that an even share is 1 / N with a past as without.
        """
        paid, tokens, asked = self.attention_paid(layers, window), self.positions.shape[1], list(layers)
        held = [self.before[layer].keys.shape[2] if (layer, window) in self.read else 0 for layer in layers]
        if not all(held):
            past = 0 if self.past is None else self.past[0].shape[2]
            held, asked = [tokens + past] * len(layers), [self.layer_index]
        mass = [each.sum(dim=2) for each in paid]
        mass = [each if keys == tokens else each * (keys / tokens) for each, keys in zip(mass, held, strict=True)]
        if self.far is not None and self.windowed.issuperset(asked):
            mass[0] = self.far.mass(window).to(mass[0].device)
        return torch.cat(mass, dim=1).transpose(1, 2)

    @property
    def padding_mask(self) -> torch.Tensor | None:
        """``valid``, or None where there is no padding: all is then said without a mask."""
        return self.valid if self.padded else None

    def _refuse_more_queries(self, window: int) -> None:
        if self.queries is not None and window > self.queries:
            raise PruningNotSupported(
                f"prefill_chunk_size: the scorer reads the last {window} tokens, but {self.queries} go with each "
                f"chunk: give the scorer an attribute query_tokens = {window}."
            )

    def _paid_at(self, layers: Sequence[int], window: int) -> list[torch.Tensor | None]:
        """Attention (B, H, w, N) that was paid at each of earlier ``layers``, None where its keys are not at hand."""
        self._refuse_more_queries(window)
        tokens = self.positions.shape[1]
        new = {
            layer: self.before[layer]
            for layer in layers
            if layer in self.before
            and (layer, window) not in self.read
            and min(window, tokens) <= self.before[layer].last_queries.shape[1]
        }
        if new:
            queries = [each.last_queries[:, -window:] for each in new.values()]
            keys = [each.keys for each in new.values()]
            rows = [mask_rows(each.mask_rows, queries[0].shape[1], each.keys.shape[2]) for each in new.values()]
            modules = [each.layer for each in new.values()]
            paid = attention_from_cached_keys(modules, queries, keys, self.position_embeddings, rows, self.padding_mask)
            for layer, found in zip(new, paid, strict=True):
                self.read[layer, window] = found[..., -tokens:]
        return [self.read.get((layer, window)) for layer in layers]
