# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,nbgrader,mystnb,-all
# ---

# %% [markdown]
# # A tiny course
#
# | | Lesson | Paper | Reading | Compute | Know before |
# | --- | --- | --- | --- | --- | --- |
# | 07 | Tiny | | | | |
# | 08 | Not there yet | Nobody 1989 | | | |
