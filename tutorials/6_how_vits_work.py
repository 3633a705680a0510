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
# # 6. How do Vision Transformers work?
#
# Park and Kim (2022) look at vision models as filters and as landscapes: attention spreads
# information like a low-pass filter, MLPs and convolutions bring high frequencies back; and the
# loss around a trained Vision Transformer is smooth, but not convex. Everything here works on any
# timm model, convolutional ones included.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch

from captum_classemb.data import Preprocess, data_config, open_dataset
from captum_classemb.dynamics.depth import DepthMetrics
from captum_classemb.dynamics.figures.profiles import depth_profile, fourier_lines, lesion_bars
from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.variance import FeatureMapVariance
from captum_classemb.models import class_names, load_model

plt.rcParams.update({"figure.dpi": 110, "font.size": 9})

name = os.environ.get("CLASSEMB_MODEL", "demo_vit")
model = load_model(name, os.environ.get("CLASSEMB_CHECKPOINT"))
names = class_names(model)
transform = Preprocess.from_config(data_config(model), "squash")
data = open_dataset(os.environ.get("CLASSEMB_DATA", "scenes"), transform, None, len(names))
count = min(len(data), 96 if name == "demo_vit" else 8)
samples = [data[i * len(data) // count] for i in range(count)]
images = torch.stack([sample.image for sample in samples])
labels = torch.tensor([sample.label for sample in samples])

# %% [markdown]
# ## Feature maps by depth
#
# `DepthMetrics` feeds one metric of each sort with the feature maps after every step of a model,
# from one forward pass. Two of them: how much of high frequencies is in the maps, and how much
# they vary over space.

# %%
metrics = DepthMetrics(model, {"fourier": FourierAmplitude, "variance": FeatureMapVariance}).run(
    images.split(32)
)
kinds = [step.kind for step in metrics.steps]
print(f"{len(kinds)} steps:", ", ".join(dict.fromkeys(kinds)))

amplitudes = [values.numpy() for values in metrics.compute("fourier")]
frequencies = [metric.frequencies.numpy() for metric in metrics["fourier"]]
highest = [values[-1] for values in amplitudes]

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
fourier_lines(axes[0], frequencies, amplitudes, "Amplitude by frequency")
depth_profile(axes[1], kinds, {"": highest}, "Δ log amplitude at π", "High frequencies by depth")
plt.show()

# %%
variance = [float(value) for value in metrics.compute("variance")]
figure, axis = plt.subplots(figsize=(5.6, 3), layout="constrained")
depth_profile(axis, kinds, {"": variance}, "share of the variance over space", "Variance by depth")
plt.show()

# %% [markdown]
# Does attention lower the variance of feature maps, and does an MLP raise it?

# %%
for kind in dict.fromkeys(kinds[1:]):
    changes = [
        after - before
        for before, after, this in zip(variance, variance[1:], kinds[1:], strict=False)
        if this == kind
    ]
    lowered = sum(change < 0 for change in changes)
    print(f"{kind:<12} lowers it in {lowered} of {len(changes)} steps")

# %% [markdown]
# ## The loss around the weights
#
# A plane through the weights along two directions, each filter as long as the model's own.

# %%
from captum_classemb.dynamics.figures.landscapes import landscape_contour, landscape_surface
from captum_classemb.dynamics.landscape import LossLandscape

few = 24 if name == "demo_vit" else 2
landscape = LossLandscape(model, points=9, extent=0.8)
landscape.update(images[:few], labels[:few])
loss = landscape.compute().numpy()

figure = plt.figure(figsize=(8.4, 3.4), layout="constrained")
surface = figure.add_subplot(1, 2, 1, projection="3d")
landscape_surface(surface, landscape.axis.numpy(), loss, title="loss")
landscape_contour(figure.add_subplot(1, 2, 2), landscape.axis.numpy(), loss, "the same from above")
plt.show()

# %% [markdown]
# ## Curvature
#
# The largest eigenvalues of the loss Hessian, batch by batch. Negative ones mean that the loss is
# not convex there. (This needs the extra `dynamics`.)

# %%
from captum_classemb.dynamics.figures.landscapes import eigenvalue_density
from captum_classemb.dynamics.hessian import density, top_eigenvalues

size = 8 if name == "demo_vit" else 1
batches = list(zip(images.split(size), labels.split(size), strict=True))[:4]
found = torch.cat([top_eigenvalues(model, *batch, count=3, tolerance=0.05) for batch in batches])
reach = float(found.abs().max()) * 1.2
points = torch.linspace(min(float(found.min()) * 1.3, -0.1 * reach), reach, 300)

figure, axis = plt.subplots(figsize=(5.6, 3), layout="constrained")
curve = density(found, points)
eigenvalue_density(
    axis, points.numpy(), {name: curve.numpy()}, {name: found.numpy()}, "Top Hessian eigenvalues"
)
plt.show()

# %% [markdown]
# ## Take a part out
#
# Accuracy without each attention and each MLP in turn.

# %%
from captum_classemb.dynamics.lesion import LesionAccuracy, find_lesions

parts = find_lesions(model, images[:2])
metric = LesionAccuracy(parts)
for batch in zip(images.split(32), labels.split(32), strict=True):
    metric.update(model, *batch)
whole, *without = metric.compute().tolist()
figure, axis = plt.subplots(figsize=(6.4, 3), layout="constrained")
lesion_bars(
    axis,
    [part.kind for part in parts],
    [part.block for part in parts],
    without,
    whole,
    "Accuracy without each part",
)
plt.show()

# %% [markdown]
# ## AlterNet
#
# If convolutions and attention do opposite things, alternate them: in AlterNet attention closes
# the stages of a ResNet. Importing this package registers it with timm.

# %%
from captum_classemb.dynamics.alternet import attention_blocks

alternet = timm.create_model("alternet_50", num_classes=10)
million = sum(p.numel() for p in alternet.parameters()) / 1e6
print(f"AlterNet-50: {million:.1f} million weights")
for stage, blocks in enumerate(attention_blocks((3, 4, 6, 3)), 1):
    print(f"stage {stage}:", " ".join("attention" if b else "conv" for b in blocks))

# %% [markdown]
# The studies `fourier`, `variance`, `hessian`, `loss-landscape`, `lesion`, `cka`,
# `frequency-noise`, `robustness` and `trajectory` of `captum-classemb study` measure all of this
# over whole datasets.
