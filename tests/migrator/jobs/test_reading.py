"""Job files: their settings, defaults from earlier steps, and errors with their line."""

from __future__ import annotations

import os

import pytest

from migrator import jobs
from plans.errors import UsageError
from tests.migrator.jobs.helpers import job_file

PLACES = {"a": "out", "b": "link/out"}


def test_omitted_settings_are_filled_in_from_earlier_steps(tmp_path):
    file = job_file(
        tmp_path,
        '[rewrite]\npaths = ["models"]\ntarget = "dtensor"\n[check]\n[verify]\nmax_memory = 64\n[validate]\ntp = 2\n'
        '[[reshard]]\nname = "a"\nsource = "hub"\ntp = 2\nreplicate = 3\n'
        '[[reshard]]\nname = "b"\nsource = "hf://owner/name@v1"\ndestination = "../b"\n',
    )
    job = jobs.read(file)
    assert (job.name, job.output) == ("move", tmp_path / "move.job")
    models = (tmp_path / "models",)
    hub, hosted, b = str(tmp_path / "hub"), "hf://owner/name@v1", tmp_path.parent / "b"
    assert dict(job.steps) == {
        "rewrite": jobs.Rewrite(models, target="dtensor"),
        "check": jobs.Check(models, target="dtensor"),
        "reshard-a": jobs.Reshard(hub, tmp_path / "move.job/a", tp=2, replicate=3),
        "reshard-b": jobs.Reshard(hosted, b),
        "verify-a": jobs.Verify(str(tmp_path / "move.job/a"), hub, 64),
        "verify-b": jobs.Verify(str(b), hosted, 64),
        "validate-a": jobs.Validate(str(tmp_path / "move.job/a"), hub, tp=2),
        "validate-b": jobs.Validate(str(b), hosted, tp=2),
    }


def test_a_proof_takes_the_paths_of_the_rewrite_or_what_is_installed(tmp_path):
    rewrite, models = '[rewrite]\npaths = ["models"]\n', (tmp_path / "models",)
    settings = '[prove]\ntp = 4\nmode = ["tp", "sp"]\nsizes = "sizes.toml"\n'
    job = jobs.read(job_file(tmp_path, rewrite + settings))
    assert job.steps["prove"] == jobs.Prove(models, tp=4, mode=("tp", "sp"), sizes=tmp_path / "sizes.toml")
    job = jobs.read(job_file(tmp_path, f'{rewrite}[prove]\ninstalled = true\nmode = "ep"\n'))
    assert job.steps["prove"] == jobs.Prove(installed=True, mode=("ep",))


