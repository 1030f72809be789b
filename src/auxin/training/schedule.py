"""Learning rates in closed form: a function of the step alone, so that a schedule has no state to save."""

import math

from auxin.training.settings import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based, of this stage).

    With peak p, warmup W, decay D, total T and minimum m * p: (s + 1) / W * p for s < W; then

    * constant: p;
    * wsd: p until T - D, then linear, p * (1 - (1 - m) * (s - (T - D)) / D);
    * cosine: p * (m + (1 - m) * (1 + cos(pi * (s - W) / (T - W))) / 2).

    Decay and cosine reach the minimum at step T, the one after the last, so that no step is spent on a rate of zero.
    Warmup-stable-decay: Hu et al. 2024, "MiniCPM"; Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations".
    """
    peak, minimum = settings.learning_rate, settings.minimum_learning_rate_ratio
    warmup = settings.warmup_steps
    if step < warmup:
        return peak * ((step + 1) / warmup)
    if settings.schedule == "wsd":
        decay = settings.decay_steps(total_steps)
        since = step - (total_steps - decay)
        return peak * (1 - (1 - minimum) * since / decay) if since > 0 else peak
    if settings.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return peak * (minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2)
    return peak
