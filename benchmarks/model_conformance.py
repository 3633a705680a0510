"""Check every transformer architecture of timm's registry, and write docs/architectures.md.

Each architecture is built small (few blocks, narrow, its own structure kept), with every parameter
drawn at random, and must satisfy four identities in float64:

1. pool and readout of the last resid_post equal the model's logits;
2. each block's resid_post is its resid_pre plus its branches, rebuilt from A·V and coefficients;
3. the closed-form gradient equals autograd, for every objective, block and head;
4. the ledger adds up to the logit, with the bias computed from biases, and its attention entries
   equal an explicit Σ A·v·(W_Oᵀu).

Run ``python benchmarks/model_conformance.py --output docs/architectures.md``; names as arguments
check these alone.
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance, __version__
from captum_classemb.errors import ClassEmbError
from captum_classemb.readout import OutputPath
from captum_classemb.vit import adapt, record
from captum_classemb.vit.record import ALL
from captum_classemb.vit.verify import identities

PLAIN = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
    "naflexvit",
    "cait",
)
#: Windowed, hierarchical or mixed with convolutions: refused by name.
OTHERS = (
    "coat",
    "convit",
    "crossvit",
    "davit",
    "edgenext",
    "efficientformer",
    "gcvit",
    "hiera",
    "levit",
    "maxxvit",
    "mobilevit",
    "mvitv2",
    "nest",
    "pit",
    "pvt_v2",
    "swin_transformer",
    "swin_transformer_v2",
    "tiny_vit",
    "tnt",
    "twins",
    "visformer",
    "volo",
    "xcit",
)

#: A model with more parameters than this is not built.
LARGEST = 60_000_000

#: Two blocks and narrow heads; the first set of arguments that an architecture takes is used.
SMALL: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 48, "num_heads": 3},
    {"depth": 2, "embed_dim": 64, "num_heads": 4},
    {"depth": 2, "embed_dim": 128, "num_heads": 2},
    {"depth": 2, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 2},
    {"depth": 2},
    {},
)


#: What the columns of the table hold.
COLUMNS = {
    "structure": "the class of the blocks and of their attention, P prefix tokens, and the readout "
    "with the tokens that it reads, as a slice of all",
    "readout": "the readout of the last tokens against the model's logits, relative to the largest",
    "blocks": "attention, MLPs and blocks rebuilt from what was recorded, likewise",
    "gradient": "the closed form against autograd, for every objective, block and head",
    "ledger": "the sum of the entries against the logit, relative to Σ|entries|",
    "entries": "the entries of attention against an explicit sum over A, V and W_O",
}


@dataclass
class Row:
    """What came out for one architecture."""

    name: str
    module: str
    outcome: str
    errors: dict[str, float] = field(default_factory=dict)
    structure: str = ""


def build(name: str) -> nn.Module:
    """A small model of this architecture with every parameter drawn at random."""
    classes = {"num_classes": 10}
    failures = []
    for extra in SMALL:
        for size in ({"img_size": _small_image(name)}, {}):
            try:
                with torch.device("meta"):
                    planned = timm.create_model(name, **classes, **extra, **size)
                if sum(p.numel() for p in planned.parameters()) > LARGEST:
                    raise ValueError(f"{name} has no form below {LARGEST:.0e} parameters")
                model = timm.create_model(name, **classes, **extra, **size)
            except Exception as error:  # noqa: BLE001 - any builder may refuse in its own way
                failures.append(error)
                continue
            return randomise(model)
    raise failures[-1]


def _small_image(name: str) -> int:
    """Six patches wide: sizes in the name are of the published model."""
    patch = next((int(part[5:]) for part in name.split("_") if part.startswith("patch")), 16)
    return 6 * patch


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter at random, at a scale that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and "token" not in name and "embed" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval().double()


def sample_input(model: nn.Module) -> Tensor:
    """One random image of the size the model takes."""
    vit = adapt(model)
    size = vit.image_size or tuple(6 * patch for patch in vit.patch_size)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, vit.channels, *size, generator=generator, dtype=torch.float64)
    return image


def gradient_error(model: nn.Module, image: Tensor) -> float:
    """The closed form against autograd with attention as a leaf, relative to the largest entry."""
    worst, target = 0.0, 3
    for objective in ("paper", "log_probability", "logit"):
        method = ClassEmbeddingGradient(model, objective=objective)
        vit, reads = method.vit, method.readout.reads
        recording = record(vit, image, {"values": ALL, "attention": reads, "attn_path": reads})
        references = []
        for block in range(len(vit.blocks)):
            leaves = [a.detach().requires_grad_(True) for a in recording["attention"][block]]
            outputs = []
            parts = zip(
                leaves, recording["values"][block], recording["attn_path"][block], strict=True
            )
            for leaf, values, path in parts:
                path = path.before_layer_scale() if objective == "paper" else path
                mixed = (leaf @ values).transpose(1, 2).flatten(2)
                outputs.append(OutputPath.of(path.steps, mixed).output)
            logits = method.readout(sum(outputs[1:], outputs[0]))
            grads = torch.autograd.grad(_score(logits[0], target, objective), leaves)
            references.append(torch.cat([grad.sum(2) for grad in grads], 1))
        expected = torch.stack(references, 1)[..., vit.prefix_tokens :]
        found = method.attribute_patches(image, target).flatten(3)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def _score(logits: Tensor, target: int, objective: str) -> Tensor:
    if objective == "paper":
        logits = logits.softmax(-1)
    return logits[target] if objective == "logit" else logits.log_softmax(-1)[target]


def ledger_errors(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """The convergence delta, and the attention entries against an explicit sum."""
    method, target = MemoryPatchImportance(model), 3
    vit, reads = method.vit, method.readout.reads
    ledger = method.ledger(image, target)
    delta = float((ledger.delta.abs() / ledger.magnitude).max())
    sites = {"values": ALL, "attention": reads, "attn_path": reads, "final": reads}
    recording = record(vit, image, sites)
    g = torch.zeros(1, 1, method.readout.num_classes, dtype=image.dtype)
    g[..., target] = 1.0
    u = method.readout.vjp(recording["final"][0], g, frozen=True)
    worst = 0.0
    for block in range(len(vit.blocks)):
        parts = (recording[site][block] for site in ("attn_path", "attention", "values"))
        explicit = torch.cat([_entries(*part, u) for part in zip(*parts, strict=True)], 1)
        checked = explicit != 0
        difference = (ledger.attention[:, block] - explicit)[checked].abs().max()
        worst = max(worst, float(difference / explicit.abs().max()))
    return delta, worst


def _entries(path: OutputPath, weights: Tensor, values: Tensor, u: Tensor) -> Tensor:
    """What a few source tokens bring along u, each moved through the output path: B×H×N."""
    _, heads, count, width = values.shape
    entries = values.new_zeros(1, heads, count)
    for k in range(heads):
        for j in range(0, count, max(1, count // 5)):
            moved = values.new_zeros(1, weights.shape[2], heads, width)
            moved[:, :, k] = weights[:, k, :, j, None] * values[:, k, j][:, None]
            entries[0, k, j] = (path.jvp(moved.flatten(2)[:, :, None], frozen=True) * u).sum()
    return entries


def structure(model: nn.Module) -> str:
    """A word for what an architecture is made of."""
    vit = adapt(model)
    block = vit.blocks[0]
    kinds = {type(attention.module).__name__ for attention in block.attentions}
    words = [type(block.module).__name__, *kinds, f"P={vit.prefix_tokens}"]
    if vit.has_readout:
        words.append(type(vit.readout).__name__)
        reads = vit.readout.reads
        words.append(f"reads {reads.start}:{'' if reads.stop is None else reads.stop}")
    return " ".join(dict.fromkeys(words))


def check(name: str, module: str, tolerance: float = 1e-8) -> Row:
    """All identities of one architecture."""
    try:
        model = build(name)
    except Exception as error:  # noqa: BLE001 - the registry is not ours
        return Row(name, module, f"not built: {type(error).__name__}: {error}".splitlines()[0])
    try:
        made_of = structure(model)
        image = sample_input(model)
        errors = dict(identities(adapt(model), image))
        errors["gradient"] = gradient_error(model, image)
        errors["ledger"], errors["ledger entries"] = ledger_errors(model, image)
    except ClassEmbError as error:
        return Row(name, module, f"refused: {error}")
    except Exception:  # noqa: BLE001 - a crash is a row, not an end
        last = traceback.format_exc().strip().splitlines()
        return Row(name, module, f"crashed: {last[-1]} ({last[-3].strip()})")
    # Some norms of timm always compute in float32.
    in_float32 = any("Fp32" in type(m).__name__ for m in model.modules())
    limit = 1e-4 if in_float32 else tolerance
    failed = [key for key, error in errors.items() if not error <= limit]
    outcome = "pass" if not failed else f"fails: {', '.join(failed)}"
    return Row(name, module, outcome, errors, made_of)


def refusal(name: str, module: str) -> Row:
    """What an architecture that is no plain Vision Transformer is told."""
    with torch.device("meta"):
        model = timm.create_model(name)
    try:
        adapt(model)
    except ClassEmbError as error:
        return Row(name, module, f"refused: {str(error).split(':')[0]}")
    return Row(name, module, "fails: not refused")


def write(rows: list[Row], path: Path) -> None:
    """The table as Markdown."""
    plain = [row for row in rows if row.module in PLAIN]
    passed = sum(row.outcome == "pass" for row in plain)
    lines = [
        "# Architectures of timm",
        "",
        f"{passed} of {len(plain)} architectures of timm's plain Vision Transformer modules pass "
        "all identities; transformers with windows, stages or convolutions between tokens are "
        f"refused with a sentence. Made by `python benchmarks/model_conformance.py --output {path}`"
        f" with captum-classemb {__version__}, timm {timm.__version__}, torch {torch.__version__}.",
        "",
        "Each architecture is built small (two blocks where it can be, narrow, its own structure "
        "kept) with every parameter drawn at random, in float64. Errors are the largest found:",
        "",
        *(f"- *{name}*: {meaning}" for name, meaning in COLUMNS.items()),
        "",
        "| architecture | structure | readout | blocks | gradient | ledger | entries | outcome |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for module in dict.fromkeys(row.module for row in rows):
        lines.append(f"| **{module}** | | | | | | | |")
        for row in (row for row in rows if row.module == module):
            e = row.errors
            blocks = max(
                e.get(k, 0.0) for k in ("attention outputs", "MLP outputs", "block outputs")
            )
            numbers = [e.get("logits"), blocks if e else None, e.get("gradient")]
            numbers += [e.get("ledger"), e.get("ledger entries")]
            cells = ["" if n is None else f"{n:.0e}" for n in numbers]
            outcome = row.outcome.replace("|", "/")
            lines.append(f"| {row.name} | {row.structure} | {' | '.join(cells)} | {outcome} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the plain modules if none")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    todo = [(name, module) for module in PLAIN for name in timm.list_models(module=module)]
    if arguments.names:
        todo = [(name, "chosen") for name in arguments.names]
    rows = [check(name, module) for name, module in tqdm(todo, unit="model")]
    for row in rows:
        if row.outcome != "pass":
            print(f"{row.name}: {row.outcome}")
    if not arguments.names:
        known = set(timm.list_modules())
        others = [(n, m) for m in OTHERS if m in known for n in timm.list_models(module=m)]
        rows += [refusal(name, module) for name, module in tqdm(others, unit="model")]
    print(f"{sum(row.outcome == 'pass' for row in rows)} of {len(todo)} pass")
    if arguments.output:
        write(rows, arguments.output)


if __name__ == "__main__":
    main()
