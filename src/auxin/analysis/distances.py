"""How far apart two outputs of a model are: of each sample, the mean over its tokens.

With z the logits of the model as it is and z' those of the changed one, P and Q their softmax, M = (P + Q) / 2:

| name | distance |
|---|---|
| js | KL(P, M) / 2 + KL(Q, M) / 2, the Jensen-Shannon divergence; at most log 2 |
| kl | KL(P, Q) |
| angular | arccos of the cosine of z and z', in radians; at most pi / 2 (FinerCut, arXiv 2405.18218) |
| norm | length of z - z', over all tokens of the sample together (FinerCut) |
| perplexity | loss of the changed model minus that of the model, in nats: the log of the ratio of perplexities |

The first four are 0 where nothing changed, and positive otherwise; the last one looks at the labels, and is negative
where the change helps.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from auxin.errors import ConfigError

Distance = Literal["js", "kl", "angular", "norm", "perplexity"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
_FARTHEST = 80.0
"""Of two log-probabilities; what is farther apart than this has the same part in JS, to the last digit."""


def distance(name: Distance, reference: Tensor, changed: Tensor, labels: Tensor | None) -> float:
    """The distance called `name` of the outputs for one sample.

    Args:
        name: of the table above.
        reference: logits (tokens, classes) of the model as it is, for the tokens that count.
        changed: those of the changed model.
        labels: (tokens,), what the logits should say, -100 where nothing is asked; for "perplexity".

    Raises:
        ConfigError: "perplexity" without labels.
    """
    reference, changed = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (reference, changed))
    if name == "norm":
        return torch.linalg.vector_norm(reference - changed).item()
    if name == "angular":
        return _angles(reference, changed).mean().item()
    if name == "perplexity":
        return loss(changed, labels) - loss(reference, labels)
    p, q = reference.log_softmax(dim=-1), changed.log_softmax(dim=-1)
    if name == "kl":
        return divergence(p, q).mean().item()
    apart = _apart(p, q).clamp(-_FARTHEST, _FARTHEST)
    middle = torch.log1p(torch.expm1(apart) / 2)  # log M - log P, to the last digit where the two are close
    return ((q.exp() * (apart - middle) - p.exp() * middle).sum(-1) / 2).mean().item()


def divergence(reference: Tensor, changed: Tensor) -> Tensor:
    """KL(P, Q) in nats, (...), of log-probabilities (..., classes)."""
    return -torch.where(reference == -math.inf, 0, reference.exp() * _apart(reference, changed)).sum(-1)


def _apart(reference: Tensor, changed: Tensor) -> Tensor:
    # Both may be minus infinity, where a class is masked.
    return torch.where(reference == changed, 0, changed - reference)


def loss(logits: Tensor, labels: Tensor | None) -> float:
    """Mean cross-entropy in nats of logits (tokens, classes) and labels (tokens,), of which -100 doesn't count."""
    if labels is None:
        raise ConfigError(
            "perplexity looks at labels, one for each token or sample, and the data have none like that. Give such "
            "labels, or choose another distance (js)."
        )
    return F.cross_entropy(logits, labels).item()


def _angles(one: Tensor, other: Tensor) -> Tensor:
    """Between vectors (..., size), at most a right one; exact where they are small, as arccos is not."""
    one, other = F.normalize(one, dim=-1), F.normalize(other, dim=-1)
    lengths = torch.linalg.vector_norm(one - other, dim=-1), torch.linalg.vector_norm(one + other, dim=-1)
    return (2 * torch.atan2(*lengths)).clamp(max=math.pi / 2)
