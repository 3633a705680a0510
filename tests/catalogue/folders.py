"""Names of class folders: for which model, which labels they get; None where they are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: (what, model, folders, labels in the order of the folders)
Row = tuple[str, str, Sequence[str], list[int] | None]


def folders() -> Iterator[Row]:
    """All rows; models: digits (named), imagenet, plain (ten outputs without names), numbers."""
    yield "class names", "digits", DIGITS, list(range(10))
    yield "some class names", "digits", ("nine", "two"), [9, 2]
    yield "one class name", "digits", ("seven",), [7]
    yield "upper case", "digits", ("SEVEN", "Two"), [7, 2]
    yield "numbers", "digits", ("0", "7"), [0, 7]
    yield "numbers with zeros", "digits", ("00", "07"), [0, 7]
    yield "all numbers", "plain", [str(i) for i in range(10)], list(range(10))
    yield "1 2 3", "digits", ("1", "2", "3"), [1, 2, 3]
    yield "1 2 3 10 of a thousand", "imagenet", ("1", "2", "3", "10"), [1, 2, 3, 10]
    yield "WordNet ids", "imagenet", ("n01440764", "n01443537", "n02123045"), [0, 1, 281]
    yield "a full name", "imagenet", ("hen", "tench, Tinca tinca"), [8, 0]
    yield (
        "a full name with underscores",
        "imagenet",
        ("hen", "tench,_Tinca_tinca"),
        [8, 0],
    )
    yield "synonyms", "imagenet", ("tabby", "tiger cat", "hen"), [281, 282, 8]
    yield "synonyms with underscores", "imagenet", ("tabby_cat", "Egyptian-cat"), [281, 285]
    yield "spaces", "imagenet", ("tiger  cat", " tench"), [282, 0]
    yield "names that are numbers, alike", "numbers", ("0", "1", "2"), [0, 1, 2]
    refused: list[tuple[str, str, Sequence[str]]] = [
        ("1 to C", "digits", [str(i + 1) for i in range(10)]),
        ("1 to C without names", "plain", [str(i + 1) for i in range(10)]),
        ("01 to C", "digits", [f"{i + 1:02d}" for i in range(10)]),
        ("1 2 3 10 of ten", "digits", ("1", "2", "3", "10")),
        ("1 beside 01", "digits", ("1", "01")),
        ("0 beside 00", "plain", ("0", "00", "1")),
        ("a number out of range", "digits", ("0", "10")),
        ("a huge number", "digits", ("0", "9" * 30)),
        ("a negative number", "digits", ("-1", "1")),
        ("a signed number", "digits", ("+1", "2")),
        ("a fraction", "digits", ("1.0", "2")),
        ("a power", "digits", ("1e0", "2")),
        ("Arabic numbers", "digits", ("١", "٢")),
        ("a superscript", "digits", ("²", "1")),
        ("names of no class", "digits", ("cat", "dog")),
        ("one name of no class", "digits", ("one", "two", "cat")),
        ("names and numbers", "digits", ("one", "2")),
        ("names and WordNet ids", "imagenet", ("n01440764", "goldfish")),
        ("numbers and WordNet ids", "imagenet", ("n01440764", "1")),
        ("full names and synonyms", "imagenet", ("tench, Tinca tinca", "tabby")),
        ("two spellings of one class", "digits", ("seven", "SEVEN")),
        ("two synonyms of one class", "imagenet", ("tabby", "tabby cat")),
        ("an underscore and a space", "imagenet", ("tiger cat", "tiger_cat")),
        ("crane", "imagenet", ("crane", "tench")),
        ("maillot", "imagenet", ("maillot",)),
        ("cardigan", "imagenet", ("cardigan", "tench")),
        ("half a name", "imagenet", ("great white", "tench")),
        ("a word of many names", "imagenet", ("cat", "tench")),
        ("names with a comma too few", "imagenet", ("tench Tinca tinca",)),
        ("a WordNet id of no class", "imagenet", ("n01440764", "n99999999")),
        ("WordNet ids of ten outputs", "digits", ("n01440764", "n01443537")),
        ("WordNet ids of ten outputs without names", "plain", ("n01440764", "n01443537")),
        ("a WordNet id with a word", "imagenet", ("n01440764-tench",)),
        ("a short WordNet id", "imagenet", ("n0144076",)),
        ("an upper WordNet id", "imagenet", ("N01440764",)),
        ("names for a model without", "plain", ("cat", "dog")),
        ("generic names", "plain", ("class a", "class b")),
        ("names that are other numbers", "reversed", ("0", "1", "2")),
        ("one name that is another number", "reversed", ("2",)),
        ("class names that are alike", "alike", ("t shirt", "boot")),
        ("parts of a split", "digits", ("train", "val")),
        ("a letter each", "digits", ("a", "b")),
        ("signs", "digits", ("_", "-")),
    ]
    for what, model, names in refused:
        yield what, model, names, None
