"""The combined map by hand."""

from __future__ import annotations

import torch

from captum_classemb.functional.importance import combined


def test_shares_add_and_the_stream_confirms() -> None:
    stream = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 1.0, 0.0]]])
    direct = torch.tensor([[[2.0, 0.0, -1.0], [0.0, -4.0, 3.0]]])
    # Maps [1, 3, 0] and [2, -4, 2]: sums of absolute values 4 and 8.
    factor = torch.tensor([0.25, 0.75, 0.0]).sqrt()
    expected = (stream / 4 + direct / 8) * factor
    assert torch.allclose(combined(stream, direct, apart=True), expected)
    assert torch.allclose(combined(stream, direct), expected.sum(1))
    twice = combined(stream, direct, direct, apart=True)
    assert torch.allclose(twice, (stream / 4 + direct / 4) * factor)


def test_the_scale_of_an_estimate_does_not_matter() -> None:
    stream, direct = torch.rand(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.allclose(combined(7 * stream, 0.01 * direct), combined(stream, direct))


def test_an_estimate_without_evidence_adds_nothing() -> None:
    stream, direct = torch.rand(1, 2, 4), torch.zeros(1, 2, 4)
    share = stream / stream.sum()
    found = combined(stream, direct, apart=True)
    assert torch.allclose(found, share * share.sum(1, keepdim=True).sqrt())
    assert (combined(direct, stream) == 0).all()


def test_blocks_and_heads_are_dimensions_of_one_sum() -> None:
    """L×B×H×K×P with the sum over L and H is B·K maps of L·H entries each."""
    shape = (2, 3, 4, 5, 6)
    stream, one, two = torch.rand(shape), torch.randn(shape), torch.randn(shape)

    def together(x: torch.Tensor) -> torch.Tensor:
        return x.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)

    found = combined(stream, one, two, heads=(0, 2), apart=True)
    expected = combined(together(stream), together(one), together(two), apart=True)
    assert torch.allclose(together(found), expected, rtol=1e-5, atol=1e-7)
    summed = combined(stream, one, two, heads=(0, 2))
    assert torch.allclose(summed, found.sum((0, 2)), rtol=1e-5, atol=1e-7)
