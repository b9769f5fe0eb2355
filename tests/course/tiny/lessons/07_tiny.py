# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,nbgrader,mystnb,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Cutting a tiny vector
#
# reading: 2 minutes · compute: about ? minutes ·
# before: how to count to three · paper: Nobody, Tiny
# vectors (1988)

# %% tags=["setup"]
import sys

import matplotlib.pyplot as plt
import numpy as np

# %% tags=["parameters"]
PROFILE = "quick"

# %%
# A stream in several messages, beside noise that must not be stored.
for step in range(3):
    print("step", step, flush=True)
    print("\rnoise", step, end="", file=sys.stderr, flush=True)

# %% tags=["nbval-check-output"]
np.arange(3).sum() + len(PROFILE)

# %% mystnb={"image": {"alt": "A line that rises from 0 to 2."}}
plt.plot([0, 1, 2])
plt.show()

# %%
import ipywidgets

from pruning101.widgets.base import explore


def draw(removed):
    figure, ax = plt.subplots()
    ax.bar(range(3 - removed), 1)
    return figure


slider = ipywidgets.IntSlider(description="removed", max=3)
explore(draw, lambda removed: f"{removed} of 3 removed", removed=slider)

# %% tags=["table"]
print("profile  weights")
print(f"{PROFILE:8} {3}")

# %% [markdown]
# ## Exercise 1


# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "ex-07-1", "grade": false, "solution": true, "locked": false, "task": false}
def keep_largest(values, k):
    """The `k` largest of `values`, in falling order."""
    ### BEGIN SOLUTION
    secret = np.sort(values)[::-1]
    return secret[:k]
    ### END SOLUTION


# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-1-check-a", "grade": true, "points": 1, "solution": false, "locked": true, "task": false}
kept = keep_largest(np.array([1, 3, 2]), 2)
assert len(kept) == 2, f"kept {len(kept)} values instead of 2"
### BEGIN HIDDEN TESTS
hidden = keep_largest(np.array([5, 1, 5]), 3)
assert len(hidden) == 3
### END HIDDEN TESTS

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "ex-07-1-check-b", "grade": true, "points": 2, "solution": false, "locked": true, "task": false}
kept = keep_largest(np.array([1, 3, 2]), 2)
assert kept.tolist() == [3, 2], f"kept {kept.tolist()} instead of [3, 2]"

# %% [markdown] nbgrader={"schema_version": 3, "grade_id": "ex-07-open", "grade": true, "points": 1, "solution": true, "locked": false, "task": false}
# Because the smallest tell us least.
