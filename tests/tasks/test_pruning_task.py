from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import timm
import torch

import timm_spot
from timm_spot.tasks.pruning_task import RelevanceTask, logit_loss, ratio_loss, token_loss


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return timm.create_model('vit_tiny_patch16_224', img_size=64, depth=4, num_classes=3).eval()


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 0])


def test_ratio_loss_by_hand():
    masks = torch.tensor([[[1., 1., 0., 0.], [1., 0., 0., 0.]], [[1., 1., 1., 1.], [1., 0., 0., 0.]]])
    # Targets 0.5 and 0.25: the first image meets both, the second is 0.5 above the first.
    assert ratio_loss(masks, 0.5).item() == pytest.approx(0.25 / 4)


def test_logit_loss_by_hand():
    dense = torch.tensor([[math.log(3), 0.]])
    assert logit_loss(dense + 5, dense).item() == pytest.approx(0, abs=1e-6)
    assert logit_loss(torch.zeros(1, 2), dense).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_token_loss_counts_survivors_only_and_no_scale():
    dense = torch.tensor([[[1., -1.], [1., -1.], [1., -1.]]])
    tokens = torch.tensor([[[2., -2.], [-1., 1.], [-1., 1.]]])
    assert token_loss(tokens, dense, torch.tensor([[1., 0., 0.]])).item() == pytest.approx(0, abs=1e-4)
    assert token_loss(tokens, dense, torch.tensor([[1., 1., 0.]])).item() == pytest.approx(2, rel=1e-3)


def test_loss_is_the_weighted_sum(dense):
    weights = dict(ratio_weight=3., logit_weight=0.25, token_weight=0.125)
    task = RelevanceTask(timm_spot.sparsify(dense), dense, verbose=False, **weights).train()
    result = task(*batch())
    expected = (
        result['task_loss'] + 3 * result['ratio_loss'] + 0.25 * result['logit_loss'] + 0.125 * result['token_loss'])
    assert result['loss'].item() == pytest.approx(expected.item())
    assert result['output'].shape == (4, 3)


