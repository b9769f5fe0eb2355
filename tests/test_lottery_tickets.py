"""Lottery tickets: counts, rewinding, resuming, controls, and the line between two networks."""

import itertools
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruning101 import lottery_tickets
from pruning101.core import masks, models, runs, trajectories
from pruning101.core.data import load
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit
from pruning101.lottery_tickets import (
    find_ticket,
    gaussian_glorot,
    instability,
    interpolate,
    masks_after_round,
    random_reinitialisation,
    random_ticket,
    reset_parameters,
    sign_ticket,
    train,
)

QUICK = {"iterations": 24, "batch_size": 32, "evaluate_every": 10, "progress": False}


def mlp(seed: int = 0, *, extra: bool = False) -> nn.Sequential:
    """64-24-16-10, with a batch norm and dropout if ``extra``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = OrderedDict[str, nn.Module](flatten=nn.Flatten(), fc1=nn.Linear(64, 24))
        if extra:
            layers |= {"norm": nn.BatchNorm1d(24), "dropout": nn.Dropout(0.3)}
        layers |= {"relu": nn.ReLU(), "fc2": nn.Linear(24, 16), "relu2": nn.ReLU()}
        layers["fc3"] = nn.Linear(16, 10)
        return nn.Sequential(layers)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def trained_to(model: nn.Module, data, seed: int, step: int) -> nn.Module:
    """The network after so many steps of a plain, longer ``fit``."""
    work, seen = masks.clone(model), []

    def keep(m: nn.Module) -> None:
        seen.append(state(m))

    fit(
        work,
        data,
        epochs=3,
        lr=1.2e-3,
        optimizer="adam",
        batch_size=32,
        seed=seed,
        after_step=keep,
        progress=False,
    )
    work.load_state_dict(seen[step - 1])
    masks.refresh(work)
    return work


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=400, valid=100, test=100)


@pytest.fixture(scope="module")
def searched(digits):
    """A search of three rounds with rewinding to iteration 7, uninterrupted."""
    network = mlp(extra=True)
    found = list(find_ticket(network, digits, rounds=3, rate=0.4, rewind_to=7, **QUICK))
    return network, found


# --- one training ------------------------------------------------------------------------------


def test_a_training_is_that_of_fit_cut_off_and_measured(digits):
    network = mlp(extra=True)
    before, random_state = state(network), torch.get_rng_state()
    run = train(network, digits, seed=3, **QUICK)
    assert run.iterations == (0, 10, 20, 24)
    for i, step in enumerate(run.iterations):
        there = trained_to(network, digits, 3, step) if step else network
        valid, test = evaluate(there, digits, "valid"), evaluate(there, digits, "test")
        assert (run.valid_loss[i], run.valid_accuracy[i]) == (valid.loss, valid.accuracy)
        assert run.test_accuracy[i] == test.accuracy
    assert same(run.model, there)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(network).items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in run.model.parameters())


def test_measuring_often_changes_nothing(digits):
    network = mlp(extra=True)  # its norm and its dropout would notice
    often = train(network, digits, **QUICK | {"evaluate_every": 1})
    assert len(often.iterations) == 25
    assert same(often.model, train(network, digits, **QUICK).model)


def test_masked_weights_stay_zero(digits):
    network = mlp()
    masks.apply(network, masks_after_round(network, 0.5))
    run = train(network, digits, options={"weight_decay": 0.1}, **QUICK)
    kept = masks.masks_of(network)
    for name, mask in kept.items():
        weight = run.model.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(weight != 0, mask)


def test_early_stop_is_the_first_least_validation_loss():
    run = lottery_tickets.Run(
        nn.Identity(), (0, 10, 20, 30), (3.0, 1.0, 1.0, 2.0), (0.1,) * 4, (0.2, 0.5, 0.6, 0.9)
    )
    assert (run.early_stop, run.accuracy_at_early_stop) == (10, 0.5)


# --- how many go, and which --------------------------------------------------------------------


def test_the_densities_of_the_paper():
    network = models.build("lenet_300_100", in_channels=1, image_size=28)
    rates = {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}
    densities = []
    for _ in range(18):
        kept = masks_after_round(network, rates)
        masks.apply(network, kept)
        total = sum(mask.numel() for mask in kept.values())
        densities.append(round(100 * sum(int(mask.sum()) for mask in kept.values()) / total, 1))
    assert densities == [
        *(80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6),
        *(2.9, 2.3, 1.9),
    ]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rounds_remove_what_torch_removes(scope):
    ours, theirs = mlp(), mlp()
    layers = {"fc1": theirs.fc1, "fc2": theirs.fc2, "fc3": theirs.fc3}
    for _ in range(4):
        before = masks.masks_of(ours)
        alive = {
            n: int(before[f"{n}.weight"].sum()) if before else m.weight.numel()
            for n, m in layers.items()
        }
        masks.apply(ours, masks_after_round(ours, 0.3, scope=scope))
        if scope == "layer":
            for name, layer in layers.items():
                prune.l1_unstructured(layer, "weight", amount=round(0.3 * alive[name]))
        else:
            prune.global_unstructured(
                [(layer, "weight") for layer in layers.values()],
                pruning_method=prune.L1Unstructured,
                amount=round(0.3 * sum(alive.values())),
            )
        for name, mask in masks.masks_of(ours).items():
            assert torch.equal(mask, layers[name.removesuffix(".weight")].weight_mask != 0), name


def test_what_is_gone_stays_gone_among_survivors_that_are_zero():
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0, 5.0, 1.0]]))
    masks.apply(layer, {"weight": torch.tensor([[True, True, False, True]])})
    kept = masks_after_round(nn.Sequential(layer), 1 / 3)
    assert kept["0.weight"].tolist() == [[False, True, False, True]]


def test_a_rate_by_layer_leaves_the_others_whole():
    kept = masks_after_round(mlp(), {"fc2": 0.25})
    assert {name: int((~mask).sum()) for name, mask in kept.items()} == {
        "fc1.weight": 0,
        "fc2.weight": 96,
        "fc3.weight": 0,
    }


class Backwards(nn.Module):
    """Defines its output layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 10), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.flatten(1)).relu())


