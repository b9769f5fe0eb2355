"""`pruning101 reproduce lacoot`: the rows, resuming, refusals, and what is printed and kept."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from pruning101.core import models, runs, structure, training
from pruning101.core.measure import footprint
from pruning101.core.steps import History
from pruning101.course import lacoot_rows, lacoot_table, machine
from pruning101.course.lacoot_rows import Run, deployed, row
from pruning101.course.lacoot_table import ROWS, blocks_of, load_data, trained
from pruning101.course.reproduce import reproduce, table
from pruning101.lacoot import block_distances, relative_change

TINY = {
    "dataset": {"name": "digits", "channels": 3},
    "network": "resnet20",
    "blocks": ["layer1.1", "layer2.2", "layer3.2", "layer3.1"],
    "images": {"train": 192, "valid": 96, "test": 64},
    "training": {"batch_size": 64, "schedule": "cosine", "precision": "float32"},
    "from_scratch": {"epochs": 2, "lr": 0.05},
    "layer_folding": {"epochs": 2, "finetune_epochs": 1, "lr": 0.01, "force": True},
    "egp": {"rounds": 2, "epochs": 1, "lr": 0.02},
    "nepenthe": {"rounds": 1, "epochs": 1, "lr": 0.02},
    "easier": {"removals": 2, "epochs": 1, "lr": 0.02},
    "healing": {"epochs": 2, "lr": 0.02},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(lacoot_table.PROFILES, "tiny", TINY)
    yield
    load_data.cache_clear()


def quiet(text):
    pass


def same_numbers(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def without_times(path):
    """What a table's file says, but for how long things took."""
    found = json.loads(path.read_text())
    for one in found["rows"]:
        del one["latency"], one["seconds"]
    for one in found["seeds"]:
        del one["seconds"]
    return found["rows"], found["seeds"]


# --- networks from scratch -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("random", ["penalty(5.0", "n_projections=50", "p=2", "direction='random'", "=False"]),
        ("ascent", ["penalty(0.1", "direction='ascent'", "normalise=False"]),
        ("ascent_normalised", ["penalty(1.0", "direction='ascent'", "normalise=True"]),
        ("relative", ["penalty(1.0", "measure='relative'"]),
    ],
)
def test_a_kind_trains_with_its_penalty(tmp_path, monkeypatch, kind, parts):
    asked = {}
    monkeypatch.setattr(lacoot_table, "fit", lambda *a, **options: asked.update(options))
    trained(kind, 3, "tiny", tmp_path)
    for part in parts:
        assert part in asked["penalty"].__qualname__
    assert asked["checkpoint"] == tmp_path / f"{kind}-3.pt"
    assert asked["epochs"] == 2
    assert asked["seed"] == 3


def test_plain_and_shallow_have_no_penalty_and_shallow_none_of_the_blocks(tmp_path, monkeypatch):
    networks = {kind: trained(kind, 0, "tiny", tmp_path)[0] for kind in ("plain", "shallow")}
    for kind in networks:
        assert torch.load(tmp_path / f"{kind}-0.pt")["settings"]["penalty"] is None
    data = load_data("tiny")
    names = ["layer1.1", "layer2.2", "layer3.1", "layer3.2"]
    assert blocks_of(networks["plain"], "tiny") == names
    assert blocks_of(networks["shallow"], "tiny") == []
    image = next(iter(data.batches("valid", 1)))[0]
    assert footprint(networks["plain"], image).depth == 20
    assert footprint(networks["shallow"], image).depth == 12
    monkeypatch.setitem(lacoot_table.PROFILES, "tiny", TINY | {"blocks": None})
    removable = structure.removable_blocks(networks["plain"], image)
    assert blocks_of(networks["plain"], "tiny") == removable != names


def test_an_unknown_kind_is_named_beside_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"no kind of training 'ascend'.*'ascent'"):
        trained("ascend", 0, "tiny", tmp_path)


