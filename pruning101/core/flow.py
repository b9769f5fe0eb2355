"""The network that SynFlow looks at, and how it loses weights round by round.

The same network in absolute weights and float64, with nothing in it that is not linear. Tanaka,
Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively
conserving synaptic flow, NeurIPS 2020.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd import grad

from pruning101.core import masks, runs, structure, tracing

_PIECE = 2**16  # numbers looked at together: what fits into the processor's cache


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy the model into evaluation mode, its masks made permanent, nothing frozen."""
    work = masks.clone(model)
    masks.make_permanent(work)
    return work.eval().requires_grad_(True)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that may go, by name; one that layers share has the first one's."""
    found: dict[str, nn.Parameter] = {}
    for layer, module in structure.prunable(model).items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"the weight of {layer!r} is computed from other parameters (a parametrization); "
                "make it a plain one first, with torch.nn.utils.parametrize."
            )
        if all(weight is not other for other in found.values()):
            found[f"{layer}.weight".removeprefix(".")] = weight
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution or linear layer, so there is nothing to "
            "score; give a model that has some."
        )
    return found


def network(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the network of R and its input of ones, in the shape of one of the ``images``.

    Raises:
        ValueError: it is not linear even so, nothing flows, or there is nothing to score.
    """
    where = runs.device_of(model)
    flow = plain_copy(model).to("cpu" if where.type == "mps" else where, torch.float64)
    weights_of(flow)
    for module in list(flow.modules()):
        for leaf, child in module._modules.items():
            if child is not None and "" in structure.activations(child):
                module._modules[leaf] = nn.Identity()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.abs_()
        for name, buffer in flow.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
    ones = torch.ones(1, *images.shape[1:], dtype=torch.float64, device=runs.device_of(flow))
    with torch.no_grad():
        # Linear in the input, from where activations are straight to where they saturate.
        full, faint = run(flow, ones), run(flow, 1e-12 * ones)
    if not torch.allclose(1e-12 * full, faint, rtol=1e-9, atol=0, equal_nan=True):
        raise ValueError(
            f"SynFlow is defined for products of weights, and {type(model).__name__} is none, even "
            "with positive weights and without biases and activations: something in it "
            "(attention, a layer norm, a gate) is not linear; use snip, grasp or magnitude."
        )
    if not full.any():
        raise ValueError(
            f"nothing flows through {type(model).__name__}: a layer of zeros, or masks, cut it in "
            "two, and SynFlow would score all weights 0; use snip, grasp or magnitude."
        )
    return flow, ones


def slopes(flow: nn.Module, weights: dict[str, nn.Parameter], ones: Tensor) -> dict[str, Tensor]:
    """Return ``dR/dw`` of the weights, laid out in memory as they are."""
    total = run(flow, ones).sum()
    # The scores of a layer are not negative and sum to the total at most.
    if not bool(total.isfinite()):
        raise ValueError(
            "SynFlow's scores are not all finite; look for NaN or huge numbers in the model's "
            "weights."
        )
    found = {}
    gradients = grad(total, list(weights.values()), materialize_grads=True)
    for (name, w), slope in zip(weights.items(), gradients, strict=True):
        if slope.stride() != w.stride():
            slope = torch.empty_like(w, requires_grad=False).copy_(slope)
        found[name] = slope
    return found


def run(model: nn.Module, images: Tensor) -> Tensor:
    """Run the model, which gives one tensor, so that it can be differentiated twice."""
    with tracing.plain_attention():  # fused attention has a first derivative only
        outputs = model(images)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives a {type(outputs).__name__}, and scores need one tensor "
            "of outputs; wrap it in a module that returns that one."
        )
    return outputs


def zero_lowest(weights: list[Tensor], slopes: list[Tensor], share: float) -> float | None:
    """Zero the weights of lowest score, ``share`` of all; return the highest score that went.

    The slopes are turned into scores, ``w * dR/dw``, in place. Weights without flow count among the
    lowest, and stay what they are. None, and nothing zeroed, where others of the same score would
    stay, or where all that go have none.
    """
    pieces = [  # weights and slopes, in order of memory
        piece
        for w, s in zip(weights, slopes, strict=True)
        for piece in zip(_flat(w).split(_PIECE), _flat(s).split(_PIECE), strict=True)
    ]
    total = sum(len(s) for _, s in pieces)
    # A sample says below which score they are, all but certainly (five standard deviations).
    stride = max(1, total // 2**17)
    sample = torch.cat([w[::stride] * s[::stride] for w, s in pieces])
    rank = math.ceil(share * len(sample) + 2.5 * math.sqrt(len(sample)))
    high = float(sample.kthvalue(rank).values) if rank <= len(sample) else math.inf
    going = round(share * total) - total
    low: list[tuple[Tensor, Tensor, Tensor]] = []  # weights, positions there and scores
    for w, s in pieces:
        flows = s.mul_(w) > 0
        going += int(torch.count_nonzero(flows))
        at = (flows & (s < high)).nonzero().squeeze(1)
        low.append((w, at, s.index_select(0, at)))
    values = torch.cat([s for _, _, s in low])
    if not 0 < going <= len(values):
        return None
    threshold = values.kthvalue(going).values
    if int((values <= threshold).sum()) > going:
        return None
    for w, at, s in low:
        w.index_fill_(0, at[s <= threshold], 0)
    return float(threshold)


def _flat(tensor: Tensor) -> Tensor:
    """A view of all numbers as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
