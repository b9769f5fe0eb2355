"""Pruning at initialisation: score the weights of a network before any training, and keep the best.

Four ways to rank the weights of an untrained network, all of them ``weight * something``:

- SNIP: how much the loss feels the weight, ``|w dL/dw|`` (Lee, Ajanthan and Torr, ICLR 2019);
- GraSP: what its removal does to the norm of the gradient (Wang, Zhang and Grosse, ICLR 2020);
- SynFlow: how much of the flow ``1' |W_n| ... |W_1| 1`` goes through it, without any data
  (Tanaka, Kunin, Yamins and Ganguli, NeurIPS 2020);
- chance, the baseline.

As everywhere in the library, the lowest scores go first.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import BoolTensor, Tensor, nn
from torch.autograd import grad
from tqdm import tqdm

from pruning101.core import curvature, flow, masks, runs

Batches = Iterable[tuple[Tensor, Tensor]]
Scores = dict[str, Tensor]
Masks = dict[str, BoolTensor]
Group = tuple[str, ...]  # names of weights that compete with each other

# --- scores ------------------------------------------------------------------------------------


def snip(model: nn.Module, batches: Batches, *, loss: str = "cross_entropy") -> Scores:
    """Return SNIP's connection sensitivity ``|w * dL/dw|`` of every convolution and linear weight.

    ``L`` is the mean loss ("cross_entropy" or "squared_error") over all images in ``batches``.
    The model, which is left as it is, runs as in its first training step: batch norms use the
    statistics of each batch, since an untrained network has no others. Only dropout is off. Keyed
    by parameter name, in the shapes of the weights; a masked weight scores 0. Section 4 of the
    paper, without its division by the sum, which changes no rank.

    Raises:
        ValueError: an unknown loss, no batches, labels that do not fit, a model without prunable
            layers, or scores that are not finite.
    """
    if loss not in curvature.LOSSES:
        raise ValueError(f"loss must be one of {', '.join(curvature.LOSSES)}, got {loss!r}.")
    work = _trainable_copy(model)
    weights = flow.weights_of(work)
    slopes, images = _zeros(weights), 0
    for x, y in _moved(work, batches):
        error = curvature.summed_error(flow.run(work, x), y, loss)
        _add(slopes, grad(error, list(weights.values()), allow_unused=True))
        images += len(x)
    found = {n: (w.detach() * slopes[n]).abs() / _some(images) for n, w in weights.items()}
    return _finite(found)


def grasp(model: nn.Module, batches: Batches, *, temperature: float = 200.0) -> Scores:
    """Return GraSP's ``w * (H g)`` of every convolution and linear weight, low where it may go.

    ``g`` is the gradient and ``H`` the Hessian, in these weights, of the mean cross-entropy of
    ``logits / temperature`` over all images in ``batches``. To first order, taking w away changes
    ``|g|**2`` by ``-2 w (H g)``. The paper's score is ``-w (H g)`` and the paper removes the
    highest, those whose removal raises the norm of the gradient most; the sign is turned here so
    that they are the lowest, as the library has it. Scores have both signs. The model is left as
    it is and runs as for :func:`snip`; a masked weight scores 0 and has no part in g. Section 4 of
    the paper.

    Raises:
        ValueError: a temperature that is not positive, and what :func:`snip` raises.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}.")
    work = _trainable_copy(model)
    weights, kept = flow.weights_of(work), masks.masks_of(model)
    batches = _repeatable(batches)

    def gradients(x: Tensor, y: Tensor, *, again: bool) -> tuple[Tensor | None, ...]:
        outputs = flow.run(work, x) / temperature
        error = curvature.summed_error(outputs, y, "cross_entropy")
        return grad(error, list(weights.values()), allow_unused=True, create_graph=again)

    g, product, images = _zeros(weights), _zeros(weights), 0
    for x, y in _moved(work, batches):
        _add(g, gradients(x, y, again=False))
        images += len(x)
    g = {n: slope * kept.get(n, 1) / _some(images) for n, slope in g.items()}
    for x, y in _moved(work, batches):
        slopes = zip(g.values(), gradients(x, y, again=True), strict=True)
        # H g is the gradient of g'(dL/dw), with g a constant.
        along = sum((a * b).sum() for a, b in slopes if b is not None)
        _add(product, grad(cast(Tensor, along), list(weights.values()), allow_unused=True))
    return _finite({n: w.detach() * product[n] / images for n, w in weights.items()})


