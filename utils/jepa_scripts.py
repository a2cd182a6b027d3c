"""What watches a run of train_jepa.py: monitors that see a collapse coming, and a probe that says what the encoder is
worth. This module stands above data/ and models/; only scripts import it. config: that of the script.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.mesh import MeshDataset, custom_collate_fn, each_face_once
from models.jepa import Jepa
from models.jepa_monitors import check_monitors, measure
from models.nomeformer import Nomeformer
from utils.config import Config
from utils.distributed import all_agree_max
from utils.probe import majority, probe, probe_table
from utils.run import Run
from utils.training import to_device


class Monitors:
    """Signs of a collapse on a fixed batch; see docs/jepa.md. start: the encoder as it was."""

    def __init__(self, config: Config, model: Jepa, start: Nomeformer, batch: dict,
                 seed: int) -> None:
        self.config = config
        self.measured = (model, start, batch, seed)
        self.untrained = measure(*self.measured)
        del self.untrained["teacher_follow"]            # 0 / 0: nothing has moved yet
        self.values: dict = {}

    def look(self, run: Run) -> list[str]:
        """Measure and log, where that is due; returns a line for each value beyond its bound."""
        bounds = self.config.monitor
        if not run.due(bounds.interval):
            return []
        self.values = measure(*self.measured)
        run.log.info(f"          {monitor_line(self.values)}")
        run.log.evaluation(run.epoch, run.step, "monitor", self.values)
        if run.epoch <= min(bounds.warmup_epochs, self.config.training.epochs / 5):
            return []
        return check_monitors(self.values, bounds, self.untrained)

    def stop_if(self, run: Run, beyond: list[str]) -> None:
        """FloatingPointError where values are beyond their bounds, unless monitor.stop=false."""
        for line in beyond:
            run.log.info(line)
        if all_agree_max(bool(beyond)) and self.config.monitor.stop:
            raise FloatingPointError(f"{beyond[0] if beyond else 'another process stopped'} (epoch "
                                     f"{run.epoch}). docs/jepa.md says what helps; "
                                     f"monitor.stop=false with --resume auto goes on regardless")


class Probe:
    """Scores encoders by a classifier on frozen embeddings, fitted on training and scored on validation meshes."""

    def __init__(self, config: Config, train: MeshDataset, val: MeshDataset) -> None:
        self.config = config
        self.train = train
        self.val = val
        self.baselines: dict[str, dict] = {}

    @torch.no_grad()
    def embed(self, dataset: MeshDataset,
              encoder: Nomeformer | None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (T, E) float32, or raw features, and labels (T,) of all labelled faces, a polygon one of them."""
        embeddings = []
        labels = []
        for batch in DataLoader(dataset, self.config.training.batch_size,
                                collate_fn=custom_collate_fn):
            x = batch["features"]                                   # (B, N, F, Dg)
            if encoder is not None:
                on_device = to_device(batch, next(encoder.parameters()).device)
                x = encoder(on_device["features"], on_device["mask"], on_device["centroid"]).cpu()
            x, label = each_face_once(x.float(), batch)
            embeddings.append(x[label >= 0].numpy())
            labels.append(label[label >= 0].numpy())
        return np.concatenate(embeddings), np.concatenate(labels)

    def score(self, encoder: Nomeformer | None) -> dict:
        train = self.embed(self.train, encoder)
        val = self.embed(self.val, encoder)
        return probe(train, val, self.config.model.n_classes, self.config.probe.method)

    def prepare(self, start: Nomeformer, device: torch.device) -> dict[str, dict]:
        """Score the baselines, once a run. Pre-training that does not beat all of them has not helped."""
        train, val = (labels_of_faces(dataset) for dataset in (self.train, self.val))
        self.baselines = {
            "random encoder": self.score(copy.deepcopy(start).to(device).eval()),
            "raw features": self.score(None),
            "majority class": majority(train, val, self.config.model.n_classes),
        }
        return self.baselines

    def report(self, scores: dict, epoch: int) -> str:
        fitted = f"{sum(self.train.num_polygons):,} faces of {len(self.train.files)} meshes"
        scored = f"{sum(self.val.num_polygons):,} of {len(self.val.files)} others"
        return (f"probe at epoch {epoch} ({self.config.probe.method}, fitted on {fitted}, scored on {scored})\n"
                f"{probe_table({'pre-trained': scores, **self.baselines})}")

    def log(self, run: Run, scores: dict) -> None:
        run.log.info(self.report(scores, run.epoch))
        run.log.evaluation(run.epoch, run.step, "probe", {**scores, **self.baselines})


def labels_of_faces(dataset: MeshDataset) -> np.ndarray:
    """The labels (T,) of all labelled faces of the files."""
    label = np.concatenate([label[dataset.faces_of_file(index)[0]] for index, label in enumerate(dataset.labels)])
    return label[label >= 0]


def monitor_line(values: dict) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
