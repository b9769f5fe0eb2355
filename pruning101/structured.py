"""Structured pruning: whole filters, channels and heads go, and the network really gets smaller.

Channels that are added up, concatenated or normalised together can only go together: the groups are
those of Fang et al., DepGraph: towards any structural pruning, CVPR 2023 (arXiv 2301.12900). How
important a group's channels are is a sum of norms (Li et al., Pruning filters for efficient
ConvNets, ICLR 2017, arXiv 1608.08710, for one layer; DepGraph, section 3.3, for a group).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pruning101.core import channels, masks, runs, structure
from pruning101.core.channels import ChannelGroup, Member
from pruning101.core.data import Dataset
from pruning101.core.gradients import gradients as gradients
from pruning101.core.semi_structured import semi_structured as semi_structured
from pruning101.core.semi_structured import to_semi_structured as to_semi_structured
from pruning101.core.steps import History, Step, measured
from pruning101.core.tracing import Example
from pruning101.core.training import fit
from pruning101.core.zeroed_channels import materialise as materialise
from pruning101.sensitivity import lobster as lobster
from pruning101.sensitivity import neuron_sensitivity as neuron_sensitivity
from pruning101.sensitivity import prune_within as prune_within
from pruning101.sensitivity import regularise_and_prune as regularise_and_prune
from pruning101.sensitivity import serene as serene

Kind = Literal["l1", "l2", "linf", "taylor", "batch_norm", "random"]
Scope = Literal["group", "global"]
GroupScores = Mapping[str, Tensor] | Callable[[ChannelGroup, nn.Module], Tensor]

# --- scores ------------------------------------------------------------------------------------


def filter_norms(model: nn.Module, *, p: float = 1) -> dict[str, Tensor]:
    """Return the norm ``(sum |w| ** p) ** (1 / p)`` of each filter or unit, by layer name: [out].

    Of every convolution and linear layer, over its incoming weights, without the bias; p = 1 is
    Li et al. 2017, ``p=math.inf`` the largest weight. Masked weights count as the zeros they are.
    """
    masks.refresh(model)
    norms = {}
    for name, layer in structure.prunable(model).items():
        weight = cast(Tensor, layer.weight).detach()
        if getattr(layer, "transposed", False):
            groups = cast(int, layer.groups)
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        norms[name] = torch.linalg.vector_norm(weight.flatten(1), p, dim=1)
    return norms


@torch.no_grad()
def group_importance(
    group: ChannelGroup,
    model: nn.Module,
    *,
    kind: Kind = "l1",
    reduce: Literal["mean", "sum", "max"] = "mean",
    gradients: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    normalise: bool = True,
) -> Tensor:
    """Return how important each channel of a group is: [channels].

    For each layer l of the group a sum over the weights that belong to channel k there, its rows
    in the layers that make it and its columns in those that read it::

        I_l(k) = sum_i |w_i| ** p        p = 1 for "l1", 2 for "l2" (no root is taken)
                 max_i |w_i|             "linf"
                 sum_i |w_i * g_i|       "taylor"
        I(k)   = mean_l I_l(k)           (or the sum, or the largest)
        I(k)  /= mean_k I(k)             with ``normalise``, so that groups can be compared

    Convolutions (depthwise ones, too), linear layers and attention's projections take part; norms,
    biases and single parameters do not. "batch_norm" is |gamma| of the group's batch norms alone
    (Liu et al. 2017, arXiv 1708.06519). "random" is uniform in [0, 1), from ``seed`` and the
    group's name.

    In "taylor" ``gradients`` are those of :func:`gradients`, and the absolute value is that of each
    weight's w * g, before the sum, as Torch-Pruning and Theus et al. 2024 have it; Molchanov et al.
    2019 (arXiv 1906.10771) sum first, so that what one weight gains another can undo.

    Raises:
        ValueError: an unknown kind, no gradients for "taylor", or a group without batch norms.
    """
    if kind == "random":
        generator = torch.Generator().manual_seed(runs.derive(seed, *group.name.encode()))
        return torch.rand(group.channels, generator=generator)
    per_layer = [
        _per_channel(group, member, values, largest=kind == "linf")
        for member in group.members
        if (values := _values(model, member, kind, gradients)) is not None
    ]
    if not per_layer:
        raise ValueError(
            f"No layer of the group {group.name!r} has what kind={kind!r} looks at; choose another "
            "kind, or restrict the layers."
        )
    stacked = torch.stack(per_layer)  # [layers, channels]
    if reduce == "max":
        importance = stacked.max(0).values
    elif reduce in ("mean", "sum"):
        importance = stacked.mean(0) if reduce == "mean" else stacked.sum(0)
    else:
        raise ValueError(f'reduce must be "mean", "sum" or "max", not {reduce!r}.')
    mean = importance.mean()
    return importance / mean if normalise and mean > 0 else importance


def _values(
    model: nn.Module, member: Member, kind: str, gradients: Mapping[str, Tensor] | None
) -> Tensor | None:
    """What ``kind`` sums over a channel's weights in one layer; None if the layer has no part."""
    if kind == "batch_norm":
        module = model.get_submodule(member.layer) if member.role == "norm" else None
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
        return cast(Tensor, cast(Any, module).weight).abs() if is_norm else None
    if member.role not in ("out", "in", "depthwise"):
        return None
    weight = channels.member_weight(model, member)
    if kind in ("l1", "linf"):
        return weight.abs()
    if kind == "l2":
        return weight.abs().pow(2)
    if kind == "taylor":
        if gradients is None:
            raise ValueError('kind="taylor" needs gradients; make them with gradients(...).')
        name = next(name for name, p in model.named_parameters() if p is weight)
        if name not in gradients:
            raise ValueError(f"gradients hold none of {name!r}; make them with gradients(...).")
        return (weight * gradients[name].to(weight.device)).abs()
    raise ValueError(
        f'kind must be "l1", "l2", "linf", "taylor", "batch_norm" or "random", not {kind!r}.'
    )


