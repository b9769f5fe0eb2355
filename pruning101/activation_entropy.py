"""Activations that hardly switch: measured by entropy, made linear, so that layers can merge.

A unit whose pre-activation nearly always has one sign acts as a linear one. The score of a layer is
the entropy of its units' states (:mod:`core.activation_states`), or its closed form from the norm
before it. The surgery puts an identity in the activation's place; weights may go with it. Each of
the four recipes then retrains, and folds what now is linear into fewer layers.

EASIER: Quétu, Liao and Tartaglione, The simpler the better, ECML PKDD 2024 (arXiv 2404.18949).
TLC: Liao et al., Till the layers collapse, AAAI 2025 (arXiv 2412.15077). EGP: Liao et al., Can
unstructured pruning reduce the depth in deep neural networks?, ICCV workshops 2023 (arXiv
2308.06619). NEPENTHE: Liao et al. 2024 (arXiv 2404.16890).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, cast

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor, nn

from pruning101.core import masks, runs
from pruning101.core.activation_states import Average, Moments, Origin, origins
from pruning101.core.activation_states import activation_moments as activation_moments
from pruning101.core.activation_states import layer_entropies as layer_entropies
from pruning101.core.data import Dataset
from pruning101.core.removals import Choice, remove_in_rounds, silence
from pruning101.core.removals import Removal as Removal
from pruning101.core.removals import RoundOptions as RoundOptions
from pruning101.core.removals import remove_activations as remove_activations
from pruning101.core.state_entropy import Zero, check_choice, norm_moments
from pruning101.core.state_entropy import binary_entropy as binary_entropy
from pruning101.core.state_entropy import error_likelihood as error_likelihood
from pruning101.core.state_entropy import norm_state_probability as norm_state_probability
from pruning101.core.state_entropy import state_entropy as state_entropy
from pruning101.core.state_entropy import state_error_likelihood as state_error_likelihood
from pruning101.core.state_entropy import state_probability as state_probability
from pruning101.layer_folding import fold

Ranking = Literal["likelihood", "loss_gap"]
_BATCH = 128  # images at a time; the mean of EGP's batches depends on it

# --- EASIER ------------------------------------------------------------------------------------


def easier(
    model: nn.Module,
    data: Dataset,
    *,
    removals: int | None = None,
    zero: Zero = "ignore",
    average: Average = "counts",
    **options: Unpack[RoundOptions],
) -> Iterator[Removal]:
    """Remove the activation of lowest entropy, retrain, and again, yielding a step for each.

    ``model`` is a trained network, and is left alone. Entropies are those of
    :func:`layer_entropies` over all of train (the published code averages over the batches of the
    last epoch, while weights move). Activations at exactly 0 go together with the lowest.
    Retraining goes on from the current weights, with all of ``epochs`` at ``lr``.

    ``options`` are those of :class:`RoundOptions`: ``epochs`` and ``lr``, and if wanted ``retrain``
    (more arguments of ``training.fit``), ``layers`` (which activations may go), ``tolerance``,
    ``seed`` and ``history``. The recipe ends after ``removals`` rounds, when no activation is left,
    or when accuracy on ``valid`` falls more than ``tolerance`` below the given model's: that last
    removal is not yielded. Activations that are functions, or one module called twice, are
    separated first, and have the names that ``core.slopes.separate_activations`` gives them.

    Source: Quétu, Liao and Tartaglione 2024, algorithm 1.

    Raises:
        ValueError: no activation, an unknown layer, options out of range, or a history begun with
            another model or other settings; all before any training.
    """
    check_choice("zero", zero, ("ignore", "on", "off"))
    check_choice("average", average, ("counts", "batches"))

    def choose(work: nn.Module, left: list[str], example: Tensor) -> Choice | None:
        batches = data.batches("train", _BATCH, device=runs.device_of(work))
        found = layer_entropies(work, batches, zero=zero, average=average, layers=left)
        if not found:
            return None
        lowest = min(found, key=lambda name: found[name])
        going = [name for name in found if name == lowest or found[name] == 0]
        remove_activations(work, going)
        return Choice(going, going, found, found)

    settings = {"recipe": "activation_entropy.easier", "zero": zero, "average": average}
    return remove_in_rounds(
        model, data, choose, _folded, limit=removals, settings=settings, **options
    )


# --- TLC ---------------------------------------------------------------------------------------


def tlc(
    model: nn.Module,
    data: Dataset,
    *,
    ranking: Ranking = "likelihood",
    removals: int | None = None,
    **options: Unpack[RoundOptions],
) -> Iterator[Removal]:
    """Linearise the layer that norms call the most predictable, retrain, and again.

    Each unit of an activation's input is taken as Gaussian: mean beta and deviation |gamma| of the
    norm before it, or, where there is none, those of the input over ``valid``. The units that are
    mostly off, with a mean below 0, give 0 from then on: the weights that make them are masked,
    gamma and beta (or the bias) are zeroed, and may grow again. Those that are mostly on go through
    an identity. After a residual sum, the norm is that of the branch.

    - ``ranking="likelihood"``, the paper's: the layer of smallest mean :func:`error_likelihood`.
    - ``"loss_gap"``, the published code's, which computes the closed form and does not use it: by
      how much the loss on the first batch of ``valid`` rises when the layer is linearised (a mean
      of exactly 0 counts as off). If some gap is negative, the n best are linearised together,
      n = 2, 3, ..., and the first n whose joint gap is positive goes (the set that already hurts);
      without such an n, or without a negative gap, the single best.

    All else is as in :func:`easier`.

    Source: Liao et al. 2025, section 3.

    Raises:
        ValueError: as :func:`easier`, or an unknown ranking.
    """
    check_choice("ranking", ranking, ("likelihood", "loss_gap"))

    def choose(work: nn.Module, left: list[str], example: Tensor) -> Choice | None:
        where = {name: o for name, o in origins(work, example).items() if name in left}
        moments = _moments(work, data, where)
        entropies, likelihoods = {}, {}
        for name, m in moments.items():
            probability = state_probability(m.mean, m.std)
            entropies[name] = float(binary_entropy(probability).mean())
            likelihoods[name] = float(state_error_likelihood(m.mean, m.std).mean())
        if not moments:
            return None

        def linearise(network: nn.Module, names: Sequence[str]) -> None:
            for name in names:
                mean = moments[name].mean
                off = mean <= 0 if ranking == "loss_gap" else mean < 0
                silence(network, where[name], off.to(runs.device_of(network)))
            remove_activations(network, names)

        scores = likelihoods
        if ranking == "loss_gap":
            scores, going = _by_loss_gap(work, data, list(moments), linearise)
        else:
            going = [min(scores, key=lambda name: scores[name])]
        linearise(work, going)
        return Choice(going, going, entropies, scores)

    settings = {"recipe": "activation_entropy.tlc", "ranking": ranking}
    return remove_in_rounds(
        model, data, choose, _folded, limit=removals, settings=settings, **options
    )


def _moments(model: nn.Module, data: Dataset, where: Mapping[str, Origin]) -> dict[str, Moments]:
    """Mean and deviation of each activation's input: its norm's, else counted on valid."""
    unknown = [name for name, origin in where.items() if origin.norm is None]
    counted = {}
    if unknown:
        batches = data.batches("valid", _BATCH, device=runs.device_of(model))
        counted = activation_moments(model, batches, layers=unknown)
    return {
        name: Moments(*norm_moments(model.get_submodule(origin.norm)))
        if origin.norm
        else counted[name]
        for name, origin in where.items()
    }


def _by_loss_gap(
    model: nn.Module,
    data: Dataset,
    names: Sequence[str],
    linearise: Callable[[nn.Module, Sequence[str]], None],
) -> tuple[dict[str, float], list[str]]:
    """How much each layer's linearisation raises the loss on one batch, and which of them go."""
    images, labels = next(iter(data.batches("valid", _BATCH, device=runs.device_of(model))))
    images = images.to(runs.dtype_of(model))

    def loss(linear: Sequence[str]) -> float:
        network = masks.clone(model).eval()
        linearise(network, linear)
        with torch.no_grad():
            value = float(F.cross_entropy(network(images), labels))
        return math.inf if math.isnan(value) else value

    before = loss([])
    gaps = {name: loss([name]) - before for name in names}
    best = sorted(gaps, key=lambda name: gaps[name])
    if gaps[best[0]] < 0:
        for n in range(2, len(best) + 1):
            if loss(best[:n]) > before:
                return gaps, best[:n]
    return gaps, best[:1]


