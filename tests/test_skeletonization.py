"""Skeletonization: relevances against formulas, surgery against zeroed units, the whole loop."""

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning101 import skeletonization
from pruning101.core import data, models
from pruning101.core.steps import History
from pruning101.skeletonization import error, relevance, skeletonize, trim

LOSSES = ("linear", "quadratic", "task")


def mlp(seed=0, sizes=(4, 5, 3), activation=nn.Sigmoid, last=nn.Sigmoid):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers = OrderedDict()
        for i, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
            layers[f"fc{i}"] = nn.Linear(n_in, n_out)
            if i < len(sizes) - 1:
                layers[f"act{i}"] = activation()
        if last is not None:
            layers["out"] = last()
        return nn.Sequential(layers).double()


def patterns(n=12, inputs=4, outputs=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64)
    return x, torch.randint(0, outputs, (n,), generator=g)


def test_attention_is_the_papers_formula():
    model = mlp()
    x, labels = patterns()
    t = nn.functional.one_hot(labels, 3).double()
    with torch.no_grad():
        hidden = torch.sigmoid(model.fc1(x))
        o = torch.sigmoid(model.fc2(hidden))
        delta = torch.sign(o - t) * o * (1 - o)  # dE/d(input of output unit j), linear error
        expected = -(delta[:, :, None] * model.fc2.weight * hidden[:, None, :]).sum(1).mean(0)
    torch.testing.assert_close(relevance(model, "fc1", [(x, labels)]), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layer", ["fc1", "fc2", "input"])
def test_attention_is_the_slope_of_the_attended_error(loss, layer):
    model = mlp(sizes=(4, 6, 5, 3), activation=nn.Tanh, last=None)
    x, labels = patterns()

    def attended(unit, alpha):
        h = x.clone()
        if layer == "input":
            h[:, unit] *= alpha
        for name, module in model.named_children():
            h = module(h)
            if name == layer.replace("fc", "act"):
                h = h.clone()
                h[:, unit] *= alpha
        return error(h, labels, loss).item()

    step = 1e-5
    found = relevance(model, layer, [(x, labels)], loss=loss)
    measured = relevance(model, layer, [(x, labels)], loss=loss, method="removal")
    assert len(found) == {"fc1": 6, "fc2": 5, "input": 4}[layer]
    for unit in range(len(found)):
        slope = (attended(unit, 1 + step) - attended(unit, 1 - step)) / (2 * step)
        assert found[unit].item() == pytest.approx(-slope, rel=1e-6, abs=1e-9)
        gain = attended(unit, 0.0) - attended(unit, 1.0)
        assert measured[unit].item() == pytest.approx(gain, rel=1e-9, abs=1e-12)


def test_at_a_minimum_of_the_quadratic_error_its_attention_vanishes_and_the_linear_does_not():
    # dE/dalpha_i = sum_j w_ji dE/dw_ji: nothing is left of it where the gradient is zero
    model = mlp(last=None, activation=nn.Tanh)
    x, _ = patterns(n=40)
    t = torch.randn(40, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():  # the best output layer for these hidden units, by least squares
        h = torch.cat([torch.tanh(model.fc1(x)), torch.ones(40, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(h, t).solution
        model.fc2.weight.copy_(best[:-1].T)
        model.fc2.bias.copy_(best[-1])
    quadratic = relevance(model, "fc1", [(x, t)], loss="quadratic")
    linear = relevance(model, "fc1", [(x, t)], loss="linear")
    removal = relevance(model, "fc1", [(x, t)], loss="quadratic", method="removal")
    assert quadratic.abs().max() < 1e-12
    assert linear.abs().max() > 1e-3
    assert removal.min() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_removal_is_the_trimmed_networks_error_difference(loss):
    model = mlp(sizes=(4, 5, 4, 3), last=None)
    x, labels = patterns()
    rho = relevance(model, "fc2", [(x, labels)], method="removal", loss=loss)
    for unit in range(4):
        smaller = trim(model, "fc2", [unit], x)
        with torch.no_grad():
            expected = error(smaller(x), labels, loss) - error(model(x), labels, loss)
        torch.testing.assert_close(rho[unit], expected)


def test_error_takes_probabilities_of_what_the_network_answers():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 2])
    p = logits.softmax(1)
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    linear = (p - one_hot).abs().sum(1).mean()
    torch.testing.assert_close(error(logits, labels, "linear"), linear)
    quadratic = ((p - one_hot) ** 2).sum(1).mean()
    torch.testing.assert_close(error(logits, labels, "quadratic"), quadratic)
    task = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(error(logits, labels, "task"), task)
    one = logits[:, :1]
    torch.testing.assert_close(
        error(one, torch.tensor([1, 0]), "linear"),
        ((1 - one[0].sigmoid()) + one[1].sigmoid()).sum() / 2,
    )
    # float targets, and networks that end in a sigmoid, are taken as they are
    torch.testing.assert_close(error(one, torch.zeros(2), "linear"), one.abs().mean())
    torch.testing.assert_close(
        error(p, labels, "linear", sigmoid=True), (p - one_hot).abs().sum(1).mean()
    )


def test_a_network_that_ends_in_a_sigmoid_is_seen_as_one():
    model, (x, labels) = mlp(), patterns()
    with torch.no_grad():
        rho = relevance(model, "fc2", [(x, labels)], method="removal")
        whole = error(model(x), labels, "linear", sigmoid=True)
        out = model(x)
        out[:, 1] = 0
        torch.testing.assert_close(rho[1], error(out, labels, "linear", sigmoid=True) - whole)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 12),
    method=st.sampled_from(["attention", "removal"]),
    loss=st.sampled_from(LOSSES),
)
def test_relevance_does_not_depend_on_how_patterns_are_cut_or_units_ordered(
    seed, size, method, loss
):
    model, (x, labels) = mlp(seed, last=None), patterns(seed=seed)
    whole = relevance(model, "fc1", [(x, labels)], method=method, loss=loss)
    pieces = list(zip(x.split(size), labels.split(size), strict=True))
    cut = relevance(model, "fc1", pieces, method=method, loss=loss)
    torch.testing.assert_close(cut, whole)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in (model.fc1.weight, model.fc1.bias):
            parameter.copy_(parameter[order].clone())
        model.fc2.weight.copy_(model.fc2.weight[:, order].clone())
    shuffled = relevance(model, "fc1", [(x, labels)], method=method, loss=loss)
    torch.testing.assert_close(shuffled, whole[order])


@pytest.mark.parametrize("method", ["attention", "removal"])
def test_a_unit_without_consumers_or_output_has_no_relevance(method):
    model, (x, labels) = mlp(activation=nn.ReLU), patterns()
    with torch.no_grad():
        model.fc2.weight[:, 1] = 0  # nobody listens
        model.fc1.bias[3] = -1000  # never speaks
    rho = relevance(model, "fc1", [(x, labels)], method=method)
    assert rho[1] == 0
    assert rho[3] == 0
    assert (rho != 0).sum() == 3


def test_decay_is_the_papers_running_average():
    model, (x, labels) = mlp(), patterns()
    parts = list(zip(x.split(4), labels.split(4), strict=True))
    first, second, third = (relevance(model, "fc1", [part]) for part in parts)
    expected = 0.8 * (0.8 * first + 0.2 * second) + 0.2 * third
    torch.testing.assert_close(relevance(model, "fc1", parts, decay=0.8), expected)
    torch.testing.assert_close(relevance(model, "fc1", parts, decay=0.0), third)


def test_relevance_leaves_the_model_and_the_generator_alone():
    model, (x, labels) = mlp(), patterns()
    model.train()
    model.act1.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.get_rng_state()
    for method in ("attention", "removal"):
        relevance(model, "fc1", [(x, labels)], method=method)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.fc1.training
    assert not model.act1.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


class ConvNet(nn.Module):
    """A convolution with batch norm, so that alpha has to sit behind more than the layer."""

    def __init__(self, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.norm1 = nn.BatchNorm2d(6)
        self.act1 = activation()
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(6 * 9, 4)

    def forward(self, x):
        return self.fc(self.flatten(self.pool(self.act1(self.norm1(self.conv1(x))))))


def conv_net(activation=nn.Sigmoid):
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = ConvNet(activation).double()
        nn.init.normal_(model.norm1.bias)
        nn.init.uniform_(model.norm1.running_var, 0.5, 2)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 1, 8, 8, generator=g, dtype=torch.float64)
    return model, x, torch.randint(0, 4, (7,), generator=g)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU])
