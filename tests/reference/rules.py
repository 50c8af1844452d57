"""What changes over a training run: the rounding weight, the learning rate, and when to stop. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def dynamic_rounding_weight(loss_simple: float, loss_rounding: float, c: float) -> float:
    """Section 5.3: after each step lambda = L'_simple / L_R * C, for the next one, from the losses before that step.

    L_R is taken before lambda and L'_simple with its x_1 term, as section 3.1 defines them. Neither the paper's reason
    for C = 1 (L'_simple / L_R "around 2.80" at lambda 0.3, hence lambda near 0.3) nor its log (file 22: x_t 6.40, x_1
    4.61, lambda L_R 18.47, where this rule would keep lambda L_R near 11) fits the printed rule; 2.80 is nearest to
    lambda L_R / x_t term (12.87 / 4.89 = 2.63). The first lambda is not stated.
    """
    return loss_simple / loss_rounding * c


def learning_rate(
    kind: str, epoch: int, num_epochs: int, start: float = 1e-4, end: float = 5e-5, last_epoch_at_end: bool = True
) -> float:
    """Section 5.2, by epoch (0..E-1): constant, linear, cosine, log, log_of_epoch.

    Assumption: the last epoch runs at ``end`` (``last_epoch_at_end``); else ``end`` would be reached after it.
    "Log" is not defined. ``log``: a straight line in log(lr). ``log_of_epoch``: a fall with the logarithm of the
    epoch. The paper says that it "decreases significantly more rapidly to a low value", which fits the second better.
    """
    steps = max(num_epochs - 1 if last_epoch_at_end else num_epochs, 1)
    share = epoch / steps
    if kind == "constant":
        return start
    if kind == "linear":
        return start + (end - start) * share
    if kind == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    if kind == "log":
        return start * (end / start) ** share
    if kind == "log_of_epoch":
        return start + (end - start) * math.log(1 + epoch) / math.log(1 + steps)
    raise ValueError(f"kind is {kind!r}: constant, linear, cosine, log or log_of_epoch")


def early_stop_paper(train_E: Sequence[float], val_E: Sequence[float]) -> int | None:
    """Section 5: training ends with the first epoch whose validation loss is above its training loss."""
    return next((epoch for epoch, (train, val) in enumerate(zip(train_E, val_E)) if val > train), None)


def early_stop_code(train_E: Sequence[float], val_E: Sequence[float], ratio: float = 1.05) -> tuple[int | None, int]:
    """Item 15: (the epoch whose weights are kept, the epochs trained).

    At the first val > ratio * train the weights are saved, once; training goes on to the end and what it learns after
    that is thrown away. Without such an epoch nothing is saved early: None, i.e. the weights of the last epoch.
    """
    saved = next((epoch for epoch, (train, val) in enumerate(zip(train_E, val_E)) if val > ratio * train), None)
    return saved, len(train_E)
