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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import BoolTensor, Tensor, nn
from tqdm import tqdm

from pruning101 import magnitude
from pruning101.core import masks, runs, structure
from pruning101.core.data import Dataset
from pruning101.core.steps import History, Step, measured
from pruning101.core.training import evaluate, fit

Initialise = Callable[..., Any]  # (model, *, seed): draws the weights in place
Scope = Literal["layer", "global"]
Rate = float | Mapping[str, float]

# --- one training, watched ---------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: ``model`` as trained, and what was measured on the way.

    ``valid_loss[i]`` and the accuracies (in [0, 1]) were measured after ``iterations[i]`` steps of
    the optimiser; 0 and the last step are among them.
    """

    model: nn.Module
    iterations: tuple[int, ...]
    valid_loss: tuple[float, ...]
    valid_accuracy: tuple[float, ...]
    test_accuracy: tuple[float, ...]

    @property
    def early_stop(self) -> int:
        """The iteration of the least loss on ``valid``, the first if there are several."""
        return self.iterations[_least(self.valid_loss)]

    @property
    def accuracy_at_early_stop(self) -> float:
        """Accuracy on ``test`` at :attr:`early_stop`: reported, never decided on."""
        return self.test_accuracy[_least(self.valid_loss)]


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=lambda i: values[i])


class _Enough(Exception):
    """Raised inside the last epoch, when all iterations are done."""


def train(
    model: nn.Module,
    data: Dataset,
    *,
    iterations: int,
    optimizer: str = "adam",
    lr: float = 1.2e-3,
    batch_size: int = 60,
    evaluate_every: int = 100,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train a copy of ``model`` for so many steps of the optimiser, measuring it on the way.

    Masked weights stay at zero. ``training.fit`` does the training, and ``options`` holds further
    arguments of it; the same ``seed`` gives the same order of the data, whatever ``iterations`` and
    ``evaluate_every`` are. The defaults are the paper's for LeNet-300-100.

    Raises:
        ValueError: iterations below 0, evaluate_every below 1, or what ``fit`` refuses.
    """
    for name, value, least in (
        ("iterations", iterations, 0),
        ("evaluate_every", evaluate_every, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")
    work = masks.clone(model)
    points: list[tuple[int, float, float, float]] = []
    done = 0

    def look() -> None:
        valid = evaluate(work, data, "valid")
        test = evaluate(work, data, "test")
        points.append((done, valid.loss, valid.accuracy, test.accuracy))

    def watch(_model: nn.Module) -> None:
        nonlocal done
        done += 1
        if done % evaluate_every == 0 or done == iterations:
            look()
        if done == iterations:
            raise _Enough

    look()
    if iterations:
        # fit counts epochs: give it one more than are full, and leave when the count is reached.
        epochs = math.ceil(iterations / max(1, len(data.train) // batch_size))
        try:
            fit(
                work,
                data,
                epochs=epochs,
                lr=lr,
                optimizer=optimizer,
                batch_size=batch_size,
                after_step=watch,
                seed=seed,
                **{"progress": progress, **(options or {})},
            )
        except _Enough:
            work.zero_grad()
    return Run(work, *cast(Any, zip(*points, strict=True)))


# --- the search --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ticket(Step):
    """One round of :func:`find_ticket`; ``index`` 0 is the dense network, of which nothing went.

    ``model`` is trained to the end, and ``accuracy``, ``loss`` and ``test_accuracy`` are its own.
    ``ticket`` is what it was trained from: its masks over the weights of iteration ``rewind_to``.
    ``density`` is the share of the weights (of convolutions and linear layers) still there, in
    [0, 1]; ``removed`` counts those that this round took. The curves are those of :class:`Run`,
    ``test_curve`` its accuracy on ``test``; with ``rewind_to`` they begin at that iteration.
    """

    density: float = 1.0
    ticket: nn.Module | None = None
    iterations: tuple[int, ...] = ()
    valid_loss: tuple[float, ...] = ()
    valid_accuracy: tuple[float, ...] = ()
    test_curve: tuple[float, ...] = ()

    @property
    def early_stop(self) -> int:
        """The iteration of the least loss on ``valid``, the first if there are several."""
        return self.iterations[_least(self.valid_loss)]

    @property
    def accuracy_at_early_stop(self) -> float:
        """Accuracy on ``test`` at :attr:`early_stop`: reported, never decided on."""
        return self.test_curve[_least(self.valid_loss)]


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

    Source: Frankle and Carbin 2019, section 2 and appendix G; rewinding: Frankle et al. 2020.

    Raises:
        ValueError: rates or counts out of range, unknown layers, or a history begun with another
            network or other settings.
    """
    if rounds < 0 or not 0 <= rewind_to < iterations:
        raise ValueError(
            "rounds must be at least 0 and rewind_to an iteration before the last; got "
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

    def one_round(index: int) -> Ticket:
        start = time.perf_counter()
        removed, first, settings_here = 0, 0, settings | {"progress": progress}
        last = history.last
        if last is None:
            origin = ticket = masks.clone(model)
            if rewind_to:
                early = settings_here | {"iterations": rewind_to, "evaluate_every": rewind_to}
                ticket = train(model, data, seed=seed, **early).model
        else:
            kept = masks_after_round(last.model, rates, scope=scope)
            removed = _kept(last.ticket) - _count(kept.values())
            # Under its masks a ticket still holds every weight of the iteration rewound to.
            origin = ticket = masks.clone(last.ticket)
            masks.apply(ticket, kept)
            first = rewind_to
            settings_here["iterations"] = iterations - first
        round_seed = runs.derive(seed, index) if index else seed
        run = train(origin, data, seed=round_seed, **settings_here)
        seconds = time.perf_counter() - start
        step = measured(index, removed, run.model, data, seconds=seconds)
        return Ticket(
            **vars(step),
            density=_kept(ticket) / _total(ticket),
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
                found = one_round(index)
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
    present = masks.masks_of(model)
    ranked: dict[str, Tensor] = {}
    kept: dict[str, BoolTensor] = {}
    for name, score in magnitude.scores(model).items():
        kept[name] = present.get(name, cast(BoolTensor, torch.ones_like(score, dtype=torch.bool)))
        ranked[name] = score.masked_fill(~kept[name], -math.inf)
    names = [name for name in ranked if shares[name.removesuffix(".weight")] > 0]
    if scope == "layer":
        groups = [[name] for name in names]
    elif scope == "global":
        groups = [names] if names else []
        if len({shares[name.removesuffix(".weight")] for name in names}) > 1:
            raise ValueError(
                'with scope="global" the layers compete for one rate, but several were given; '
                'give one number, or use scope="layer"'
            )
    else:
        raise ValueError(f'scope must be "layer" or "global", not {scope!r}')
    result = dict(kept)
    for group in groups:
        share = shares[group[0].removesuffix(".weight")]
        total = sum(ranked[name].numel() for name in group)
        alive = _count(kept[name] for name in group)
        gone = total - alive + round(share * alive)
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


def _kept(model: nn.Module) -> int:
    gone = sum(m.numel() - int(m.sum()) for n, m in masks.masks_of(model).items() if _is_weight(n))
    return _total(model) - gone


def _is_weight(name: str) -> bool:
    return name.endswith("weight")


def _total(model: nn.Module) -> int:
    return sum(cast(Tensor, layer.weight).numel() for layer in structure.prunable(model).values())


def _count(kept: Any) -> int:
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

    ``initialise(model, seed=seed)`` draws them in place, on the CPU and without masks; give the one
    that the network began with, if it was not the modules' own.

    Source: Frankle and Carbin 2019, section 2.
    """
    work = _network(ticket)
    kept, device = masks.masks_of(work), runs.device_of(work)
    masks.make_permanent(work)
    initialise(work.cpu(), seed=seed)
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

    Source: Zhou, Lan, Liu and Yosinski, Deconstructing lottery tickets, NeurIPS 2019, section 4.
    """
    work = _network(ticket)
    with torch.no_grad():
        for layer in structure.prunable(work).values():
            stored = layer._parameters.get("weight_orig")
            weight = cast(Tensor, layer.weight if stored is None else stored)
            weight.copy_(weight.sign() * weight.std(correction=0))
    masks.refresh(work)
    return work


def _network(ticket: nn.Module | Ticket) -> nn.Module:
    network = ticket.ticket if isinstance(ticket, Ticket) else ticket
    if network is None:
        raise ValueError("this ticket holds no network; take one that find_ticket yielded")
    return masks.clone(network)


# --- instability -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instability:
    """Error on the line between two trainings: ``errors[i]`` at ``alphas[i]``, shares in [0, 1]."""

    alphas: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def value(self) -> float:
        """The barrier: the highest error less the mean of the two ends' (0 where stable)."""
        return max(self.errors) - (self.errors[0] + self.errors[-1]) / 2


def interpolate(
    a: nn.Module,
    b: nn.Module,
    alphas: Sequence[float],
    data: Dataset,
    *,
    split: str = "test",
) -> list[float]:
    """Return the error (in [0, 1]) of ``alpha * a + (1 - alpha) * b`` for each alpha.

    Effective weights, biases and norms' weights are interpolated. The running statistics of batch
    norms belong to neither end: at every alpha, the ends included, they are measured anew on the
    first 100 batches of 128 train images (shuffled, always in the same order).

    Raises:
        ValueError: networks of different shapes.
    """
    work, *ends = (masks.clone(model) for model in (a, a, b))
    for model in (work, *ends):
        masks.make_permanent(model)
    first, second = (dict(model.named_parameters()) for model in ends)
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        raise ValueError("only networks of the same layers and shapes can be interpolated")
    errors = []
    for alpha in alphas:
        with torch.no_grad():
            for name, parameter in work.named_parameters():
                there = second[name].to(parameter.device)
                parameter.copy_(alpha * first[name] + (1 - alpha) * there)
        _measure_norms(work, data)
        errors.append(1 - evaluate(work, data, split).accuracy)
    return errors


def _measure_norms(model: nn.Module, data: Dataset) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    with runs.mode(model, training=False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
            norm.train()
        batches = data.batches("train", 128, shuffle=True, device=runs.device_of(model))
        for _, (images, _) in zip(range(100), batches, strict=False):
            model(images.to(runs.dtype_of(model)))


def instability(
    model: nn.Module,
    data: Dataset,
    *,
    rewind_to: int = 0,
    iterations: int,
    seeds: tuple[int, int] = (0, 1),
    points: int = 11,
    split: str = "test",
    optimizer: str = "adam",
    lr: float = 1.2e-3,
    batch_size: int = 60,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Instability:
    """Train twice from iteration ``rewind_to`` on, in two orders of the data, and interpolate.

    ``model`` (masked or not) is trained to ``rewind_to`` once, in the order of ``seed``; the two
    copies then go on to ``iterations`` and differ only in their order (and dropout or augmentation
    if there are any), which follows from ``seeds``. ``points`` alphas lie evenly from 0 to 1.

    Source: Frankle, Dziugaite, Roy and Carbin 2020, sections 2 and 3.

    Raises:
        ValueError: counts out of range, or two equal seeds.
    """
    if not 0 <= rewind_to < iterations or points < 3 or seeds[0] == seeds[1]:
        raise ValueError(
            "instability needs rewind_to < iterations, at least 3 points and two different seeds; "
            f"got rewind_to={rewind_to!r}, iterations={iterations!r}, points={points!r}, "
            f"seeds={seeds!r}"
        )
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": lr,
        "batch_size": batch_size,
        "evaluate_every": iterations,
        "options": options,
        "progress": progress,
    }
    if rewind_to:
        model = train(model, data, iterations=rewind_to, seed=seed, **settings).model
    a, b = (
        train(
            model,
            data,
            iterations=iterations - rewind_to,
            seed=runs.derive(seed, rewind_to, s),
            **settings,
        ).model
        for s in seeds
    )
    alphas = tuple(i / (points - 1) for i in range(points))
    return Instability(alphas, tuple(interpolate(a, b, alphas, data, split=split)))
