"""Wrong turns in lesson 2's exercises; some check must notice each."""

MUTATIONS = {
    "ex-02-1": [
        ("curvature * weight**2 / 2", "curvature * weight**2"),
        ("curvature * weight**2 / 2", "curvature * weight.abs() / 2"),
        ("curvature * weight**2 / 2", "weight**2 / 2"),
        ("sort()", "sort(descending=True)"),
        ("[:k]", "[: k + 1]"),
    ],
    "ex-02-2": [
        ("+ bend * g_below", "- bend * g_below"),
        ("slope**2", "slope"),
        ("w**2", "w"),
        (" + bend * g_below", ""),
    ],
    "ex-02-3": [
        ("x[:, m : m + places] ** 2", "x[:, m : m + places]"),
        ("(x[:, m : m + places] ** 2 * h).sum(1)", "(x[:, m : m + places] ** 2 * h).mean(1)"),
        ("(x[:, m : m + places] ** 2 * h).sum(1)", "(x[:, m : m + places] * h).sum(1) ** 2"),
        ("torch.stack(rows).mean(1)", "torch.stack(rows).sum(1)"),
        ("x.shape[1] - places + 1", "x.shape[1] - places"),
    ],
}
