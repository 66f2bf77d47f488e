"""The learning rate of every step."""

import math
from dataclasses import dataclass

from utils.published import EXTRA_DECAY_FROM


def cosine(schedule: "Schedule", epoch: float) -> float:
    """Half a period of a cosine, from 1 at the end of the warm-up to 0 at the end of the training."""
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - schedule.warmup) / (schedule.epochs - schedule.warmup))


# Policy -> share of the peak rate at an epoch. As 1xN has it, only the warm-up is finer than epochs; ResRep's cosine
# falls with every step: its epoch has a fraction.
POLICIES = {
    "cos": cosine,
    "cos_step": cosine,
    "step": lambda schedule, epoch: schedule.gamma ** schedule.decays(epoch),
    "exp": lambda schedule, epoch: 0.96**epoch,
    "fixed": lambda schedule, epoch: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """The rate of a step by its place, called as `schedule(epoch, step, steps an epoch)`.

    Args:
        peak: the highest rate.
        policy: one of `POLICIES`.
        epochs: after as many the schedule starts again; several rounds of training are as many schedules.
        warmup: epochs in which the rate grows linearly to its peak.
        gamma: factor of one decay of the policy "step".
        every: epochs between two decays.
        milestones: epochs of the decays instead.
    """

    peak: float
    policy: str
    epochs: int
    warmup: int
    gamma: float = 0.1
    every: int = 30
    milestones: tuple[int, ...] = ()

    def __call__(self, epoch: int, step: int, steps: int) -> float:
        epoch %= self.epochs
        exact = epoch + step / steps if self.policy == "cos_step" else epoch
        rate = self.peak * POLICIES[self.policy](self, exact)
        return rate * (1 + step + epoch * steps) / (self.warmup * steps) if epoch < self.warmup else rate

    def decays(self, epoch: int) -> int:
        """How often the policy "step" has decayed: at the milestones, or else at every interval and as published."""
        if self.milestones:
            return sum(epoch >= milestone for milestone in self.milestones)
        return epoch // self.every + (epoch >= EXTRA_DECAY_FROM)
