"""A training run's folders and what it goes on from: whose they are, what is in them, and whether data and numbers are
still those of the checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.checkpoint import RunFolder, check_folder, check_writable, load_checkpoint
from utils.config import override_config, save_config
from utils.device import describe, environment
from utils.distributed import is_main, world_size
from utils.files import RunLock, remove_leftovers
from utils.fingerprint import changes
from utils.log import set_aside


def claim_folder(folder: RunFolder, script: str, args: argparse.Namespace) -> RunLock:
    """The lock of a training run on its folders, for rank 0 (else, and with --test-only: on none). ValueError where a
    folder cannot be written, another run has it, or another script's or experiment's checkpoints are in it."""
    if args.test_only:
        return RunLock(script, ())
    check_writable(folder.model, folder.log, folder.config)
    experiment = None
    advice = "choose another --output-dir"
    if folder.model != folder.root / "model":               # where several runs may meet
        experiment = getattr(args, "experiment", None)
        advice = "choose another folder for checkpoints (--checkpoint-dir, or the setting of the config)"
    check_folder(folder.model, script, advice, experiment)
    folders = (folder.model, folder.log, folder.config) if is_main() else ()
    lock = RunLock(script, folders, folder.model / "model_last.pth" if is_main() else None)
    lock.messages += getattr(args, "notes", [])             # see command_line_wins
    return lock


def open_checkpoint(args: argparse.Namespace, path: Path | None, script: str, defaults: Mapping, folder: Path,
                    needed: str | None) -> dict | None:
    """The checkpoint to go on from, None where there is none; settings newer than the checkpoint get their defaults.
    needed: where there has to be one in `folder` or elsewhere, the beginning of the ValueError."""
    if path is None and needed:
        there = f"there is no checkpoint in {folder}; " if args.resume == "auto" else ""
        raise ValueError(f"{needed}: {there}add --resume PATH or --resume auto")
    if path is None:
        return None
    checkpoint = load_checkpoint(path, script)
    checkpoint["config"] = override_config(checkpoint["config"], defaults, []).to_dict()
    return checkpoint


def check_same_data(checkpoint: Mapping, data: Mapping[str, Mapping], data_changed: bool) -> list[str]:
    """Compare the data sets of a resumed run, {name: fingerprint}, with the checkpoint's; a line where they differ and
    --data-changed allows it, otherwise ValueError. Checkpoints of earlier versions know nothing of their data."""
    difference = changes(checkpoint.get("data", {}), data)
    if difference is None:
        return []
    if not data_changed:
        raise ValueError(f"the data are not those of the checkpoint: {difference}; resume with the same data, add "
                         f"--data-changed to go on with these, or start afresh in another --output-dir")
    return [f"WARNING: the data are not those of the checkpoint (--data-changed): {difference}"]


def restore_scaler(scaler: torch.amp.GradScaler, checkpoint: Mapping, amp_dtype: torch.dtype | None) -> list[str]:
    """Go on with the checkpoint's scale of losses in float16; a line where the number format has changed since."""
    stored = checkpoint["scaler"]                           # {} where the run was not in float16
    if stored:
        scaler.load_state_dict(stored)
    before = checkpoint.get("amp_dtype", "torch.float16" if stored else "another")
    now = str(amp_dtype or torch.float32)
    if before == now or (before == "another" and not scaler.is_enabled()):
        return []                                           # checkpoints of earlier versions know float16 alone
    before, now = (name.removeprefix("torch.") for name in (before, now))
    return [f"--amp-dtype is {now} now and was {before} before: going on in {now}"]


def write_run_files(folder: RunFolder, config: Mapping, device: torch.device, seed: int, resumed: bool) -> list[str]:
    """Make the run folder with config/config.yaml (resolved) and config/environment.json (versions, commit, device,
    seed). A run that starts afresh moves the checkpoints of an earlier one to model/previous_N, with a line; what
    killed runs left half written is removed."""
    folder.create()
    for path in (folder.model, folder.log, folder.config):
        remove_leftovers(path)
    for path in folder.model.glob("*.pth.tmp"):             # of earlier versions
        path.unlink()
    aside = None if resumed else set_aside(folder.model, "*.pth")
    save_config(config, folder.config / "config.yaml")
    (folder.config / "environment.json").write_text(json.dumps(
        {**environment(), "device": describe(device), "seed": seed, "processes": world_size()}, indent=2) + "\n")
    return [f"moved the checkpoints of an earlier run to {aside}; --resume auto would have gone on"] if aside else []
