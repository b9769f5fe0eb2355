"""What a network is made of: its layers, its chains, its residual blocks, its coupled channels."""

from torch import nn

_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose ``weight`` may be pruned: convolutions and linear layers, by name.

    In order of definition; transposed convolutions, masked layers and those inside attention are
    among them (the joint input projection of ``nn.MultiheadAttention`` is a bare parameter, no
    layer). A model that is itself such a layer has the name ``""``.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the elementwise non-linearities that are modules (ReLU, GELU, PReLU...), by name.

    In order of definition. Functions called in ``forward`` are no modules and cannot be found so;
    softmax and gates, which mix several units, are not elementwise.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, _ACTIVATIONS)}