def test_predictors_learn_while_a_frozen_backbone_and_the_teacher_stay(dense):
    torch.manual_seed(0)
    model = timm_spot.sparsify(dense, keep_rate=0.5)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith('predictors.'))
    task = RelevanceTask(model, dense, verbose=False).train()
    assert model.training and not task.teacher.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = {name: value.clone() for name, value in dense.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        task(*batch())['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith('predictors.')
    assert all(torch.equal(value, teacher[name]) for name, value in dense.state_dict().items())


def test_the_ratio_follows_its_target():
    # Tokens alike, a class that needs none of them: only the ratio counts.
    torch.manual_seed(0)
    dense = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2, embed_dim=48, num_classes=3).eval()
    model = timm_spot.sparsify(dense, keep_rate=0.5, stages=(1,))
    torch.nn.init.constant_(model.predictors[0].head.bias, 3.)  # keeps 95 %
    task = RelevanceTask(model, dense, logit_weight=0., token_weight=0., ratio_weight=50., verbose=False).train()
    optimizer = torch.optim.Adam(model.predictors.parameters(), lr=0.05)
    images, targets = batch()
    for _ in range(40):
        task(images, targets)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    shares = torch.stack([model.forward_masked(images).masks.mean() for _ in range(20)])
    assert abs(shares.mean().item() - 0.5) < 0.1


def test_keep_rates_are_drawn_from_the_range(dense, monkeypatch):
    model = timm_spot.sparsify(dense)
    drawn = []
    forward = model.forward_masked
    monkeypatch.setattr(
        model, 'forward_masked', lambda x, keep_rate: drawn.append(keep_rate) or forward(x, keep_rate=keep_rate))
    task = RelevanceTask(model, dense, keep_rate=(0.4, 0.6), verbose=False)
    torch.manual_seed(0)
    for _ in range(6):
        task(*batch())
    assert len(set(drawn)) == 6 and 0.4 <= min(drawn) < max(drawn) <= 0.6


def test_student_and_teacher_see_the_same_placement(monkeypatch):
    dense = timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, sampler='uniform').eval()
    task = RelevanceTask(timm_spot.sparsify(dense), dense, verbose=False).train()
    seen = []
    embed = type(dense)._embed
    monkeypatch.setattr(
        type(dense), '_embed', lambda self, x, positions=None: seen.append(positions) or embed(self, x, positions))
    task(*batch())
    assert len(seen) == 2 and seen[0].shape == (4, 9, 2) and torch.equal(*seen)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_gradients_pass_through_distributed_data_parallel(dense, tmp_path):
    gradients = []
    for distributed in (False, True):
        torch.manual_seed(1)
        task = RelevanceTask(timm_spot.sparsify(dense), dense, verbose=False).train()
        if distributed:
            torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
            task.prepare_distributed()
        try:
            torch.manual_seed(2)
            task(*batch())['loss'].backward()
        finally:
            if distributed:
                torch.distributed.destroy_process_group()
        gradients.append({name: p.grad for name, p in task.trainable_module.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


TWO_PROCESSES = '''
import sys
import timm, torch, timm_spot
rank, store, keep_rate, backbone = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
model = timm_spot.sparsify(
    backbone, keep_rate, scorer=sys.argv[5], r=2, img_size=64, depth=4, num_classes=3).train()
torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
try:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.head.weight.clone()
    for step in range(3):
        if step == 2:
            model.set_keep_rate(1.)  # in the middle of training, as a schedule does
        torch.manual_seed(10 * step + rank)
        wrapped(torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.head.weight, before)
    total = sum(p.detach().double().sum() for p in model.parameters())
    both = [torch.zeros_like(total) for _ in range(2)]
    torch.distributed.all_gather(both, total)
    assert torch.equal(*both), both
    print('trained', flush=True)
finally:
    torch.distributed.destroy_process_group()
'''


@pytest.mark.parametrize('keep_rate, backbone, scorer', [
    (1., 'vit_tiny_patch16_224', 'relevance'), (0.5, 'vit_tiny_patch16_224', 'relevance'),
    (1., 'spot_vit_pico_patch8_64', 'relevance'), (0.7, 'vit_tiny_patch16_224', 'merge')])
def test_two_processes_train_without_unused_parameters(keep_rate, backbone, scorer, tmp_path):
    """At keep rate 1 the predictors have no part in the logits."""
    command = [sys.executable, '-c', TWO_PROCESSES]
    arguments = [str(tmp_path / 'store'), str(keep_rate), backbone, scorer]
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)]
    try:
        for process in processes:
            said, errors = process.communicate(timeout=200)
            assert said == 'trained\n', errors  # not by the exit status: gloo's threads now and then abort at the end
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_keep_rates_drawn_do_not_follow_the_default_dtype(dense, dtype, monkeypatch):
    task = RelevanceTask(timm_spot.sparsify(dense), dense, keep_rate=(0.4, 0.6), verbose=False)
    drawn = []

    def stop(images, keep_rate):
        drawn.append(keep_rate)
        raise StopIteration

    monkeypatch.setattr(task.masked, 'forward', stop)
    default = torch.get_default_dtype()
    for used in (default, dtype):
        torch.manual_seed(0)
        torch.set_default_dtype(used)
        try:
            with pytest.raises(StopIteration):
                task(*batch())
        finally:
            torch.set_default_dtype(default)
    assert drawn[0] == drawn[1] and 0.4 <= drawn[0] <= 0.6


def test_wrong_arguments(dense):
    with pytest.raises(ValueError, match='student_model has no predictors'):
        RelevanceTask(timm_spot.sparsify(dense, scorer='norm'), dense, verbose=False)
    with pytest.raises(ValueError, match='student_model has no predictors'):
        RelevanceTask(dense, dense, verbose=False)
    for keep_rate in (1.0, (0.5, 1.0), (0.9, 0.5), (0., 0.5)):
        with pytest.raises(ValueError, match='keep_rate='):
            RelevanceTask(timm_spot.sparsify(dense), dense, keep_rate=keep_rate, verbose=False)
