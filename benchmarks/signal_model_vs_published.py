"""Time a training step of the default hybrid against the published code of the same architecture.

    git clone https://github.com/kaelvalen/engram && git -C engram checkout 51137d0
    python -m benchmarks.signal_model_vs_published --published engram

Forward and backward, optimiser excluded, fp32, both models in one process and in alternation; medians.
The published package is called `prism`; only its public classes are used.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from prism_models import ModalityConfig, PRISMConfig, PRISMForClassification

# Name, batch, tokens, features, classes, and the speed-up asked of us.
CASES = (("image", 16, 64, 48, 10, 2.5), ("ecg", 4, 1000, 12, 5, 3.0))


def main() -> int:
    """Run the comparison; 0 if every case is as fast as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, help="checkout of the published code")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    theirs, ours = published_model(args.published), our_model()
    rows = [compare(case, theirs, ours, args.repeats) for case in CASES]
    print(f"{'case':<8}{'shape':<16}{'published, s':>14}{'ours, s':>10}{'ratio':>8}{'asked':>7}")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        times = f"{row['published_s']:>14.3f}{row['ours_s']:>10.3f}"
        print(f"{row['case']:<8}{shape:<16}{times}{row['ratio']:>8.2f}{row['asked']:>7.1f}")
    if args.out:
        command = f"python -m benchmarks.signal_model_vs_published --published PATH --repeats {args.repeats}"
        report = {
            "kind": "published",
            "command": command,
            "machine": machine(args.threads),
            "parameters": sizes(theirs, ours),
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ratio"] >= row["asked"] for row in rows) else 1


def published_model(checkout: Path) -> nn.Module:
    """The published model with its default configuration."""
    if not (checkout / "prism" / "model.py").is_file():
        raise SystemExit(
            f"expected a checkout of the published code, got {checkout}: no prism/model.py in it"
        )
    sys.path.insert(0, str(checkout))
    from prism.config import ModalityConfig as Modality
    from prism.config import PRISMConfig as Config
    from prism.model import PRISMForClassification as Model

    torch.manual_seed(0)
    return Model(Config(modalities=[Modality(name, width, k) for name, _, _, width, k, _ in CASES]))


def our_model() -> nn.Module:
    """Ours with its default configuration."""
    torch.manual_seed(0)
    return PRISMForClassification(
        PRISMConfig(modalities=[ModalityConfig(name, width, k) for name, _, _, width, k, _ in CASES])
    )


def compare(case: tuple, theirs: nn.Module, ours: nn.Module, repeats: int) -> dict:
    """Medians over alternating steps, after one warm-up step of each."""
    name, B, T, width, classes, asked = case
    x, labels = torch.randn(B, T, width), torch.randint(classes, (B,))
    models = {"published": theirs, "ours": ours}
    times: dict[str, list[float]] = {key: [] for key in models}
    for repeat in range(repeats + 1):
        for key, model in models.items():
            seconds = timed(model, x, name, labels)
            model.zero_grad(set_to_none=True)
            if repeat:
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "case": name,
        "shape": [B, T, width],
        "published_s": medians["published"],
        "ours_s": medians["ours"],
        "ratio": medians["published"] / medians["ours"],
        "asked": asked,
        "all_s": times,
    }


def timed(model: nn.Module, x: Tensor, name: str, labels: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    model(x, name, labels=labels)["loss"].backward()
    return time.perf_counter() - start


def sizes(theirs: nn.Module, ours: nn.Module) -> dict[str, int]:
    """Parameters of both."""
    return {
        "published": sum(p.numel() for p in theirs.parameters()),
        "ours": sum(p.numel() for p in ours.parameters()),
    }


def machine(threads: int) -> dict:
    """Where the figures come from."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
