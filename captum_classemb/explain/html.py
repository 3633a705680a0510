"""One run that writes the explorer's page of one image."""

from __future__ import annotations

from tqdm import tqdm

from captum_classemb.data.images import printable, read_photograph
from captum_classemb.errors import InputError
from captum_classemb.explain.explore import Explore
from captum_classemb.explain.run import Outcome, Run, scores


def write_page(run: Run, *, progress: bool = False) -> Outcome:
    """Explore the one image of a run and write the page that its options name.

    Args:
        run: its options are checked and its model is loaded.
        progress: show how far it is and how long it will take, on a terminal.

    Returns:
        What was found; its picture is the page.

    Raises:
        InputError: if the run has several images, or names no page.
        DataError: if the image cannot be read.
        OutputError: if the page cannot be written.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from captum_classemb.explain import Options
        >>> from captum_classemb.models import demo_image_paths
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     images, page = demo_image_paths()[:1], Path(folder, "page.html")
        ...     methods = ["class-embedding-projection"]
        ...     options = Options(images, targets=["seven"], methods=methods, page=page)
        ...     outcome = write_page(Run(options))
        ...     outcome.picture.read_text("utf-8")[:15]
        '<!doctype html>'
        >>> [target.name for target in outcome.targets]
        ['seven']
    """
    path = run.options.page
    if path is None:
        raise InputError("the run names no page: give Options(page=...).")
    for missing in run.missing:
        if missing.error is not None:
            raise missing.error
    if len(run.files) != 1:
        raise InputError(f"{len(run.files)} images were given: a page shows one, name one.")
    (file,) = run.files
    photo = read_photograph(file)
    view = run.preprocess.view(photo.image)
    vit = run.explainer.vit
    exploring = Explore(vit, view, run.preprocess, list(run.explainer.methods))
    steps = exploring.steps(run.explainer.targets)
    # None: shown on terminals alone.
    for step in tqdm(steps, unit="step", leave=False, disable=None if progress else True):
        step()
    page = exploring.page(run.names, title=printable(file.name), model=run.subject.name)
    run.protected.check([path])
    page.save(path, overwrite=True)
    targets = run.explainer.targets or exploring.focus[:1]
    return Outcome(
        file,
        picture=path,
        targets=scores(run.names, exploring.probabilities, targets),
        top=scores(run.names, exploring.probabilities, exploring.top),
        frames=photo.source.frames,
    )
