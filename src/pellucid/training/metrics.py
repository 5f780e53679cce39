"""How well documents were labelled: accuracy, macro-F1, confusion matrix; RMSE, R2, Spearman's rank correlation.

Formulas as in scikit-learn and SciPy, against which they are tested. What is undefined (R2 of a constant) is NaN.
Letters: M documents, C classes, K numbers.
"""

from __future__ import annotations

import numpy as np


def confusion_matrix(true_M: np.ndarray, predicted_M: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] counts: row the true class, column the predicted one."""
    counts = np.bincount(true_M * classes + predicted_M, minlength=classes * classes)
    return counts.reshape(classes, classes)


def accuracy(confusion_CC: np.ndarray) -> float:
    """Share of documents whose class was predicted."""
    return float(np.trace(confusion_CC) / confusion_CC.sum())


def f1_scores(confusion_CC: np.ndarray) -> np.ndarray:
    """F1 = 2 hits / (true + predicted) of each class; NaN for a class that neither is nor was predicted."""
    total_C = confusion_CC.sum(0) + confusion_CC.sum(1)
    with np.errstate(invalid="ignore"):
        return 2 * np.diag(confusion_CC) / total_C


def macro_f1(confusion_CC: np.ndarray) -> float:
    """Mean F1 over the classes, whatever their size: a rare class counts as much as a common one."""
    return float(np.nanmean(f1_scores(confusion_CC)))


def rmse(true_MK: np.ndarray, predicted_MK: np.ndarray) -> np.ndarray:
    """[K]: root of the mean squared error, in the numbers' own unit."""
    return np.sqrt(np.square(predicted_MK - true_MK).mean(0))


def r2(true_MK: np.ndarray, predicted_MK: np.ndarray) -> np.ndarray:
    """[K]: 1 - squared error / that of the true mean. 1 is perfect, 0 no better than the mean."""
    spread_K = np.square(true_MK - true_MK.mean(0)).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread_K > 0, 1 - np.square(predicted_MK - true_MK).sum(0) / spread_K, np.nan)


def spearman(true_MK: np.ndarray, predicted_MK: np.ndarray) -> np.ndarray:
    """[K]: correlation of the ranks (Spearman 1904); ties share the mean of their ranks."""
    a_MK, b_MK = (np.apply_along_axis(ranks, 0, values) for values in (true_MK, predicted_MK))
    a_MK, b_MK = a_MK - a_MK.mean(0), b_MK - b_MK.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a_MK * b_MK).sum(0) / np.sqrt(np.square(a_MK).sum(0) * np.square(b_MK).sum(0))


def ranks(values_M: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values get the mean of the places they take."""
    _, group, counts = np.unique(values_M, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