def test_a_checkpoint_of_its_own_is_held_against_nothing_else(tmp_path):
    job = jobs.read(job_file(tmp_path, '[reshard]\nsource = "hub"\n[verify]\nsource = "out"\n'))
    assert list(job.steps) == ["reshard", "verify"]
    assert job.steps["verify"] == jobs.Verify(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        ("", "declares no step", "[rewrite], [check]"),
        ("[check", "is not TOML", "correct"),
        (
            "ouput = 'x'\n[check]\npaths = ['m']",
            "move.toml:1: ouput is not a setting",
            "output, and the tables [rewrite]",
        ),
        ("[chekc]\npaths = ['m']", "move.toml:1: chekc is not a setting", "[check]"),
        ("ouput = 'x'", "ouput is not a setting", "did you mean output? settings here are output, and the tables"),
        ("[chekc]\npaths = ['m']", "chekc is not a setting", "did you mean check? settings here are output, and the"),
        (
            "[reshard]\nlayouts = 'hf'",
            "reshard.layouts is not a setting",
            "did you mean layout? settings here are name",
        ),
        ("[reshard]\ndest = 'x'", "reshard.dest is not a setting", "did you mean destination? settings here are name"),
        ("[reshard]\n'' = 'x'", "reshard is not a setting", "settings here are name, source"),
        ("[reshard]\nlayout = 'rank'", "reshard.layout is 'rank'", "did you mean ranks? use one of hf, dcp, ranks"),
        ("[reshard]\nlayout = 'RANKS'", "reshard.layout is 'RANKS'", "did you mean ranks? use"),
        (
            "[check]\npaths = ['m']\n\nverify = true",
            "move.toml:4: check.verify is not a setting",
            "paths, source, target",
        ),
        ("[rewrite]\npaths = 'models'", "move.toml:2: rewrite.paths is 'models', not a list of paths", 'paths = ["…"]'),
        ("[rewrite]\npaths = ['']", "rewrite.paths is '', not a non-blank string without NUL", "paths"),
        ('[rewrite]\npaths = ["a\\u0000b"]', "not a non-blank string without NUL", "paths"),
        ("[rewrite]\npaths = ['m']\nin_place = 1", "move.toml:3: rewrite.in_place is 1, not true or false", "true"),
        ("[rewrite]", "move.toml:1: rewrite needs `paths`", "below [rewrite]"),
        ("[verify]", "verify needs `source`", "below [verify]"),
        ("[reshard]\nsource = 'a'\ntp = true", "move.toml:3: reshard.tp is True, not a whole number above 0", "tp = 2"),
        ("[reshard]\nsource = 'a'\ntp = 0", "reshard.tp is 0", "tp = 2"),
        ("[reshard]\nsource = 'a'\ntp = 2\nep = 3", "reshard is not a valid mesh: ep=3 must be", "choose `ep=2`, or"),
        ("[reshard]\nsource = 'a'\nmode = 'pp'", "reshard.mode is 'pp'", "tp, ep, tp_ep, sp, sp_ep"),
        ("[reshard]\nsource = 'a'\nlayout = ['hf']", "reshard.layout is ['hf']", "hf, dcp, ranks"),
        ("[reshard]\nsource = 'a'\nname = '../x'", "reshard.name is '../x', not a name", "letters"),
        ("[reshard]\nsource = 'a'\nname = 'results'", "is its own results", "name"),
        ("[[reshard]]\nsource = 'a'\n[[reshard]]\nsource = 'b'", "move.toml:3: reshard has the same name", "`name`"),
        ("[[reshard]]\nname = 'a'\nsource = 'a'\n[[reshard]]\nname = 'b'\nsource = 3", "move.toml:6: reshard.sou", "…"),
        ("[validate]\nsource = 'a'\ntolerance = 2", "validate.tolerance is 2, not a number between 0 and 1", "1e-05"),
        ("[validate]\nsource = 'a'\ntimeout = nan", "validate.timeout is nan, not a number of seconds", "60"),
        ("[[validate]]\nsource = 'a'", "validate is not a table", "[validate]"),
        ("check = 3", "move.toml: check is not a table", "[check]"),
        ("[prove]\ntp = 2", "move.toml:1: prove needs `paths`", "write paths = … below [prove]"),
        ("[prove]\npaths = ['m']\nmode = ['tp', 'pt']", "move.toml:3: prove.mode is 'pt'", "use one of tp"),
        ("a = " + "[" * 5000, "is not TOML", "correct"),
        ("a = " + "1" * 5000, "is not TOML", "correct"),
        ("output = '/'\n[check]\npaths = ['m']", "`output` must be a folder of the job's own, got /", "of its own"),
        ("output = 'a'\n[reshard]\nsource = 'a'", "the destination of reshard, lies in the source of reshard", "own"),
        ("output = 'a/job'\n[verify]\nsource = 'a'", "a/job, the output, lies in the source of verify", "own"),
        ("output = 'a'\n[verify]\nsource = 'a'", "the output, is the source of verify", "own"),
        ("[reshard]\nsource = 'a'\ndestination = 'b/../a'", "destination of reshard, is the source of reshard", "own"),
        (
            "[reshard]\nsource = 'a/b'\ndestination = 'a'",
            "destination of reshard, contains the source of reshard",
            "own",
        ),
        ("[reshard]\nsource = 'a'\ndestination = '.'", "the destination of reshard, contains its own", "own"),
        ("[reshard]\nsource = 'a'\ndestination = 'move.job'", "the destination of reshard, contains its own", "own"),
        ("[reshard]\nsource = 'a'\ndestination = 'move.job/results/x'", "reshard, lies in its own results", "own"),
        ("[reshard]\nsource = 'a'\nname = 'state.json'", "the destination of reshard-state.json, is its own", "own"),
        (
            "[[reshard]]\nname = 'a'\nsource = 's'\ndestination = 'out'\n"
            "[[reshard]]\nname = 'b'\nsource = 's'\ndestination = 's/../out'",
            "the destination of reshard-b, is the destination of reshard-a",
            "own",
        ),
    ],
)
def test_invalid_job_files_are_refused(tmp_path, content, said, hint):
    with pytest.raises(UsageError) as refused:
        jobs.read(job_file(tmp_path, content))
    assert said in refused.value.message
    assert hint in refused.value.hint


def test_a_link_is_not_another_place(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    tables = [f'[[reshard]]\nname = "{name}"\nsource = "s"\ndestination = "{at}"\n' for name, at in PLACES.items()]
    with pytest.raises(UsageError, match="destination of reshard-b, is the destination of reshard-a"):
        jobs.read(job_file(tmp_path, "".join(tables)))


def test_a_result_may_be_the_next_ones_source(tmp_path):
    chain = '[[reshard]]\nname = "a"\nsource = "s"\n[[reshard]]\nname = "b"\nsource = "move.job/a"\n[verify]\n'
    assert len(jobs.read(job_file(tmp_path, chain)).steps) == 4


def test_a_file_that_is_not_text_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    (tmp_path / "large.toml").write_bytes(b"#" * 1_000_001)
    for name, said in {
        "pipe": "is not a regular file",
        "latin": "is not UTF-8",
        "large": "larger than 1,000,000 bytes",
        "none": "No such file",
    }.items():
        with pytest.raises(UsageError, match=said):
            jobs.read(tmp_path / f"{name}.toml")
