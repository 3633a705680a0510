"""Reading block after block by sums of products, against reading every site by itself."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, images

from captum_classemb.errors import NonFiniteError
from captum_classemb.studies.identifiability.stream_reader import StreamReader
from captum_classemb.studies.token_reader import target_logits, token_scores
from captum_classemb.vit import Recording, ViT, adapt, record

TARGET = torch.tensor([1, 4, 0])
SITES = ("resid_post", "attn_out", "mlp_out")
#: Their readout is no class embedding of one head.
OTHERS = {
    "max pooling", "mlp head", "distilled", "attention pooling",
    "attention pooling, norm and registers",
}  # fmt: skip


def recorded(name: str, dtype: torch.dtype = torch.float32) -> tuple[ViT, Recording]:
    vit = adapt(build(name, dtype))
    parallel = any(block.parallel for block in vit.blocks)
    sites = ["embedding", *SITES, *([] if parallel else ["resid_mid"])]
    return vit, record(vit, images(name, 3, dtype), sites)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OTHERS])
def test_every_site_as_if_read_by_itself(name: str) -> None:
    vit, recording = recorded(name)
    readout = vit.readout
    assert StreamReader.reads(readout, recording)
    found = StreamReader(readout).scores(recording, TARGET)  # type: ignore[arg-type]
    close = {"rtol": 1e-4, "atol": 1e-5}
    for site in SITES:
        for block, tokens in enumerate(recording[site]):
            alone, scores = token_scores(readout, tokens, TARGET), found.sites[site][block]
            assert torch.equal(scores.rank, alone.rank)
            torch.testing.assert_close(scores.target_logit, alone.target_logit, **close)
            after = found.sites["resid_post"][block].top
            if site == "resid_post":
                assert torch.equal(after, alone.top)
            else:
                assert torch.equal(scores.matches, (after == alone.top)[..., 0])
    start = target_logits(readout, recording["embedding"][0], TARGET)
    torch.testing.assert_close(found.embedding, start, **close)
    assert (found.middle is None) == ("resid_mid" not in recording.sites)
    for block, tokens in enumerate(recording.sites.get("resid_mid", [])):
        assert found.middle is not None
        between = target_logits(readout, tokens, TARGET)
        torch.testing.assert_close(found.middle[block], between, **close)


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, recording = recorded("cls")
    whole = StreamReader(vit.readout).scores(recording, TARGET)  # type: ignore[arg-type]
    place = "captum_classemb.studies.identifiability.stream_reader.chunk_rows"
    monkeypatch.setattr(place, lambda classes, device: 10)
    parts = StreamReader(vit.readout).scores(recording, TARGET)  # type: ignore[arg-type]
    for site in SITES:
        for one, other in zip(whole.sites[site], parts.sites[site], strict=True):
            assert torch.equal(one.rank, other.rank) and torch.equal(one.top, other.top)
            assert torch.equal(one.matches, other.matches)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_read_site_by_site(name: str) -> None:
    vit, recording = recorded(name)
    assert not StreamReader.reads(vit.readout, recording)


def test_half_precision_is_read_site_by_site() -> None:
    vit, recording = recorded("cls", torch.bfloat16)
    assert not StreamReader.reads(vit.readout, recording)


def test_a_logit_that_is_not_finite() -> None:
    vit, recording = recorded("cls")
    recording["attn_out"][1][0, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        StreamReader(vit.readout).scores(recording, TARGET)  # type: ignore[arg-type]
