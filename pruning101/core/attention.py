"""Attention with any number of heads: what an attention layer is once some heads are gone."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowAttention(nn.Module):
    """``nn.MultiheadAttention`` whose heads need not add up to the width of the embedding.

    There, ``heads * head_dim == embed_dim`` always; here queries, keys and values have ``inner =
    heads * head_dim`` features of their own, so that a head can go while the embedding stays, or
    the other way round. Parameters (``in_proj_weight`` [3 * inner, embed_dim], ``out_proj``),
    arguments and results are those of ``nn.MultiheadAttention``.
    """

    # nn.TransformerEncoderLayer would otherwise hand the weights to a kernel that knows only
    # heads * head_dim == embed_dim.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        inner: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dropout, self.batch_first = dropout, batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    @classmethod
    def like(cls, attention: nn.MultiheadAttention) -> "NarrowAttention":
        """Return the same attention in this form, with the very parameters of ``attention``."""
        width = attention.embed_dim
        with torch.device("meta"):  # nothing is drawn: the parameters are about to be replaced
            same = cls(width, width, attention.num_heads, bias=attention.in_proj_bias is not None)
        same.dropout, same.batch_first = attention.dropout, attention.batch_first
        same.in_proj_weight = attention.in_proj_weight
        same.in_proj_bias = attention.in_proj_bias
        same.out_proj.weight, same.out_proj.bias = (
            attention.out_proj.weight,
            attention.out_proj.bias,
        )
        same.out_proj.train(attention.out_proj.training)
        same.training = attention.training
        return same

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] (or [T, B, D], or [T, D]) to the same and to the weights, if asked for.

        As in ``nn.MultiheadAttention``: True in a mask means "not to be looked at", numbers are
        added to the products, and ``is_causal`` only says what ``attn_mask`` looks like.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True only describes attn_mask; pass the mask itself, too.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        weights = self.in_proj_weight.chunk(3)  # each [heads * d, D]
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        split = (self.num_heads, -1)
        q = F.linear(query, weights[0], biases[0]).unflatten(2, split).transpose(1, 2)
        k = F.linear(key, weights[1], biases[1]).unflatten(2, split).transpose(1, 2)
        v = F.linear(value, weights[2], biases[2]).unflatten(2, split).transpose(1, 2)

        mask = self._joint_mask(q, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        looked: Tensor | None = None
        if need_weights:
            products = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # [B, heads, T, S]
            if mask is not None:
                products = products + mask
            looked = F.dropout(products.softmax(3), dropout, self.training)
            mixed = looked @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B, T, D]

        if looked is not None and average_attn_weights:
            looked = looked.mean(1)
        if not batched:
            return result.squeeze(0), None if looked is None else looked.squeeze(0)
        return (result if self.batch_first else result.transpose(0, 1)), looked

    def _joint_mask(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one to be added to the products [B, heads, T, S]."""
        mask: Tensor | None = None
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            if mask.dim() == 3:  # one for each head of each input: [B * heads, T, S]
                mask = mask.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[:, None, None, :]  # [B, 1, 1, S]
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        """Say the widths: of the embedding, and of all heads together."""
        inner = self.out_proj.in_features
        return f"embed_dim={self.embed_dim}, inner={inner}, num_heads={self.num_heads}"


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of either kind as numbers to add."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.to(like.dtype)


@dataclass(frozen=True)
class Heads:
    """Where an attention layer keeps its heads, which lie one after another.

    ``given`` names the child that makes queries, keys and values, in this order (empty where they
    are bare parameters of the layer itself), ``mixed`` the child that reads what they give;
    ``inner`` is the number of features of all ``number`` heads together.
    """

    number: int
    inner: int
    given: str
    mixed: str


_KNOWN_PARTS = {"qkv", "proj", "q_norm", "k_norm", "attn_drop", "norm", "proj_drop", "softmax"}


def heads_of(module: nn.Module) -> Heads | None:
    """Return where ``module`` keeps its heads, or None if it is no attention that we know.

    Known are ``nn.MultiheadAttention`` (one width for all its inputs, no extra key), our form of
    it, and layers made of two linear ones named ``qkv`` and ``proj`` as our and timm's ViT have
    them; other parameters (relative positions, gates) make it one that we do not know.
    """
    if isinstance(module, nn.MultiheadAttention):
        plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        return Heads(module.num_heads, module.embed_dim, "", "out_proj") if plain else None
    if isinstance(module, NarrowAttention):
        return Heads(module.num_heads, module.out_proj.in_features, "", "out_proj")
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    number = vars(module).get("num_heads", vars(module).get("heads"))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and type(number) is int):
        return None
    parts = {name for name, child in module.named_children() if child is not None}
    norm = getattr(module, "norm", None)
    known = (
        parts <= _KNOWN_PARTS
        and not list(module.parameters(recurse=False))
        and (norm is None or isinstance(norm, nn.Identity))
        and qkv.out_features == 3 * proj.in_features
        and qkv.in_features == proj.out_features
        and proj.in_features % number == 0
    )
    return Heads(number, proj.in_features, "qkv", "proj") if known else None


def set_heads(module: nn.Module, number: int, inner: int) -> None:
    """Write a new number of heads, and their width, wherever the layer notes them."""
    for name, value in (("num_heads", number), ("heads", number), ("attn_dim", inner)):
        if name in vars(module):
            setattr(module, name, value)


def attention_layers(model: nn.Module) -> dict[str, Heads]:
    """Return the attention layers whose heads we know, by name; a class counts only as a whole."""
    found = {name: heads_of(module) for name, module in model.named_modules()}
    types = {n: type(model.get_submodule(n)) for n in found}
    known = {types[n] for n, heads in found.items() if heads is not None}
    known -= {types[n] for n, heads in found.items() if heads is None}
    return {n: heads for n, heads in found.items() if heads is not None and types[n] in known}


@contextmanager
def handed_on(model: nn.Module, heads: Iterable[str]) -> Iterator[None]:
    """Let these attention layers hand on their inputs as they are, inside the block.

    What follows channels then sees each channel of the embedding as one, and nothing of the heads.
    """

    def hand_on(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        return tokens * 1

    def hand_on_all(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        result = query * 1
        for other in (key, value):
            if other is not query:  # cross attention: the embedding is one for both
                result = result + other.flatten(0, -2).mean(0)
        return result, None

    modules = [model.get_submodule(name) for name in heads]
    kept = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            several = isinstance(module, nn.MultiheadAttention | NarrowAttention)
            vars(module)["forward"] = hand_on_all if several else hand_on
        yield
    finally:
        for module, forward in zip(modules, kept, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def one_layer() -> Any:
    """Return how Torch-Pruning is to see attention: its output has the channels of its input."""
    from torch_pruning.pruner.function import BasePruningFunc

    class WholeAttention(BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            raise NotImplementedError("channels are cut by surgery.keep_only")

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            heads = heads_of(layer)
            assert heads is not None
            mixed = layer.get_submodule(heads.mixed)
            assert isinstance(mixed, nn.Linear)
            return mixed.out_features

        get_in_channels = get_out_channels

    return WholeAttention()
