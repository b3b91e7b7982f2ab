"""L2-regularized logistic regression for many strengths and many subsets of the images at once.

The objective is scikit-learn's, divided by the number of images n of the fit:

    mean of the losses + lambda / (2 n) * |W|^2        (the biases are not penalized)

The loss is the cross-entropy of a softmax for three classes or more, and that of a sigmoid per column for two classes and
for several labels per image. All fits share the features, so each iteration is two matrix products for all of them. The
method is L-BFGS, as in scikit-learn, with two additions. The features are rotated to the axes of their covariance, in
which a diagonal matrix is a good first guess of the inverse Hessian. And since the logits along a search direction are
linear in the step, the line search needs no further products. Everything is in float64.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esvit_core.runs.gpus import computing_device

_MEMORY = 10  # pairs of steps and gradient changes, as in scikit-learn
_BATCH_VALUES = 1 << 25  # logits of the fits that run at once: 256 MiB
_SUFFICIENT = 1e-4  # Armijo's constant
_HALVINGS = 30


@dataclass(frozen=True)
class Fits:
    """Solutions of P problems, in the rotated features of a :class:`LogisticProblem`.

    Attributes:
        parameters: weights and, in the last row, biases, (D + 1, P, C), float64.
        objective: value of the objective, (P,).
        iterations: number of iterations, (P,).
        converged: whether each fit met the tolerance before the limit of iterations, (P,).
    """

    parameters: Tensor
    objective: Tensor
    iterations: Tensor
    converged: Tensor

    def select(self, which: Tensor) -> Fits:
        """Return the problems with these numbers."""
        return Fits(self.parameters[:, which], self.objective[which], self.iterations[which], self.converged[which])


class LogisticProblem:
    """Features and targets, on which any number of regressions can be fitted.

    Args:
        features: (N, D).
        targets: classes from 0, each of which occurs, (N,) int; or several labels per image, (N, C) bool.
        device: where to compute; None: the GPU if there is one.

    Raises:
        ValueError: there are fewer than two classes.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, device: torch.device | None = None) -> None:
        self.device = device or computing_device()
        self.several_labels = targets.ndim == 2
        classes = targets.shape[1] if self.several_labels else int(targets.max(initial=-1)) + 1
        if not self.several_labels and classes < 2:
            raise ValueError(f"expected at least two classes, got {classes}")
        self.softmax = not self.several_labels and classes > 2
        labels = torch.as_tensor(np.ascontiguousarray(targets)).to(self.device)
        self._labels = labels.long() if self.softmax else None
        self._hot = None if self.softmax else (labels if self.several_labels else labels[:, None]).double()  # (N, C)
        self.columns = classes if self.softmax or self.several_labels else 1

        x = torch.as_tensor(features, dtype=torch.float64).to(self.device)
        self._mean = x.mean(0)
        x = x - self._mean
        basis = None
        if x.shape[1] > x.shape[0]:  # the penalty keeps the weights in the span of the features
            basis, triangle = torch.linalg.qr(x.T)  # (D, N), (N, N)
            x = triangle.T.contiguous()
        variances, axes = torch.linalg.eigh(x.T @ x / max(1, len(x)))
        self._basis = axes if basis is None else basis @ axes  # (D, D')
        self._variances = variances.clamp_min(0)
        self._x = torch.cat([x @ axes, x.new_ones(len(x), 1)], 1)  # (N, D' + 1)

    def __len__(self) -> int:
        return len(self._x)

    def fit(
        self,
        strengths: np.ndarray,
        used: np.ndarray | None = None,
        start: Tensor | None = None,
        tolerance: float = 1e-5,
        max_iterations: int = 1_000,
        smallest_decrease: float = 1e-9,
    ) -> Fits:
        """Fit P regressions.

        Args:
            strengths: lambda of each, (P,), positive.
            used: which images each uses, (N, P) bool; None: all use all.
            start: parameters to start from, (D' + 1, P, C); None: zeros.
            tolerance: largest absolute value of the gradient at which a fit ends.
            max_iterations: limit of the iterations.
            smallest_decrease: a fit also ends at a step that would lower the objective by less, relative to its value.
        """
        penalties = torch.as_tensor(strengths, dtype=torch.float64).to(self.device)
        masks = None if used is None else torch.as_tensor(used).to(self.device)
        size = max(1, _BATCH_VALUES // (len(self) * self.columns))
        parts = []
        for first in range(0, len(penalties), size):
            part = slice(first, first + size)
            parts.append(
                self._minimize(
                    penalties[part],
                    None if masks is None else masks[:, part].double(),
                    None if start is None else start[:, part].clone(),
                    tolerance,
                    max_iterations,
                    smallest_decrease,
                )
            )
        return Fits(
            torch.cat([part.parameters for part in parts], 1),
            torch.cat([part.objective for part in parts]),
            torch.cat([part.iterations for part in parts]),
            torch.cat([part.converged for part in parts]),
        )

    def decisions(self, fits: Fits, number: int) -> np.ndarray:
        """Return the logits of the problem's own images by the fit ``number``, (N, C)."""
        return (self._x @ fits.parameters[:, number]).cpu().numpy()

    def coefficients(self, fits: Fits, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (D, C) and biases (C,) of the fit ``number`` for the features as they were given."""
        parameters = fits.parameters[:, number]
        weights = self._basis @ parameters[:-1]
        return weights.cpu().numpy(), (parameters[-1] - self._mean @ weights).cpu().numpy()

    def classes_of(self, logits: np.ndarray) -> np.ndarray:
        """Return the classes that logits (M, C) predict, (M,); of several labels, whether each applies, (M, C) bool."""
        if self.several_labels:
            return logits > 0
        return logits.argmax(1) if self.softmax else (logits[:, 0] > 0).astype(np.int64)

    def _minimize(
        self,
        strengths: Tensor,
        used: Tensor | None,
        start: Tensor | None,
        tolerance: float,
        max_iterations: int,
        smallest_decrease: float,
    ) -> Fits:
        problems, rows = len(strengths), self._x.shape[1]
        images = torch.full_like(strengths, len(self)) if used is None else used.sum(0)
        penalty = strengths / images
        # Curvature of the loss at zero, times the variance of each feature, plus the penalty.
        curvature = (self.columns - 1) / self.columns**2 if self.softmax else 0.25
        variances = torch.cat([self._variances, self._variances.new_ones(1)])
        scale = curvature * variances[:, None] + penalty * _row_mask(rows, self.device)  # (D' + 1, P)
        scale = scale.clamp_min(1e-12 * float(scale.max()))
        state = _State(
            parameters=start if start is not None else strengths.new_zeros(rows, problems, self.columns),
            penalty=penalty * _row_mask(rows, self.device),
            weights=None if used is None else used / images,
            scale=scale,
            numbers=torch.arange(problems, device=self.device),
        )
        found = Fits(
            torch.empty_like(state.parameters),
            torch.empty_like(strengths),
            torch.zeros(problems, dtype=torch.long, device=self.device),
            torch.zeros(problems, dtype=torch.bool, device=self.device),
        )
        logits = self._products(state.parameters)
        losses, slopes = self._losses(logits)
        value = self._mean_of(losses, state) + _penalty_of(state)
        for iteration in range(max_iterations + 1):
            gradient = self._gradient(slopes, state)
            state.remember(gradient)
            direction = state.direction(gradient)
            along = self._products(direction)
            slope = _dot(gradient, direction)  # (P,)
            bend = self._mean_of(self._curvatures(slopes, along), state) + _dot(
                state.penalty[..., None] * direction, direction
            )
            step = -slope / bend.clamp_min(torch.finfo(torch.float64).tiny)
            worthless = -slope * step / 2 <= smallest_decrease * value
            converged = (gradient.abs().amax((0, 2)) <= tolerance) | worthless
            ended = converged if iteration < max_iterations else torch.ones_like(converged)
            if ended.any():
                state.record(found, ended, converged, value, iteration)
                if ended.all():
                    break
                keep = (~ended).nonzero()[:, 0]
                state.keep(keep)
                logits, along, value, slope, step = (
                    logits[:, keep],
                    along[:, keep],
                    value[keep],
                    slope[keep],
                    step[keep],
                )
                direction = direction[:, keep]
            step, logits, losses, slopes, value = self._search(state, direction, along, logits, value, slope, step)
        return found

    def _search(
        self,
        state: _State,
        direction: Tensor,
        along: Tensor,
        logits: Tensor,
        value: Tensor,
        slope: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Take the step to the minimum of the quadratic model, halved until the objective falls enough."""
        before = state.parameters
        for _ in range(_HALVINGS):
            state.parameters = before + step[:, None] * direction
            moved = logits + step[:, None] * along
            losses, slopes = self._losses(moved)
            after = self._mean_of(losses, state) + _penalty_of(state)
            # The rounding error of the sum must not prevent the last steps.
            enough = after <= value + _SUFFICIENT * step * slope + 1e-15 * value.abs()
            if enough.all():
                break
            step = torch.where(enough, step, step / 2)
        state.step = step[:, None] * direction
        return step, moved, losses, slopes, after

    def _products(self, parameters: Tensor) -> Tensor:
        """Return logits (N, P, C) of parameters (D' + 1, P, C)."""
        return (self._x @ parameters.flatten(1)).unflatten(1, parameters.shape[1:])

    def _gradient(self, slopes: Tensor, state: _State) -> Tensor:
        slopes = slopes / len(self) if state.weights is None else slopes * state.weights[..., None]
        gradient = (self._x.T @ slopes.flatten(1)).unflatten(1, slopes.shape[1:])  # (D' + 1, P, C)
        return gradient + state.penalty[..., None] * state.parameters

    def _losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each image, (N, P), and its derivative by the logits, (N, P, C)."""
        if self.softmax:
            assert self._labels is not None
            largest = logits.amax(2, keepdim=True)
            shares = (logits - largest).exp_()
            total = shares.sum(2, keepdim=True)
            chosen = self._labels[:, None, None].expand(-1, logits.shape[1], 1)
            losses = (largest + total.log() - logits.gather(2, chosen))[..., 0]
            shares /= total
            return losses, shares.scatter_add_(2, chosen, torch.full_like(largest, -1.0))
        assert self._hot is not None
        hot = self._hot[:, None]  # (N, 1, C)
        losses = torch.nn.functional.softplus(logits) - hot * logits
        return losses.sum(2), logits.sigmoid() - hot

    def _curvatures(self, slopes: Tensor, along: Tensor) -> Tensor:
        """Return the second derivative of the loss of each image in the direction ``along``, (N, P).

        Args:
            slopes: derivative of the losses by the logits, whose absolute value is the share of each class; for the image's
                own class, one minus the share.
            along: change of the logits, (N, P, C).
        """
        if self.softmax:
            assert self._labels is not None
            relative = along - along.gather(2, self._labels[:, None, None].expand(-1, along.shape[1], 1))
            weighted = slopes * relative
            return (weighted * relative).sum(2) - weighted.sum(2).square()
        shares = slopes.abs()
        return (shares * (1 - shares) * along.square()).sum(2)

    def _mean_of(self, values: Tensor, state: _State) -> Tensor:
        return values.mean(0) if state.weights is None else (values * state.weights).sum(0)


@dataclass
class _State:
    """The problems that have not ended: their numbers, parameters, and the memory of L-BFGS."""

    parameters: Tensor  # (D' + 1, P, C)
    penalty: Tensor  # (D' + 1, P)
    weights: Tensor | None  # (N, P)
    scale: Tensor  # (D' + 1, P)
    numbers: Tensor  # (P,)
    step: Tensor | None = None
    gradient: Tensor | None = None

    def __post_init__(self) -> None:
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MEMORY)

    def remember(self, gradient: Tensor) -> None:
        """Add the last step and the change of the gradient to the memory."""
        if self.step is not None and self.gradient is not None:
            change = gradient - self.gradient
            product = _dot(self.step, change)
            usable = product > 1e-12 * _dot(change, change).sqrt() * _dot(self.step, self.step).sqrt()
            self.pairs.append((self.step, change, torch.where(usable, 1 / product, torch.zeros_like(product))))
        self.gradient = gradient

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of L-BFGS (Nocedal and Wright, algorithm 7.4), with the scale as first guess."""
        q, factors = -gradient, []
        for step, change, inverse in reversed(self.pairs):
            factor = inverse * _dot(step, q)
            q = q - factor[:, None] * change
            factors.append(factor)
        result = q / self.scale[..., None]
        if self.pairs:
            step, change, inverse = self.pairs[-1]
            scaled = _dot(change, change / self.scale[..., None])
            ratio = 1 / (inverse * scaled)
            result = result * torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))[:, None]
        for (step, change, inverse), factor in zip(self.pairs, reversed(factors), strict=True):
            result = result + (factor - inverse * _dot(change, result))[:, None] * step
        return result

    def record(self, found: Fits, ended: Tensor, converged: Tensor, value: Tensor, iteration: int) -> None:
        """Write the problems that have ended to ``found``."""
        numbers = self.numbers[ended]
        found.parameters[:, numbers] = self.parameters[:, ended]
        found.objective[numbers] = value[ended]
        found.iterations[numbers] = iteration
        found.converged[numbers] = converged[ended]

    def keep(self, which: Tensor) -> None:
        """Drop all problems but those at these positions."""
        self.parameters, self.penalty = self.parameters[:, which], self.penalty[:, which]
        self.scale, self.numbers = self.scale[:, which], self.numbers[which]
        self.weights = None if self.weights is None else self.weights[:, which]
        self.gradient = None if self.gradient is None else self.gradient[:, which]
        kept = [(step[:, which], change[:, which], inverse[which]) for step, change, inverse in self.pairs]
        self.pairs = deque(kept, maxlen=_MEMORY)


def _row_mask(rows: int, device: torch.device) -> Tensor:
    """Return 1 for the rows of the weights and 0 for that of the biases, (rows, 1)."""
    mask = torch.ones(rows, 1, dtype=torch.float64, device=device)
    mask[-1] = 0
    return mask


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each problem, (P,)."""
    return (one * other).sum((0, 2))


def _penalty_of(state: _State) -> Tensor:
    return _dot(state.penalty[..., None] * state.parameters, state.parameters) / 2
