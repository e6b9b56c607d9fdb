"""What a pruning configuration costs and saves: tokens per layer, 1/tau, FLOPs, KV bytes.

Pure functions of a `PruningConfig` and a `ModelShape`: no torch, no model in memory, nothing measured. The engine asks
`keep_count` here, so the plan and the execution cannot drift apart. ``python -m sdtp_lib.budget`` prints what presets
cost on a named model.

Axis letters: T prompt tokens, K kept tokens, D hidden size, L layers. ``tokens_per_layer`` has L entries, the tokens
that each decoder layer computes. FLOPs count a multiply-add as 2; norms, rotary positions, softmax and activations
are left out (below 1 %).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sdtp_lib.layer_shape import LayerShape
from sdtp_lib.model_shape import MODEL_FIELDS, ModelShape, element_bytes

if TYPE_CHECKING:
    from sdtp_lib.config import PruningConfig


def local_count(tokens: int, local_ratio: float, min_local_tokens: int) -> int:
    """How many of the last of ``tokens`` kept tokens are never dropped."""
    return max(min_local_tokens, math.ceil(local_ratio * tokens))


def protected_count(tokens: int, config: PruningConfig) -> int:
    """How many of ``tokens`` kept tokens may not be dropped: the sinks and the last ones, each counted once."""
    return min(tokens, config.sink_tokens + local_count(tokens, config.local_ratio, config.min_local_tokens))


def keep_count(tokens: int, layer_index: int, config: PruningConfig, protected: int | None = None) -> int:
    """How many of a row's ``tokens`` kept tokens stay at the stage before ``layer_index``.

    ``k = min(n, max(floor(r n + 1e-9), protected))``, and at least 1; a budget in tokens stands in for ``floor(r n)``.
    ``protected`` is what may not be dropped, by default `protected_count`; an adaptive budget (``keep_mass``) keeps at
    least that.
    """
    wanted = config.tokens_at(layer_index)
    if config.keep_mass is not None:
        wanted = 0
    elif wanted is None:
        wanted = share_of(tokens, config.ratio_at(layer_index))
    return min(tokens, max(1, wanted, protected_count(tokens, config) if protected is None else protected))


def share_of(tokens: int, ratio: float) -> int:
    """``floor(r n)`` as it is meant: 0.7 * 10 is 6.999.. in binary, and 7 tokens are wanted."""
    return math.floor(ratio * tokens + 1e-9)


def tokens_per_layer(config: PruningConfig | None, num_layers: int, prompt_tokens: int) -> list[int]:
    """Tokens that each of ``num_layers`` layers computes in the prefill of ``prompt_tokens``; ``None`` prunes nothing.

    Raises
    ------
    ValueError
        If the configuration names a layer that the model does not have.
    """
    if config is not None:
        config.validate_for(num_layers)
        if prompt_tokens < config.min_prompt_tokens:
            config = None
    left, counts = prompt_tokens, []
    for layer in range(num_layers):
        if config is not None and layer in config.layers:
            left = keep_count(left, layer, config)
        counts.append(left)
    return counts


def compression_ratio(tokens_per_layer: Sequence[float]) -> float:
    """The paper's 1/tau: prompt tokens over the mean number of tokens per layer (layer 0 computes all of them)."""
    return tokens_per_layer[0] * len(tokens_per_layer) / sum(tokens_per_layer)


def prefill_flops(
    shape: ModelShape,
    tokens_per_layer: Sequence[int],
    *,
    causal: bool = True,
    logits_positions: int = 1,
    pruner_flops: float = 0,
) -> float:
    """FLOPs of one prefill (batch 1).

    Parameters
    ----------
    causal
        Count the half of the attention products that a causal kernel computes (2 n^2 D per layer, less where a window
        is shorter than the prompt); ``False`` counts the full square, as eager attention computes it.
    logits_positions
        Positions for which the head computes logits: 1 in a prefill that is there to generate.
    pruner_flops
        What scoring the tokens costs on top, see `pruner_flops`.
    """
    _check_layers(shape, tokens_per_layer)
    prompt = tokens_per_layer[0]
    matrices = sum(tokens * layer.matmul_weights for tokens, layer in zip(tokens_per_layer, shape.layers, strict=True))
    pairs = [
        causal_pairs(tokens, prompt, layer.window) if causal else tokens * tokens
        for tokens, layer in zip(tokens_per_layer, shape.layers, strict=True)
    ]
    attention = sum(count * layer.flops_per_pair for count, layer in zip(pairs, shape.layers, strict=True))
    states = sum(tokens * layer.state_flops for tokens, layer in zip(tokens_per_layer, shape.layers, strict=True))
    outside = prompt * shape.outer_weights + logits_positions * shape.head_weights
    return 2 * (matrices + outside) + attention + states + pruner_flops


