"""Wrong turns in lesson 1's exercises; some check must notice each."""

MUTATIONS = {
    "ex-01-1": [
        ("silent[:, i] = 0", "silent[:, i] = 1"),
        ("error(silent) - error(a)", "error(a) - error(silent)"),
        ("error(silent) - error(a)", "error(silent)"),
        ("a.shape[1]", "a.shape[1] - 1"),
        ("a.clone()", "a"),
        (".abs()", ".square()"),
    ],
    "ex-01-2": [
        ("-(delta @ w * a)", "(delta @ w * a)"),
        ("(y - t).sign()", "(y - t)"),
        ("y * (1 - y)", "y"),
        ("* a).mean(0)", ").mean(0)"),
        ("mean(0)", "sum(0)"),
    ],
    "ex-01-3": [
        ("values[units]", "values[keep]"),
        ("+ gone @ values[units]", "- gone @ values[units]"),
        ("+ gone @ values[units]", ""),
        ("second.weight[:, keep]", "second.weight[:, : len(keep)]"),
        ("first.bias[keep]", "first.bias[: len(keep)]"),
    ],
}
