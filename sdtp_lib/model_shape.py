"""`ModelShape`: the sizes of a causal language model that decide its FLOPs and bytes.

Pure: read from a configuration object or mapping, never from a model in memory; no torch, no transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_BYTES_PER_ELEMENT = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1,
}  # fmt: skip
# Two matrices in the feed-forward part (up, down) instead of three (gate, up, down).
_UNGATED_TYPES = ("bloom", "falcon", "gpt2", "gpt_neox", "opt", "phi")
# Configuration fields of the models that the study names, so that predictions need no hub.
MODEL_FIELDS = {
    "SmolLM2-135M-Instruct": {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "Qwen2-7B-Instruct": {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Llama-2-7B": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "BLOOM-7B1": {
        "model_type": "bloom", "n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250880,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def element_bytes(dtype: Any) -> int:
    """Bytes of one number of ``dtype``, a name such as ``"bfloat16"`` or a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    if name not in _BYTES_PER_ELEMENT:
        raise ValueError(f"dtype={dtype!r} is unknown: use one of {', '.join(_BYTES_PER_ELEMENT)}.")
    return _BYTES_PER_ELEMENT[name]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer, in elements.

    ``num_layers`` is L, ``hidden_size`` is D, ``num_heads`` is H. ``head_dim`` times ``num_heads`` need not be D
    (Gemma, Qwen3). ``attention_bias`` says that queries, keys and values have a bias (Qwen2).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    attention_bias: bool = False
    model_type: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not hasattr(value, "__index__") or value < 1):
                raise ValueError(f"{field.name}={value!r} is not a positive whole number.")

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape that a transformers configuration (or a mapping with its fields) describes.

        Raises
        ------
        ValueError
            For a mixture of experts, whose FLOPs a token do not follow from these sizes, and for a configuration
            without the needed fields.
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        values = config if isinstance(config, Mapping) else config.to_dict()

        def first(*names: str, default: Any = None) -> Any:
            return next((values[name] for name in names if values.get(name) is not None), default)

        if first("num_local_experts", "num_experts", "n_routed_experts"):
            raise ValueError("model_type={!r} is a mixture of experts: its budget is not known here.".format(
                first("model_type")))  # fmt: skip
        sizes = {
            "num_layers": first("num_hidden_layers", "n_layer"),
            "hidden_size": first("hidden_size", "n_embd"),
            "num_heads": first("num_attention_heads", "n_head"),
            "vocab_size": first("vocab_size"),
        }
        missing = [name for name, value in sizes.items() if value is None]
        if missing:
            raise ValueError(f"the configuration says nothing about {missing}: is it that of a causal language model?")
        model_type = first("model_type", default="")
        num_kv_heads = first("num_key_value_heads", default=sizes["num_heads"])
        return cls(
            **sizes,
            num_kv_heads=num_kv_heads,
            head_dim=first("head_dim", default=sizes["hidden_size"] // sizes["num_heads"]),
            intermediate_size=first("intermediate_size", "n_inner", default=4 * sizes["hidden_size"]),
            gated_mlp=model_type not in _UNGATED_TYPES,
            tied_embeddings=bool(first("tie_word_embeddings", default=False)),
            attention_bias=bool(first("attention_bias", default=model_type in ("qwen2", "bloom"))),
            model_type=model_type,
        )

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """The shape of one of the models that the study names, without asking a hub."""
        if name not in MODEL_FIELDS:
            raise ValueError(f"model={name!r} is unknown: choose one of {', '.join(MODEL_FIELDS)}.")
        return cls.from_config(MODEL_FIELDS[name])

    @property
    def query_width(self) -> int:
        """Width of all queries of a token: H times the head size."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all keys (and of all values) of a token: KV heads times the head size."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_matmul_weights(self) -> int:
        """Weights of one decoder layer that take part in a matrix product; each costs 2 FLOPs a token."""
        projections = 2 * self.hidden_size * (self.query_width + self.key_width)
        return projections + (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """All weights, with norms and query-key-value biases; other biases are left out (below 0.1 %)."""
        biases = (self.query_width + 2 * self.key_width) if self.attention_bias else 0
        layer = self.layer_matmul_weights + 2 * self.hidden_size + biases
        tables = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + tables + self.hidden_size

    def weight_bytes(self, dtype: Any) -> int:
        """Bytes that the weights take in ``dtype``."""
        return self.parameters * element_bytes(dtype)