def causal_pairs(tokens: int, prompt_tokens: int, window: int | None = None) -> float:
    """Query-key pairs that causal attention computes among ``tokens`` kept of a prompt: n^2 / 2 without a window.

    A window counts prompt positions, so kept tokens see fewer of them: of the prompt's pairs inside the window the
    share (n / T)^2 is left, whichever tokens went.
    """
    if window is None or window >= prompt_tokens:
        return tokens * tokens / 2
    return (window * prompt_tokens - window * window / 2) * (tokens / prompt_tokens) ** 2


def kv_bytes(shape: ModelShape, tokens_per_layer: Sequence[int], bytes_per_element: int) -> int:
    """Bytes of the keys and values of a cache after a prefill with these lengths (batch 1).

    A layer with a window of w keeps w - 1 tokens for the next one.
    """
    _check_layers(shape, tokens_per_layer)
    layers = zip(tokens_per_layer, shape.layers, strict=True)
    return bytes_per_element * sum(layer.cache_width * (_seen(layer, tokens + 1) - 1) for tokens, layer in layers)


def _seen(layer: LayerShape, tokens: int) -> int:
    return tokens if layer.window is None else min(tokens, layer.window)


def pruner_flops(
    hidden_size: int, layers: Iterable[int], tokens_per_layer: Sequence[int], width: int | None = None
) -> float:
    """FLOPs of the token pruners D -> width -> 1 (width D/4 unless told), each on the tokens that reach its stage."""
    width = hidden_size // 4 if width is None else width
    return sum(2 * tokens_per_layer[layer - 1] * (hidden_size * width + width) for layer in layers)


def speedup_limit(
    shape: ModelShape, config: PruningConfig, prompt_tokens: int, *, causal: bool = True, pruner_width: int | None = 0
) -> float:
    """Full over pruned prefill FLOPs: the speed-up that a prefill limited by its FLOPs cannot exceed.

    ``pruner_width=0`` leaves the pruners out (the limit of the idea), ``None`` counts the default MLPs.
    """
    pruned = tokens_per_layer(config, shape.num_layers, prompt_tokens)
    scoring = 0 if pruner_width == 0 else pruner_flops(shape.hidden_size, config.layers, pruned, pruner_width)
    full = prefill_flops(shape, [prompt_tokens] * shape.num_layers, causal=causal)
    return full / prefill_flops(shape, pruned, causal=causal, pruner_flops=scoring)


