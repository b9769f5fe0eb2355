"""Lottery tickets: small sub-networks that train as well as the whole, if they start where it did.

Frankle and Carbin, The lottery ticket hypothesis: finding sparse, trainable neural networks, ICLR
2019 (arXiv 1803.03635): train, remove the smallest weights, put the survivors back to their initial
values, repeat. Frankle, Dziugaite, Roy and Carbin, Linear mode connectivity and the lottery ticket
hypothesis, ICML 2020 (arXiv 1912.05671): put them back to an early iteration instead, from which
on training no longer depends on the order of the data.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import BoolTensor, Tensor, nn
from tqdm import tqdm

from pruning101 import magnitude
from pruning101.core import masks, runs, structure
from pruning101.core.data import Dataset
from pruning101.core.steps import History, Step, measured
from pruning101.core.trajectories import Instability as Instability  # all these are this topic's
from pruning101.core.trajectories import Run, train
from pruning101.core.trajectories import instability as instability
from pruning101.core.trajectories import interpolate as interpolate
from pruning101.pruning_at_initialisation import grasp as grasp
from pruning101.pruning_at_initialisation import prune_at_initialisation as prune_at_initialisation
from pruning101.pruning_at_initialisation import snip as snip
from pruning101.pruning_at_initialisation import synflow as synflow

Initialise = Callable[..., Any]  # (model, *, seed): draws the weights in place
Scope = Literal["layer", "global"]
Rate = float | Mapping[str, float]

# --- the search --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ticket(Step):
    """One round of :func:`find_ticket`; ``index`` 0 is the dense network, of which nothing went.

    ``model`` is trained to the end, and ``accuracy``, ``loss`` and ``test_accuracy`` are its own.
    ``ticket`` holds its masks over the weights of iteration ``rewind_to``: what it was trained from
    (but for round 0, which begins at iteration 0). ``density`` is the share of the weights (of
    convolutions and linear layers) still there, in [0, 1]; ``removed`` counts those that this round
    took. The curves are those of :class:`Run`, ``test_curve`` the accuracy on ``test``; iterations
    count from the beginning of round 0.
    """

    density: float = 1.0
    ticket: nn.Module | None = None
    iterations: tuple[int, ...] = ()
    valid_loss: tuple[float, ...] = ()
    valid_accuracy: tuple[float, ...] = ()
    test_curve: tuple[float, ...] = ()

    @property
    def run(self) -> Run:
        """The training that made ``model``, as :func:`train` returns it."""
        curves = self.iterations, self.valid_loss, self.valid_accuracy, self.test_curve
        return Run(cast(nn.Module, self.model), *curves)

    @property
    def early_stop(self) -> int:
        """The iteration of the least loss on ``valid``, the first if there are several."""
        return self.run.early_stop

    @property
    def accuracy_at_early_stop(self) -> float:
        """Accuracy on ``test`` at :attr:`early_stop`: reported, never decided on."""
        return self.run.accuracy_at_early_stop


def find_ticket(
    model: nn.Module,
    data: Dataset,
    *,
    rounds: int,
    rate: Rate = 0.2,
    output_rate: float | None = None,
    rewind_to: int = 0,
    scope: Scope = "layer",
    iterations: int,
    optimizer: str = "adam",
    lr: float = 1.2e-3,
    batch_size: int = 60,
    evaluate_every: int = 100,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    history: History | None = None,
    progress: bool = True,
) -> Iterator[Ticket]:
    """Search for a winning ticket by iterative magnitude pruning, yielding each round's network.

    ``model`` is the untrained network, and is left alone. Round 0 trains it as it is; every round
    after that removes the smallest of the weights trained last, puts the survivors (and biases,
    norms and their statistics) back to what they were at iteration ``rewind_to`` of round 0, and
    trains from there up to iteration ``iterations``. One-shot pruning is one round at a high rate.

    ``scope="layer"`` removes the share ``rate`` of what is left of each layer, or one share a layer
    by name (layers left out stay whole), and of the output layer ``output_rate``: by default half
    the rate, or what a mapping says of it. With ``"global"`` all survivors compete for one
    ``rate``; ``output_rate=0`` leaves the output layer out. The output layer is the last
    convolution or linear layer that a forward pass calls. Counts are exact: of n survivors
    ``round(rate * n)`` go.

    Each round draws its own order of the data, which follows from ``seed`` and its index, so that a
    ``history`` with rounds in it goes on to the same tickets as if never interrupted (only the new
    ones are yielded). More ``rounds`` may be asked for than it was begun with.

    Source: Frankle and Carbin 2019, section 2; rewinding: Frankle et al. 2020.

    Raises:
        ValueError: rates or counts out of range, unknown layers, or a history begun with another
            network or other settings.
    """
    whole = all(type(n) is int for n in (rounds, rewind_to, iterations))
    if not whole or rounds < 0 or not 0 <= rewind_to < iterations:
        raise ValueError(
            "rounds must be at least 0 and rewind_to an iteration before the last, all whole; got "
            f"rounds={rounds!r}, rewind_to={rewind_to!r}, iterations={iterations!r}"
        )
    rates = _rates(model, data, rate, output_rate, scope)
    settings: dict[str, Any] = {
        "iterations": iterations,
        "optimizer": optimizer,
        "lr": lr,
        "batch_size": batch_size,
        "evaluate_every": evaluate_every,
        "options": dict(options or {}),
    }
    history = History() if history is None else history
    history.bind(
        recipe="lottery_tickets.find_ticket",
        rates=rates,
        rewind_to=rewind_to,
        scope=scope,
        seed=seed,
        data=data.name,
        weights=runs.digest(model.state_dict().values()),
        **settings,
    )
    last = history.last
    if last is not None and (last.model is None or last.ticket is None):
        raise ValueError("the history's last round has no network to go on from; start a new one")

    def one_round(index: int, last: Ticket | None) -> Ticket:
        start = time.perf_counter()
        if last is None:
            first, removed, origin = 0, 0, masks.clone(model)
            ticket = origin
            if rewind_to:
                early = {"iterations": rewind_to, "evaluate_every": rewind_to}
                ticket = train(model, data, seed=seed, progress=progress, **settings | early).model
        else:
            kept = masks_after_round(cast(nn.Module, last.model), rates, scope=scope)
            # Under its masks a ticket still holds every weight of the iteration rewound to.
            first, ticket = rewind_to, masks.clone(cast(nn.Module, last.ticket))
            removed = _count(magnitude.survivors(ticket).values()) - _count(kept.values())
            masks.apply(ticket, kept)
            origin = ticket
        run = train(
            origin,
            data,
            seed=runs.derive(seed, index) if index else seed,
            progress=progress,
            **settings | {"iterations": iterations - first},
        )
        seconds = time.perf_counter() - start
        step = measured(index, removed, run.model, data, seconds=seconds)
        there = magnitude.survivors(ticket).values()
        return Ticket(
            **vars(step),
            density=_count(there) / sum(mask.numel() for mask in there),
            ticket=ticket,
            iterations=tuple(first + i for i in run.iterations),
            valid_loss=run.valid_loss,
            valid_accuracy=run.valid_accuracy,
            test_curve=run.test_accuracy,
        )

    def search() -> Iterator[Ticket]:
        hidden = not (progress and sys.stderr and sys.stderr.isatty())
        bar = tqdm(
            total=rounds + 1, initial=len(history), desc="rounds", leave=False, disable=hidden
        )
        with bar:
            for index in range(len(history), rounds + 1):
                found = one_round(index, history.last)
                history.append(found)
                bar.update()
                bar.set_postfix(density=f"{found.density:.1%}", valid=f"{found.accuracy:.1%}")
                yield found

    return search()


def masks_after_round(
    model: nn.Module, rates: Rate, *, scope: Scope = "layer"
) -> dict[str, BoolTensor]:
    """Return masks without the smallest of the weights that ``model`` still has.

    ``rates`` is the share to remove of n survivors, ``round(rate * n)`` exactly: for all layers, or
    one a layer by name (layers left out keep what they have). With ``scope="global"`` the layers
    with a rate compete, and must have the same one. What is gone stays gone. The model is left as
    it is.

    Raises:
        ValueError: a rate outside [0, 1], an unknown layer or scope, or different global rates.
    """
    shares = _checked_rates(rates, structure.prunable(model))
    kept = magnitude.survivors(model)
    # What is gone ranks below all that is left.
    ranked = {n: s.masked_fill(~kept[n], -math.inf) for n, s in magnitude.scores(model).items()}
    names = [f"{layer}.weight" for layer, share in shares.items() if share > 0]
    if scope == "global" and len({shares[n.removesuffix(".weight")] for n in names}) > 1:
        raise ValueError(
            'with scope="global" the layers compete for one rate, but several were given; '
            'give one number, or use scope="layer"'
        )
    result = dict(kept)
    for group in [names] if scope == "global" and names else [[name] for name in names]:
        total = sum(kept[name].numel() for name in group)
        alive = _count(kept[name] for name in group)
        gone = total - alive + round(shares[group[0].removesuffix(".weight")] * alive)
        result |= masks.from_scores({name: ranked[name] for name in group}, gone / total)
    return result


def _rates(
    model: nn.Module, data: Dataset, rate: Rate, output_rate: float | None, scope: Scope
) -> dict[str, float]:
    """Every layer's rate; the output layer's is half of a common one unless given."""
    layers = structure.prunable(model)
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", not {scope!r}')
    if scope == "global" and (isinstance(rate, Mapping) or output_rate not in (None, 0)):
        raise ValueError(
            'with scope="global" the layers compete for one rate: give a number for it, and '
            f"output_rate=0 or nothing; got rate={rate!r}, output_rate={output_rate!r}"
        )
    rates = _checked_rates(rate, layers)
    if output_rate is None and scope == "layer" and not isinstance(rate, Mapping):
        output_rate = rate / 2
    if output_rate is not None:
        rates[_output_layer(model, data)] = output_rate
    return _checked_rates(rates, layers)


def _checked_rates(rates: Rate, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    if not isinstance(rates, Mapping):
        rates = dict.fromkeys(layers, rates)
    if unknown := [name for name in rates if name not in layers]:
        raise ValueError(
            f"the model has no prunable layer {unknown[0]!r}; it has {', '.join(layers)}"
        )
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"rate must be a share in [0, 1]; {name!r} has {rate!r}")
    return {name: float(rates.get(name, 0.0)) for name in layers}


def _output_layer(model: nn.Module, data: Dataset) -> str:
    """The prunable layer that a forward pass calls last, which the order of definition may not."""
    called: list[str] = []
    work = masks.clone(model)
    for name, layer in structure.prunable(work).items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    images, _ = next(iter(data.batches("train", 1, device=runs.device_of(work))))
    with runs.mode(work, training=False), torch.no_grad():
        runs.trial("model", work, images.to(runs.dtype_of(work)))
    if not called:
        raise ValueError("the model calls no convolution or linear layer, so there is no ticket")
    return called[-1]


def _count(kept: Iterable[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in kept)


# --- controls: what is it about a ticket that wins? --------------------------------------------


def reset_parameters(model: nn.Module, *, seed: int) -> None:
    """Draw new weights in place: each module's own ``reset_parameters``, norms' statistics too.

    Raises:
        ValueError: a module has parameters of its own and no such method.
    """
    own = []
    for name, module in model.named_modules():
        method = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if method is not None:
            own.append(method)
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters but no "
                "reset_parameters; say how they are drawn with initialise="
            )
    with runs.seeded(seed, torch.device("cpu")):
        for method in own:
            method()


def gaussian_glorot(model: nn.Module, *, seed: int) -> None:
    """Draw new weights in place as the paper does: Gaussian, biases zero.

    The variance is ``2 / (fan_in + fan_out)`` (Glorot and Bengio 2010, equation 16) in
    convolutions and linear layers; all else is drawn by :func:`reset_parameters`.
    """
    reset_parameters(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in structure.prunable(model).values():
        nn.init.xavier_normal_(cast(Tensor, layer.weight), generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(cast(Tensor, layer.bias))


def random_reinitialisation(
    ticket: nn.Module | Ticket, *, seed: int, initialise: Initialise = reset_parameters
) -> nn.Module:
    """Return a copy with the same masks and new initial weights, biases and norms.

    ``initialise(model, seed=...)`` draws them in place, on the CPU and without masks, with a seed
    derived from ``seed``; give the one that the network began with, if it was not the modules' own.

    Source: Frankle and Carbin 2019, section 2.
    """
    work = _network(ticket)
    kept, device = masks.masks_of(work), runs.device_of(work)
    masks.make_permanent(work)
    # not with the seed itself: a network often began with the same one, and would come back
    initialise(work.cpu(), seed=runs.derive(seed))
    masks.apply(work.to(device), kept)
    return work


def random_ticket(ticket: nn.Module | Ticket, *, seed: int) -> nn.Module:
    """Return a copy that keeps as many weights of each layer, in random places.

    The weights there are those of the iteration rewound to, as in the ticket itself.
    """
    work = _network(ticket)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, BoolTensor] = {}
    for name, mask in masks.masks_of(work).items():
        scores = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
        drawn |= masks.from_scores({name: scores}, 1 - int(mask.sum()) / mask.numel())
    masks.apply(work, drawn)
    return work


def sign_ticket(ticket: nn.Module | Ticket) -> nn.Module:
    """Return a copy that keeps of each initial weight its sign alone.

    Every weight becomes plus or minus its layer's constant: the standard deviation (about the mean)
    of all the layer's weights at the iteration rewound to, those removed included. Masks, biases
    and norms stay.

    Source: Zhou, Lan, Liu and Yosinski, Deconstructing lottery tickets, NeurIPS 2019.
    """
    work = _network(ticket)
    with torch.no_grad():
        for layer in structure.prunable(work).values():
            weight = masks.original(layer, "weight")
            weight.copy_(weight.sign() * weight.std(correction=0))
    masks.refresh(work)
    return work


def _network(ticket: nn.Module | Ticket) -> nn.Module:
    network = ticket.ticket if isinstance(ticket, Ticket) else ticket
    if network is None:
        raise ValueError("this ticket holds no network; take one that find_ticket yielded")
    return masks.clone(network)
