"""`ModelShape`: the sizes of a causal language model that decide its FLOPs and bytes, layer by layer.

Where there is a model, its own weights are counted (`ModelShape.from_model`). A configuration alone builds the model
without weights (on the meta device) and counts that, so every family is either counted or refused by name. Only the
models that the study names are computed from their sizes, with neither torch nor transformers. No model runs here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from sdtp_lib.checked import one_of, whole_number
from sdtp_lib.layer_shape import LayerShape, count_layer, held_parameters, linear_size, matmul_parts
from sdtp_lib.load_failures import first_line

_BYTES_PER_ELEMENT = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1,
}  # fmt: skip


def element_bytes(dtype: Any) -> int:
    """Bytes of one number of ``dtype``, a name such as ``"bfloat16"`` or a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    if name not in _BYTES_PER_ELEMENT:
        raise ValueError(f"dtype={dtype!r} is unknown: use one of {', '.join(_BYTES_PER_ELEMENT)}.")
    return _BYTES_PER_ELEMENT[name]


def positions(model: Any) -> int | None:
    """How many tokens a loaded model takes; None where its configuration does not say (alibi)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer, in elements.

    ``num_layers`` is L, ``hidden_size`` is D, ``num_heads`` is H. ``head_dim`` times ``num_heads`` need not be D
    (Gemma, Qwen3). ``attention_bias`` says that queries, keys and values have a bias (Qwen2). What decides the cost is
    ``layers``, one `LayerShape` each: counted from a model, or all alike and computed from these sizes. Where layers
    differ, these sizes are those of the last one with attention (the first of a mixture of experts are often dense).
    ``head_weights`` make logits of one position, ``outer_weights`` are other matrices outside the layers, which meet
    every prompt token (OPT's projections).
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
    layers: tuple[LayerShape, ...] = ()
    outer_weights: int = 0
    head_weights: int = 0
    parameters: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type != "int":
                continue
            value, least = whole_number(field.name, getattr(self, field.name)), 0 if field.default == 0 else 1
            if value < least:
                raise ValueError(f"{field.name}={value} is below {least}: give a whole number, {least} or more.")
            object.__setattr__(self, field.name, value)
        if not self.layers:
            layer, table = self._layer_from_sizes(), self.vocab_size * self.hidden_size
            object.__setattr__(self, "layers", (layer,) * self.num_layers)
            held = self.num_layers * layer.parameters + (1 if self.tied_embeddings else 2) * table + self.hidden_size
            object.__setattr__(self, "head_weights", table)
            object.__setattr__(self, "parameters", held)
        if len(self.layers) != self.num_layers:
            raise ValueError(f"layers has {len(self.layers)} entries for num_layers={self.num_layers}.")

    def _layer_from_sizes(self) -> LayerShape:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = 3 if self.gated_mlp else 2
        weights = self.hidden_size * (2 * (queries + keys) + matrices * self.intermediate_size)
        # Two norms; biases other than those of queries, keys and values are left out (below 0.1 %).
        held = weights + 2 * self.hidden_size + (queries + 2 * keys if self.attention_bias else 0)
        return LayerShape(
            matmul_weights=weights,
            parameters=held,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            key_size=self.head_dim,
            value_size=self.head_dim,
            cache_width=2 * keys,
            inner_width=matrices * self.intermediate_size // 3,
        )

    @classmethod
    def from_model(cls, model: Any) -> ModelShape:
        """The shape of a causal LM of transformers, counted from its own weights, which are not read or moved.

        Raises
        ------
        ValueError
            Where a part's FLOPs do not follow from its weights (state-space layers, sparse attention); it is named.
        """
        config = model.config.get_text_config()
        name = f"{type(model).__name__} (model_type={config.model_type!r})"
        root = model if config is model.config else model.get_decoder()
        owner, modules = _decoder_layers(root, config.num_hidden_layers)
        if config is not model.config:
            root = owner  # a multimodal model's towers stand beside it, and no text token meets them
        head = model.get_output_embeddings()
        if modules is None or head is None:
            missing = f"list of {config.num_hidden_layers} decoder layers" if modules is None else "output embedding"
            raise ValueError(f"{name} has no {missing}, so its FLOPs are unknown: give a decoder-only causal LM.")
        layers = tuple(count_layer(layer, config, index) for index, layer in enumerate(modules))
        counted = {id(part) for layer in (*modules, head) for part in layer.modules()}
        outer = sum(active for _, active, _ in matmul_parts(root, config, name, skip=counted))
        last = next((layer for layer in reversed(layers) if layer.num_heads), None)
        if last is None:
            raise ValueError(f"{name} has no attention, so there is nothing to prune: give a model that has some.")
        return cls(
            num_layers=len(layers),
            hidden_size=config.hidden_size,
            num_heads=last.num_heads,
            num_kv_heads=last.num_kv_heads,
            head_dim=last.key_size,
            intermediate_size=last.inner_width or max(layer.inner_width for layer in layers),
            vocab_size=head.weight.shape[0],
            tied_embeddings=model.get_input_embeddings().weight is head.weight,
            model_type=config.model_type,
            layers=layers,
            outer_weights=outer,
            head_weights=linear_size(head) or head.weight.numel(),
            parameters=held_parameters(model),
        )

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape that a transformers configuration (or a mapping with its fields) describes.

        The model is built without weights, in a second or less, and counted. Where the model is at hand,
        `from_model` says the same, adapters included.

        Raises
        ------
        ValueError
            For a configuration from which transformers builds no causal language model, and as `from_model`.
        """
        import torch
        import transformers

        fields = dict(config) if isinstance(config, Mapping) else None
        kind = fields.pop("model_type", None) if fields is not None else config.model_type
        if not kind:
            raise ValueError("the configuration has no model_type: is it that of a causal language model?")
        try:
            config = transformers.AutoConfig.for_model(kind, **fields) if fields is not None else config
            config = copy.deepcopy(config.get_text_config())  # building a model writes its attention backend there
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"model_type={kind!r}: transformers builds no causal language model from this "
                f"configuration ({first_line(error)[:200]}): give the model to ModelShape.from_model."
            ) from error
        return cls.from_model(model)

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """The shape of one of the models that the study names, without asking a hub."""
        return cls(**MODEL_FIELDS[one_of("model", name, MODEL_FIELDS)])

    @classmethod
    def of(cls, model: str) -> ModelShape:
        """The shape of a named model, else of the model in a folder or on the Hub, of which only the config is read."""
        if model in MODEL_FIELDS:
            return cls.named(model)
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"model={model!r} is neither one of {', '.join(MODEL_FIELDS)} nor a folder or Hub id with "
                             f"a configuration ({first_line(error)}).") from error  # fmt: skip
        return cls.from_config(config)

    @property
    def active_weights(self) -> int:
        """All weights that one decoded token is multiplied with, the head's too; what a decode step reads."""
        return sum(layer.matmul_weights for layer in self.layers) + self.outer_weights + self.head_weights

    @property
    def read_share(self) -> float:
        """Share of the weights that a decode step may read: all but the experts that a token does not meet."""
        return 1 - sum(layer.idle_weights for layer in self.layers) / self.parameters

    def weight_bytes(self, dtype: Any) -> int:
        """Bytes that the weights take in ``dtype``."""
        return self.parameters * element_bytes(dtype)


