#!/usr/bin/env python3
"""Validation folds of the table-top clouds that hold OBJECTS out, not clouds.

    python scripts/tabletop_folds.py datasets/tabletop datasets/tabletop_folds

writes fold0, fold1 and fold2, each with splits.json. The objects of the 37 training and validation clouds were told
apart by eye; each object is in one fold. In a fold's training clouds its objects are cut out (the table below stays
missing); clouds without any object left drop out. Its validation clouds are those that show its objects, without all
others: a cloud has boxes or round things, so that an object from training would tell what the others are. The test
clouds are not touched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import ArgumentParser, run_main  # noqa: E402

# The objects of a cloud by instance number. Boxes: orange cereal, red cereal, yellow and white puzzle, stripes, kids,
# teal, small green, tiny brown, flat white; round: tin, pan, bowl, cup, tube, dark.
OBJECTS = {
    "learn00": "stripes flat", "learn01": "stripes kids", "learn02": "orange red", "learn03": "orange red",
    "learn04": "orange red", "learn05": "teal brown", "learn06": "green red", "learn07": "red green",
    "learn08": "red green", "learn09": "green red", "learn10": "green red", "learn11": "orange green",
    "learn12": "orange red", "learn13": "orange green red", "learn14": "orange red green",
    "learn15": "green orange red", "learn16": "green orange red", "learn17": "yellow white",
    "learn18": "white yellow", "learn19": "yellow white", "learn20": "yellow orange", "learn21": "yellow red orange",
    "learn22": "yellow white red", "learn23": "yellow red orange", "learn24": "orange red yellow",
    "learn33": "tin pan bowl cup cup", "learn34": "tin pan bowl", "learn35": "pan tin bowl", "learn36": "tin bowl pan",
    "learn37": "tin bowl pan", "learn38": "cup cup tin pan", "learn39": "tin cup cup pan", "learn40": "tin cup pan",
    "learn41": "tin pan", "learn42": "tin cup", "learn43": "tube tin dark", "learn44": "tin tube cup",
}
FOLDS = (("red", "stripes", "flat", "pan", "tube"), ("orange", "kids", "green", "tin", "dark"),
         ("yellow", "white", "teal", "brown", "bowl", "cup"))


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the data as docs/clouds.md describes them")
    parser.add_argument("target", type=Path)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def hold_out(cloud: dict, objects: list[str], held: tuple[str, ...]) -> tuple[dict | None, dict | None]:
    """cloud {coord, color, segment, instance}, one row a point, instance -1 the table; objects: names by instance.
    -> (training cloud without the held objects, or None where no object is left; validation cloud without the other
    objects, or None where it shows no held object)."""
    of_held = np.isin(cloud["instance"], [i for i, name in enumerate(objects) if name in held])
    of_others = (cloud["instance"] >= 0) & ~of_held
    train = {name: values[~of_held] for name, values in cloud.items()} if of_others.any() else None
    val = {name: values[~of_others] for name, values in cloud.items()} if of_held.any() else None
    return train, val


def main(argv=None) -> dict:
    args = parse_args(argv)
    splits = json.loads((args.source / "splits.json").read_text())
    result = {}
    for index, held in enumerate(FOLDS):
        root = args.target / f"fold{index}"
        root.mkdir(parents=True, exist_ok=True)
        listed = {"train": [], "val": []}
        for name in sorted(splits["train"] + splits["val"]):
            with np.load(args.source / f"{name}.npz") as file:
                cloud = dict(file)
            for split, part in zip(listed, hold_out(cloud, OBJECTS[name].split(), held), strict=True):
                if part is not None:
                    np.savez_compressed(root / f"{split}_{name}.npz", **part)
                    listed[split].append(f"{split}_{name}")
        (root / "splits.json").write_text(json.dumps(listed, indent=1))
        (root / "classes.json").write_text((args.source / "classes.json").read_text())
        result[root.name] = {split: len(names) for split, names in listed.items()}
        print(f"{root}: {len(listed['train'])} training, {len(listed['val'])} validation clouds; held out: "
              f"{', '.join(held)}")
    return result


if __name__ == "__main__":
    run_main(main)