# --- EGP and NEPENTHE --------------------------------------------------------------------------


def weight_budgets(
    importance: Mapping[str, float],
    alive: Mapping[str, int],
    budget: float,
    *,
    rounding: Literal["down", "exact"] = "exact",
) -> dict[str, int]:
    """Return how many of its ``alive`` weights each layer loses when all lose ``budget`` together.

    ``importance`` is I_l > 0, entropy times mean weight. A layer's share falls exponentially with
    it::

        R_l = sum_j I_j / I_l        n_l = budget * exp(R_l) / sum_j exp(R_j)

    A layer with fewer weights than its n_l loses them all, and what is left of the budget is shared
    among the others anew, until all have enough. Then n_l is rounded: ``"down"``, as EGP's code
    does, which removes up to a weight a layer less; or ``"exact"``, by largest remainders, so that
    the sum is ``round(budget)`` (or all there are, if that is less).

    Raises:
        ValueError: an importance that is not above 0, or a negative budget.
    """
    if any(not 0 < i < math.inf for i in importance.values()) or not 0 <= budget < math.inf:
        raise ValueError(
            f"importances must be finite and above 0 and the budget not negative; got "
            f"{dict(importance)} and {budget!r}."
        )
    left, emptied = dict(importance), {}
    budget = budget if rounding == "down" else round(budget)
    shares: dict[str, float] = {}
    while left:
        total = sum(left.values())
        irrelevance = {layer: total / i for layer, i in left.items()}
        highest = max(irrelevance.values())  # so that no exponential overflows
        weights = {layer: math.exp(r - highest) for layer, r in irrelevance.items()}
        scale = budget / sum(weights.values())
        shares = {layer: scale * w for layer, w in weights.items()}
        short = [layer for layer in left if alive[layer] < shares[layer]]
        if not short:
            break
        for layer in short:
            emptied[layer] = alive[layer]
            budget -= alive[layer]
            del left[layer], shares[layer]
    numbers = {layer: math.floor(share) for layer, share in shares.items()}
    if rounding == "exact" and numbers:
        rest = round(budget) - sum(numbers.values())
        by_remainder = sorted(numbers, key=lambda layer: numbers[layer] - shares[layer])
        for layer in by_remainder[:rest]:
            numbers[layer] += 1
    return {layer: (emptied | numbers)[layer] for layer in importance}