def synflow(model: nn.Module, batches: Batches | Tensor) -> Scores:
    """Return SynFlow's ``w * dR/dw`` of every convolution and linear weight, in float64.

    ``R = 1' |W_n| ... |W_1| 1`` is what comes out, in all outputs together, when an input of ones
    runs through the network with every weight replaced by its absolute value. No data enters: of
    ``batches`` (or one example batch) only the shape of an input is used. The score is the share
    of R that flows through the weight. It is conserved: what comes into a hidden unit goes out of
    it, and in a chain of layers each layer's scores sum to R (theorems 1 and 2 of the paper).

    R has no place for what is not a weight. Biases and the shifts of batch norms are left out;
    batch norms keep their factor ``|gamma| / sqrt(running variance + eps)``. (The authors' code
    keeps the absolute values of biases and shifts, and then the weights' scores alone are not
    conserved.) Activation modules are left out too: where all signals are positive a ReLU does
    nothing, and others have no part in the definition. Pooling and residual additions stay.
    float64, because R of a deep network overflows float32: it grows several-fold with each layer.

    Raises:
        ValueError: a network that is no product of weights even so, as with attention, layer norms
            or gates, or that nothing flows through; no batches; a model without prunable layers;
            scores that are not finite.
    """
    network, ones = flow.network(model, _example(batches))
    weights, where = flow.weights_of(network), runs.device_of(model)
    slopes = flow.slopes(network, weights, ones)
    return {name: (w.detach() * slopes[name]).to(where) for name, w in weights.items()}


def random_scores(model: nn.Module, *, seed: int = 0) -> Scores:
    """Return scores drawn uniformly from (0, 1), the baseline; a masked weight scores 0.

    The same seed gives the same scores on every device.

    Raises:
        ValueError: a model without prunable layers.
    """
    generator, kept = torch.Generator().manual_seed(seed), masks.masks_of(model)
    found = {}
    for name, weight in flow.weights_of(flow.plain_copy(model)).items():
        drawn = 1 - torch.rand(weight.shape, generator=generator)  # [0, 1) to (0, 1]
        found[name] = drawn.to(weight.device) * kept.get(name, 1)
    return found


# --- the recipe --------------------------------------------------------------------------------


def prune_at_initialisation(
    model: nn.Module,
    batches: Batches | Tensor,
    sparsity: float,
    *,
    score: str | Callable[[nn.Module, Batches], Scores] = "synflow",
    rounds: int | None = None,
    scope: Literal["global", "layer"] = "global",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, BoolTensor]:
    """Return masks that prune an untrained network to ``sparsity``, without training it.

    The model is left as it is: ``masks.apply(model, found)`` prunes it. ``score`` is "synflow",
    "snip", "grasp", "magnitude", "random" (by ``seed``) or a function of a model and batches that
    gives scores by parameter name. In each of ``rounds`` (by default 100 for SynFlow, else 1) the
    scores are computed anew on what is left, and the lowest go until the density is
    ``(1 - sparsity) ** (k / rounds)`` after round k, over all layers together or in each one
    (``scope``). Masks that the model has count in, and stay.

    At the end exactly ``round(sparsity * n)`` weights of n are gone (of each layer's with
    ``scope="layer"``). Should a layer lose everything (see :func:`collapsed_layers`), gradients
    and flow are zero everywhere from then on, and later rounds go by position.

    Source: Tanaka et al. 2020, algorithm 1. A progress bar shows on a terminal, and vanishes.

    Raises:
        ValueError: a sparsity outside [0, 1] or below what the model has already, an unknown
            score, rounds below 1, and what the score itself raises.
    """
    function = _score(score, seed)
    rounds = rounds if rounds is not None else 100 if function is synflow else 1
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a whole number, 1 or more, not {rounds!r}.")
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", not {scope!r}.')
    if not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a share in [0, 1], not {sparsity!r}.")
    if function is synflow:
        steps = _flow_rounds(model, batches, sparsity, rounds, scope)
    else:
        steps = _rounds(model, function, _repeatable(batches), sparsity, rounds, scope)
    hidden = not (progress and sys.stderr and sys.stderr.isatty())
    bar = tqdm(
        steps, "pruning at initialisation", rounds, unit="round", leave=False, disable=hidden
    )
    for found in bar:
        kept = found
    return kept


