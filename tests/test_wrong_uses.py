"""Wrong uses of lessons 4 and 5: one sentence that says what was wrong, and nothing changed."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from pruning101 import lottery_tickets, sensitivity, structured
from pruning101 import pruning_at_initialisation as pai
from pruning101.core import channels, zeroed_channels
from pruning101.core.data import load
from pruning101.core.sparse_layout import sparse_layout
from pruning101.core.steps import History


def convnet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


class Wrapped(nn.Module):
    """Gives its outputs by name, as networks with several heads do."""

    def __init__(self):
        super().__init__()
        self.net = convnet()

    def forward(self, x):
        return {"out": self.net(x)}


@pytest.fixture(scope="module")
def digits():
    return load("digits")


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [(X, torch.tensor([3, 4]))]


def refused(sentence, call, model=None):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        call()
    assert "\n" not in str(caught.value)
    if model is not None:
        assert str(before) == str(model)
        assert [m.training for m in before.modules()] == [m.training for m in model.modules()]
        pairs = zip(before.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_an_interrupted_surgery_changes_nothing(monkeypatch):
    model = convnet()
    before = copy.deepcopy(model.state_dict())

    def interrupt(_model):
        raise KeyboardInterrupt

    found = channels.coupling(model, X)
    monkeypatch.setattr(channels, "undisturbed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        channels.remove_from_groups(model, found, {"0": torch.tensor([1, 2])}, X)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_layers_that_shared_a_weight_lose_channels_each_for_itself():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b, c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    b.weight = a.weight
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    result = structured.prune_channels(nn.Sequential(a, b, c), x, 0.3, inplace=False)
    there = {name: torch.zeros(6).index_fill(0, kept, 1) for name, kept in result.kept.items()}
    assert all(int(mask.sum()) == 4 for mask in there.values())
    expected = c(b(a(x) * there["0"]) * there["1"])
    assert torch.allclose(result.model(x), expected, atol=1e-6)
    assert result.model[0].weight is not result.model[1].weight


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ("l2", "scores must hold a tensor for each group"),
        ([1, 2], "scores must hold a tensor for each group"),
        ({"0": [1.0] * 8}, "The scores of '0' have value"),
        (lambda group, model: None, "The scores of '0' have value None"),
    ],
)
def test_scores_of_another_kind_are_refused(scores, sentence):
    model = convnet()
    call = lambda: structured.prune_channels(model, X, 0.5, scores=scores)  # noqa: E731
    refused(sentence, call, model)


def test_gradients_of_another_network_are_refused():
    model = convnet()
    group = structure_of(model)
    call = lambda: structured.group_importance(group, model, kind="taylor", gradients={})  # noqa: E731
    refused("gradients hold none of", call, model)


def structure_of(model):
    return channels.channel_groups(model, X)[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sparsity": {"0": 0.5}}, "rounds need one number"),
        ({"scores": {"0": torch.ones(8)}}, "rounds need one number"),
        ({"rounds": 1.5}, "rounds must be at least 1"),
        ({"epochs": "4"}, "rounds must be at least 1"),
        ({"retrain": {"seed": 1}}, "'seed' is an argument of its own"),
    ],
)
def test_bad_rounds_of_channels_are_refused_before_any_work(digits, arguments, sentence):
    model = convnet()
    refused(sentence, lambda: structured.prune_iteratively(model, digits, **arguments), model)


@pytest.mark.parametrize("example", [None, [X], (X, X), X[:, 0, 0]])
def test_materialise_says_when_the_example_does_not_fit(example):
    model = convnet()
    call = lambda: structured.materialise(model, example, inplace=True)  # noqa: E731
    refused("Sequential fails on the example", call, model)


@pytest.mark.parametrize(("keep", "group"), [(2.0, 4), ("2", 4), (1, 2.5), (True, 4)])
def test_two_of_four_are_whole_numbers(keep, group):
    call = lambda: structured.semi_structured({"w": torch.ones(4, 8)}, keep=keep, group=group)  # noqa: E731
    refused("keep must be between 1 and group, both whole", call)


def test_two_of_a_rest_stay_even_where_all_scores_are_minus_infinity():
    mask = structured.semi_structured({"w": torch.full((1, 6), -math.inf)})["w"]
    assert mask.tolist() == [[False, False, True, True, True, True]]


@pytest.mark.parametrize("score", [pai.snip, pai.grasp, pai.synflow])
def test_scores_need_one_tensor_of_outputs(score):
    model = Wrapped()
    refused("Wrapped gives a dict", lambda: score(model, BATCHES), model)


def test_sensitivity_needs_one_tensor_of_outputs_and_images():
    model = Wrapped()
    call = lambda: sensitivity.neuron_sensitivity(model, BATCHES)  # noqa: E731
    refused("the outputs must be [B, K] to be felt, but are no tensor", call, model)
    empty = [(X[:0], None)]
    refused("nothing to measure", lambda: sensitivity.neuron_sensitivity(convnet(), empty))


@pytest.mark.parametrize("score", [pai.snip, pai.grasp])
def test_a_batch_of_no_images_is_refused(score):
    empty = [(X[:0], torch.zeros(0, dtype=torch.long))]
    refused("batches held no images", lambda: score(convnet(), empty))


@pytest.mark.parametrize("given", [{}, None, 3.0])
def test_a_score_function_gives_a_dictionary(given):
    call = lambda: pai.prune_at_initialisation(convnet(), BATCHES, 0.5, score=lambda m, b: given)  # noqa: E731
    refused("score must give a dictionary of scores", call)


def test_shares_that_are_no_numbers_are_refused(digits):
    refused("strength must be a share", lambda: sensitivity.lobster("1e-4"))  # type: ignore[arg-type]
    refused("tolerance", lambda: sensitivity.prune_within(convnet(), digits, tolerance=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rounds": 1.5}, "must be whole numbers"),
        ({"train": {"seed": 1}}, "'seed' is set by the procedure"),
        ({"train": {"lr": 3.0}}, "'lr' is set by the procedure"),
    ],
)
def test_a_bad_procedure_is_refused(digits, arguments, sentence):
    model = convnet()
    call = lambda: sensitivity.regularise_and_prune(model, digits, **arguments)  # noqa: E731
    refused(sentence, call, model)


def test_the_procedure_does_not_go_on_from_a_step_without_a_model(digits):
    history = History()
    (step,) = sensitivity.regularise_and_prune(
        convnet(), digits, rounds=1, epochs=1, history=history
    )
    without = History([dataclasses.replace(step, model=None)])
    without.settings = history.settings
    call = lambda: sensitivity.regularise_and_prune(  # noqa: E731
        convnet(), digits, rounds=2, epochs=1, history=without
    )
    refused("the history's last step has no model", call)


@pytest.mark.parametrize(
    "arguments", [{"rounds": 1.5}, {"rounds": None}, {"rewind_to": "1"}, {"iterations": 5.0}]
)
def test_a_search_counts_in_whole_numbers(digits, arguments):
    given = {"rounds": 1, "iterations": 5, **arguments}
    call = lambda: lottery_tickets.find_ticket(convnet(), digits, **given)  # noqa: E731
    refused("rounds must be at least 0 and rewind_to", call)


def test_a_layout_of_no_layer_is_refused():
    refused("layers names no layer", lambda: sparse_layout(convnet(), layers=[]))


class WithAuxiliary(nn.Module):
    """A head in the middle that runs in training only, as GoogLeNet's do."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
        self.auxiliary = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        out = self.fc(x.mean((2, 3)))
        return (out, self.auxiliary(x)) if self.training else out


def test_a_head_that_runs_in_training_only_is_not_left_behind():
    model, example = WithAuxiliary(), torch.rand(2, 1, 8, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="in training, where auxiliary read them; take these out"):
        structured.prune_channels(model, example, 0.5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training
    model.auxiliary = nn.Identity()
    assert structured.prune_channels(model, example, 0.5).removed == {"conv": 4}


def test_hooks_can_still_be_taken_off_after_a_surgery_that_failed(monkeypatch):
    model, example = convnet(), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        model[0].weight[:3] = 0
    handle = model[1].register_forward_hook(lambda *_: None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(zeroed_channels, "_compare", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"division by zero.*nothing was changed"):
        structured.materialise(model, example, inplace=True)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    handle.remove()
    assert not model[1]._forward_hooks
