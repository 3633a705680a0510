# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Memories
#
# An MLP adds columns of its second matrix to the hidden state, *value vectors*, each as much as
# its hidden unit is active: key–value memories. Attention does the same with its output
# projection. Read through the class embedding, a value vector stands for classes (Vilas et al.
# 2023, §5).

# %%
import os

import matplotlib.pyplot as plt
import torch

from captum_classemb.data import Preprocess, read_image
from captum_classemb.models import class_names, demo_image_paths, load_model
from captum_classemb.vit import adapt, record

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#8A8A8A"

name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
names = class_names(model)
vit = adapt(model)
preprocess = Preprocess.of_model(model)
file = os.environ.get("CLASSEMB_IMAGE", demo_image_paths()[0])
view = preprocess.view(read_image(file))
inputs = preprocess.tensor(view)[None]
target = int(model(inputs).argmax())
print(f"{file.name if hasattr(file, 'name') else file}: “{names[target]}”")

# %% [markdown]
# ## Value vectors that read as classes
#
# The *class–value agreement* of a class is the highest cosine between its embedding and a value
# vector of a layer. Against a model with random weights it says where the model has learnt
# memories for classes.

# %%
from captum_classemb.readout import read_vectors

random_model = load_model(name, random_init=True, seed=1)


def agreement(model):
    """For the MLP of every block: the best cosine of every class, L×C."""
    layers = []
    vit = adapt(model)
    for block in vit.blocks:
        values = torch.cat([mlp.fc2.weight.detach().T for mlp in block.mlps])
        layers.append(read_vectors(values, vit.readout).agreement)
    return torch.stack(layers)


learnt, chance = agreement(model), agreement(random_model)
figure, axis = plt.subplots(figsize=(5.4, 3), layout="constrained")
for values, color, label in ((learnt, ORANGE, "trained"), (chance, GRAY, "random weights")):
    low, high = values.quantile(0.1, 1), values.quantile(0.9, 1)
    axis.fill_between(range(len(values)), low, high, color=color, alpha=0.18, linewidth=0)
    axis.plot(values.mean(1), marker="o", markersize=4, color=color, label=label)
axis.set(xlabel="block", ylabel="class–value agreement", xticks=range(len(learnt)))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Do keys and values agree?
#
# A memory is used well if it is active where its class is. For the patches of this image: is the
# class among the five best classes of one of their five strongest memories?

# %%
from captum_classemb.studies.memories.value_vectors import keys_agree

coefficients = record(vit, inputs, ["mlp_coefficients"])["mlp_coefficients"]
shares = []
for block, active in zip(vit.blocks, coefficients, strict=True):
    best = read_vectors(block.mlps[0].fc2.weight.detach().T, vit.readout, k=2)
    strongest = active[0].topk(5, dim=-1).indices
    patches = slice(vit.prefix_tokens, None)
    every = [
        keys_agree(strongest, best, torch.tensor([c]))[:, patches].float().mean()
        for c in range(len(names) if len(names) < 50 else 50)
    ]
    own = keys_agree(strongest, best, torch.tensor([target]))[:, patches].float().mean()
    shares.append((own, torch.stack(every).mean()))

figure, axis = plt.subplots(figsize=(5.4, 2.8), layout="constrained")
own, every = torch.tensor(shares).T
axis.plot(own, marker="o", markersize=4, color=ORANGE, label=f"“{names[target]}”")
axis.plot(every, marker="o", markersize=4, color=GRAY, label="mean over classes")
axis.set(xlabel="block", ylabel="share of patches", xticks=range(len(own)), ylim=(0, 1.03))
axis.set_title("Key–value agreement in the MLPs")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The ledger of one prediction
#
# With every norm frozen, the logit is an exact sum of what the embedding, each head from each
# patch, each MLP and the biases bring.

# %%
from captum_classemb import MemoryPatchImportance

memory = MemoryPatchImportance(model)
ledger = memory.ledger(inputs, target=target, memories=True)
print(f"terms add up to {ledger.total.item():.5f}; the model says {ledger.score.item():.5f}")


