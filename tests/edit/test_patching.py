"""Patched activations equal a forward pass written by hand, and branches replaced before W_O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from anatomy import ALL, anatomy
from families import CLASS_ATTENTION, FAMILIES, PARALLEL, build, images
from oracle import logits_of
from torch import Tensor, nn

from captum_classemb import ClassEmbeddingProjection, MemoryPatchImportance, PatchImportance
from captum_classemb.edit import patch_activations, patching_sweep
from captum_classemb.edit.patching import SITES, observed
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import adapt, record

TOKENS = [0, 3, 7]


def two_images(name: str = "layer scale") -> tuple[Tensor, Tensor]:
    return images(name, seed=1), images(name, seed=2)


def by_hand(
    model: Any, x: Tensor, site: str, block: int, change: Callable[[Tensor], Tensor]
) -> Any:
    """The logits of timm's plain ViT, one addition at a time, and the activations of a site."""
    seen: list[Tensor] = []

    def at(name: str, tensor: Tensor) -> Tensor:
        if name != site or index != block:
            return tensor
        seen.append(tensor)
        return change(tensor)

    stream = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for index, layer in enumerate(model.blocks):  # noqa: B007
        stream = at("resid_pre", stream)
        attention, y = layer.attn, layer.norm1(stream)
        q, k, v = attention.qkv(y).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        m = at("attn_coefficients", mixed.transpose(1, 2).flatten(2))
        stream = at("resid_mid", stream + at("attn_out", layer.ls1(attention.proj(m))))
        m = at("mlp_coefficients", layer.mlp.act(layer.mlp.fc1(layer.norm2(stream))))
        stream = at("resid_post", stream + at("mlp_out", layer.ls2(layer.mlp.fc2(m))))
    return model.head(model.norm(stream)[:, 0]), seen[0]


@pytest.mark.parametrize("heads", [None, [0, 2]])
@pytest.mark.parametrize("tokens", [None, TOKENS])
@pytest.mark.parametrize("site", SITES)
def test_patches_equal_the_loop(site: str, tokens: Any, heads: Any) -> None:
    if heads is not None and site != "attn_coefficients":
        return
    model, (clean, corrupted) = build("layer scale"), two_images()
    vit, rows = adapt(model), ALL if tokens is None else tokens
    columns = [*range(8), *range(16, 24)] if heads else list(range(48 if "mlp" in site else 24))
    for block in (0, 1, 2):
        with torch.no_grad():
            known = by_hand(model, clean, site, block, lambda x: x)[1]
            width = known.shape[-1]

            def put(own: Tensor, known: Tensor = known, width: int = width) -> Tensor:
                own = own.clone()
                for column in (c for c in columns if c < width):
                    own[:, rows, column] = known[:, rows, column]
                return own

            expected = by_hand(model, corrupted, site, block, put)[0]
            source = record(vit, clean, [site])[site]
            for given in (source, clean):
                with patch_activations(
                    vit, site, given, blocks=[block - 3], heads=heads, tokens=tokens
                ):
                    found = vit(corrupted)
                assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)
            assert not torch.allclose(found, vit(corrupted), rtol=1e-4)


