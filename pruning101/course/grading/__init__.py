"""Grades what students hand in: what counts of a notebook, who runs it, and what is said of it."""
