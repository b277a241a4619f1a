"""A task that needs memory: name the first token of a sequence, 32 to 40 tokens later.

Every token is one of eight symbols and carries a flag: "remember me" (the first), "say it" (the last)
or none. The convolutions of all blocks together reach fewer tokens back than the answer lies, and the
logits come from the last token, so that without its state paths the model can only guess.
"""

import pytest
import torch

from prism_models import ModalityConfig, PRISMConfig, PRISMForClassification

SYMBOLS, REMEMBER, SAY = 8, 8, 9
FEWEST, MOST = 32, 40
LAYERS, WIDTH = 4, 32


def draw(B):
    """x r[B,T,10], lengths i[B] and the symbols to recall i[B]; the answer lies 32 to 40 tokens back."""
    back = torch.randint(FEWEST, MOST + 1, (B,))
    symbols = torch.randint(SYMBOLS, (B, MOST + 1))
    x = torch.zeros(B, MOST + 1, SYMBOLS + 2)
    x.scatter_(2, symbols[..., None], 1.0)
    x[:, 0, REMEMBER] = 1.0
    x[torch.arange(B), back, SAY] = 1.0
    return x, back + 1, symbols[:, 0]


def trained(ablate, steps=200):
    torch.manual_seed(0)
    task = ModalityConfig("recall", SYMBOLS + 2, SYMBOLS)
    model = PRISMForClassification(
        PRISMConfig(WIDTH, 2, LAYERS, pool_type="last", modalities=[task], ablate=ablate)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, lengths, answer = draw(32)
        loss = model(x, "recall", answer, lengths=lengths).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    torch.manual_seed(99)
    x, lengths, answer = draw(1000)
    return (model(x, "recall", lengths=lengths).logits.argmax(-1) == answer).float().mean().item()


def test_convolutions_alone_cannot_reach():
    assert LAYERS * 3 < FEWEST


@pytest.mark.parametrize(("ablate", "least", "most"), [("none", 0.95, 1.0), ("state", 0.05, 0.2)])
def test_the_hybrid_recalls_and_the_control_guesses(ablate, least, most):
    assert least <= accuracy(trained(ablate)) <= most
