"""The learning rate as a function of the step, so that a resumed training needs to remember nothing.

Layer 2: pure.
"""

from __future__ import annotations

from math import cos, pi

from pipeline.fit.settings import Training


def share_of_rate(training: Training, step: int) -> float:
    """The learning rate of update `step` (1 … steps) as a share of `learning_rate`.

    Warm-up is linear and reaches 1 with its last step. Cosine falls from there to 0 (Loshchilov & Hutter 2017, without
    restarts); "step" is multiplied by `decay` behind each of `decay_steps`.
    """
    if step <= training.warmup_steps:
        return step / training.warmup_steps
    done = step - 1 - training.warmup_steps
    match training.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + cos(pi * done / (training.steps - training.warmup_steps)))
        case "step":
            return training.decay ** sum(fall < step for fall in training.decay_steps)