def test_a_channel_is_weighed_behind_its_norm_and_activation(activation):
    model, x, labels = conv_net(activation)
    model.eval()
    rho = relevance(model, "conv1", [(x, labels)], method="removal", loss="task")
    attention = relevance(model, "conv1", [(x, labels)], loss="task")
    assert rho.shape == attention.shape == (6,)
    with torch.no_grad():
        h = model.act1(model.norm1(model.conv1(x)))
        whole = error(model(x), labels, "task")
        for channel in range(6):
            without = h.clone()
            without[:, channel] = 0
            out = model.fc(model.flatten(model.pool(without)))
            torch.testing.assert_close(rho[channel], error(out, labels, "task") - whole)
            near = h.clone()
            near[:, channel] *= 1 - 1e-6
            out = model.fc(model.flatten(model.pool(near)))
            slope = (error(out, labels, "task") - whole) / 1e-6
            torch.testing.assert_close(attention[channel], slope, rtol=1e-4, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(units=st.sets(st.integers(0, 5), min_size=0, max_size=5), sigmoid=st.booleans())
def test_trimming_is_zeroing_the_units(units, sigmoid):
    model, x, _ = conv_net(nn.Sigmoid if sigmoid else nn.ReLU)
    smaller = trim(model, "conv1", list(units), x).eval()
    model.eval()
    with torch.no_grad():
        h = model.act1(model.norm1(model.conv1(x)))
        h[:, list(units)] = 0
        expected = model.fc(model.flatten(model.pool(h)))
        torch.testing.assert_close(smaller(x), expected)
    assert smaller.conv1.weight.shape[0] == smaller.norm1.num_features == 6 - len(units)
    assert smaller.fc.in_features == 9 * (6 - len(units))
    assert model.conv1.out_channels == 6


def test_trim_in_place_changes_the_model_given_and_a_copy_does_not():
    model, (x, _) = mlp(sizes=(4, 5, 4, 3)), patterns()
    copy = trim(model, "fc1", torch.tensor([4, 0, 0]), x)
    assert model.fc1.out_features == 5
    assert (copy.fc1.out_features, copy.fc2.in_features) == (3, 3)
    assert torch.equal(copy.fc1.weight, model.fc1.weight[1:4])
    assert trim(model, "fc1", [0, 4], x, inplace=True) is model
    torch.testing.assert_close(model(x), copy(x))


@pytest.mark.slow
def test_a_torchvision_network():
    model = models.build("resnet18", classes=4, image_size=32).eval()
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(8, 3, 32, 32, generator=g), torch.randint(0, 4, (8,), generator=g)
    layer = "layer2.0.conv1"
    attention = relevance(model, layer, [(x, labels)], loss="task")
    assert attention.shape == (128,)
    assert (attention != 0).any()
    removal = relevance(model, layer, [(x[:2], labels[:2])], loss="task", method="removal")
    lowest = attention.argsort()[:40].tolist()
    smaller = trim(model, layer, lowest, x)
    keep = [i for i in range(128) if i not in lowest]
    handle = model.layer2[0].bn1.register_forward_hook(
        lambda m, i, o: o * torch.isin(torch.arange(128), torch.tensor(keep))[:, None, None]
    )
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-4)
    handle.remove()
    with torch.no_grad():
        one = trim(model, layer, [5], x)
        difference = error(one(x[:2]), labels[:2], "task") - error(model(x[:2]), labels[:2], "task")
    torch.testing.assert_close(removal[5], difference, rtol=1e-2, atol=1e-5)
    with pytest.raises(ValueError, match="tied"):
        trim(model, "layer2.0.conv2", [0], x)