def _keep(known: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
    known.append(output[0])


@contextmanager
def branches_replaced(model: nn.Module, branch: str, block: int, clean: Tensor) -> Iterator[None]:
    """What enters W_O, or fc2, is that of other images at some tokens."""
    layer = anatomy(model).layers[block]
    parts: Any = layer.attentions if branch == "attn" else layer.mlps
    linear = [part.proj if branch == "attn" else part.fc2 for part in parts]
    known: dict[int, Tensor] = {}

    def hook(number: int, keep: bool) -> Callable[..., Any]:
        def run(module: nn.Module, args: Any) -> Any:
            entering = args[0].clone()
            if keep:
                known[number] = entering
                return None
            rows = [row for row in TOKENS if row < entering.shape[1]]
            columns = torch.arange(entering.shape[-1])[parts[number].columns]
            for row in rows:
                entering[:, row, columns] = known[number][:, row, columns]
            return (entering, *args[1:])

        return run

    for keep in (True, False):
        with ExitStack() as stack:
            for number, module in enumerate(linear):
                handle = module.register_forward_pre_hook(hook(number, keep))
                stack.callback(handle.remove)
            if keep:
                model(clean)
            else:
                yield


@pytest.mark.parametrize("branch", ["attn", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_branches_of_every_family(name: str, branch: str) -> None:
    model, (clean, corrupted) = build(name), two_images(name)
    vit = adapt(model)
    tokens = TOKENS[:1] if name in CLASS_ATTENTION else TOKENS
    whole = vit(corrupted)
    for block in (0, 1):
        with torch.no_grad():
            if name == "torchvision" and branch == "attn":
                # W_O is not called as a module: what it returns is put in place.
                attention, known = model.encoder.layers[block].self_attention, []  # type: ignore
                handle = attention.register_forward_hook(partial(_keep, known))
                vit(clean)
                handle.remove()

                def put(module: Any, args: Any, out: Any, known: Any = known) -> Any:
                    out[0][:, TOKENS] = known[0][:, TOKENS]
                    return out

                handle = attention.register_forward_hook(put)
                expected = vit(corrupted)
                handle.remove()
            else:
                with branches_replaced(model, branch, block, clean):
                    expected = logits_of(model(corrupted))
            for site in (f"{branch}_out", f"{branch}_coefficients"):
                with patch_activations(vit, site, clean, blocks=[block], tokens=tokens):
                    found = vit(corrupted)
                assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), site
    assert not torch.allclose(found, whole, rtol=1e-4)
    assert torch.equal(vit(corrupted), whole)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_stream_of_every_family(name: str, site: str) -> None:
    """Of a model whose whole stream is replaced nothing is left but the other images."""
    model, (clean, corrupted) = build(name), two_images(name)
    vit = adapt(model)
    if name in PARALLEL and site == "resid_mid":
        with pytest.raises(InputError, match="parallel block"):
            observed(vit, site, clean, [1])
        return
    whole, known, own = vit(clean), record(vit, clean, [site]), record(vit, corrupted, [site])
    # In blocks of class attention the stream is CLS, beside patches that are not replaced.
    block = len(vit.blocks) - 1 if site != "resid_pre" else 0
    with patch_activations(vit, site, known[site], blocks=[block]):
        found = vit(corrupted)
        seen = record(vit, corrupted, [site])[site][block]
    # A norm that ends a branch is passed by what is put after it, not by what is recorded.
    late = site == "resid_mid" and "post-norm" in name
    assert late or torch.allclose(seen, known[site][block], rtol=1e-9, atol=1e-9)
    if name not in CLASS_ATTENTION or site != "resid_pre":
        assert torch.allclose(found, whole, rtol=1e-9, atol=1e-9)
    with patch_activations(vit, site, known[site], blocks=[block], tokens=[0]):
        seen = record(vit, corrupted, [site])[site][block]
    expected = torch.cat([known[site][block][:, :1], own[site][block][:, 1:]], 1)
    assert late or torch.allclose(seen, expected, rtol=1e-9, atol=1e-9)


def test_means_noise_and_masks() -> None:
    model, (clean, corrupted) = build("cls"), two_images()
    vit = adapt(model)
    known = record(vit, clean, ["resid_mid"])["resid_mid"]
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[0, 2:5], mask[1, 9] = True, True

    def noisy(own: Tensor) -> Tensor:
        return own + 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))

    mean = [x.mean(0, keepdim=True) for x in known]
    for source in (mean, [x[0] for x in mean], noisy):
        with torch.no_grad():

            def put(own: Tensor, source: Any = source) -> Tensor:
                new = source(own) if callable(source) else source[1].expand_as(own)
                return torch.stack(
                    [
                        torch.stack([new[i, t] if mask[i, t] else own[i, t] for t in range(17)])
                        for i in range(2)
                    ]
                )

            expected = by_hand(model, corrupted, "resid_mid", 1, put)[0]
            with patch_activations(vit, "resid_mid", source, blocks=[1], tokens=mask):
                found = vit(corrupted)
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_sweeps_equal_one_patch_at_a_time() -> None:
    model, (clean, corrupted) = build("parallel modules"), two_images()
    vit, labels = adapt(model), torch.tensor([2, 5])
    known = record(vit, clean, ["resid_mid"])["resid_mid"]
    found = patching_sweep(vit, corrupted, known, "resid_mid", batch_size=5)
    assert found.shape == (3, 17, 2, 7)
    for block, token in ((0, 0), (1, 4), (2, 16)):
        with (
            torch.no_grad(),
            patch_activations(vit, "resid_mid", known, blocks=[block], tokens=[token]),
        ):
            assert torch.allclose(found[block, token], vit(corrupted), rtol=1e-11)

    def known_class(pixels: Tensor, which: Tensor) -> Tensor:
        hidden = record(vit, pixels, ["resid_post"])["resid_post"][-1]
        return vit.readout.project(hidden)[torch.arange(len(which)), :, labels[which]]

    groups = torch.zeros(2, 2, 17, dtype=torch.bool)
    groups[0, :, 2:4], groups[1, 0, 5], groups[1, 1, 9] = True, True, True
    found = patching_sweep(
        vit, corrupted, clean[:1], "mlp_out", groups=groups, blocks=[-1], read=known_class
    )
    assert found.shape == (1, 2, 2, 17)
    with patch_activations(vit, "mlp_out", clean[:1], blocks=[2], tokens=groups[1]):
        expected = known_class(corrupted, torch.arange(2))
    assert torch.allclose(found[0, 1], expected, rtol=1e-11)


