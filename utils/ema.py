"""Exponential moving average of the weights in training."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from utils.distributed import unwrap
from utils.weights import load_weights


class EMA:
    """Average of the trained tensors: shadow = d * shadow + (1 - d) * live after each optimiser step.

    decay in [0, 1). With warmup, d = min(decay, (1 + t) / (10 + t)) at update t = 0, 1, ...; without, a decay of
    0.9999 is still 90 % the initial weights after 1,000 steps. Models wrapped in DistributedDataParallel or
    torch.compile are fine.

    What is averaged: every trainable parameter, and every saved (persistent) buffer outside frozen parts, so that a
    frozen backbone costs no memory, its BatchNorm statistics included; integer buffers are copied. Part = module: it
    is frozen if it has parameters and none is trainable. Half-precision weights have a float32 shadow: bfloat16 loses
    small updates.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = True):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the decay of the moving average must be in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates, self.is_applied = decay, warmup, 0, False
        model = unwrap(model)
        self.buffers = _live_buffers(model)
        self.shadow = {}
        for name, tensor in self._live(model).items():
            dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
            self.shadow[name] = tensor.detach().to(dtype, copy=True)

    def _live(self, model: nn.Module) -> dict[str, Tensor]:
        """{name as in state_dict: the model's own tensor} of what is averaged."""
        model = unwrap(model)
        live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return live | {name: buffer for name, buffer in model.named_buffers() if name in self.buffers}

    def _matched(self, model: nn.Module) -> dict[str, Tensor]:
        live = self._live(model)
        _check_names(live, self.shadow, "the model's trainable tensors and the moving average",
                     "make a new EMA after freezing or unfreezing")
        return live

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the live weights, after optimizer.step(). ValueError if other tensors are trainable than before."""
        assert not self.is_applied, "EMA.update inside EMA.applied would average the average"
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        shadows, lives = [], []
        for name, tensor in self._matched(model).items():
            shadow = self.shadow[name]
            if shadow.is_floating_point():
                shadows.append(shadow)
                lives.append(tensor.to(shadow))                          # the tensor itself unless it is half precision
            else:
                shadow.copy_(tensor)
        if shadows:
            torch._foreach_lerp_(shadows, lives, 1 - decay)              # a few kernels instead of one per tensor
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the live weights with the average, for good."""
        for name, tensor in self._matched(model).items():
            tensor.copy_(self.shadow[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`with ema.applied(model): ...` has the average inside, and exactly the live weights after, come what may."""
        assert not self.is_applied, "EMA.applied inside EMA.applied"
        live = self._matched(model)
        backup = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.is_applied = True
        try:
            self.copy_to(model)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(backup[name])
            self.is_applied = False

    def state_dict(self) -> dict:
        """Plain types: {"updates": int, "shadow": {name: tensor}}; the tensors are the live shadows, not copies."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over a saved state; decay and warmup stay. ValueError unless names and shapes are this model's."""
        saved = state["shadow"]
        _check_names(saved, self.shadow, "the saved moving average and this model's trainable tensors",
                     "use the model and the frozen parts of the saved run")
        for name, shadow in self.shadow.items():
            if saved[name].shape != shadow.shape:
                raise ValueError(f"{name} is {tuple(saved[name].shape)} in the saved moving average and "
                                 f"{tuple(shadow.shape)} in this model; use the model of the saved run")
        for name, shadow in self.shadow.items():
            shadow.copy_(saved[name])
        self.updates = int(state["updates"])


def averaged(ema: EMA | None, model: nn.Module) -> AbstractContextManager:
    """ema.applied(model), or without an average a context that does nothing."""
    return nullcontext() if ema is None else ema.applied(model)


def load_averaged(model: nn.Module, checkpoint: Mapping) -> None:
    """Fill the model from a checkpoint, with the averaged weights where it has them. ValueError unless all fit."""
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    if checkpoint.get("ema") is not None:
        average = EMA(model)
        average.load_state_dict(checkpoint["ema"])
        average.copy_to(model)


def _live_buffers(model: nn.Module, prefix: str = "") -> set[str]:
    """Names of saved buffers outside frozen parts; a module without parameters goes with the one that holds it."""
    parameters = list(model.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return set()
    names = {prefix + name for name in model._buffers if name not in model._non_persistent_buffers_set}
    return names.union(*(_live_buffers(child, f"{prefix}{name}.") for name, child in model.named_children()))


def _check_names(first: Collection[str], second: Collection[str], what: str, remedy: str) -> None:
    only_first, only_second = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    if only_first or only_second:
        raise ValueError(f"{what} differ: {len(only_first)} names only in the first {only_first[:3]}, "
                         f"{len(only_second)} only in the second {only_second[:3]}; {remedy}")