def _decoder_layers(root: Any, count: int) -> tuple[Any, Any]:
    """The first list of ``count`` modules under ``root``, after the module that holds it; None, None without one."""
    for owner in root.modules():
        for child in owner.children():
            if type(child).__name__ == "ModuleList" and len(child) == count:
                return owner, child
    return None, None


# The sizes of the models that the study names, so that predictions need no hub.
MODEL_FIELDS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "model_type": "llama", "num_layers": 30, "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3,
        "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tied_embeddings": True,
    },
    "Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral", "num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 32000,
    },
    "Qwen2-7B-Instruct": {
        "model_type": "qwen2", "num_layers": 28, "hidden_size": 3584, "num_heads": 28, "num_kv_heads": 4,
        "head_dim": 128, "intermediate_size": 18944, "vocab_size": 152064, "attention_bias": True,
    },
    "Llama-2-7B": {
        "model_type": "llama", "num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 32,
        "head_dim": 128, "intermediate_size": 11008, "vocab_size": 32000,
    },
    "BLOOM-7B1": {
        "model_type": "bloom", "num_layers": 30, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 32,
        "head_dim": 128, "intermediate_size": 16384, "vocab_size": 250880, "gated_mlp": False,
        "tied_embeddings": True, "attention_bias": True,
    },
}  # fmt: skip
