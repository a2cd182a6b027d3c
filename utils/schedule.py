"""Learning-rate schedules, stepped once per optimiser step.

Step t = 0 .. total_steps - 1 is the step about to be done: the rate of group["lr"] during it. All groups keep the proportion of their base
rates: one factor multiplies them all, and min_lr is the floor of the group with the largest base rate.
"""

import difflib
import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

SCHEDULES = ("cosine", "poly", "onecycle", "constant", "step", "half_cosine")


def build_scheduler(optimizer: Optimizer, name: str, total_steps: int, warmup_steps: int = 0, min_lr: float = 1e-6, power: float = 0.9,
                    start_factor: float = 0.01, milestones: Sequence[int] | None = None, gamma: float = 0.1, pct_start: float = 0.05,
                    div_factor: float = 10.0, final_div_factor: float = 1000.0, cycle_momentum: bool = True) -> LRScheduler:
    """A schedule over total_steps from the groups' own rates; call .step() once after each optimiser step.

    All but onecycle start with a linear warm-up from start_factor at step 0 to 1 at step warmup_steps. Then
    cosine       half a cosine down to min_lr, reached exactly at the last step (SGDR without restarts, Loshchilov and Hutter 2017);
    poly         min_lr + (lr - min_lr) (1 - t/T)^power (DeepLab, Chen et al. 2017): the last step is just above min_lr;
    constant     no change;
    step         times gamma at each of the milestones (steps; by default 2/3 and 8/9 of the total), not below min_lr;
    half_cosine  torch's CosineAnnealingLR with T_max = half the total: the rate is at min_lr half-way and CLIMBS BACK to its start at the
                 end, so the last weights are those of the noisiest phase. Kept because a source document has it; cosine is the default of
                 every script;
    onecycle     torch's OneCycleLR (Smith and Topin 2018), peak = the groups' rates at pct_start of the total, from peak / div_factor to
                 peak / div_factor / final_div_factor; beta1 moves against it where cycle_momentum. The defaults are Sonata's recipe.

    Raises ValueError for an unknown name (with the nearest) and for values out of range.
    """
    base = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name), SCHEDULES, 1, 0.0)[0]
        raise ValueError(f"unknown schedule {name!r}; did you mean {near!r}? Choose from {', '.join(SCHEDULES)}")
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got total_steps={total_steps}; check the epochs and the size of the data set")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in 0..total_steps-1 = 0..{total_steps - 1}, got {warmup_steps}; shorten the warm-up or train longer")
    if base <= 0:
        raise ValueError(f"the learning rate must be above 0, got {base}")
    if name == "onecycle":
        if warmup_steps:
            raise ValueError(f"onecycle has its own warm-up (pct_start={pct_start}); set warmup_steps={warmup_steps} to 0")
        if not (0 < pct_start < 1 and div_factor > 0 and final_div_factor > 0):
            raise ValueError(f"onecycle needs pct_start in (0, 1) and positive div factors, got {pct_start}, {div_factor}, {final_div_factor}")
        return OneCycleLR(optimizer, [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups], total_steps, pct_start=pct_start,
                          div_factor=div_factor, final_div_factor=final_div_factor, cycle_momentum=cycle_momentum)
    if not 0 <= min_lr <= base and name != "constant":
        raise ValueError(f"min_lr must be in [0, {base}] (the largest learning rate), got {min_lr}; lower min_lr or raise the rate")
    if not 0 < start_factor <= 1:
        raise ValueError(f"start_factor must be in (0, 1], got {start_factor}")
    if power <= 0 or not 0 < gamma <= 1:
        raise ValueError(f"power must be above 0 and gamma in (0, 1], got power={power}, gamma={gamma}")
    floor = min_lr / base
    if milestones is None:
        milestones = (2 * total_steps // 3, 8 * total_steps // 9)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start_factor + (1 - start_factor) * step / warmup_steps
        span = total_steps - warmup_steps                                # steps after the warm-up
        done = min(step - warmup_steps, span - 1)                        # the step() after the last optimiser step stays at the end
        if name == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done / max(span - 1, 1)))
        if name == "poly":
            return floor + (1 - floor) * (1 - done / span) ** power
        if name == "half_cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(2 * math.pi * done / span))
        if name == "step":
            return max(floor, gamma ** sum(step >= m for m in milestones))
        return 1.0

    return LambdaLR(optimizer, factor)