@pytest.mark.parametrize(
    ("how", "removed"),
    [
        ({"rate": 0.5}, {"head": 20, "body": 256}),
        ({"rate": 0.5, "output_rate": 0.1}, {"head": 8, "body": 256}),
        ({"rate": {"body": 0.5}}, {"head": 0, "body": 256}),
        ({"rate": {"body": 0.5, "head": 0.2}}, {"head": 16, "body": 256}),
        ({"rate": 0.5, "output_rate": 0, "scope": "global"}, {"head": 0, "body": 256}),
    ],
)
def test_the_output_layer_is_the_last_to_run(digits, how, removed):
    *_, ticket = find_ticket(Backwards(), digits, rounds=1, **how, **QUICK)
    kept = masks.masks_of(ticket.ticket)
    assert {n: int((~kept[f"{n}.weight"]).sum()) for n in ("head", "body")} == removed
    assert ticket.removed == sum(removed.values())
    assert ticket.density == 1 - ticket.removed / (80 + 512)


# --- the search --------------------------------------------------------------------------------


def test_round_zero_is_the_dense_network_and_theta_lies_on_its_way(digits, searched):
    network, found = searched
    dense = found[0]
    assert (dense.index, dense.removed, dense.density) == (0, 0, 1.0)
    assert same(dense.model, trained_to(network, digits, 0, 24))
    assert same(dense.ticket, trained_to(network, digits, 0, 7))
    assert dense.iterations == (0, 10, 20, 24)
    assert found[1].iterations == (7, 17, 24)


def test_each_round_prunes_the_trained_and_rewinds_the_rest(searched):
    found = searched[1]
    theta = dict(found[0].ticket.named_parameters())
    statistics = dict(found[0].ticket.named_buffers())
    assert [ticket.index for ticket in found] == [0, 1, 2, 3]
    for before, ticket in itertools.pairwise(found):
        kept = masks.masks_of(ticket.ticket)
        for layer, rate in (("fc1", 0.4), ("fc2", 0.4), ("fc3", 0.2)):
            mask = kept[f"{layer}.weight"]
            # by hand: of the weights that the last training left, the smallest go
            weight = before.model.get_submodule(layer).weight.detach().flatten()
            alive = weight.nonzero().squeeze(1)
            smallest = alive[weight[alive].abs().argsort()[: round(rate * len(alive))]]
            expected = torch.zeros(weight.numel(), dtype=torch.bool)
            expected[alive] = True
            expected[smallest] = False
            assert torch.equal(mask.flatten(), expected)
            there = ticket.ticket.get_submodule(layer)
            assert torch.equal(there.weight, theta[f"{layer}.weight"] * mask)
            assert torch.equal(there.bias, theta[f"{layer}.bias"])
        assert torch.equal(ticket.ticket.norm.weight, theta["norm.weight"])
        for name, value in statistics.items():
            assert torch.equal(dict(ticket.ticket.named_buffers())[name], value)
        assert kept.keys() == masks.masks_of(ticket.model).keys()
        assert all(torch.equal(m, kept[n]) for n, m in masks.masks_of(ticket.model).items())
        assert not torch.equal(ticket.model.fc1.weight, there.weight)
        total = sum(mask.numel() for mask in kept.values())
        assert ticket.density == sum(int(mask.sum()) for mask in kept.values()) / total
        assert ticket.removed == before.footprint.nonzero - ticket.footprint.nonzero
        assert ticket.accuracy == ticket.valid_accuracy[-1]
        assert (
            ticket.early_stop == ticket.iterations[ticket.valid_loss.index(min(ticket.valid_loss))]
        )


