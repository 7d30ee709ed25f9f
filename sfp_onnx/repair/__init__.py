"""Closed-form repair: re-fit what is left so that the changed network answers like the original one, without training."""

from .kernels import kernel_losses
from .lockstep import repair
from .moments import reestimate
from .selection import Elimination, elimination
from .steps import Step, plan_steps

__all__ = ["Elimination", "Step", "elimination", "kernel_losses", "plan_steps", "reestimate", "repair"]