def _per_channel(group: ChannelGroup, member: Member, values: Tensor, *, largest: bool) -> Tensor:
    """Gather a layer's values by the group's channels: [channels]."""
    axis = 0 if member.axis is None else member.axis
    rows = values.transpose(0, axis).reshape(values.shape[axis], -1)  # [positions, weights]
    each = rows.max(1).values if largest else rows.sum(1)
    index, channel = member.index.to(each.device), member.channel.to(each.device)
    return each.new_zeros(group.channels).scatter_reduce(
        0, channel, each[index], "amax" if largest else "sum"
    )


# --- surgery -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunedChannels:
    """What :func:`prune_channels` did.

    ``model`` is the smaller network; ``kept`` holds for each group the positions (int64, ascending,
    in the old numbering) of the channels that stayed, ``removed`` the number of those that went;
    ``skipped`` says for every other layer why its channels stay, and for a group why it kept one
    channel more than its scores would have.
    """

    model: nn.Module
    kept: dict[str, Tensor]
    removed: dict[str, int]
    skipped: dict[str, str]


def prune_channels(
    model: nn.Module,
    example: Example,
    sparsity: float | Mapping[str, float],
    *,
    scores: GroupScores | None = None,
    scope: Scope = "group",
    layers: Iterable[str] | None = None,
    inplace: bool = True,
) -> PrunedChannels:
    """Take the share ``sparsity`` of all channels out of ``model`` in place, those scored lowest.

    What goes is one channel of a whole group (see ``structure.channel_groups``): hidden units,
    channels of a residual stream, and heads of attention. With ``scope="group"`` each group loses
    exactly ``round(sparsity * n)`` of its n channels, with ``"global"`` all groups compete and that
    is the count over all of them; among equals the lower position goes first. One channel of
    every group stays in any case, and ``skipped`` says where that made a difference. ``sparsity``
    may be one number a group, by its name; groups left out stay whole then.

    ``scores`` is a tensor [channels] for each group, by its name, or a function of group and model
    that gives one; by default :func:`group_importance`. ``layers`` restricts all this to the groups
    of these layers. ``inplace=False`` works on a copy.

    On convolutional networks the result computes what the dense one does with those channels at
    zero, to rounding; ``LayerNorm`` over a pruned stream sees fewer channels, and does not.
    Parameters are new tensors afterwards: an optimiser made before holds the old ones and must be
    made anew, gradients are cut along, hooks on parameters are gone, weights that layers shared are
    each layer's own, and an ``nn.MultiheadAttention`` has become a
    ``core.attention.NarrowAttention``.

    Raises:
        ValueError: a sparsity out of range or one that leaves a group nothing, scores that do not
            fit, unknown layers or such whose channels must stay, nothing that could be pruned, a
            masked model, or one that cannot be traced; the model is unchanged.
    """
    if scope not in ("group", "global"):
        raise ValueError(f'scope must be "group" or "global", not {scope!r}.')
    if isinstance(sparsity, Mapping) and scope == "global":
        raise ValueError('One sparsity a group needs scope="group"; in "global" they compete.')
    for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(
                f"sparsity must be a share in [0, 1), not {share!r}: a group cannot lose its last."
            )
    if not inplace:
        model = masks.clone(model)
    found = channels.coupling(model, example, layers=layers)
    skipped = {name: f"Its channels stay: {reason}." for name, reason in found.fixed.items()}
    if skipped and (layers is not None or not found.groups):
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{name!r} cannot be pruned. {reason}")
    if not found.groups:
        raise ValueError(f"{type(model).__name__} has no channels that could be pruned.")
    by_group = _checked(found.groups, model, group_importance if scores is None else scores)
    if isinstance(sparsity, Mapping):
        _check_names(sparsity, by_group)
        shares = {name: sparsity.get(name, 0.0) for name in by_group}
        keep = {n: _kept_channels({n: by_group[n]}, shares[n], "group", skipped)[n] for n in shares}
    else:
        keep = _kept_channels(by_group, sparsity, scope, skipped)
    gone = {name: (~mask).nonzero().squeeze(1) for name, mask in keep.items()}
    if any(map(len, gone.values())):
        channels.remove_from_groups(model, found, gone, example)
    return PrunedChannels(
        model,
        kept={name: mask.nonzero().squeeze(1) for name, mask in keep.items()},
        removed={name: len(positions) for name, positions in gone.items()},
        skipped=skipped,
    )


