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
# # 5. Intervening
#
# A map says what a prediction seems to rest on. Whether it does is seen by taking it away: cut
# attention between tokens, switch off heads and neurons, put in activations of another image,
# remove patches, and read again (Vilas et al. 2023, §4.2). Every edit lasts for a `with` block; the
# model is left as it was.

# %%
import os

import matplotlib.pyplot as plt
import torch

from captum_classemb import MemoryPatchImportance
from captum_classemb.data import Preprocess, data_config, open_dataset, patch_mask
from captum_classemb.edit.ablation import ablate_heads, ablate_memories
from captum_classemb.edit.knock_out import knock_out, no_cls, self_only
from captum_classemb.edit.patching import patch_activations
from captum_classemb.edit.sweep import patching_sweep
from captum_classemb.edit.token_removal import remove_tokens
from captum_classemb.functional.identifiability import identifiability
from captum_classemb.models import class_names, load_model
from captum_classemb.vit import adapt, record

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})
BLUE, ORANGE, GREEN, INK, GRAY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8A8A"

name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
vit, names = adapt(model), class_names(model)
transform = Preprocess.from_config(data_config(model), "squash")
data = open_dataset(os.environ.get("CLASSEMB_DATA", "scenes"), transform, None, len(names))

count = min(len(data), 100 if name == "demo_vit" else 8)
samples = [data[i * len(data) // count] for i in range(count)]
samples = [sample for sample in samples if sample.mask is not None]
images = torch.stack([sample.image for sample in samples])
labels = torch.tensor([sample.label for sample in samples])
size = tuple(images.shape[2:])
grid = vit.grid(size)


def accuracy():
    """Of the model as it is now, edits included."""
    with torch.no_grad():
        return (vit(images).argmax(-1) == labels).float().mean().item()


whole = accuracy()
print(f"{len(samples)} images; accuracy {whole:.1%}")

# %% [markdown]
# ## Cut attention
#
# `self_only`: image tokens learn nothing of each other. `no_cls`: they learn nothing of CLS. A cut
# is a matrix of bools, query by key, so any other is as easy: here image tokens of the context
# that do not see the object.

# %%
on_object = torch.stack([patch_mask(s.mask, grid).flatten() == 1 for s in samples])
first, patches = vit.prefix_tokens, on_object.shape[1]
blind = torch.zeros(len(samples), first + patches, first + patches, dtype=torch.bool)
blind[:, first:, first:] = ~on_object[:, :, None] & on_object[:, None, :]

cuts = {"nothing cut": (None, GRAY), "self_only": (self_only(vit, size), ORANGE)}
if first:
    cuts["no_cls"] = (no_cls(vit, size), BLUE)
cuts["context blind to object"] = (blind, GREEN)


def known():
    """Class identifiability after every block, L×B×N."""
    hidden = record(vit, images, ["resid_post"])["resid_post"]
    with torch.no_grad():
        return torch.stack(
            [identifiability(vit.readout.project(x), labels[:, None]) for x in hidden]
        )


figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.1), sharey=True, layout="constrained")
for title, (cut, color) in cuts.items():
    if cut is None:
        found, right = known(), whole
    else:
        with knock_out(vit, cut):
            found, right = known(), accuracy()
    print(f"{title:<26} accuracy {right:.1%}")
    groups = {
        "CLS": found[:, :, 0].mean(1),
        "patches on the object": found[:, :, first:][:, on_object].mean(1),
        "patches of the context": found[:, :, first:][:, ~on_object].mean(1),
    }
    for axis, (group, curve) in zip(axes, groups.items(), strict=True):
        # What is not cut lies under the others, and is wider, lest it be hidden.
        width = 5 if cut is None else 1.6
        axis.plot(curve, marker="o", markersize=4, linewidth=width, color=color, label=title)
        axis.set(title=group, xlabel="after block", ylim=(0, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("class identifiability")
axes[0].legend(frameon=False, fontsize=8, loc="lower right")
plt.show()

# %% [markdown]
# In the packaged model image tokens learn from each other, not from CLS: cutting them off from it
# changes nothing. Without each other they are lost.
#
# ## Switch off heads
#
# Each head in turn gives its mean over the images instead of what it says. Does the ledger, which
# says what each head brings *directly*, tell which ones matter?

# %%
heads = vit.blocks[0].attentions[0].heads
loss = torch.zeros(len(vit.blocks), heads)
few, theirs = images[:40], labels[:40]


def confidence():
    """Mean log-probability of the correct class."""
    with torch.no_grad():
        return vit(few).log_softmax(-1).gather(1, theirs[:, None]).mean().item()


sure = confidence()
for block in range(len(vit.blocks)):
    for head in range(heads):
        with ablate_heads(vit, {block: [head]}, reference=few):
            loss[block, head] = sure - confidence()

ledger = MemoryPatchImportance(model).ledger(few, theirs)
direct = ledger.attention.sum(-1).mean(0)

figure, axes = plt.subplots(1, 2, figsize=(7.6, 3), layout="constrained")
panels = {"loss of log p without the head": loss, "what the ledger says it brings": direct}
for axis, (title, values) in zip(axes, panels.items(), strict=True):
    limit = values.abs().max()
    picture = axis.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set(title=title, xlabel="head", ylabel="block", xticks=range(heads))
    figure.colorbar(picture, ax=axis)
plt.show()

# %% [markdown]
# Early heads matter without bringing anything to the logit themselves: what they write is read by
# later blocks. The ledger is about the last step, ablation about all of them.
#
# ## Switch off neurons
#
# The memories that the ledger names first, against as many chosen at random.

# %%
by_memory = MemoryPatchImportance(model).ledger(few, theirs, memories=True).mlp_memories
strength = by_memory.mean(0)  # L×M
counts = [round(share * strength.numel()) for share in (0, 0.02, 0.05, 0.1, 0.2, 0.4)]
generator = torch.Generator().manual_seed(0)
order = {
    "named by the ledger": (strength.flatten().argsort(descending=True), ORANGE),
    "random": (torch.randperm(strength.numel(), generator=generator), GRAY),
}
figure, axis = plt.subplots(figsize=(5.2, 3), layout="constrained")
for title, (places, color) in order.items():
    values = []
    for number in counts:
        chosen = {}
        for place in places[:number].tolist():
            chosen.setdefault(place // strength.shape[1], []).append(place % strength.shape[1])
        with ablate_memories(vit, "mlp", chosen, reference=few):
            values.append(confidence())
    axis.plot(counts, values, marker="o", markersize=4, color=color, label=title)
axis.set(xlabel="neurons switched off", ylabel="mean log p of the correct class")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# ## Put another image's activations in place
#
# Two images of different classes. The model runs on the second, and gets single activations of the
# first: where does that bring the first one's class back (*denoising*)? The other way round, where
# does one activation of the second destroy it (*noising*)? What is read is the difference of their
# logits, 0 for the image that is run and 1 for the one whose activations are put in. A sweep runs
# blocks × tokens, or blocks × heads, as batches; the other image's pass is computed once.

# %%
first_of = {int(label): i for i, label in reversed(list(enumerate(labels)))}
pair = list(first_of.values())[:2]
clean, corrupted = images[pair[:1]], images[pair[1:]]


def difference(pixels, which=None):
    """Logit of the clean image's class minus that of the corrupted one's."""
    logits = vit(pixels)
    return logits[:, labels[pair[0]]] - logits[:, labels[pair[1]]]


def share(run, source, site, **options):
    """How far patches bring the difference from the image that is run to the other."""
    patched = patching_sweep(vit, run, source, site, read=difference, **options)[:, :, 0]
    with torch.no_grad():
        start, end = difference(run), difference(source)
    return (patched - start) / (end - start)


found = {
    "denoising": share(corrupted, clean, "resid_pre"),
    "noising": share(clean, corrupted, "resid_pre"),
}
shown = [round(i * (len(vit.blocks) - 1) / 3) for i in range(4)]
figure, axes = plt.subplots(2, 5, figsize=(9.4, 4), layout="constrained")
for line, (direction, by_token) in zip(axes, found.items(), strict=True):
    limit = by_token[..., first:].abs().max()
    pixels = (clean if direction == "denoising" else corrupted)[0].permute(1, 2, 0)
    line[0].imshow(pixels * torch.tensor(transform.std) + torch.tensor(transform.mean))
    line[0].set(xticks=[], yticks=[], ylabel=direction, title="activations of")
    for axis, block in zip(line[1:], shown, strict=True):
        patches = by_token[block, first:].unflatten(0, grid)
        picture = axis.imshow(patches, cmap="PuOr_r", vmin=-limit, vmax=limit)
        axis.set(xticks=[], yticks=[], title=f"entering block {block}")
    figure.colorbar(picture, ax=line, label="share of the difference")
plt.show()
if first:
    print("CLS alone, entering each block:", found["denoising"][:, 0].numpy().round(2))

# %% [markdown]
# Early on a few patches of the object do the most, and none does it alone; entering the last block,
# what CLS has gathered does. Which heads bring it there? `patch_activations` is one patch, for
# whatever runs inside it: here all patches of the object, read by class identifiability.

# %%
heads_found = share(corrupted, clean, "attn_coefficients", over="heads")
figure, axis = plt.subplots(figsize=(3.8, 2.8), layout="constrained")
limit = heads_found.abs().max()
picture = axis.imshow(heads_found, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
axis.set(xlabel="head", ylabel="block", xticks=range(heads_found.shape[1]), title="denoising")
figure.colorbar(picture, ax=axis, label="share of the difference")
plt.show()

inside = torch.cat([torch.zeros(1, first, dtype=torch.bool), on_object[pair[:1]]], 1)
for block in shown:
    with patch_activations(vit, "resid_pre", clean, blocks=[block], tokens=inside):
        hidden = record(vit, corrupted, ["resid_post"])["resid_post"][-1]
    with torch.no_grad():
        rate = identifiability(vit.readout.project(hidden), labels[pair[:1], None]).mean()
    print(f"the clean object put in at block {block}: its class is identifiable by {rate:.2f}")

# %% [markdown]
# ## Remove tokens
#
# Without the patches of the object, without those of the context: the model never sees them.


# %%
def accuracy_with(keep):
    with torch.no_grad(), remove_tokens(vit, keep):
        return (vit(images).argmax(-1) == labels).float().mean().item()


bars = {
    "whole image": whole,
    "object alone": accuracy_with(on_object),
    "context alone": accuracy_with(~on_object),
}
figure, axis = plt.subplots(figsize=(4.6, 1.9), layout="constrained")
axis.barh(list(bars), list(bars.values()), color=[INK, ORANGE, BLUE], height=0.6)
for row, value in enumerate(bars.values()):
    axis.text(value + 0.01, row, f"{value:.1%}", va="center")
axis.invert_yaxis()
axis.set(xlim=(0, 1.15), xlabel="accuracy")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
