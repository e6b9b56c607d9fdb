"""SDTP: saliency-driven dynamic token pruning for the prefill of causal language models (arXiv 2504.04514).

Importing this package loads neither torch nor transformers: each public name is fetched from its module on first use.

    pruning/          the method: score, cut, shorten, decode    config         what is pruned; presets
    architectures/    the one door to transformers' internals    checked        numbers that a person gave, by name
    scorers/          all that scores tokens                     budget         tokens, FLOPs, bytes: pure counting
    methods/          every way to shorten a prefill by its      model_shape    the sizes that decide cost
                      name, and the one call                     layer_shape    those of one layer
    training/         from samples to token pruners              models         load_model
    shipped_pruners/  trained ones that travel along             load_failures  why a load failed, what helps
    data/             what is trained and measured on            shipped        where pruners are
    evaluation/       what it costs in quality                   records        result rows
    latency/          what it saves                              files          files written whole, locks
    leaderboard/      every method at equal FLOPs                provenance     where a number comes from
    plots/            pictures                                   processes      one run shared among processes
    views/            prompts as HTML                            extras         packages that only some uses need
    explorer/         the sliders                                harness        SDTPLM: lm-eval with pruned prompts
    commands/         what python -m sdtp_lib can do             paper          what the paper prints, ours beside it
                                                                 __main__       the command line
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "PruningConfig": "config",
    "PruningNotSupported": "config",
    "PruningTrace": "pruning.trace",
    "TokenPruners": "scorers.token_pruners",
    "TrainingConfig": "training.config",
    "compute_saliency": "training.saliency",
    "load_model": "models",
    "load_pruned_cache": "pruning.cache_files",
    "save_pruned_cache": "pruning.cache_files",
    "token_pruning": "methods.call",
    "train_pruners": "training.run",
}
_SUBMODULES = ("budget", "methods", "records", "scorers")

__all__ = ["__version__", *_HOME_OF, *_SUBMODULES]

if TYPE_CHECKING:
    from sdtp_lib import budget, methods, records, scorers
    from sdtp_lib.config import PruningConfig, PruningNotSupported
    from sdtp_lib.methods.call import token_pruning
    from sdtp_lib.models import load_model
    from sdtp_lib.pruning.cache_files import load_pruned_cache, save_pruned_cache
    from sdtp_lib.pruning.trace import PruningTrace
    from sdtp_lib.scorers.token_pruners import TokenPruners
    from sdtp_lib.training.config import TrainingConfig
    from sdtp_lib.training.run import train_pruners
    from sdtp_lib.training.saliency import compute_saliency


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"sdtp_lib.{_HOME_OF[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"sdtp_lib.{name}")
    else:
        raise AttributeError(f"module 'sdtp_lib' has no attribute {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
