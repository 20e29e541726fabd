"""Training keywords: budgets and priors of training, frozen parameters, what timm's train.py asks of a model."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import timm
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm.task import ClassificationTask, LogitDistillationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch._dynamo.testing import CompileCounterWithBackend

from timm_spot.ops.samplers import check_budgets

PICO = 'spot_vit_pico_patch8_64'


def create(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(PICO, **{**SMALL, **kwargs})


def drawn_budgets(model, count):
    images = torch.zeros(1, 3, 64, 64)
    return [model.place(images).shape[1] for _ in range(count)]


def test_random_budgets_in_training_the_largest_in_evaluation():
    model = create(n_tokens=(9, 64), sampler='uniform', eval_sampler='isotropic')
    budgets = drawn_budgets(model.train(), 2000)
    assert set(budgets) == set(range(9, 65))
    # Log-uniform: half of the batches lie below the geometric mean of the ends, 24.2.
    assert 0.46 < sum(n <= 23 for n in budgets) / len(budgets) < 0.54
    images = torch.randn(2, 3, 64, 64)
    assert model.eval().n_tokens == 64
    assert torch.equal(model.place(images)[0], create(sampler='isotropic', n_tokens=64).eval().place(images)[0])


def test_budgets_follow_the_seed_and_not_the_process_s_random_state():
    torch.manual_seed(1)
    first = drawn_budgets(create(n_tokens=(9, 64), sampler='uniform').train(), 8)
    torch.manual_seed(2)
    assert drawn_budgets(create(n_tokens=(9, 64), sampler='uniform').train(), 8) == first
    assert drawn_budgets(create(n_tokens=(9, 64), sampler='uniform', seed=1).train(), 8) != first


def test_evaluation_between_batches_changes_no_budget():
    model = create(n_tokens=(9, 64)).train()
    expected = drawn_budgets(create(n_tokens=(9, 64)).train(), 4)
    first = drawn_budgets(model, 2)
    assert drawn_budgets(model.eval(), 3) == [64] * 3
    assert first + drawn_budgets(model.train(), 2) == expected


@pytest.mark.parametrize('keywords, train, evaluation', [
    (dict(n_tokens=25), 25, 25),
    (dict(n_tokens=25, eval_n_tokens=49), 25, 49),
    (dict(eval_n_tokens=16), 64, 16),
    (dict(n_tokens=(16, 16)), 16, 16),
    (dict(n_tokens=[9, 9], eval_n_tokens=4), 9, 4),
])
def test_budget_of_each_mode(keywords, train, evaluation):
    model = create(**keywords)
    assert drawn_budgets(model.train(), 1) == [train]
    assert drawn_budgets(model.eval(), 1) == [evaluation] and model.n_tokens == evaluation


@pytest.mark.parametrize('n_tokens, error, says', [
    ((64, 9), ValueError, r'n_tokens=\(64, 9\) is out of order.*\(9, 64\)'),
    ((0, 9), ValueError, 'n_tokens=0 is not a budget'),
    ((9, 25, 64), TypeError, 'one budget or two'),
    ((9, 25.0), TypeError, 'must be an int, got 25.0'),
    (('a', 'b'), TypeError, "must be an int, got 'a'"),
    ('9-64', TypeError, "must be an int, got '9-64'"),
])
def test_budgets_that_are_none(n_tokens, error, says):
    with pytest.raises(error, match=says):
        create(n_tokens=n_tokens)


@given(low=st.integers(1, 300), extra=st.integers(0, 300))
def test_check_budgets(low, extra):
    assert check_budgets((low, low + extra)) == (low, low + extra)
    assert check_budgets(low) == (low, low)


def test_a_saved_model_keeps_both_budgets(tmp_path):
    model = create(n_tokens=(9, 64), sampler='uniform', eval_sampler='isotropic', eval_n_tokens=25)
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert drawn_budgets(loaded.train(), 4) == drawn_budgets(model.train(), 4)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    # A budget given now outranks the evaluation budget that was saved.
    assert timm.create_model(f'local-dir:{tmp_path}', n_tokens=36).n_tokens == 36
    model.set_placement(n_tokens=16)
    timm.models.save_for_hf(model, tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}').n_tokens == model.n_tokens == 16


def test_no_map_of_a_random_budget():
    model = create(n_tokens=(9, 64)).train()
    with pytest.raises(ValueError, match='draws a budget for each training batch'):
        model.forward_intermediates(torch.randn(1, 3, 64, 64))
    model = create(n_tokens=25, sampler='uniform', eval_sampler='isotropic').train()
    with pytest.raises(ValueError, match="sampler 'uniform' places 25 tokens on no lattice"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64))
    model.eval().forward_intermediates(torch.randn(1, 3, 64, 64))


@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor')  # torch's, at the break before the placement
def test_random_budgets_compile():
    torch._dynamo.reset()
    model = create(n_tokens=(9, 64), depth=1).train()
    plain = create(n_tokens=(9, 64), depth=1).train()
    backend = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=backend)
    images = torch.randn(2, 3, 64, 64)
    graphs = []
    for _ in range(8):
        torch.testing.assert_close(compiled(images), plain(images))
        graphs.append(backend.frame_count)
    assert graphs[1:] == [graphs[1]] * 7  # once for the first budget, once for all others


def groups(model, **kwargs):
    """{parameter: (learning rate's scale, weight decay)}"""
    names = {id(p): name for name, p in model.named_parameters()}
    found = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), **kwargs)
    return {names[id(p)]: (group['lr_scale'], group['weight_decay']) for group in found for p in group['params']}