def test_rewinding_to_the_start_gives_the_weights_handed_in(digits):
    network = mlp(extra=True)
    before = state(network)
    *_, ticket = find_ticket(network, digits, rounds=2, **QUICK)
    now = state(ticket.ticket)
    for name, value in before.items():
        assert torch.equal(now.get(f"{name}_orig", now.get(name)), value)
    assert same(network, mlp(extra=True))
    assert ticket.iterations[0] == 0


def search(network, digits, history):
    return find_ticket(network, digits, rounds=3, rate=0.4, rewind_to=7, history=history, **QUICK)


def assert_same_search(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours.model, theirs.model)
        assert same(ours.ticket, theirs.ticket)
        for name in ("iterations", "valid_loss", "test_curve", "removed", "density", "accuracy"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_a_search_resumed_after_a_round_finds_the_same_ticket(digits, searched, tmp_path):
    network, expected = searched
    for ticket in search(network, digits, History.resume(tmp_path)):
        if ticket.index == 2:
            break
    resumed = History.resume(tmp_path)
    assert [t.index for t in search(network, digits, resumed)] == [3]
    assert_same_search(resumed, expected)
    assert_same_search(History.load(tmp_path), expected)
    assert list(search(network, digits, History.load(tmp_path))) == []
    more = find_ticket(network, digits, rounds=4, rate=0.4, rewind_to=7, history=resumed, **QUICK)
    assert [t.index for t in more] == [4]


def test_a_search_cut_off_within_a_round_leaves_the_rounds_before(
    digits, searched, tmp_path, monkeypatch
):
    network, expected = searched
    rounds = search(network, digits, History.resume(tmp_path))
    next(rounds), next(rounds)

    def broken(work, data, *, after_step=None, **settings):
        def stop_soon(model):
            after_step(model)
            raise KeyboardInterrupt

        return fit(work, data, after_step=after_step and stop_soon, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "fit", broken)
        with pytest.raises(KeyboardInterrupt):
            next(rounds)
    names = {path.name for path in tmp_path.iterdir()}
    files = {f"step-000{i}{kind}.pt" for i in (0, 1) for kind in ("", "-ticket")}
    assert names == {"history.json"} | files
    resumed = History.resume(tmp_path)
    assert [t.index for t in search(network, digits, resumed)] == [2, 3]
    assert_same_search(resumed, expected)


def test_a_history_of_another_network_or_setting_is_refused(digits):
    history = History()
    next(find_ticket(mlp(), digits, rounds=1, history=history, **QUICK))
    with pytest.raises(ValueError, match="begun with weights="):
        find_ticket(mlp(seed=1), digits, rounds=1, history=history, **QUICK)
    with pytest.raises(ValueError, match="begun with rates="):
        find_ticket(mlp(), digits, rounds=1, rate=0.3, history=history, **QUICK)


def test_nothing_is_printed_where_there_is_no_terminal(digits, capsys):
    list(find_ticket(mlp(), digits, rounds=1, **QUICK | {"progress": True}))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"rewind_to": 24}, "an iteration before the last"),
        ({"rate": 1.5}, "rate must be a share"),
        ({"rate": {"fc9": 0.1}}, "no prunable layer 'fc9'; it has fc1, fc2, fc3"),
        ({"output_rate": -0.1}, "'fc3' has -0.1"),
        ({"scope": "both"}, 'must be "layer" or "global"'),
        ({"scope": "global", "rate": {"fc1": 0.1}}, "compete for one rate"),
        ({"scope": "global", "output_rate": 0.1}, "compete for one rate"),
    ],
)
def test_what_cannot_be_is_refused_at_once(digits, how, message):
    with pytest.raises(ValueError, match=message):
        find_ticket(mlp(), digits, **{"rounds": 1, **how}, **QUICK)


