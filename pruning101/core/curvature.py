"""Second derivatives of an error in the parameters of any model, the plain ways.

The error of one pattern is `"squared_error"`, the sum over outputs of (d - x)^2 with no factor 1/2,
or `"cross_entropy"` of the softmax. Integer labels stand for one-hot d; floating-point ones
[batch, outputs] are d itself. The functions sum over the patterns of a batch, take any model with
outputs [batch, outputs], and name parameters as `model.named_parameters()` does.
"""

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LOSSES = ("squared_error", "cross_entropy")
CHUNK_FLOATS = 2**26  # per-pattern derivatives held at a time: 256 MiB of float32
CHUNK_ROWS = 256  # rows of the Hessian held at a time


def targets(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return what the outputs [batch, outputs] should have been, of the same shape and type.

    Raises:
        ValueError: the outputs are no matrix, or the labels do not fit them.
    """
    if outputs.ndim != 2:
        raise ValueError(
            f"the model's outputs must be [batch, outputs], got shape {list(outputs.shape)}."
        )
    if labels.is_floating_point() and labels.shape == outputs.shape:
        return labels.to(outputs)
    classes = outputs.shape[1]
    fits = labels.shape == outputs.shape[:1] and not labels.is_floating_point()
    if not fits or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be integers [batch] below {classes} or numbers [batch, {classes}] for "
            f"these outputs, got {labels.dtype} of shape {list(labels.shape)}."
        )
    return F.one_hot(labels.long(), classes).to(outputs)


def summed_error(outputs: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Return the error summed over the batch, a scalar."""
    if loss == "squared_error":
        return (outputs - targets(outputs, labels)).square().sum()
    return F.cross_entropy(outputs, targets(outputs, labels), reduction="sum")


def output_derivatives(outputs: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return dE/dx and the diagonal d2E/dx^2 of each pattern's error in its outputs x."""
    if loss == "squared_error":
        return 2 * (outputs - targets(outputs, labels)), torch.full_like(outputs, 2.0)
    p = outputs.softmax(1)
    return p - targets(outputs, labels), p * (1 - p)


def gauss_newton(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> dict[str, Tensor]:
    """Return the diagonal of J' H J: J the Jacobian of the outputs, H the error's Hessian in them.

    One backward pass for each output of each pattern.
    """
    with torch.no_grad():
        outputs = model(images)
    eye = torch.eye(outputs.shape[1]).to(outputs)
    targets(outputs, labels)  # the labels do not enter J' H J, but wrong ones should not pass
    if loss == "squared_error":
        roots = 2**0.5 * eye.expand(len(images), -1, -1)
    else:  # diag(p) - p p' is the sum over classes k of p_k (e_k - p)(e_k - p)'
        p = outputs.softmax(1)
        roots = p.sqrt()[:, :, None] * (eye - p[:, None])
    return _squares(model, images, roots)


def fisher(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> dict[str, Tensor]:
    """Return the squared gradients of single patterns at their given labels (empirical Fisher)."""
    with torch.no_grad():
        slopes, _ = output_derivatives(model(images), labels, loss)
    return _squares(model, images, slopes[:, None])


def _squares(model: nn.Module, images: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Sum the squares of J' c over the patterns and each one's c: columns [batch, n, outputs]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def squares(image: Tensor, column: Tensor) -> dict[str, Tensor]:
        pull = vjp(lambda values: functional_call(model, values, (image[None],))[0], parameters)[1]
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for c in column:  # a second vmap here fails in the backward pass of some layers (PReLU)
            found = {name: found[name] + g.square() for name, g in pull(c)[0].items()}
        return found

    size = sum(p.numel() for p in parameters.values())
    found = vmap(squares, chunk_size=max(1, CHUNK_FLOATS // size))(images, columns)
    return {name: rows.sum(0) for name, rows in found.items()}


def hutchinson(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: str,
    n_samples: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the mean of v * Hv over random signs v, whose expectation is the diagonal of H."""
    slopes, parameters = _slopes(model, images, labels, loss)
    found = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for _ in range(n_samples):
        signs = {
            name: torch.randint(0, 2, p.shape, generator=generator, device=generator.device)
            for name, p in parameters.items()
        }
        signs = {name: 2 * bit.to(parameters[name]) - 1 for name, bit in signs.items()}
        products = grad(
            list(slopes.values()),
            list(parameters.values()),
            list(signs.values()),
            retain_graph=True,
            materialize_grads=True,
        )
        for name, product in zip(found, products, strict=True):
            found[name] += signs[name] * product / n_samples
    return found


def exact(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> dict[str, Tensor]:
    """Return the diagonal itself: every entry of the gradient differentiated once more."""
    slopes, parameters = _slopes(model, images, labels, loss)
    found = {}
    for name, p in parameters.items():
        pieces = []
        for rows in torch.arange(p.numel(), device=p.device).split(CHUNK_ROWS):
            basis = F.one_hot(rows, p.numel()).to(p).view(-1, *p.shape)
            (second,) = grad(slopes[name], p, basis, retain_graph=True, is_grads_batched=True)
            pieces.append(second.flatten(1).gather(1, rows[:, None])[:, 0])
        found[name] = torch.cat(pieces).view_as(p)
    return found


def _slopes(
    model: nn.Module, images: Tensor, labels: Tensor, loss: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the gradient as a function, and the parameters that it depends on."""
    named = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has a first derivative only
        error = summed_error(model(images), labels, loss)
    slopes = grad(error, list(named.values()), create_graph=True, allow_unused=True)
    used = {n: g for n, g in zip(named, slopes, strict=True) if g is not None and g.requires_grad}
    return used, {name: named[name] for name in used}
