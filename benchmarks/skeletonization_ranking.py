"""Which error ranks units better? Attention's order against that of true removal, over many nets.

    python benchmarks/skeletonization_ranking.py --nets 200

Small networks with one hidden layer learn Boolean tasks by gradient descent on the quadratic error,
as in Mozer and Smolensky (1988), until every output is within the criterion of its target. For each
network the attention derivative of the linear and of the quadratic error ranks the hidden units;
Spearman's correlation compares that order with the increase of the error when each unit is removed.
Both orders are compared with both increases, so that neither error is favoured as the judge.
Networks that do not reach the strictest criterion are left out everywhere, and counted.

The digits' networks (32 hidden units, 10 classes) are trained with stochastic gradient descent for
a fixed number of epochs, with either error; relevance is measured on train, as in the paper.
"""

import argparse
import itertools
from collections import OrderedDict
from typing import Any

import torch
from common import write
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from pruning101.core.data import load
from pruning101.core.training import evaluate, fit
from pruning101.skeletonization import relevance

CRITERIA = (0.4, 0.3, 0.2, 0.1, 0.05)
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
RATES = {"sigmoid": 0.1, "tanh": 0.05}  # the largest that most networks learn with
STEPS = 8000


def corners(n: int) -> Tensor:
    """All patterns of n bits, [2^n, n]."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def multiplexer(nets: int) -> tuple[Tensor, Tensor]:
    """Two address bits choose which of four data bits is the answer."""
    x = corners(6)
    address = (2 * x[:, 0] + x[:, 1]).long()
    return x, x[:, 2:].gather(1, address[:, None]).expand(nets, -1, -1)


def rule_plus_exception(nets: int) -> tuple[Tensor, Tensor]:
    """A and B (the rule), or none of A, B, C, D (the exception)."""
    x = corners(4)
    a, b, c, d = x.bool().T
    t = ((a & b) | ~(a | b | c | d)).float()
    return x, t[:, None].expand(nets, -1, -1)


def random_functions(nets: int) -> tuple[Tensor, Tensor]:
    """For every network another random function of five bits."""
    g = torch.Generator().manual_seed(1)
    return corners(5), (torch.rand(nets, 32, 1, generator=g) < 0.5).float()


TASKS = {
    "multiplexer": (multiplexer, 8),
    "rule plus exception": (rule_plus_exception, 6),
    "random functions": (random_functions, 10),
}


def train(x: Tensor, t: Tensor, hidden: int, activation: str, seed: int) -> dict[float, list[Any]]:
    """Train all networks at once; for each criterion, each one as it was when it got there."""
    nets, bound = len(t), 1.0 if activation == "sigmoid" else 0.5
    g = torch.Generator().manual_seed(seed)
    shapes = [(x.shape[1], hidden), (1, hidden), (hidden, t.shape[2]), (1, t.shape[2])]
    weights = [bound * (2 * torch.rand(nets, *s, generator=g) - 1) for s in shapes]
    speeds = [torch.zeros_like(w) for w in weights]
    f = torch.sigmoid if activation == "sigmoid" else torch.tanh
    reached: dict[float, list[Any]] = {c: [None] * nets for c in CRITERIA}
    for _ in range(STEPS):
        for w in weights:
            w.requires_grad_()
        w1, b1, w2, b2 = weights
        gap = torch.sigmoid(f(x @ w1 + b1) @ w2 + b2) - t  # [nets, patterns, outputs]
        worst = gap.detach().abs().flatten(1).amax(1)
        for criterion, found in reached.items():
            for i in (worst < criterion).nonzero().flatten().tolist():
                if found[i] is None:
                    found[i] = network([w[i].detach().clone() for w in weights], activation)
        if all(net is not None for net in reached[min(CRITERIA)]):
            break
        gradients = torch.autograd.grad(gap.square().sum(), weights)
        for w, speed, gradient in zip(weights, speeds, gradients, strict=True):
            w.requires_grad_(False)
            speed.mul_(0.9).sub_(RATES[activation] * gradient)
            w += speed
    return reached


def network(weights: list[Tensor], activation: str) -> nn.Module:
    w1, b1, w2, b2 = weights
    fc1, fc2 = nn.Linear(*w1.shape), nn.Linear(*w2.shape)
    with torch.no_grad():
        fc1.weight.copy_(w1.T)
        fc1.bias.copy_(b1[0])
        fc2.weight.copy_(w2.T)
        fc2.bias.copy_(b2[0])
    layers = OrderedDict(fc1=fc1, act1=ACTIVATIONS[activation](), fc2=fc2, out=nn.Sigmoid())
    return nn.Sequential(layers)


def correlations(model: nn.Module, batches: list) -> dict[str, float]:
    """Spearman's correlation of each attention with each removal, and the size of the estimates."""
    estimate = {e: relevance(model, "fc1", batches, loss=e) for e in ("linear", "quadratic")}
    true = {e: relevance(model, "fc1", batches, loss=e, method="removal") for e in estimate}
    found = {
        f"{ranked} judged by {judge}": float(spearmanr(estimate[ranked], true[judge]).statistic)
        for ranked in estimate
        for judge in true
    }
    for e in estimate:
        share = (estimate[e].abs().sum() / true[e].abs().sum()).item()
        found[f"{e} estimate / removal"] = share
    return found


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    spread: dict[str, dict[str, float]] = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        values = values[~values.isnan()]  # no order at all: all units of a dead network are equal
        low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        spread[name] = {
            "mean": round(values.mean().item(), 4),
            "std": round(values.std().item(), 4),
            "quartile_1": round(low.item(), 4),
            "median": round(middle.item(), 4),
            "quartile_3": round(high.item(), 4),
        }
    return spread


