"""LayerCollapse: train the activation between two linear layers to be linear, then merge the two.

Zibakhsh Shabgahi, Shariff and Koushanfar, LayerCollapse: Adaptive compression of neural networks,
2023 (arXiv 2311.17943). The activation of a multi-layer perceptron becomes a slope a for negative
inputs; a penalty (1 - a)^2 draws it to 1, where W2 (W1 x + b1) + b2 is one linear layer.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pruning101.core import masks, runs, surgery
from pruning101.core.collapsed_counts import CollapsedCounts as CollapsedCounts  # this topic's, too
from pruning101.core.collapsed_counts import collapsed_counts as collapsed_counts
from pruning101.core.collapsing import CollapsedPair as CollapsedPair
from pruning101.core.collapsing import CollapseReport as CollapseReport
from pruning101.core.collapsing import collapse as collapse
from pruning101.core.collapsing import nonlinear_norm, obstacle, widths
from pruning101.core.data import Dataset
from pruning101.core.linear_pairs import LinearPair, as_linear, linear_pairs, weight_of
from pruning101.core.slopes import Slope, separate_activations, slope_parameters, slopes
from pruning101.core.steps import History, Step, measured
from pruning101.core.surgery import put
from pruning101.core.tracing import Example
from pruning101.core.training import evaluate, fit

# --- what a collapse gains, and what it costs --------------------------------------------------


def gain(n_in: int, n_hidden: int, n_out: int) -> float:
    """Return the share of weights saved when n_in -> n_hidden -> n_out becomes one layer (eq. 7).

    ``1 - n_in n_out / (n_hidden (n_in + n_out))``, biases left out: 0.875 for 768-3072-768, and
    -3.0 for the bottleneck 512-64-512, which four times as many weights would replace.

    Raises:
        ValueError: a width that is not positive.
    """
    _check_positive(n_in=n_in, n_hidden=n_hidden, n_out=n_out)
    return 1 - n_in * n_out / (n_hidden * (n_in + n_out))


def conv_gain(c_in: int, c_hidden: int, c_out: int, k1: int, k2: int) -> float:
    """Return the share of weights saved when two convolutions become one with a larger kernel.

    ``1 - (k1 + k2 - 1)^2 c_in c_out / (k1^2 c_in c_hidden + k2^2 c_hidden c_out)`` for square
    kernels k1 and k2 and no groups: -0.389 for 64-64-64 with 3x3 kernels, 0.826 for 64-512-64. The
    paper's eq. 8 prints the fraction upside down.

    Raises:
        ValueError: a count or kernel size that is not positive.
    """
    _check_positive(c_in=c_in, c_hidden=c_hidden, c_out=c_out, k1=k1, k2=k2)
    before = k1**2 * c_in * c_hidden + k2**2 * c_hidden * c_out
    return 1 - (k1 + k2 - 1) ** 2 * c_in * c_out / before


def error_bound(
    first: nn.Module, second: nn.Module, inputs: Tensor, slope: float | Tensor
) -> Tensor:
    """Bound the squared error that setting the slope between two linear layers to 1 makes.

    ``inputs`` is [..., n_in], the result [...]: for each input x,
    ``sigma_max(W2)^2 |min(0, W1 x + b1)|^2 (1 - slope)^2``, since the two outputs differ by
    W2 (1 - slope) min(0, W1 x + b1). Equal to the error where W2 has orthonormal columns.
    """
    stretch = torch.linalg.matrix_norm(weight_of(second), 2)
    negative = as_linear(first)(inputs).clamp(max=0)  # [..., n_hidden]
    return stretch.square() * negative.square().sum(-1) * (1 - slope) ** 2


def printed_error_bound(
    first: nn.Module, second: nn.Module, inputs: Tensor, slope: float | Tensor
) -> Tensor:
    """Return what the paper prints as a bound (eqs. 4 and 5) and is none.

    ``(sigma_max(W2 W1)^2 |x|^2 + |W2 b1|^2) (1 - slope)^2`` for each input x. Its proof takes one
    indicator for all hidden units (eq. 14) and |a + b|^2 <= |a|^2 + |b|^2 (eq. 16). Shapes as in
    :func:`error_bound`.
    """
    product = weight_of(second) @ weight_of(first)
    constant = torch.linalg.matrix_norm(product, 2).square() * inputs.square().sum(-1)
    if first.bias is not None:
        constant = constant + (weight_of(second) @ cast(Tensor, first.bias)).square().sum()
    return constant * (1 - slope) ** 2


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


# --- slopes in place of activations ------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two linear layers with an activation between them, by name.

    ``slope`` is None while the activation is not a :class:`~pruning101.core.slopes.Slope`; ``gain``
    is eq. 7; ``obstacle`` says why the two could not be merged even at slope 1, or nothing.
    """

    first: str
    activation: str
    second: str
    slope: float | None
    gain: float
    obstacle: str


