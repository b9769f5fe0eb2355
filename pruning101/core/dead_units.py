"""Units that lost all inputs or all outputs: taken out, their constants folded onwards."""

from torch import nn

from pruning101.core.tracing import Example
from pruning101.core.zeroed_channels import Materialised as DeadUnits
from pruning101.core.zeroed_channels import shrink


def remove_dead_units(model: nn.Module, example: Example, *, inplace: bool = True) -> DeadUnits:
    """Take units without inputs or without outputs out of ``model`` in place, masks made permanent.

    The result is a smaller dense network of the same modules that computes the same in ``eval``
    mode. A unit without outgoing weights just goes. A unit without incoming ones still emits
    ``act(bias)``, after whatever norm and pooling follow: this constant, times the outgoing
    weights, is added to the next layer's bias. Where the next layer is a convolution that pads with
    zeros, a constant other than 0 is cut off at the border, no bias can say that, and the unit
    stays (:func:`~pruning101.core.zeroed_channels.materialise` goes on from here). This repeats
    until nothing changes: a unit may lose its last input with another unit. A channel that several
    layers make (at a residual sum) goes if it is dead in all of them; the network's outputs stay.
    ``inplace=False`` works on a copy. In the report, ``removed`` counts the units taken out of each
    layer, and ``kept`` says for a layer why dead ones had to stay.

    The paper (section 3.5) leaves this to retraining with regularisation, and does not mention
    what a dead unit's bias still emits.
    """
    return shrink(model, example, borders=False, scatter=False, inplace=inplace)
