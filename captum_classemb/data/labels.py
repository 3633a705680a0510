"""Which output of a model each class folder stands for."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from captum_classemb.errors import DataError

_WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
_DIGITS = re.compile(r"\d+", re.ASCII)
_SHOWN = 3


class Classes(Protocol):
    """A model's outputs and what they are called, as `captum_classemb.models.ClassNames` knows."""

    @property
    def named(self) -> bool:
        """Whether the outputs have names."""

    @property
    def wordnet_ids(self) -> Sequence[str]:
        """Of each output, where the outputs are those of a known ImageNet set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...

    def with_full_name(self, text: str) -> list[int]:
        """The classes whose whole name this is."""

    def with_name(self, text: str) -> list[int]:
        """The classes that have this among their names."""

    def suggest(self, text: str) -> str:
        """Names that are like this one, as the end of a sentence."""


@dataclass(frozen=True)
class FolderLabels:
    """The output that each class folder stands for.

    Attributes:
        rule: by which they were found.
        index: by the folder's name.
    """

    rule: str
    index: Mapping[str, int]

    def summary(self, classes: Classes | None = None) -> str:
        """One short line.

        Examples:
            >>> FolderLabels("sorted order", {"cat": 0, "dog": 1}).summary()
            '2 class folders by sorted order: cat → 0, dog → 1'
        """
        shown = [
            f"{folder} → {index}" + (f" {classes[index]}" if classes and classes.named else "")
            for folder, index in list(self.index.items())[:_SHOWN]
        ]
        more = ", …" if len(self.index) > _SHOWN else ""
        return f"{len(self.index)} class folders by {self.rule}: {', '.join(shown)}{more}"


@dataclass(frozen=True)
class Labelling:
    """What labels mean.

    Attributes:
        classes: the model's outputs, or their number; None if no model is known.
        given: what the user says of the class folders: ``"sorted"``, to count them in sorted
            order, or an index or a class name for each.
        needed: whether images have to have labels at all.
    """

    classes: Classes | int | None = None
    given: Literal["sorted"] | Mapping[str, int | str] | None = None
    needed: bool = True

    @property
    def count(self) -> int | None:
        """The number of outputs; None if it is not known, or labels are no matter."""
        if self.classes is None or not self.needed:
            return None
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def names(self) -> Classes | None:
        """The outputs, where more is known of them than their number."""
        return None if isinstance(self.classes, int) else self.classes

    @property
    def wordnet_ids(self) -> Sequence[str]:
        """Of each output of a model of ImageNet's; where no model is known, of ImageNet-1k."""
        if self.names is not None:
            return self.names.wordnet_ids
        # Here, for timm takes seconds to import and most folders do not need it.
        from timm.data import ImageNetInfo, infer_imagenet_subset

        count = 1000 if self.classes is None else self.classes
        subset = infer_imagenet_subset({"num_classes": count})
        return ImageNetInfo(subset).label_names() if subset else ()

    def check(self, label: Any, what: str) -> str | None:
        """What is wrong with a label; None if it is an output of the model."""
        if type(label) is not int:
            return f"{what} has the label {label!r:.40}: a label is a whole number"
        if label < 0 or label >= (self.count or 2**31):
            return f"{what} has the label {label}, and the model {self.count} classes"
        return None

    def of_folders(self, folders: Sequence[str], root: Path) -> FolderLabels:
        """The output of each class folder, by the first rule that maps every one of them.

        The rules: what the user gave; WordNet ids, where the outputs are those of a known
        ImageNet set; full names of classes; names that a single class has; numbers as indices.

        Args:
            folders: their names.
            root: where they lie, for messages.

        Raises:
            DataError: if no rule maps all folders, or one maps two folders to one class.
        """
        folders = sorted(folders)
        found = self._found(folders, root)
        return FolderLabels(found.rule, _one_to_one(found.index, root))

    def _found(self, folders: Sequence[str], root: Path) -> FolderLabels:
        names = self.names
        if self.given is not None:
            return self._by_user(folders, root)
        if all(map(is_wordnet_id, folders)) and self.wordnet_ids:
            places = {name: place for place, name in enumerate(self.wordnet_ids)}
            unknown = [folder for folder in folders if folder not in places]
            if unknown:
                raise self._refused(unknown, folders, root)
            return FolderLabels("WordNet id", {folder: places[folder] for folder in folders})
        rules: list[tuple[str, Callable[[str], list[int]]]] = []
        if names is not None and names.named:
            rules = [("full class name", _by_full_name(names)), ("class name", names.with_name)]
        rules.append(("number", self._by_number))
        for rule, find in rules:
            found = {folder: find(folder) for folder in folders}
            if all(len(places) == 1 for places in found.values()):
                index = {folder: places[0] for folder, places in found.items()}
                self._check_numbers(index, root)
                return FolderLabels(rule, index)
        raise self._refused(folders, folders, root)

    def _by_number(self, folder: str) -> list[int]:
        if self.count is None or not _DIGITS.fullmatch(folder) or len(folder) > 9:
            return []
        return [int(folder)] if int(folder) < self.count else []

    def _check_numbers(self, index: Mapping[str, int], root: Path) -> None:
        for folder, place in index.items():
            if _DIGITS.fullmatch(folder) and int(folder[:9]) != place:
                raise DataError(
                    f"{root} has a folder {folder}, which is the name of class {place}, and the "
                    f"number of another: say with --labels what it is."
                )

    def _by_user(self, folders: Sequence[str], root: Path) -> FolderLabels:
        if self.given == "sorted":
            if self.count is not None and len(folders) > self.count:
                raise DataError(
                    f"{root} has {len(folders)} class folders and the model {self.count} classes."
                )
            return FolderLabels("sorted order", {name: i for i, name in enumerate(folders)})
        assert not isinstance(self.given, (str, type(None)))
        missing = [folder for folder in folders if folder not in self.given]
        if missing:
            raise DataError(f"the labels that were given say nothing of {_some(missing)}.")
        index = {folder: self._resolve(folder, self.given[folder]) for folder in folders}
        return FolderLabels("the labels given", index)

    def _resolve(self, folder: str, value: int | str) -> int:
        if isinstance(value, str) and not _DIGITS.fullmatch(value):
            names = self.names
            found = names.with_full_name(value) or names.with_name(value) if names else []
            if len(found) != 1:
                raise DataError(
                    f"the labels that were given name {value!r} for {folder}, which is the name of "
                    f"{len(found)} classes of the model: give the index."
                )
            return found[0]
        label = int(value) if isinstance(value, str) and len(value) < 10 else value
        problem = self.check(label, f"in the labels that were given, {folder}")
        if problem:
            raise DataError(f"{problem}.")
        return int(label)

    def _refused(self, folders: Sequence[str], every: Sequence[str], root: Path) -> DataError:
        """Why the folders could not be mapped, with the candidates of the first one."""
        start = f"{root} has class folders that do not say which outputs of the model they are"
        end = "name them all in one way, or say with --labels what they are"
        if self.count is not None and set(every) == {str(n + 1) for n in range(self.count)}:
            return DataError(f"{start}: they count from 1, and outputs from 0; {end}.")
        numbers = [folder for folder in every if _DIGITS.fullmatch(folder)]
        if numbers == list(every) and (beyond := [n for n in every if not self._by_number(n)]):
            return DataError(
                f"{start}: {_some(beyond)} is no index of its {self.count} outputs; {end}."
            )
        if all(map(is_wordnet_id, every)):
            return DataError(
                f"{start}: {_some(folders)} is no WordNet id of its {self.count} outputs; {end}."
            )
        names = self.names
        if names is None or not names.named:
            return DataError(
                f"{start}, and the model has no class names: type --labels sorted to count the "
                "folders in sorted order, or give a file of labels."
            )
        for folder in folders:
            places = _by_full_name(names)(folder) or names.with_name(folder)
            if len(places) > 1:
                bearers = " and ".join(f"{place} ({names[place]})" for place in places)
                return DataError(f"{start}: {folder} may be {bearers}; {end}.")
        unknown = [folder for folder in folders if not names.with_name(folder)]
        if not unknown or len(unknown) < len(folders):
            other = f", unlike {_some(unknown)}" if unknown else ""
            return DataError(f"{start}: some are class names{other}; {end}.")
        return DataError(f"{start}: {unknown[0]} is no class ({names.suggest(unknown[0])}); {end}.")


