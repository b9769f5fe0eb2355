import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning101.core import masks, measure, models
from pruning101.core.sparse_layout import SparseLinear, layouts, sparse_layout


def sparse_net(*, bias=True, seed=0):
    """Two hidden layers, nine weights in ten masked; one row and one column wholly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(48, 30, bias=bias),
            nn.ReLU(),
            nn.Linear(30, 20, bias=bias),
            nn.ReLU(),
            nn.Linear(20, 10, bias=bias),
        )
    scores = {f"{i}.weight": net[i].weight.detach().abs() for i in (1, 3, 5)}
    keep = masks.from_scores(scores, 0.9)
    keep["3.weight"][4] = False
    keep["3.weight"][:, 7] = False
    masks.apply(net, keep)
    return net


def images(batch, *shape, seed=1):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 2, 64])
def test_computes_what_the_dense_network_does(batch, bias):
    net = sparse_net(bias=bias).eval()
    x = images(batch, 3, 4, 4)
    with torch.inference_mode():
        expected, found = net(x), sparse_layout(net)(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 3, 48), (1, 1, 48)])
def test_any_number_of_dimensions_before_the_features(shape):
    layer = sparse_net()[1]
    found = SparseLinear(layer)(images(*shape))
    torch.testing.assert_close(found, layer(images(*shape)), atol=1e-5, rtol=0)


def test_double_precision_to_its_own_rounding():
    net = sparse_net().double()
    masks.refresh(net)
    x = images(7, 48).double()
    torch.testing.assert_close(sparse_layout(net)(x), net(x), atol=1e-13, rtol=0)


def test_keeps_the_nonzeros_alone_and_leaves_the_model_as_it_was():
    net = sparse_net()
    before, dense = copy.deepcopy(net.state_dict()), masks.masks_of(net)
    small = sparse_layout(net)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert masks.masks_of(net).keys() == dense.keys()
    for i in (1, 3, 5):
        assert small[i].values.numel() == int(dense[f"{i}.weight"].sum())
        assert small[i].crow_indices.dtype == small[i].column_indices.dtype == torch.int32
        assert torch.equal(small[i].weight, net[i].weight)
    with torch.no_grad():  # nothing is shared with the model
        for parameter in small.parameters():
            parameter.add_(1)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_bytes_are_eight_a_nonzero_and_four_a_row():
    layer = nn.Linear(40, 25, bias=False)
    with torch.no_grad():
        layer.weight[:, 8:] = 0
    state = measure.inference_state(sparse_layout(layer))
    assert sum(t.numel() * t.element_size() for t in state.values()) == 8 * 25 * 8 + 4 * 26


def test_state_dict_and_pickle_bring_it_back():
    net, x = sparse_net(), images(3, 48)
    small = sparse_layout(net)
    other = sparse_layout(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), small(x))
    decoded = measure.decode_state(measure.coded_state(small))
    other.load_state_dict(decoded)
    assert torch.equal(other(x), small(x))


@pytest.mark.parametrize("batch", [1, 6])
def test_gradients_are_the_masked_networks(batch):
    net = sparse_net()
    small = sparse_layout(net)
    labels = torch.arange(batch) % 10
    x, same = images(batch, 48).requires_grad_(), images(batch, 48).requires_grad_()
    F.cross_entropy(net(x), labels).backward()
    F.cross_entropy(small(same), labels).backward()
    torch.testing.assert_close(same.grad, x.grad, atol=1e-6, rtol=0)
    for i in (1, 3, 5):
        survivors = net[i].weight_orig.grad[masks.masks_of(net)[f"{i}.weight"]]
        torch.testing.assert_close(small[i].values.grad, survivors, atol=1e-6, rtol=0)
        torch.testing.assert_close(small[i].bias.grad, net[i].bias.grad, atol=1e-6, rtol=0)


def test_convolutions_stay_dense_and_are_named():
    net = models.build("lenet5", in_channels=1, image_size=28)
    with pytest.warns(
        UserWarning, match=r"2 of 4 layers stay dense \(conv1, conv2\): torch has no"
    ):
        small = sparse_layout(net)
    reason = "dense: torch has no sparse kernel for convolutions"
    assert layouts(small) == {"conv1": reason, "conv2": reason, "fc1": "csr", "fc2": "csr"}
    assert layouts(net) == {"conv1": reason, "conv2": reason, "fc1": "dense", "fc2": "dense"}
    torch.testing.assert_close(
        small(images(2, 1, 28, 28)), net(images(2, 1, 28, 28)), atol=1e-5, rtol=0
    )


def test_chosen_layers_alone_and_then_no_warning():
    net = sparse_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = sparse_layout(net, layers=["3"])
    assert layouts(small) == {"1": "dense", "3": "csr", "5": "dense"}
    assert masks.masks_of(small) == {}
    torch.testing.assert_close(small(images(2, 48)), net(images(2, 48)), atol=1e-5, rtol=0)


def test_a_layer_used_under_two_names_stays_one():
    layer = nn.Linear(6, 6)
    small = sparse_layout(nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer)))
    assert small[0] is small[1][1]
    assert isinstance(small[0], SparseLinear)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(6, 4)
    torch.testing.assert_close(sparse_layout(layer)(torch.ones(2, 6)), layer(torch.ones(2, 6)))


@pytest.mark.parametrize("training", [True, False])
def test_attention_keeps_its_own_and_reads_the_dense_weight_of_others(training):
    # In eval mode torch's encoder layer reads linear1.weight instead of calling the layer.
    net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    with pytest.warns(UserWarning, match=r"self_attn.out_proj\): the attention around it reads"):
        small = sparse_layout(net)
    assert all(module.training == training for module in small.modules())
    assert layouts(small)["linear1"] == "csr"
    x = images(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), atol=1e-5, rtol=0)


def test_refuses_in_one_sentence():
    lenet = models.build("lenet5", in_channels=1, image_size=28)
    with pytest.raises(ValueError, match="'conv1' cannot have a sparse layout: torch has no"):
        sparse_layout(lenet, layers=["conv1"])
    with pytest.raises(ValueError, match=r"no linear layer 'fc3'; near it are 'fc"):
        sparse_layout(lenet, layers=["fc3"])
    with pytest.raises(ValueError, match=r"no linear layer that could .*'0' is dense: torch has"):
        sparse_layout(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="it has no layers with weights"):
        sparse_layout(nn.ReLU())
    with pytest.raises(ValueError, match="needs float32 or float64 on the CPU"):
        sparse_layout(nn.Linear(2, 2).to(torch.bfloat16))
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks, which a new layer would lose"):
        sparse_layout(hooked)


def test_a_frozen_layer_stays_frozen():
    layer = nn.Linear(3, 3).requires_grad_(False)
    assert not any(p.requires_grad for p in sparse_layout(layer).parameters())
