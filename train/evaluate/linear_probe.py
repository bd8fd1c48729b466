"""Linear probe: multinomial logistic regression on frozen unit features, standardised by the training split's moments.

The strength of the L2 penalty is picked on a tenth of the training split, then the probe is fitted on all of it: the
test split takes no part in any choice. Legend: N pictures, D embedding.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from train.evaluate.features import EncodedSet, progress_bar
from train.evaluate.ranking import Measurement, class_means, has_unequal_classes
from train.evaluate.suite import LinearProbe

# scikit-learn's C (inverse penalty), from strong to weak; the solution of one starts the next.
INVERSE_PENALTIES = (1e-2, 1e-1, 1.0, 10.0)
# Used when too few pictures are left to compare penalties; the result then says that nothing was held out.
FALLBACK_INVERSE_PENALTY = 0.1
HELD_OUT_SHARE = 0.1
# Caps, so that the probe stays a matter of seconds; the result says whether the last fit had converged by then.
SEARCH_ITERATIONS = 30
FINAL_ITERATIONS = 60
# Below this many products an iteration (pictures x features x classes) a second thread costs more than it brings.
ONE_THREAD_BELOW = 1_000_000_000
SEED = 0


@dataclass(frozen=True)
class ProbeResult:
    """Measurements, and the facts to store beside them: chosen penalty, held-out accuracy, classes never trained on."""

    measurements: dict[str, Measurement]
    details: dict[str, Any]


def measure(task: LinearProbe, train: EncodedSet, test: EncodedSet) -> ProbeResult:
    """top1, and mean_per_class where classes are unequal. A test class without training pictures counts as missed.

    Raises ValueError for a missing field or a training split with a single class.
    """
    train_labels = np.asarray([str(value) for value in train.values(task.class_key)])
    test_labels = [str(value) for value in test.values(task.class_key)]
    if len(set(train_labels.tolist())) < 2:
        raise ValueError(f"task linear_probe/{task.name}: the training split has one class only, {train_labels[0]!r}")
    mean_D, deviation_D = moments(train.image_ND.numpy())
    train_ND = (train.image_ND.numpy() - mean_D) / deviation_D
    test_ND = (test.image_ND.numpy() - mean_D) / deviation_D
    num_classes = len(set(train_labels.tolist()))
    title = f"probe of {task.name}"
    # Iterations stopped by the cap are reported in the result, not warned about in the middle of a progress bar.
    with (
        progress_bar(title, len(INVERSE_PENALTIES) + 1, "fit") as progress,
        threadpool_limits(1 if train_ND.size * num_classes < ONE_THREAD_BELOW else None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe, held_out_accuracy = picked_probe(train_ND, train_labels, progress)
        probe.set_params(max_iter=FINAL_ITERATIONS).fit(train_ND, train_labels)
        progress.update(progress.total - progress.n)
    correct_N = (probe.predict(test_ND) == np.asarray(test_labels)).astype(np.float64)
    measurements = {"top1": Measurement(correct_N, 1.0 / num_classes, "image")}
    if has_unequal_classes(test_labels):
        measurements["mean_per_class"] = class_means(correct_N, test_labels)
    details = {
        "inverse_penalty": probe.C,
        "held_out_accuracy": held_out_accuracy,
        "converged": bool(probe.n_iter_.max() < FINAL_ITERATIONS),
        "num_train_images": len(train_labels),
        "num_classes": num_classes,
        "classes_without_training_images": sorted(set(test_labels) - set(train_labels.tolist())),
    }
    return ProbeResult(measurements, details)


def moments(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    deviation_D = features_ND.std(axis=0)
    # A feature that never varies carries nothing: leave it at zero instead of dividing by zero.
    return features_ND.mean(axis=0), np.where(deviation_D > 0, deviation_D, 1.0)


def picked_probe(
    features_ND: np.ndarray, labels_N: np.ndarray, progress: tqdm
) -> tuple[LogisticRegression, float | None]:
    """(probe at the penalty with the best accuracy on a fixed random tenth, that accuracy); of equals the stronger penalty.

    The next `fit` of the probe starts from its solution, unless the tenth was left with classes that it was not fitted on.
    """
    order = np.random.default_rng(SEED).permutation(len(labels_N))
    num_held_out = max(1, round(HELD_OUT_SHARE * len(labels_N)))
    held_out, fitted = order[:num_held_out], order[num_held_out:]
    probe = LogisticRegression(C=FALLBACK_INVERSE_PENALTY, max_iter=SEARCH_ITERATIONS, tol=1e-4, warm_start=True)
    if len(set(labels_N[fitted].tolist())) < 2:
        return probe, None
    best, best_accuracy = probe, -1.0
    for inverse_penalty in INVERSE_PENALTIES:
        probe.set_params(C=inverse_penalty).fit(features_ND[fitted], labels_N[fitted])
        accuracy = float(probe.score(features_ND[held_out], labels_N[held_out]))
        progress.update(1)
        if accuracy > best_accuracy:
            best, best_accuracy = copy.deepcopy(probe), accuracy
    # A start of another shape would be refused: classes with one picture may have been held out.
    if len(best.classes_) < len(set(labels_N.tolist())):
        best.set_params(warm_start=False)
    return best, best_accuracy