def _checked(
    groups: list[ChannelGroup], model: nn.Module, scores: GroupScores
) -> dict[str, Tensor]:
    """The scores of each group, by its name, on the CPU."""
    names = [group.name for group in groups]
    if callable(scores):
        given = {group.name: scores(group, model) for group in groups}
    else:
        if not isinstance(scores, Mapping):
            raise ValueError(
                "scores must hold a tensor for each group, by its name, or be a function of group "
                f"and model, not {scores!r} (group_importance is one; partial sets its kind)."
            )
        given = dict(scores)
    for group in groups:
        if group.name not in given:
            raise ValueError(
                f"There are no scores for the group {group.name!r}; the groups are "
                f"{', '.join(names)} (layers=[...] restricts them)."
            )
        score = given[group.name]
        if not isinstance(score, Tensor) or score.shape != (group.channels,):
            what = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"value {score}"
            raise ValueError(
                f"The scores of {group.name!r} have {what}, but it has {group.channels} channels."
            )
    _check_names(given, names)
    return {name: given[name].detach().cpu() for name in names}


def _check_names(given: Iterable[str], groups: Iterable[str]) -> None:
    groups = list(groups)
    for name in given:
        if name not in groups:
            raise ValueError(f"{name!r} is no group; the groups are {', '.join(groups)}.")


def _kept_channels(
    scores: dict[str, Tensor], sparsity: float, scope: Scope, skipped: dict[str, str]
) -> dict[str, Tensor]:
    """Which channels stay, as a mask for each group; notes where the last one was spared."""
    total = sum(len(score) for score in scores.values())
    if scope == "global" and round(sparsity * total) > total - len(scores):
        raise ValueError(
            f"sparsity {sparsity} would take {round(sparsity * total)} of {total} channels, but "
            f"each of the {len(scores)} groups keeps one; ask for less."
        )
    cut_scope: Literal["global", "layer"] = "global" if scope == "global" else "layer"
    keep: dict[str, Tensor] = dict(masks.from_scores(scores, sparsity, scope=cut_scope))
    emptied = [name for name, mask in keep.items() if not bool(mask.any())]
    if emptied:
        # The best of each group goes last of all, so that the count stays exact where it can.
        best = {n: int((score == score.max()).nonzero()[-1]) for n, score in scores.items()}
        spared = {
            n: score.double().index_fill(0, torch.tensor(best[n]), math.inf)
            for n, score in scores.items()
        }
        keep = dict(masks.from_scores(spared, sparsity, scope=cut_scope))
        for name in emptied:
            keep[name][best[name]] = True
            skipped[name] = "One channel stays: a group cannot lose its last."
    return keep


