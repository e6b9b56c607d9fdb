"""How pruners are trained: `TrainingConfig`, its fields and checks. Knows no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from sdtp_lib.checked import one_of

MIXED_PRECISION = ("no", "bf16", "fp16")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Losses, schedule and cuts of one training run (paper, section 3.3; L = L_lm + L_mse + L_rank).

    Parameters
    ----------
    epochs
        Passes over the samples (paper: 2).
    learning_rate, warmup_share, weight_decay, batch_size
        AdamW with a cosine schedule; ``batch_size`` counts prompts per step and device.
    mse_weight, rank_weight, drop_weight
        Weights of the regression on the standardised log-saliency, of the pairwise ranking, and of the share of
        saliency that a soft cut drops. 0 switches a loss off (the paper's Table 4).
    rank_at_cut
        Rank only pairs on opposite sides of a cut at a keep ratio drawn from ``keep_ratios``; False: all pairs (paper).
    rank_width
        Share of tokens round the cut in which pairs count most; 0: all pairs across the cut alike.
    staged
        The losses on labels see at each stage the tokens that the earlier ones leave at the drawn keep ratio, as many
        as in inference; False: the whole prompt at every stage.
    lm_weight, distill_weight
        Weights of the pruned model's cross-entropy on the response (paper) and of its KL to the unpruned model, both
        through simulated pruning; 0 leaves the language model out of the gradient, and training is much cheaper.
    distill_floor
        Nats: above 0 the distillation loss is each prompt's ``log(KL + distill_floor)`` instead of its KL.
    keep_ratios
        (low, high): each step draws its keep ratio from here, so that one set of pruners serves every ratio.
    input_dropout
        Share of the hidden states' numbers that a step of the losses on labels hides from the pruners.
    temperature, keep_floor
        Softness of the simulated cut in standard deviations of the score, and the least that stays of a token: the
        gradient of its logarithm grows as 1 / keep.
    straight_through
        Simulate with a hard cut whose gradient is the soft one's; False: a soft cut.
    sink_tokens, local_ratio, min_local_tokens
        Protected tokens, as in `PruningConfig`; they take part in no loss, nor do those that a sample protects.
    eval_share, patience, eval_ratio
        Share of samples held out by id, evaluations without improvement before training stops (0: never), and the keep
        ratio of the held-out measure.
    mixed_precision
        ``"no"``, ``"bf16"`` or ``"fp16"``.
    seed
        Of the split, the order, the ratios and the weights.
    save_steps, logging_steps
        Steps between checkpoints and between logged losses.

    Raises
    ------
    ValueError
        Naming the field, the value and the remedy.
    """

    epochs: float = 2.0
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    batch_size: int = 4
    mse_weight: float = 1.0
    rank_weight: float = 1.0
    drop_weight: float = 0.0
    rank_at_cut: bool = True
    rank_width: float = 0.0
    staged: bool = True
    lm_weight: float = 0.0
    distill_weight: float = 0.0
    distill_floor: float = 0.0
    keep_ratios: tuple[float, float] = (0.6, 0.95)
    input_dropout: float = 0.0
    temperature: float = 0.3
    keep_floor: float = 1e-3
    straight_through: bool = True
    sink_tokens: int = 4
    local_ratio: float = 0.1
    min_local_tokens: int = 16
    eval_share: float = 0.1
    patience: int = 3
    eval_ratio: float = 0.8
    mixed_precision: str = "no"
    seed: int = 0
    save_steps: int = 200
    logging_steps: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratios", tuple(self.keep_ratios))
        for name in (
            "mse_weight",
            "rank_weight",
            "drop_weight",
            "lm_weight",
            "distill_weight",
            "distill_floor",
            "rank_width",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative: give 0 to switch it off, or more.")
        if not any(self.weights().values()):
            raise ValueError("every loss has weight 0: switch on one of " + ", ".join(self.weights()) + ".")
        for name in ("epochs", "learning_rate", "batch_size", "temperature", "save_steps", "logging_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        low, high = self.keep_ratios if len(self.keep_ratios) == 2 else (0, 0)
        if not 0 < low <= high <= 1:
            raise ValueError(f"keep_ratios={self.keep_ratios} must be (low, high) within (0, 1], such as (0.6, 0.95).")
        if not 0 <= self.input_dropout < 1:
            raise ValueError(f"input_dropout={self.input_dropout} is outside [0, 1): 0.1 hides a tenth of the inputs.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} is outside [0, 1): 0.1 holds out a tenth of the samples.")
        if not 0 < self.eval_ratio <= 1 or not 0 < self.keep_floor < 1:
            raise ValueError(f"eval_ratio={self.eval_ratio} and keep_floor={self.keep_floor} must be within (0, 1).")
        one_of("mixed_precision", self.mixed_precision, MIXED_PRECISION)

    def weights(self) -> dict[str, float]:
        """The weight of each loss by name."""
        return {name: getattr(self, f"{name}_weight") for name in ("mse", "rank", "drop", "lm", "distill")}

    @property
    def needs_labels(self) -> bool:
        """Whether a loss looks at saliency."""
        return bool(self.mse_weight or self.rank_weight or self.drop_weight)

    @property
    def simulates_pruning(self) -> bool:
        """Whether a loss looks at the pruned model's predictions."""
        return bool(self.lm_weight or self.distill_weight)

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dataclasses.asdict(self)
        return {**values, "keep_ratios": list(self.keep_ratios)}
