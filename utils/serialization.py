"""Space-filling curves that put voxels into a sequence, and how attention cuts the sequence into patches.

Point Transformer V3 (Wu et al. 2024, arXiv 2312.10035, section 4) attends within runs of consecutive voxels along a
curve. Four curves: "z" (Morton order, x most significant), "hilbert" (Skilling, AIP Conf. Proc. 707, 381, 2004: the
transform of axes to a transposed index, `depth` bits per axis, x first), and both with x and y swapped ("-trans").
The Hilbert order depends on the depth, and the depth on the largest index of the whole batch: the features of a scene
change a little with its neighbours in a batch, as they do officially.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.checks import check_choice

ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
MAX_DEPTH = 16


def depth_of(largest_index: int) -> int:
    """Bits per axis for indices up to `largest_index`: those of largest_index + 1, as officially (255 needs 9).

    ValueError for indices that do not fit the official 16 bits (the largest is 65534) or are negative.
    """
    if not 0 <= largest_index < 2 ** MAX_DEPTH - 1:
        raise ValueError(f"grid_coord: the largest index is {largest_index}, expected 0..{2 ** MAX_DEPTH - 2}; is the "
                         f"scene in millimetres, or the grid too fine?")
    return (largest_index + 1).bit_length()


def grid_range(grid_coord: Tensor, num_scenes: int) -> int:
    """The largest index of grid_coord (N, 3). ValueError for no voxel, a negative index, and where indices and scenes
    together need codes of more than 63 bits (also from depth_of). Waits for the device once."""
    if not len(grid_coord):
        raise ValueError("grid_coord: no voxel")
    low, high = torch.stack(grid_coord.aminmax()).tolist()
    if low < 0:
        raise ValueError(f"grid_coord: the smallest index is {low}; subtract the minimum first")
    if 3 * depth_of(high) + (num_scenes - 1).bit_length() > 63:
        raise ValueError(f"grid_coord: {num_scenes} scenes with indices up to {high} need codes of more than 63 bits; "
                         f"use smaller batches or a coarser grid")
    return high


def encode(grid_coord: Tensor, scene: Tensor | None, order: str, depth: int) -> Tensor:
    """Position of each voxel along a curve.

    grid_coord (N, 3) integer in 0..2^depth - 1; scene (N,) integer >= 0, or None for one scene -> (N,) int64,
    scene << 3 depth | place on the curve. order: one of ORDERS, else ValueError. Indices are not checked here (see
    grid_range).
    """
    check_choice("order", order, ORDERS)
    x, y, z = grid_coord.to(torch.int32).unbind(1)
    if order.endswith("-trans"):
        x, y = y, x
    if order.startswith("hilbert"):
        x, y, z = _hilbert_axes(x, y, z, depth)
    code = _spread(x) << 2 | _spread(y) << 1 | _spread(z)
    return code if scene is None else scene.long() << 3 * depth | code


def _spread(value: Tensor) -> Tensor:
    """int of 16 bits -> int64 with two zeros in front of each bit."""
    value = value.long()
    for shift, mask in ((16, 0xFF0000FF), (8, 0xF00F00F00F), (4, 0xC30C30C30C3), (2, 0x249249249249)):
        value = (value | value << shift) & mask
    return value


def _hilbert_axes(x: Tensor, y: Tensor, z: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Skilling's AxestoTranspose: the three int32 words whose interleaved bits are the Hilbert index."""
    axes = [x.clone(), y.clone(), z.clone()]
    first = axes[0]
    for bit in range(depth - 1, 0, -1):                      # undo the excess work of the curve, from the top bit
        low = (1 << bit) - 1
        for i, axis in enumerate(axes):
            on = -(axis >> bit & 1)                          # -1 (all bits) where the bit is set, else 0
            if i == 0:
                first ^= on & low
                continue
            swap = (first ^ axis) & low & ~on
            first ^= swap | on & low
            axis ^= swap
    axes[1] ^= axes[0]                                       # Gray code
    axes[2] ^= axes[1]
    parity = axes[2] >> 1                                    # per bit, the parity of all higher bits of the last axis
    for shift in (1, 2, 4, 8):
        parity = parity ^ parity >> shift
    return axes[0] ^ parity, axes[1] ^ parity, axes[2] ^ parity


class Serialization(NamedTuple):
    """code (O, N), order (O, N): the voxels along each curve; inverse (O, N): the place of each voxel. All int64."""

    code: Tensor
    order: Tensor
    inverse: Tensor


def serialize(grid_coord: Tensor, scene: Tensor, orders: Sequence[str], depth: int) -> Serialization:
    """Put voxels into sequences, scene by scene; equal codes keep their order. Arguments and errors as in encode."""
    code = torch.stack([encode(grid_coord, scene, order, depth) for order in orders])
    order = code.argsort(dim=1, stable=True)
    return Serialization(code, order, invert(order))


def invert(permutation: Tensor) -> Tensor:
    """The inverse of permutations along the last dimension: (*, N) int64 -> (*, N) int64."""
    places = torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(-1, permutation, places)


class PatchLayout(NamedTuple):
    """How sequences are cut into patches, all scenes of a batch at once.

    slots (M,) int64: the place in the sequence that each slot reads, M >= N. unpad (N,) int64: the slot whose output
    belongs to each place. groups: (number of patches, length) of consecutive runs of slots.
    """

    slots: Tensor
    unpad: Tensor
    groups: list[tuple[int, int]]


def patch_layout(sizes: Sequence[int], patch_size: int, device: torch.device | str = "cpu") -> PatchLayout:
    """Cut the sequence of each scene (of `sizes` voxels, one after another) into patches of patch_size.

    The last patch of a longer scene is its last patch_size places: it borrows from the patch before, and a borrowed
    place keeps the output of its own patch. A scene of fewer voxels is one patch of its own length; such patches come
    last, those of equal length together. This is the official variable-length ("flash") path. No scene is empty.
    """
    whole, short = [], []                      # runs (first place, length, places at its end that are its own)
    start = 0
    for size in sizes:
        tail = size % patch_size
        if size >= patch_size:
            whole.append((start, size - tail, size - tail))
            if tail:
                whole.append((start + size - patch_size, patch_size, tail))
        elif size:
            short.append((start, size, size))
        start += size
    short.sort(key=lambda run: run[1])
    slots = torch.cat([torch.arange(first, first + length) for first, length, _ in whole + short])
    own = torch.cat([torch.arange(length) >= length - count for _, length, count in whole + short])
    unpad = torch.empty(start, dtype=torch.long)
    unpad[slots[own]] = own.nonzero().squeeze(1)
    groups = [(sum(length for _, length, _ in whole) // patch_size, patch_size)] if whole else []
    groups += [(count, length) for length, count in Counter(length for _, length, _ in short).items()]
    return PatchLayout(slots.to(device, non_blocking=True), unpad.to(device, non_blocking=True), groups)
