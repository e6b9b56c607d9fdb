"""Made-up samples to label and train on, and a training that takes a second."""

from __future__ import annotations

import torch

from sdtp_lib.training.config import TrainingConfig

LAYERS = (1, 3)


QUICK = TrainingConfig(
    epochs=2, batch_size=2, eval_share=0.3, min_local_tokens=4, save_steps=3, logging_steps=1, learning_rate=1e-2
)


def samples(count=8, tokens=40):
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "id": f"s{i}",
            "prompt_ids": torch.randint(3, 120, (tokens + i,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 120, (4,), generator=generator).tolist(),
        }
        for i in range(count)
    ]
