"""The losses of labelled documents against their formulas in float64, and the step against plain autograd."""

import numpy as np
import pytest
import scipy.special
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from pellucid.config import HeadConfig, ModelConfig, OptimizerConfig, TrainingConfig, UserError
from pellucid.data.dataset import Batch
from pellucid.data.labels import encode
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe.observer import SilentObserver
from pellucid.run_files import Run
from pellucid.training.optimizers import build_optimizer
from pellucid.training.step import training_step
from pellucid.training.tasks import as_told, class_cross_entropy, number_error

V, D = 50, 16
KIND = {"classification": "single_label_classification", "regression": "regression"}


def make_model(task):
    spread = {"mean": [1.0, 2.0, 3.0], "std": [1.0, 2.0, 0.5]} if task == "regression" else {}
    head = HeadConfig(problem_type=KIND[task], labels=["a", "b", "c"], max_length=16, **spread)
    return initialize(Grok1(ModelConfig(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=2, num_experts=4, head=head)), 1)  # fmt: skip


def packed(documents, rows, T, labels_MK):
    """documents: token lists; rows: which of them lie in each row, one after the other."""
    B = len(rows)
    tokens, targets = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -100)
    segments, positions = torch.zeros(B, T, dtype=torch.int32), torch.zeros(B, T, dtype=torch.int32)
    labels = torch.full((B, T, labels_MK.shape[1]), torch.nan)
    for row, members in enumerate(rows):
        at = 0
        for number, m in enumerate(members):
            span = slice(at, at + len(documents[m]))
            tokens[row, span], targets[row, span] = torch.tensor(documents[m]), 7
            segments[row, span], positions[row, span] = number + 1, torch.arange(len(documents[m]), dtype=torch.int32)
            labels[row, span.stop - 1] = labels_MK[m]
            at = span.stop
    ids = torch.arange(B)
    return Batch(tokens, targets, segments, positions, ids, ids * 0, labels)


def problem(task):
    rng = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, V, (n,), generator=rng).tolist() for n in (5, 3, 9, 1, 12, 2)]
    labels = torch.tensor([[0.0], [2], [1], [2], [0], [1]]) if task == "classification" else torch.randn(6, 3, generator=rng)
    return documents, labels, packed(documents, [[0, 1, 5], [2, 3], [4]], 16, labels)


def step(model, batches, task, **settings):
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd", learning_rate=0.1))
    wanted = TrainingConfig(task=task, balance_loss="none", gradient_clip=0.0, batch_size=4, **settings)
    return training_step(model, optimizer, batches, wanted, 0.0, SilentObserver())


@pytest.mark.parametrize("task", KIND)
def test_a_packed_document_is_judged_by_its_last_token_as_if_it_were_alone(task):
    """The step's loss and gradients = those of one document a row, read to its last token, in plain autograd."""
    documents, labels, batch = problem(task)
    model, alone = make_model(task), make_model(task)
    result = step(model, [batch], task)
    outputs = torch.stack([alone(torch.tensor([document]))[0, -1] for document in documents]).double()
    if task == "classification":
        loss = -outputs.log_softmax(-1)[torch.arange(6), labels[:, 0].long()].mean()
    else:
        loss = ((outputs - labels.double()) ** 2).mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert (result.predictions, result.tokens) == (6, sum(map(len, documents)))
    for (name, found), (_, expected) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm() + 1e-9, name  # fp32, other shapes


@pytest.mark.parametrize("task", KIND)
def test_micro_batches_with_uneven_numbers_of_documents_add_up(task):
    _, _, batch = problem(task)
    whole, parts = make_model(task), make_model(task)
    big, small = step(whole, [batch], task), step(parts, [batch[0:1], batch[1:3]], task)
    assert small.loss == pytest.approx(big.loss, rel=1e-6) and small.predictions == big.predictions
    assert torch.equal(small.load_LE, big.load_LE) and int(big.load_LE.sum()) == 2 * 2 * 32, "every real token is routed"
    for (name, found), (_, expected) in zip(parts.named_parameters(), whole.named_parameters(), strict=True):
        assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm() + 1e-9, name


def test_class_cross_entropy_is_its_formula_with_weights_and_smoothing():
    rng = np.random.default_rng(0)
    scores, classes, weights = rng.normal(0, 3, (20, 4)), rng.integers(0, 4, 20), np.array([0.5, 1.0, 2.0, 3.0])
    log_p = scores - scipy.special.logsumexp(scores, axis=-1, keepdims=True)
    for epsilon in (0.0, 0.2):
        q = (1 - epsilon) * np.eye(4)[classes] + epsilon / 4
        found = class_cross_entropy(torch.tensor(scores), torch.tensor(classes), torch.tensor(weights), epsilon)
        assert found.numpy() == pytest.approx(-(q * weights * log_p).sum(-1))
    plain = class_cross_entropy(torch.tensor(scores), torch.tensor(classes)).mean().item()
    assert plain == pytest.approx(log_loss(classes, np.exp(log_p)))


def test_number_error_is_the_mean_square_or_hubers():
    rng = np.random.default_rng(0)
    outputs, numbers = rng.normal(0, 2, (30, 3)), rng.normal(0, 2, (30, 3))
    found = number_error(torch.tensor(outputs), torch.tensor(numbers))
    assert found.numpy() == pytest.approx(((outputs - numbers) ** 2).mean(-1))
    found = number_error(torch.tensor(outputs), torch.tensor(numbers), 1.5)
    assert found.numpy() == pytest.approx(scipy.special.huber(1.5, outputs - numbers).mean(-1))


def test_balanced_class_weights_are_scikit_learns(tables, tmp_path):
    from pellucid.run import train

    run = train(tables(max_steps=1, class_weights="balanced"), run_dir=tmp_path / "run")
    labels, names = run.dataset().split("train").reader.labels(), run.config.model.head.labels
    expected = compute_class_weight("balanced", classes=np.array(names), y=labels)
    assert [run.config.training.class_weights[name] for name in names] == pytest.approx(expected.tolist())
    assert Run(tmp_path / "run").config == run.config


def test_class_weights_that_leave_nothing_to_learn_are_refused(tables, tmp_path):
    from pellucid.run import train

    with pytest.raises(UserError, match=r"training\.class_weights: all are 0"):
        train(tables(max_steps=1, class_weights={"animal": 0, "metal": 0, "colour": 0}), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_label_is_told_as_it_was_given_and_not_as_float32_left_it():
    head = HeadConfig(problem_type="regression", labels=["a", "b"], mean=[0.3285, 32.9675], std=[0.7801203432804538, 42.5866815301451],
                      max_length=16)  # fmt: skip
    given = np.array([[0, 0], [1, 33], [-2, 1024], [0.25, 3.5]])
    known = encode([str(row) for row in given.tolist()], "number", head.labels, head.mean, head.std)
    told = as_told(head, known)
    assert [f"{v:.12g}" for v in told.ravel()] == [f"{v:g}" for v in given.ravel()]
    broken = as_told(head, np.array([[np.nan, np.inf]], dtype=np.float32))
    assert np.isnan(broken[0, 0]) and broken[0, 1] == np.inf
