"""The one door to transformers: its decoder layers, caches, masks and attention are touched in this folder only.

`layers` finds a model's decoder layers and names what they are called with, `unsupported` says which models cannot be
served and why, `caches` reads a cache, `masks` shortens masks, `attention_weights` asks a layer for attention that was
not computed, `attention_bias` adds to what it computes. Nothing here prunes, or knows why anyone asks.
"""

from __future__ import annotations

from sdtp_lib.architectures.layers import Architecture, decoder_layers, describe, layer_inputs, num_layers

__all__ = ["Architecture", "decoder_layers", "describe", "layer_inputs", "num_layers"]