def waterfall(axis, terms, title):
    """Terms that add up, each bar starting where the one before ends."""
    labels, values = zip(*terms, strict=True)
    ends = torch.tensor(values).cumsum(0)
    starts = torch.cat([torch.zeros(1), ends[:-1]])
    colors = [ORANGE if value > 0 else BLUE for value in values]
    axis.barh(range(len(values)), ends - starts, left=starts, color=colors, height=0.7)
    axis.barh(len(values), ends[-1], color="#555555", height=0.7)
    for row, (value, end, start) in enumerate(zip(values, ends, starts, strict=True)):
        axis.text(max(end, start) + 0.1, row, f"{value:+.2f}", va="center", fontsize=8)
    axis.text(ends[-1] + 0.1, len(values), f"{ends[-1]:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(values) + 1), [*labels, "logit"])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_title(title, loc="left")


terms = [("embedding", ledger.embedding.item())]
for block in range(len(vit.blocks)):
    terms.append((f"block {block}: attention", ledger.attention[0, block].sum().item()))
    terms.append((f"block {block}: MLP", ledger.mlp[0, block].item()))
terms.append(("biases", ledger.bias.item()))
figure, axis = plt.subplots(figsize=(7, 0.26 * len(terms) + 1), layout="constrained")
waterfall(axis, terms, f"The logit of “{names[target]}”")
plt.show()

# %% [markdown]
# ## Down to heads …

# %%
from captum_classemb.plot import overlay_map

first = vit.prefix_tokens
by_head = ledger.attention[0, :, :, first:].sum(-1)  # L×H
heads = by_head.shape[1]
strongest = by_head.flatten().abs().topk(4).indices.tolist()
h, w = vit.grid(tuple(inputs.shape[2:]))

figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained")
for axis, index in zip(axes, strongest, strict=True):
    block, head = divmod(index, heads)
    overlay_map(axis, view, ledger.attention[0, block, head, first:].view(h, w), smooth=False)
    axis.set_title(f"block {block}, head {head}: {by_head[block, head]:+.2f}")
plt.show()

# %% [markdown]
# ## … and neurons
#
# Which hidden units of the MLPs bring the most, and what do their value vectors stand for?

# %%
by_memory = ledger.mlp_memories[0]  # L×M
places = by_memory.flatten().topk(6).indices.tolist()
print("block  unit   brings   its value vector stands for")
for place in places:
    block, unit = divmod(place, by_memory.shape[1])
    value = vit.blocks[block].mlps[0].fc2.weight.detach()[:, unit]
    best = read_vectors(value[None], vit.readout, k=3).classes[0].tolist()
    classes = ", ".join(names[i] for i in best)
    print(f"{block:>5}{unit:>6}{by_memory[block, unit]:>+9.2f}   {classes}")

# %% [markdown]
# How many units does it take? The terms of the last MLP, largest first, add up quickly.

# %%
last = by_memory[by_memory.sum(1).argmax()]
ordered = last[last.abs().argsort(descending=True)]
figure, axis = plt.subplots(figsize=(5.4, 2.8), layout="constrained")
axis.plot(range(1, len(ordered) + 1), ordered.cumsum(0), color=ORANGE)
axis.axhline(last.sum(), color=GRAY, linewidth=1, linestyle="--")
axis.set(xlabel="memories, largest first", ylabel="sum of their terms", xscale="log")
axis.set_title(f"The MLP of block {int(by_memory.sum(1).argmax())}")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Any other vectors
#
# `read_vectors` takes any directions of the residual stream: those of probes, or the decoder rows
# of a sparse autoencoder. Here a small one (the 16 most active features of a token rebuild it)
# learns 256 features of the tokens that leave the last block but one, and each is read.

# %%
from captum_classemb.data import open_dataset

data = open_dataset(os.environ.get("CLASSEMB_DATA", "scenes"), preprocess, None, len(names))
count = min(len(data), 200 if name == "demo_vit" else 20)
some = torch.stack([data[i * len(data) // count].image for i in range(count)])
tokens = record(vit, some, ["resid_post"])["resid_post"][-2][:, vit.prefix_tokens :].flatten(0, 1)
mean, size = tokens.mean(0), tokens.std()
tokens = (tokens - mean) / size

generator = torch.Generator().manual_seed(0)
decoder = torch.randn(256, tokens.shape[1], generator=generator)
decoder = (decoder / decoder.norm(dim=1, keepdim=True)).requires_grad_()
encoder = decoder.detach().T.clone().requires_grad_()
optimiser = torch.optim.Adam([encoder, decoder], lr=2e-3)


def features_of(x):
    active, places = (x @ encoder).relu().topk(16, dim=-1)
    return torch.zeros(len(x), 256).scatter(1, places, active)


for _ in range(400):
    x = tokens[torch.randint(len(tokens), (512,), generator=generator)]
    loss = (features_of(x) @ decoder - x).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

with torch.no_grad():
    features = features_of(tokens)
    explained = 1 - (features @ decoder - tokens).square().mean() / tokens.square().mean()
read = read_vectors(decoder.detach(), vit.readout, k=2)
print(f"explained variance {explained:.2f}\n\nfeature  active in  its decoder row stands for")
for feature in read.logits[:, 0].topk(6).indices.tolist():
    share = (features[:, feature] > 0).float().mean()
    classes = ", ".join(names[i] for i in read.classes[feature].tolist())
    print(f"{feature:>7}{share:>10.1%}   {classes}")
