"""Is a pre-trained mesh encoder worth loading? The same network frozen and trained, with its weights and without.

    python benchmarks/bench_pretraining.py configs/mesh_humanbody_frozen.yaml --pretrained_path ENCODER.pth
    python benchmarks/bench_pretraining.py CONFIG --pretrained_path FILE --labelled 16 --seeds 0 --split val
    python benchmarks/bench_pretraining.py CONFIG --pretrained_path FILE --picture features.png

Four rows: a head on the frozen encoder as it was initialised, on the frozen pre-trained one, the pre-trained encoder
fine-tuned with its head, and all of it from scratch. Inputs, head, augmentation, labelled meshes, batches and number of
steps are the same in all four; the seed draws the meshes, the start of the network and the augmentation. Printed are
mean and standard deviation over the seeds of accuracy and mIoU in %, and the seconds of a run. --picture draws
validation meshes instead: labels, and the first three principal components (over all of them) of random and
pre-trained features.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.mesh import custom_collate_fn  # noqa: E402
from models.downstream import (
    DownstreamClassifier,  # noqa: E402
    face_logits,  # noqa: E402
)
from train_downstream import (  # noqa: E402
    DEFAULTS,
    attach,
    build_dataset,
    build_model,
    check_config,
    class_names,
    evaluate,
    load_pretrained,
)
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.device import describe, pick_device  # noqa: E402
from utils.distributed import EpochBatchSampler  # noqa: E402
from utils.losses import MaskedCrossEntropyLoss  # noqa: E402
from utils.mesh_scripts import embed_mesh  # noqa: E402
from utils.render import label_colors, palette, pca_colors, render_mesh  # noqa: E402
from utils.schedule import build_scheduler  # noqa: E402
from utils.seed import seed_everything  # noqa: E402
from utils.training import to_device  # noqa: E402

ROWS = {"frozen random": (False, 0), "frozen pre-trained": (True, 0), "fine-tuned": (True, "all"),
        "from scratch": (False, "all")}                     # name: (pre-trained, trained layers of the encoder)


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="of train_downstream.py; its head and augmentation are used")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--pretrained_path", required=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--labelled", nargs="+", default=["16", "64", "all"], help="numbers of labelled meshes, or all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3, help="of heads, and of everything from scratch")
    parser.add_argument("--finetune-lr", type=float, default=1e-3, help="of a pre-trained encoder")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--views", type=int, default=4, help="turned copies of a mesh that a score averages")
    parser.add_argument("--picture", metavar="PNG", help="draw features of validation meshes, train nothing")
    parser.add_argument("--device")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def train(model: DownstreamClassifier, dataset, files: np.ndarray, args, seed: int, encoder_lr: float) -> None:
    """args.steps steps on the meshes dataset.files[files], cosine rate with a warm-up of a twentieth."""
    device = next(model.parameters()).device
    groups = [{"params": [p for p in model.head.parameters()], "lr": args.lr},
              {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": encoder_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.05)
    scheduler = build_scheduler(optimizer, "cosine", args.steps, max(1, args.steps // 20), 1e-6)
    criterion = MaskedCrossEntropyLoss()
    items = items_of(dataset, files)
    sampler = EpochBatchSampler(len(items), args.batch_size, seed, drop_last=True)
    model.train()
    for step in range(args.steps):
        if step % len(sampler) == 0:
            dataset.set_epoch(step // len(sampler))
            sampler.set_epoch(step // len(sampler))
            batches = iter(sampler)
        batch = to_device(custom_collate_fn([dataset[items[i]] for i in next(batches)]), device)
        loss = criterion(face_logits(model, batch), batch["label"], batch["mask"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)


def items_of(dataset, files) -> np.ndarray:
    """The items of the meshes dataset.files[files]: one each, or more where meshes are cut into crops."""
    return np.flatnonzero(np.isin([index for index, _, _ in dataset.items], files))


def untrained(config, dataset, files) -> DownstreamClassifier:
    """A network as it starts, with the mean and deviation of the features of dataset.files[files]."""
    model = build_model(config, 0)
    items = items_of(dataset, files[:64])
    chosen = torch.cat([sample["features"][sample["mask"]] for sample in (dataset[i] for i in items)])   # (faces, Dg)
    model.encoder.feature_mean[:], model.encoder.feature_std[:] = chosen.mean(0), chosen.std(0).clamp(min=1e-6)
    return model


def draw(config, args, held) -> None:
    """Rows: labels, random and pre-trained features of five validation meshes."""
    seed_everything(args.seeds[0])
    train_set = build_dataset(config, "train")
    random = untrained(config, train_set, np.arange(len(train_set.files)))
    trained = build_model(config, 0)
    load_pretrained(trained, args.pretrained_path, config)
    chosen = np.linspace(0, len(held.files) - 1, 5).round().astype(int)
    colors = [label_colors(np.concatenate([held.labels[i] for i in chosen]), palette(config.model.n_classes))]
    colors += [pca_colors(np.concatenate([embed_mesh(model, held.files[i]) for i in chosen]))
               for model in (attached(random, config), attached(trained, config))]
    bounds = np.cumsum([0] + [held.num_faces[i] for i in chosen])
    rows = [[render_mesh(held.mesh(i).vertices, held.mesh(i).faces, row[begin:end])
             for i, begin, end in zip(chosen, bounds[:-1], bounds[1:], strict=True)] for row in colors]
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(args.picture)
    print(f"labels, random features, pre-trained features: {args.picture}")


def attached(model, config) -> DownstreamClassifier:
    attach(model, config, class_names(config), palette(config.model.n_classes))
    return model.eval()


def main(argv=None) -> dict:
    args = parse_args(argv)
    for count in args.labelled:
        if count != "all" and not (count.isdecimal() and int(count)):
            raise ValueError(f"--labelled {count}: expected numbers of meshes above 0, or all")
    config = load_config(args.config, DEFAULTS, [*args.overrides, f"evaluation.views={args.views}"])
    check_config(config)
    device = pick_device(args.device)
    if args.picture:
        draw(config, args, build_dataset(config, "val"))
        return {}
    held = build_dataset(config, args.split)
    print(f"{describe(device)}; {args.steps} steps of {args.batch_size} meshes; scored on {len(held.files)} "
          f"{args.split} meshes, {args.views} views", flush=True)
    results = {}
    for labelled in args.labelled:
        for name in args.rows:
            pretrained, layers = ROWS[name]
            scores, seconds = [], []
            for seed in args.seeds:
                seed_everything(seed)
                dataset = build_dataset(config, "train", seed)
                count = len(dataset.files) if labelled == "all" else int(labelled)
                files = np.random.default_rng(seed).permutation(len(dataset.files))[:count]
                model = untrained(config, dataset, files)
                if pretrained:
                    load_pretrained(model, args.pretrained_path, config)
                model.encoder.requires_grad_(layers == "all")
                model = model.to(device)
                started = time.perf_counter()
                train(model, dataset, files, args, seed, args.finetune_lr if pretrained else args.lr)
                seconds.append(time.perf_counter() - started)
                result = evaluate(attached(model, config), held, device)
                scores.append([100 * result["metrics"][key] for key in ("overall_accuracy", "miou")]
                              + [100 * result["tables"]["by area"][key] for key in ("overall_accuracy", "miou")])
            results[labelled, name] = scores
            mean, std = np.mean(scores, 0), np.std(scores, 0)
            print(f"{labelled:>4} labelled, {name:<18}: accuracy {mean[0]:5.1f} +- {std[0]:.1f}, mIoU {mean[1]:5.1f} "
                  f"+- {std[1]:.1f}; by area {mean[2]:5.1f}, {mean[3]:5.1f}; {np.mean(seconds):.0f} s a run",
                  flush=True)
    return results


if __name__ == "__main__":
    run_main(main)
