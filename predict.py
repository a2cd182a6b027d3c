"""Label new data with a checkpoint of any train_*.py: label files and coloured pictures.

    python predict.py exp/downstream/model/model_best.pth scan.obj houses/ --output exp/predictions
    python predict.py CHECKPOINT scan.ply --output OUT --labels npy --picture glb --html --pca

Every input file NAME.* gives its labels, in the numbers of the label files the network was trained
on, and a picture:
meshes   OUT/NAME.txt (or .npy), one label per face in the order of the file; OUT/NAME.ply, coloured
         by class (.glb for Blender and viewers); --html adds a page to turn the result in
clouds   OUT/NAME.npy (or .txt), one label per point in the order of the file; OUT/NAME.ply,
         coloured by class; of a .las or .laz also OUT/NAME.las, classified; --tile 50 for millions
         of points
images   OUT/NAME.png (or .npy), one class id per pixel at the photograph's own size;
         OUT/NAME_overlay.png; both .tif with the same transform and CRS for a georeferenced file
         (needs rasterio); --confidence adds OUT/NAME_confidence.png and .npy
--pca adds a picture of the encoder's features. A file that cannot be read has no result, and the
exit status is 2; the others have theirs. This file knows no method.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.rasters import library
from evaluate import load
from utils.checkpoint import check_writable
from utils.checks import check_choice, printable
from utils.cli import ArgumentParser, AtLeast, ended_within, run_main
from utils.device import AMP_DTYPES, amp_settings, pick_device, slow_dtype
from utils.log import progress
from utils.scratch import release

CHUNK = 1 << 22                     # labels counted at once
# Flags of other programs.
INSTEAD = {"--checkpoint": "name the checkpoint first, without a flag",
           "--images": "files and folders follow the checkpoint, without a flag",
           "--image-size": "leave it out: results have the photograph's own size, the checkpoint "
                           "says how it is shown to the network (evaluation.size=N changes that)"}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, instead=INSTEAD)
    # data
    parser.add_argument("checkpoint", help="file written by a train_*.py of this folder")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="files, or folders of files; section.key=value changes the config")
    parser.add_argument("--recursive", action="store_true",
                        help="also photographs in folders inside the folders; results keep them")
    parser.add_argument("--max-pixels", type=AtLeast(1), metavar="N",
                        help="photographs in folders of more are refused (default: 178956970 or "
                             "that of the config); one that is named is always read")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    # results
    parser.add_argument("--labels", help="format of the label files: txt or npy (clouds npy, txt; "
                                         "images auto, png, npy, tif)")
    parser.add_argument("--picture", help="coloured result: ply, glb or none (clouds ply, none; "
                                          "images auto, png, tif, none)")
    parser.add_argument("--html", action="store_true", help="also a page to turn the result in")
    parser.add_argument("--confidence", action="store_true",
                        help="photographs: also the probability of the chosen class per pixel, as "
                             "16-bit PNG (65535 is 1; .tif if georeferenced) and as .npy")
    parser.add_argument("--skip-existing", action="store_true",
                        help="leave inputs alone whose label file is in --output already")
    parser.add_argument("--pca", action="store_true", help="also the encoder's features as colours")
    parser.add_argument("--explain", nargs="+", metavar="X,Y", default=[], type=pixel,
                        help="prototype networks: why the pixel in column X, row Y has its class")
    parser.add_argument("--tile", type=float, metavar="METRES",
                        help="clouds too large for the memory: label them in squares of this side")
    # run
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--amp-dtype", choices=tuple(AMP_DTYPES),
                        help="default: bfloat16 on CUDA and, where the CPU computes in it, for "
                             "what was trained so; else float32")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def pixel(text: str) -> tuple[int, int]:
    """"120,45" -> (120, 45). ValueError, which argparse reports, for anything else."""
    column, row = text.split(",")
    return int(column), int(row)


def input_files(script, inputs, config, output: Path, recursive: bool) -> dict[Path, Path]:
    """{result without ending: input}. Inputs are files as given, and what the script can read in
    folders (data.suffixes and data.recursive of the config choose, where there are such keys).
    ValueError where two would write the same result."""
    data = config.get("data", {})
    options = {"suffixes": data["suffixes"]} if "suffixes" in data else {}
    recursive = recursive or data.get("recursive", False)
    results: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such file or folder")
        found = [given]
        if given.is_dir():
            nested = {"recursive": True} if script.RESULTS.get("recursive") else {}
            found = script.list_inputs(given, **options, **nested)
            found = [path for path in found if path.parent == given
                     or output.resolve() not in path.resolve().parents]
            inside = [path for path in found if nested and path.parent != given]
            found = [path for path in found if not nested or path.parent == given]
            found += inside if recursive else []
            if not found:
                raise ValueError(f"{given}: nothing in this folder can be read by "
                                 f"{script.__name__}.py; name another"
                                 f"{in_folders(inside) + ' --recursive' if inside else ''}")
            if inside and not recursive:
                print(f"{given}{in_folders(inside)} --recursive labels them too", flush=True)
        for path in found:
            folder = path.parent.relative_to(given) if given.is_dir() and path != given else Path()
            name = output / folder / result_name(path)
            if results.setdefault(name, path) != path:
                raise ValueError(f"{results[name]} and {path} would both write "
                                 f"{folder / result_name(path)}.*; predict them into two folders")
    return results


def in_folders(inside: list[Path]) -> str:
    return f": {len(inside)} more in {len({path.parent for path in inside})} folders inside;"


def result_name(path: Path) -> str:
    """A file's name without its suffix; the whole name of a folder (a scene), in which a dot is no
    suffix."""
    return path.name if path.is_dir() else path.stem


def check_results(args, formats: dict) -> None:
    """Choose the formats of the results, of those the script can write; ValueError for others."""
    for name in ("labels", "picture"):
        asked = getattr(args, name) or formats[name][0]
        setattr(args, name, check_choice(f"--{name}", asked, formats[name]))
    if args.html and not formats["html"]:
        raise ValueError("--html is a page to turn a mesh in; leave it out for this kind of data")
    if args.explain and not formats.get("explain"):
        raise ValueError("--explain needs a checkpoint of train_prototype.py; other networks have "
                         "no prototypes")
    if args.tile is not None and not (formats.get("tile") and 0 < args.tile < float("inf")):
        raise ValueError(f"--tile {args.tile:g}: the side of squares in metres, above 0, for point "
                         f"clouds alone")
    if args.pca and args.tile:
        raise ValueError("--pca shows the features of a whole cloud; leave it or --tile out")
    if args.confidence and not formats.get("confidence"):
        raise ValueError("--confidence is a picture of a photograph's probabilities; leave it out "
                         "for this kind of data")
    if args.recursive and not formats.get("recursive"):
        raise ValueError("--recursive finds photographs and meshes; name the folders of this kind "
                         "of data")
    if "tif" in (args.labels, args.picture) and library() is None:
        raise ValueError("tif is written through rasterio, which is not installed: pip install "
                         "rasterio, or choose png")
    if args.pca and not formats.get("pca", True):
        raise ValueError("--pca: this network has no frozen encoder whose features could be "
                         "shown; leave it out")


def is_done(stem: Path, asked: str) -> bool:
    """Whether the label file of a result is there, which is written last."""
    endings = ("png", "tif") if asked == "auto" else (asked,)
    return any(stem.with_name(f"{stem.name}.{ending}").is_file() for ending in endings)


def summary(prediction: Mapping, class_names: list[str]) -> str:
    """How many elements have which class, and the mean confidence."""
    label, confidence = prediction["label"], prediction["confidence"]
    counts = np.zeros(len(class_names), np.int64)
    total = 0.0
    for begin in range(0, label.size, CHUNK):
        part = label.reshape(-1)[begin:begin + CHUNK]
        counts += np.bincount(part[part >= 0], minlength=len(counts))
        total += float(confidence.reshape(-1)[begin:begin + CHUNK].sum(dtype=np.float64))
        release(label, confidence)
    found = ", ".join(f"{name} {count}" for name, count in zip(class_names, counts, strict=True)
                      if count)
    return f"{found} (mean confidence {total / max(label.size, 1):.2f})"


@ended_within(1.0)                      # seconds after Ctrl-C: there is nothing to save
def main(argv=None) -> dict:
    args = parse_args(argv)
    device = pick_device(args.device)
    overrides = [text for text in args.inputs if "=" in text and not Path(text).exists()]
    script, model, checkpoint = load(args.checkpoint, overrides, device)
    amp_dtype, _ = amp_settings(device, args.amp_dtype or "native", checkpoint)
    for line in slow_dtype(device, amp_dtype):
        print(line, flush=True)
    check_results(args, script.RESULTS)
    inputs = [text for text in args.inputs if text not in overrides]
    output = Path(args.output)
    results = input_files(script, inputs, model.config, output, args.recursive)
    if not results:
        raise ValueError("no input: name files or folders behind the checkpoint")
    if any(stem.parent.resolve() == path.resolve().parent for stem, path in results.items()):
        raise ValueError(f"--output {output} holds the input, whose files (or labels) could be "
                         f"replaced; use another folder")
    check_writable(output)
    waiting = [stem for stem in results if not (args.skip_existing and is_done(stem, args.labels))]
    if len(waiting) < len(results):
        print(f"{len(results) - len(waiting)} of {len(results)} have results already", flush=True)
    limit = args.max_pixels or getattr(model, "max_pixels", None)
    labels = {}
    broken = []
    tile = {} if args.tile is None else {"tile": args.tile}
    for stem in progress(waiting, "predicting"):
        path = results[stem]
        model.max_pixels = math.inf if path in map(Path, inputs) else limit
        stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            prediction = script.predict(model, path, amp_dtype, **tile)
        except (ValueError, OSError) as error:      # the others do not wait for a broken file
            if args.debug or len(waiting) == 1:
                raise
            broken.append(str(error))
            print(f"no result: {printable(str(error))}", flush=True)
            continue
        script.write_prediction(model, path, prediction, stem, args)
        for doubt in prediction.get("doubts", ()):
            print(f"WARNING: {printable(str(path))}: {doubt}", flush=True)
        print(f"{printable(str(path))}: {summary(prediction, model.class_names)}", flush=True)
        if argv is not None:            # a caller wants them; a folder of photographs is gigabytes
            labels[str(path)] = prediction["label"]
    count = len(waiting) - len(broken)
    print(f"wrote {count} {'result' if count == 1 else 'results'} to {output}")
    if broken:
        raise ValueError(f"{len(broken)} of {len(waiting)} files have no result, the first: "
                         f"{broken[0]}")
    return labels


if __name__ == "__main__":
    run_main(main)