def pairs(model: nn.Module, example: Example | None = None) -> list[Pair]:
    """Return all pairs of linear layers of ``model`` with an activation between, as they follow.

    Norms and dropout between them are part of a pair. They are found by running ``example``, or
    without one by following ``forward`` symbolically (:mod:`pruning101.core.linear_pairs`), never
    by name. The model stays as it was.
    """
    found = slopes(model)
    return [
        Pair(
            pair.first,
            pair.activation,
            pair.second,
            found.get(pair.activation),
            gain(*widths(model, pair)),
            obstacle(model, pair),
        )
        for pair in linear_pairs(model, example)
    ]


def make_collapsible(
    model: nn.Module,
    *,
    last: int | None = None,
    start: float = 0.01,
    example: Example | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace the activations between two linear layers by trainable slopes; return the model.

    Every Linear-activation-(dropout)-(norm)-Linear that is found, whatever the model is; with
    ``last``, the last so many of these pairs. (The authors' code counts a fraction of *all* modules
    instead.) Without an ``example``, ``forward`` is followed symbolically; give one where that
    fails, for instance because it looks at its input's values.

    Slopes begin at ``start``, so a GELU or ReLU becomes a leaky ReLU (section 4.2), which changes
    the function; LeakyReLU, and PReLU with one parameter, keep theirs. A changed copy is returned.

    Raises:
        ValueError: no such pair, fewer than ``last`` of them, or a start that is not finite; the
            model is left as it was.
    """
    if not math.isfinite(start):
        raise ValueError(f"start must be a finite slope, got {start!r}")
    model = model if inplace else masks.clone(model)
    with surgery.all_or_nothing(model):
        for pair in _chosen(model, last, example):
            _make_slope(model, pair, start)
    return model


def _chosen(model: nn.Module, last: int | None, example: Example | None) -> list[LinearPair]:
    """The last pairs that a slope of 1 would make linear; shared activations are separated."""
    found = linear_pairs(model, example)
    # One activation for several calls, or a function: each call needs a module of its own.
    separating = not found or any(pair.elsewhere for pair in found)
    tried = separate_activations(model, inplace=False) if separating else model
    found = linear_pairs(tried, example) if separating else found
    able = [p for p in found if not p.elsewhere and nonlinear_norm(tried, p) is None]
    if not found:
        hint = "" if example is not None else "; if its forward cannot be followed, give an example"
        raise ValueError(
            f"the model has no two linear layers with just one activation between them{hint}"
        )
    if not able:
        raise ValueError(f"no pair of linear layers can become one: {obstacle(tried, found[0])}")
    count = len(able) if last is None else last
    if not 1 <= count <= len(able):
        raise ValueError(
            f"last must be between 1 and {len(able)}, the number of pairs found, got {last!r}"
        )
    if separating:
        separate_activations(model)
    return able[-count:]


def _make_slope(model: nn.Module, pair: LinearPair, start: float) -> None:
    old = model.get_submodule(pair.activation)
    if isinstance(old, Slope):
        return
    if isinstance(old, nn.LeakyReLU):
        start = old.negative_slope
    elif isinstance(old, nn.PReLU) and old.num_parameters == 1:
        start = float(old.weight.detach())
    weight = weight_of(model.get_submodule(pair.first))
    slope = Slope(start).to(weight.device, weight.dtype)
    put(model, pair.activation, slope.train(old.training))


def linearity_penalty(model: nn.Module, strength: float = 0.2) -> Tensor:
    """Return ``strength * sum (1 - slope)^2`` over all slopes of ``model``, a scalar (eq. 9).

    For ``training.fit(penalty=...)``. The paper's strengths: 0.2 for ImageNet, 0.05 in its
    appendices, 5 for GPT-2.

    Raises:
        ValueError: the model has no slope.
    """
    found = [*slope_parameters(model).values()]
    if not found:
        raise ValueError("the model has no slope to draw to 1; call make_collapsible first")
    return strength * (1 - torch.stack(found)).square().sum()


class AdamLC(torch.optim.AdamW):
    """Adam with decoupled decays: of weights to 0, and of slopes to 1 (appendix B, algorithm 2).

    A slope p moves by ``-2 lr strength (p - 1)``, untouched by Adam's scaling, and has no weight
    decay. ``order="paper"`` takes Adam's step first and decays the new value, ``"code"`` (the
    authors' published code) decays first.

    ``parameters`` is a model, whose :class:`~pruning101.core.slopes.Slope` modules say which
    parameters are slopes, or parameter groups, of which those with ``"slopes": True`` hold slopes.

    Raises:
        ValueError: an unknown order, a negative strength, or no slopes at all.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        strength: float = 0.2,
        order: Literal["paper", "code"] = "paper",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if order not in ("paper", "code"):
            raise ValueError(f'order must be "paper" or "code", got {order!r}')
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a number >= 0, got {strength!r}")
        if isinstance(parameters, nn.Module):
            own = {id(slope) for slope in slope_parameters(parameters).values()}
            given = list(parameters.parameters())
            parameters = [
                {"params": [p for p in given if id(p) not in own]},
                {"params": [p for p in given if id(p) in own], "slopes": bool(own)},
            ]
        parts = (p if isinstance(p, dict) else {"params": p} for p in parameters)
        groups = [{"slopes": False, **part} for part in parts]
        if not any(group["slopes"] for group in groups):
            raise ValueError(
                "there are no slopes among the parameters; give a model that make_collapsible "
                'changed, or mark their group with "slopes": True'
            )
        groups = [{**group, "weight_decay": 0.0} if group["slopes"] else group for group in groups]
        self.strength, self.order = strength, order
        super().__init__(groups, lr, betas, eps, weight_decay)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, and return the loss of the ``closure`` where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.order == "code":
            self._decay_slopes()
        super().step()
        if self.order == "paper":
            self._decay_slopes()
        return loss

    @torch.no_grad()
    def _decay_slopes(self) -> None:
        for group in self.param_groups:
            if group["slopes"]:
                for slope in group["params"]:
                    if slope.grad is not None:
                        slope.sub_(2 * group["lr"] * self.strength * (slope - 1))


# --- recipes -----------------------------------------------------------------------------------


def self_distillation(
    model: nn.Module,
    data: Dataset,
    *,
    teacher: nn.Module,
    epochs: int,
    lr: float = 5e-4,
    strength: float = 0.2,
    **options: Any,
) -> History:
    """Train ``model`` in place to answer as before while its slopes are drawn to 1 (eq. 21).

    The objective is half the cross-entropy to the labels, half the KL divergence from the
    ``teacher`` (the network as it was, in eval mode) at temperature 1, and
    :func:`linearity_penalty`. ``options`` are those of ``training.fit``, whose one record an epoch
    is returned.
    """
    options = {"teacher_weight": 0.5, "temperature": 1.0, **options}
    penalty = partial(linearity_penalty, strength=strength)
    return fit(model, data, epochs=epochs, lr=lr, teacher=teacher, penalty=penalty, **options)


@dataclass(frozen=True)
class Collapse(Step):
    """A step of :func:`collapse_sequentially`; ``removed`` names the activations collapsed in it.

    ``slopes`` holds all slopes by name as they were after training, before the collapse.
    """

    slopes: dict[str, float] = field(default_factory=dict)


def collapse_sequentially(
    model: nn.Module,
    data: Dataset,
    *,
    last: int | None = None,
    drop: float | None = None,
    epochs: int = 10,
    lr: float = 5e-4,
    strength: float = 0.2,
    tolerance: float = 0.05,
    start: float = 0.01,
    train: Mapping[str, Any] | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[Step]:
    """Collapse one pair after another, from the last backwards; yield a ``Step`` after each.

    ``model`` is a trained network and is left alone. Each phase replaces one more activation by a
    slope, trains with :func:`self_distillation` from ``model``, and collapses, with no training
    after that (section 4.2, appendix D.2). A slope that has not come within ``tolerance`` of 1
    stays, is penalised in later phases, too, and may be collapsed in one of them.

    ``last`` limits the number of pairs. After a step whose accuracy on ``valid`` is more than
    ``drop`` (in [0, 1]) below the start, no other follows: the one before it is the one to keep.
    ``train`` holds further arguments of ``training.fit``. Each phase's seed follows from ``seed``
    and its index, so that a ``history`` with steps goes on as if never interrupted.

    Raises:
        ValueError: values out of range, no pair, or a history begun with other settings.
    """
    if epochs < 0 or (drop is not None and not 0 <= drop <= 1):
        raise ValueError(f"epochs must be >= 0 and drop a share in [0, 1], got {epochs}, {drop}")
    if slopes(model):
        raise ValueError("the model has slopes already; give the network that was trained without")
    example, _ = next(iter(data.batches("valid", 2, device=runs.device_of(model))))
    example = example.to(runs.dtype_of(model))
    begin = masks.clone(model)
    chosen = _chosen(begin, last, example)[::-1]
    history = History() if history is None else history
    history.bind(
        recipe="layer_collapse.collapse_sequentially",
        last=last,
        drop=drop,
        epochs=epochs,
        lr=lr,
        strength=strength,
        tolerance=tolerance,
        start=start,
        train=dict(train or {}),
        seed=seed,
        weights=runs.digest(model.state_dict().values()),
    )

    def run() -> Iterator[Step]:
        work = history.latest(begin)
        least = -math.inf if drop is None else evaluate(model, data, "valid").accuracy - drop
        for index, pair in enumerate(chosen[len(history) :], len(history) + 1):
            if history.last is not None and history.last.accuracy < least:
                return
            started = time.perf_counter()
            _make_slope(work, pair, start)
            options = {"progress": False, **(train or {}), "seed": 1000 * seed + index}
            if epochs:
                self_distillation(
                    work, data, teacher=model, epochs=epochs, lr=lr, strength=strength, **options
                )
            trained = slopes(work)
            with runs.mode(work, training=False):
                report = collapse(work, tolerance=tolerance, example=example, inplace=True)
            removed = [line.activation for line in report.pairs if line.collapsed]
            step = measured(index, removed, work, data, seconds=time.perf_counter() - started)
            step = Collapse(**vars(step), slopes=trained)
            history.append(step)
            yield step

    return run()
