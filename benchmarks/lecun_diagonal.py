"""What LeCun's diagonal costs: against a forward and backward pass, and BackPACK's exact one.

    python benchmarks/lecun_diagonal.py

LeNet-5 (431,080 parameters) and 10,000 MNIST images in the same batches for all, taking turns in
one run. The yardstick is a bare loop: forward, cross-entropy, backward. Asked for is a ratio of at
most 3; the paper says "about one more backward pass". `DiagGGNExact` of BackPACK computes another
(exact Gauss-Newton) diagonal and is shown beside it where that package is installed. A network
with tanh for ReLU shows what carrying the gradient for f'' adds.
"""

import argparse

import common
import torch
from torch import nn
from torch.nn import functional as F

from pruning101 import optimal_brain_damage
from pruning101.core import data, models

LIMIT = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mnist = data.load("mnist").subset(train=options.images)
    batches = list(mnist.batches("train", options.batch_size, device=options.device))
    relu = models.build("lenet5", in_channels=1, image_size=28).to(options.device)
    tanh = with_tanh(relu)

    candidates = {
        "forward_backward": lambda: forward_backward(relu, batches),
        "lecun": lambda: wait(optimal_brain_damage.hessian_diagonal(relu, batches)),
        "forward_backward_tanh": lambda: forward_backward(tanh, batches),
        "lecun_tanh": lambda: wait(optimal_brain_damage.hessian_diagonal(tanh, batches)),
    }
    reason = None
    try:
        candidates["backpack_diag_ggn_exact"] = backpack_diagonal(relu, batches)
    except ImportError as error:
        reason = f"backpack-for-pytorch is not installed ({error})"
    times = common.interleaved(candidates, repeats=options.repeats)
    base, base_tanh = times["forward_backward"]["median"], times["forward_backward_tanh"]["median"]
    ratios = {
        "lecun": times["lecun"]["median"] / base,
        "lecun_tanh": times["lecun_tanh"]["median"] / base_tanh,
    }
    if reason is None:
        ratios["backpack_diag_ggn_exact"] = times["backpack_diag_ggn_exact"]["median"] / base
    common.write(
        "lecun_diagonal",
        {
            "what": "seconds for one pass over the images; ratios to forward and backward",
            "model": "lenet5",
            "parameters": sum(p.numel() for p in relu.parameters()),
            "images": len(mnist.train),
            "batch_size": options.batch_size,
            "device": options.device,
            "limit": LIMIT,
            "ratios": ratios,
            "backpack_absent": reason,
            "seconds": times,
        },
    )
    if ratios["lecun"] > LIMIT:
        raise SystemExit(
            f"The LeCun diagonal took more than {LIMIT} x a forward and backward pass."
        )


def forward_backward(model, batches):
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
    wait()


def backpack_diagonal(model, batches):
    """BackPACK's pass; imported here since it patches the modules that it is given."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    patched = extend(models.build("lenet5", in_channels=1, image_size=28).to(batches[0][0].device))
    patched.load_state_dict(model.state_dict())
    loss = extend(nn.CrossEntropyLoss())

    def run():
        total = [torch.zeros_like(p) for p in patched.parameters()]
        for images, labels in batches:
            patched.zero_grad()
            with backpack(DiagGGNExact()):
                loss(patched(images), labels).backward()
            for sum_, p in zip(total, patched.parameters(), strict=True):
                sum_ += p.diag_ggn_exact
        wait()

    return run


def with_tanh(model):
    layers = dict(model.named_children())
    return nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in layers.values()))


def wait(_=None):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