def _by_full_name(names: Classes) -> Callable[[str], list[int]]:
    """Finds the classes of a whole name, and those that bear it among others: it has to be sure."""

    def find(folder: str) -> list[int]:
        full = names.with_full_name(folder)
        return sorted({*full, *names.with_name(folder)}) if full else []

    return find


def _one_to_one(index: Mapping[str, int], root: Path) -> Mapping[str, int]:
    folders = defaultdict(list)
    for folder, place in index.items():
        folders[place].append(folder)
    for place, same in folders.items():
        if len(same) > 1:
            raise DataError(
                f"{root} has several folders for class {place}: {_some(same)}; put them together."
            )
    return index


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def is_wordnet_id(name: str) -> bool:
    """Whether a folder is called as ImageNet calls its classes.

    Examples:
        >>> is_wordnet_id("n01440764"), is_wordnet_id("tench")
        (True, False)
    """
    return _WORDNET_ID.fullmatch(name) is not None


def read_json(path: Path) -> Any:
    """What a JSON file holds; a byte order mark before it is no matter.

    Raises:
        DataError: if it cannot be read or is no JSON, or an object in it has a key twice.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no valid JSON: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def parse_json(text: str, path: Path) -> Any:
    """The value of a JSON text; see :func:`read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise DataError(f"{path} has the key {twice!r} twice in one object.")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{path} is no valid JSON: it is nested too deeply.") from error


def read_labels(path: Path) -> dict[str, int | str]:
    """What ``--labels FILE`` says of each class folder: the index or the name of its class.

    The file is a JSON object, or has a line ``folder,class`` for each folder.

    Raises:
        DataError: if the file does not have this form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DataError(f"the labels {path} cannot be read: {reason}.") from error
    if text.lstrip().startswith(("{", "[")):
        found = parse_json(text, path)
    else:
        try:
            rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
        except csv.Error as error:
            raise DataError(f"{path} is no table of folders and classes: {error}.") from error
        found = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
        if len(found) < len(rows):
            raise DataError(f"{path} has to have one line folder,class for each folder.")
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} has to map class folders to classes.")
    for folder, value in found.items():
        if type(value) not in (int, str):
            raise DataError(f"{path} maps {folder} to {value!r}: give an index or a class name.")
    return found