def _mask_smallest(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Mask, in place, that many of each layer's non-zero weights: the smallest."""
    new: dict[str, BoolTensor] = {}
    for layer, count in counts.items():
        weight = cast(Tensor, model.get_submodule(layer).weight).detach()
        gone = weight.numel() - int(weight.count_nonzero()) + count
        name = f"{layer}.weight"
        new |= masks.from_scores({name: weight.abs()}, gone / weight.numel())
    masks.apply(model, new)


def egp(
    model: nn.Module,
    data: Dataset,
    *,
    rounds: int = 9,
    rate: float = 0.5,
    **options: Unpack[RoundOptions],
) -> Iterator[Removal]:
    """Prune weights where entropy is low, until layers are empty and lose their activation.

    Candidates are the convolutions and linear layers that feed an activation of entropy above 0,
    and have non-zero weights left. Each round removes the share ``rate`` of all their weights by
    :func:`weight_budgets`, with importance I_l = H_l * mean |w_l| over the non-zero weights and
    numbers rounded down; in a layer the smallest go. H_l is as the published code has it: z = 0 is
    OFF, units that never switch are left out, and the batches of train are averaged. An emptied
    layer's activation becomes an identity.

    ``Removal.removed`` is the number of weights, ``scores`` is I_l by layer. All else is as in
    :func:`easier`; it also ends when no candidate is left.

    Source: Liao et al. 2023, section 3.

    Raises:
        ValueError: as :func:`easier`, or a rate outside (0, 1].
    """
    counting = {"zero": "off", "exclude_saturated": True, "average": "batches"}
    return _by_budget("egp", model, data, rounds, rate, counting, "down", options)


def nepenthe(
    model: nn.Module,
    data: Dataset,
    *,
    rounds: int = 9,
    rate: float = 0.5,
    **options: Unpack[RoundOptions],
) -> Iterator[Removal]:
    """Prune as :func:`egp` does, with three states, all of train at once, and exact budgets.

    NEPENTHE-style: there is no published code, and what is known of the paper is that z = 0 is a
    state of its own and left out, that every unit counts, and that layers of zero entropy go. So an
    activation at exactly 0 becomes an identity, too, and the numbers of weights add up to
    ``round(rate * alive)``.

    Source: Liao et al. 2024.

    Raises:
        ValueError: as :func:`egp`.
    """
    counting = {"zero": "ignore", "exclude_saturated": False, "average": "counts"}
    return _by_budget("nepenthe", model, data, rounds, rate, counting, "exact", options)


def _by_budget(
    recipe: str,
    model: nn.Module,
    data: Dataset,
    rounds: int,
    rate: float,
    counting: Mapping[str, Any],
    rounding: Literal["down", "exact"],
    options: RoundOptions,
) -> Iterator[Removal]:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ValueError(f"rate must be a share in (0, 1], not {rate!r}.")

    def choose(work: nn.Module, left: list[str], example: Tensor) -> Choice | None:
        batches = data.batches("train", _BATCH, device=runs.device_of(work))
        entropies = layer_entropies(work, batches, layers=left, **counting)
        made_by = {name: origin.layer for name, origin in origins(work, example).items()}
        masks.refresh(work)
        alive, importance, acting = {}, {}, {}
        for name, entropy in entropies.items():
            layer = made_by[name]
            if layer is None or layer in acting or entropy == 0:
                continue
            weight = cast(Tensor, work.get_submodule(layer).weight).detach()
            count = int(weight.count_nonzero())
            if count:
                mean = float(weight.abs().sum(dtype=torch.float64)) / count
                alive[layer], importance[layer], acting[layer] = count, entropy * mean, name
        numbers = weight_budgets(importance, alive, rate * sum(alive.values()), rounding=rounding)
        _mask_smallest(work, numbers)
        going = [acting[layer] for layer, n in numbers.items() if n == alive[layer]]
        if rounding == "exact":  # NEPENTHE lets a layer go that never switches, full as it is
            going += [name for name, entropy in entropies.items() if entropy == 0]
        if not going and not any(numbers.values()):
            return None
        remove_activations(work, going)
        return Choice(sum(numbers.values()), going, entropies, importance)

    settings = {"recipe": f"activation_entropy.{recipe}", "rate": rate}
    return remove_in_rounds(
        model, data, choose, _folded, limit=rounds, settings=settings, **options
    )


def _folded(model: nn.Module, example: Tensor) -> nn.Module:
    return fold(model, example, inplace=True).model
