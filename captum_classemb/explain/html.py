"""One run that writes the explorer's page of one image."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from captum_classemb.data.images import read_image
from captum_classemb.errors import InputError
from captum_classemb.explain.explore import Explore
from captum_classemb.explain.run import Outcome, Run, scores

__all__ = ["write_page"]


def write_page(run: Run, path: Path, *, progress: bool = False) -> Outcome:
    """Explore the one image of a run and write its page.

    Args:
        run: its options are checked and its model is loaded.
        path: of the page.
        progress: show how far it is and how long it will take, on a terminal.

    Returns:
        What was found; its picture is the page.

    Raises:
        InputError: if the run has several images.
        DataError: if the image cannot be read.
        OutputError: if the page cannot be written.

    Examples:
        >>> import tempfile
        >>> from captum_classemb.explain import Options
        >>> from captum_classemb.models import demo_image_paths
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     images = demo_image_paths()[:1]
        ...     options = Options(images, targets=["seven"], methods=["projection"])
        ...     outcome = write_page(Run(options), Path(folder, "page.html"))
        ...     outcome.picture.read_text("utf-8")[:15]
        '<!doctype html>'
        >>> [target.name for target in outcome.targets]
        ['seven']
    """
    for missing in run.missing:
        if missing.error is not None:
            raise missing.error
    if len(run.files) != 1:
        raise InputError(f"{len(run.files)} images were given: a page shows one, name one.")
    (file,) = run.files
    view = run.preprocess.view(read_image(file))
    vit = run.explainer.vit
    exploring = Explore(vit, view, run.preprocess, list(run.explainer.methods))
    steps = exploring.steps(run.explainer.targets)
    # None: shown on terminals alone.
    for step in tqdm(steps, unit="step", leave=False, disable=None if progress else True):
        step()
    exploring.page(run.names, title=file.name, model=run.options.model).save(path)
    targets = run.explainer.targets or exploring.focus[:1]
    return Outcome(
        file,
        picture=path,
        targets=scores(run.names, exploring.probabilities, targets),
        top=scores(run.names, exploring.probabilities, exploring.top),
    )
