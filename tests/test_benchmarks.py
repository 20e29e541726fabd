"""What the benchmarks compare with does the same work."""
from __future__ import annotations

import timm
import torch

from benchmarks.__main__ import page
from benchmarks.measure import Config, Section, alternate
from benchmarks.references import BareEncoder, DroppedPatches, StraightforwardTokenizer


def test_straightforward_tokenizer_gives_the_tokens():
    # The position map is a channel of the window: it needs as many nodes.
    embed = timm.create_model('spot_vit_pico_patch8_64', depth=1, pos_nodes=8).patch_embed
    images, positions = torch.randn(2, 3, 48, 64), torch.rand(2, 9, 2) * 1.4 - 0.2
    tokens = StraightforwardTokenizer(embed)(images, positions)
    torch.testing.assert_close(tokens, embed(images, positions), rtol=0, atol=1e-4)


def test_bare_encoder_gives_the_logits():
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1).eval()
    images, positions = torch.randn(2, 3, 64, 64), torch.rand(2, 9, 2)
    logits = BareEncoder(model)(model.patch_embed(images, positions))
    torch.testing.assert_close(logits, model(images, positions))


def test_all_patches_but_none_dropped_are_the_vit():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(DroppedPatches(vit, 16)(images), vit(images), rtol=1e-4, atol=1e-5)
    assert DroppedPatches(vit, 4)(images).shape == (2, 1000)


def test_calls_are_timed_in_turn_and_ratios_stand_beside_their_bars():
    order = []
    times = alternate({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, Config(seconds=0))
    rounds = [''.join(order[i:i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 7 and set(rounds) == {'ab', 'ba'}  # the first warms up
    assert all(t >= 0 for t in times.values())
    section = Section()
    section.judge('speed', 3.9, at_least=4)
    section.judge('memory', 12, at_most=30, unit=' MB')
    assert section.judged == [
        ('speed', 'at least 4', '3.90', 'missed'), ('memory', 'at most 30 MB', '12.00 MB', 'held')]
    section.table('Times', 'tokens', 'ms').append(['25', '1.0'])
    text = page({'tokenizer': dict(vars(section), machine='a machine', date='2026-11-21')})
    assert '| speed | at least 4 | 3.90 | missed | 2026-11-21 |' in text
    assert '**Times**\n\n| tokens | ms |\n| --- | --- |\n| 25 | 1.0 |\n' in text
