"""Which parameters are trained, at which rate, with which weight decay."""

from collections.abc import Callable, Collection, Iterable

from torch import nn

# Embeddings and tokens have two dimensions or more and still get no decay: names with one of these as a dotted part.
NO_DECAY = frozenset({
    "pos_embed", "position_embedding", "position_embeddings", "relative_position_bias_table",
    "query_embed", "query_feat", "query_pos", "level_embed",
    "cls_token", "mask_token", "register_tokens", "storage_tokens", "summary_token",
})


def has_decay(name: str, parameter: nn.Parameter, no_decay: Collection[str] = NO_DECAY) -> bool:
    """False for biases, norms and every other 1-d parameter, and for names with a part in no_decay."""
    return parameter.ndim > 1 and not name.endswith("bias") and not any(part in no_decay for part in name.split("."))


def split_decay(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float,
                no_decay: Collection[str] = NO_DECAY) -> list[dict]:
    """Trainable parameters -> optimiser groups {"params", "weight_decay", "name"}: with decay, and without (has_decay).

    Frozen parameters are in neither, an empty group is left out, and a parameter under two names comes once.
    """
    groups = {"decay": {"params": [], "weight_decay": weight_decay, "name": "decay"},
              "no_decay": {"params": [], "weight_decay": 0.0, "name": "no_decay"}}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups["decay" if has_decay(name, parameter, no_decay) else "no_decay"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def layerwise_groups(model: nn.Module, lr: float, weight_decay: float, layer_id: Callable[[str], int], num_layers: int,
                     layer_decay: float = 1.0, head_lr_mult: float = 1.0,
                     no_decay: Collection[str] = NO_DECAY) -> list[dict]:
    """Optimiser groups {"params", "lr", "weight_decay", "name"}, rates falling towards the input (Bao et al. 2022).

    layer_id(parameter name) is 0 (embeddings) .. num_layers - 1 (last block) in the encoder and num_layers in the
    head: num_layers is 13 for 12 blocks. Layer i gets the rate lr * layer_decay ** (num_layers - i), the head
    lr * head_lr_mult. Every trainable parameter is in exactly one group, no frozen one in any; groups are in the order
    of their layers. Raises ValueError for an id out of range, layer_decay outside (0, 1] and head_lr_mult <= 0.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}; 1 is one rate for all layers")
    if head_lr_mult <= 0:
        raise ValueError(f"head_lr_mult must be above 0, got {head_lr_mult}")
    layers: dict[int, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = layer_id(name)
            if not 0 <= layer <= num_layers:
                raise ValueError(f"parameter {name} got layer {layer}, outside 0..{num_layers}, the id of the head")
            layers.setdefault(layer, []).append((name, parameter))
    groups = []
    for layer in sorted(layers):
        head = layer == num_layers
        rate = lr * (head_lr_mult if head else layer_decay ** (num_layers - layer))
        for group in split_decay(layers[layer], weight_decay, no_decay):
            groups.append({**group, "lr": rate, "name": f"{'head' if head else f'layer{layer}'}_{group['name']}"})
    return groups


def describe_parameters(model: nn.Module) -> str:
    """'1,234,567 parameters, 890 trained' for the log."""
    counts = {trained: sum(p.numel() for p in model.parameters() if p.requires_grad >= trained)
              for trained in (False, True)}
    return f"{counts[False]:,} parameters, {counts[True]:,} trained"


def freeze(module: nn.Module) -> nn.Module:
    """No gradient for any parameter, and eval mode. Returns the module.

    A later .train() of it or of its parent ends the eval mode: a frozen encoder has to override train() as well.
    """
    module.requires_grad_(False)
    return module.eval()


def unfreeze_last(blocks: nn.ModuleList, k: int | str, *extra: nn.Module) -> int:
    """Make the last k blocks ("all": every block) trainable, and with them, unless k is 0, the extra modules.

    An extra module is, say, the norm behind the blocks. Everything else stays as it is. Returns how many parameters
    (elements) are trainable in these modules. Raises ValueError unless k is "all" or in 0..len(blocks).
    """
    if k != "all" and (isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= len(blocks)):
        raise ValueError(f"the number of unfrozen blocks must be 'all' or 0..{len(blocks)}, got {k!r}")
    count = len(blocks) if k == "all" else k
    modules = [*blocks[len(blocks) - count:], *extra] if count else []
    parameters = {id(p): p for module in modules for p in module.parameters()}
    for module in modules:
        module.requires_grad_(True).train()
    return sum(p.numel() for p in parameters.values())
