"""Rules of the source tree that import contracts cannot express, checked on the files themselves."""

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("gptdist", "launch", "data_tools", "benchmarks", "slurm")
LAUNCHER_VARIABLES = re.compile(
    r"(SLURM|OMPI|PMI|PMIX|TORCHELASTIC)_\w*|RANK|LOCAL_RANK|GROUP_RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
UNSAFE = re.compile(r"pickle|cPickle|dill|marshal|shelve|torch\.load|yaml\.(load|load_all|unsafe_load|full_load)")


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def launcher_variables_read(tree: ast.Module) -> list[str]:
    """Names of launcher variables that stand in the code as strings, but for those that it sets."""
    set_here = {
        node.slice
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in set_here
        and LAUNCHER_VARIABLES.fullmatch(node.value)
    ]


def unsafe_names(tree: ast.Module) -> list[str]:
    """What the code imports or calls that would run what a file tells it to."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
    return [name for name in found if UNSAFE.fullmatch(name)]


@pytest.mark.parametrize("path", source_files("gptdist"), ids=relative)
def test_the_library_reads_no_launchers_environment(path: Path) -> None:
    assert not re.search(r"SLURM_|OMPI_", path.read_text(encoding="utf-8"))
    assert launcher_variables_read(parse(path)) == []


def test_reading_a_launchers_environment_would_be_seen() -> None:
    reads = 'os.environ["RANK"]\nos.getenv("MASTER_ADDR")\nos.environ.get("SLURM_PROCID", "0")'
    assert launcher_variables_read(ast.parse(reads)) == ["RANK", "MASTER_ADDR", "SLURM_PROCID"]
    assert launcher_variables_read(ast.parse('os.environ["LOCAL_RANK"] = "0"')) == []


@pytest.mark.parametrize("path", source_files(*CODE, "tests"), ids=relative)
def test_every_file_says_what_it_knows(path: Path) -> None:
    docstring = ast.get_docstring(parse(path))
    assert docstring and docstring.splitlines()[0].rstrip().endswith((".", ":", "?")), "no module docstring"


@pytest.mark.parametrize("path", source_files("gptdist", "launch", "data_tools"), ids=relative)
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    assert unsafe_names(parse(path)) == []


def test_unsafe_readers_would_be_seen() -> None:
    assert unsafe_names(ast.parse("import pickle\nfrom torch import load\ntorch.load(f)\nyaml.load(f)")) == [
        "pickle",
        "torch.load",
        "torch.load",
        "yaml.load",
    ]
    assert unsafe_names(ast.parse("yaml.safe_load(f)\njson.load(f)")) == []


def test_the_readme_has_a_line_for_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w./]+\.py)` \|", readme, re.MULTILINE)
    files = [relative(path) for path in source_files(*CODE)]
    assert len(listed) == len(set(listed))
    assert sorted(set(files) - set(listed)) == [], "files without a line in README.md"
    assert sorted(set(listed) - set(files)) == [], "lines in README.md without a file"


def test_paths_in_the_documents_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    folders = "|".join((*CODE, "configs", "docs", "tests"))
    for document in documents:
        for name in re.findall(rf"`((?:{folders})/[\w./*-]+)`", document.read_text(encoding="utf-8")):
            assert list(ROOT.glob(name)), f"{document.name} names {name}, which is not there"


def test_commands_in_the_readme_are_understood() -> None:
    from launch.arguments.command import parse_arguments

    commands = re.findall(r"^    (?:.* )?gptdist (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        words = [word.strip('"') for word in command.split()]
        parsed = parse_arguments(words)
        if parsed.command == "train":
            assert (ROOT / parsed.config).is_file()


def test_the_command_starts_without_torch() -> None:
    script = (
        "import sys, launch.cli\nheavy = {'torch', 'deepspeed', 'megatron', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'launch.cli imports {sorted(heavy)}' if heavy else 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    ignored = pytestconfig.getini("norecursedirs")
    folders = [path.name for path in (ROOT / "tests").iterdir() if path.is_dir()]
    assert "dist" in folders
    assert not [name for name in folders for pattern in ignored if fnmatch(name, pattern) and name[0] not in "._"]