def boolean(nets: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for (task, (make, hidden)), activation in itertools.product(TASKS.items(), ACTIVATIONS):
        x, t = make(nets)
        reached = train(x, t, hidden, activation, seed)
        able = [i for i, net in enumerate(reached[min(CRITERIA)]) if net is not None]
        for criterion in CRITERIA:
            found = [
                correlations(reached[criterion][i], [(x, t[i])])
                for i in tqdm(able, desc=f"{task}, {activation}, {criterion}", leave=False)
            ]
            rows.append(
                {
                    "task": task,
                    "activation": activation,
                    "hidden": hidden,
                    "criterion": criterion,
                    "trained": nets,
                    "learnt": len(able),
                    **summary(found),
                }
            )
    return rows


def digits(seeds: int) -> list[dict[str, Any]]:
    data = load("digits")
    batches = list(data.batches("train", 2000))
    rows = []
    for activation, loss, epochs in itertools.product(
        (nn.Tanh, nn.ReLU), ("cross_entropy", "squared_error"), (5, 30)
    ):
        found = []
        for seed in tqdm(range(seeds), desc=f"digits, {activation.__name__}, {loss}", leave=False):
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                model = nn.Sequential(
                    OrderedDict(
                        flatten=nn.Flatten(),
                        fc1=nn.Linear(64, 32),
                        act1=activation(),
                        fc2=nn.Linear(32, 10),
                    )
                )
                if loss == "squared_error":  # of probabilities, so of a network that gives them
                    model.add_module("out", nn.Sigmoid())
            fit(model, data, epochs=epochs, lr=0.05, loss=loss, batch_size=32, seed=seed,
                progress=False)  # fmt: skip
            row = correlations(model, batches)
            true = relevance(model, "fc1", batches, method="removal")
            outgoing = model.fc2.weight.detach().norm(dim=0)
            row["valid accuracy"] = evaluate(model, data, "valid").accuracy
            row["outgoing norm judged by linear"] = float(spearmanr(outgoing, true).statistic)
            found.append(row)
        rows.append(
            {
                "task": "digits",
                "activation": activation.__name__.lower(),
                "training_loss": loss,
                "epochs": epochs,
                "seeds": seeds,
                **summary(found),
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10, help="networks for each row on digits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    payload = {
        "what": __doc__,
        "boolean": boolean(arguments.nets, arguments.seed),
        "digits": digits(arguments.seeds),
    }
    write("skeletonization_ranking", payload)
