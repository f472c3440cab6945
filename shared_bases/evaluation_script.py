"""What eval_cifar10.py, eval_cifar100.py and eval_ilsvrc.py have in common."""

import argparse

import torch

from shared_bases import engine
from shared_bases.checkpoints import existing_path, load_network
from shared_bases.models import IMAGE_SIZES, build_model
from shared_bases.run import gpu_errors_explained
from shared_bases.training_script import (
    add_data_flags,
    add_model_flags,
    add_optimizer_flags,
    check_numbers,
    model_config,
)


def build_parser(dataset: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, dataset)
    parser.add_argument("--pretrained", metavar="FILE", help="checkpoint; without one, random weights are tested")
    if dataset == "ilsvrc":  # As in the original, whose README passes the same flags to both scripts.
        add_optimizer_flags(parser, dataset, note=", not used here")
    add_data_flags(parser.add_argument_group("added in this repository"), dataset, workers=8)
    return parser


def main(dataset: str, description: str, argv=None) -> tuple[float, float]:
    """Test one checkpoint; returns top-1 and top-5 accuracy in percent."""
    parser = build_parser(dataset, description)
    args = parser.parse_args(argv)
    args.dataset, args.image_size = dataset, getattr(args, "image_size", IMAGE_SIZES[dataset])
    config = model_config(parser, args)
    check_numbers(parser, args, {"batch_size": 1, "image-size": 32, "workers": 0})
    engine.show_devices(args.visible_device, args.device)
    with gpu_errors_explained(args.batch_size, "--batch_size"):
        return _test(args, config)


def _test(args, config):
    _, device = engine.join_world(args.device)
    channels_last = False
    if args.pretrained is None:
        print("note: no --pretrained: these are random weights")
        model = build_model(config)
    else:
        model, found = load_network(existing_path(args.pretrained), config)
        channels_last = found["channels_last"]
    model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    loader = engine.make_loader(args, False, device, channels_last=channels_last)
    _, top1, top5 = engine.evaluate(model, loader)
    print(f"Eval_Acc_top1 = {top1:.3f}\nEval_Acc_top5 = {top5:.3f}")
    print(f"Eval_Err_top1 = {100 - top1:.3f}\nEval_Err_top5 = {100 - top5:.3f}", flush=True)
    return top1, top5
