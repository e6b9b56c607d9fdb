"""Scores that need no training, behind one protocol (`sdtp_lib.pruning.stage.Scorer`): baselines, and given scores.

A scorer sees a stage and returns one number per token, higher meaning more important. It does not know the engine.
Axes: B batch, N kept tokens, H heads, w query tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib.architectures.attention_readings import refuse_unreadable
from sdtp_lib.checked import count_of_tokens, neighbours, weight, whole_number
from sdtp_lib.pruning.stage import Scorer, Stage, name_of, query_tokens, refuse_uncalled
from sdtp_lib.scorers.blend import standardised, strongest_neighbour


def random(seed: int = 0) -> Scorer:
    """Uniform noise that depends on the seed, the layer and the token's position only, so that a run repeats."""
    return _Random(whole_number("seed", seed))


def recency() -> Scorer:
    """The later, the better: keeps a sliding window (with the sinks, StreamingLLM's, arXiv 2309.17453)."""
    return _Recency()


def uniform() -> Scorer:
    """Evenly spread over the prompt, whatever the tokens say: for a document that is pruned before anybody asks."""
    return _Uniform()


def hidden_norm() -> Scorer:
    """The L2 norm of the hidden state that enters the layer."""
    return _HiddenNorm()


def attention(window: int = 8, kernel: int = 1, *, query: str = "last") -> Scorer:
    """Attention that the last ``window`` tokens pay at that layer, mean over heads (LazyLLM, arXiv 2407.14057).

    Parameters
    ----------
    kernel
        Above 1 (odd): the maximum over that many neighbours, which is one of SnapKV's two poolings: that of its
        experiments (arXiv 2404.14469). Its code's default is the average, as in ``methods.get("snapkv")``.
    query
        ``"none"``: nobody asks. What counts is the attention that all later tokens pay to a token, each in units of an
        even share of what it sees, mean over them: for a document that is pruned once and asked many questions.
    """
    if query not in ("last", "none"):
        raise ValueError(f"query={query!r} is unknown: give 'last' (the prompt's last tokens) or 'none'.")
    window, kernel = count_of_tokens("window", window), neighbours("kernel", kernel)
    return _Attention(window, kernel) if query == "last" else _Unasked(kernel)


def given(scores: Mapping[int, torch.Tensor]) -> Scorer:
    """Known scores of the whole prompt: layer -> Tensor (B, T), by position in each row's own prompt tokens.

    Rows shorter than T are read from the left: column p is position p. An oracle from `compute_saliency`, say.
    """
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores is a {type(scores).__name__}: give a mapping from layers to tensors (B, T).")
    found = {}
    for layer, values in scores.items():
        try:
            found[whole_number("layer", layer)] = torch.as_tensor(values)
        except (TypeError, RuntimeError):
            raise ValueError(f"scores of layer {layer} are a {type(values).__name__}: give a tensor (B, T).") from None
    return _Given(found)


def weighted(parts: Sequence[tuple[Scorer, float]]) -> Scorer:
    """Weighted sum of scorers, each standardised over the kept tokens of a row first."""
    pairs = list(parts) if isinstance(parts, Iterable) and not isinstance(parts, Mapping) else []
    if not pairs or any(not isinstance(each, (tuple, list)) or len(each) != 2 for each in pairs):
        raise ValueError(f"parts={parts!r} names no scorers with their weights: give [(scorer, weight), ...].")
    if strange := [scorer for scorer, _ in pairs if not callable(scorer)]:
        raise ValueError(f"parts has {strange[0]!r}, which cannot be called: give scorers, such as scorers.recency().")
    for scorer, _ in pairs:
        refuse_uncalled(scorer)
    return _Weighted(tuple((scorer, weight("weight", each)) for scorer, each in pairs))


@dataclass(frozen=True)
class _Random:
    seed: int
    name: str = "random"
    query_tokens: ClassVar[int] = 1

    def __call__(self, stage: Stage) -> torch.Tensor:
        # An integer hash (a splitmix64 finaliser) instead of a generator: the same token gets the same score in any
        # batch, on any device, and whichever tokens were dropped before.
        stream = (self.seed * 1_000_003 + stage.layer_index) * 2_654_435_761 % 2**62
        state = stage.positions.clamp_min(0) + stream
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            state = (state ^ (state >> shift)) * factor
        state = state ^ (state >> 31)
        return (state & 0xFFFFFF).to(torch.float32) / 0x1000000


