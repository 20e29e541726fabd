from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from timm_spot.tasks.evaluation import knn
from timm_spot.tasks.evaluation.knn import knn_predict, to_bank


def features(count, classes, dim=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return to_bank(centres[labels] + 1.2 * torch.randn(count, dim, generator=generator)), labels


@pytest.mark.parametrize('k, temperature', [(20, 0.07), (1, 0.07), (5, 1.)])
def test_agrees_with_scikit_learn(monkeypatch, k, temperature):
    monkeypatch.setattr(knn, '_BANK', 300)  # several blocks, the last one smaller
    monkeypatch.setattr(knn, '_QUERIES', 128)
    everything, labels = features(1500, classes=7)
    queries, bank, bank_labels = everything[:500], everything[500:], labels[500:]
    reference = KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp((1 - d) / temperature))
    reference.fit(bank.float().numpy(), bank_labels.numpy())
    expected = torch.from_numpy(reference.predict(queries.float().numpy()))
    assert torch.equal(knn_predict(queries, bank, bank_labels, 7, k, temperature), expected)


def test_the_nearer_neighbour_outvotes_two_far_ones():
    bank = to_bank(torch.tensor([[1., 0.], [0., 1.], [0., 1.]]))
    labels, query = torch.tensor([0, 1, 1]), to_bank(torch.tensor([[1., 0.1]]))
    assert knn_predict(query, bank, labels, 2, k=3, temperature=0.07).item() == 0
    assert knn_predict(query, bank, labels, 2, k=3, temperature=100.).item() == 1


def test_a_tiny_temperature_does_not_overflow():
    everything, labels = features(50, classes=3)
    nearest = knn_predict(everything, everything, labels, 3, k=1)
    assert torch.equal(knn_predict(everything, everything, labels, 3, k=10, temperature=1e-6), nearest)


@pytest.mark.parametrize('changes, says', [
    (dict(k=51), 'k=51 must lie between 1 and the 50 images'), (dict(temperature=0.), 'temperature=0.0')])
def test_errors(changes, says):
    everything, labels = features(50, classes=3)
    with pytest.raises(ValueError, match=says):
        knn_predict(everything, everything, labels, 3, **changes)
