"""Optimal brain damage: delete the parameters whose removal is predicted to raise the error least.

LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989; equation numbers are the paper's. Around
a trained network the error E is expanded to second order in the parameters u. The gradient is
(nearly) zero at a minimum, the cross terms are dropped, and what is left is the saliency

    s_k = h_kk u_k^2 / 2,        h_kk = d2E / du_k^2,

the predicted rise of E when u_k is set to zero. The work is in the diagonal h; here are six ways to
it, from the paper's one backward pass to the exact value.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional as F

from pruning101.core import curvature, masks, structure, training
from pruning101.core.data import Dataset
from pruning101.core.steps import History, Step, measured

Batches = Iterable[tuple[Tensor, Tensor]]

METHODS = ("lecun", "levenberg_marquardt", "gauss_newton", "fisher", "hutchinson", "exact")
CRITERIA = ("saliency", "magnitude", "random")
EXACT_LIMIT = 50_000  # parameters; "exact" takes one backward pass for each of them

# Layers that curvature can be passed back through, besides elementwise activations.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ROUTES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d)
STRAIGHT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)  # f'' = 0 wherever it exists


def hessian_diagonal(
    model: nn.Module,
    batches: Batches,
    loss: str = "cross_entropy",
    *,
    method: str = "lecun",
    n_samples: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the diagonal of the Hessian of the mean error over all patterns, by parameter.

    The error of one pattern is `"squared_error"`, the sum over outputs of (d - x)^2 with no factor
    1/2, or `"cross_entropy"` of the softmax; integer labels stand for one-hot d, floating-point
    ones [batch, outputs] are d itself. The model, left as it is, is taken in evaluation mode and
    with its effective weights; a masked weight has a derivative too.

    - `"lecun"`: eqs. 5 to 8, passed back layer by layer for about the price of one more backward
      pass. Eq. 7 has `+ f''` (the paper prints a minus sign). Exact for the squared error with one
      hidden layer at most and each weight used once; with more layers the curvature between two
      units of a layer is dropped, with shared weights that between two of their places.
      Cross-entropy starts from p (1 - p) at the logits.
    - `"levenberg_marquardt"`: the same without the terms in f'', and so never negative.
    - `"gauss_newton"`: exact diagonal of J' H J, J the Jacobian of the outputs and H the Hessian of
      the error in them; one backward pass for each output of each pattern.
    - `"fisher"`: empirical Fisher, the mean squared gradient of single patterns at their given
      labels. (The true one, labels drawn from the softmax, is `"gauss_newton"`.)
    - `"hutchinson"`: mean of v * Hv over `n_samples` vectors v of random signs a batch, drawn from
      `generator` (by default one seeded with 0); right on average, and noisy.
    - `"exact"`: double backward, one pass for each parameter; at most 50,000 of them.

    The first two need a chain of layers (linear, convolution, batch norm, pooling, flatten,
    elementwise activation); the other four take any model with outputs [batch, outputs].

    Returns:
        Plain parameter names ("fc1.weight", "fc1.bias") to tensors of the parameters' shapes, in
        units of error per squared unit of the parameter.

    Raises:
        ValueError: unknown method or loss, no patterns, labels that do not fit the outputs, too
            many parameters for `"exact"`, or a model that the method cannot take.
    """
    _one_of("method", method, METHODS)
    _one_of("loss", loss, curvature.LOSSES)
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
    model = _plain_copy(model)
    parameters = dict(model.named_parameters())
    size = sum(p.numel() for p in parameters.values())
    if method == "exact" and size > EXACT_LIMIT:
        raise ValueError(
            f"method='exact' takes one backward pass a parameter and at most {EXACT_LIMIT:,} of "
            f"them, got {size:,}; method='hutchinson' estimates the same diagonal."
        )
    generator = generator or torch.Generator().manual_seed(0)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    chain: list[nn.Module] = []
    patterns = 0
    for images, labels in _moved(model, batches):
        if method in ("lecun", "levenberg_marquardt"):
            chain = chain or _chain(model, images, method)
            tensors = _curvature_backward(chain, images, labels, loss, method == "lecun")
            found = {name: tensors[p] for name, p in parameters.items() if p in tensors}
        elif method == "hutchinson":
            found = curvature.hutchinson(model, images, labels, loss, n_samples, generator)
        else:
            found = getattr(curvature, method)(model, images, labels, loss)
        for name, second in found.items():
            total[name] += second
        patterns += len(images)
    return {name: value / _some(patterns) for name, value in total.items()}


