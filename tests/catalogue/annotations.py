"""Texts of annotations.json beside a.png (40×30) and b.png: each row a name and whether it is read.

A model of ten classes reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Row = tuple[str, bool, bytes]


def listed(*entries: Any) -> bytes:
    return json.dumps(entries).encode()


def entry(**more: Any) -> dict[str, Any]:
    return {"file": "a.png", "label": 1, **more}


def annotations() -> Iterator[Row]:
    """All rows."""
    good = listed(entry())
    yield "one entry", True, good
    yield "two entries", True, listed(entry(), entry(file="b.png"))
    yield "a byte order mark", True, b"\xef\xbb\xbf" + good
    yield "spaces around", True, b" \n" + good + b"\n \n"
    yield "further keys", True, listed(entry(size=[40, 30], comment="mine", original_size=[1, 2]))
    yield "a path with ./", True, listed(entry(file="./a.png"))
    texts = {
        "nothing": b"", "a space": b" ", "a bracket": b"[", "an object": b"{}", "a number": b"3",
        "null": b"null", "a string": b'"a.png"', "no entries": b"[]", "a list of null": b"[null]",
        "a list of lists": b"[[]]", "a list of strings": b'["a.png"]', "a list of numbers": b"[1]",
        "an empty entry": b"[{}]", "no JSON": b"file: a.png", "UTF-16": "[]".encode("utf-16"),
        "latin 1": '[{"file": "é.png", "label": 1}]'.encode("latin-1"), "zeros": b"\0" * 9,
        "deep lists": b"[" * 100_000, "deep lists that end": b"[" * 9000 + b"]" * 9000,
        "deep objects": b'[{"a":' * 9000, "a comma too many": good[:-1] + b",]",
        "single quotes": b"[{'file': 'a.png', 'label': 1}]", "a comment": b"// mine\n" + good,
        "two documents": good + good,
        "a huge number": b'[{"file": "a.png", "label": 1' + b"0" * 5000 + b"}]",
        "a key twice": b'[{"file": "a.png", "label": 1, "label": 2}]',
        "a file twice in one entry": b'[{"file": "a.png", "file": "b.png", "label": 1}]',
    }  # fmt: skip
    for name, text in texts.items():
        yield name, False, text
    labels: list[Any] = [
        True, False, None, "1", "tabby", 1.0, 1.5, -1, 10, 11, 2**31, 2**63, 10**30, [], [1], {},
        "", "one",
    ]  # fmt: skip
    for label in labels:
        yield f"label {label!r}", False, listed(entry(label=label))
    for constant in ("NaN", "Infinity", "-Infinity"):
        yield f"label {constant}", False, f'[{{"file": "a.png", "label": {constant}}}]'.encode()
    for label in (0, 9):
        yield f"label {label}", True, listed(entry(label=label))
    yield "no label", False, listed({"file": "a.png"})
    yield "no file", False, listed({"label": 1})
    files: list[Any] = [
        None, 1, [], {}, True, "", " ", "c.png", "a.PNG", "A.png", "a.png\0", "\ud800",
        "x" * 300, "x" * 5000, "..", ".", "/", "../a.png", "/nowhere/a.png", "a.png/b", "b",
    ]  # fmt: skip
    for file in files:
        yield f"file {file!r:.20} ({len(str(file))})", False, listed(entry(file=file))
    twice = {
        "another label": entry(label=2), "the same label": entry(),
        "another way": entry(file="./a.png"),
        "other boxes": entry(boxes=[[0, 0, 5, 5]]), "a detour": entry(file="x/../a.png"),
    }  # fmt: skip
    for name, again in twice.items():
        yield f"listed twice with {name}", False, listed(entry(), again)
    for boxes in ([], None, [[0, 0, 40, 30]], [[1.5, 2, 3, 4]], [[0, 0, 1, 1], [5, 5, 9, 9]]):
        yield f"boxes {boxes}", True, listed(entry(boxes=boxes))
    wrong: list[Any] = [
        5, "no", {}, True, 0.5, "", {"x0": 1}, [5], [None], [[]], [[1]], [[1, 2, 3]],
        [[1, 2, 3, 4, 5]], ["1234"], [{"x": 1}], [[1, 2, 1, 4]], [[1, 2, 3, 2]], [[3, 2, 1, 4]],
        [[1, 4, 3, 2]], [["1", "2", "3", "4"]], [[None, 0, 1, 1]], [[True, 0, 5, 5]],
        [[0, 0, 10**400, 1]], [[0, 0, 2**40, 1]], [[-5, 0, 4, 4]], [[0, -3, 4, 4]], [[0, 0, 45, 9]],
        [[0, 0, 9, 35]], [[50, 50, 60, 60]], [[0, 0, 5, 5], None], [[0, 0, 5, 5], 3], 0, False,
        [[[0, 0, 5, 5]]], [[0, 0, 5, 5], [9, 9, 1, 1]],
    ]  # fmt: skip
    for boxes in wrong:
        yield f"boxes {boxes!r:.40}", False, listed(entry(boxes=boxes))
    for constant in ("NaN", "Infinity", "-Infinity"):
        for place in range(4):
            box = ["0", "0", "5", "5"]
            box[place] = constant
            text = f'[{{"file": "a.png", "label": 1, "boxes": [[{", ".join(box)}]]}}]'
            yield f"a box with {constant} at {place}", False, text.encode()
    for frame in ("stored", "upright"):
        yield f"frame {frame}", True, listed(entry(frame=frame, boxes=[[0, 0, 9, 9]]))
    for wrong_frame in ("Upright", "", None, 1, True, [], {}, "exif"):
        yield f"frame {wrong_frame!r}", False, listed(entry(frame=wrong_frame))
    yield "a mask", True, listed(entry(mask="mask.png"))
    yield "no mask", True, listed(entry(mask=None))
    masks: list[Any] = [5, True, [], {}, "", "none.png", "small.png", "text.png", "x" * 300, "a\0"]
    for mask in masks:
        yield f"mask {mask!r:.20}", False, listed(entry(mask=mask))
    yield "a mask and boxes", False, listed(entry(mask="mask.png", boxes=[[0, 0, 5, 5]]))
    for key in ("boxs", "Boxes", "lable", "labels", "Label", "File", "masks", "Frame", "files"):
        yield f"the key {key}", False, listed(entry(**{key: [[0, 0, 5, 5]]}))
