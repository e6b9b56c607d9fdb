"""`SDTPLM`: any task of lm-eval, with the prompt pruned and the continuation never.

A log-likelihood is read from the pruned cache of its context; requests that share a context share its prefill.
``generate_until`` decodes through the engine. Rolling log-likelihood has no prompt, so it runs unpruned and says so.

    python -m sdtp_lib.harness run --model sdtp --model_args pretrained=embedded,preset=keep09,pruners=DIR --tasks piqa

``--help`` tells what ``--model_args`` may hold.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sdtp_lib import checked, methods
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.architectures.layers import num_layers, pad_left
from sdtp_lib.config import PRESETS, PruningConfig
from sdtp_lib.extras import MissingExtra, extra
from sdtp_lib.methods.call import refuse_impossible, resolved, token_pruning
from sdtp_lib.models import load_model
from sdtp_lib.pruning.trace import PruningTrace
from sdtp_lib.scorers.simple import NAMED
from sdtp_lib.scorers.token_pruners import TokenPruners

try:
    with extra("eval"):
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
except MissingExtra as missing:
    if __name__ != "__main__":
        raise
    print(f"error: {missing}", file=sys.stderr)
    sys.exit(2)

_LOGGER = logging.getLogger(__name__)
_LOADER_OPTIONS = ("dtype", "device", "device_map", "attn_implementation", "trust_remote_code", "revision")


def _device_for(asked: Any) -> Any:
    """Where the model goes: lm-eval asks for ``cuda:0`` where nobody named a device, on every machine.

    Where torch sees no GPU that is the CPU, as in lm-eval's own model, and is said. Of several processes each has the
    GPU of its own number (``LOCAL_RANK``).
    """
    if str("cuda" if asked is None else asked).partition(":")[0] != "cuda":
        return asked
    if not torch.cuda.is_available():
        if asked is not None:
            _say_once(f"device={asked!r} (lm-eval's own choice where none is named): torch sees no GPU here, so the "
                      "model runs on the CPU.")  # fmt: skip
        return "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return asked


@functools.cache
def _say_once(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)


@register_model("sdtp")
class SDTPLM(HFLM):
    """lm-eval's HF model with pruned prompts.

    Parameters
    ----------
    pretrained
        A model (then give ``tokenizer`` too), or a name for `load_model`: ``"embedded"``, a folder, a Hub id.
    pruning : PruningConfig, ``"2x"`` or another budget of `token_pruning` that is no method, optional
        What to prune; or ``preset``, by name; neither runs unpruned.
    method
        Instead of both: an entry of `sdtp_lib.methods`, or its name (``fastkv``, ``lazyllm@2x``).
    scorer
        Any scorer, or the name of one without training (``recency``); or ``pruners``, a folder of `TokenPruners`.
        Neither: what `token_pruning` takes where nobody names a scorer.
    kwargs
        Everything else goes to `load_model` or to HFLM (``batch_size``, ``max_length``, ``add_bos_token`` ...).
    """

    def __init__(
        self,
        pretrained: Any = "embedded",
        *,
        tokenizer: Any = None,
        pruning: PruningConfig | str | None = None,
        preset: str | None = None,
        scorer: Any = None,
        pruners: str | None = None,
        method: methods.Method | str | None = None,
        **kwargs: Any,
    ) -> None:
        if pruning is not None and preset is not None:
            raise ValueError(f"preset={preset!r} and pruning={pruning} exclude each other: give one of them.")
        if scorer is not None and pruners is not None:
            raise ValueError(f"scorer={scorer!r} and pruners={pruners!r} exclude each other: give one of them.")
        if method is not None and (pruning, preset, scorer, pruners) != (None,) * 4:
            raise ValueError(f"method={method!r} brings its budget and its scorer: give no preset, scorer or pruners.")
        method = method if method is None or isinstance(method, methods.Method) else methods.named(method)
        if isinstance(scorer, str) and scorer not in NAMED:
            raise ValueError(f"scorer={scorer!r} is unknown: choose one of {', '.join(NAMED)}, or give pruners=DIR.")
        if preset is not None:
            checked.one_of("preset", preset, PRESETS)
        elif pruning is not None:
            refuse_impossible("pruning=", pruning, "as method, which brings its scorer")
        elif scorer is not None or pruners is not None:
            raise ValueError("there is a scorer but nothing to prune: give a preset or pruning as well.")
        if isinstance(pretrained, str):
            options = {name: kwargs.pop(name) for name in _LOADER_OPTIONS if name in kwargs}
            if options.get("device_map") is not None:
                options.pop("device", None)
            else:
                options["device"] = _device_for(options.get("device"))
            pretrained, tokenizer = load_model(pretrained, **options)
        else:
            kwargs.pop("device", None)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **kwargs)
        if preset is not None:
            pruning = PruningConfig.preset(preset, num_layers=num_layers(self.model))
        if pruners is not None:
            scorer = TokenPruners.from_pretrained(str(pruners)).to(self.device).eval()
        elif isinstance(scorer, str):
            scorer = NAMED[scorer]()
        elif scorer is None and pruning is not None:
            pruning, scorer, _ = resolved(self.model, pruning, None)
        self.pruning, self.scorer = (method, method.scorer_for(self.model)) if method else (pruning, scorer)
        self.last_trace: PruningTrace | None = None
        self._rolling = False

    @contextlib.contextmanager
    def _pruned(self) -> Iterator[None]:
        if self.pruning is None:
            yield
        else:
            with token_pruning(self.model, self.pruning, self.scorer) as self.last_trace:
                yield

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        with self._pruned():
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Unpruned: the whole text is scored, there is no prompt to prune."""
        if self.pruning is not None:
            _LOGGER.warning("loglikelihood_rolling has no prompt to prune: it runs the unpruned model.")
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._rolling = False

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.pruning is None or self._rolling:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # From the left, as lm-eval does; the continuation is never cut.
            room = self.max_length + 1 - len(continuation)
            by_context.setdefault(tuple(context[-room:]), []).append(number)
        contexts = sorted(by_context, key=len, reverse=True)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="pruned loglikelihood")
        for start in range(0, len(contexts), size):
            batch = contexts[start : start + size]
            groups = [by_context[context] for context in batch]
            continuations = [[requests[number][2] for number in group] for group in groups]
            for group, results in zip(groups, self._score(batch, continuations), strict=True):
                for number, result in zip(group, results, strict=True):
                    answers[number] = result
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(len(group))
        bar.close()
        return answers

    @torch.no_grad()
    def _score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """Scores of each context's continuations: one pruned batch prefill, then one forward per continuation."""
        lengths = torch.tensor([len(context) for context in contexts], device=self.device)
        ids, mask = (tensor.to(self.device) for tensor in pad_left(contexts))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        results: list[list[tuple[float, bool]]] = [[] for _ in contexts]
        rounds = max(map(len, continuations))
        with self._pruned():
            prefill = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            )
            first = prefill.logits[:, -1:]
            for turn in range(rounds):
                turns = [options[min(turn, len(options) - 1)] for options in continuations]
                # The last round may spend the cache; earlier ones leave it for the next.
                cache = cache_in(prefill) if turn == rounds - 1 else copy.deepcopy(cache_in(prefill))
                logits = torch.cat([first, *self._following(turns, cache, mask, lengths)], dim=1)
                scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                for row, options in enumerate(continuations):
                    if turn < len(options):
                        results[row].append(_read(scores[row], options[turn]))
        return results

    def _following(
        self, continuations: Sequence[Sequence[int]], cache: Any, mask: Tensor, lengths: Tensor
    ) -> list[Tensor]:
        """Logits after each continuation token but the last, in a list of one or, for one-token continuations, none."""
        longest = max(map(len, continuations)) - 1
        if longest == 0:
            return []
        given = torch.zeros(len(continuations), longest, dtype=torch.long, device=self.device)
        for row, continuation in enumerate(continuations):
            given[row, : len(continuation) - 1] = torch.tensor(continuation[:-1], device=self.device)
        # What pads a shorter continuation stands after it, where a causal model's real tokens cannot see it.
        steps = torch.arange(longest, device=self.device)[None]
        output = self.model(
            input_ids=given,
            attention_mask=torch.cat([mask, torch.ones_like(given)], dim=1),
            position_ids=lengths[:, None] + steps,
            **cache_argument(self.model, cache),
            use_cache=True,
        )
        return [output.logits]


