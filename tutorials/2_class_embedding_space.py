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
# # 2. Class embedding space
#
# Blocks only add to the hidden states, so every hidden state can be read by the model's own last
# norm and classifier, as if it were the last (Vilas et al. 2023, §3–4): what do CLS and image
# tokens know, and when?
#
# Set `CLASSEMB_MODEL`, `CLASSEMB_CHECKPOINT` and `CLASSEMB_DATA` to use another model and a folder
# of images with masks.

# %%
import os

import matplotlib.pyplot as plt
import torch

from captum_classemb.data import Preprocess, data_config, open_dataset, patch_mask
from captum_classemb.models import class_names, load_model
from captum_classemb.vit import adapt, record

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"

name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
names = class_names(model)
config = data_config(model)
transform = Preprocess.from_config(config, "squash")
data = open_dataset(os.environ.get("CLASSEMB_DATA", "scenes"), transform, None, len(names))

count = min(len(data), 200 if name == "demo_vit" else 20)
samples = [data[i * len(data) // count] for i in range(count)]
images = torch.stack([sample.image for sample in samples])
labels = torch.tensor([sample.label for sample in samples])
print(f"{count} images, {len(set(labels.tolist()))} classes")

# %% [markdown]
# ## Project every token of every block
#
# `adapt` reads the model as it is; `record` keeps the sites that are named from one forward pass;
# `vit.readout.project` maps every token to class logits.

# %%
vit = adapt(model)
recording = record(vit, images, ["resid_pre", "attn_out", "mlp_out", "resid_post"])
with torch.no_grad():
    logits = [vit.readout.project(hidden) for hidden in recording["resid_post"]]
print(len(logits), "blocks of", tuple(logits[0].shape), "logits: images × tokens × classes")

# %% [markdown]
# For one image: which class does each patch stand for, block by block? Patches whose first choice
# is the correct class have a frame.

# %%
sample = samples[1]
h, w = vit.grid(tuple(images.shape[2:]))
mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
picture = (sample.image * std + mean).clamp(0, 1).permute(1, 2, 0)

shown = sorted({round(i * (len(logits) - 1) / 5) for i in range(6)})
figure, axes = plt.subplots(1, len(shown) + 1, figsize=(10.4, 1.9), layout="constrained")
axes[0].imshow(picture)
axes[0].set_title(f"“{names[sample.label]}”")
for axis, block in zip(axes[1:], shown, strict=True):
    patches = logits[block][1, vit.prefix_tokens :]
    share = patches.softmax(-1)[:, sample.label].view(h, w)
    image = axis.imshow(share, vmin=0, vmax=1, cmap="cividis")
    for row, column in (patches.argmax(-1).view(h, w) == sample.label).nonzero().tolist():
        frame = (column - 0.45, row - 0.45), 0.9, 0.9
        axis.add_patch(plt.Rectangle(*frame, fill=False, color="white", linewidth=1))
    axis.set_title(f"block {block}")
for axis in axes:
    axis.set(xticks=[], yticks=[])
figure.colorbar(image, ax=axes, label=f"probability of “{names[sample.label]}”", shrink=0.9)
plt.show()

# %% [markdown]
# ## Class identifiability
#
# $r = 1 - \mathrm{rank}/C$, the rank being the number of other classes with a logit at least as
# high. With object masks the image tokens fall into two groups: those that show the object and
# those that show its context.

# %%
from captum_classemb.functional.identifiability import identifiability

known = torch.stack([identifiability(each, labels[:, None]) for each in logits])  # L×B×N
patches = known[..., vit.prefix_tokens :]
on_object = torch.stack(
    [
        torch.zeros(h * w) if s.mask is None else patch_mask(s.mask, (h, w)).flatten() == 1
        for s in samples
    ]
).bool()
off_object = ~on_object & torch.tensor([s.mask is not None for s in samples])[:, None]

curves = {"patches on the object": (patches[:, on_object].mean(1), ORANGE)}
curves["patches of the context"] = (patches[:, off_object].mean(1), BLUE)
if vit.prefix_tokens:
    curves["CLS"] = (known[..., 0].mean(1), "#222222")

figure, axis = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
for label, (values, color) in curves.items():
    axis.plot(values, marker="o", markersize=4, color=color, label=label)
axis.set(xlabel="after block", ylabel="class identifiability", ylim=(0, 1.03))
axis.set_xticks(range(len(logits)))
axis.spines[["top", "right"]].set_visible(False)
axis.grid(axis="y", alpha=0.2)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# In the packaged model CLS knows first, and the patches of the context, which have nothing of
# their own to say, come to hold the class, too. So what a token knows is not what the prediction
# rests on: for that, use `PatchImportance` (tutorial 4 measures the difference).
#
# ## What attention and MLPs contribute
#
# The *class similarity change rate* is the share of tokens whose correct-class logit is higher at
# the output of a layer than at its input; here for the CLS token (or the first one) and for image
# tokens.

# %%
from captum_classemb.studies.identifiability.metric import similarity_increases

rates = {}
with torch.no_grad():
    before = [vit.readout.project(x, labels) for x in recording["resid_pre"]]
    for site, title in (("attn_out", "attention"), ("mlp_out", "MLP"), ("resid_post", "block")):
        after = [vit.readout.project(x, labels) for x in recording[site]]
        rates[title] = torch.stack(
            [similarity_increases(a, b).float().mean(0) for a, b in zip(after, before, strict=True)]
        )

figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), sharey=True, layout="constrained")
styles = {"attention": BLUE, "MLP": ORANGE, "block": GRAY}
groups = {"CLS": slice(0, 1), "image tokens": slice(vit.prefix_tokens, None)}
for axis, (group, rows) in zip(axes, groups.items(), strict=True):
    for title, rate in rates.items():
        axis.plot(rate[:, rows].mean(1), marker="o", markersize=4, color=styles[title], label=title)
    axis.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set(title=group, xlabel="block", ylim=(0, 1.03))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("share that rises")
axes[0].legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# The study `captum-classemb study identifiability` measures all of this over a whole dataset, in
# batches, resumable, with the published code's variants.
