"""The figures that arXiv 2504.04514v2 prints, to hold measured ones against.

Data only: computes nothing, knows no model. Units are in the names. All from Mistral-7B-Instruct-v0.2 unless said.
"""

from __future__ import annotations

PAPER_KEEP_RATIO = 0.9
PAPER_STAGES = 10
PAPER_NEW_TOKENS = 128
PAPER_COMPRESSION_RATIO = {"sdtp": 1.61, "sdtp-low": 1.32}

# The paper says "first at the 4th layer, then every 3rd": neither 0- or 1-based nor before or after is said.
TABLE2_LAYER_LISTS = {
    "before 4, 7 .. 31": tuple(range(4, 32, 3)),
    "before 3, 6 .. 30": tuple(range(3, 31, 3)),
    "before 2, 5 .. 29": tuple(range(2, 30, 3)),
}

# Table 2, batch 1, 128 new tokens, unpruned and SDTP (S = 10, r = 0.9).
TABLE2_COLUMNS = (
    "prompt_tokens", "prefill_tflops", "prefill_tflops_sdtp", "prefill_s", "prefill_s_sdtp",
    "end_to_end_s", "end_to_end_s_sdtp", "memory_gb", "memory_gb_sdtp",
)  # fmt: skip
TABLE2 = tuple(
    dict(zip(TABLE2_COLUMNS, values, strict=True))
    for values in (
        (4096, 72.51, 47.81, 0.31, 0.20, 3.70, 3.43, 15.55, 15.04),
        (8192, 158.22, 102.01, 0.64, 0.40, 4.85, 3.98, 17.10, 15.86),
        (16384, 369.22, 229.41, 1.40, 0.84, 7.17, 5.46, 20.20, 17.55),
        (32768, 949.54, 560.40, 3.40, 1.90, 13.63, 8.95, 26.41, 20.95),
        (65536, 2743.46, 1526.98, 9.33, 4.99, 27.75, 16.92, 39.31, 28.24),
        (131072, 8864.49, 4678.81, 29.30, 13.60, 63.69, 36.35, 65.13, 42.82),
    )
)

# Table 1, LongBench English; the average is over the 14 data sets, not over the five columns.
TABLE1_COLUMNS = ("single_doc", "multi_doc", "summarisation", "few_shot", "code", "average")
TABLE1 = {
    method: dict(zip(TABLE1_COLUMNS, values, strict=True))
    for method, values in {
        "original": (36.66, 29.88, 28.26, 66.95, 53.74, 42.34),
        "LLMLingua-2-small": (31.55, 29.04, 26.79, 49.24, 32.61, 33.94),
        "LLMLingua-2": (31.35, 30.57, 27.29, 52.29, 33.87, 35.16),
        "sdtp": (32.70, 27.74, 26.65, 62.74, 53.99, 39.82),
        "sdtp-low": (35.60, 28.83, 27.26, 64.58, 52.43, 40.98),
    }.items()
}

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