@dataclass(frozen=True)
class _Uniform:
    name: str = "uniform"
    query_tokens: ClassVar[int] = 1

    def __call__(self, stage: Stage) -> torch.Tensor:
        # Multiples of the golden ratio fill a circle evenly, whatever share of it is cut off.
        return (stage.positions.double() * 0.6180339887498949) % 1.0


@dataclass(frozen=True)
class _Recency:
    name: str = "recency"
    query_tokens: ClassVar[int] = 1

    def __call__(self, stage: Stage) -> torch.Tensor:
        return stage.positions.to(torch.float32)


@dataclass(frozen=True)
class _HiddenNorm:
    name: str = "hidden norm"
    query_tokens: ClassVar[int] = 1

    def __call__(self, stage: Stage) -> torch.Tensor:
        return torch.linalg.vector_norm(stage.hidden_states.float(), dim=-1)


@dataclass(frozen=True)
class _Attention:
    window: int
    kernel: int

    @property
    def name(self) -> str:
        return "attention" if self.kernel == 1 else "attention, pooled"

    @property
    def query_tokens(self) -> int:
        return self.window

    def __call__(self, stage: Stage) -> torch.Tensor:
        probabilities = stage.attention_from_last(self.window)
        if self.kernel > 1:
            return strongest_neighbour(probabilities.sum(dim=2), self.kernel).mean(dim=1)
        return probabilities.mean(dim=(1, 2))

    def check(self, model: Any, config: Any) -> None:
        refuse_unreadable(model, config.layers)


@dataclass(frozen=True)
class _Unasked:
    kernel: int
    query_tokens: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return "attention, nobody asks"

    def __call__(self, stage: Stage) -> torch.Tensor:
        tokens = stage.positions.shape[1]
        # Token i sees i + 1 tokens: a weight that rises from 1 to N makes an even share 1 for each.
        received = strongest_neighbour(stage.attention_received(rise=tokens), self.kernel).mean(dim=1)
        return received / torch.arange(tokens, 0, -1, device=received.device)

    def check(self, model: Any, config: Any) -> None:
        refuse_unreadable(model, config.layers)


@dataclass(frozen=True, eq=False)
class _Given:
    scores: Mapping[int, torch.Tensor]
    name: str = "given"
    query_tokens: ClassVar[int] = 1

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.scores))

    def __call__(self, stage: Stage) -> torch.Tensor:
        values = self.scores[stage.layer_index].to(stage.positions.device)
        longest = int(stage.prompt_lengths.max())
        if values.dim() != 2 or values.shape[0] not in (1, stage.positions.shape[0]) or values.shape[1] < longest:
            raise ValueError(
                f"given scores for layer {stage.layer_index} have shape {tuple(values.shape)}, but the prompt has "
                f"{stage.positions.shape[0]} row(s) of up to {longest} tokens: give one score per prompt token."
            )
        return values.expand(stage.positions.shape[0], -1).gather(1, stage.positions.clamp_min(0))


@dataclass(frozen=True)
class _Weighted:
    parts: tuple[tuple[Scorer, float], ...]

    @property
    def name(self) -> str:
        return " + ".join(name_of(scorer) for scorer, _ in self.parts)

    @property
    def query_tokens(self) -> int:
        return max(query_tokens(scorer) for scorer, _ in self.parts)

    def __call__(self, stage: Stage) -> torch.Tensor:
        total = torch.zeros(stage.positions.shape, device=stage.positions.device)
        for scorer, share in self.parts:
            total += share * standardised(scorer(stage), stage.valid)
        return total

    def check(self, model: Any, config: Any) -> None:
        for scorer, _ in self.parts:
            if hasattr(scorer, "check"):
                scorer.check(model, config)


# Scores that need no training, as a person names them; one registry for every command line and argument.
NAMED: dict[str, Callable[[], Scorer]] = {
    "random": random,
    "uniform": uniform,
    "recency": recency,
    "hidden_norm": hidden_norm,
    "attention": attention,
    "attention_pooled": lambda: attention(kernel=7),
    "attention_unasked": lambda: attention(kernel=7, query="none"),
    "attention_recency": lambda: weighted([(attention(), 1.0), (recency(), 0.5)]),
}
