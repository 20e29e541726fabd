"""What surrounds the package says the same as the package."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

import timm_spot

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text('utf-8')


def test_the_version_is_everywhere_the_same():
    assert re.search(r'^version: (.+)$', read('CITATION.cff'), re.MULTILINE)[1] == timm_spot.__version__
    assert re.search(r'^## (\S+)', read('CHANGELOG.md'), re.MULTILINE)[1] == timm_spot.__version__


def test_pythons_that_are_claimed_are_tested():
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read('pyproject.toml'))
    tested = re.search(r'python: \[(.+)\]', read('.github/workflows/tests.yml'))[1]
    assert claimed == re.findall(r'3\.\d+', tested)
    assert re.search(r'requires-python = ">=(.+)"', read('pyproject.toml'))[1] == claimed[0]


@pytest.mark.parametrize('name', ['tests', 'docs', 'publish'])
def test_workflows_call_targets_that_exist(name):
    targets = re.findall(r'\bmake (\S+)', read(f'.github/workflows/{name}.yml'))
    known = re.findall(r'^([\w./-]+):', read('Makefile'), re.MULTILINE)
    assert targets and set(targets) <= set(known)


def test_project_urls_have_names_that_an_index_takes():
    section = read('pyproject.toml').split('[project.urls]')[1].split('\n[')[0]
    names = re.findall(r'^"?([^"=\n]+?)"? = "https://', section, re.MULTILINE)
    assert names and all(len(name) <= 32 and ',' not in name for name in names)


def test_the_help_names_every_target():
    targets = re.findall(r'^([a-z-]+):.*##', read('Makefile'), re.MULTILINE)
    assert set(targets) == set(re.search(r'\.PHONY: (.+)', read('Makefile'))[1].split())