def collapsed_layers(masks: dict[str, BoolTensor]) -> list[str]:
    """Return the layers that lost all their weights, which cuts a chain of layers in two.

    ``masks`` is by parameter name, True = kept; the layers' names come without ".weight".
    """
    return [
        name.removesuffix("weight").removesuffix(".")
        for name, mask in masks.items()
        if name.endswith("weight") and not mask.any()
    ]


def _score(score: str | Callable[..., Scores], seed: int) -> Callable[[nn.Module, Batches], Scores]:
    known: dict[str, Callable[..., Scores]] = {
        "synflow": synflow,
        "snip": snip,
        "grasp": grasp,
        "magnitude": _magnitudes,
        "random": lambda model, batches: random_scores(model, seed=seed),
    }
    if callable(score):
        return score
    if score not in known:
        raise ValueError(f"score must be a function or one of {', '.join(known)}, got {score!r}.")
    return known[score]


def _magnitudes(model: nn.Module, batches: Batches) -> Scores:
    return {
        name: weight.detach().abs()
        for name, weight in flow.weights_of(flow.plain_copy(model)).items()
    }


def _rounds(
    model: nn.Module,
    function: Callable[[nn.Module, Batches], Scores],
    batches: Batches,
    sparsity: float,
    rounds: int,
    scope: str,
) -> Iterator[Masks]:
    """Score, remove, yield the masks; the scores always of the masked model."""
    work = masks.clone(model)
    kept, schedules = masks.masks_of(model), cast(dict[Group, Any], {})
    for k in range(1, rounds + 1):
        found = function(work, batches)
        if not isinstance(found, dict) or not found:
            raise ValueError(
                "score must give a dictionary of scores by parameter name, as snip does, and gave "
                f"{'an empty one' if found == {} else f'a {type(found).__name__}'}."
            )
        if k == 1:
            kept = {n: kept.get(n, _whole(s)) for n, s in found.items()}
            schedules = {g: _schedule(kept, g, sparsity) for g in _groups(found, scope)}
        after: Masks = {}
        for group, share in schedules.items():
            after |= _cut(found, kept, group, share(k / rounds))
        kept = after
        masks.apply(work, kept)
        yield kept


