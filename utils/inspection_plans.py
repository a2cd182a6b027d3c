"""A config to start from, for each kind of data that inspect_data.py looks at: sizes by what was found, epochs by a few
training steps that are measured on the device.

This module stands above data/ and models/; only inspect_data.py imports it. A plan is the text of a YAML file with a
reason beside each value that was chosen. script: the train_*.py that it is for.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from data.label_map import label_map_of
from data.points import PointDataset, collate_points
from models.downstream import face_logits
from models.resnet import ENCODERS
from models.unet import UNet
from utils.config import Config, load_config
from utils.device import amp_settings, autocast, describe
from utils.inspection import UNEVEN, Inspection, plan_text, uneven
from utils.losses import IGNORE_INDEX, lovasz_softmax_loss
from utils.memory import free_memory
from utils.training import to_device

EPOCHS = 25, 1200               # least passes over the data and least steps, or a size is lowered
MOST_EPOCHS = 300
EVALUATE_EVERY = 5              # epochs
TRAINING_SHARE = 0.95           # of the minutes; the rest is reading and saving
OVERHEAD = 1.3                  # of meshes and clouds: an epoch with its items made and its evaluation, over its steps
SIZES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)        # of the photographs' short side
BYTES_PER_PIXEL = 2500          # of a U-Net in training, an upper bound
MEMORY = 4 << 30                # where the system does not say
MOST_FACES = 40_000             # of a DiffusionNet on whole meshes
MESH_STEPS, CLOUD_STEPS = 2200, 600     # what configs/mesh_humanbody_diffusion.yaml and sonata/tabletop-ft.yaml take
VOXEL, SMALL_VOXEL = 0.03, 0.015        # metres; below the latter the augmentation for rooms is too strong
MANY_POINTS = 40_000            # of a cloud: a voxel is 4 instead of 2 times the distance of neighbouring points
SMALL_ENCODER = {               # of configs/sonata/tabletop-ft.yaml
    "in_channels": 9, "order": ["z", "z-trans", "hilbert", "hilbert-trans"], "enc_depths": [1, 1, 1, 2, 1],
    "enc_channels": [32, 48, 64, 96, 128], "enc_num_head": [2, 3, 4, 6, 8], "enc_patch_size": [256] * 5,
    "dec_depths": [1, 1, 1, 1], "dec_channels": [32, 48, 64, 96], "dec_num_head": [2, 3, 4, 6],
    "dec_patch_size": [256] * 4, "drop_path": 0.1}


# -- all kinds ---------------------------------------------------------------------------------------------------------

def written_config(script: ModuleType, sections: dict, output: Path) -> Config:
    """The config of a plan as the script reads and checks it."""
    path = output / "plan.yaml"
    path.write_text(plan_text([], sections), encoding="utf-8")
    config = load_config(path, script.DEFAULTS)
    script.check_config(config)
    return config


def given(key: str, value, why: str) -> dict:
    return {key: (value, why)} if value else {}


def plan_head(found: Inspection, script: ModuleType, args, device: torch.device) -> list[str]:
    """The comment on top of a plan."""
    faults = found.number("fault")
    return [f"A plan for these data by inspect_data.py: {args.minutes:g} minutes on {describe(device)}. Start it with",
            f"  python {script.SCRIPT} {Path(args.output_dir) / 'plan.yaml'}",
            *([f"{faults} faults were found; most of them stop the training until they are fixed (report.html)."]
              if faults else [])]


def epochs_in(minutes: float, seconds: float) -> float:
    """How many epochs of so many seconds fit into the minutes."""
    return 60 * TRAINING_SHARE * minutes / seconds


def measured(step: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least seconds of a step; on a CPU those that its threads work, whatever else runs."""
    cpu = device.type == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    seconds = []
    for _ in range(repeats + 1):                            # the first warms up
        started = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - started)
    return min(seconds[1:]) / (torch.get_num_threads() if cpu else 1)


# -- images ------------------------------------------------------------------------------------------------------------

