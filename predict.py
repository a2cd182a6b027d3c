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
         OUT/NAME_overlay.png
--pca adds a picture of the encoder's features. This file knows no method.
"""

from __future__ import annotations

from pathlib import Path

from evaluate import load
from utils.checkpoint import check_writable
from utils.checks import check_choice, printable
from utils.cli import ArgumentParser, ended_within, run_main
from utils.device import AMP_DTYPES, amp_settings, pick_device, slow_dtype
from utils.log import progress


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    # data
    parser.add_argument("checkpoint", help="file written by a train_*.py of this folder")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="files, or folders of files; section.key=value changes the config")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    # results
    parser.add_argument("--labels", help="format of the label files: txt or npy (clouds npy, txt; "
                                         "images png, npy)")
    parser.add_argument("--picture", help="coloured result: ply, glb or none (clouds ply, none; "
                                          "images png, none)")
    parser.add_argument("--html", action="store_true", help="also a page to turn the result in")
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


def input_files(script, inputs, config) -> dict[Path, str]:
    """{file: name of its result}: files as given, folders as what the script can read in them
    (data.suffixes and data.recursive of the config choose, where there are such keys). ValueError
    where two would write the same result."""
    data = config.get("data", {})
    options = {key: data[key] for key in ("suffixes", "recursive") if key in data}
    names = {}
    for path in map(Path, inputs):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = script.list_inputs(path, **options) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: nothing in this folder can be read by "
                             f"{script.__name__}.py; name another")
        for file in found:
            below = file.parent.relative_to(path) if path.is_dir() and file != path else Path()
            name = str(below / result_name(file))
            if names.setdefault(name, file) != file:
                raise ValueError(f"{names[name]} and {file} would both write {name}.*; predict "
                                 f"them into two folders")
    return {file: name for name, file in names.items()}


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
    if args.pca and not formats.get("pca", True):
        raise ValueError("--pca: this network has no frozen encoder whose features could be "
                         "shown; leave it out")


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
    files = input_files(script, [text for text in args.inputs if text not in overrides],
                        model.config)
    if not files:
        raise ValueError("no input: name files or folders behind the checkpoint")
    output = Path(args.output)
    if any((output / name).resolve().parent == path.resolve().parent
           for path, name in files.items()):
        raise ValueError(f"--output {output} holds the input, whose files (or labels) could be "
                         f"replaced; use another folder")
    check_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    labels = {}
    tile = {} if args.tile is None else {"tile": args.tile}
    for path in progress(list(files), "predicting"):
        prediction = script.predict(model, path, amp_dtype, **tile)
        stem = output / files[path]
        stem.parent.mkdir(parents=True, exist_ok=True)
        script.write_prediction(model, path, prediction, stem, args)
        label = prediction["label"]
        for doubt in prediction.get("doubts", ()):
            print(f"WARNING: {printable(str(path))}: {doubt}", flush=True)
        if argv is not None:            # a caller wants them; a folder of photographs is gigabytes
            labels[str(path)] = label
        counts = {name: int((label == c).sum()) for c, name in enumerate(model.class_names)}
        found = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        print(f"{printable(str(path))}: {found} (mean confidence "
              f"{prediction['confidence'].mean():.2f})", flush=True)
    print(f"wrote {len(files)} {'result' if len(files) == 1 else 'results'} to {output}")
    return labels


if __name__ == "__main__":
    run_main(main)
