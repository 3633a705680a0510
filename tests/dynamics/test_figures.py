"""What the dynamics figures show: the data of their lines, bars and images."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from captum_classemb.dynamics.figures import landscapes
from captum_classemb.dynamics.figures import profiles as dynamics


def axis(projection: str | None = None):  # type: ignore[no-untyped-def]
    return Figure(layout="constrained").add_subplot(projection=projection)


def test_fourier_lines_keep_their_frequencies_and_grow_brighter() -> None:
    a = axis()
    frequencies = [np.array([0, np.pi / 2, np.pi]), np.array([0, 6 * np.pi / 7])]
    amplitudes = [np.array([0.0, -1.0, -2.0]), np.array([0.0, -3.0])]
    dynamics.fourier_lines(a, frequencies, amplitudes)
    for line, x, y in zip(a.lines, frequencies, amplitudes, strict=True):
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), y)
    first, last = (sum(line.get_color()[:3]) for line in a.lines)
    assert last > first
    assert [t.get_text() for t in a.get_xticklabels()][-1] == "π"


def test_depth_profile_shades_the_step_before_each_value() -> None:
    a = axis()
    kinds = ["embedding", "attention", "mlp", "attention", "mlp"]
    dynamics.depth_profile(a, kinds, {"x": [1, 2, 3, 4, 5]}, "value", log=True)
    assert len(a.patches) == 4
    spans = [(p.get_x(), p.get_width()) for p in a.patches]
    assert spans == [pytest.approx((i / 4, 1 / 4)) for i in range(4)]
    names = [t.get_text() for t in a.get_legend().get_texts()]
    assert names == ["attention", "MLP"] and a.get_yscale() == "log"


def test_frequency_noise_shows_the_decline() -> None:
    a = axis()
    dynamics.frequency_noise_lines(a, np.array([1.0, 2.0]), {"m": np.array([0.9, 0.6, 0.8])})
    np.testing.assert_allclose(a.lines[0].get_ydata(), [-30, -10])


def test_lesions_stand_at_their_blocks() -> None:
    a = axis()
    dynamics.lesion_bars(a, ["attention", "mlp"] * 2, [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 0.9)
    bars = sorted((p.get_x() + p.get_width() / 2, p.get_height()) for p in a.patches)
    assert [h for _, h in bars] == pytest.approx([10, 20, 30, 40])
    assert [round(x) for x, _ in bars] == [0, 0, 1, 1]
    assert a.lines[0].get_ydata()[0] == pytest.approx(90)


def test_similarity_matrix_is_not_transposed() -> None:
    a = axis()
    values = np.array([[1.0, 0.2, 0.1], [0.2, 1.0, 0.6]])
    dynamics.similarity_matrix(a, values, ("rows", "columns"))
    np.testing.assert_allclose(a.images[0].get_array(), values)
    assert a.get_ylabel().startswith("rows") and a.get_xlabel().startswith("columns")


def test_eigenvalues_are_marked_and_counted() -> None:
    a = axis()
    points = np.linspace(-2, 4, 50)
    values = np.array([[3.0, -1.0], [2.0, 1.0]])
    landscapes.eigenvalue_density(a, points, {"m": np.exp(-(points**2))}, {"m": values})
    assert a.get_legend().get_texts()[0].get_text() == "m (25 % negative)"
    assert sorted(a.lines[1].get_xdata()) == [-1, 1, 2, 3]


def test_landscapes_with_points_that_overflowed() -> None:
    along = np.linspace(-1, 1, 5)
    loss = 0.1 + along[:, None] ** 2 + 4 * along[None] ** 2
    loss[0, 0] = np.inf
    flat, solid = axis(), axis("3d")
    landscapes.landscape_contour(flat, along, loss)
    landscapes.landscape_surface(solid, along, loss, ceiling=3.0)
    flat.figure.draw_without_rendering()
    solid.figure.draw_without_rendering()
    assert solid.get_zlim() == pytest.approx((0, 3.0))


def test_paths_end_in_the_middle() -> None:
    a = axis("polar")
    path = (np.array([1.0, 0.6, 0.0]), np.array([0.0, 1.0, 0.0]))
    landscapes.polar_path(a, {"m": path})
    np.testing.assert_allclose(a.lines[0].get_xdata(), path[1])
    np.testing.assert_allclose(a.lines[0].get_ydata(), path[0])
    assert a.get_thetamax() == pytest.approx(90)


def test_robustness_is_the_mean_over_corruptions() -> None:
    a = axis()
    landscapes.robustness_lines(a, {"m": np.array([[1.0, 2.0], [3.0, 6.0]])}, "x")
    np.testing.assert_allclose(a.lines[0].get_ydata(), [2, 4])


def test_measures_of_a_training_stand_at_their_epochs() -> None:
    a = axis()
    lines = {"m": (np.array([0, 2, 4]), np.array([3.0, 2.0, 1.0]))}
    landscapes.by_epoch(a, lines, "x", log=True)
    np.testing.assert_allclose(a.lines[0].get_xdata(), [0, 2, 4])
    np.testing.assert_allclose(a.lines[0].get_ydata(), [3, 2, 1])
    assert a.get_yscale() == "log"


def test_a_pattern_has_a_box_for_each_step_but_the_embedding() -> None:
    a = axis()
    kinds = {"one": ["embedding", "attention", "mlp"], "two": ["embedding", "convolution"]}
    dynamics.step_pattern(a, kinds)
    assert [t.get_text() for t in a.get_yticklabels()] == ["one", "two"]
    boxes = [(p.get_x(), p.get_y() + p.get_height() / 2) for p in a.patches]
    assert [round(y) for _, y in boxes] == [0, 0, -1]
    assert boxes[1][0] - boxes[0][0] == pytest.approx(1)
    assert len({p.get_facecolor() for p in a.patches}) == 3
    names = [t.get_text() for t in a.get_legend().get_texts()]
    assert names == ["attention", "MLP", "convolution"]