def plan_images(found: Inspection, script: ModuleType, args, device: torch.device, output: Path) -> str:
    """A config of train_segmentation.py: the largest size at which the network sees the data often
    enough in the minutes."""
    data = found.settings
    if "class_text" in data:
        data["classes"] = output / "classes.json"
        data["classes"].write_text(data["class_text"], encoding="utf-8")
    root = dataset_root(found.pairs, output)
    number, scored = found.files["train"], found.files.get("val", found.files["train"] // 10)
    backbone = "resnet34" if device.type == "cuda" else "resnet18"
    seconds = segmentation_seconds(backbone, data["num_classes"], device)
    memory = (free_memory(device) or MEMORY) / 2
    for share in SIZES:
        side = max(64, int(share * data["short_side"]) // 4 * 4)
        batch_size = int(np.clip(memory // (BYTES_PER_PIXEL * side ** 2), min(2, number), min(8, max(2, number // 4))))
        steps = max(1, number // batch_size)
        scoring = scored * seconds / 3 * data["megapixels"] * (side / data["short_side"]) ** 2
        epoch = seconds * batch_size * steps * side ** 2 / 1e6 + scoring / EVALUATE_EVERY
        epochs = int(np.clip(epochs_in(args.minutes, epoch), 1, MOST_EPOCHS))
        if epochs >= EPOCHS[0] and epochs * steps >= EPOCHS[1]:
            break
    ratio = uneven(found)
    return plan_text(plan_head(found, script, args, device), {
        "experiment_name": "planned",
        "dataset": {
            "root": str(root),
            "num_classes": (data["num_classes"], f"of {'the class file' if data['classes'] else 'the masks'}"),
            **given("classes", data["classes"] and str(data["classes"]), "names and colours"),
            **given("mask_suffix", data["mask_suffix"], "what masks' names have behind the images'"),
            **given("label_map", data["label_map"], "which number of the masks is which class"),
            **given("reduce_zero_label", data["reduce_zero_label"], "labels count from 1"),
            "ignore_label": (255, f"{100 * found.ignored['train']:.1f} % of the training pixels are unlabelled"),
            "image_size": (side, f"short side; of the photographs' {data['short_side']} the largest with "
                                 f"{EPOCHS[0]} epochs and {EPOCHS[1]} steps in the time")},
        "augmentations": {
            "horizontal_flip": (True, "false where left and right differ in meaning"),
            "color_jitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05},
            "random_crop": {"size": side},
            "scale_range": ([0.75, 1.75], "[1.0, 1.0] where the size of things is fixed")},
        "model": {"name": "unet",
                  "backbone": (backbone, "a GPU is there" if backbone == "resnet34" else "the smallest, for a CPU"),
                  "pretrained": (False, "true, and --pretrained_path FILE, is better: ImageNet weights")},
        "optimizer": {"name": "adamw", "lr": 1.5e-3, "weight_decay": 0.02},
        "scheduler": {"name": "onecycle", "pct_start": 0.15, "div_factor": 20.0, "final_div_factor": 200.0},
        "losses": {"ce": 1.0, "lovasz": (0.5, "of the score itself, mIoU"),
                   **given("class_weights", "sqrt_median_frequency" if ratio > UNEVEN else None,
                           f"the most frequent class has {ratio:.0f} times the pixels of the rarest")},
        "training": {
            "epochs": (epochs, f"{epochs * steps} steps, {epoch:.3g} s an epoch, measured: {args.minutes:g} minutes"),
            "batch_size": (batch_size, f"{memory / 2**29:.1f} GiB are free"),
            "num_workers": args.num_workers if device.type == "cuda" else 0,
            "amp": (True, "bfloat16 where the device computes in it"),
            "gradient_clip_val": 1.0, "ema": (0.995, "averaged weights"), "channels_last": True},
        "evaluation": {"interval": EVALUATE_EVERY if epochs >= 4 * EVALUATE_EVERY else 1},
        "logging": {"log_every_n_steps": 10}})


def linear_head_command(found: Inspection, args) -> str:
    """A command line of train_linear_head.py."""
    data = found.settings
    parts = ["python", "train_linear_head.py"]
    for name in ("image_paths", "mask_paths", "val_image_paths", "val_mask_paths", "test_image_paths",
                 "test_mask_paths", "mask_suffix"):
        values = getattr(args, name) if name != "mask_suffix" else data["mask_suffix"]
        if values:
            parts += [f"--{name.replace('_', '-')}", *values]
    parts += ["--num-classes", data["num_classes"], "--validate", "--image-size",
              max(64, min(512, data["short_side"] // 32 * 32))]
    for flag, value in (("--classes", data["classes"]), ("--label-map", data["label_map"]),
                        ("--class-weights", uneven(found) > UNEVEN and "sqrt_median_frequency")):
        parts += [flag, value] if value else []
    parts += ["--reduce-zero-label"] if data["reduce_zero_label"] else []
    parts += ["--backbone", "dinov3_vits16", "--backbone-weights", "FILE"]
    return " ".join(shlex.quote(str(part)) for part in parts).replace(" --", " \\\n    --") + "\n"


def dataset_root(pairs: dict, output: Path) -> Path:
    """The folder with images/SPLIT and masks/SPLIT: where the files lie so, else one of links in
    the output folder, with every tenth pair for val where there is no val."""
    if "val" not in pairs:
        train = pairs["train"]
        pairs = {**pairs, "train": [pair for i, pair in enumerate(train) if i % 10 != 9] if len(train) > 9
                 else train, "val": train[9::10] or train[-1:]}
    root = pairs["train"][0][0].parent.parent.parent
    folders = {(kind, split): [pair[place] for pair in listed] for split, listed in pairs.items()
               for place, kind in enumerate(("images", "masks"))}
    if all(file.parent == root / kind / split for (kind, split), files in folders.items()
           for file in files) and all(len(list((root / kind / split).iterdir())) == len(files)
                                      for (kind, split), files in folders.items()):
        return root
    for (kind, split), files in folders.items():
        folder = output / "data" / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        for old in filter(Path.is_symlink, list(folder.iterdir())):
            old.unlink()
        for file in files:
            (folder / file.name).symlink_to(file.resolve())
    return output / "data"


def segmentation_seconds(backbone: str, num_classes: int, device: torch.device) -> float:
    """Measured: a training step of the U-Net, of one megapixel."""
    order = torch.channels_last
    model = UNet(ENCODERS[backbone](), num_classes).to(device, memory_format=order)
    image = torch.rand(4, 3, 160, 160, device=device).to(memory_format=order)
    label = torch.randint(num_classes, (4, 160, 160), device=device)
    amp_dtype, _ = amp_settings(device, "native")

    def step():
        with autocast(device, amp_dtype):
            logits = model(image)
        loss = torch.nn.functional.cross_entropy(logits.float(), label)
        (loss + 0.5 * lovasz_softmax_loss(logits, label, class_dim=1)).backward()
    return measured(step, device) / (label.numel() / 1e6)


# -- meshes ------------------------------------------------------------------------------------------------------------

def plan_meshes(found: Inspection, script: ModuleType, args, device: torch.device, output: Path) -> str:
    """A config of train_downstream.py: DiffusionNet on connected surfaces, else clusters of faces."""
    data = found.settings
    faces = float(np.median(data["elements"]))
    surfaces = data["connected"] and faces < MOST_FACES
    ratio = uneven(found)
    share = found.counts["train"] / max(found.counts["train"].sum(), 1)
    listed = len(found.pairs["train"])
    mode = "z" if data["upright"] == 2 else "so3"
    if surfaces:
        model, training, augmentation = surface_settings(data, mode)
    else:
        model, training, augmentation = cluster_settings(data, faces, mode)
    val = {"val_split": ([0.15 if listed >= 7 else round(1 / listed, 3)], "every so many files; name patterns "
                         "(faust_08*) keep copies and poses of one thing together")}
    if args.val_mesh_dir or listed < 2:
        val = {}
    sections = {
        "paths": {"mesh_dir": args.mesh_dir, **given("label_dir", args.label_dir, "one file a mesh, of its name"),
                  **{f"{split}_{kind}_dir": value for split in ("val", "test") for kind in ("mesh", "label")
                     if (value := getattr(args, f"{split}_{kind}_dir"))},
                  **({"val_mesh_dir": (args.mesh_dir, "the only mesh: the score is of training")}
                     if listed < 2 and not args.val_mesh_dir else {})},
        "data": {**val, **label_settings(found),
                 **given("suffixes", data["suffixes"], "the same meshes are there in other formats too"),
                 **given("recursive", data["recursive"], "the meshes lie in folders")},
        "model": {"n_classes": (data["num_classes"], f"of the {'class file' if data['names'] else 'labels'}"), **model},
        "training": training,
        "optimizer": {"learning_rate": 1e-3 if surfaces else 2e-3},
        "scheduler": {"name": "cosine", "warmup_epochs": 0 if surfaces else 2},
        **({"class_weights": {"class_percentages": (
            np.sqrt(np.maximum(share, 1e-4)).round(3).tolist(), f"square roots of the shares of the faces: the most "
            f"frequent class has {ratio:.0f} times those of the rarest")}} if ratio > UNEVEN and not surfaces else {}),
        "augmentation": augmentation,
        "evaluation": {"monitor": "miou"},
        "checkpointing": {"save_interval": 20}}
    config = written_config(script, sections, output)
    seconds = mesh_seconds(script, config, found, device)
    crop = (config.training.clusters_per_batch or 0) * config.model.faces_per_cluster
    items = sum(max(1, int(count // crop)) if crop else 1 for count in data["elements"]) * (
        found.files["train"] / len(data["elements"]) * (1 if args.val_mesh_dir else 6 / 7))
    steps = max(1, int(items // config.training.batch_size))
    epochs = int(np.clip(epochs_in(args.minutes, OVERHEAD * seconds * steps), 1, -(-MESH_STEPS // steps)))
    training["epochs"] = (epochs, f"{epochs * steps} steps of {seconds:.2g} s, measured; {MESH_STEPS} are enough")
    return plan_text(plan_head(found, script, args, device), sections)


def surface_settings(data, mode: str) -> tuple[dict, dict, dict]:
    model = {"encoder": ("diffusion_net", "the surfaces are connected: the best without a pre-trained encoder"),
             "features": (["hks", "xyz"], "heat-kernel signatures, and coordinates"),
             "hks_scale": (0.1, "beside coordinates"), "embedding_dim": 128, "num_diffusion_blocks": 4,
             "encoder_dropout": 0.5, "head": "linear", **given("use_texture", data["textured"], "there are pictures")}
    training = {"epochs": 1, "batch_size": 1, "weight_decay": 0.0, "gradient_clip_val": 0.0, "use_ema": False}
    return model, training, {
        "mode": (mode, "the files have one up axis" if mode == "z" else "the files lie in different directions"),
        "size_range": ([0.77, 1.3], "shapes fill the unit ball differently"),
        "flip_probability": (0.5, "0.0 where left and right differ in meaning")}


def cluster_settings(data, faces: float, mode: str) -> tuple[dict, dict, dict]:
    features = ["centroid", "corners", "normal", "area", "angles", "curvature", "dihedral"]
    model = {"features": [*features, "ground"] if mode == "z" else features,
             **given("unit", round(data["size"] / 2, 2 - int(np.log10(data["size"]))) if data["one_unit"] else None,
                     "metres (or what the files have): sizes mean something here"),
             "embedding_dim": 48, "num_heads": 4, "num_attention_blocks": 3,
             "faces_per_cluster": (32 if faces < 50_000 else 256, f"of {faces:.0f} faces"),
             **given("use_texture", data["textured"], "there are pictures")}
    training = {"epochs": 1, "batch_size": 2, "ema_decay": 0.99,
                **given("clusters_per_batch", 32 if faces > 1024 else None, "crops, of which a mesh gives several")}
    return model, training, {
        "mode": (mode, "the files have one up axis" if mode == "z" else "the files lie in different directions"),
        "scale_range": [0.9, 1.1], "flip_probability": (0.5, "0.0 where left and right differ in meaning"),
        "recluster": True}


def label_settings(found: Inspection) -> dict:
    """What numbers mean, for meshes and clouds."""
    data = found.settings
    names = data["names"] or (found.class_names if data["classes"] else None)
    return {**given("class_names", names, ""),
            **given("label_map", data["label_map"], "which number is which class"),
            **given("label_offset", data.get("label_offset"), "labels count from 1"),
            "ignore_labels": (data["ignore_labels"], f"{100 * found.ignored['train']:.1f} % of the training "
                                                     f"{found.unit} are unlabelled"),
            **given("label_kind", data.get("label_kind"), "the label files have one a vertex, or edge"),
            **given("up", data.get("up"), "y is up in the files")}


def mesh_seconds(script: ModuleType, config: Config, found: Inspection, device: torch.device) -> float:
    """Measured: a step of the planned batch size on meshes of the middle size."""
    data = found.settings
    files, root, label_dir = script.split_files(config, "train")
    files = [file for file in files if file not in data["bad_files"]]
    files = sorted(files, key=lambda file: file.stat().st_size)
    files = files[len(files) // 2:][:config.training.batch_size]
    dataset = script.open_meshes(
        files, label_dir, script.mesh_spec(config), script.texture_samples(config), root=root,
        augmentation=script.build_augmentation(config), description="measuring",
        **script.label_options(config))
    model = script.build_model(config, "all").to(device)
    criterion = script.build_criterion(config).to(device)
    batch = to_device(dataset.collate_fn([dataset[i] for i in range(config.training.batch_size)]), device)

    def step():
        criterion(face_logits(model, batch), batch["label"], batch["mask"]).backward()
    return measured(step, device)


# -- clouds ------------------------------------------------------------------------------------------------------------

def plan_clouds(found: Inspection, script: ModuleType, args, device: torch.device, output: Path) -> str:
    """A config of train_sonata.py: a small network from scratch, at a voxel a little larger than the distance of
    neighbouring points, in a unit in which that is the 2 to 3 cm that the augmentation is made for."""
    data = found.settings
    multiple = 4 if np.median(data["elements"]) > MANY_POINTS else 2
    voxel = multiple * data["spacing"]
    unit = float(f"{VOXEL / voxel:.1g}") if voxel < SMALL_VOXEL else 1.0
    grid = float(f"{voxel * unit:.1g}")
    indoors = max(data["sides"]) * unit < 40
    features = ["coord", *data["has"], *([] if "normal" in data["has"] else ["normal"])]
    number = found.files["train"]
    batch_size = int(np.clip(number // 4, 1, 4))
    ratio = uneven(found)
    root = args.cloud_root
    has_val = "val" in found.pairs
    split = {"train": "train", "val": "val"} if has_val else write_split(found, Path(root), output)
    training = {"use_pretrained": (False, "true, model.mode: dec and --pretrained_path sonata.pth: its encoder"),
                "epochs": 8, "eval_epochs": 8, "batch_size": batch_size,
                **given("class_weights", "sqrt_median_frequency" if ratio > UNEVEN else None,
                        f"the most frequent class has {ratio:.0f} times the points of the rarest")}
    sections = {
        "data": {"root": root, **split, **({"test": "test"} if "test" in found.pairs else {}),
                 **label_settings(found),
                 "unit": (unit, "metres of one length unit of the files" if unit == 1 else
                          f"larger than life, so that a voxel is near {VOXEL} m, as in rooms"),
                 "grid_size": (grid, f"{multiple} times the distance of neighbouring points, {data['spacing']:.2g}, "
                                     f"after unit"),
                 "features": (features, "fields of the files can be added: intensity/1000"),
                 "missing_normal": ("estimate", f"files have {'normals' if 'normal' in data['has'] else 'none'}")},
        "model": {"mode": ("ft", "everything is trained"), "num_classes": data["num_classes"],
                  "encoder": {**SMALL_ENCODER, "in_channels": 3 * len(features)}},
        "training": training,
        "optimizer": {"lr": 0.004, "block_lr": 0.002, "weight_decay": 0.02},
        "augmentation": {"elastic": ([[0.2, 0.1]] if indoors else [], "mild" if indoors else "made for rooms"),
                         "mix_probability": 0.5 if indoors else 0.0},
        "evaluation": {"precise": False}}
    config = written_config(script, sections, output)
    seconds = cloud_seconds(script, config, found, device)
    steps = max(1, number // batch_size)
    epochs = epochs_in(args.minutes, OVERHEAD * seconds * steps)
    epochs = 8 * int(np.clip(epochs / 8, 1, -(-CLOUD_STEPS // (8 * steps))))
    training |= {"epochs": (epochs, f"{epochs * steps} steps of {seconds:.2g} s, measured"),
                 "eval_epochs": (8, "validations")}
    return plan_text(plan_head(found, script, args, device), sections)


def write_split(found: Inspection, root: Path, output: Path) -> dict:
    """Every seventh training cloud for validation, as two lists in the output folder."""
    files = [path.relative_to(root).as_posix() for path in found.pairs["train"]]
    val = files[6::7] or files[-1:]
    split = {}
    for name, listed in (("train", [file for file in files if file not in val] or files), ("val", val)):
        path = output / f"{name}.json"
        path.write_text(json.dumps(listed, indent=1), encoding="utf-8")
        split[name] = (str(path), "a list, every seventh cloud is in val" if name == "val" else "")
    return split


def cloud_seconds(script: ModuleType, config: Config, found: Inspection, device: torch.device) -> float:
    """Measured: a step of the planned batch size, by one of its clouds."""
    files = [path for path in found.pairs["train"] if path not in found.settings["bad_files"]]
    data = config.data
    dataset = PointDataset(
        files[:1], script.point_spec(config), config.model.num_classes,
        script.build_augmentation(config), data.label_field, data.ignore_labels,
        label_offset=data.label_offset or 0, label_map=label_map_of(data), description="measuring")
    model = script.build_model(config, config.model.encoder.to_dict()).to(device)
    batch = to_device(collate_points([dataset[0]]), device)

    def step():
        torch.nn.functional.cross_entropy(model(batch), batch["label"], ignore_index=IGNORE_INDEX).backward()
    return config.training.batch_size * measured(step, device, repeats=2)
