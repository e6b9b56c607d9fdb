"""SDTP: saliency-driven dynamic token pruning for the prefill of causal language models (arXiv 2504.04514).

Importing this package loads neither torch nor transformers: each public name is fetched from its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "PruningConfig": "config",
    "PruningNotSupported": "errors",
    "PruningTrace": "trace",
    "TokenPruners": "pruners",
    "TrainingConfig": "training_config",
    "compute_saliency": "saliency",
    "load_model": "models",
    "token_pruning": "engine",
    "train_pruners": "training",
}
_SUBMODULES = ("budget", "records", "scorers")

__all__ = ["__version__", *_HOME_OF, *_SUBMODULES]

if TYPE_CHECKING:
    from sdtp_lib import budget, records, scorers
    from sdtp_lib.config import PruningConfig
    from sdtp_lib.engine import token_pruning
    from sdtp_lib.errors import PruningNotSupported
    from sdtp_lib.models import load_model
    from sdtp_lib.pruners import TokenPruners
    from sdtp_lib.saliency import compute_saliency
    from sdtp_lib.trace import PruningTrace
    from sdtp_lib.training import train_pruners
    from sdtp_lib.training_config import TrainingConfig


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