def test_layer_decay_groups_are_those_of_timm_s_vit():
    keywords = dict(weight_decay=0.05, layer_decay=0.75)
    ours = groups(timm.create_model('spot_vit_base_patch16_in21k', device='meta'), **keywords)
    vit = groups(timm.create_model('vit_base_patch16_224', init_values=1.0, device='meta'), **keywords)
    stem, decay = vit['patch_embed.proj.weight']
    assert stem == pytest.approx(0.75 ** 13) and decay == 0.05
    assert ours.pop('patch_embed.pos_proj.weight') == (stem, decay)
    assert vit.pop('pos_embed') == (stem, 0.)
    assert ours == vit
    assert ours['patch_embed.proj.bias'] == ours['cls_token'] == (stem, 0.)
    scales = [ours[f'blocks.{i}.mlp.fc1.weight'][0] for i in range(12)]
    assert scales == sorted(scales) and ours['head.weight'][0] == 1.


def test_a_placer_and_its_model_are_trained_together():
    """As timm's train.py does: a task, layer decay, budgets that are drawn."""
    model = create(placer='density', n_tokens=(4, 16)).train()
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, layer_decay=0.5)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    even = create(n_tokens=16).eval().place(images)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(3):  # behind a last layer of zeros there is no gradient yet
        optimizer.zero_grad()
        task(images, labels)['loss'].backward()
        optimizer.step()
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    moved = (model.eval().place(images) - even).norm(dim=-1)
    assert moved.max() > 1e-3 and model.place(images).unique(dim=0).shape[0] == 4  # each image in its own way


def test_nan_stops_training():
    model = create().train()
    with pytest.raises(RuntimeError, match='NaN in the logits'):
        model(torch.full((1, 3, 64, 64), math.nan))
    model.eval()(torch.full((1, 3, 64, 64), math.nan))


def test_distillation_from_the_full_budget():
    student, teacher = create(n_tokens=(4, 9), sampler='uniform'), create()
    task = LogitDistillationTask(student, teacher, torch.nn.CrossEntropyLoss(), verbose=False).train()
    result = task(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
    result['loss'].backward()
    assert task.teacher.model.n_tokens == 64 and not teacher.training
    assert student.patch_embed.pos_proj.weight.grad.abs().sum() > 0
    assert result['kd_loss'] > 0


STEPS = """
import json, sys, timm, torch, timm_spot
from timm.task import ClassificationTask
import torch.distributed as dist
rank, world = 0, 1
if len(sys.argv) > 1:
    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = timm.create_model('spot_vit_pico_patch8_64', embed_dim=64, depth=2, num_heads=4, n_tokens=(4, 16))
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
if world > 1:
    task.prepare_distributed()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank + 5)  # as timm's script does
losses = []
for step in range(4):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 64, 64, generator=generator)[rank::world]
    labels = torch.randint(10, (8,), generator=generator)[rank::world]
    loss = task(images, labels)['loss']
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    losses.append(loss.item() / world)
if rank == 0:
    print(json.dumps(losses), flush=True)
if world > 1:
    dist.destroy_process_group()
"""


def test_one_and_two_processes_give_the_same_losses(tmp_path):
    script = tmp_path / 'steps.py'
    script.write_text(STEPS)
    environment = dict(os.environ, OMP_NUM_THREADS='1')

    def losses(*command):
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    two = losses('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script), 'distributed')
    assert losses(str(script)) == pytest.approx(two, abs=1e-4)


def test_resumes_as_timm_s_script_does(tmp_path):
    def step(task, optimizer):
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        task(images, torch.tensor([1, 2, 3, 4]))['loss'].backward()
        optimizer.step()

    def start():
        task = ClassificationTask(create(n_tokens=(4, 16), num_classes=10).train(), verbose=False)
        return task, create_optimizer_v2(task.trainable_module, 'adamw', lr=1e-3, layer_decay=0.75)

    task, optimizer = start()
    step(task, optimizer)
    saver = CheckpointSaver(task.trainable_module, optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, metric=1.)
    other, other_optimizer = start()
    assert resume_task_checkpoint(other, str(tmp_path / 'last.pth.tar'), optimizer=other_optimizer, log_info=False) == 1
    for key, value in task.trainable_module.state_dict().items():
        assert torch.equal(other.trainable_module.state_dict()[key], value)
    assert drawn_budgets(other.trainable_module, 3) == drawn_budgets(start()[0].trainable_module, 3)
