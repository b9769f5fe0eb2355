"""What a recipe yields after each removal, and the history that saves and resumes it."""

import dataclasses
import functools
import importlib
import json
import math
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruning101.core import masks
from pruning101.core.files import written_whole
from pruning101.core.measure import Footprint, footprint

if TYPE_CHECKING:
    import pandas

    from pruning101.core.data import Dataset


@dataclass(frozen=True)
class Step:
    """One removal of a recipe, measured.

    ``index`` counts removals from 1; ``removed`` says what this one took out, in the method's own
    unit (names of units, or a number of weights); ``accuracy`` (in [0, 1]) and ``loss`` are those
    on ``valid``, which decisions may use; ``test_accuracy`` is there only to be reported; ``model``
    is a copy that later steps leave alone; ``seconds`` is the time that the removal and what
    followed it took, measuring left out.
    """

    index: int
    removed: Any
    accuracy: float
    loss: float
    footprint: Footprint
    model: nn.Module | None
    seconds: float
    test_accuracy: float = math.nan


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: ``loss`` and ``accuracy`` are running means over its batches."""

    index: int
    loss: float
    accuracy: float
    valid_loss: float
    valid_accuracy: float
    lr: float
    seconds: float


Record = Step | Epoch
INDEX_FILE = "history.json"


class History:
    """A sequence of ``Step`` or ``Epoch`` records that can live in a folder and be resumed from it.

    With a ``path`` every appended record is on disk before ``append`` returns: numbers in
    ``history.json``, each step's model in a file of its own. A topic may add fields to ``Step`` in
    a subclass (a dataclass, too): each network among them gets a file of its own. A file is written
    beside its place and then moved there, so an interruption leaves the history as it was after the
    record before.

    The models are pickled whole, because surgery changes their shape: load only histories that you,
    or someone you trust, wrote.
    """

    def __init__(self, records: Iterable[Record] = (), path: str | Path | None = None) -> None:
        self._records = list(records)
        self.path = None if path is None else Path(path)
        self.settings: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def __repr__(self) -> str:
        kept = "in memory" if self.path is None else f"in {self.path}"
        return f"History of {len(self)} records, {kept}"

    @property
    def last(self) -> Any:
        """The newest record, or None while there is none."""
        return self._records[-1] if self._records else None

    def bind(self, **settings: Any) -> None:
        """Tie the history to the settings of the run that fills it.

        A recipe calls this before any work, so that a resumed run cannot quietly go on with other
        settings than it began with. Functions are told apart by their names alone.

        Raises:
            ValueError: the history was begun with other settings.
        """
        settings = json.loads(json.dumps(settings, default=_named))
        if not self._records and not self.settings:
            self.settings = settings
            return
        for name in sorted(settings.keys() | self.settings.keys()):
            before, now = self.settings.get(name), settings.get(name)
            if before != now:
                raise ValueError(
                    f"this history was begun with {name}={before!r} but the run asks for "
                    f"{name}={now!r}; use the same settings or start a new history"
                )

    def latest(self, model: nn.Module) -> nn.Module:
        """Return a copy of the network to go on from: the last step's, or ``model`` before any.

        Raises:
            ValueError: the last step has no network.
        """
        if self._records:
            model = self.last.model
        if model is None:
            raise ValueError("the history's last step has no model to go on from; start a new one")
        return masks.clone(model)

    def append(self, record: Record) -> None:
        """Add one record, and write it to disk if the history has a path."""
        self._records.append(record)
        if self.path is not None:
            try:
                self._write(self.path, [record])
            except BaseException:
                self._records.pop()
                raise

    def save(self, path: str | Path) -> None:
        """Write the whole history into the folder ``path``, made if needed."""
        self._write(Path(path), self._records)

    def _write(self, folder: Path, with_models_of: Iterable[Record]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for record in with_models_of:
            for name, network in _networks(record).items():
                _replace(folder / _file(record.index, name), network)
        rows = [{"kind": _kind(type(record)), **_row(record)} for record in self._records]
        _replace(folder / INDEX_FILE, {"settings": self.settings, "records": rows})

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read the history in the folder ``path``; what is appended later is written there too.

        Raises:
            FileNotFoundError: there is no history in that folder.
            ValueError: what is there is damaged.
        """
        folder = Path(path)
        index = folder / INDEX_FILE
        if not index.exists():
            raise FileNotFoundError(
                f"no history in {folder}: there is no {INDEX_FILE}; name the folder of a run"
            )
        history = cls(path=folder)
        # what an accelerator wrote can be read where there is none
        where = None if torch.accelerator.is_available() else "cpu"
        try:
            content = json.loads(index.read_text())
            for row in content["records"]:
                kind = _class_of(row.pop("kind"))
                if "footprint" in row:
                    row["footprint"] = Footprint(**row["footprint"])
                for f in dataclasses.fields(kind):
                    if f.name in row:
                        if typing.get_origin(f.type) is tuple:
                            row[f.name] = tuple(row[f.name])
                        continue
                    # whole modules: the class and shapes of a pruned network are in no state dict
                    file = folder / _file(row["index"], f.name)
                    row[f.name] = None
                    if file.exists():
                        row[f.name] = torch.load(file, where, weights_only=False)
                history._records.append(kind(**row))
            history.settings = content["settings"]
        except Exception as error:  # what unpickling raises on garbage has no bounds
            raise ValueError(
                f"the history in {folder} cannot be read ({type(error).__name__}: {error}); "
                "remove the folder and run again"
            ) from error
        return history

    @classmethod
    def resume(cls, path: str | Path) -> "History":
        """Return the history in ``path`` to go on with, or a new one that will be kept there."""
        if (Path(path) / INDEX_FILE).exists():
            return cls.load(path)
        return cls(path=path)

    def table(self) -> "pandas.DataFrame":
        """Return one row a record, the footprint spread over its columns, models left out."""
        import pandas

        rows = []
        for record in self._records:
            row = _row(record)
            row.update(row.pop("footprint", {}))
            rows.append(row)
        return pandas.DataFrame(rows)


