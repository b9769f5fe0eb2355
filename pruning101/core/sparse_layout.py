"""Weights stored as their non-zeros: linear layers that multiply with torch's CSR matrices.

A zero in a dense matrix costs as much as any other number. Compressed sparse rows (CSR) keep the
non-zeros alone, each with its column, and skip the rest; what the bookkeeping costs decides from
which sparsity on this is faster.
"""

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning101.core import masks, structure

_NO_KERNEL = "torch has no sparse kernel for convolutions"


class SparseLinear(nn.Module):
    """A linear layer ``y = x W^T + b`` that holds W's non-zeros row by row.

    ``values`` (a parameter) are the non-zeros, ``column_indices`` their columns, both [nonzeros];
    ``crow_indices`` [out_features + 1] says where each row begins. Whatever trains it trains the
    values: there is nothing at the zeros' places that could grow. ``weight`` is the dense matrix
    [out_features, in_features], made on each reading.

    Indices have 32 bits, as the kernels want them: 64 are converted on each call. The product is
    taken as ``W x`` (one input) or ``W X^T`` (several), with the sparse matrix on the left. In
    torch 2.15 ``x W^T`` with a CSR matrix on the right is tens of times slower, ``F.linear`` with a
    CSR weight goes through the inputs one by one, and 4 x 4 blocks (BSR) gain nothing where zeros
    come one by one.
    """

    crow_indices: Tensor
    column_indices: Tensor

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.weight.shape
        with warnings.catch_warnings():  # that CSR is in beta, said once by process
            warnings.simplefilter("ignore")
            csr = dense.weight.detach().to_sparse_csr()
        self.register_buffer("crow_indices", csr.crow_indices().int())
        self.register_buffer("column_indices", csr.col_indices().int())
        self.values = nn.Parameter(csr.values().clone(), dense.weight.requires_grad)
        self.bias = dense.bias
        self.train(dense.training)

    def _csr(self) -> Tensor:
        # The tensors were a CSR matrix's, so they need no checking: 2 microseconds remain.
        return torch.sparse_csr_tensor(
            self.crow_indices,
            self.column_indices,
            self.values,
            (self.out_features, self.in_features),
            check_invariants=False,
        )

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features]."""
        return self._csr().to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        rows, weight, bias = x.reshape(-1, self.in_features), self._csr(), self.bias  # [B, in]
        if len(rows) == 1:  # half the time of a product with a matrix of one column
            y = weight @ rows[0] if bias is None else torch.addmv(bias, weight, rows[0])  # [out]
        elif bias is None:
            y = (weight @ rows.t()).t()  # [B, out]
        else:
            y = torch.addmm(bias[:, None], weight, rows.t()).t()  # [B, out]
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and non-zeros, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nonzeros={self.values.numel()}"
        )


def sparse_layout(model: nn.Module, *, layers: Iterable[str] | None = None) -> nn.Module:
    """Return a copy of ``model`` whose linear layers keep and multiply their non-zeros alone (CSR).

    Masks are made permanent; the copy computes the same up to rounding, on the CPU and in float32
    or float64, and is an ordinary module: it has a state dict, it can be saved, and it trains (the
    non-zeros only). ``layers`` names the linear layers to convert; by default all of them are, and
    a warning names the layers with weights that stay dense. :func:`layouts` says it layer by layer.
    Convolutions stay dense: torch has no sparse kernel for them. So do linear layers inside
    ``nn.MultiheadAttention``, which reads their weights without calling them, those with hooks, and
    subclasses of ``nn.Linear``. A module that reads the ``weight`` of a converted layer without
    calling it gets a dense one: the same result, nothing gained.

    Whether anything is faster is a matter of size, sparsity, batch and threads: measure it. A
    non-zero takes 8 bytes (value and column) instead of 4, so at less than half zeros the layout is
    also larger.

    Raises:
        ValueError: no layer to convert, or ``layers`` with an unknown name or a layer that cannot
            be converted; weights that are not on the CPU in float32 or float64.
    """
    found = structure.prunable(model)
    if layers is None:
        chosen = [name for name, layer in found.items() if not _obstacle(layer)]
    else:
        chosen = list(layers)
        for name in chosen:
            if name not in found:
                near = difflib.get_close_matches(name, found, n=3) or list(found)[:3]
                raise ValueError(
                    f"The model has no linear layer {name!r}; near it are "
                    f"{', '.join(map(repr, near))}."
                )
            if _obstacle(found[name]):
                raise ValueError(
                    f"{name!r} cannot have a sparse layout: {_obstacle(found[name])}; leave it out."
                )
    if not chosen and layers is not None:
        raise ValueError("layers names no layer; name linear layers, or leave it out for all.")
    if not chosen:
        stays = "; ".join(f"{name!r} is dense: {_obstacle(layer)}" for name, layer in found.items())
        raise ValueError(
            "The model has no linear layer that could have a sparse layout "
            f"({stays or 'it has no layers with weights'})."
        )
    for name in chosen:
        weight: Any = found[name].weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name!r} has weights in {weight.dtype} on {weight.device}, and the sparse "
                "layout needs float32 or float64 on the CPU; call model.cpu().float() first."
            )
    dense = [name for name in found if name not in chosen]
    if dense and layers is None:
        reasons = {_obstacle(found[name]) for name in dense}
        warnings.warn(
            f"{len(dense)} of {len(found)} layers stay dense ({', '.join(dense)}): "
            f"{'; '.join(sorted(reasons))}.",
            stacklevel=2,
        )
    copied = masks.clone(model)
    masks.make_permanent(copied)
    modules = dict(copied.named_modules(remove_duplicate=False))
    made = {id(modules[name]): SparseLinear(modules[name]) for name in chosen}  # type: ignore[arg-type]
    for name, module in modules.items():  # under every name that a shared layer has
        if id(module) in made:
            if not name:
                return made[id(module)]
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, made[id(module)])
    return copied


def layouts(model: nn.Module) -> dict[str, str]:
    """Return how each convolution and linear layer of ``model`` keeps its weight, by name.

    "csr", or "dense" and, where :func:`sparse_layout` could not change that, why: "dense: torch
    has no sparse kernel for convolutions".
    """
    result: dict[str, str] = {}
    kinds = (SparseLinear, nn.Linear, nn.modules.conv._ConvNd)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            result[name] = "csr"
        elif isinstance(module, kinds):
            reason = _obstacle(module)
            result[name] = f"dense: {reason}" if reason else "dense"
    return result


def _obstacle(layer: nn.Module) -> str:
    """Why this layer cannot have a sparse layout, or nothing."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _NO_KERNEL
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the attention around it reads its weight without calling it"
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, not a plain nn.Linear"
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    if any(not isinstance(hook, prune.BasePruningMethod) for hook in hooks):
        return "it has hooks, which a new layer would lose"
    return ""
