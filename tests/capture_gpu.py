"""Recorded training steps on a real GPU, against the same steps as they are:  python tests/capture_gpu.py --out DIR

Each case of step_cases.py trains for two epochs both ways with deterministic algorithms, and weights, momentum and
statistics must be equal bit for bit; then, with PyTorch's defaults, both are timed. A line of capture.csv per case, at
once. Exit status 1 if a case differs or fails.
"""

import argparse
import csv
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts

import torch

from tests.step_cases import CASES, train

COLUMNS = ("paper", "case", "steps", "equal", "first_difference", "plain_ms", "graph_ms", "ratio", "gpu", "torch")
STEPS, TIMED_STEPS, BATCH = 20, 80, 128


def compare(case, device) -> str:
    """Name of the first tensor that differs, "" if both ways give the same bits."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        images = STEPS * BATCH // 2 + BATCH // 3  # two epochs, each with a shorter last batch
        plain, graph = (train(case, device, by_graph=way, images=images, batch=BATCH)[0] for way in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in plain:
        same = plain[name] == graph[name] if name == "results" else torch.equal(plain[name], graph[name])
        if not same:
            return name
    return ""


def timed(case, device) -> tuple[float, float]:
    """Milliseconds of a step, as it is and replayed."""
    torch.backends.cudnn.benchmark = True
    images = TIMED_STEPS * BATCH
    return tuple(
        1000 * train(case, device, by_graph=way, images=images, batch=BATCH, epochs=2)[1] / TIMED_STEPS
        for way in (False, True)
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu", help="folder of capture.csv (default: %(default)s)")
    parser.add_argument("--device", default="cuda:0")
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    on_gpu = torch.device(args.device).type == "cuda"
    gpu = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    bad = 0
    with open(Path(args.out) / "capture.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in CASES:
            row = {"paper": case.paper, "case": case.name, "steps": STEPS, "gpu": gpu, "torch": torch.__version__}
            try:
                row["first_difference"] = compare(case, args.device)
                row["equal"] = not row["first_difference"]
                plain, graph = timed(case, args.device)
                row |= {"plain_ms": f"{plain:.3f}", "graph_ms": f"{graph:.3f}", "ratio": f"{plain / graph:.2f}"}
            except Exception as error:  # the other cases still say something
                traceback.print_exc()
                row |= {"equal": False, "first_difference": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            bad += not row["equal"]
            writer.writerow(row)
            file.flush()
            print(",".join(str(row.get(name, "")) for name in COLUMNS), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
