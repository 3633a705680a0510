"""AlterNet: its blocks, its sizes counted by hand, its attention by loops."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from captum_classemb.dynamics.alternet import AlterNet, LocalAttention, attention_blocks, build_up
from captum_classemb.dynamics.tracing.traced_steps import find_steps
from captum_classemb.errors import InputError

DEPTHS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 4), 50: (3, 4, 6, 4), 101: (3, 4, 23, 4), 152: (3, 8, 36, 4)
}  # fmt: skip


def test_published_blocks() -> None:
    counts = {n: tuple(sum(row) for row in attention_blocks(d)) for n, d in DEPTHS.items()}
    assert counts.pop(18) == (0, 1, 1, 1)
    assert set(counts.values()) == {(0, 1, 3, 2)}
    assert attention_blocks((3, 4, 6, 4))[2] == (False, True) * 3
    assert attention_blocks((3, 4, 6, 3))[3] == (False, False, True)
    with pytest.raises(InputError, match=r"at most \(1, 2\) attention blocks, not \(2, 0\)"):
        attention_blocks((3, 4), (2, 0))


def test_build_up_rule() -> None:
    """From the end; a block that does not help sends the search to the stage before."""
    tried: list[tuple[int, ...]] = []

    def improves(counts: tuple[int, ...]) -> bool:
        tried.append(counts)
        return counts[3] <= 2 and counts[2] <= 1 and counts[0] == 0

    kept = list(build_up((3, 4, 6, 6), improves))
    assert kept == [(0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 2), (0, 1, 1, 2), (0, 2, 1, 2)]
    assert tried == [
        (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3), (0, 0, 1, 2), (0, 0, 2, 2),
        (0, 1, 1, 2), (0, 2, 1, 2), (1, 2, 1, 2),
    ]  # fmt: skip


def expected_parameters(depth: int, window: int, classes: int, small: bool) -> int:
    """The sum over layers, from the paper's description alone."""
    expansion = 1 if depth < 50 else 4
    total = 3 * 64 * (9 if small else 49)
    width_in = 64
    for i, row in enumerate(attention_blocks(DEPTHS[depth])):
        width, out = 64 << i, (64 << i) * expansion
        heads = (3, 6, 12, 24)[i]
        for attention in row:
            if attention:
                inner = 64 * heads
                total += 2 * out + out * width + 2 * width
                total += 3 * width * inner + inner * out + out + (2 * window - 1) ** 2
            elif expansion == 1:
                total += 2 * width_in + 9 * width_in * width + 2 * width + 9 * width * out
            else:
                total += 2 * width_in + width_in * width + 2 * width + 9 * width * width
                total += 2 * width + width * out
            if not attention and (width_in != out or (i and width_in != out)):
                total += width_in * out
            width_in = out
    return total + 2 * width_in + width_in * classes + classes


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_of_all_sizes(depth: int) -> None:
    with torch.device("meta"):
        model = AlterNet(
            DEPTHS[depth], block="basic" if depth < 50 else "bottleneck", num_classes=1000
        )
    count = sum(p.numel() for p in model.parameters())
    assert count == expected_parameters(depth, 7, 1000, small=False)


@pytest.mark.parametrize("depth", [18, 50])
def test_timm_knows_it_at_both_sizes(depth: int) -> None:
    large = timm.create_model(f"alternet_{depth}").eval()
    assert large.pretrained_cfg["input_size"] == (3, 224, 224)
    assert sum(p.numel() for p in large.parameters()) == expected_parameters(depth, 7, 1000, False)
    small = timm.create_model(f"alternet_{depth}", img_size=32, num_classes=100).eval()
    assert sum(p.numel() for p in small.parameters()) == expected_parameters(depth, 4, 100, True)
    with torch.no_grad():
        features = small.forward_features(torch.randn(2, 3, 32, 32))
        assert features.shape == (2, small.num_features, 4, 4)
        assert small(torch.randn(2, 3, 32, 32)).shape == (2, 100)
        if depth == 18:
            assert large.forward_features(torch.randn(1, 3, 224, 224)).shape[2:] == (7, 7)


def test_local_attention_by_loops() -> None:
    attention = LocalAttention(width=6, out=5, heads=2, window=2)
    nn.init.normal_(attention.relative_position)
    x = torch.randn(2, 6, 4, 6)
    output = attention(x)
    qkv = attention.qkv(x)
    expected = torch.zeros(2, 128, 4, 6)
    for b in range(2):
        for top in range(0, 4, 2):
            for left in range(0, 6, 2):
                cells = [(top + i, left + j) for i in range(2) for j in range(2)]
                for head in range(2):
                    rows = slice(64 * head, 64 * head + 64)
                    for y, z in cells:
                        q = qkv[b, :128][rows, y, z]
                        logits = torch.stack(
                            [
                                q @ qkv[b, 128:256][rows, u, v] / 8
                                + attention.relative_position[u - y + 1, v - z + 1]
                                for u, v in cells
                            ]
                        )
                        for weight, (u, v) in zip(logits.softmax(0), cells, strict=True):
                            expected[b, rows, y, z] += weight * qkv[b, 256:][rows, u, v]
    torch.testing.assert_close(output, attention.proj(expected), atol=1e-5, rtol=1e-5)


def small() -> AlterNet:
    return AlterNet(
        (1, 2, 2), widths=(8, 16, 32), heads=(1, 1, 2), block="basic", img_size=32, num_classes=4,
        drop_path_rate=0.1,
    )  # fmt: skip


def test_it_trains_with_timm() -> None:
    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    images = torch.randn(16, 3, 32, 32)
    labels = torch.arange(16) % 4
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    positions = model.stages[1][1].attn.relative_position
    undecayed = [g for g in optimizer.param_groups if g["weight_decay"] == 0.0]
    assert any(p is positions for g in undecayed for p in g["params"])
    # Layer-wise learning rates: every parameter in one layer's group, later layers faster.
    layered = create_optimizer_v2(small(), opt="sgd", lr=0.1, layer_decay=0.5)
    assert len({g["lr_scale"] for g in layered.param_groups}) > 3


def test_its_steps_are_found() -> None:
    kinds = [s.kind for s in find_steps(small(), torch.randn(1, 3, 32, 32))]
    assert kinds == ["embedding", "convolution", "pooling", "attention", "pooling", "attention"]


def test_classifier_can_be_replaced() -> None:
    model = small()
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model(torch.randn(2, 3, 32, 32)).shape[1] == 7
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)


def test_sizes_are_checked() -> None:
    with pytest.raises(
        InputError, match="50×50, 25×25, 13×13 cannot be divided into windows of 7×7 or"
    ):
        AlterNet(img_size=400)
    with pytest.raises(InputError, match="windows of 5×5: give"):
        AlterNet(img_size=32, window_size=5)
    with pytest.raises(InputError, match="multiple of that, not 18×18"):
        small()(torch.randn(1, 3, 36, 36))


def test_importing_the_models_makes_timm_know_them() -> None:
    code = "import timm, captum_classemb.dynamics; print(timm.is_model('alternet_50'))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "True", process.stderr
