"""Features of a frozen backbone for views that never change, computed once into one memory-mapped file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.images import SegmentationDataset
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
        self.was_stored = self._is_whole()
        if not self.was_stored:
            self._compute(embed, batch_size, num_workers)
        self._records = None                                # opened in each loader process by itself

    def _digest(self, key: str) -> str:
        """Names the content: what was embedded, with what, in which layout."""
        paths = [path for pair in self.dataset.pairs for path in pair]
        with ThreadPoolExecutor() as pool:
            contents = list(pool.map(sha256_file, paths))
        text = "\n".join([key, f"{self.dataset.image_size} {len(self.dataset)} layout 1", *contents])
        return hashlib.sha256(text.encode() + self.dataset.table.tobytes()).hexdigest()[:32]     # table: of the labels

    def _is_whole(self) -> bool:
        try:
            return len(np.load(self.path, mmap_mode="r")) == len(self.dataset)
        except (FileNotFoundError, ValueError, EOFError):
            return False                                    # absent or cut short: computed again

    def _compute(self, embed, batch_size, num_workers) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        loader = DataLoader(self.dataset, batch_size, num_workers=num_workers)
        out = None
        done = 0
        try:
            for batch in progress(loader, "embedding"):
                taps = [as_stored(tap) for tap in embed(batch["image"])]
                if out is None:
                    fields = [(f"tap{i}", tap.dtype, tap.shape[1:]) for i, tap in enumerate(taps)]
                    fields += [("image", np.uint8, batch["image"].shape[1:]),
                               ("label", np.int16, batch["label"].shape[1:])]
                    out = np.lib.format.open_memmap(temporary, "w+", np.dtype(fields), (len(self.dataset),))
                here = slice(done, done + len(taps[0]))
                for i, tap in enumerate(taps):
                    out[f"tap{i}"][here] = tap
                out["image"][here], out["label"][here] = batch["image"].numpy(), batch["label"].numpy()
                done = here.stop
            out.flush()
            os.replace(temporary, self.path)
        except BaseException:                               # Ctrl-C too: leave nothing half written
            temporary.unlink(missing_ok=True)
            raise

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None}

    def __getitem__(self, item: int) -> dict:
        if self._records is None:
            self._records = np.load(self.path, mmap_mode="r")
        record = self._records[item]
        taps = [torch.from_numpy(np.array(record[name])) for name in record.dtype.names if name.startswith("tap")]
        return {"image": torch.from_numpy(np.array(record["image"])),
                "label": torch.from_numpy(record["label"].astype(np.int64)), "index": item,
                "taps": [tap.view(torch.bfloat16) if tap.dtype == torch.int16 else tap for tap in taps]}


def as_stored(tap: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits are kept as int16."""
    tap = tap.detach().cpu().contiguous()
    return (tap.view(torch.int16) if tap.dtype == torch.bfloat16 else tap).numpy()