@pytest.mark.parametrize("wrong", [{"iterations": -1}, {"iterations": 2.5}, {"evaluate_every": 0}])
def test_counts_of_a_training_are_checked(digits, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number"):
        train(mlp(), digits, **QUICK | wrong)


# --- controls ----------------------------------------------------------------------------------


def test_reinitialised_tickets_begin_as_the_zoo_does_under_the_same_masks(digits):
    network = models.build("lenet_300_100", in_channels=1, image_size=8, seed=0)
    *_, ticket = find_ticket(network, digits, rounds=1, **QUICK)
    random_state, before = torch.get_rng_state(), state(ticket.ticket)
    control = random_reinitialisation(ticket, seed=5)
    fresh = models.build("lenet_300_100", in_channels=1, image_size=8, seed=runs.derive(5))
    kept = masks.masks_of(ticket.ticket)
    for layer in ("fc1", "fc2", "fc3"):
        there, new = control.get_submodule(layer), fresh.get_submodule(layer)
        assert torch.equal(there.weight, new.weight * kept[f"{layer}.weight"])
        assert torch.equal(there.bias, new.bias)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in state(ticket.ticket).items())
    assert same(control, random_reinitialisation(ticket.ticket, seed=5))
    assert not torch.equal(control.fc1.weight, random_reinitialisation(ticket, seed=6).fc1.weight)


def test_the_seed_of_the_network_does_not_bring_its_weights_back():
    network = models.build("lenet_300_100", in_channels=1, image_size=8, seed=3)
    control = random_reinitialisation(network, seed=3)
    assert float((control.fc1.weight == network.fc1.weight).float().mean()) < 0.01


def test_reinitialisation_forgets_the_norms_too(searched):
    control = random_reinitialisation(searched[1][1], seed=0)
    assert torch.equal(control.norm.running_mean, torch.zeros(24))
    assert int(control.norm.num_batches_tracked) == 0
    assert torch.equal(control.norm.weight, torch.ones(24))


def test_gaussian_glorot_has_its_variance_and_no_biases():
    network = models.build("lenet5", in_channels=1, image_size=28)
    gaussian_glorot(network, seed=1)
    for layer, fans in (("conv2", 25 * (20 + 50)), ("fc1", 800 + 500)):
        weight = network.get_submodule(layer).weight.detach()
        assert float(weight.var()) == pytest.approx(2 / fans, rel=0.02)
        kurtosis = float(weight.pow(4).mean() / weight.var() ** 2)
        assert kurtosis == pytest.approx(3, rel=0.05)  # a uniform one would have 1.8
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_parameters_that_nobody_draws_are_named():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"0 \(Scale\) has parameters .* initialise="):
        random_reinitialisation(nn.Sequential(Scale()), seed=0)
    reset_parameters(nn.Sequential(nn.MultiheadAttention(4, 2)), seed=0)


def test_random_tickets_keep_as_many_elsewhere_with_the_same_weights(searched):
    ticket = searched[1][3]
    control = random_ticket(ticket, seed=1)
    theirs, ours = masks.masks_of(ticket.ticket), masks.masks_of(control)
    for name, mask in theirs.items():
        assert int(mask.sum()) == int(ours[name].sum())
        share = float(mask.float().mean())
        overlap = float((mask & ours[name]).float().mean())
        assert overlap < (share + share**2) / 2  # chance would give share squared
        layer = name.removesuffix(".weight")
        theta = searched[1][0].ticket.get_submodule(layer)
        assert torch.equal(control.get_submodule(layer).weight, theta.weight * ours[name])
        assert torch.equal(control.get_submodule(layer).bias, theta.bias)
    assert same(control, random_ticket(ticket.ticket, seed=1))


def test_sign_tickets_keep_signs_at_the_layers_deviation(searched):
    ticket = searched[1][3]
    control = sign_ticket(ticket)
    for name, mask in masks.masks_of(ticket.ticket).items():
        layer = name.removesuffix(".weight")
        theta = searched[1][0].ticket.get_submodule(layer).weight.detach().double()
        constant = (theta - theta.mean()).square().mean().sqrt()
        expected = theta.sign() * constant * mask
        assert torch.allclose(control.get_submodule(layer).weight.double(), expected)
    assert torch.equal(control.fc1.bias, ticket.ticket.fc1.bias)


