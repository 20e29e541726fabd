from __future__ import annotations

import dataclasses
import re

import pytest

from timm_spot.tasks.evaluation.metrics import Estimate
from timm_spot.tasks.evaluation.report.plots import plot, to_svg
from timm_spot.tasks.evaluation.report.tables import BY_BUDGET
from timm_spot.tasks.evaluation.rows import Result, Row


def result(sampler, n_tokens, top1, speed=10.):
    row = Row('sampler', 'digits', 'f6ce', 'validation', 'pico', '7fc4', sampler, n_tokens)
    return Result(row, 30, 0, 0.021, {'top1': Estimate(top1, 1.5, None)}, speed)


def test_points_and_errors_are_those_of_the_results():
    figure = plot([result('grid', 25, 60.), result('grid', 9, 50.), result('sobol', 9, 55.)], BY_BUDGET, 'n_tokens')
    grid, sobol = (container.lines[0] for container in figure.axes[0].containers)
    assert grid.get_xydata().tolist() == [[9., 50.], [25., 60.]] and sobol.get_xydata().tolist() == [[9., 55.]]
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    assert [bar.tolist() for bar in bars] == [[[9., 48.5], [9., 51.5]], [[25., 58.5], [25., 61.5]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['grid', 'sobol']


def test_tokens_and_speeds_are_ratios_and_multiply_adds_are_not():
    results = [result('grid', 25, 60.), result('grid', 9, 50.)]
    scales = {x: plot(results, BY_BUDGET, x).axes[0].get_xscale() for x in ('n_tokens', 'images_per_s', 'gflops')}
    assert scales == dict(n_tokens='log', images_per_s='log', gflops='linear')


@pytest.mark.parametrize('name', ['$a^$', '$', 'a$b$c', '_under', '$\\frac{', 'a_b^c', '{', '\\$5'])
def test_any_label_can_be_drawn(name):
    figure = plot([result(name, 9, 50.)], BY_BUDGET, 'n_tokens')
    drawn = to_svg(figure)
    assert drawn.startswith('<svg') and drawn.rstrip().endswith('</svg>')
    assert figure.legends[0].get_texts()[0].get_text().strip() == name


def test_what_has_no_speed_has_no_plot_of_it():
    lost = dataclasses.replace(result('grid', 9, 50.), images_per_s=None)
    assert plot([lost], BY_BUDGET, 'images_per_s') is None
    figure = plot([lost, result('sobol', 9, 55.)], BY_BUDGET, 'images_per_s')
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['sobol']


def test_a_drawing_has_the_size_of_its_page():
    drawn = to_svg(plot([result('grid', 9, 50.)], BY_BUDGET, 'n_tokens'))
    assert not re.search(r'<svg[^>]* (width|height)=', drawn)


def test_at_one_budget_every_placement_has_a_line_of_its_own_the_best_on_top():
    figure = plot([result('grid', 9, 50.), result('$a^$', 9, 55.), result('_b', 9, 40.)], BY_BUDGET, 'n_tokens')
    ax, = figure.axes
    assert ax.containers[0].lines[0].get_xydata().tolist() == [[40., 0.], [50., 1.], [55., 2.]]
    assert [text.get_text() for text in ax.get_yticklabels()] == ['_b', 'grid', '$a^$']
    assert ax.get_xlabel().endswith(', 9 tokens') and to_svg(figure).startswith('<svg')
    bars = ax.containers[0].lines[2][0].get_segments()
    assert bars[0].tolist() == [[38.5, 0.], [41.5, 0.]]
