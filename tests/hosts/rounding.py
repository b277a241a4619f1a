"""How far logits part, as a share of the largest: `python -m tests.hosts.rounding` prints the table."""

import torch

from prism_kernels.hosts.transformers import use_gated_delta_rule
from tests.hosts.test_transformers import MODELS, build


@torch.no_grad()
def parted(model, seed):
    """Ours from theirs, ours from our token-by-token reference, theirs from that."""
    torch.manual_seed(seed)
    ids = torch.randint(1, 64, (2, 70))
    theirs = model(ids).logits
    with use_gated_delta_rule(impl="torch"):
        ours = model(ids).logits
    with use_gated_delta_rule(impl="reference"):
        exact = model(ids).logits
    pairs = (ours, theirs), (ours, exact), (theirs, exact)
    return [(a - b).abs().max() / theirs.abs().max() for a, b in pairs]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| model | ours from theirs | ours from the reference | theirs from the reference |")
    print("| --- | ---: | ---: | ---: |")
    for name in MODELS:
        model = build(name)
        worst = torch.tensor([parted(model, seed) for seed in range(40)]).amax(0).tolist()
        print(f"| {name} | " + " | ".join(f"{x:.1e}" for x in worst) + " |")
