"""Write the tables and figures of docs/vit_tiny.md from the committed results of the studies.

    python benchmarks/studies_page.py

Results lie in benchmarks/results/vit_tiny/STUDY/STUDY.csv; a folder that ends in ``-paper`` holds
the same study with ``--variant paper``. The page's text stays as it is, only what stands between
``<!-- NAME -->`` and ``<!-- end -->`` is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from page_tables import markdown, written

from captum_classemb.runs import Row, read_rows, select
from captum_classemb.studies.attention_perturbation import figure as attention
from captum_classemb.studies.identifiability import figure as identifiability
from captum_classemb.studies.memories import figure as memories
from captum_classemb.studies.token_perturbation import figure as tokens

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "vit_tiny"
PAGE = ROOT / "docs" / "vit_tiny.md"
FIGURES = ROOT / "docs" / "figures"
MODEL = "ViT-Ti/16"
LAST = 11
GROUPS = (("CLS", "cls", "all"), ("image", "image", "all"), ("class", "image", "class"),
          ("context", "image", "context"))  # fmt: skip


def rows_of(study: str) -> list[Row]:
    """The committed table of a study."""
    return read_rows(RESULTS / study / f"{study.removesuffix('-paper')}.csv")


def one(rows: Sequence[Row], **fields: object) -> Row:
    """The only row with these fields."""
    (row,) = select(rows, **fields)
    return row


def percent(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.2f}"


def small(p: float) -> str:
    """A p-value; 10,000 draws give no smaller one than 0.0001."""
    return "≤ 0.0001" if p <= 1.01e-4 else f"{p:.4f}"


def identifiability_table() -> str:
    """Identifiability, block by block, and how class and context tokens differ."""
    rows = select(rows_of("identifiability"), site="resid_post")
    head = ["block", "CLS: mean", "image: mean", "class: mean of images", "context: mean of images",
            "class − context", "p", "image: rate", "images with such a token"]  # fmt: skip

    def line(block: int) -> list[str]:
        here = select(rows, block=block)
        means = [
            f"{one(here, metric=f'class_identifiability{end}', tokens=t, group=g).value:.3f}"
            for (_, t, g), end in zip(GROUPS, ("", "", "_by_image", "_by_image"), strict=True)
        ]
        gap = one(here, metric="class_identifiability_class_minus_context").value
        p = one(here, metric="class_identifiability_class_minus_context_p").value
        image = {"tokens": "image", "group": "all"}
        rate = one(here, metric="class_identifiability_rate", **image).value
        found = one(here, metric="images_with_identifiable_token", **image).value
        return [str(block), *means, f"{gap:+.3f}", small(p), f"{percent(rate)} %",
                f"{percent(found)} %"]  # fmt: skip

    return markdown(head, map(line, range(LAST + 1)))


def change_table() -> str:
    """Which layers bring tokens closer to their class."""
    rows = select(rows_of("identifiability"), metric="class_similarity_change_rate", group="all")
    sites = (("block", "resid_post"), ("attention", "attn_out"), ("MLP", "mlp_out"))
    head = ["block", *(f"{t}: {name}" for t in ("CLS", "image") for name, _ in sites)]

    def line(block: int) -> list[str]:
        values = [
            one(rows, block=block, site=site, tokens=t).value
            for t in ("cls", "image")
            for _, site in sites
        ]
        return [str(block), *(f"{value:.3f}" for value in values)]

    return markdown(head, map(line, range(LAST + 1)))


def composition_table() -> str:
    """Where the top class of the last blocks comes from."""
    rows = select(rows_of("identifiability"), group="all")
    sources = ("previous", "attention", "mlp", "none")
    names = ("block before", "attention", "MLP", "none of them")
    head = ["block", *(f"{t}: {name}" for t in ("CLS", "image") for name in names)]

    def line(block: int) -> list[str]:
        values = [
            one(rows, block=block, tokens=t, metric=f"residual_composition_{source}").value
            for t in ("cls", "image")
            for source in sources
        ]
        return [str(block), *(f"{value:.3f}" for value in values)]

    return markdown(head, map(line, range(6, LAST + 1)))


def perturbation_lines(study: str, conditions: dict[str, tuple[str, str]]) -> list[list[str]]:
    """Accuracy, mean and rate at the last block, under each condition."""
    rows = rows_of(study)
    lines = []
    for name, (words, group) in conditions.items():
        where = {"block": LAST, "tokens": "image", "group": group}
        condition = name.split("@")[0]
        accuracy = one(rows, metric=f"{condition}/accuracy").value
        mean = one(rows, metric=f"{condition}/class_identifiability", **where).value
        rate = one(rows, metric=f"{condition}/class_identifiability_rate", **where).value
        lines.append([words, f"{percent(accuracy)} %", f"{mean:.3f}", f"{percent(rate)} %"])
    return lines


def attention_table() -> str:
    """Attention cut, in both variants."""
    head = ["", "accuracy", "image tokens: mean", "image tokens: rate"]
    names = {
        "unperturbed": ("unperturbed", "all"),
        "no_cls": ("`no_cls`", "all"),
        "self_only": ("`self_only`", "all"),
    }
    paper = {
        "no_cls": ("`no_cls`, `--variant paper`", "all"),
        "self_only": ("`self_only`, `--variant paper`", "all"),
    }
    study = "attention-perturbation"
    lines = perturbation_lines(study, names) + perturbation_lines(f"{study}-paper", paper)
    return markdown(head, lines)


def token_table() -> str:
    """Tokens removed."""
    head = ["", "accuracy", "mean", "rate"]
    names = {
        "unperturbed@class": ("class tokens, unperturbed", "class"),
        "without_context": ("class tokens without the context", "class"),
        "unperturbed@context": ("context tokens, unperturbed", "context"),
        "without_class": ("context tokens without the class", "context"),
    }
    return markdown(head, perturbation_lines("token-perturbation", names))


def memories_table() -> str:
    """Agreement of value vectors and of memories, and compositionality."""
    rows = rows_of("memories")
    head = ["block", "layer", "class–value", "random model", "p", "key–value: CLS",
            "key–value: image", "random class: image", "compositionality: image"]  # fmt: skip

    def line(block: int, site: str) -> list[str]:
        here = select(rows, block=block, site=site, group="all")
        value, random, p = (
            one(here, metric=f"class_value_agreement{end}").value
            for end in ("", "_random_model", "_wilcoxon_p")
        )
        rates = [
            one(here, metric=metric, tokens=t).value
            for metric, t in (
                ("key_value_agreement_rate", "cls"),
                ("key_value_agreement_rate", "image"),
                ("key_value_agreement_rate_random_class", "image"),
                ("memory_compositionality", "image"),
            )
        ]
        name = "attention" if site == "attn_out" else "MLP"
        return [str(block), name, f"{value:.3f}", f"{random:.3f}", f"{p:.1e}",
                *(f"{rate:.3f}" for rate in rates)]  # fmt: skip

    places = [(b, site) for b in (0, 4, 8, 9, 10, 11) for site in ("attn_out", "mlp_out")]
    return markdown(head, (line(*place) for place in places))


TABLES: dict[str, Callable[[], str]] = {
    "identifiability": identifiability_table,
    "change rate": change_table,
    "composition": composition_table,
    "attention perturbation": attention_table,
    "token perturbation": token_table,
    "memories": memories_table,
}


def draw() -> None:
    """Figures of all studies, small enough for a page."""
    drawers = {
        "identifiability": identifiability,
        "attention-perturbation": attention,
        "token-perturbation": tokens,
        "memories": memories,
    }
    FIGURES.mkdir(exist_ok=True)
    for study, drawer in drawers.items():
        rows = [row._replace(model=MODEL) for row in rows_of(study)]
        for name, figure in drawer.draw(rows).items():
            figure.savefig(FIGURES / f"vit_tiny_{name}.png", dpi=100)


@click.command()
def main() -> None:
    """Write the page's tables, and its figures."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