def test_errors_say_what_to_do():
    model, (x, labels) = mlp(sizes=(4, 5, 4, 3)), patterns()
    batches = [(x, labels)]
    with pytest.raises(ValueError, match="near it are 'fc1'"):
        relevance(model, "fc_1", batches)
    with pytest.raises(ValueError, match="got 'atention'"):
        relevance(model, "fc1", batches, method="atention")
    with pytest.raises(ValueError, match="got 'mse'"):
        relevance(model, "fc1", batches, loss="mse")
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        relevance(model, "fc1", batches, decay=1.0)
    with pytest.raises(ValueError, match="empty"):
        relevance(model, "fc1", [])
    with pytest.raises(ValueError, match="units 0 to 4"):
        trim(model, "fc1", [1, 5], x)
    with pytest.raises(ValueError, match="units 0 to 4"):
        trim(model, "fc1", [-1], x)
    with pytest.raises(ValueError, match="leave at least one"):
        trim(model, "fc1", range(5), x)
    with pytest.raises(ValueError, match="network's output"):
        trim(model, "fc3", [0], x)
    with pytest.raises(ValueError, match="input units"):
        trim(model, "input", [0], x)
    assert [m.out_features for m in (model.fc1, model.fc2, model.fc3)] == [5, 4, 3]


def test_a_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    x, labels = patterns(outputs=4)
    with pytest.raises(ValueError, match="exactly once"):
        relevance(Twice().double(), "fc", [(x, labels)])


# --- the loop ------------------------------------------------------------------------------------


