"""README.md, CONTRIBUTING.md and docs/: commands parse, flags and files exist, tables hold."""

import ast
import dataclasses
import importlib
import itertools
import json
import re
import shlex

import pytest
from conftest import ROOT

from rlhf.runs.cli import parse

SCRIPTS = ("sft_train", "reward_train", "ppo_train", "compare_outputs")
MODULES = (*SCRIPTS, "rlhf.chat", "rlhf.export", "feedback.vote")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [page for page in DOCS if page.name != "results.md"]  # which records old commands
GONE = {"--per-device-train-batch-size", "--gradient-accumulation-steps"}  # CHANGELOG.md says so
OTHERS = {  # flags of other programs
    *("--config_file", "--num_machines", "--num_processes", "--machine_rank"),
    *("--main_process_ip", "--main_process_port", "--nproc-per-node", "--help"),
    *("--outfile", "--outtype", "--jinja", "--private"),
    *("--repo-type", "--include", "--local-dir", "--random-source", "--allow-cpu", "--cpu"),
}


def text_of(page) -> str:
    return re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)


def code_of(page) -> list[str]:
    """The lines of the code blocks, continued ones as one, and the inline code."""
    text = text_of(page)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return lines + re.findall(r"`([^`\n]+)`", outside)


def load(name: str):
    if name == "feedback.vote":
        pytest.importorskip("gradio")
    return importlib.import_module(name)


def commands(page) -> list[tuple[str, list[str]]]:
    """(module, arguments) of each command that starts one of ours, with or without a launcher."""
    found = []
    for line in code_of(page):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of a program, or of a template
            continue
        if not words or not re.search(r"python3?$|^accelerate$|^ACCELERATE_USE_CPU=", words[0]):
            continue
        for at, word in enumerate(words):
            name = word.removesuffix(".py")
            if name in MODULES and (word.endswith(".py") or words[at - 1] == "-m"):
                found.append((name, words[at + 1 :]))
    return found


ALL_COMMANDS = [(page.name, *command) for page in PAGES for command in commands(page)]


def test_the_pages_start_every_script():
    assert {name for _, name, _ in ALL_COMMANDS} == set(MODULES)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (name, arguments)
        for name, arguments in {(name, tuple(args)): None for _, name, args in ALL_COMMANDS}
        if not {"--help", "..."} & set(arguments)
    ],
)
def test_commands_parse(name, arguments):
    module = load(name)
    parse(module.Config, getattr(module, "PRESETS", {}), module.__doc__, list(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    fields = {field.name for name in MODULES for field in dataclasses.fields(load(name).Config)}
    known = {f"--{name.replace('_', '-')}" for name in fields}
    known |= {f"--no-{flag[2:]}" for flag in known} | OTHERS
    known |= GONE if page.name == "CHANGELOG.md" else set()
    named = {
        flag
        for line in code_of(page)
        for flag in re.findall(r"(?<![\w.-])--[a-z][\w-]*", line.partition(" # ")[0])
    }
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_targets_and_links_exist(page):
    text = text_of(page)
    for path, anchor in re.findall(r"\]\((?!https?://)([\w./-]*)(?:#([\w-]+))?\)", text):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in code_of(page):
        make = re.match(r"make ([\w-]+)", line)
        assert not make or make.group(1) in targets, line
        for path in re.findall(r"\b(?:benchmarks|experiments|demo|configs|tests)/\w+\.\w+", line):
            assert (ROOT / path).exists(), path


def anchors_of(page) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_rows_can_be_read(page):
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", text_of(page), re.M | re.S):
        if kind == "python":
            ast.parse(block)
        elif kind == "json":
            json.loads(block)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


def test_every_target_of_the_makefile_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    explained = re.findall(r"^# make ([\w-]+) ", makefile, re.M)
    phony = " ".join(re.findall(r"^\.PHONY: (.+)$", makefile, re.M)).split()
    assert sorted(explained) == sorted(phony)


def tables(page) -> list[list[list[str]]]:
    """Its tables, as rows of cells, the head first and without the rule below it."""
    found = []
    lines = text_of(page).splitlines()
    for is_row, group in itertools.groupby(lines, lambda line: line.startswith("|")):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in group]
        if is_row:
            found.append([rows[0], *rows[2:]])
    return found


def values_of(cell: str) -> list[str]:
    return [value.strip() for value in cell.split(",")] if cell else []


def same(written: str, value) -> bool:
    return written.strip("`") == value if isinstance(value, str) else float(written) == value


def test_the_table_of_ppo_has_its_defaults():
    module = importlib.import_module("ppo_train")
    (rows,) = (
        table for table in tables(ROOT / "docs" / "how-it-works.md") if table[0][0] == "flag of PPO"
    )
    for flags, defaults, demos, _ in rows[1:]:
        names = [flag.strip("`- ").replace("-", "_") for flag in flags.split(",")]
        demos = defaults if demos == "the same" else demos
        for written, config in ((defaults, module.Config()), (demos, module.PRESETS["demo"])):
            for name, number in zip(names, values_of(written), strict=True):
                assert same(number, getattr(config, name)), (name, number)


def test_the_table_of_all_phases_has_their_defaults():
    modules = [importlib.import_module(name) for name in SCRIPTS[:3]]
    (rows,) = (
        table for table in tables(ROOT / "docs" / "how-it-works.md") if table[0][0] == "flag"
    )
    for flags, *cells, demo in rows[1:]:
        names = [flag.strip("`- ").replace("-", "_") for flag in flags.split(",")]
        for module, cell in zip(modules, cells, strict=True):
            for name, number in zip(names, values_of(cell), strict=bool(cell)):
                assert same(number, getattr(module.Config(), name)), (name, number)
        if demo == "the same":
            continue
        having = [module for module, cell in zip(modules, cells, strict=True) if cell]
        for module, number in zip(having, values_of(demo), strict=True):
            assert same(number, getattr(module.PRESETS["demo"], names[0])), (names, number)
