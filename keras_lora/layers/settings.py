"""Scaling of an update, and checks of rank, alpha and dropout."""

import dataclasses
import math
import numbers

BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Rank, alpha and the rule between them.

        scaling = alpha / rank          (alpha / sqrt(rank) with use_rslora=True)

    Args:
        rank: Whole number > 0.
        alpha: Finite number > 0; None means `rank`.
        use_rslora: Boolean.

    Raises:
        ValueError: If one of them is out of its range.
    """

    rank: int
    alpha: float = None  # type: ignore[assignment]  # means the rank
    use_rslora: bool = False

    def __post_init__(self):
        rank = validate_rank(self.rank)
        alpha = validate_alpha(rank if self.alpha is None else self.alpha)
        for name, value in (
            ("rank", rank),
            ("alpha", alpha),
            ("use_rslora", bool(self.use_rslora)),
        ):
            object.__setattr__(self, name, value)

    @property
    def scaling(self) -> float:
        """The factor in front of A @ B."""
        return self.alpha / divisor(self.rank, self.use_rslora)

    def with_rank(self, rank: int, use_rslora: bool | None = None) -> "Settings":
        """Returns settings of another rank, or rule, with the same scaling."""
        use_rslora = self.use_rslora if use_rslora is None else use_rslora
        if (rank, use_rslora) == (self.rank, self.use_rslora):
            return self
        factor = divisor(rank, use_rslora) / divisor(self.rank, self.use_rslora)
        return Settings(rank, self.alpha * factor, use_rslora)


def divisor(rank, use_rslora):
    """Returns the number by which alpha is divided."""
    return math.sqrt(rank) if use_rslora else rank


def validate_rank(rank, lowest=1):
    if not is_whole(rank, lowest):
        raise ValueError(
            f"`rank` must be a whole number >= {lowest}. Received: rank={rank!r}. "
            "Common ranks are 4 to 64; a LoRA layer with rank=0 has no adapter."
        )
    return int(rank)


def validate_alpha(alpha):
    if not is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(
            "`alpha` must be a finite number > 0, or None for alpha=rank. "
            f"Received: alpha={alpha!r}. The update is scaled by alpha / rank."
        )
    return int(alpha) if alpha == int(alpha) else float(alpha)


def validate_dropout(dropout):
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            "`dropout` must be a number in [0, 1), the share of the adapter's "
            f"inputs to drop. Received: dropout={dropout!r}."
        )
    return float(dropout)


def validate_bias(bias):
    if bias not in BIASES:
        raise ValueError(
            f"`bias` must be one of {', '.join(map(repr, BIASES))}. "
            f"Received: bias={bias!r}."
        )


def validate_indices(indices) -> tuple:
    """Checks the token ids that a user gives, and returns them as a tuple."""
    try:
        ids = list(indices)
    except TypeError:
        ids = [None]
    if not ids or not all(is_whole(i, lowest=0) for i in ids):
        raise ValueError(
            "`trainable_token_indices` must be ids of tokens, whole numbers >= 0. "
            f"Received: {indices!r}."
        )
    twice = sorted({int(i) for i in ids if ids.count(i) > 1})
    if twice:
        raise ValueError(
            f"`trainable_token_indices` has {twice[:5]} more than once. Give each id "
            "once."
        )
    return tuple(int(i) for i in ids)


def is_whole(value, lowest):
    """Whether a value is a whole number that is not below another one."""
    return is_number(value) and isinstance(value, numbers.Integral) and value >= lowest


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