def test_training_that_was_cut_off_comes_to_the_same_network(tmp_path, monkeypatch):
    whole, history = trained("ascent", 0, "tiny", tmp_path / "whole")
    assert len(history) == 2

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    save = runs.save
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            trained("ascent", 0, "tiny", tmp_path / "cut")
    cut = torch.load(tmp_path / "cut" / "ascent-0.pt")
    assert len(cut["epochs"]) == 1
    assert not same_numbers(cut["model"], whole.state_dict())
    resumed, history = trained("ascent", 0, "tiny", tmp_path / "cut")
    assert len(history) == 2
    assert same_numbers(resumed.state_dict(), whole.state_dict())


# --- rows ----------------------------------------------------------------------------------------


def test_multiply_adds_are_the_papers_and_deploying_keeps_the_function():
    model = models.build("resnet18", seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_mean, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    images = torch.randn(2, 3, 32, 32, generator=generator)
    for macs, depth in (("140.19", 18), ("64.69", 10)):
        small = deployed(model, images)
        counts = footprint(small, images)
        assert f"{counts.macs / 1e6:.2f}" == macs
        assert counts.depth == depth
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in small.modules())
        with torch.no_grad():
            torch.testing.assert_close(small(images), model.eval()(images), rtol=1e-3, atol=1e-3)
        model.train()
        for name in structure.removable_blocks(model, images):
            structure.remove_block(model, name)
    assert lacoot_table.PAPER["original"]["macs"] == 140.19e6
    assert lacoot_table.PAPER["lacoot_published"]["macs"] == 64.69e6


@pytest.mark.parametrize(("name", "kind"), [("lacoot_ascent", "ascent"), ("relative", "relative")])
def test_removal_is_in_ascending_order_and_figures_are_those_of_the_networks(tmp_path, name, kind):
    run = Run(0, "tiny", tmp_path, quiet)
    figures = row(name, run)
    model, history = trained(kind, 0, "tiny", tmp_path)
    data = load_data("tiny")
    batches, blocks = data.batches("valid", 125), TINY["blocks"]
    if kind == "relative":
        distances = relative_change(model, batches, blocks=blocks)
    else:
        distances = block_distances(model, batches, blocks=blocks, direction="ascent")
    order = sorted(distances, key=distances.get)
    assert [one.get("removed") for one in figures["after"]] == [None, *order]
    for one in figures["after"]:
        if "removed" in one:
            structure.remove_block(model, one["removed"])
        for split in ("valid", "test"):
            assert one[f"{split}_accuracy"] == training.evaluate(model, data, split).accuracy
    last = figures["after"][-1]
    for figure in ("valid_accuracy", "test_accuracy", "macs", "depth"):
        assert figures[figure] == last[figure]
    assert figures["epochs"] == 2
    assert figures["seconds"] == pytest.approx(sum(epoch.seconds for epoch in history))
    kept = lacoot_rows.network(name, run)
    assert same_numbers(kept.state_dict(), model.state_dict())


def test_a_recipe_begins_with_the_plain_network_and_is_told_its_settings(tmp_path, monkeypatch):
    plain = trained("plain", 0, "tiny", tmp_path)[0].state_dict()
    asked = {}

    def recipe(model, data, **options):
        assert same_numbers(model.state_dict(), plain)
        asked.update(options)
        return iter(())

    profile = TINY | {"egp": TINY["egp"] | {"retrain": {"schedule": "constant"}}}
    monkeypatch.setitem(lacoot_table.PROFILES, "tiny", profile)
    monkeypatch.setitem(lacoot_rows.RECIPES, "egp", recipe)
    figures = row("egp", Run(0, "tiny", tmp_path, quiet))
    assert (asked["rounds"], asked["epochs"], asked["lr"]) == (2, 1, 0.02)
    assert asked["retrain"]["schedule"] == "constant"
    assert asked["retrain"]["batch_size"] == 64
    assert figures["epochs"] == 2, "no round was done"


