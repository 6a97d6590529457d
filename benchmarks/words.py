"""Words of the code: function words among local names, doubled names, docstrings, long functions, sentences.

    python -m benchmarks.words [folder …]

A local name is a parameter of a function or a variable that it assigns, counted once a function. Function
words (`WORDS`) say nothing about the thing that is named. A name counts as doubled when two modules of a
package tree define it at top level; methods are not at top level, and names that every command, benchmark or
stage defines by convention (`CONVENTIONS`) do not count.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dlm", "decoding", "finetune", "eval", "serve")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
FUNCTION_LINES, FILE_LINES = 40, 450

_TEXT = """
    about after again all also an another any as asked at be been before behind being both but by
    can chosen come comes did do does each either else enough even ever every few for found from get
    gets given gone got had has have here how into is it its just kept known less made many may
    meant might mine more most much must my neither no nor not now of off on once only or other
    others ought our over own put puts quite rest said same seen several shall should so some
    something still such taken than that the theirs them then there these they thing things this
    those though thus till told too took until up upon us usual very was we well went were what when
    whether which while who whoever whole whom whose why will with within without would yet you your
"""
WORDS = frozenset(_TEXT.split())
"""Words that name nothing. Not among them: `where`, NumPy's name for a mask, and `left`, a side."""

CONVENTIONS = frozenset({"COMMAND", "main", "run", "ROOT", "MASK", "__getattr__", "__all__"})
"""Top-level names that mean the same in every module that has them."""

OPENINGS = ("What", "How", "Whether", "Where")


@dataclass
class Report:
    """Counts over a set of modules."""

    names: Counter[str] = field(default_factory=Counter)
    """How many functions have a local name."""
    modules_of: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Modules that define a name at top level."""
    openings: list[str] = field(default_factory=list)
    """Docstrings that begin with a question word."""
    long_functions: list[str] = field(default_factory=list)
    long_files: list[str] = field(default_factory=list)

    @property
    def function_words(self) -> Counter[str]:
        """Function words among the local names."""
        return Counter({name: count for name, count in self.names.items() if name.strip("_") in WORDS})

    @property
    def doubled(self) -> dict[str, list[str]]:
        """Top-level names that several modules define."""
        return {name: where for name, where in sorted(self.modules_of.items()) if len(where) > 1}


def local_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Parameters of a function, and variables that it assigns; those of functions inside it are theirs."""
    arguments = function.args
    everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    everything += [x for x in (arguments.vararg, arguments.kwarg) if x is not None]
    names = {argument.arg for argument in everything} - {"self", "cls"}
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending += ast.iter_child_nodes(node)
    return names - {"_"}


def read(paths: list[Path]) -> Report:
    """Count the words of modules."""
    report = Report()
    for path in paths:
        source = path.read_text("utf-8")
        tree, place = ast.parse(source), path.relative_to(ROOT).as_posix()
        if source.count("\n") > FILE_LINES:
            report.long_files.append(f"{place}: {source.count(chr(10))}")
        for name in sorted(set(_top_level(tree)) - CONVENTIONS):
            report.modules_of[name].append(place)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                continue
            name = getattr(node, "name", "(module)")
            if (ast.get_docstring(node) or "").startswith(OPENINGS):
                report.openings.append(f"{place}: {name}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                report.names.update(local_names(node))
                if (lines := _lines(node)) > FUNCTION_LINES:
                    report.long_functions.append(f"{place}: {name}, {lines}")
    return report


def _top_level(tree: ast.Module) -> Iterator[str]:
    """Names of classes, functions and constants of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its first line to its last, its docstring not counted."""
    total = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def sentence_lengths(text: str) -> list[int]:
    """Words of each sentence of a page; code, tables, headings and addresses are not sentences."""
    text = re.sub(r"```.*?```|<[^>]+>", " ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||#|    |!!!|:::)", line)]
        joined = " ".join(re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\0", line) for line in lines)
        paragraphs += joined.split("\0")
    sentences = [s for paragraph in paragraphs for s in re.split(r"(?<=[.!?])\s+", paragraph)]
    return [len(words) for s in sentences if len(words := re.findall(r"\w[\w'’.,/-]*", s)) > 2]


def print_package(name: str, report: Report, verbose: bool) -> None:
    """One line of the table, and with `verbose` every case."""
    total, words = report.names.total(), report.function_words
    share = 100 * words.total() / max(total, 1)
    counts = (len(x) for x in (report.doubled, report.openings, report.long_functions, report.long_files))
    print(f"| {name} | {total} | {share:.2f} % | " + " | ".join(map(str, counts)) + " |")
    if verbose:
        print("    function words:", ", ".join(f"{word} {count}" for word, count in words.most_common()))
        for doubled, places in report.doubled.items():
            print(f"    {doubled}: {', '.join(places)}")
        for line in (*report.openings, *report.long_functions, *report.long_files):
            print(f"    {line}")


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    options.add_argument("folders", nargs="*", default=[p for p in PACKAGES if (ROOT / p).is_dir()])
    options.add_argument("--verbose", action="store_true", help="list every case")
    chosen = options.parse_args()
    print("| package | local names | function words | doubled | What/How… | functions | files |")
    print("|---|---|---|---|---|---|---|")
    modules = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in chosen.folders}
    for folder, paths in modules.items():
        print_package(folder, read(paths), chosen.verbose)
    print_package("all", read([path for paths in modules.values() for path in paths]), chosen.verbose)
    print("\n| page | sentences | median words | longest |\n|---|---|---|---|")
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        lengths = sentence_lengths(path.read_text("utf-8"))
        median = statistics.median(lengths) if lengths else 0
        print(f"| {path.relative_to(ROOT)} | {len(lengths)} | {median:.0f} | {max(lengths, default=0)} |")


if __name__ == "__main__":
    main()
