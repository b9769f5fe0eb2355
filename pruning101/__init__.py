"""Making neural networks smaller by pruning: one module a topic, each beside its lesson.

Topics are ordinary submodules (``from pruning101 import magnitude``); what they stand on is in
``pruning101.core``. Nothing is imported before it is asked for.
"""

__version__ = "0.1.0"