@pytest.mark.slow
def test_all_rows_and_a_run_cut_off_everywhere_comes_to_the_same(tmp_path, monkeypatch, capsys):
    out = tmp_path / "whole.json"
    text, path = reproduce("lacoot", profile="tiny", out=out, folder=tmp_path / "whole")
    assert path == out
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(ROWS)
    epochs = {one["row"]: one["epochs"] for one in json.loads(out.read_text())["seeds"]}
    assert epochs == {
        **dict.fromkeys(ROWS, 2),
        "layer_folding": 5,
        "egp": 4,
        "nepenthe": 3,
        "easier": 4,
        "relative_healed": 4,
        "plain_healed": 4,
    }
    assert "seed 0, easier" in capsys.readouterr().err

    # every other epoch and round that gets kept is the last one before an interruption
    kept = 0

    def stopping(keep):
        def keep_and_stop(*arguments):
            nonlocal kept
            keep(*arguments)
            on_disk = getattr(arguments[0], "path", True) is not None
            kept += on_disk
            if on_disk and kept % 2:
                raise KeyboardInterrupt

        return keep_and_stop

    monkeypatch.setattr(runs, "save", stopping(runs.save))
    monkeypatch.setattr(History, "append", stopping(History.append))
    again = tmp_path / "again.json"
    interruptions = 0
    while not again.exists():
        try:
            reproduce("lacoot", profile="tiny", out=again, folder=tmp_path / "again")
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 30
    assert interruptions >= 10
    assert without_times(again) == without_times(out)


def test_a_done_run_prints_again_without_training(tmp_path, monkeypatch, capsys):
    options = {"profile": "tiny", "rows": ["shallow"], "folder": tmp_path}
    text, out = reproduce("lacoot", **options)
    assert out == tmp_path / "table.json"
    before = out.read_text()
    capsys.readouterr()
    for module in (lacoot_table, lacoot_rows):
        monkeypatch.setattr(module, "fit", None)
    monkeypatch.setattr(lacoot_rows, "interleaved", None)
    assert reproduce("lacoot", **options) == (text, out)
    assert out.read_text() == before
    assert capsys.readouterr().err == ""


def test_done_shows_what_is_there_and_trains_nothing(tmp_path, monkeypatch):
    options = {"profile": "tiny", "folder": tmp_path}
    with pytest.raises(ValueError, match=r"^No row is done in '[^\n]*; make some without --done.$"):
        reproduce("lacoot", **options, done=True)
    for rows, seed in ((["shallow"], 0), (["shallow", "original"], 1)):
        reproduce("lacoot", **options, rows=rows, seeds=[seed])
    for module in (lacoot_table, lacoot_rows):
        monkeypatch.setattr(module, "fit", None)
    timed = []

    def latencies(networks):
        timed.append({row: run.seed for row, run in networks.items()})
        return {row: {"ms": 1.0, "clock_ms": 1.0} for row in networks}

    monkeypatch.setattr(lacoot_rows, "latencies", latencies)
    text, out = reproduce("lacoot", **options, seeds=[0, 1, 2], done=True)
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["original", "shallow"]
    found = json.loads(out.read_text())
    assert [one["seeds"] for one in found["rows"]] == [[1], [0, 1]]
    assert timed == [{"original": 1, "shallow": 0}]
    end = "--seeds 0 1 2 --rows original shallow --done"
    assert found["environment"]["command"].endswith(end)


def test_what_is_kept_says_how_it_was_made(tmp_path):
    options = {"profile": "tiny", "rows": ["shallow"], "seeds": [4, 5], "folder": tmp_path}
    found = json.loads(reproduce("lacoot", **options)[1].read_text())
    command = "pruning101 reproduce lacoot --profile tiny --seeds 4 5 --rows shallow"
    assert found["environment"]["command"] == command
    assert found["environment"]["torch"] == torch.__version__
    assert found["recipe"] == TINY
    assert found["penalties"]["random"] == {"strength": 5.0, "direction": "random"}
    [summary] = found["rows"]
    assert summary["seeds"] == [4, 5]
    for name in ("valid_accuracy", "test_accuracy", "seconds"):
        a, b = (one[name] for one in found["seeds"])
        assert summary[name] == {"mean": (a + b) / 2, "least": min(a, b), "greatest": max(a, b)}
    assert summary["latency"]["ms"] > 0
    assert math.isfinite(summary["latency"]["clock_ms"])