# --- the recipe --------------------------------------------------------------------------------


def prune_iteratively(
    model: nn.Module,
    data: Dataset,
    *,
    sparsity: float = 0.5,
    rounds: int = 4,
    scope: Scope = "group",
    scores: Callable[[ChannelGroup, nn.Module], Tensor] = group_importance,
    layers: Iterable[str] | None = None,
    epochs: int = 4,
    lr: float = 0.01,
    retrain: Mapping[str, Any] | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[Step]:
    """Prune channels and retrain in ``rounds``, yielding a ``Step`` after each.

    ``model`` is a trained network without masks, and is left alone. Every round removes the same
    share of the channels that are left: after round r of R, ``(1 - sparsity) ** (r / R)`` of those
    at the start are there, of each group (``scope="group"``) or of all together. The lowest
    ``scores(group, model)`` go first. What stays goes on from its trained values, for ``epochs`` at
    ``lr``; ``epochs=0`` measures without retraining. ``retrain`` holds further arguments of
    ``training.fit``. Each round's seed follows from ``seed`` and its index, so that a ``history``
    with steps goes on as if never interrupted.

    ``Step.removed`` maps each group's name to the number of channels that the round removed.

    Raises:
        ValueError: values out of range, unknown layers or such whose channels must stay, a model
            that :func:`prune_channels` refuses, or a history begun with other settings.
    """
    if not type(rounds) is type(epochs) is int or rounds < 1 or epochs < 0:
        raise ValueError(f"rounds must be at least 1 and epochs at least 0, got {rounds}, {epochs}")
    if isinstance(sparsity, Mapping) or not callable(scores):
        raise ValueError(
            f"rounds need one number and a function of group and model: {sparsity=}, {scores=}"
        )
    if own := {"epochs", "lr", "seed"} & set(retrain or {}):
        raise ValueError(f"{min(own)!r} is an argument of its own; take it out of retrain")
    layers = None if layers is None else list(layers)
    images, _ = next(iter(data.batches("valid", 1, device=runs.device_of(model))))
    example = images.to(runs.dtype_of(model))
    # On a copy that is thrown away: this raises what there is to raise, and counts the channels.
    trial = prune_channels(
        model, example, sparsity, scope=scope, scores=_equal, layers=layers, inplace=False
    )
    start = {name: len(kept) + trial.removed[name] for name, kept in trial.kept.items()}
    history = History() if history is None else history
    history.bind(
        recipe="structured.prune_iteratively",
        sparsity=sparsity,
        rounds=rounds,
        scope=scope,
        scores=scores,
        layers=layers,
        epochs=epochs,
        lr=lr,
        retrain=dict(retrain or {}),
        seed=seed,
    )

    def run() -> Iterator[Step]:
        work = history.latest(model)
        for index in range(len(history) + 1, rounds + 1):
            begin = time.perf_counter()
            gone = 1 - (1 - sparsity) ** (index / rounds)
            left = dict(start)
            for step in history:
                left = {name: n - step.removed.get(name, 0) for name, n in left.items()}
            share: float | dict[str, float]
            if scope == "global":
                total = sum(left.values())
                share = (total - sum(start.values()) + round(gone * sum(start.values()))) / total
            else:
                share = {n: (left[n] - start[n] + round(gone * start[n])) / left[n] for n in start}
                share = {n: min(s, 1 - 1 / left[n]) for n, s in share.items()}
            pruned = prune_channels(work, example, share, scores=scores, scope=scope, layers=layers)
            if epochs:
                options: dict[str, Any] = {"progress": False, **(retrain or {})}
                fit(work, data, epochs=epochs, lr=lr, seed=1000 * seed + index, **options)
            seconds = time.perf_counter() - begin
            step = measured(index, pruned.removed, work, data, seconds=seconds)
            history.append(step)
            yield step

    return run()


def _equal(group: ChannelGroup, model: nn.Module) -> Tensor:
    return torch.zeros(group.channels)