# --- the line between two ----------------------------------------------------------------------


def test_on_the_line_are_the_effective_weights_and_norms_measured_anew(digits, searched):
    a, b = searched[1][3].model, searched[1][0].model  # one masked, one not
    alphas = [0.0, 0.3, 0.7, 1.0]
    before = state(a), state(b)
    found = interpolate(a, b, alphas, digits, split="valid")
    for alpha, error in zip(alphas, found, strict=True):
        middle = mlp(extra=True)
        ends = [masks.clone(m) for m in (a, b)]
        for end in ends:
            masks.make_permanent(end)
        with torch.no_grad():
            for name, p in middle.named_parameters():
                first, second = (dict(end.named_parameters())[name] for end in ends)
                p.copy_(alpha * first + (1 - alpha) * second)
        middle.dropout.p = 0.0  # torch's own helper would train with it
        batches = digits.batches("train", 128, shuffle=True)
        torch.optim.swa_utils.update_bn(batches, middle)
        assert error == pytest.approx(1 - evaluate(middle, digits, "valid").accuracy)
    for model, old in zip((a, b), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in state(model).items())


def test_the_ends_of_the_line_are_the_networks(digits):
    a, b = (train(mlp(seed), digits, **QUICK).model for seed in (0, 1))
    errors = [1 - evaluate(model, digits).accuracy for model in (b, a)]
    assert interpolate(a, b, [0, 1], digits) == errors
    with pytest.raises(ValueError, match="same layers and shapes"):
        interpolate(a, models.build("lenet_300_100", in_channels=1, image_size=8), [0.5], digits)


def test_instability_is_the_barrier_over_the_mean_of_the_ends():
    found = lottery_tickets.Instability((0, 0.5, 1), (0.1, 0.6, 0.3))
    assert found.value == pytest.approx(0.4)
    assert lottery_tickets.Instability((0, 0.5, 1), (0.2, 0.1, 0.2)).value == 0


def test_the_two_trainings_part_at_the_rewinding_point(digits, monkeypatch):
    network = mlp()
    masks.apply(network, masks_after_round(network, 0.5))
    ends = []

    def keep(a, b, alphas, data, *, split):
        ends[:] = [a, b]
        return [0.0] * len(alphas)

    monkeypatch.setattr(trajectories, "interpolate", keep)
    settings = {"batch_size": 32, "progress": False, "lr": 1e-3, "seed": 2}
    found = instability(network, digits, rewind_to=10, iterations=11, points=5, **settings)
    assert found.alphas == (0, 0.25, 0.5, 0.75, 1)
    theta = train(network, digits, iterations=10, **settings).model
    a, b = ((end.fc2.weight - theta.fc2.weight).detach() for end in ends)
    assert not torch.equal(a, b)
    for change in (a, b):  # Adam's first step is lr * sign(gradient), whatever the gradient
        assert float(change.abs().max()) == pytest.approx(1e-3, rel=1e-3)
    assert all(not (end.fc2.weight[~masks.masks_of(network)["fc2.weight"]]).any() for end in ends)
    instability(network, digits, rewind_to=0, iterations=11, **settings)
    change = float((ends[0].fc2.weight - network.fc2.weight).detach().abs().max())
    assert change > 3e-3  # all eleven steps come after the parting


@pytest.mark.parametrize("wrong", [{"seeds": (1, 1)}, {"points": 2}, {"rewind_to": 5}])
def test_instability_refuses_what_says_nothing(digits, wrong):
    with pytest.raises(ValueError, match="two different seeds"):
        instability(mlp(), digits, **{"iterations": 5, **wrong})


# --- what it is all for ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ticket_learns_faster_than_the_same_masks_with_other_weights():
    data = load("digits")
    gains = []
    for seed in range(3):
        network = models.build("lenet_300_100", in_channels=1, image_size=8, seed=seed)
        *_, ticket = find_ticket(
            network, data, rounds=3, rate=0.5, iterations=400, seed=seed, progress=False
        )
        controls = [make(ticket, seed=seed) for make in (random_reinitialisation, random_ticket)]
        losses = [
            sum(
                train(
                    net, data, iterations=100, evaluate_every=10, seed=9, progress=False
                ).valid_loss
            )
            for net in (ticket.ticket, *controls)
        ]
        gains.append([math.log(loss / losses[0]) for loss in losses[1:]])
    assert all(gain > 0.1 for pair in gains for gain in pair), gains