def test_milliseconds_are_the_processors_where_there_is_no_accelerator(tmp_path, monkeypatch):
    run = Run(0, "tiny", tmp_path, quiet)
    row("shallow", run)
    times = {"shallow": {"median": 0.003, "cpu_median": 0.002}}
    monkeypatch.setattr(lacoot_rows, "interleaved", lambda calls, **options: times)
    monkeypatch.setattr(lacoot_rows, "default_device", lambda: torch.device("cpu"))
    assert lacoot_rows.latencies({"shallow": run}) == {"shallow": {"ms": 2.0, "clock_ms": 3.0}}


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "lacot"}, "There is no table 'lacot': did you mean lacoot?"),
        ({"name": "easier"}, "There is no table 'easier': choose from lacoot."),
        ({"profile": "tny"}, "There is no profile 'tny': did you mean tiny?"),
        ({"rows": ["original", "eazier"]}, "There is no row 'eazier': did you mean easier?"),
        ({"seeds": [0, -1]}, "seed must be a whole number, 0 or more, not -1"),
        ({"out": Path()}, "is a folder; name the JSON file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, options, told):
    options = {"name": "lacoot", "profile": "tiny", "folder": tmp_path / "run", **options}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        reproduce(**options)
    assert told in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_begun_with_other_settings_is_refused(tmp_path, monkeypatch):
    options = {"profile": "tiny", "rows": ["shallow"], "folder": tmp_path}
    reproduce("lacoot", **options)
    other = TINY | {"from_scratch": {"epochs": 3, "lr": 0.05}}
    monkeypatch.setitem(lacoot_table.PROFILES, "tiny", other)
    with pytest.raises(ValueError, match=r"^[^\n]*begun with recipe=[^\n]*another folder[^\n]*$"):
        reproduce("lacoot", **options)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json' is damaged; delete"):
        reproduce("lacoot", **options)


# --- the table, and the machine ------------------------------------------------------------------


def test_the_table_shows_means_ranges_and_the_paper():
    def three(least, mean, greatest):
        return {"mean": mean, "least": least, "greatest": greatest}

    one = {
        "row": "lacoot_published",
        "seeds": [0, 1, 2],
        "test_accuracy": three(0.61, 0.625, 0.64),
        "valid_accuracy": three(0.5, 0.6, 0.7),
        "macs": three(64_690_000, 64_690_000, 64_690_000),
        "depth": three(10, 10, 10),
        "epochs": three(15, 15, 15),
        "seconds": three(60, 90, 120),
        "latency": {"ms": 2.345, "clock_ms": 2.0},
        "paper": lacoot_table.PAPER["lacoot_published"],
    }
    shown = table([one]).iloc[0].tolist()
    assert shown == [
        "lacoot_published", "62.50 [61.00, 64.00]", "60.00", "64.69", "10", "2.35", "1.5", "15",
        90.99, 64.69, 4.78, 40,
    ]  # fmt: skip
    assert "62.50 [61" not in str(table([one | {"seeds": [0]}]))


def test_every_row_can_be_made_and_every_profile_has_its_settings():
    assert tuple(lacoot_rows.RUNS) == ROWS
    assert set(lacoot_table.PAPER) < set(ROWS)
    for profile in ("quick", "standard", "paper"):
        assert set(lacoot_table.PROFILES[profile]) == set(TINY)
        kept = lacoot_table.settings(profile)
        assert json.loads(json.dumps(kept)) == kept
    rates = [lacoot_table.drops_at_half_and_three_quarters(epoch / 160) for epoch in range(160)]
    assert rates == [1.0] * 80 + [0.1] * 40 + [0.01] * 40


def test_the_environment_is_that_of_this_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py", "--fast"])
    found = machine.environment()
    assert list(found) == [
        "pruning101", "python", "torch", "numpy", "system", "cpu", "cores", "threads", "gpu",
        "command",
    ]  # fmt: skip
    assert found["command"] == "python benchmarks/speed.py --fast"
    assert found["threads"] == torch.get_num_threads()
