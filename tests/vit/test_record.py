"""Recording: only what was asked for, and nothing left behind whatever happened."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from families import build, images, tiny
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import SITES, ViT, adapt, record
from captum_classemb.vit.record import ALL, record_module


@pytest.fixture
def vit() -> ViT:
    return adapt(tiny())


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def hooks(model: nn.Module) -> int:
    """All hooks of all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_only_what_is_asked_for(vit: ViT, pixels: Tensor) -> None:
    rec = record(vit, pixels, ["resid_post"], blocks=[1])
    assert set(rec.sites) == {"resid_post"}
    assert [entry is None for entry in rec["resid_post"]] == [True, False, True]
    with pytest.raises(KeyError, match="resid_mid was not recorded"):
        rec["resid_mid"]


def test_every_site_can_be_recorded_in_one_pass(vit: ViT, pixels: Tensor) -> None:
    calls: list[int] = []
    handle = vit.model.register_forward_hook(lambda *_: calls.append(1))
    rec = record(vit, pixels, SITES)
    handle.remove()
    assert len(calls) == 1
    for site in SITES:
        assert all(entry is not None for entry in rec[site])
    assert not rec.logits.requires_grad
    assert not any(tensor.requires_grad for tensor in rec["resid_post"])


ROWS = {
    "attention": lambda entry: entry[0].shape[2],
    "attn_coefficients": lambda entry: entry[0].shape[1],
    "attn_out": lambda entry: entry.shape[1],
    "attn_path": lambda entry: entry[0].output.shape[1],
    "mlp_coefficients": lambda entry: entry[0].shape[1],
    "mlp_out": lambda entry: entry.shape[1],
    "mlp_path": lambda entry: entry[0].output.shape[1],
    "resid_mid": lambda entry: entry.shape[1],
    "resid_post": lambda entry: entry.shape[1],
    "resid_pre": lambda entry: entry.shape[1],
}


@pytest.mark.parametrize("site", ROWS)
@pytest.mark.parametrize(("rows", "count"), [(slice(0, 1), 1), (slice(1, None), 16), (ALL, 17)])
def test_rows(vit: ViT, pixels: Tensor, site: str, rows: slice, count: int) -> None:
    assert ROWS[site](record(vit, pixels, {site: rows})[site][1]) == count


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_rows_are_the_same_as_those_of_all(vit: ViT, pixels: Tensor, site: str) -> None:
    all_rows, some = record(vit, pixels, [site]), record(vit, pixels, {site: slice(0, 2)})
    for b in range(3):
        assert torch.equal(some[site][b], all_rows[site][b][:, :2])


@pytest.mark.parametrize("sites", ["resid_post", "attn_out", "values", "values keys", "attn_path"])
def test_what_is_kept_does_not_hold_on_to_more(vit: ViT, pixels: Tensor, sites: str) -> None:
    """A slice that shares storage with what is not kept would keep all of it in memory."""
    rows = ALL if "values" in sites else slice(0, 1)
    recording = record(vit, pixels, dict.fromkeys(sites.split(), rows), blocks=[0, 2])
    tensors: list[Tensor] = []
    for entry in (recording[site][block] for site in sites.split() for block in (0, 2)):
        if sites == "attn_path":
            tensors += [*entry[0].inputs, entry[0].output]
        else:
            tensors += entry if isinstance(entry, tuple) else [entry]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(storage.nbytes() for storage in storages.values()) == needed


def test_blocks_from_the_end_and_out_of_range(vit: ViT, pixels: Tensor) -> None:
    rec = record(vit, pixels, ["resid_post"], blocks=[-1])
    assert [entry is None for entry in rec["resid_post"]] == [True, True, False]
    for wrong in (3, -4):
        with pytest.raises(InputError, match=f"block {wrong}"):
            record(vit, pixels, ["resid_post"], blocks=[wrong])


def test_unknown_sites_are_refused_before_the_model_runs(vit: ViT, pixels: Tensor) -> None:
    with pytest.raises(InputError, match="unknown site 'resid_end': sites are resid_pre"):
        record(vit, pixels, ["resid_end"])
    assert hooks(vit) == 0


