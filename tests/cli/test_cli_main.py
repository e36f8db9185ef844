"""The command line as a whole: verbs, errors as one line, exit codes."""

import errno
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from shoal import __version__
from shoal.cli import doctor
from shoal.cli.main import VERBS, load
from shoal.errors import RunFailed, UserError


def test_without_arguments_and_with_help_the_verbs_are_listed(shoal):
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        code, out, _ = shoal(*arguments)
        assert code == 0
        assert all(f"shoal {verb}" in out for verb in VERBS)


def test_the_version_is_the_package_s(shoal):
    assert shoal("--version") == (0, f"shoal {__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does_and_shows_its_options(verb, shoal):
    assert len(load(verb).HELP) < 90
    code, out, _ = shoal(verb, "--help")
    assert code == 0
    assert f"usage: shoal {verb}" in out
    assert "--json" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown verb 'trian': did you mean 'train'?"),
        (["--versoin"], "unknown option '--versoin': did you mean '--version'?"),
        (["train", "--stepz", "5"], "unknown option '--stepz' in `shoal train`: did you mean '--steps'?"),
        (["train", "--stepz=5"], "unknown option '--stepz' in `shoal train`: did you mean '--steps'?"),
        (["train", "--step", "5"], "unknown option '--step' in `shoal train`: did you mean '--steps'?"),
        (["train", "--model", "gpt"], "unknown option '--model' in `shoal train`: write --set model.kind=VALUE."),
        (["train", "--layers=2"], "unknown option '--layers' in `shoal train`: write --set model.layers=VALUE."),
        (["prove", "--clip", "1"], "unknown option '--clip' in `shoal prove`: write --set clip=VALUE."),
        (["train", "--steps", "five"], "argument --steps: invalid int value: 'five'. `shoal train --help`"),
        (["train", "--steps"], "argument --steps: expected one argument."),
        (["train", "gpt-stdlib", "more"], "unexpected argument 'more'."),
        (["train", "--mesh", "data=²"], "--mesh 'data=²': write it as axis=workers"),
        (["train", "--run-dir", ""], "argument --run-dir: it is empty: name a folder, or leave it out."),
        (["train", "--mesh", ""], "--mesh '': write it as axis=workers"),
        (["train", "--mesh", "data=2,data=4"], "--mesh 'data=2,data=4' gives axis 'data' twice: leave one out."),
        (["train", "--placement", "²,6"], "--placement '²,6': write whole numbers with commas between"),
        (["train", "--placement", ""], "--placement '': write whole numbers with commas between"),
        (["eval"], "the following arguments are required: RUN."),
        (["eval", "x", "--split", "tset"], "argument --split: invalid choice: 'tset'"),
        (["doctor", "it"], "unexpected argument 'it'."),
        (["report", "nowhere"], "no run in 'nowhere'"),
        (["resize", "nowhere", "--workers", "0"], "no run in 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(arguments, message, shoal):
    code, out, err = shoal(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("one\n  two"), 2, "shoal: one two\n"),
        (RunFailed("rank 1 died"), 1, "shoal: rank 1 died\n"),
        (KeyboardInterrupt(), 130, "shoal: interrupted.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            2,
            "shoal: cannot write 'x.bin': No space left on device: free some space, or name another folder.\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/closed/x"),
            2,
            "shoal: '/closed/x': Permission denied: check the path and who may use it.\n",
        ),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error, code, line, shoal, monkeypatch):
    monkeypatch.setattr(doctor, "run", _raises(error))
    assert shoal("doctor") == (code, "", line)


def test_sigterm_ends_a_command_as_ctrl_c_does_and_takes_its_temporary_files_along(shoal, monkeypatch, tmp_path):
    def run(args):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            assert list(tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(doctor, "run", run)
    assert shoal("doctor") == (130, "", "shoal: interrupted.\n")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_ends_a_forked_child_at_once_and_a_handler_that_was_there_stays(shoal, monkeypatch):
    def forks(args):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    monkeypatch.setattr(doctor, "run", forks)
    assert shoal("doctor")[0] == 1

    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
    try:
        monkeypatch.setattr(doctor, "run", lambda args: os.kill(os.getpid(), signal.SIGTERM) or 0)
        assert shoal("doctor")[0] == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["TERM"]


def test_an_error_of_the_program_itself_is_not_hidden(shoal, monkeypatch):
    for error in (ZeroDivisionError(), OSError(errno.EBADF, "Bad file descriptor")):
        monkeypatch.setattr(doctor, "run", _raises(error))
        with pytest.raises(type(error)):
            shoal("doctor")


def _raises(error):
    def run(args):
        raise error

    return run


def test_python_m_shoal_is_shoal_and_a_closed_pipe_is_quiet():
    done = subprocess.run([sys.executable, "-m", "shoal", "verb"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("shoal: unknown verb 'verb'")
    piped = f"{sys.executable} -m shoal train --explain --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1)  # 0 where the pipe took the whole line before its reader went
    assert done.stderr == ""
