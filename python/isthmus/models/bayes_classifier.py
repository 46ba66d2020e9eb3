"""A classifier whose weights are distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isthmus.nn import BayesLinear


class BayesClassifier(nn.Module):
    """Two hidden layers of Gaussian weights; every call is another network of the posterior.

    Trained on the negative evidence lower bound of N labelled rows, per row

        E[−log p(y | x, W)] + temperature/N · KL(q(W) ‖ p(W)),    W ~ q(W) = N(mean, s²),

    where temperature 1 is the bound itself and less is a cold posterior. The predictive
    distribution averages networks: p(y | x) = E[p(y | x, W)].

    Args:
        features: size D of an input row.
        hidden: width of the two hidden layers.
        classes: number C of classes.
        prior_std: standard deviation of the prior of every weight.
        init_std: standard deviation that every weight starts with.
        estimator: ``"weight"`` or ``"local"``, see :class:`isthmus.nn.BayesLinear`.

    Shapes:
        x ``[N, D]``; logits ``[N, C]``; kl ``[]``, in nats, summed over all weights.

    Source: Blundell et al., Weight Uncertainty in Neural Networks, ICML 2015; cold posteriors:
    Wenzel et al., How Good is the Bayes Posterior in Deep Neural Networks Really?, ICML 2020.

    Example:
        >>> import torch
        >>> from isthmus.models import BayesClassifier
        >>> model, x, y = BayesClassifier(64, 32, 10), torch.rand(5, 64), torch.arange(5)
        >>> loss = torch.nn.functional.cross_entropy(model(x), y) + model.kl() / len(x)
        >>> loss.backward()
        >>> model.predict(x, num_networks=3).shape
        torch.Size([3, 5, 10])
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        *,
        prior_std: float = 1.0,
        init_std: float = 0.05,
        estimator: str = "weight",
    ) -> None:
        super().__init__()
        options: Any = {"prior_std": prior_std, "init_std": init_std, "estimator": estimator}
        self.first = BayesLinear(features, hidden, **options)
        self.second = BayesLinear(hidden, hidden, **options)
        self.last = BayesLinear(hidden, classes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of freshly drawn weights."""
        return self.last(self.second(self.first(x).relu()).relu())

    def kl(self) -> Tensor:
        """KL divergence of all weights from their prior."""
        return self.first.kl() + self.second.kl() + self.last.kl()

    @torch.no_grad()
    def predict(self, x: Tensor, num_networks: int) -> Tensor:
        """Class probabilities ``[num_networks, N, C]``, one slice for each network drawn."""
        return torch.stack([self(x).softmax(dim=-1) for _ in range(num_networks)])
