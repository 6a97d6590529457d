"""Every module has a test module of its name, or CONTRIBUTING names the one that tests it."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dlm", "decoding", "finetune", "eval", "serve")
ROW = re.compile(r"^\| `([\w/]+\.py)` \| .+ \| (?:its own|`([\w/]+\.py)`) \|$", re.MULTILINE)
TESTED_IN = dict(ROW.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8")))
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_in_the_tour_with_the_test_that_tests_it(module):
    assert module in TESTED_IN, f"add a row for {module} to the tables at the end of CONTRIBUTING.md"
    path = Path(module)
    test = TESTED_IN[module] or f"tests/{path.parent.as_posix()}/test_{path.name}"
    assert (ROOT / test).is_file(), (
        f"{module}: there is no {test}; write it, or name another in CONTRIBUTING.md"
    )


def test_the_tour_names_no_module_that_is_gone():
    assert sorted(set(TESTED_IN) - set(MODULES)) == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_of_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("package", ["dlm", "decoding"])
def test_the_public_names_are_listed(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, name) for name in module.__all__)
