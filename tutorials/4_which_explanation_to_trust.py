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
# # 4. Which explanation should I trust?
#
# Maps can be judged: by what happens to the prediction as patches are removed in their order
# (*faithfulness*), and by whether they point at the object (*localisation*). And a token can be
# read by a *probe* that was fitted for it, instead of the model's own class embedding.
#
# Set `CLASSEMB_MODEL`, `CLASSEMB_CHECKPOINT` and `CLASSEMB_DATA` for another model and a folder of
# images with masks.

# %%
import os

import matplotlib.pyplot as plt
import torch

from captum_classemb import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.attr.baselines import AttentionRollout, CheferRelevance
from captum_classemb.data import Preprocess, data_config, open_dataset
from captum_classemb.models import class_names, load_model
from captum_classemb.plot import overlay_map
from captum_classemb.vit import adapt

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})

name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
vit, names = adapt(model), class_names(model)
config = data_config(model)
transform = Preprocess.from_config(config, "squash")
data = open_dataset(os.environ.get("CLASSEMB_DATA", "scenes"), transform, None, len(names))

count = min(len(data), 100 if name == "demo_vit" else 8)
samples = [data[i * len(data) // count] for i in range(count)]
samples = [sample for sample in samples if sample.mask is not None]
images = torch.stack([sample.image for sample in samples])
labels = torch.tensor([sample.label for sample in samples])
masks = torch.stack([sample.mask == 1 for sample in samples])
accuracy = (model(images).argmax(-1) == labels).float().mean()
print(f"{len(samples)} images with masks; accuracy {accuracy:.1%}")

# %% [markdown]
# ## The maps

# %%
methods = {
    "PatchImportance": PatchImportance(model),
    "Gradient": ClassEmbeddingGradient(model),
    "Memory": MemoryPatchImportance(model),
    "Projection": ClassEmbeddingProjection(model),
    "Chefer": CheferRelevance(model),
    "Rollout": AttentionRollout(model),
}
maps = {
    title: method.attribute_patches(images, labels).flatten(1, -3).sum(1)
    for title, method in methods.items()
}
maps["random"] = torch.rand(maps["Memory"].shape, generator=torch.Generator().manual_seed(0))

mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
views = ((images * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
rows = [0, len(samples) // 2]
figure, axes = plt.subplots(2, 7, figsize=(10.6, 3.3), layout="constrained")
for number, (line, image) in enumerate(zip(axes, rows, strict=True)):
    line[0].imshow(views[image])
    line[0].set_ylabel(names[labels[image]])
    line[0].set(xticks=[], yticks=[])
    for axis, title in zip(line[1:], maps, strict=False):
        overlay_map(axis, views[image], maps[title][image], smooth=False)
        if number == 0:
            axis.set_title(title)
plt.show()

# %% [markdown]
# ## Faithfulness
#
# Remove patches, least important first: a good map keeps the prediction long. Remove them most
# important first: a good map loses it at once. The *gap* between the two areas sums it up. Patches
# leave the sequence, so the model never sees a grey square.

# %%
from captum_classemb.evaluation import RemovalCurves

removal = {title: RemovalCurves(steps=10) for title in maps}
for title, metric in removal.items():
    metric.update(model, images, maps[title], labels)
okabe = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A"]
colors = dict(zip(maps, okabe, strict=True))
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.1), sharey=True, layout="constrained")
for order, (axis, title) in enumerate(
    zip(axes, ("least important first", "most important first"), strict=True)
):
    for method, metric in removal.items():
        curve = metric.curves()
        share = curve.removed / curve.patches
        accuracy = curve.values[:, order, :, 0].mean(0)
        axis.plot(share, accuracy, color=colors[method], label=method, linewidth=1.8)
    axis.set(title=title, xlabel="share of patches removed", ylim=(0, 1.03))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("accuracy")
axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# With an interval over images, so that noise is not taken for a difference:

# %%
from captum_classemb.evaluation.bootstrap import bootstrap_mean

gaps = {m: bootstrap_mean(metric.images()["accuracy/gap"]) for m, metric in removal.items()}
for method, gap in sorted(gaps.items(), key=lambda item: -item[1].mean):
    print(f"{method:<16} gap {gap.mean:+.3f}  [{gap.low:+.3f}, {gap.high:+.3f}]")

# %% [markdown]
# ## Localisation
#
# Average precision of the pixels' scores against the object's exact mask.

# %%
from captum_classemb.evaluation import MaskLocalisation

precision = {}
for title, values in maps.items():
    metric = MaskLocalisation()
    metric.update(values, masks)
    precision[title] = bootstrap_mean(metric.images()["average_precision"])

figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
for title in maps:
    x, y = precision[title], gaps[title]
    axis.errorbar(
        x.mean,
        y.mean,
        xerr=[[x.mean - x.low], [x.high - x.mean]],
        yerr=[[y.mean - y.low], [y.high - y.mean]],
        fmt="o",
        color=colors[title],
        label=title,
    )
axis.set(xlabel="average precision against the mask", ylabel="gap of the removal curves")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# A map can be faithful without pointing at the object, and the other way round. In the packaged
# model the projection of the last block's tokens points away from the object, for by then the
# patches of the context hold the class. The ledger, which counts what attention brings directly,
# has the largest gap, though its interval overlaps with those of the next three; rollout and
# Chefer's relevance cover the object better. *Which explanation to trust* in the documentation
# measures the methods on photographs.
#
# ## Probes against projection
#
# A linear probe reads what *can* be read from a token; the class embedding reads what the model
# itself would. Fitted on some images, measured on others.

# %%
from captum_classemb.functional.identifiability import identifiability
from captum_classemb.studies import fit_linear_probe
from captum_classemb.vit import record

source = os.environ.get("CLASSEMB_DATA", "scenes:train")
train = open_dataset(source, transform, None, len(names))
size = min(len(train), 400 if name == "demo_vit" else 16)
chosen = [train[i * len(train) // size] for i in range(size)]
batch = torch.stack([s.image for s in chosen]), torch.tensor([s.label for s in chosen])
probe = fit_linear_probe(model, [batch], sites=["resid_post"])

hidden = record(vit, images, ["resid_post"])["resid_post"]
known = {"class embedding": [], "linear probe": []}
with torch.no_grad():
    for block, tokens in enumerate(hidden):
        for title, readout in (("class embedding", vit.readout), ("linear probe", probe)):
            logits = readout.at(block, "resid_post").project(tokens)
            known[title].append(identifiability(logits, labels[:, None]).mean(0))

figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), sharey=True, layout="constrained")
groups = {"CLS": slice(0, 1), "image tokens": slice(vit.prefix_tokens, None)}
for axis, (group, tokens) in zip(axes, groups.items(), strict=True):
    for (title, values), color in zip(known.items(), ("#222222", "#D55E00"), strict=True):
        curve = [value[tokens].mean() for value in values]
        axis.plot(curve, marker="o", markersize=4, color=color, label=title)
    axis.set(title=group, xlabel="after block", ylim=(0, 1.03))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("class identifiability")
axes[1].legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# The study `captum-classemb study faithfulness` measures removal curves over a whole dataset.
