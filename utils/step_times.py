"""Where the time of training steps goes, for --profile."""

import contextlib
import time
from collections.abc import Iterator

import torch

PHASES = {"data": "waiting for data", "prepare": "copies, frozen backbone", "forward": "forward", "loss": "loss",
          "backward": "backward", "update": "update"}


class StepTimes:
    """Adds up the seconds of the phases of `steps` training steps; the one before them, which warms up, does not count.

    A phase lasts until the next one is entered. On a GPU each change waits until its work is done, so that it counts
    in the phase that asked for it; the profiled steps lose what overlapped. steps 0, and after the last step: nothing
    is measured and nothing waits.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.device = device
        self.done = -1 if steps else 0                      # the first step warms up
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """phase: of PHASES."""
        if self.done < self.steps:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if self._phase is not None:
                self.seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now

    def pause(self) -> None:
        """What was done since the last change, such as an evaluation, belongs to no step."""
        self._phase = None

    @contextlib.contextmanager
    def forward(self, context: contextlib.AbstractContextManager) -> Iterator[None]:
        """`context` around a forward pass, behind which the loss is computed."""
        self.enter("forward")
        with context:
            yield
        self.enter("loss")

    def end_step(self, step: int) -> str | None:
        """Count the step that ends here, number `step` of the run; the table after the last of them, else None."""
        if self.done == self.steps:
            return None
        self.enter("data")
        self.done += 1
        if self.done == 0:
            self.seconds = dict.fromkeys(PHASES, 0.0)
        return self._table(step) if self.done == self.steps else None

    def _table(self, last: int) -> str:
        means = {PHASES[phase]: seconds / self.done for phase, seconds in self.seconds.items()}
        total = sum(means.values())
        lines = [f"{name:<24}{mean:9.4f} s/step{100 * mean / total:7.1f} %"
                 for name, mean in {**means, "total": total}.items()]
        title = f"where the time of steps {last - self.done + 1} to {last} went (what to do: docs/performance.md)"
        return "\n".join([title, *lines])
