"""`TokenPruners`: one small network per stage that says how much each prompt token matters (paper, section 3.2).

Knows hidden states and positions, not how its scores are used nor how they were learned. The paper's pruner is
``W2 GELU(W1 x)``, ``W1: D -> D/4``, on the token's hidden state; here with one output, since of the paper's two (drop,
keep) only the difference ranks tokens. Four optional inputs, all cheap, tell a token what its own hidden state cannot:
how far from the end it is, what the last tokens ask for, how much attention each head of the layers before just paid to
it, and how it scored a stage earlier.
Axes: B batch, n tokens, D hidden size, H query heads, R rank, A attention inputs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sdtp_lib.architectures.attention_readings import refuse_unreadable
from sdtp_lib.checked import neighbours, whole_number
from sdtp_lib.config import PruningConfig
from sdtp_lib.provenance import content_id, fingerprint, rotary, stored_tensors
from sdtp_lib.pruning.stage import LAYERS_BACK, QUERY_TOKENS, earlier_layers
from sdtp_lib.scorers.blend import Blend, standardised
from sdtp_lib.scorers.pruner_files import HUB_OPTIONS, loaded_whole, weights_file
from sdtp_lib.scorers.stage_network import DISTANCE_INPUTS, StageInputs, StagePruner
from sdtp_lib.scorers.words import LEAST, LEAST_LATER, MOST, is_word_table, least_at, whole_words, word_table, words_of

FEATURES = ("hidden", "distance", "query", "attention", "memory")


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
    features
        Inputs: ``"hidden"`` always; ``"distance"`` adds the distance to the prompt's end, ``"query"`` a low-rank
        query-key product with the last ``query_window`` tokens, ``"attention"`` the attention that each head of
        the layers before paid to the token (`earlier_layers`), the strongest of ``attention_kernel`` neighbours,
        ``"memory"`` the standardised score of the stage before (0 at the first): heads that look for an answer sit in
        few layers.
    query_rank, query_heads, query_window
        Size of the query-key term: R dimensions in all, split over H heads.
    attention_heads
        Attention heads of the model; needed by ``"attention"``.
    passage_tokens
        Odd: query and attention inputs also as means over so many kept neighbours, since an answer's whole passage
        matters and not the words alone that the question repeats; 0: not.
    blend
        Fields of `Blend`: how the learned score is smoothed and mixed with attention and recency when
        tokens are chosen, not in the losses on labels. None: the learned score alone, as in the paper.
    num_layers, model_type, base_model, weights_fingerprint
        Which model they were trained on: sizes are checked (error), the fingerprint too (warning).
    notes
        Free facts that travel in the config (data, seed, label).

    Raises
    ------
    ValueError
        For an unknown feature, no layers, a rank that the heads do not divide, or a blend of nothing.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        width: int | None = None,
        features: Sequence[str] = ("hidden",),
        query_rank: int = 32,
        query_heads: int = 8,
        query_window: int = 16,
        attention_heads: int | None = None,
        attention_kernel: int = 7,
        passage_tokens: int = 0,
        blend: dict[str, float | int] | None = None,
        num_layers: int | None = None,
        model_type: str | None = None,
        base_model: str | None = None,
        weights_fingerprint: str | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(features) - set(FEATURES))
        if unknown or "hidden" not in features:
            more = ", ".join(FEATURES[1:])
            raise ValueError(f"features={tuple(features)} must hold 'hidden' and may add {more} only.")
        if "attention" in features and not attention_heads:
            raise ValueError("attention_heads=None: the input 'attention' needs the model's number of attention heads.")
        attention_kernel = neighbours("attention_kernel", attention_kernel)
        passage_tokens = whole_number("passage_tokens", passage_tokens)
        if passage_tokens and (passage_tokens < 0 or passage_tokens % 2 == 0):
            raise ValueError(
                f"passage_tokens={passage_tokens} is no odd number of neighbours: give 0 (none), 33, 65, ..."
            )
        if passage_tokens and not {"query", "attention"} & set(features):
            raise ValueError(
                f"passage_tokens={passage_tokens} needs the input 'query' or 'attention' among "
                f"features={tuple(features)}: give 0, or add one of these."
            )
        sizes = {"hidden_size": hidden_size, "query_rank": query_rank, "query_heads": query_heads,
                 "query_window": query_window, "width": width, "attention_heads": attention_heads,
                 "num_layers": num_layers}  # fmt: skip
        for name, value in sizes.items():
            if value is not None and whole_number(name, value) < 1:
                raise ValueError(f"{name}={value!r} is not a size: give a whole number, 1 or more.")
        if query_rank % query_heads:
            raise ValueError(f"query_rank={query_rank} is not a multiple of query_heads={query_heads}.")
        # The checks of layers are the configuration's; the order here is free.
        with contextlib.suppress(TypeError):  # what cannot be sorted is refused by name
            layers = sorted(layers)
        layers = PruningConfig(layers).layers
        self.hidden_size, self.layers = int(hidden_size), layers
        self.width = int(width or max(1, hidden_size // 4))
        self.features = tuple(features)
        self.query_rank, self.query_heads, self.query_window = query_rank, query_heads, query_window
        self.attention_heads, self.attention_kernel = attention_heads, attention_kernel
        self.passage_tokens = int(passage_tokens)
        self.earlier_layers = earlier_layers(self.layers) if "attention" in self.features else {}
        self.blend = None if blend is None else Blend.of(blend)
        self.num_layers, self.model_type, self.base_model = num_layers, model_type, base_model
        self.weights_fingerprint, self.notes = weights_fingerprint, dict(notes or {})
        self.register_buffer("word_table", None)
        # String keys: module names may not hold dots and ModuleDict wants strings.
        self.stages = nn.ModuleDict({str(layer): StagePruner(self) for layer in self.layers})

    @classmethod
    def for_model(cls, model: nn.Module, layers: Sequence[int], **options: Any) -> TokenPruners:
        """Untrained pruners with the sizes, name and fingerprint of ``model`` (a causal LM of transformers)."""
        text = model.config.get_text_config()
        described = {
            "num_layers": text.num_hidden_layers,
            "model_type": text.model_type,
            "base_model": getattr(model, "name_or_path", None) or None,
            "weights_fingerprint": weights_fingerprint(model),
            "attention_heads": text.num_attention_heads,
        }
        return cls(text.hidden_size, layers, **{**described, **options})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> TokenPruners:
        """The pruners of a folder that ``save_pretrained`` wrote, that ship, or of a Hub id; whole, or an error.

        Parameters
        ----------
        pretrained_model_name_or_path
            A folder, else the name of pruners that ship (``smollm2-135m-instruct``, from any folder), else a Hub id.
        options
            The mixin's (``revision``, ``token``, ``cache_dir`` ...), or fields of the config to change (``blend``).

        Raises
        ------
        OSError
            If there is no such folder, a file of it is missing or damaged, the weights lack a stage that its config
            names, or the Hub cannot give it.
        """
        return loaded_whole(super().from_pretrained, pretrained_model_name_or_path, options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", strict: bool = False, **options: Any):
        """In the place of the mixin's, which prints what it does and reads a pickle where a repository has one."""
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        return cls._load_as_safetensor(cls(**options), weights_file(model_id, hub), map_location, strict)

    def know_words(self, tokenizer: Any) -> TokenPruners:
        """Score long words as one from now on (`sdtp_lib.scorers.words`), but in the losses of a training, or where a
        prompt comes as embeddings; what ``tokenizer`` says is saved along."""
        self.word_table = word_table(tokenizer).to(next(self.parameters()).device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        held = state_dict.get(f"{prefix}word_table")
        if held is not None and not is_word_table(held):
            rest[-1].append(f"word_table is none of know_words: {held.dtype} {tuple(held.shape)}")
        elif held is not None:
            self.word_table = torch.empty_like(held, device=next(self.parameters()).device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def name(self) -> str:
        """How result rows call this scorer."""
        return "learned"

    @property
    def query_tokens(self) -> int:
        """The last tokens that their inputs read."""
        read = {"query": self.query_window, "attention": QUERY_TOKENS}
        blended = self.blend.window if self.blend is not None and self.blend.attention else 1
        return max(blended, *(read.get(feature, 1) for feature in self.features))

    @property
    def identity(self) -> str:
        """How result rows tell these pruners from others of the same name: a hash of weights and settings."""
        # "score" is the one output there is; rows that were written when there were two kinds name it.
        settings = (self.layers, self.features, "score", self.query_heads, self.query_window, self.attention_kernel)
        words = () if self.word_table is None else (LEAST, LEAST_LATER, MOST)
        return f"TokenPruners {content_id(dict(self.state_dict()), *settings, self.passage_tokens, self.blend, *words)}"

    def check(self, model: nn.Module, config: Any) -> None:
        """Refuse a model of other sizes or layers without a pruner, before any compute; warn of other weights.

        Raises
        ------
        ValueError
            Naming both sizes, or both lists of layers.
        PruningNotSupported
            For a model whose attention cannot be read, if these pruners or their blend look at it.
        """
        lacking = [layer for layer in config.layers if layer not in self.layers]
        if lacking:
            raise ValueError(
                f"layers={list(config.layers)} names {lacking}, but these pruners were made for layers "
                f"{list(self.layers)}: prune at those, or train pruners for the missing ones."
            )
        text = model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", self.attention_heads)
        for field, own, other in (
            ("hidden_size", self.hidden_size, text.hidden_size),
            ("num_layers", self.num_layers, text.num_hidden_layers),
            ("model_type", self.model_type, text.model_type),
            ("attention_heads", self.attention_heads if self.earlier_layers else None, heads),
        ):
            if own is not None and own != other:
                raise ValueError(
                    f"{field}={own} of these pruners (base model {self.base_model}) does not fit the model's {other}: "
                    "load pruners that were trained on this model, or train some."
                )
        if self.earlier_layers or (self.blend is not None and self.blend.attention):
            refuse_unreadable(model, config.layers)
        own, other = self.weights_fingerprint, weights_fingerprint(model)
        if own is not None and other is not None and own != other:
            warnings.warn(
                f"these pruners were trained on other weights of the same shape ({self.base_model}): "
                "expect worse scores, or train on this model.",
                stacklevel=2,
            )

    @torch.no_grad()
    def forward(self, stage: Any) -> Tensor:
        """Scores (B, n) of the kept tokens at ``stage``, higher is more important; float32."""
        network = self.stages[str(stage.layer_index)]
        if network.down.weight.device != stage.hidden_states.device:
            # Under a device_map each decoder layer has its own device: its pruner moves there once.
            network.to(stage.hidden_states.device)
        attention = None
        if self.earlier_layers:
            attention = stage.attention_mass(self.earlier_layers[stage.layer_index], QUERY_TOKENS)
        own = f"score of {id(self)}"  # two pruners in one mix must not overwrite each other's state
        memory = stage.carried.get(own)
        valid, lengths = stage.padding_mask, stage.prompt_lengths
        learned = network(StageInputs(stage.hidden_states, stage.positions, valid, lengths, attention, memory))
        if "memory" in self.features:
            stage.carried[own] = standardised(learned, stage.padding_mask)
        scores = learned if self.blend is None else self.blend(learned, stage)
        if self.word_table is None or stage.token_ids is None:
            return scores
        words = f"words of {id(self)}"
        if words not in stage.carried:  # of the whole prompt: later stages see words with gaps
            self.word_table = self.word_table.to(stage.token_ids.device)
            stage.carried[words] = words_of(stage.token_ids, stage.positions, self.word_table)
        return whole_words(scores, stage.carried[words], valid, least_at(stage.layer_index, self.layers))

    def score(self, layer: int, inputs: StageInputs) -> Tensor:
        """Differentiable scores (B, n) at ``layer``."""
        return self.stages[str(layer)](inputs)

    def flops_per_token(self) -> float:
        """Floating-point operations that one stage spends on one token (a multiply-add counts 2)."""
        inputs = self.hidden_size
        extra = self.side_inputs
        flops = 2 * self.width * (inputs + extra) + 2 * (self.width + extra)
        if "query" in self.features:
            flops += 2 * self.query_rank * inputs + 2 * self.query_rank * self.query_window
        if "attention" in self.features:
            flops += LAYERS_BACK * 2 * QUERY_TOKENS * inputs
        if self.blend is not None:
            flops += self.blend.flops_per_token(inputs)
        return float(flops)

    @property
    def side_inputs(self) -> int:
        """Inputs of a pruner beside the hidden state."""
        sizes = {
            "distance": DISTANCE_INPUTS,
            "query": self.query_heads,
            "attention": LAYERS_BACK * (self.attention_heads or 0),
            "memory": 1,
        }
        used = {name: size for name, size in sizes.items() if name in self.features}
        again = {name: size for name, size in used.items() if name in ("query", "attention") and self.passage_tokens}
        return sum(used.values()) + sum(again.values())

    def extra_repr(self) -> str:
        """For ``print(pruners)``."""
        return f"layers={list(self.layers)}, features={self.features}, base={self.base_model!r}"


_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def weights_fingerprint(model: nn.Module) -> str | None:
    """`provenance.fingerprint`; None where accelerate has offloaded weights (they are on ``meta`` between forwards).

    Each `with` asks for it, so it is read once per model object, and again where a parameter was replaced, moved or
    written to. A write through ``.data`` goes unseen; what result rows say is read anew each time.
    """
    weights = [*(tensor for _, tensor in stored_tensors(model)), *rotary(model)[0]]
    if any(weight.is_meta for weight in weights):
        return None
    try:
        state = [(id(weight), weight.data_ptr(), weight._version) for weight in weights]
    except RuntimeError:  # tensors of inference mode count no writes, wrapped ones have no address
        return fingerprint(model)
    known = _FINGERPRINTS.get(model)
    # The id of a weight that is gone may be another one's by now.
    if known is None or known[0] != state or not all(weight() is not None for weight in known[1]):
        known = _FINGERPRINTS[model] = state, [weakref.ref(weight) for weight in weights], fingerprint(model)
    return known[2]
