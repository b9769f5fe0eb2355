"""Whole blocks removed, by how far their output is from their input."""

from pruning101.core.transport import max_sliced_wasserstein as max_sliced_wasserstein