def toy():
    """Two classes of 2 x 2 images that differ in one pixel; easy, so that training is short."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (300, 1, 2, 2), generator=g, dtype=torch.uint8)
    labels = (images[:, 0, 0, 0] > 100).long()
    split = [(images[i : i + 100], labels[i : i + 100]) for i in (0, 100, 200)]
    return data.from_tensors("toy", *split, classes=("low", "high"))


def toy_net():
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(4, 8),
                act1=nn.Tanh(),
                fc2=nn.Linear(8, 6),
                act2=nn.Tanh(),
                fc3=nn.Linear(6, 2),
            )
        )


OPTIONS = dict(criterion=0.95, epochs=20, lr=0.1, remove=3)


def test_the_loop_trims_the_least_relevant_and_keeps_the_criterion():
    model = toy_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps = list(skeletonize(model, toy(), **OPTIONS))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(steps) >= 2
    assert [s.index for s in steps] == list(range(1, len(steps) + 1))
    assert all(s.accuracy >= 0.95 for s in steps)
    assert len({unit for s in steps for unit in s.removed}) == sum(len(s.removed) for s in steps)
    for number, step in enumerate(steps, start=1):
        left = step.model.fc1.out_features + step.model.fc2.out_features
        assert left == max(14 - 3 * number, 2)
        expected = step.footprint.parameters
        assert expected == sum(p.numel() for p in step.model.parameters())
    # the first removal is the three lowest relevances of the trained network
    trained, *_ = skeletonize(model, toy(), **{**OPTIONS, "remove": 1, "limit": 1})
    assert trained.removed[0] in steps[0].removed


def test_the_loop_removes_what_relevance_says():
    model, task = toy_net(), toy()
    (step,) = skeletonize(model, task, criterion=0.0, limit=1, remove=4, epochs=0)
    batches = task.batches("valid", 256)
    rho = {
        f"{n}:{i}": r for n in ("fc1", "fc2") for i, r in enumerate(relevance(model, n, batches))
    }
    assert sorted(step.removed) == sorted(sorted(rho, key=lambda unit: rho[unit])[:4])


def test_the_loop_resumes_to_the_same_numbers(tmp_path):
    model, task = toy_net(), toy()
    whole = list(skeletonize(model, task, **OPTIONS))
    history = History(path=tmp_path)
    for step in skeletonize(model, task, history=history, **OPTIONS):
        if step.index == 2:
            break
    resumed = History.load(tmp_path)
    rest = list(skeletonize(model, task, history=resumed, **OPTIONS))
    assert [s.index for s in rest] == [s.index for s in whole[2:]]
    assert [s.removed for s in resumed] == [s.removed for s in whole]
    for a, b in zip(resumed, whole, strict=True):
        for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
            assert torch.equal(x, y)
    with pytest.raises(ValueError, match="begun with"):
        next(skeletonize(model, task, history=History.load(tmp_path), **{**OPTIONS, "remove": 1}))


def test_the_loop_stops_at_the_tolerance_and_at_one_unit_a_layer():
    model, task = toy_net(), toy()
    steps = list(skeletonize(model, task, criterion=0.0, epochs=0, remove=0.5))
    assert [s.model.fc1.out_features + s.model.fc2.out_features for s in steps] == [7, 4, 2]
    trained = next(skeletonize(model, task, **OPTIONS)).model
    strict = list(skeletonize(trained, task, tolerance=0.0, epochs=0))
    accuracies = [s.accuracy for s in strict]
    from pruning101.core.training import evaluate

    dense = evaluate(trained, task, "valid").accuracy
    assert all(accuracy >= dense for accuracy in accuracies)


def test_the_loops_errors():
    model, task = toy_net(), toy()
    for options, words in [
        ({"remove": 0}, "remove must"),
        ({"remove": 1.0}, "remove must"),
        ({"split": "test"}, "split must"),
        ({"loss": "l1"}, "loss must"),
        ({"layers": ["fc9"]}, "near it"),
        ({"layers": ["fc3"]}, "network's output"),
        ({"criterion": 1.0, "epochs": 0}, "does not reach"),
    ]:
        with pytest.raises(ValueError, match=words):
            next(skeletonize(model, task, **options))


def test_least_relevant_spares_one_unit_a_layer():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([0.5, 0.5])}
    assert skeletonization.least_relevant(scores, 2) == {"a": [1], "b": [0]}
    assert skeletonization.least_relevant(scores, 99) == {"a": [1, 2], "b": [0]}
    assert skeletonization.least_relevant({"a": torch.tensor([-1.0])}, 1) == {"a": []}