@pytest.mark.parametrize("name", ["parallel modules", "torchvision", "differential"])
def test_sweeps_over_heads(name: str) -> None:
    vit, (clean, corrupted) = adapt(build(name)), two_images()
    site = "attn_coefficients"
    found = patching_sweep(vit, corrupted, clean, site, over="heads", batch_size=3)
    heads = sum(attention.heads for attention in vit.blocks[0].attentions)
    assert found.shape == (3, heads, 2, 7)
    for block, head in ((0, 0), (2, heads - 1)):
        with torch.no_grad(), patch_activations(vit, site, clean, blocks=[block], heads=[head]):
            assert torch.allclose(found[block, head], vit(corrupted), rtol=1e-10)
    both = patching_sweep(vit, corrupted, clean, site, over="heads", groups=[[0, 2]], blocks=[1])
    with torch.no_grad(), patch_activations(vit, site, clean, blocks=[1], heads=[0, 2]):
        assert torch.allclose(both[0, 0], vit(corrupted), rtol=1e-10)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["cls", "layer scale", "registers"])
def test_maps_of_a_patched_pass(name: str, site: str) -> None:
    """The ledger adds up to the patched logit, and the projection reads the patched tokens."""
    model, (clean, corrupted) = build(name), two_images(name)
    vit, target = adapt(model), torch.tensor([2, 5])
    tokens = [4, 9, 11]
    with patch_activations(vit, site, clean, blocks=[0, 1], tokens=tokens):
        with torch.no_grad():
            logits = vit(corrupted)
        ledger = MemoryPatchImportance(vit).ledger(corrupted, target)
        hidden = record(vit, corrupted, ["resid_post"])["resid_post"][-1]
        maps = ClassEmbeddingProjection(vit).attribute_patches(corrupted, target)
        importance = PatchImportance(vit).attribute_patches(corrupted, target)
    assert not torch.allclose(logits, vit(corrupted), rtol=1e-4)
    torch.testing.assert_close(ledger.total, logits.gather(1, target[:, None])[:, 0])
    read = vit.readout.project(hidden)[:, vit.prefix_tokens :]
    expected = read.gather(2, target[:, None, None].expand(-1, read.shape[1], 1))[..., 0]
    torch.testing.assert_close(maps.flatten(1), expected)
    assert importance.isfinite().all()
    for patched in ([0, 4], None):
        with (
            patch_activations(vit, site, clean, blocks=[0], tokens=patched),
            pytest.raises(InputError, match="leave the edit first"),
        ):
            PatchImportance(vit).attribute(corrupted, target)


def test_refusals_say_what_is_wrong() -> None:
    vit, (clean, corrupted) = adapt(build("cls")), two_images()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("sites are resid_pre", {"site": "values"}),
        ("3 blocks", {"source": [None]}),
        ("block 3 is out of range", {"blocks": [3]}),
        ("'attn_coefficients'", {"heads": [0]}),
        ("head 3 is out of range", {"heads": [3], "site": "attn_coefficients"}),
        ("token 17 is out of range", {"tokens": [17]}),
        ("2 images of 17 tokens", {"tokens": torch.zeros(3, 17, dtype=torch.bool)}),
        ("NoneType for resid_post of block 0", {"source": [None] * 3}),
        ("source holds \\(2, 5, 24\\)", {"source": [torch.zeros(2, 5, 24)] * 3}),
    ]
    for message, options in wrong:
        given = {"site": "resid_post", "source": clean, **options}
        with (
            pytest.raises(InputError, match=message),
            patch_activations(vit, given.pop("site"), given.pop("source"), **given),
        ):
            vit(corrupted)
    for message, options in (
        ("neither 'tokens' nor 'heads'", {"over": "blocks"}),
        ("attn_coefficients", {"over": "heads"}),
        ("groups name token 17", {"groups": [[17]]}),
        ("\\(1, 2, 17\\) is needed", {"groups": torch.zeros(1, 5, dtype=torch.bool)}),
    ):
        with pytest.raises(InputError, match=message):
            patching_sweep(vit, corrupted, clean, **options)  # type: ignore[arg-type]
    zero = adapt(build("layer scale"))
    zero.model.blocks[1].ls1.gamma.data[3] = 0.0  # type: ignore[union-attr,index,operator]
    with pytest.raises(UnsupportedModelError, match="LayerScale"):
        observed(zero, "attn_out", clean, [1])
