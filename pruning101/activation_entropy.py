"""Activations that hardly switch: measured by entropy, made linear, so that layers can merge.

A unit whose pre-activation is nearly always of one sign behaves as a linear one. Four methods rank
layers by this, make an activation linear (or empty its layer first), retrain, and go on.
"""

from pruning101.core.activation_states import Moments as Moments
from pruning101.core.activation_states import activation_moments as activation_moments
from pruning101.core.activation_states import binary_entropy as binary_entropy
from pruning101.core.activation_states import error_likelihood as error_likelihood
from pruning101.core.activation_states import layer_entropies as layer_entropies
from pruning101.core.activation_states import norm_state_probability as norm_state_probability
from pruning101.core.activation_states import state_entropy as state_entropy
from pruning101.core.activation_states import state_error_likelihood as state_error_likelihood
from pruning101.core.activation_states import state_probability as state_probability