def find_keep_ratio(
    shape: ModelShape,
    config: PruningConfig,
    prompt_tokens: int,
    *,
    speedup: float | None = None,
    final_tokens: int | None = None,
    mean_tokens: float | None = None,
    pruner_width: int | None = 0,
) -> float:
    """The largest keep ratio, one for all stages, that reaches one target.

    Parameters
    ----------
    speedup
        At least this ratio of causal prefill FLOPs.
    final_tokens
        At most this many tokens in the last layer.
    mean_tokens
        At most this many tokens per layer on average.
    pruner_width
        Scoring that a ``speedup`` pays for, as in `speedup_limit`.

    Raises
    ------
    ValueError
        If not exactly one target is given, or if the protected tokens alone already miss it.
    """
    targets = {"speedup": speedup, "final_tokens": final_tokens, "mean_tokens": mean_tokens}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(targets)}; given: {sorted(given) or 'none'}.")
    ((name, target),) = given.items()

    def reaches(ratio: float) -> bool:
        candidate = config.replace(keep_ratio=ratio)
        counts = tokens_per_layer(candidate, shape.num_layers, prompt_tokens)
        if name == "final_tokens":
            return counts[-1] <= target
        if name == "mean_tokens":
            return sum(counts) / len(counts) <= target
        return speedup_limit(shape, candidate, prompt_tokens, pruner_width=pruner_width) >= target

    low, high = 1e-6, 1.0
    if reaches(high):
        return high
    if not reaches(low):
        raise ValueError(
            f"{name}={target} cannot be reached with layers={list(config.layers)} and the protected tokens "
            f"(sink_tokens={config.sink_tokens}, local_ratio={config.local_ratio}): prune earlier or protect less."
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low


class SpeedupOutOfReach(ValueError):
    """No budget reaches the wanted prefill speed-up; the message has the highest that can be had."""


@dataclasses.dataclass(frozen=True)
class SpeedupBudget:
    """A wanted prefill speed-up by FLOPs, scoring left out: for each prompt length the keep ratio that reaches it.

    Stands for a `PruningConfig` whose ``keep_ratio`` is not fixed yet; each length is solved once. With
    ``as_far_as_possible`` a prompt that only its few tokens keep from the speed-up is pruned to what must stay.
    """

    config: PruningConfig
    speedup: float
    shape: ModelShape
    as_far_as_possible: bool = False
    _solved: dict[int, PruningConfig] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def for_prompt(self, tokens: int) -> PruningConfig:
        """The configuration for a prompt of ``tokens``; one that is all protected is left whole. `SpeedupOutOfReach`
        if the protected tokens forbid the speed-up."""
        if tokens not in self._solved:
            self._solved[tokens] = self._solve(tokens)
        return self._solved[tokens]

    def _solve(self, tokens: int) -> PruningConfig:
        most = self.config.replace(keep_ratio=1e-6)
        counts = tokens_per_layer(most, self.shape.num_layers, tokens)
        if counts[-1] == tokens:
            return self.config.replace(keep_ratio=1.0)
        highest = speedup_limit(self.shape, most, tokens, pruner_width=0)
        if highest < self.speedup:
            if self.as_far_as_possible and self._only_short(tokens):
                return most
            raise SpeedupOutOfReach(
                f"budget='{self.speedup:g}x': a prompt of {tokens} tokens can be prefilled at most {highest:.2f}x as "
                f"fast with layers={list(self.config.layers)} and the protected tokens (sink_tokens="
                f"{self.config.sink_tokens}, local_ratio={self.config.local_ratio}, min_local_tokens="
                f"{self.config.min_local_tokens}): ask for less, prune earlier or protect less."
            )
        ratio = find_keep_ratio(self.shape, self.config, tokens, speedup=self.speedup, pruner_width=0)
        return self.config.replace(keep_ratio=ratio)

    def _only_short(self, tokens: int) -> bool:
        """Whether it would be reached if the first and the last few tokens were not protected."""
        bare = self.config.replace(keep_ratio=1e-6, sink_tokens=0, min_local_tokens=1)
        return speedup_limit(self.shape, bare, tokens, pruner_width=0) >= self.speedup


def _check_layers(shape: ModelShape, per_layer: Sequence[int]) -> None:
    if len(per_layer) != shape.num_layers:
        raise ValueError(f"{len(per_layer)} entries for {shape.num_layers} layers: give the tokens of every layer.")


def counting_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A command line that needs no model, only its sizes: ``--model``, ``--prompt-tokens`` and ``--dtype``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m sdtp_lib.{module}", description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="Mistral-7B-Instruct-v0.2", metavar="NAME",
                        help=f"{', '.join(MODEL_FIELDS)}, or a folder or Hub id whose config is read")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[4096, 32768, 131072], metavar="T",
                        help="prompt lengths in tokens")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="number type of weights and KV cache")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = counting_parser(
        "budget", "Count what pruning saves in a prefill: FLOPs, their ratio (the limit of the speed-up), KV bytes. "
        "Nothing is measured and no weights are loaded.",
    )  # fmt: skip
    parser.add_argument("--presets", nargs="+", default=["keep09", "keep08", "keep07"], metavar="PRESET",
                        help="presets of PruningConfig, for their layers and ratios")  # fmt: skip
    parser.add_argument("--keep-ratio", type=float, default=None, metavar="R",
                        help="share kept per stage, instead of each preset's own")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per prompt length and preset."""
    from sdtp_lib.config import PruningConfig

    parser = _parser()
    given = parser.parse_args(arguments)
    if min(given.prompt_tokens) < 1:
        parser.error(f"--prompt-tokens {min(given.prompt_tokens)}: give 1 or more.")
    try:
        shape, size = ModelShape.of(given.model), element_bytes(given.dtype)
        configs = {name: PruningConfig.preset(name, shape.num_layers) for name in given.presets}
        if given.keep_ratio is not None:
            configs = {name: config.replace(keep_ratio=given.keep_ratio) for name, config in configs.items()}
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.model}: {shape.num_layers} layers, {shape.parameters / 1e9:.2f} G weights, "
          f"{shape.active_weights / 1e9:.2f} G met by a token")  # fmt: skip
    print(" prompt preset     last layer  1/tau     TFLOPs    pruned  limit      KV GB    pruned")
    for tokens in given.prompt_tokens:
        full = [tokens] * shape.num_layers
        for name, config in configs.items():
            counts = tokens_per_layer(config, shape.num_layers, tokens)
            print(
                f"{tokens:7d} {name:10} {counts[-1]:10d} {compression_ratio(counts):6.3f} "
                f"{prefill_flops(shape, full) / 1e12:10.2f} {prefill_flops(shape, counts) / 1e12:9.2f} "
                f"{speedup_limit(shape, config, tokens):5.2f}x {kv_bytes(shape, full, size) / 1e9:10.3f} "
                f"{kv_bytes(shape, counts, size) / 1e9:9.3f}"
            )


if __name__ == "__main__":
    main()
