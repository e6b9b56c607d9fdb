"""The one door to transformers: its decoder layers, caches, masks and attention are touched in this folder only.

`layers` finds a model's decoder layers and names what they are called with, `unsupported` says which models cannot be
served and why, `caches` reads a cache, `masks` shortens masks, `attention_interface` puts a function of ours in a
layer's way, `attention_weights` asks one layer for attention that was not computed, `attention_readings` asks in a
forward under way, `attention_bias` adds to what layers compute, in a way that `bias_probe` has tried. Nothing here
prunes, or knows why anyone asks.
"""

from __future__ import annotations

from sdtp_lib.architectures.layers import Architecture, decoder_layers, describe, layer_inputs, num_layers

__all__ = ["Architecture", "decoder_layers", "describe", "layer_inputs", "num_layers"]