def saliency(model: nn.Module, hessian: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return s_k = h_kk u_k^2 / 2 for all parameters in `hessian`: the predicted rise of E.

    Negative where h is; zero for a masked weight, which has nothing left to lose.

    Raises:
        ValueError: `hessian` has a name or a shape that is not in the model.
    """
    values = dict(_plain_copy(model).named_parameters())
    for name, h in hessian.items():
        if name not in values or values[name].shape != h.shape:
            raise ValueError(
                f"the Hessian has {name!r} of shape {list(h.shape)}, which this model has not; "
                "compute it with hessian_diagonal(model, ...) for this very model."
            )
    return {name: h * values[name].detach().square() / 2 for name, h in hessian.items()}


def deletion_curve(
    model: nn.Module,
    batches: Batches,
    loss: str,
    scores: dict[str, Tensor],
    counts: Sequence[int],
) -> Tensor:
    """Return the actual rise of E when the `counts[i]` parameters of lowest score are set to zero.

    Without retraining. `scores` names the parameters that may go (ties by position). Beside it,
    the sum of the lowest saliencies is the predicted rise (the paper's figure 2).

    Raises:
        ValueError: a count below 0 or above the number of scores; no patterns; an unknown loss.
    """
    _one_of("loss", loss, curvature.LOSSES)
    n = sum(score.numel() for score in scores.values())
    if not all(0 <= count <= n for count in counts):
        raise ValueError(f"counts must lie in 0 ... {n}, the number of scores; got {counts}.")
    model = _plain_copy(model)
    parameters = dict(model.named_parameters())
    rank = torch.cat([s.flatten() for s in scores.values()]).argsort(stable=True).argsort()
    ranks = dict(zip(scores, rank.split([s.numel() for s in scores.values()]), strict=True))
    dense = {name: parameters[name].detach().clone() for name in scores}
    errors = []
    for count in (0, *counts):
        for name, u in dense.items():
            parameters[name].data = u * (ranks[name] >= count).view_as(u)
        total, patterns = 0.0, 0
        with torch.no_grad():
            for images, labels in _moved(model, batches):
                total += float(curvature.summed_error(model(images), labels, loss))
                patterns += len(images)
        errors.append(total / _some(patterns))
    return torch.tensor(errors[1:], dtype=torch.float64) - errors[0]


def prune_iteratively(
    model: nn.Module,
    data: Dataset,
    *,
    rounds: int = 5,
    rate: float = 0.2,
    epochs: int = 5,
    lr: float = 0.01,
    criterion: str = "saliency",
    method: str = "levenberg_marquardt",
    loss: str = "cross_entropy",
    scope: Literal["global", "layer"] = "global",
    batch_size: int = 128,
    seed: int = 0,
    history: History | None = None,
    **fit_options: Any,
) -> Iterator[Step]:
    """Delete the least salient weights of a trained model, retrain, and again: the paper's recipe.

    Each of the `rounds` finds the saliencies on `train`, deletes a share `rate` of the weights
    still there (of convolutions and linear layers; biases stay), freezes them at zero and retrains
    for `epochs`. Levenberg-Marquardt is the default since a negative saliency would go first.
    `criterion="magnitude"` (|u|) and `"random"` only change the order, which is made over all
    layers or, with `scope="layer"`, in each. Further keywords go to `training.fit`. With a
    `history` the run goes on after its last step as if it had never stopped. The caller's model is
    left as it is.

    Yields:
        A `Step` after each retraining; `removed` is the number of weights deleted in this round.

    Raises:
        ValueError: unknown criterion, method or loss; `rate` outside (0, 1); `rounds` below 1.
    """
    _one_of("criterion", criterion, CRITERIA)
    _one_of("method", method, METHODS)
    _one_of("loss", loss, curvature.LOSSES)
    if not 0 < rate < 1 or rounds < 1:
        raise ValueError(f"rate lies in (0, 1) and rounds from 1 on; got {rate} and {rounds}.")
    history = History() if history is None else history
    history.bind(
        recipe="optimal_brain_damage", rate=rate, epochs=epochs, lr=lr, criterion=criterion,
        method=method, loss=loss, scope=scope, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    kept_at_first = 1 - masks.sparsity(model)
    model = history.latest(model)
    for index in range(len(history) + 1, rounds + 1):
        started = time.perf_counter()
        draw = seed * 10_000 + index  # no two rounds of two seeds share one
        before = masks.sparsity(model)
        batches = data.batches("train", batch_size, device=next(model.parameters()).device)
        scores = _scores(model, batches, loss, criterion, method, draw)
        sparsity = 1 - kept_at_first * (1 - rate) ** index
        masks.apply(model, masks.from_scores(scores, sparsity, scope=scope))
        weights = sum(score.numel() for score in scores.values())
        removed = round((masks.sparsity(model) - before) * weights)
        training.fit(
            model, data, epochs=epochs, lr=lr, loss=loss, batch_size=batch_size, seed=draw,
            **{"progress": False, **fit_options},
        )  # fmt: skip
        step = measured(index, removed, model, data, seconds=time.perf_counter() - started)
        history.append(step)
        yield step


def _scores(
    model: nn.Module, batches: Batches, loss: str, criterion: str, method: str, seed: int
) -> dict[str, Tensor]:
    """Give each prunable weight a score, the lowest go first: at the very front what is gone."""
    plain = {name: p.detach() for name, p in _plain_copy(model).named_parameters()}
    names = [f"{name}.weight".lstrip(".") for name in structure.prunable(model)]
    if criterion == "saliency":
        found = saliency(model, hessian_diagonal(model, batches, loss, method=method))
    elif criterion == "magnitude":
        found = {name: plain[name].abs() for name in names}
    else:
        draw = torch.Generator().manual_seed(seed)
        found = {n: torch.rand(plain[n].shape, generator=draw).to(plain[n].device) for n in names}
    return {name: found[name].masked_fill(plain[name] == 0, -torch.inf) for name in names}


# --- eqs. 5 to 8: one backward pass that carries d2E/da^2 beside dE/da ---------------------------


def _curvature_backward(
    chain: list[nn.Module], images: Tensor, labels: Tensor, loss: str, second_order: bool
) -> dict[Tensor, Tensor]:
    """Give d2E/du^2 for the batch's summed E and each parameter u."""
    tape, x = [], images
    for module in chain:
        x = x.detach().requires_grad_()
        z = module(x)
        tape.append((module, x, z))
        x = z
    g, h = curvature.output_derivatives(
        x.detach(), labels, loss
    )  # dE/dz, d2E/dz^2 [batch, outputs]
    bends = [second_order and _elementwise(m) and not isinstance(m, STRAIGHT) for m in chain]
    first_bend = bends.index(True) if any(bends) else len(chain)  # below it no one asks for g
    found: dict[Tensor, Tensor] = {}
    for index in reversed(range(len(chain))):
        module, x, z = tape.pop()
        parts: dict[Tensor, Tensor] = {}
        if isinstance(module, WEIGHTED):
            below, parts = _through_weights(module, x.detach(), h, index > 0)
        elif isinstance(module, NORMS):
            below, parts = _through_norm(module, x.detach(), h)
        elif _elementwise(module):
            below = _through_activation(x, z, h, g if bends[index] else None)
        else:  # eq. 7 with f linear and coefficients 0 or 1; in an average 1/window, squared
            scale = _share(module, x) if isinstance(module, POOLS) else 1.0
            (below,) = grad(z, x, h * scale, retain_graph=True)
        for parameter, part in parts.items():  # eq. 5: a parameter in two layers gets their sum
            found[parameter] = found[parameter] + part if parameter in found else part
        if index > first_bend:
            (g,) = grad(z, x, g)
        h = below
    return found


def _through_activation(x: Tensor, z: Tensor, h: Tensor, g: Tensor | None) -> Tensor:
    """Eq. 7 for x = f(a): f'(a)^2 h, and with dE/dx given also + f''(a) dE/dx."""
    ones = torch.ones_like(z)
    (slope,) = grad(z, x, ones, create_graph=g is not None, retain_graph=True)
    if g is None:
        return slope.square() * h
    (bend,) = grad(slope, x, ones, retain_graph=True)
    return slope.detach().square() * h + bend * g


def _through_weights(
    module: nn.Module, x: Tensor, h: Tensor, below_wanted: bool
) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Eq. 6 and the sum in eq. 7: the ordinary gradients of the layer, its operands squared.

    With shared weights the sum over places is eq. 5, since places add up in a gradient too.
    """
    originals = dict(module.named_parameters(recurse=False))
    squared = {n: p.detach().square().requires_grad_() for n, p in originals.items()}
    x = x.square().requires_grad_(below_wanted)
    wanted = [*squared.values(), x] if below_wanted else [*squared.values()]
    found = grad(functional_call(module, squared, (x,)), wanted, h)
    below = found[-1] if below_wanted else x
    return below, dict(zip(originals.values(), found, strict=False))


def _through_norm(module: Any, x: Tensor, h: Tensor) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Batch normalisation in evaluation mode is a linear map of each channel by itself."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    rest = [d for d in range(x.ndim) if d != 1]
    inverse = (module.running_var + module.eps).rsqrt().view(shape)
    normal = (x - module.running_mean.view(shape)) * inverse
    if module.weight is None:
        return h * inverse.square(), {}
    below = h * (inverse * module.weight.detach().view(shape)).square()
    return below, {module.weight: (h * normal.square()).sum(rest), module.bias: h.sum(rest)}


def _share(module: nn.Module, x: Tensor) -> Tensor:
    """Give the coefficient 1/window that each output of an average pooling has for its inputs."""
    ones = torch.ones_like(x[:1, :1])
    if isinstance(module, nn.AvgPool2d):
        window = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        return module(ones) / F.avg_pool2d(ones, *window, divisor_override=1)
    sizes = []
    for n_in, n_out in zip(x.shape[-2:], module(ones).shape[-2:], strict=True):
        i = torch.arange(n_out, device=x.device)
        sizes.append(-(-(i + 1) * n_in // n_out) - i * n_in // n_out)
    return 1 / (sizes[0][:, None] * sizes[1]).to(x)


def _chain(model: nn.Module, images: Tensor, method: str) -> list[nn.Module]:
    """Take the model apart into the layers that it applies one after the other."""
    known = WEIGHTED + NORMS + POOLS + ROUTES
    refusal = (
        f"method={method!r} passes curvature back through a chain of layers, {{}}; "
        "method='gauss_newton', 'fisher', 'hutchinson' or 'exact' takes any model."
    )
    for name, module in model.named_modules():
        ruled = isinstance(module, known) or _elementwise(module)
        if isinstance(module, NORMS) and module.running_var is None:
            ruled = False  # statistics of the batch would tie the patterns together
        if not ruled and not list(module.children()):
            kind = type(module).__name__
            raise ValueError(refusal.format(f"and {name!r} is a {kind}, for which it has no rule"))
    names = structure.linear_chains(model, images[:1])[0]
    chain: list[nn.Module] = []
    with torch.no_grad():
        x = images[:1]
        for layer in map(model.get_submodule, names):
            if isinstance(layer, nn.Linear) and x[0].numel() == layer.in_features != x.shape[-1]:
                chain.append(nn.Flatten())  # a flatten that is called in forward is no module
                x = x.flatten(1)
            chain.append(layer)
            x = layer(x)
        if not torch.equal(x, model(images[:1])):
            raise ValueError(refusal.format(f"and in this model the chain ends at {names[-1]!r}"))
    return chain


def _elementwise(module: nn.Module) -> bool:
    found = structure.activations(module)
    return bool(found) and not list(module.children()) and not list(module.parameters())


def _some(patterns: int) -> int:
    if not patterns:
        raise ValueError("batches held no patterns; pass an iterable of (images, labels).")
    return patterns


def _moved(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Bring batches to the model's device and floating-point type."""
    like = next(model.parameters())
    for images, labels in batches:
        yield images.to(like), labels.to(like.device)


def _plain_copy(model: nn.Module) -> nn.Module:
    """Copy the model into evaluation mode, masks made permanent, nothing frozen or in place."""
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters to differentiate in.")
    model = masks.clone(model)
    masks.make_permanent(model)
    for module in model.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False
    return model.eval().requires_grad_(True)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
