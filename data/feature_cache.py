"""Features of a frozen backbone for views that never change, computed once into one memory-mapped file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.images import SegmentationDataset
from utils.array_file import MODULUS, checksum, new_array, open_array, write_checks
from utils.files import remove_leftovers_once, replacing
from utils.log import progress
from utils.weights import sha256_file


class CachedTaps(Dataset):
    """A SegmentationDataset of fixed views ("windows") whose items carry the backbone's feature maps as well.

    embed maps images (B, 3, S, S) uint8 to the backbone's list of (B, C, h, w), any float type, which is what is
    stored: exactly what an epoch without the cache computes. key names what they depend on besides the files (the
    backbone's weights, taps, number format); with the contents of the files and the view it names the file in `folder`.
    Items: image, label and index as before, and taps, a list of (C, h, w). ValueError for a data set whose views change
    from epoch to epoch.
    """

    def __init__(self, dataset: SegmentationDataset, embed: Callable[[Tensor], Sequence[Tensor]], key: str,
                 folder: str | Path, batch_size: int = 1, num_workers: int = 0) -> None:
        if dataset.views != "windows":
            raise ValueError("cached features need views that never change: take --augment windows, or train without "
                             "--cache-features")
        self.dataset, self.files = dataset, dataset.files
        self.path = Path(folder) / f"features_{self._digest(key)}.npy"
        remove_leftovers_once(folder)
        self.was_stored = self._is_whole()
        if not self.was_stored:
            self._compute(embed, batch_size, num_workers)
        self._records = self._checks = None                 # opened in each loader process by itself

    def _digest(self, key: str) -> str:
        """Names the content: what was embedded, with what, in which layout."""
        paths = [path for pair in self.dataset.pairs for path in pair]
        with ThreadPoolExecutor() as pool:
            contents = list(pool.map(sha256_file, paths))
        text = "\n".join([key, f"{self.dataset.image_size} {len(self.dataset)} layout 2", *contents])
        return hashlib.sha256(text.encode() + self.dataset.table.tobytes()).hexdigest()[:32]     # table: of the labels

    def _is_whole(self) -> bool:
        found = open_array(self.path)                       # None: absent or cut short, computed again
        return found is not None and len(found[0]) == len(found[1]) == len(self.dataset)

    def _compute(self, embed, batch_size, num_workers) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        loader = DataLoader(self.dataset, batch_size, num_workers=num_workers)
        out = None
        checks: list[int] = []
        with replacing(self.path) as file:
            for batch in progress(loader, "embedding"):
                values = {f"tap{i}": as_stored(tap) for i, tap in enumerate(embed(batch["image"]))}
                values |= {"image": batch["image"].numpy(), "label": batch["label"].numpy().astype(np.int16)}
                if out is None:
                    fields = [(name, value.dtype, value.shape[1:]) for name, value in values.items()]
                    out = new_array(file, np.dtype(fields), (len(self.dataset),))
                first = len(checks)
                for name, value in values.items():
                    out[name][first:first + len(value)] = value
                checks += [entry_check(entry) for entry in zip(*values.values(), strict=True)]
            out.flush()
            write_checks(file, checks)

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None, "_checks": None}

    def __getitem__(self, item: int) -> dict:
        if self._records is None:
            self._records, self._checks = open_array(self.path)
        record = self._records[item]
        *taps, image, label = entry = [np.array(record[name]) for name in record.dtype.names]
        if entry_check(entry) != int(self._checks[item]):
            raise ValueError(f"{self.path}: entry {item} is damaged, its checksum differs; remove the file, and the "
                             f"next run computes it again")
        taps = [torch.from_numpy(tap) for tap in taps]
        return {"image": torch.from_numpy(image), "label": torch.from_numpy(label.astype(np.int64)), "index": item,
                "taps": [tap.view(torch.bfloat16) if tap.dtype == torch.int16 else tap for tap in taps]}


def entry_check(entry: Iterable[np.ndarray]) -> int:
    """The checksum of an entry's arrays together."""
    total = 0
    for array in entry:
        total = (31 * total + checksum(array)) % MODULUS
    return total


def as_stored(tap: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits are kept as int16."""
    tap = tap.detach().cpu().contiguous()
    return (tap.view(torch.int16) if tap.dtype == torch.bfloat16 else tap).numpy()