@pytest.mark.parametrize("where", ["forward", "hook"])
def test_hooks_are_gone_after_an_exception(vit: ViT, pixels: Tensor, where: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    blocks: Any = vit.model.blocks  # type: ignore[union-attr]
    handle = None
    if where == "hook":
        handle = blocks[1].mlp.register_forward_hook(fail)
    else:
        blocks[1].mlp.forward = fail
    before = hooks(vit)
    for run in (
        lambda: record(vit, pixels, SITES),
        lambda: record_module(vit, pixels, blocks[0]),
    ):
        with pytest.raises(RuntimeError, match="in the middle"):
            run()
        assert hooks(vit) == before
    if handle is None:
        del blocks[1].mlp.forward
    else:
        handle.remove()
    record(vit, pixels, SITES)
    assert hooks(vit) == 0


def test_a_module_that_is_not_called(vit: ViT, pixels: Tensor) -> None:
    class Skips(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    blocks: Any = vit.model.blocks  # type: ignore[union-attr]
    kept = blocks[1]
    blocks[1] = Skips()
    with pytest.raises(UnsupportedModelError, match="resid_post of block 1 was not reached"):
        record(vit, pixels, ["resid_post"])
    with pytest.raises(UnsupportedModelError, match="Block gave no tensor"):
        record_module(vit, pixels, kept)
    assert hooks(vit) == 0


def test_fused_attention_stays_on(vit: ViT, pixels: Tensor, monkeypatch: Any) -> None:
    fused = nn.functional.scaled_dot_product_attention
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    record(vit, pixels, SITES)
    assert len(calls) == 3


def test_one_module(vit: ViT, pixels: Tensor) -> None:
    rec = record(vit, pixels, ["resid_pre", "resid_post"])
    block = vit.blocks[1].module
    assert torch.equal(record_module(vit, pixels, block), rec["resid_post"][1])
    assert torch.equal(record_module(vit, pixels, block, of_input=True), rec["resid_pre"][1])


def test_a_module_that_returns_a_tuple() -> None:
    model = build("hugging face, sdpa")
    vit = adapt(model)
    attention = vit.blocks[0].attentions[0].module
    pixels = images("hugging face, sdpa")
    tokens = record_module(vit, pixels, attention)
    assert torch.equal(tokens, record(vit, pixels, ["attn_out"])["attn_out"][0])


def test_gradients_stay_off_inside_and_as_they_were_outside(vit: ViT, pixels: Tensor) -> None:
    with torch.enable_grad():
        rec = record(vit, pixels.requires_grad_(True), ["resid_post"])
        assert torch.is_grad_enabled()
    assert not rec["resid_post"][0].requires_grad
    with torch.inference_mode():
        record(vit, pixels.detach(), SITES)


def test_two_threads_do_not_see_each_other(vit: ViT) -> None:
    """Hooks of one recording are called in the other's forward pass, and must not answer."""
    pixels = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post", "values", "attention"]
    expected = [record(vit, x, sites)["resid_post"][-1] for x in pixels]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def run(index: int) -> None:
        start.wait()
        for _ in range(60):
            try:
                seen = record(vit, pixels[index], sites)["resid_post"][-1]
            except Exception as error:  # noqa: BLE001
                wrong.append(repr(error))
                return
            if not torch.equal(seen, expected[index]):
                wrong.append("another image was recorded")

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert hooks(vit) == 0


def test_a_hook_removed_by_its_thread_while_another_runs(vit: ViT, pixels: Tensor) -> None:
    """torch has listed the hooks of a module, when the recording they belong to ends.

    It then forgets that they take keyword arguments and calls them without.
    """
    entered, ended = threading.Event(), threading.Event()
    blocks: Any = vit.model.blocks  # type: ignore[union-attr]
    failure: list[BaseException] = []

    def wait(*_: Any) -> None:
        if threading.current_thread() is other:
            entered.set()
            ended.wait(10)

    def run() -> None:
        try:
            with torch.no_grad():
                vit.model(pixels)
        except BaseException as error:  # noqa: BLE001
            failure.append(error)

    other = threading.Thread(target=run)
    handle = blocks[0].register_forward_hook(wait)

    class Starts(nn.Module):
        """In the recorded pass, starts the other thread once all hooks are set."""

        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not other:
                other.start()
                entered.wait(10)
            return x

    vit.model.pos_drop = Starts()
    record(vit, pixels, ["resid_post"])
    ended.set()
    other.join(10)
    handle.remove()
    assert not failure, failure[0]
