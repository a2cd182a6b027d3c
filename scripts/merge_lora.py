"""A checkpoint of model.mode=lora as a plain weight file: its low-rank updates added to the encoder they belong to.

    python scripts/merge_lora.py exp/sonata/model/model_best.pth concerto_mine.pth
    python train_sonata.py CONFIG --pretrained_path concerto_mine.pth paths.head=concerto_mine.pth

The file is of the form of sonata.pth ({"config": ..., "state_dict": ...}) with the linear head beside the encoder. The
checkpoint does not hold the frozen encoder: the file of that run must be where it was, or --pretrained_path names it.
Features and predictions stay the same up to rounding. What is trained from weights keeps their licence.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_sonata  # noqa: E402
from models.lora import merge_lora  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="model_best.pth of a run with model.mode=lora")
    parser.add_argument("output", help="the file to write; it must not exist")
    parser.add_argument("--pretrained_path", help="the encoder of that run, where it has moved")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    """Write the merged file; returns {"merged": number of updates}."""
    args = parse_args(argv)
    output = Path(args.output)
    if output.exists():
        raise ValueError(f"{output} exists; remove it or choose another name")
    checkpoint = load_checkpoint(args.checkpoint, "train_sonata.py")
    if args.pretrained_path:
        checkpoint["config"]["paths"]["checkpoint_pretrain"] = args.pretrained_path
    model = train_sonata.load_model(checkpoint, torch.device("cpu"))
    merged = merge_lora(model.backbone.enc)
    if not merged:
        raise ValueError(f"{args.checkpoint}: model.mode={model.mode} has no low-rank updates; there is nothing to "
                         f"merge")
    state = {**model.backbone.state_dict(), **{f"seg_head.{name}": value for name, value in
                                               model.seg_head.state_dict().items()}}
    config = {**checkpoint["encoder"]["config"], "mask_token": False, "enc_mode": True}
    config = {key: value for key, value in config.items() if not key.startswith("dec_")}
    temporary = output.with_name(f".{output.name}.tmp")
    torch.save({"config": config, "state_dict": state}, temporary)
    os.replace(temporary, output)
    print(f"{output}: {len(state)} tensors, {merged} updates merged")
    return {"merged": merged}


if __name__ == "__main__":
    run_main(main)