def _flow_rounds(
    model: nn.Module, batches: Batches, sparsity: float, rounds: int, scope: str
) -> Iterator[Masks]:
    """The same for SynFlow, at little more than the price of the passes.

    The network of R is made once. Flow is never negative and what has none never gets any, so a
    round need only zero the few weights that it removes; the masks are read off at the end.
    """
    network, ones = flow.network(model, _example(batches))
    # The layout that convolutions in float64 are fastest in.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights, kept = flow.weights_of(network), masks.masks_of(model)
    kept = {n: cast(BoolTensor, kept.get(n, _whole(w)).to(w.device)) for n, w in weights.items()}
    schedules = {g: _schedule(kept, g, sparsity) for g in _groups(weights, scope)}
    # What is kept is, in each group, what scored above the threshold of the last round.
    scores: Scores = {n: mask.double() for n, mask in kept.items()}
    above = dict.fromkeys(schedules, 0.0)
    for k in range(1, rounds + 1):
        before, scores = scores, flow.slopes(network, weights, ones)
        for group, share in schedules.items():
            here = [weights[n].detach() for n in group]
            # which makes scores of the slopes
            threshold = flow.zero_lowest(here, [scores[n] for n in group], share(k / rounds))
            if threshold is None:
                kept = {n: cast(BoolTensor, before[n] > above[group]) for n in group}
                kept = _cut(scores, kept, group, share(k / rounds))
                for name, weight in zip(group, here, strict=True):
                    weight.mul_(kept[name])
                    scores[name] = kept[name].double()
            above[group] = threshold or 0.0
        if k < rounds:
            yield {}
    yield {
        n: cast(BoolTensor, (scores[n] > above[group]).contiguous().to(runs.device_of(model)))
        for group in schedules
        for n in group
    }


def _groups(names: Iterable[str], scope: str) -> list[Group]:
    """Which weights compete."""
    return [tuple(names)] if scope == "global" else [(name,) for name in names]


def _schedule(first: Masks, group: Group, sparsity: float) -> Callable[[float], float]:
    """The sparsity at a share of the way from the first masks' to the last, geometrically."""
    weights = sum(first[n].numel() for n in group)
    kept = sum(int(first[n].sum()) for n in group)
    if round(sparsity * weights) < weights - kept:
        raise ValueError(
            f"the masks that are there already make a sparsity of {1 - kept / weights:.4g}, and "
            f"{sparsity:.4g} was asked for; ask for more, or start from the dense model."
        )
    density = kept / weights

    def share(progress: float) -> float:
        if progress == 1 or not kept:
            return sparsity
        return 1 - density * ((1 - sparsity) / density) ** progress

    return share


def _cut(scores: Scores, kept: Masks, group: Group, share: float) -> Masks:
    # What is gone ranks below all that is left, whatever the score says of it.
    ranked = {n: scores[n].masked_fill(~kept[n], -math.inf) for n in group}
    return masks.from_scores(ranked, share)


def _whole(like: Tensor) -> BoolTensor:
    return cast(BoolTensor, torch.ones_like(like, dtype=torch.bool, requires_grad=False))


# --- the model, prepared -----------------------------------------------------------------------


def _trainable_copy(model: nn.Module) -> nn.Module:
    """Copy the model as it is in training, but for dropout."""
    work = flow.plain_copy(model)
    for module in work.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return work


def _example(batches: Batches | Tensor) -> Tensor:
    if not isinstance(batches, Tensor):
        batches = next((x for x, _ in _pairs(batches)), torch.empty(0))
    _some(len(batches))
    return batches


def _pairs(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                "batches must be an iterable of pairs (images, labels), as data.batches() gives, "
                f"and it held a {type(batch).__name__}."
            )
        yield batch[0], batch[1]


def _repeatable(batches: Batches) -> Batches:
    return list(batches) if iter(batches) is batches else batches


def _moved(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Bring batches to the model's device and floating-point type."""
    like = next(model.parameters())
    for images, labels in _pairs(batches):
        _some(len(images))
        yield images.to(like), labels.to(like.device)


def _some(images: int) -> int:
    if not images:
        raise ValueError("batches held no images; give an iterable of (images, labels).")
    return images


def _zeros(weights: dict[str, nn.Parameter]) -> Scores:
    return {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}


def _add(total: Scores, parts: Iterable[Tensor | None]) -> None:
    for tensor, part in zip(total.values(), parts, strict=True):
        if part is not None:
            tensor += part


def _finite(scores: Scores) -> Scores:
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(
                f"the scores of {name!r} are not all finite; look for NaN or huge numbers in the "
                "images and in the model's weights."
            )
    return scores
