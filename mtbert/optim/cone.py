"""Small convex problems over the cone of task gradients, solved exactly on the device.

K is the number of tasks, so there are at most 2^K faces to look at; for a handful of tasks this is one batched
solve, with no iteration that would have to look at its result on the host. So are the `_ex` routines, which do not
look at whether they succeeded: a Gram matrix that is not finite gives weights that are not, and the step is skipped.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_RIDGE = 1e-9
_LEAST = 1e-14


@cache
def _faces(count: int, device: torch.device) -> Tensor:
    """[2^K, K] bool: every subset of the tasks."""
    numbers = torch.arange(2**count, device=device)
    return (numbers[:, None] >> torch.arange(count, device=device)) % 2 == 1


def _normalised(gram: Tensor) -> Tensor:
    """The Gram matrix in float64 with a mean diagonal of 1, made regular: parallel gradients leave it singular.

    The ridge is relative to each gradient's own norm, for these may differ by orders of magnitude.
    """
    wide = gram.double()
    scale = wide.diagonal().mean()
    wide = wide / torch.where(scale > 0, scale, 1.0)
    return wide + torch.diag(_RIDGE * wide.diagonal() + _LEAST)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a regular system. torch's plain `solve` asks the device whether it was one, and waits."""
    solution: Tensor = torch.linalg.solve_ex(matrix, right).result
    return solution


def upgrad_weights(gram: Tensor) -> Tensor:
    """UPGrad (Quinton and Rey 2024): the sum of the gradients, each projected onto the dual cone of them all.

    The projection of g_i is sum_k v_k g_k with v = argmin v^T G v over v >= e_i (their proposition 1).
    """
    wide = _normalised(gram)
    count = len(wide)
    free = _faces(count, wide.device)[:, None, :].expand(-1, count, -1)  # [faces, i, k]
    fixed = torch.eye(count, dtype=wide.dtype, device=wide.device).expand(len(free), -1, -1)
    # On a face the free v_k satisfy (G v)_k = 0 with the others at their bounds e_i.
    eye = torch.eye(count, dtype=wide.dtype, device=wide.device)
    matrix = torch.where(free.unsqueeze(-1), wide, eye)
    right = torch.where(free, 0.0, fixed)
    v = _solve(matrix, right)
    slack = 1e-9
    pull = v @ wide
    feasible = ((v >= fixed - slack) & (free | (pull >= -slack))).all(-1)
    value = torch.where(feasible, (v * pull).sum(-1), torch.inf)
    best = value.argmin(0)  # [i]
    return v[best, torch.arange(count, device=v.device)].sum(0).to(gram.dtype)


def cagrad_weights(gram: Tensor, c: float) -> Tensor:
    """CAGrad (Liu et al. 2021, algorithm 1): the direction that helps the worst task most near the mean gradient g0.

    d = g0 + c ||g0|| g_w / ||g_w|| with w = argmin over the simplex of <g_w, g0> + c ||g0|| ||g_w||, here times K,
    so that c = 0 is the sum of the gradients rather than their mean.
    """
    wide = _normalised(gram)
    count = len(wide)
    mean = torch.full((count,), 1.0 / count, dtype=wide.dtype, device=wide.device)
    toward = wide @ mean
    radius = c * (mean @ toward).clamp(min=0).sqrt()
    if c == 0:
        return torch.ones_like(gram[0])
    face = _faces(count, wide.device)[1:]  # every non-empty subset
    inside = face.to(wide.dtype)
    eye = torch.eye(count, dtype=wide.dtype, device=wide.device)
    block = torch.where(face[:, :, None] & face[:, None, :], wide, eye)
    inverse = torch.linalg.inv_ex(block).inverse * (inside[:, :, None] * inside[:, None, :])
    # Stationarity on a face: toward + radius G w / ||w||_G = lambda 1, hence w ~ G^-1 (lambda 1 - toward), and
    # ||lambda 1 - toward||_{G^-1} = radius is a quadratic equation for lambda.
    a = torch.einsum("fij->f", inverse)
    b = torch.einsum("fij,j->f", inverse, toward)
    e = torch.einsum("fij,i,j->f", inverse, toward, toward)
    root = (b * b - a * (e - radius**2)).clamp(min=0).sqrt()
    lambdas = torch.stack([(b + root) / a, (b - root) / a], dim=1)  # [faces, 2]
    w = torch.einsum("fij,frj->fri", inverse, lambdas.unsqueeze(-1) - toward) * inside.unsqueeze(1)
    total = w.sum(-1, keepdim=True)
    w = torch.where(total.abs() > 1e-300, w / total, inside.unsqueeze(1) / inside.sum(-1)[:, None, None])
    feasible = (w >= -1e-9).all(-1)
    norm = torch.einsum("fri,ij,frj->fr", w, wide, w).clamp(min=0).sqrt()
    value = torch.where(feasible, w @ toward + radius * norm, torch.inf).flatten()
    # Not w[...]: indexing by a tensor of one number reads it on the host.
    best = w.flatten(0, 1).index_select(0, value.argmin().view(1)).squeeze(0)
    length = (best @ wide @ best).clamp(min=torch.finfo(wide.dtype).tiny).sqrt()
    return (count * (mean + radius * best / length)).to(gram.dtype)


def nash_weights(gram: Tensor, iterations: int = 40) -> Tensor:
    """Nash-MTL (Navon et al. 2022, claim 3.1): the positive alpha with G alpha = 1 / alpha.

    alpha minimises alpha^T G alpha / 2 - sum log alpha, which is convex; damped Newton steps, a fixed number of
    them. The bargained direction has the norm sqrt(K) whatever the gradients' norms; here it gets the norm of their
    sum, so that learning rate and clipping keep their meaning. It replaces the gradient over the shared parameters
    alone; the authors' code weighs the losses by alpha, and so the gradients of the heads as well.
    """
    wide = _normalised(gram)
    alpha = wide.diagonal().rsqrt()
    for _ in range(iterations):
        slope = wide @ alpha - 1 / alpha
        step = _solve(wide + torch.diag(alpha**-2), slope)
        decrement = (slope @ step).clamp(min=0).sqrt()
        alpha = alpha - step / (1 + decrement)  # within the region where the logarithms are defined
    wanted = wide.sum().clamp(min=0).sqrt()
    length = (alpha @ wide @ alpha).sqrt()
    return (alpha * wanted / length).to(gram.dtype)
