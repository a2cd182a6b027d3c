"""Exponential moving average of the weights that are being trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WRAPPERS = ("module", "_orig_mod")           # DistributedDataParallel, torch.compile


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        inner = next((getattr(model, name) for name in WRAPPERS if isinstance(getattr(model, name, None), nn.Module)), None)
        if inner is None or list(model.children()) != [inner]:
            return model
        model = inner


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors an average has to hold: {name as in state_dict: live tensor}.

    Every trainable parameter, and every persistent buffer outside frozen parts. A part is frozen when it has parameters and none is
    trainable: a frozen backbone costs no memory, its BatchNorm statistics included. A BatchNorm without parameters goes with the module
    that holds it.
    """
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def add_buffers(module: nn.Module, prefix: str) -> None:
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            return
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[prefix + name] = buffer
        for name, child in module.named_children():
            add_buffers(child, f"{prefix}{name}.")

    add_buffers(model, "")
    return tensors


class EMA:
    """Average of the trained weights: shadow = d * shadow + (1 - d) * live after each optimiser step.

    With warmup, d = min(decay, (1 + t) / (10 + t)) at update t = 0, 1, ...: without it a decay of 0.9999 is still 90 % the initial weights
    after 1,000 steps. Floating buffers (BatchNorm statistics) are averaged too, integer ones copied. Half-precision weights have a float32
    shadow, because small updates vanish in bfloat16. Wrapped models (DistributedDataParallel, torch.compile) are unwrapped.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = True):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the decay of the moving average must be in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates, self._swapped = decay, warmup, 0, False
        self.shadow = {name: t.detach().to(torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else t.dtype, copy=True)
                       for name, t in averaged_tensors(_unwrap(model)).items()}

    def _live(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = averaged_tensors(_unwrap(model))
        _check_names(tensors, self.shadow, "the model's trainable tensors and the moving average",
                     "make a new EMA after freezing or unfreezing parts")
        return tensors

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the live weights; call it after optimizer.step(). ValueError if other tensors are trainable than at the start."""
        assert not self._swapped, "EMA.update inside EMA.applied would average the average"
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        live = self._live(model)
        pairs = [(shadow, live[name].detach()) for name, shadow in self.shadow.items()]
        floats = [(shadow, tensor) for shadow, tensor in pairs if shadow.is_floating_point()]
        if floats:
            shadows = [shadow for shadow, _ in floats]
            torch._foreach_lerp_(shadows, [tensor.to(shadow) for shadow, tensor in floats], 1 - decay)
        for shadow, tensor in pairs:
            if not shadow.is_floating_point():
                shadow.copy_(tensor)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the live weights with the average, for good."""
        for name, tensor in self._live(model).items():
            tensor.copy_(self.shadow[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`with ema.applied(model): evaluate(model)`: the averaged weights inside, exactly the live ones after, also after an exception."""
        assert not self._swapped, "EMA.applied inside EMA.applied"
        live = self._live(model)
        backup = {name: tensor.detach().clone() for name, tensor in live.items()}
        self._swapped = True
        try:
            self.copy_to(model)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(backup[name])
            self._swapped = False

    def state_dict(self) -> dict:
        """Plain types: {"updates": int, "shadow": {name: tensor}}; the tensors are the live shadows, not copies."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over the state; ValueError unless its names and shapes are exactly this model's. decay and warmup stay as constructed."""
        _check_names(state["shadow"], self.shadow, "the saved moving average and this model",
                     "resume with the same model and the same frozen parts")
        for name, shadow in self.shadow.items():
            if state["shadow"][name].shape != shadow.shape:
                raise ValueError(f"the saved moving average has {name} {tuple(state['shadow'][name].shape)}, this model "
                                 f"{tuple(shadow.shape)}; resume with the same model")
        for name, shadow in self.shadow.items():
            shadow.copy_(state["shadow"][name])
        self.updates = int(state["updates"])


def _check_names(first: dict, second: dict, what: str, remedy: str) -> None:
    if first.keys() != second.keys():
        only_first, only_second = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
        raise ValueError(f"{what} differ: {len(only_first)} names only in the first {only_first[:5]}, {len(only_second)} only in the "
                         f"second {only_second[:5]}; {remedy}")
