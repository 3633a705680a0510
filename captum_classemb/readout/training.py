"""Readouts that are trained by gradient steps: logistic probes and translators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.base import Readout
from captum_classemb.readout.tuned import Translator

__all__ = ["LogisticTrainer", "TranslatorTrainer"]

#: Logits that are held at once with their gradients.
_LOGITS = 1 << 25


class _Trainer:
    """Adam over one matrix and one bias that start at 0, so that nothing is drawn at random.

    Args:
        rows: of the matrix, and length of the bias.
        width: columns of the matrix.
        learning_rate: of the first pass.
        device: of both.
    """

    def __init__(
        self, rows: int, width: int, learning_rate: float, device: torch.device | None = None
    ) -> None:
        self.matrix = torch.zeros(rows, width, device=device, requires_grad=True)
        self.bias = torch.zeros(rows, device=device, requires_grad=True)
        self.learning_rate = learning_rate
        self._adam = torch.optim.Adam([self.matrix, self.bias], lr=learning_rate)

    def slow_down(self, share: float) -> None:
        """Go on with this share of the first learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate * share

    def _apply(self) -> None:
        self._adam.step()
        self._adam.zero_grad()


class LogisticTrainer(_Trainer):
    """Multinomial logistic regression by mini-batches.

    Minimises the mean cross-entropy + ½·penalty·‖W‖².

    Args:
        classes: C.
        width: D.
        learning_rate: of the first pass.
        penalty: of the squared weights; biases are free.
        device: of the weights.

    Examples:
        >>> trainer = LogisticTrainer(classes=2, width=1, learning_rate=0.1)
        >>> for _ in range(50):
        ...     loss = trainer.step(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
        >>> weight, bias = trainer.head
        >>> bool(weight[0] > weight[1]), loss < 0.1
        (True, True)
    """

    def __init__(
        self,
        classes: int,
        width: int,
        learning_rate: float = 1e-2,
        penalty: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(classes, width, learning_rate, device)
        self.penalty = penalty

    def step(self, features: Tensor, labels: Tensor) -> float:
        """One step on R×D features and R labels; the loss before it."""
        with torch.enable_grad():
            x = features.detach().to(self.matrix)
            loss = F.cross_entropy(x @ self.matrix.T + self.bias, labels)
            loss = loss + 0.5 * self.penalty * self.matrix.square().sum()
            loss.backward()
        self._apply()
        return float(loss.detach())

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight C×D and bias C."""
        return self.matrix.detach(), self.bias.detach()


class TranslatorTrainer(_Trainer):
    """A translator whose tokens are to be read as the same tokens are after the last block.

    Minimises the mean over tokens of KL(last block ‖ translated).

    Args:
        own: the model's readout.
        width: D.
        learning_rate: of the first pass.
        device: of the translator.
    """

    def __init__(
        self,
        own: Readout,
        width: int,
        learning_rate: float = 1e-3,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(width, width, learning_rate, device)
        self.own = own

    def step(self, tokens: Tensor, final: Tensor) -> float:
        """One step on some images; the mean divergence before it, in nats.

        Args:
            tokens: hidden states of this place, B×N×D.
            final: those after the last block, B×N×D.
        """
        total = 0.0
        count = tokens.shape[0] * tokens.shape[1]
        images = max(1, _LOGITS // (tokens.shape[1] * self.own.num_classes))
        translate = Translator(self.matrix, self.bias)
        for some, goal in zip(tokens.split(images), final.split(images), strict=True):
            with torch.no_grad():
                wanted = self.own.project(upcast(goal)).log_softmax(-1)
            with torch.enable_grad():
                found = self.own.project(translate(some.detach())).log_softmax(-1)
                loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / count
                loss.backward()
            total += float(loss.detach())
        self._apply()
        return total

    @property
    def translator(self) -> Translator:
        """As far as it is trained."""
        return Translator(self.matrix.detach(), self.bias.detach())
