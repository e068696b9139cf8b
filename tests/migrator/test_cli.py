"""The command group: what its help lists, what it imports, and how errors name options."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import migrator
from migrator.cli import group
from migrator.terminal import console
from plans.errors import UsageError

COMMANDS = Path(migrator.__file__).parent / "commands"
CALL = "import sys\nfrom migrator.cli import main\nsys.argv = ['migrator', *sys.argv[1:]]\ntry: main()\nfinally: "


def run(*arguments, code=CALL + "pass"):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["env"], ["reshard", "--help"], ["run", "--help"]])
def test_help_and_env_import_nothing_heavy(arguments):
    heavy = ("torch", "libcst", "transformers", "numpy", "rich")
    done = run(*arguments, code=CALL + f"print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["reshard", "--help"], ["run", "--help"]])
def test_the_help_starts_at_once(arguments):
    """What a start costs is what it imports: the standard library, click and some small modules of ours."""
    imported = run(*arguments, code=CALL + "print(*sys.modules, file=sys.stderr)").stderr.split()
    ours = [name for name in imported if name.partition(".")[0] in ("migrator", "plans", "codemods", "runtime")]
    assert (len(imported) < 300, len(ours) < 50) == (True, True), imported


def test_the_help_lists_every_command_once_with_a_whole_sentence():
    text = run("--help").stdout
    listed = re.findall(r"^  (\w+) +([A-Z].*)$", text.partition("--help  ")[2], re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(path.stem for path in COMMANDS.glob("[a-z]*.py"))
    assert not [line for _, line in listed if line.endswith("...")]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["Options", "Source", "Checkpoints", "Jobs", "Other"]


def test_the_version_is_that_of_the_distribution():
    version = importlib.metadata.version("plan-migrator")
    assert run("--version").stdout == f"migrator, version {version}\n"
    assert migrator.__version__ == version


def test_env_names_versions_and_the_platform():
    versions = json.loads(run("env", "--format", "json").stdout)
    assert list(versions)[:3] == ["migrator", "python", "platform"]
    assert versions["migrator"] == migrator.__version__
    assert versions["python"] == "{}.{}.{}".format(*sys.version_info)
    installed = {one.name.lower().replace("-", "_"): one.version for one in importlib.metadata.distributions()}
    for package in ("torch", "transformers", "libcst", "safetensors", "huggingface_hub", "numpy", "click", "rich"):
        assert versions[package] == installed.get(package)
    lines = run("env").stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        [name, text or "not installed"] for name, text in versions.items()
    ]


def test_env_says_what_is_not_installed(monkeypatch, capsys):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("migrator.commands.env.version", missing)
    group(["env"], standalone_mode=False)
    assert "torch            not installed\n" in capsys.readouterr().out
    group(["env", "--format", "json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["torch"] is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`tp=2` and `ep`", "--tp 2 and --ep"),
        ("`from_pattern` '{rank}'", "--from-pattern '{rank}'"),
        ("`optimizer=False`, `optimizer=True`, `optimizer`", "--no-optimizer, --optimizer, --optimizer"),
        ("`overwrite`, `max_memory=1`, `format=json`", "--overwrite, --max-memory 1, --format json"),
        ("`device=cpu` and `migrator verify`", "`device=cpu` and `migrator verify`"),
    ],
)
def test_arguments_are_shown_as_the_options_of_the_command(text, shown, capsys):
    with click.Context(group) as context:
        context.invoked_subcommand = "reshard"
        console.error(UsageError(text, hint=text))
    assert capsys.readouterr().err == f"error: {shown}\nhint: {shown}\n"


def test_arguments_stay_as_they_are_outside_of_a_command(capsys):
    assert click.get_current_context(silent=True) is None
    console.error(UsageError("`tp=2` is wrong", hint="leave `tp` out"))
    assert capsys.readouterr().err == "error: `tp=2` is wrong\nhint: leave `tp` out\n"
