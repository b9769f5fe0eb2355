"""The history of a run: what is appended is kept, whatever happens afterwards."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from pruning101.core import data, masks, steps
from pruning101.core.measure import Footprint, footprint
from pruning101.core.models import build


def step(index: int, model: nn.Module | None = None) -> steps.Step:
    size = Footprint(
        parameters=10, nonzero=9 - index, macs=100, depth=2, dense_bytes=40, coded_bytes=30
    )
    return steps.Step(
        index, [f"fc1:{index}"], 0.9, 0.3, size, model, seconds=1.5, test_accuracy=0.88
    )


def epoch(index: int) -> steps.Epoch:
    return steps.Epoch(index, 0.5 / index, 0.9, 0.4, 0.91, 0.1, 2.0)


def test_round_trip_keeps_every_field_and_the_weights_of_every_model(tmp_path):
    torch.manual_seed(0)
    history = steps.History()
    for index in (1, 2):
        history.append(step(index, nn.Linear(3, index)))
    history.append(epoch(1))
    history.save(tmp_path / "run")
    loaded = steps.History.load(tmp_path / "run")
    assert len(loaded) == 3
    for before, after in zip(history, loaded, strict=True):
        if isinstance(before, steps.Step):
            assert torch.equal(before.model.weight, after.model.weight)
            before, after = (copy.copy(r) for r in (before, after))
            object.__setattr__(before, "model", None)
            object.__setattr__(after, "model", None)
        assert before == after


def test_appending_writes_at_once_and_resuming_goes_on(tmp_path):
    history = steps.History.resume(tmp_path)
    history.append(step(1))
    again = steps.History.resume(tmp_path)
    assert again.last == step(1)
    again.append(step(2))
    assert [s.index for s in steps.History.load(tmp_path)] == [1, 2]


def test_a_write_that_fails_leaves_the_history_as_it_was(tmp_path, monkeypatch):
    history = steps.History.resume(tmp_path)
    history.append(step(1, nn.Linear(2, 2)))

    def full(_model, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        history.append(step(2, nn.Linear(2, 2)))
    assert len(history) == 1
    assert len(steps.History.load(tmp_path)) == 1
    assert not list(tmp_path.glob("*part*"))


def test_other_settings_are_refused(tmp_path):
    history = steps.History.resume(tmp_path)
    history.bind(rounds=3, seed=0)
    history.append(step(1))
    again = steps.History.load(tmp_path)
    again.bind(rounds=3, seed=0)
    with pytest.raises(ValueError, match=r"begun with rounds=3 .* asks for rounds=5"):
        again.bind(rounds=5, seed=0)


@pytest.mark.parametrize("damage", ["", "{", '{"records": [{"kind": "Other"}], "settings": {}}'])
def test_damage_is_named(tmp_path, damage):
    (tmp_path / steps.INDEX_FILE).write_text(damage)
    with pytest.raises(ValueError, match="cannot be read"):
        steps.History.load(tmp_path)


def test_a_folder_without_history_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no history in"):
        steps.History.load(tmp_path)


def test_the_table_spreads_the_footprint_and_leaves_the_model_out():
    table = steps.History([step(1, nn.Linear(2, 2)), step(2)]).table()
    assert list(table["nonzero"]) == [8, 7]
    assert "model" not in table.columns


def test_measured_looks_at_the_model_and_keeps_a_copy():
    digits = data.load("digits")
    model = build("lenet_300_100", in_channels=1, image_size=8)
    masks.apply(model, masks.from_scores({"fc1.weight": model.fc1.weight.detach().abs()}, 0.5))
    found = steps.measured(1, 9600, model, digits, seconds=0.0)
    example, labels = next(iter(digits.batches("test", len(digits.test))))
    with torch.no_grad():
        right = (model.eval()(example).argmax(1) == labels).float().mean().item()
    assert found.test_accuracy == pytest.approx(right)
    assert found.footprint == footprint(model, example[:1])
    kept = found.model.fc1.weight.detach().clone()
    with torch.no_grad():
        model.fc1.weight_orig.mul_(2)
    assert torch.equal(found.model.fc1.weight, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_is_measured(dtype):
    digits = data.load().subset(valid=10, test=10)
    model = build("lenet_300_100", in_channels=1, image_size=8).to(dtype)
    assert steps.measured(1, 0, model, digits, seconds=0).footprint.macs == 64 * 300 + 31_000


@pytest.mark.parametrize("content", [b"garbage", b"", b"\x80"])
def test_a_damaged_model_is_told_in_one_sentence(tmp_path, content):
    steps.History(path=tmp_path).append(step(1, nn.Linear(2, 2)))
    (tmp_path / "step-0001.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read.*remove the folder and run again"):
        steps.History.load(tmp_path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
def test_what_a_gpu_wrote_is_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        steps.History(path=tmp_path).append(step(1, nn.Linear(2, 2)))
    assert steps.History.load(tmp_path).last.model.weight.device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class Wider(steps.Step):
    """A topic's own record."""

    start: nn.Module | None = None
    curve: tuple[float, ...] = ()
    other: nn.Module | None = None


def test_a_step_of_a_topic_keeps_its_networks_and_its_class(tmp_path):
    plain = step(1, nn.Linear(2, 2))
    wide = Wider(**vars(step(2, nn.Linear(2, 3))), start=nn.Linear(2, 4), curve=(0.5, 0.25))
    history = steps.History(path=tmp_path)
    history.append(plain)
    history.append(wide)
    first, second = steps.History.load(tmp_path)
    assert (type(first), type(second)) == (steps.Step, Wider)
    assert torch.equal(second.model.weight, wide.model.weight)
    assert torch.equal(second.start.weight, wide.start.weight)
    assert (second.curve, second.other, second.removed) == ((0.5, 0.25), None, ["fc1:2"])
    assert list(history.table()["curve"])[1] == (0.5, 0.25)
    assert "start" not in history.table().columns


def test_a_kind_that_is_no_record_is_refused(tmp_path):
    (tmp_path / steps.INDEX_FILE).write_text(
        '{"records": [{"kind": "subprocess:Popen", "args": "true"}], "settings": {}}'
    )
    with pytest.raises(ValueError, match=r"cannot be read \(TypeError: .* no kind of record"):
        steps.History.load(tmp_path)


def test_settings_remember_functions_by_name():
    def settings(share):
        # made anew, as in another process: the same names at other addresses
        def loss(outputs, labels):
            return 0

        return {"loss": loss, "score": functools.partial(loss, share=share)}

    first, again = settings(1), settings(1)
    history = steps.History()
    history.bind(**first)
    history.append(epoch(1))
    history.bind(**again)
    with pytest.raises(ValueError, match="score="):
        history.bind(**settings(2))


def test_the_latest_network_is_a_copy_of_the_last_steps_or_of_the_given_one():
    given, history = nn.Linear(2, 1), steps.History()
    assert history.latest(given) is not given
    assert torch.equal(history.latest(given).weight, given.weight)
    history.append(step(1, nn.Linear(2, 3)))
    assert history.latest(given).out_features == 3
    assert history.latest(given) is not history.last.model
    history.append(step(2))
    with pytest.raises(ValueError, match="no model to go on from"):
        history.latest(given)
