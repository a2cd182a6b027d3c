"""Learning-rate schedules, stepped once per optimiser step.

Step t = 0 .. total_steps - 1 is the step about to be done. One factor multiplies the rates of all parameter groups,
so they keep their proportions; min_lr is the floor of the group with the largest rate.
"""

import difflib
import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

SCHEDULES = ("cosine", "poly", "onecycle", "constant", "step", "half_cosine")


def build_scheduler(optimizer: Optimizer, name: str, total_steps: int, warmup_steps: int = 0, min_lr: float = 1e-6,
                    power: float = 0.9, start_factor: float = 0.01, milestones: Sequence[int] | None = None,
                    gamma: float = 0.1, pct_start: float = 0.05, div_factor: float = 10.0,
                    final_div_factor: float = 1000.0, cycle_momentum: bool = True,
                    reach_min: bool = True) -> LRScheduler:
    """A schedule over total_steps from the rates of the optimiser's groups; .step() it after each optimiser step.

    All but onecycle warm up linearly, from start_factor at step 0 to 1 at step warmup_steps. Then, with T steps left:
    cosine       half a cosine, exactly min_lr in the last step (Loshchilov and Hutter 2017, eq. 5, no restarts), or,
                 without reach_min, in the step after it
    poly         min_lr + (lr - min_lr) (1 - t/T)^power (DeepLab v2, Chen et al. 2018); last step just above min_lr
    constant     lr
    step         lr * gamma^(milestones passed), not below min_lr; default milestones 2/3 and 8/9 of total_steps
    half_cosine  CosineAnnealingLR with T_max = T/2, as in the document users follow: at min_lr half-way, then climbing
                 back to lr at the end, so that the last weights come from the noisiest phase. Never a default
    onecycle     torch's OneCycleLR (Smith and Topin 2018): the groups' rates are peaks, reached at pct_start of the
                 run, from peak / div_factor to peak / div_factor / final_div_factor; with cycle_momentum, beta1 runs
                 against the rate, 0.95 to 0.85. Default values are Sonata's recipe; min_lr, power, gamma do not act

    Raises ValueError for an unknown name (suggesting the nearest) and for values out of range.
    """
    # An optimiser that was loaded from a checkpoint holds the rates of that step, and those it started from by name.
    base = "max_lr" if name == "onecycle" else "initial_lr"
    rates = [float(group.get(base, group["lr"])) for group in optimizer.param_groups]
    lr = max(rates)
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name), SCHEDULES, 1, 0.0)[0]
        raise ValueError(f"unknown schedule {name!r}, did you mean {near!r}? Choose from {', '.join(SCHEDULES)}")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}, needs at least 1; check the number of epochs and the data")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, must be in 0..{total_steps - 1} for {total_steps} steps in "
                         f"all; shorten the warm-up or train longer")
    if not 0 < lr < math.inf:
        raise ValueError(f"the learning rate must be above 0, got {lr}")
    if name == "onecycle":
        return _onecycle(optimizer, rates, total_steps, warmup_steps, pct_start, div_factor, final_div_factor,
                         cycle_momentum)
    if not 0 <= start_factor <= 1:
        raise ValueError(f"start_factor must be in [0, 1], got {start_factor}")
    if name != "constant" and not 0 <= min_lr <= lr:
        raise ValueError(f"min_lr is {min_lr}, must be in 0..{lr}, the largest learning rate")
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    floor, span = min_lr / lr, total_steps - warmup_steps
    milestones = (total_steps * 2 // 3, total_steps * 8 // 9) if milestones is None else milestones

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start_factor + (1 - start_factor) * step / warmup_steps
        t = min(step - warmup_steps, span - 1)                       # no optimiser step follows the last .step()
        if name == "constant":
            return 1.0
        if name == "step":
            return max(floor, gamma ** sum(step >= milestone for milestone in milestones))
        if name == "poly":
            shape = (1 - t / span) ** power
        elif name == "half_cosine":
            shape = (1 + math.cos(2 * math.pi * t / span)) / 2
        else:
            shape = (1 + math.cos(math.pi * t / max(span - reach_min, 1))) / 2
        return floor + (1 - floor) * shape

    return LambdaLR(optimizer, factor)


def build_two_warmups(optimizer: Optimizer, is_encoder: Sequence[bool], total_steps: int, head_steps: int,
                      encoder_steps: int, power: float = 0.9) -> LRScheduler:
    """EoMT's schedule, two warm-ups and (1 - t/T)^power to 0, T the steps behind a group's warm-up.

    is_encoder: of each of the optimiser's groups. A head warms up from 0 over head_steps; the encoder stays as it is
    for head_steps, then warms up from 0 over encoder_steps. ValueError where no step is left behind them.
    """
    if head_steps < 0 or encoder_steps < 0 or head_steps + encoder_steps >= total_steps:
        raise ValueError(f"warm-ups of {head_steps} and {encoder_steps} steps leave none of {total_steps}; shorten "
                         f"them or train longer")

    def factor_of(start: int, warmup: int):
        def factor(step: int) -> float:
            t = min(step, total_steps - 1) - start                   # no optimiser step follows the last .step()
            if t < warmup:
                return max(t, 0) / warmup
            return (1 - (t - warmup) / (total_steps - start - warmup)) ** power if t >= 0 else 0.0
        return factor

    encoder, head = factor_of(head_steps, encoder_steps), factor_of(0, head_steps)
    return LambdaLR(optimizer, [encoder if of_encoder else head for of_encoder in is_encoder])


def _onecycle(optimizer: Optimizer, rates: list[float], total_steps: int, warmup_steps: int, pct_start: float,
              div_factor: float, final_div_factor: float, cycle_momentum: bool) -> OneCycleLR:
    if warmup_steps:
        raise ValueError(f"onecycle has its own warm-up (pct_start={pct_start}); set warmup_steps={warmup_steps} to 0")
    if not 0 < pct_start < 1:
        raise ValueError(f"pct_start must be in (0, 1), got {pct_start}")
    if not (div_factor > 0 and final_div_factor > 0):
        raise ValueError(f"div_factor and final_div_factor must be above 0, got {div_factor} and {final_div_factor}")
    total_steps = max(total_steps, 3)                    # torch divides by zero where a phase has no step (trial runs)
    return OneCycleLR(optimizer, rates, total_steps, pct_start=max(pct_start, 2 / total_steps), div_factor=div_factor,
                      final_div_factor=final_div_factor, cycle_momentum=cycle_momentum)