def measured(
    index: int, removed: Any, model: nn.Module, data: "Dataset", *, seconds: float
) -> Step:
    """Measure ``model`` on ``valid`` and ``test`` and return the ``Step`` with a copy of it."""
    from pruning101.core import runs
    from pruning101.core.training import evaluate  # training itself keeps its epochs in a History

    valid = evaluate(model, data, "valid")
    test = evaluate(model, data, "test")
    example, _ = next(iter(data.batches("valid", 1, device=runs.device_of(model))))
    return Step(
        index=index,
        removed=removed,
        accuracy=valid.accuracy,
        loss=valid.loss,
        footprint=footprint(model, example.to(runs.dtype_of(model))),
        model=masks.clone(model),
        seconds=seconds,
        test_accuracy=test.accuracy,
    )


def _named(setting: Any) -> str:
    """How settings remember what JSON has no word for: a function by a name that stays the same."""
    if isinstance(setting, functools.partial):
        return f"{_named(setting.func)}({setting.keywords})"
    return getattr(setting, "__qualname__", str(setting))


def _file(index: int, name: str) -> str:
    return f"step-{index:04d}.pt" if name == "model" else f"step-{index:04d}-{name}.pt"


def _kind(cls: type) -> str:
    return cls.__name__ if cls.__module__ == __name__ else f"{cls.__module__}:{cls.__name__}"


def _class_of(kind: str) -> type:
    module, _, name = kind.rpartition(":")
    cls = getattr(importlib.import_module(module or __name__), name)
    if not issubclass(cls, Record):
        raise TypeError(f"{kind} is no kind of record")
    return cls


def _networks(record: Record) -> dict[str, nn.Module]:
    return {name: value for name, value in vars(record).items() if isinstance(value, nn.Module)}


def _row(record: Record) -> dict[str, Any]:
    row = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    for name in {"model", *_networks(record)}:
        row.pop(name, None)
    if "footprint" in row:
        row["footprint"] = dataclasses.asdict(row["footprint"])
    return row


def _replace(path: Path, content: Any) -> None:
    with written_whole(path) as part:
        if isinstance(content, nn.Module):
            torch.save(content, part)
        else:
            part.write_text(json.dumps(content, indent=1))
