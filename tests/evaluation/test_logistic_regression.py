"""The batched solver finds the optimum of scikit-learn's L-BFGS, for many strengths and subsets at once."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from esvit_core.evaluation import logistic_regression
from esvit_core.evaluation.logistic_regression import LogisticProblem

STRENGTHS = np.array([1.0, 1e2, 1e4])


def digits(classes: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(n_class=classes, return_X_y=True)
    return x[:count].astype(np.float32), y[:count]


def wide() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32), np.arange(40) % 3


def objective(x: np.ndarray, y: np.ndarray, weights: np.ndarray, biases: np.ndarray, strength: float) -> float:
    logits = x.astype(np.float64) @ weights + biases
    if logits.shape[1] == 1:
        losses = np.logaddexp(0, logits[:, 0]) - y * logits[:, 0]
    else:
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(losses.mean() + strength * (weights**2).sum() / (2 * len(x)))


@pytest.mark.parametrize("data", [digits(2), digits(5), wide()], ids=["two classes", "five classes", "wide"])
def test_the_optimum_and_the_predictions_are_those_of_scikit_learn(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    problem = LogisticProblem(x, y)
    fits = problem.fit(STRENGTHS)
    assert fits.converged.all()
    for number, strength in enumerate(STRENGTHS):
        reference = LogisticRegression(C=1 / strength, tol=1e-7, max_iter=20_000).fit(x.astype(np.float64), y)
        expected = objective(x, y, reference.coef_.T, reference.intercept_, strength)
        weights, biases = problem.coefficients(fits, number)
        assert objective(x, y, weights, biases, strength) == pytest.approx(expected, rel=1e-4)
        assert float(fits.objective[number]) == pytest.approx(expected, rel=1e-4)
        predicted = problem.classes_of(x.astype(np.float64) @ weights + biases)
        assert (predicted == reference.predict(x)).mean() >= 0.999
        assert (problem.classes_of(problem.decisions(fits, number)) == predicted).all()


def test_a_fit_to_a_subset_ignores_the_other_images() -> None:
    x, y = digits(4, 200)
    half = np.arange(200) % 2 == 0
    problem = LogisticProblem(x, y)
    fits = problem.fit(np.array([10.0, 10.0]), np.stack([half, np.ones(200, bool)], 1), tolerance=1e-8)
    alone = LogisticProblem(x[half], y[half])
    expected = alone.coefficients(alone.fit(np.array([10.0]), tolerance=1e-8), 0)[0]
    assert problem.coefficients(fits, 0)[0] == pytest.approx(expected, abs=1e-4)
    assert problem.coefficients(fits, 1)[0] != pytest.approx(expected, abs=1e-4)


def test_a_warm_start_finds_the_same_optimum_in_fewer_iterations() -> None:
    problem = LogisticProblem(*digits(4, 200))
    cold, near = (problem.fit(np.array([strength])) for strength in (10.0, 13.0))
    warm = problem.fit(np.array([10.0]), start=near.parameters)
    assert float(warm.objective[0]) == pytest.approx(float(cold.objective[0]), rel=1e-6)
    assert int(warm.iterations[0]) < int(cold.iterations[0])


def test_several_labels_of_an_image_are_fitted_like_separate_problems() -> None:
    x, y = digits(3, 200)
    several = np.stack([y == 0, y != 1], 1)
    problem = LogisticProblem(x, several)
    weights = problem.coefficients(problem.fit(np.array([50.0]), tolerance=1e-8), 0)[0]
    for column in range(2):
        single = LogisticProblem(x, several[:, column].astype(int))
        expected = single.coefficients(single.fit(np.array([50.0]), tolerance=1e-8), 0)[0][:, 0]
        assert weights[:, column] == pytest.approx(expected, abs=1e-4)


def test_fits_that_do_not_fit_into_memory_at_once_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = LogisticProblem(*digits(4, 100))
    together = problem.fit(STRENGTHS)
    monkeypatch.setattr(logistic_regression, "_BATCH_VALUES", 1)
    assert np.allclose(problem.fit(STRENGTHS).objective, together.objective, rtol=1e-9)


def test_the_limit_of_iterations_is_stated() -> None:
    fits = LogisticProblem(*digits(4, 100)).fit(np.array([1e-4, 1e8]), max_iterations=3)
    assert fits.converged.tolist() == [False, True] and int(fits.iterations.max()) == 3


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        LogisticProblem(np.ones((3, 2), np.float32), np.zeros(3, np.int64))
