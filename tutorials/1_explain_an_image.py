# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Explain an image
#
# From a Captum script to attributions in class embedding space: targets, blocks, heads, and how
# they compose with Captum's own tools.
#
# Everything runs on a small packaged model of handwritten digits, without a network. For another
# model set `CLASSEMB_MODEL` to a name that timm knows (and `CLASSEMB_CHECKPOINT`, `CLASSEMB_IMAGE`
# to files) before the notebook is started.

# %%
import os

import matplotlib.pyplot as plt
import torch

from captum_classemb.data import Preprocess, read_image
from captum_classemb.models import class_names, demo_image_paths, load_model

name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
names = class_names(model)
preprocess = Preprocess.of_model(model)
file = os.environ.get("CLASSEMB_IMAGE", demo_image_paths()[2])
view = preprocess.view(read_image(file))  # what the model sees, H×W×3
inputs = preprocess.tensor(view)[None]  # what it reads, 1×3×H×W

probabilities = model(inputs).softmax(-1)[0]
for index in probabilities.topk(3).indices.tolist():
    print(f"{names[index]:<20}{probabilities[index]:.3f}")
target = int(probabilities.argmax())

# %% [markdown]
# ## One line of a Captum script
#
# A script that uses Captum's `Saliency` becomes one that uses `PatchImportance` by changing the
# class. The attribution has the shape of the input, as Captum's methods promise.

# %%
from captum.attr import Saliency

from captum_classemb import PatchImportance

saliency = Saliency(model).attribute(inputs.clone().requires_grad_(), target=target)
importance = PatchImportance(model).attribute(inputs, target=target)
saliency.shape, importance.shape

# %% [markdown]
# `overlay_map` prints a map over its image: diverging colours about 0 if it has negative scores,
# sequential ones else.

# %%
from captum_classemb.plot import DIVERGING, overlay_map

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})


def show(maps, columns=4, width=2.3):
    """Maps by title, printed over the image."""
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        rows,
        min(columns, len(maps)),
        squeeze=False,
        layout="constrained",
        figsize=(width * min(columns, len(maps)), (width + 0.25) * rows),
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, values) in zip(axes.flat, maps.items(), strict=False):
        overlay_map(axis, view, values, smooth=False)
        axis.set_title(title)
    plt.show()


def pixels_of(attribution):
    """A map from what Captum's methods return: channels summed."""
    return attribution.detach()[0].sum(0).numpy()


show({"Saliency": pixels_of(saliency), "PatchImportance": pixels_of(importance)})

# %% [markdown]
# ## Four methods, one interface
#
# `attribute_classes` gives the patch map of several classes, or of all, from one forward pass.

# %%
from captum_classemb import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
)

methods = {
    "PatchImportance": PatchImportance(model),
    "Gradient (the paper's)": ClassEmbeddingGradient(model),
    "Memory (the ledger)": MemoryPatchImportance(model),
    "Projection, last block": ClassEmbeddingProjection(model),
}
show({title: m.attribute_classes(inputs, [target])[0, 0] for title, m in methods.items()})

# %% [markdown]
# ## Every class
#
# What speaks for the runner-up, in the same image? With `attribute_classes(inputs)` every class
# has its map; the cost is that of a few per cent of the pass.

# %%
ranked = probabilities.argsort(descending=True)[:4].tolist()
maps = MemoryPatchImportance(model).attribute_classes(inputs)[0]
show({f"{names[i]} ({probabilities[i]:.1%})": maps[i] for i in ranked})

# %% [markdown]
# ## Every block, every head
#
# `attribute_patches` sums nothing: B×L×H×h×w.

# %%
parts = PatchImportance(model).attribute_patches(inputs, target=target)[0]
print("blocks, heads, rows, columns:", tuple(parts.shape))

sums = parts.sum((-2, -1))
limit = float(sums.abs().max())

figure, axis = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
picture = axis.imshow(sums, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
axis.set(xlabel="head", ylabel="block", title=f"Evidence for “{names[target]}”")
axis.set_xticks(range(parts.shape[1]))
figure.colorbar(picture, label="sum over patches")
plt.show()

# %%
strongest = sums.flatten().topk(4).indices.tolist()
heads = parts.shape[1]
show({f"block {i // heads}, head {i % heads}": parts[i // heads, i % heads] for i in strongest})

# %% [markdown]
# ## Captum's tools take these methods
#
# `NoiseTunnel` smooths, `sensitivity_max` and `infidelity` judge.

# %%
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max

torch.manual_seed(0)
method = PatchImportance(model)
smooth = NoiseTunnel(method).attribute(inputs, nt_samples=8, stdevs=0.1, target=target)
show({"PatchImportance": pixels_of(importance), "with NoiseTunnel": pixels_of(smooth)})


def perturb(inputs):
    noise = 0.01 * torch.randn_like(inputs)
    return noise, inputs - noise


change = sensitivity_max(method.attribute, inputs, n_perturb_samples=4, target=target)
error = infidelity(model, perturb, inputs, importance, target=target, n_perturb_samples=16)
print(f"sensitivity {change.item():.3f}, infidelity {error.item():.2e}")

# %% [markdown]
# ## Look closer
#
# `explore` puts all of it on one page: slide over the blocks, hover or tap a patch, search a
# class. In a notebook it is shown in place; `page.save("page.html")` makes a file that needs no
# network.
#
# ```python
# from captum_classemb.explain import explore
#
# explore(model, file)
# ```

# %%
from captum_classemb.explain import explore

page = explore(model, file)
print(f"a page of {len(page.document) / 1e6:.1f} MB")