def _read(scores: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Sum of log-probabilities of a continuation, and whether greedy decoding would give it."""
    tokens = torch.tensor(list(continuation), device=scores.device)
    scores = scores[: len(tokens)]
    total = scores.gather(1, tokens[:, None]).sum().item()
    return total, bool((scores.argmax(-1) == tokens).all())


_HELP = """\
usage: python -m sdtp_lib.harness run --model sdtp --model_args NAME=VALUE,... --tasks TASK ...

Any task of lm-evaluation-harness on a model whose prompts are pruned. Of --model_args:

  pretrained=MODEL           embedded, a folder, or a Hub id (default: embedded)
  preset=PRESET              {presets}; or instead
  pruning=BUDGET             a prefill speed-up such as 2x, or a preset; without either nothing is pruned
  pruners=DIR                trained pruners: a folder, a Hub id, or a set that ships; or instead
  scorer=NAME                {scorers}
                             neither: pruners made for the model's very weights, else the training-free default
  method=NAME                instead of these: a published method (fastkv), or at a prefill speed-up (lazyllm@2x)
  {loader}
                             as load_model takes them; all else (max_length, add_bos_token, ...) is HFLM's

Without --model sdtp it is lm-eval itself, whose own arguments (--tasks, --limit, --batch_size, --output_path, ...) are
told by `python -m sdtp_lib.harness run --help`; its other commands are `ls` and `validate`.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """lm-eval's own command line, which now knows ``--model sdtp``; ``--help`` is ours."""
    from lm_eval.__main__ import cli_evaluate

    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_HELP.format(presets=", ".join(PRESETS), scorers=", ".join(NAMED), loader=", ".join(_LOADER_OPTIONS)))
        return
    if arguments is not None:
        sys.argv[1:] = given
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(checked.told(main))
