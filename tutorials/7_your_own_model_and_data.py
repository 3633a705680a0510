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
# # 7. Your own model and data
#
# A Vision Transformer from anywhere, a fine-tuned classifier, a zero-shot head, a folder of images
# with masks, and a study over several processes.

# %%
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import torchvision
from torch import nn

from captum_classemb import MemoryPatchImportance, PatchImportance
from captum_classemb.data import Preprocess, data_config, open_dataset
from captum_classemb.models import class_names, demo_image_paths, demo_mask_paths, load_model
from captum_classemb.plot import overlay_map
from captum_classemb.vit import adapt

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})
torch.manual_seed(0)
here = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A model from timm, torchvision or transformers
#
# Hand it over as it is. What is not a plain Vision Transformer is refused with a reason, never
# explained wrongly.

# %%
from captum_classemb.errors import UnsupportedModelError

ours = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
theirs = torchvision.models.VisionTransformer(
    image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
).eval()
for model, size in ((ours, 224), (theirs, 64)):
    maps = PatchImportance(model).attribute_patches(torch.rand(1, 3, size, size), target=3)
    print(type(model).__module__, tuple(maps.shape))

try:
    adapt(timm.create_model("resnet18"))
except UnsupportedModelError as error:
    print(f"refused: {str(error)[:96]} …")

# %% [markdown]
# A Vision Transformer that you wrote yourself needs an adapter of about twenty lines: see *Add
# your own ViT* in the documentation.
#
# ## A fine-tuned classifier
#
# A new head on an old model is a class embedding like any other. Here the digits become *even* and
# *odd*, and the new head is fitted in a second.

# %%
name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
names = class_names(model)
transform = Preprocess.from_config(data_config(model), "squash")
source = os.environ.get("CLASSEMB_DATA", "scenes:train")
train = open_dataset(source, transform, None, len(names))
size = min(len(train), 400 if name == "demo_vit" else 24)
samples = [train[i * len(train) // size] for i in range(size)]
images = torch.stack([sample.image for sample in samples])
parity = torch.tensor([sample.label % 2 for sample in samples])

with torch.no_grad():
    features = model.forward_head(model.forward_features(images), pre_logits=True)
head = nn.Linear(features.shape[1], 2)
optimiser = torch.optim.LBFGS(head.parameters(), max_iter=100)


def closure():
    optimiser.zero_grad()
    loss = nn.functional.cross_entropy(head(features), parity) + 1e-3 * head.weight.square().sum()
    loss.backward()
    return loss


optimiser.step(closure)
tuned = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
tuned.reset_classifier(2)
tuned.head.load_state_dict(head.state_dict())
right = (tuned(images).argmax(-1) == parity).float().mean()
print(f"even or odd: {right:.1%} of the images it was fitted on")

# %%
config = data_config(model)
mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))


def show(chosen, maps, titles):
    figure, axes = plt.subplots(1, len(maps), figsize=(2.4 * len(maps), 2.6), layout="constrained")
    for axis, image, values, title in zip(axes, chosen, maps, titles, strict=True):
        view = ((image * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        overlay_map(axis, view, values, smooth=False)
        axis.set_title(title)
    plt.show()


some = [i for i in range(0, size, max(size // 4, 1))][:4]
maps = MemoryPatchImportance(tuned).attribute_classes(images[some], [1])[:, 0]
show(images[some], maps, [f"“odd” in a {names[samples[i].label]}" for i in some])

# %% [markdown]
# ## A zero-shot head
#
# CLIP and SigLIP compare the image's embedding with those of texts. `TextEmbedding` makes class
# embeddings of text features, so every method takes such a model. With a real CLIP the features
# come from its text encoder; here class means of image features take their place, so that nothing
# need be downloaded.

# %%
from captum_classemb.readout import TextEmbedding

encoder = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
projection = nn.Linear(features.shape[1], 32, bias=False)
nn.init.orthogonal_(projection.weight)
encoder.reset_classifier(32)
encoder.head = projection  # as CLIP's own projection
with torch.no_grad():
    embedded = encoder(images)
labels = torch.tensor([sample.label for sample in samples])
present = labels.unique()
texts = torch.stack([embedded[labels == c].mean(0) for c in present])
readout = TextEmbedding(adapt(encoder).readout, texts, scale=100.0)

method = PatchImportance(encoder, readout=readout)
maps = method.attribute_patches(images[some], torch.searchsorted(present, labels[some]))
show(images[some], maps.sum((1, 2)), [f"“a {names[samples[i].label]}”" for i in some])

# %% [markdown]
# ## Your own images, with masks
#
# A folder with an `annotations.json` is a dataset: file, label, and a mask or boxes where there
# are any.

# %%
folder = here / "my_images"
folder.mkdir()
entries = []
for image, mask in zip(demo_image_paths(), demo_mask_paths(), strict=True):
    shutil.copy(image, folder)
    shutil.copy(mask, folder)
    label = names.find(image.stem.rpartition("_")[2]) if name == "demo_vit" else 0
    entries.append({"file": image.name, "label": label, "mask": mask.name})
(folder / "annotations.json").write_text(json.dumps(entries, indent=1))

data = open_dataset(folder, transform, None, len(names))
print(f"{len(data)} images, {data.with_masks} with masks, recognised as “{data.layout}”")

# %% [markdown]
# ## A study, on several processes
#
# `captum-classemb study` runs over such a folder; under `torchrun` its processes share the images
# and write one result. An interrupted run goes on with `--resume`.
#
# ```sh
# torchrun --nproc-per-node 4 -m captum_classemb study identifiability \
#     --model vit_base_patch16_224 --data my_images --output results
# ```

# %%
command = ["study", "identifiability", "--model", name, "--data", str(folder)]
command += ["--output", str(here / "results"), "--resize", "squash", "--quiet"]
if "CLASSEMB_CHECKPOINT" in os.environ:
    command += ["--checkpoint", os.environ["CLASSEMB_CHECKPOINT"]]
subprocess.run([sys.executable, "-m", "captum_classemb", *command], check=True)

table = here / "results" / "identifiability.csv"
lines = table.read_text().splitlines()
print(f"{table.name}: {len(lines) - 1} numbers")
print("\n".join(lines[:4]))

# %%
shutil.rmtree(here)
