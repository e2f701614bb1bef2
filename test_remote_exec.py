"""Tests of remote_exec, on real kernels.

``python -m pytest`` runs all that the machine can; ``-m bench -s`` prints the
figures. REMOTE_EXEC_SSH_HOST names a host that ssh reaches without a password
and where this Python stands at the same path: the tests over ssh use it.
REMOTE_EXEC_SSH_LINK is the network device that leads there, to be cut.
"""
import ast
import contextlib
import copy
import gc
import json
import operator
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from unittest import mock

import _pytest.runner
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_core.paths import jupyter_runtime_dir
from traitlets.config import Config

import remote_exec as rx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WORK = tempfile.TemporaryDirectory()  # what appears there is ours, whoever else runs
for variable, folder in (("JUPYTER_RUNTIME_DIR", "r"), ("TMPDIR", "t")):
    os.environ[variable] = tempfile.tempdir = os.path.join(WORK.name, folder)
    os.mkdir(tempfile.tempdir)
_pytest.runner._update_current_test_var = lambda *_: None  # ipykernel behaves otherwise by it
HERE = pathlib.Path(__file__).parent
LAUNCH = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
SSH_HOST = os.environ.get("REMOTE_EXEC_SSH_HOST")
SSH_LINK = os.environ.get("REMOTE_EXEC_SSH_LINK")
with warnings.catch_warnings():  # there is no file to register marks in
    warnings.simplefilter("ignore")
    newest, marked_bench, far = pytest.mark.newest, pytest.mark.bench, pytest.mark.far
    one_after_another = pytest.mark.xdist_group("hosts")  # they share the queue
over_ssh = pytest.mark.skipif(not SSH_HOST, reason="no second host: REMOTE_EXEC_SSH_HOST")


def bench(test):
    """Marks a benchmark, which runs where it is asked for by its mark."""
    return marked_bench(pytest.mark.skipif(
        "bench" not in sys.argv, reason="figures: pytest -m bench -s")(test))


# ---- the shell under test -------------------------------------------------

class Session:
    """An in-process IPython with the extension loaded, and what its last call came to.
    Its other attributes are the user's variables."""

    def __init__(self):
        self.shell = InteractiveShell.instance()
        self.ns = self.shell.user_ns
        self.shell.extension_manager.load_extension("remote_exec")

    def __getattr__(self, name):
        return self.ns[name]

    @property
    def magics(self):
        return self.shell.magics_manager.registry["RemoteExecMagics"]

    def run(self, line, cell=None):
        """Run the magic; what it showed, and its exception, if any."""
        self.error, begin = None, time.monotonic()
        with capture_output() as shown:
            try:
                if cell is None:
                    self.shell.run_line_magic("remote_exec", line)
                else:
                    self.shell.run_cell_magic("remote_exec", line, cell)
            except (Exception, KeyboardInterrupt) as raised:
                self.error = raised
        self.took = time.monotonic() - begin
        self.out, self.err, self.displays = shown.stdout, shown.stderr, shown.outputs

    def ok(self, line, cell=None):
        self.run(line, cell)
        if self.error:
            raise self.error
        return self.out

    def move(self, name):
        """A front end's move of a widget of a kernel."""
        rx.from_front_end(self.magics.kernels[name], "comm_msg", {
            "content": {"comm_id": "none", "data": {}}, "buffers": [], "metadata": {}})

    def fails(self, line, cell=None):
        """The failures of a call, by kernel."""
        self.run(line, cell)
        assert isinstance(self.error, rx.RemoteError), repr(self.error)
        return self.error.failures

    def misused(self, line, cell=None):
        """The one line of a call's UsageError."""
        self.run(line, cell)
        assert isinstance(self.error, UsageError), repr(self.error)
        assert "\n" not in str(self.error)
        return str(self.error)

    def interrupted(self, line, cell=None, presses=()):
        """The one line of a call that Ctrl-C ends: it is pressed after each of so many
        seconds, or by the code, with `-i press` and {press}."""
        with pressing(*presses):
            self.run(line, cell)
        assert isinstance(self.error, KeyboardInterrupt), repr(self.error)
        assert self.took < 20 + sum(presses)
        assert self.error._render_traceback_() == [f"KeyboardInterrupt: {self.error}"]
        return str(self.error)


@pytest.fixture(scope="module")
def the_session():
    session = Session()
    yield session
    session.shell.extension_manager.unload_extension("remote_exec")


@pytest.fixture
def session(the_session, tmp_path):
    """The session, with the long-lived kernels `a` and `b`, and no others."""
    session = the_session
    session.run("-k a=python3,b=python3")
    if session.error:
        session.ok("-k a=python3,b=python3 -s pass")
    vars(session.a).clear()
    vars(session.b).clear()
    session.ns["press"] = f"__import__('os').kill({os.getpid()}, 2)"
    # (a signal in the moment before one long sleep begins would not end it)
    session.ns["wait"] = "[__import__('time').sleep(.1) for _ in range(600)]"
    # code that waits there until a test calls `session.open()`
    session.open = (tmp_path / "open").touch
    session.ns["gate"] = (f"any(__import__('os').path.exists({str(tmp_path / 'open')!r}) or "
                          "__import__('time').sleep(.02) for _ in iter(int, 1))")
    yield session
    kernels = session.magics.kernels
    others = ",".join(name for name in kernels if kernels[name].launched and name not in "ab")
    if others:
        session.run(f"-k {others} -s")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Makes a kernelspec for this test only."""
    def make(name, *argv, **more):
        folder = tmp_path / "jupyter" / "kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(
            {"argv": argv, "display_name": name, "language": "python", **more}))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return make


@pytest.fixture
def told(monkeypatch):
    """The status lines of this test's calls."""
    told, status = [], rx.Screen.status
    monkeypatch.setattr(
        rx.Screen, "status", lambda self, text: (told.append(text), status(self, text)))
    return told


def until(condition, seconds=15):
    """Wait until the condition holds; whether it does, within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid, seconds=15):
    """Whether the process ends, with all its threads, within so many seconds."""
    def ended():
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
        except (FileNotFoundError, ProcessLookupError):
            return True
    return until(ended, seconds)


def pid_of(session, name):
    session.ok(f"-k {name} -o pid pid = os.getpid()")
    return session.ns[name].pid


def opened():
    """The numbers of our open files, threads, and files on disk."""
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(files())


def settled():
    """What is `opened` when that has not changed for half a second: ZMQ connects beside us."""
    seen = []

    def at_rest():
        seen.append(opened())
        return len(seen) > 25 and len(set(seen[-25:])) == 1
    until(at_rest)
    return seen[-1]


def no_more_than(before):
    """Whether there are, soon, no more `opened` than before: ZMQ closes its own beside us."""
    return until(lambda: all(map(operator.le, opened(), before)))


def files(ended=None):
    """Those in the runtime directory, and this session's in memory, or what is left there of
    one that ended, whose pid that is."""
    shared = f"rexec-{ended}-*" if ended else f"rexec-{os.getpid()}-*/*"
    return {*map(str, pathlib.Path(WORK.name).glob("r/*")),
            *map(str, pathlib.Path("/dev/shm").glob(shared))}


@contextlib.contextmanager
def pressing(*delays):
    """Ctrl-C after each of so many seconds."""
    script = "; ".join(f"sleep {delay}; kill -INT {os.getpid()}" for delay in delays)
    presser, late = subprocess.Popen(["sh", "-c", script]), 0
    try:
        yield
    finally:  # none is left for the next test
        while presser.returncode is None:
            try:
                presser.wait()
            except KeyboardInterrupt:
                late += 1
        assert not late, "it was over before the Ctrl-C"


def ready_kernel(options, **launch):
    """(manager, client) of a kernel that has just been started."""
    manager = KernelManager(kernel_name="python3", **options)
    manager.start_kernel(**launch)
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return manager, client


@contextlib.contextmanager
def others_kernel(**options):
    """(manager, client) of a kernel that somebody else started."""
    manager, client = ready_kernel(options, stderr=subprocess.DEVNULL)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def ipython(*arguments, limit=None, cwd=HERE, **environment):
    """What came of an IPython of its own; `limit` is for the files that it opens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-term-title", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=str(cwd),
        env={**os.environ, **environment},
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)))
    process.stdout, process.stderr = process.communicate(timeout=90)
    return process


def script(*lines):
    return "-c", "\n".join(["%load_ext remote_exec", *lines])


# ---- pure functions -------------------------------------------------------

@pytest.mark.parametrize("line, options, code", [
    ("-k a x = 1", {"k": "a"}, "x = 1"),
    ("-k a,b -o x,y  print( 'a  b' )", {"k": "a,b", "o": "x,y"}, "print( 'a  b' )"),
    ("--kernels=a --output x", {"k": "a", "o": "x"}, ""),
    ("-s -k a -- -x", {"s": "", "k": "a"}, "-x"),
    ("-k a -- -- x", {"k": "a"}, "-- x"),
    ("-k a x -- y --k", {"k": "a"}, "x -- y --k"),
    ("-k a -o x -o y", {"k": "a", "o": "x,y"}, ""),
    ("-k a 'it''s' \"$HOME\" {x} \\n", {"k": "a"}, "'it''s' \"$HOME\" {x} \\n"),
    ("-b -k a --timeout 3 x", {"b": "", "k": "a", "t": "3"}, "x"),
    ("-l", {"l": ""}, ""),
])
def test_line(line, options, code):
    assert rx.parse_line(line) == (options, code)


@given(st.text(min_size=1))
def test_any_line_is_parsed_or_refused(line):
    try:
        assert line.rstrip().endswith(rx.parse_line(line)[1].rstrip())
    except UsageError as error:
        assert "\n" not in str(error) or "\n" in line


def test_targets_names_seconds():
    assert rx.parse_targets(["a", "b=py:/x:y", "c:~/d e"]) == {
        "a": ("", ""), "b": ("py", "/x:y"), "c": ("", "~/d e")}
    assert rx.parse_names("o", "x,y,x") == ["x", "y"]
    assert list(map(rx.parse_seconds, ["2", ".5", "1e3"])) == [2, 0.5, 1000]


def test_spec():
    specs = ["zsh", "python3", "python3-b", "julia-1.9", "ssh-my.host-py", "rik_ssh_r.two_py"]
    for wanted, found in (("python3", "python3"), ("julia", "julia-1.9"), ("Julia", "julia-1.9"),
                          ("my_host", "ssh-my.host-py"), ("r_py", "rik_ssh_r.two_py")):
        assert rx.match_spec(wanted, specs) == found
    for wanted, candidates in (("ssh", "rik_ssh_r.two_py, ssh-my.host-py"),
                               ("pyton3", "julia-1.9, python3, python3-b, .*, zsh")):
        with pytest.raises(UsageError, match=candidates):
            rx.match_spec(wanted, specs)


@given(st.text(), st.dictionaries(st.sampled_from(["a", "b_1", "xyz"]), st.text()))
def test_substitution_is_one_exact_pass(code, values):
    expected, rest = "", code
    while rest:
        name = next((name for name in values if rest.startswith("{%s}" % name)), None)
        expected += values[name] if name else rest[0]
        rest = rest[len(name) + 2 if name else 1:]
    assert rx.substitute(code, "k", values) == expected


def test_versions_are_named():
    parts, _, _ = rx.pack(["x"], {"x": 1}, 2)
    (_, text), = rx.unpack(parts, [b"cnumpy\nno_such_thing\n."])[1]
    assert re.search(r"x can't be loaded: .*no_such_thing.*numpy \d", text), text


def test_other_kernels_are_left_as_they_are():
    """That of xeus-python, say, is no ipykernel, and takes no attributes of ours."""
    assert not rx.publish_all(object())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["status", "ename", "traceback", "text", "name", "data", "payload",
                         "execution_state", "remote_exec", "prompt", "user_expressions"]),
        inner, max_size=4), max_leaves=8)


WIDGETS = mock.MagicMock()


def answer_without_kernel():
    """(answer, is it complete, function that has it hear a message)."""
    kernel = types.SimpleNamespace(
        name="a", session="me", unanswered=["mine"],
        screen=rx.Screen(InteractiveShell.instance(), True), widgets=WIDGETS)
    answer = rx.Answer(kernel, "mine")

    def hear(channel, kind, content, parent="mine"):
        answer.hear(channel, {"msg_type": kind, "content": content, "buffers": [], "metadata": {},
                              "parent_header": {"msg_id": parent, "session": "me"}})
    return answer, lambda: answer.reply is not None and "mine" not in kernel.unanswered, hear


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(
    st.sampled_from(["shell", "iopub", "stdin", "control"]),
    st.sampled_from(["execute_reply", "status", "stream", "display_data", "error", "comm_msg",
                     "input_request", "clear_output", "interrupt_reply", "what_is_this"]),
    anything, st.sampled_from(["mine", "other", None, 3])), max_size=8))
def test_hostile_messages(messages):
    with capture_output():
        answer, complete, hear = answer_without_kernel()
        for each in messages:
            hear(*each)
        hear("iopub", "status", {"execution_state": "idle"})
        hear("shell", "execute_reply", {"status": "ok"})
    assert complete() and isinstance(answer.failure, (rx.Failure, type(None)))


def test_messages_of_others_change_nothing():
    answer, complete, hear = answer_without_kernel()
    for parent in ("other", None):
        hear("shell", "execute_reply", {"status": "error"}, parent)
        hear("iopub", "status", {"execution_state": "idle"}, parent)
        hear("iopub", "comm_msg", {"data": {"remote_exec": []}}, parent)
    hear("iopub", "comm_msg", {"comm_id": "widget", "data": {"method": "x"}})
    assert not complete() and answer.outputs is None and answer.failure is None
    hear("iopub", "status", {"execution_state": "idle"})
    assert not complete()
    hear("shell", "execute_reply", {"status": "ok"})
    hear("shell", "execute_reply", {"status": "error", "ename": "again"})
    assert complete() and answer.failure is None


def redrawn(text):
    """The lines of `text` that are not blank, when every carriage return was heeded."""
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line not in ("", "[k]")]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab\r\n é", max_size=12), max_size=12))
def test_labelled_lines(chunks):
    screen = rx.Screen(InteractiveShell.instance(), True)
    with capture_output() as shown:
        screen.file = sys.stdout
        for chunk in chunks:
            screen.stream("k", "stdout", chunk)
        screen.finish("k")
    assert redrawn(shown.stdout) == [f"[k] {line}" for line in redrawn("".join(chunks))]
    assert all(line.startswith("[k]") for line in re.split(r"[\r\n]+", shown.stdout) if line)


def test_progress_bars_move():
    """Two bars share one line, in which each state shows at once."""
    screen = rx.Screen(InteractiveShell.instance(), True)
    with capture_output() as shown:
        screen.file = sys.stdout
        for percent in range(100):
            for name, width in ("a", 20), ("b", 5):
                screen.stream(name, "stdout", f"\r{'#' * width} {percent} %")
                state = sys.stdout.getvalue().rpartition("[")[2]
                assert re.fullmatch(fr"{name}\] #+ {percent} % *\r", state)
                assert len(state) >= len("a] ") + 20 + len(" 0 %")  # the longer one is covered
        screen.stream("b", "stdout", "\n")
        screen.finish("a")
    assert shown.stdout.count("\n") < 4 and redrawn(shown.stdout)[-1].endswith(" 99 %")


# ---- options and kernelspecs ----------------------------------------------

@pytest.mark.parametrize("line, culprit", [
    ("", "-k"), ("x = 1", "-k"), ("-k ,", "''"), ("-k 9a", "'9a'"), ("-k a,a", "a2=SPEC"),
    ("-k a -o 9x", "'9x'"), ("-k a -o a.b", "'a.b'"), ("-k a -q", "-q"), ("-k a --nope", "nope"),
    ("-k a -i missing_one x", "missing_one"), ("-k a,b -i partial x", "'b'"),
    ("-k a -p missing_one", "missing_one"), ("-k nosuch=nosuch", "nosuch"),
    ("-k print", "print"), ("-k partial=python3", "partial"),
    ("-k a -t 0 1", "'0'"), ("-k a -t nan 1", "'nan'"), ("-k a -s -o x", "-s"),
    ("-l print(1)", "-l"), ("-k proxy=python3 1", "proxy"),
    ("-k {missing_one} 1", "missing_one"), ("-k a=/no/such.json", "/no/such.json"),
    ("-k class", "class"), ("-k a, -o x", "''"), ("-k a -p lock 1", "lock"),
    ("-k a,b -s -p lock 1", "lock"), ("-k c=python3 -p lock 1", "lock"),
    ("-k a -b", "-b"), ("-k a -b -t 1 1", "-t"), ("-k a:/ -o x,1 1", "'1'"),
    ("-k {grid} 1", "ndarray"), ("-k a -i odd 1", "odd"), ("-k a -p odd 1", "odd"),
    ("-k q=.json 1", "'.json'"),
])
def test_misuse(session, line, culprit):
    """Is refused before anything acts."""
    session.shell.run_cell("class Proxy:\n    def __getattr__(self, name): return 1 / 0\n"
                           "class Odd:\n    def __str__(self): raise ValueError('two\\nlines')\n"
                           "    __reduce__ = __str__")
    session.ns.pop("c", None)
    session.ns.update(partial={"a": 1}, lock=threading.Lock(), proxy=session.Proxy(),
                      grid=np.ones((2, 2)), odd=session.Odd())
    kernels = session.magics.kernels

    def state():
        return {name: kernels[name].launched and kernels[name].manager for name in kernels}
    before = state(), set(session.ns)
    assert culprit in session.misused(line)
    assert before == (state(), set(session.ns))


def test_code_is_verbatim(session):
    """And names may have any letters."""
    session.ns["tricky"] = r"\1 \g<0> {other}"
    session.ok("-k a -i tricky -o s s = r'''{tricky} {not} $HOME \\n'''")
    assert session.a.s == r"\1 \g<0> {other} {not} $HOME \n"
    session.ok("-k a -o s s = 1", "s += 1")
    assert session.a.s == 2
    session.ns["\u03bc"] = 2  # what Python makes of the micro sign
    session.ok("-k \xb5m=python3 -p \xb5 -i \xb5 -o \xb5 \xb5 += {\xb5}")
    assert vars(session.ns["\u03bcm"]) == {"\u03bc": 4}


def test_directories_with_any_characters(session, tmp_path):
    odd = tmp_path / "a b'\"{x}:$HOME"
    odd.mkdir()
    session.ns["names"] = [f"a:{odd}", "b:~"]
    session.ok("-k {names}")
    session.ok("-k a,b -o d d = os.getcwd()")  # for later cells, too
    assert (session.a.d, session.b.d) == (str(odd), os.path.expanduser("~"))
    session.ns["names"] = "a:$HOME, b"
    session.ok("-k {names} -o d d = os.getcwd()")
    assert session.a.d == os.path.realpath(os.environ["HOME"])


def test_function_locals(session):
    session.shell.run_cell("def function():\n    local, text = [6], 'y'\n"
                           "    %remote_exec -k a -p local -i text -o y {text} = local\n"
                           "function()").raise_error()
    assert session.a.y == [6]


def test_shutdown_and_restart(session):
    """What came back stays, and NAME keeps its SPEC, but not its directory."""
    first = pid_of(session, "a")
    session.ok("-k a:/ 1")
    session.ok("-k a -s -o fresh,where fresh, where = 'pid' not in dir(), os.getcwd()")
    assert session.a.fresh and session.a.where != "/" and gone(first)
    second = pid_of(session, "a")
    session.ok("-k a,never -s")
    assert gone(second) and session.a.pid == second
    session.ok("-k a 1")


def test_spec_asked_last_is_kept(session, spec):
    """Also when its start failed; that of a running kernel is not replaced without -s."""
    spec("broken", "sh", "-c", "exit 7")
    assert "broken" in session.misused("-k a=broken 1") and "-s" in str(session.error)
    for target in ("q=broken", "q"):
        assert "exit code 7" in session.fails(f"-k {target} 1")["q"].evalue


def test_listing_and_completion(session):
    assert re.search(r"a +python3 +idle", session.ok("-l")) and "kernelspecs:" in session.out
    for text, expected in (("-k ", "python3"), ("-k a,pyth", "python3"), ("-k z=pyth", "python3"),
                           ("-k a", "a"), ("--ker", "--kernels"), ("--ba", "--background")):
        text = "%remote_exec " + text
        matches = session.shell.Completer.complete(line_buffer=text, cursor_pos=len(text))[1]
        assert expected in [re.split("[,=]", each)[-1] for each in matches]


# ---- what comes back ------------------------------------------------------

def test_readme_story(session, tmp_path):
    (tmp_path / "a.txt").write_text("1 2\n3 4\n")
    (tmp_path / "b.txt").write_text("5 6\n7 8\n")
    session.ns.update(filenames={"a": "a.txt", "b": "b.txt"}, factor=10)
    session.ok(f"-k a:{tmp_path},b:{tmp_path} -i filenames,factor -o x,y",
               "import numpy as np\nx, y = np.loadtxt('{filenames}').T * {factor}")
    assert session.a.x.tolist() == [10, 30] and session.b.y.tolist() == [60, 80]


def test_namespace(session):
    """The same plain one from call to call, found by NAME."""
    session.ok("-k a -o x,items x, items = [1], 'any name'")
    namespace = session.ns.pop("a")
    session.ok("-k a -o y y = x; pickle, os")
    assert session.a is namespace
    assert dir(namespace) == sorted(vars(namespace)) == ["items", "x", "y"]
    assert repr(namespace) == "<kernel a (python3): items, x, y>"
    assert copy.copy(namespace).x is namespace.x and copy.deepcopy(namespace).x == [1]


def test_no_such_attribute(session):
    """Is told with no frame of ours."""
    session.ok("-k a -o x x = 1")
    with capture_output() as shown:
        session.shell.run_cell("print(len('shown'))\na.nope")
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.stdout)
    assert re.search(r"(?s)5\n.*---> 2 a.nope.*AttributeError: .*'nope'", text)
    assert "remote_exec" not in text and not hasattr(session.a, "nope")


def test_far_namespace_gains_nothing_else(session):
    session.ns["gift"] = [1]
    session.ok("-k a -s -p gift -o names names = sorted(n for n in dir() if n[0] != '_')")
    assert set(session.a.names) - {
        "In", "Out", "exit", "quit", "get_ipython", "open"} == {"gift", "os", "pickle"}


def test_reload(session):
    """Shuts down, leaks nothing, and knows its names again."""
    namespace = session.a
    session.ok("-k b -s")
    for _ in range(3):
        pid, before = pid_of(session, "a"), settled()
        session.shell.extension_manager.reload_extension("remote_exec")
        assert gone(pid)
        session.ok("-k a=python3 -o n n = 3")
        assert session.a is namespace and namespace.n == 3
        assert no_more_than(before), (before, opened())


CELL_OF_DATA = """
import datetime, decimal
import numpy as np, pandas as pd
values = dict(
    strided=np.arange(20.)[::3], zero=np.array(3.5), empty=np.zeros((0, 4)),
    fortran=np.asfortranarray(np.arange(12.).reshape(3, 4)),
    structured=np.array([(1, 2.5)], dtype=[('a', 'i4'), ('b', 'f8')]),
    objects=np.array([1, 'x', None], dtype=object), cube=np.ones((60, 60, 60)),
    none=None, big=10**50, text='h\\u00e9 \\U0001f600', raw=bytes(range(256)),
    nested={'a': [1, (2, {3})]}, when=datetime.datetime(2020, 1, 2), money=decimal.Decimal('1.1'),
    kinds=(1 + 2j, range(3), frozenset('ab'), Ellipsis, bytearray(b'x'), int),
    records=[{'n': i, 'name': str(i), 'set': {i}} for i in range(1000)])
frame = pd.DataFrame({'s': ['a', 'b'], 'd': pd.to_datetime(['2020-01-01', '2021-01-01']),
                      'v': [1.5, float('nan')]})
"""


def test_values(session):
    session.ok("-k a -o values,frame", CELL_OF_DATA)
    expected = {}
    exec(CELL_OF_DATA, expected)
    for name, value in expected["values"].items():
        got = session.a.values[name]
        assert type(got) is type(value)
        if isinstance(value, np.ndarray):
            assert got.dtype == value.dtype and got.flags.writeable
            np.testing.assert_array_equal(got, value)
        else:
            assert got == value
    assert session.a.frame.equals(expected["frame"])
    session.a.frame.loc[0, "v"] = 9


def test_push(session):
    session.ns.update(cube=np.arange(1e5), other="text", later=[1])
    session.ok("-k a,b -p cube,other -o back,other cube[0] = 5; back = cube")
    assert session.b.back[0] == 5 and session.b.other == "text" and session.cube[0] == 0
    session.ok("-k a -p later")
    session.ok("-k a -o later")
    assert session.a.later == [1]


def test_sharing_is_kept(session):
    """Also beside an output that can't go, and one that can't be loaded."""
    session.ok("-k a", (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt, threading\n"
        "figure, axes = plt.subplots(); axes.plot([1, 2, 4]); plt.close()\n"
        "class Bad:\n    def __reduce__(self): return eval, ('[][1]',)\n"
        "class Tensor:\n    def __hash__(self): return id(self)\n"
        "weight = Tensor(); weights, optimizer = (weight,), (weight,)\n"
        "class Odd:\n    def __hash__(self): return 1 / 0\n"
        "odd = Odd(); odds = [odd]; pair = ([], odd)\n"
        "import numpy as np; shared = np.zeros(100000); one, two = [shared], [shared]"))
    for bad in ("1", "threading.Lock()", "Bad()"):
        vars(session.a).clear()
        session.run(f"-k a -o figure,one,bad,axes,two,weights,optimizer,odd,odds,pair bad = {bad}")
        there = session.a
        assert there.odds[0] is there.odd is there.pair[1]
        assert there.weights[0] is there.optimizer[0]
        assert there.figure.axes[0] is there.axes and there.one[0] is there.two[0]
        assert there.axes.lines[0].get_ydata().tolist() == [1, 2, 4]
        there.one[0][0] = 1  # writable


def test_own_classes(session):
    """With cloudpickle, and what can be had without it."""
    session.ok("-k a -o thing,twice,point", (
        "import dataclasses, sys\nclass Thing:\n    size = 3\nthing = Thing()\n"
        "twice = lambda x: 2 * x\n"
        "Point = dataclasses.make_dataclass('Point', ['x'], namespace={'__module__': '__main__'})\n"
        "point = Point(4)"))
    assert (session.a.thing.size, session.a.twice(4), session.a.point.x) == (3, 8, 4)
    session.shell.run_cell("def mine(x): return x + 1")
    session.ok("-k a -p mine -o got got = mine(1)")
    assert session.a.got == 2
    failures = session.fails(
        "-k a -o thing,fine sys.modules['cloudpickle'] = None; fine = '__main__'")
    session.ok("-k a del sys.modules['cloudpickle']")
    assert "thing" in failures["a"].evalue and "installing cloudpickle" in failures["a"].evalue
    assert session.a.fine == "__main__"


def test_each_output_alone(session, tmp_path):
    """Those that can't go, come or be loaded are named, and take nothing from the others,
    which are pickled and sent once."""
    (tmp_path / "only_there.py").write_text("class Thing: pass")
    failures = session.fails("-k a,b -o good,lock,missing,thing,counter", (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import only_there, threading; thing = only_there.Thing(); lock = threading.Lock()\n"
        "class Counter:\n    count = 0\n"
        "    def __reduce__(self): self.count += 1; return int, (self.count,)\n"
        "counter = Counter(); good = 2"))
    assert list(failures) == ["a", "b"]
    for culprit in ("lock", "'missing'", "thing", "only_there"):
        assert culprit in failures["b"].evalue
    assert vars(session.a) == vars(session.b) == {"good": 2, "counter": 1}
    session.ok("-k a -o count count = counter.count")
    assert session.a.count == 1


def test_odd_failures(session):
    """What has no text, exits, or fails when it is pickled once more, is named, alone."""
    failures = session.fails("-k a,b -o there,here,leaves,one,two,good", (
        "class Mute(Exception):\n    def __str__(self): raise TypeError\n"
        "class There:\n    def __reduce__(self): raise Mute\n"
        "class Leaves:\n    def __reduce__(self): raise SystemExit\n"
        "class Here:\n    def __reduce__(self):\n        return exec, ("
        "'class Mute(Exception):\\n def __str__(self): raise TypeError\\nraise Mute',)\n"
        "class Twice:\n    times = 0\n    def __reduce__(self):\n"
        "        self.times += 1\n        if self.times > 2: raise MemoryError\n"
        "        return int, ()\n"
        "there, here, leaves, good = There(), Here(), Leaves(), 2\n"
        "one = [Twice()]; two = one[:]"))
    for culprit in ("there: ", "SystemExit: leaves: ", "Mute: here can't be loaded: "):
        assert culprit in str(session.error)
    assert list(failures) == ["a", "b"]
    assert vars(session.a) == vars(session.b) == {"good": 2, "one": [0], "two": [0]}


def test_garbage_collector(session):
    """Is off while pickling and loading, and on again whatever came of that."""
    session.ok("-k a", "import gc\nclass Here:\n    def __reduce__(self): return gc.isenabled, ()\n"
               "class There:\n    def __reduce__(self): return bool, (gc.isenabled(),)\n"
               "class Bad:\n    def __reduce__(self): return eval, ('[][1]',)\n"
               "class Worse:\n    def __reduce__(self): return 1 / 0\n")
    session.ok("-k a -o here,there here, there = Here(), There()")
    assert (session.a.here, session.a.there) == (False, False)
    for value in ("1", "Bad()", "Worse()"):
        session.run(f"-k a -o x x = {value}")
        session.ok("-k a -o on on = gc.isenabled()")
        assert gc.isenabled() and session.a.on


@pytest.mark.skipif(
    int(re.search(r"MemAvailable: +(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) < 1e7,
    reason="less than 10 GB of memory free")
def test_three_gigabytes():
    """Whole, and no second copy of it in the local process."""
    done = ipython(*script(
        "def peak(): return int(re.findall('VmHWM:.*?([0-9]+)', open(status).read())[0]) * 1024",
        "import re; status = '/proc/self/status'",
        "%remote_exec -k k=python3 -o small import numpy as np; small = np.ones(9)",
        "%remote_exec -k k x = np.zeros(3 * 2 ** 27, int); x[::2 ** 20] = range(384)",
        "before = peak()", "%remote_exec -k k -o x", "print((peak() - before) / k.x.nbytes)",
        "print(k.x.nbytes, k.x.flags.writeable, k.x[::2 ** 20].tolist() == list(range(384)))",
        "print(int(k.x.sum()))"))
    used, *rest = done.stdout.split()
    assert float(used) < 1.2 and rest == [str(3 * 2 ** 30), "True", "True", str(384 * 383 // 2)]


def test_large_values(session):
    """They go beside ZMQ, both ways, among small ones, and leave nothing behind; what is
    pushed is one file for all kernels."""
    session.ns.update(large=np.arange(5e6), text=b"x" * 40_000_000, small=np.arange(9))
    session.ok("-k a,b -p large -o mapped mapped = {line.split()[4] for line in "
               "open('/proc/self/maps') if '/rexec-' in line}")  # by inode
    assert session.a.mapped & session.b.mapped
    session.ok("-k a -p large,text,small there = [large, text, small, large * 2]")
    held = []
    for _ in range(2):
        session.ok("-k a -p large -o there,large large += 1")
        large, text, small, twice = session.a.there
        assert (twice == session.large * 2).all() and text == session.text and small[8] == 8
        assert large.flags.writeable and (session.a.large == session.large + 1).all()
        del large, text, small, twice
        vars(session.a).clear()
        held.append(opened())
    assert no_more_than(held[0]), (held, opened())


def test_no_room_for_large_values(session):
    """ZMQ takes them, then."""
    limit = "__import__('resource').setrlimit(1, ({}, -1))"  # bytes that a file may have
    session.ok(f"-k a -o x {limit.format(100_000)}; import numpy as np; x = np.ones(5_000_000)")
    session.ok(f"-k a {limit.format(-1)}")
    assert session.a.x.sum() == 5_000_000


def test_directory_that_is_gone(session):
    """Somebody may clean up: values come by ZMQ, and what starts gets a new one."""
    session.ok("-k c=python3 1;")
    shutil.rmtree(session.magics.directory)
    session.ns["large"] = np.ones(5_000_000)
    session.ok("-k c -p large -o twice twice = 2 * large")
    session.ok("-k d=python3 -p large -o twice twice = 2 * large")
    assert session.c.twice.sum() == session.d.twice.sum() == 10_000_000
    session.ok("-k a,b,c,d -s")  # the sockets of the older ones are gone, too


def test_many_values(session):
    session.ok("-k a -o arrays," + ",".join(f"v{i}" for i in range(200)),
               "import numpy as np\narrays = [np.arange(10) for _ in range(20000)]\n"
               "for i in range(200): globals()['v%d' % i] = i")
    assert len(session.a.arrays) == 20000 and session.a.v199 == 199 and session.took < 15


@newest  # in the pickle of Python 3.8, too, but slower
def test_outputs_are_what_they_were(session):
    """Another client's code, queued behind ours, changes the array at once."""
    with others_kernel() as (manager, _):
        file = manager.connection_file
        session.ok(f"-k one={file},two={file} import numpy as np; x = np.zeros(20_000_000)")
        session.ok("-k one,two -o x x += 1")
        assert all((x == x[0]).all() for x in (session.one.x, session.two.x))
        session.ok("-k one,two -s")


# ---- many kernels ---------------------------------------------------------

def test_at_the_same_time(session, tmp_path, monkeypatch):
    """They run, each until the other does; and stop: both have a thread that nobody ends, and
    the user's grace, which is not the default's 2.5 s."""
    monkeypatch.setitem(session.shell.config, "KernelManager", Config(shutdown_wait_time=7))
    session.ns["flags"] = {"c": ("c", "d"), "d": ("d", "c")}
    session.ok(f"-k c=python3:{tmp_path},d=python3:{tmp_path} -i flags -t 60", (
        "import threading, time\nmine, others = {flags}\nopen(mine, 'w').close()\n"
        "while not os.path.exists(others): time.sleep(.02)\n"
        "threading.Thread(target=time.sleep, args=(99,)).start()"))
    pids = pid_of(session, "c"), pid_of(session, "d")
    session.ok("-k c,d -s")
    assert 3.5 < session.took < 7 and all(map(gone, pids))


@pytest.mark.parametrize("line, names, cause", [
    ("-k a,b:/no/such/dir", ["b"], "/no/such/dir"), ("-k a,b -p thing", ["a", "b"], "only_here"),
    ("-k a,broken", ["broken"], "exit code 7")])
def test_all_or_nothing_before(session, spec, tmp_path, monkeypatch, line, names, cause):
    """What can't be prepared is named, and no code runs anywhere."""
    spec("broken", "sh", "-c", "exit 7")
    (tmp_path / "only_here.py").write_text("class Thing: pass")
    monkeypatch.syspath_prepend(tmp_path)
    session.ns["thing"] = __import__("only_here").Thing()
    session.ok("-k a,b marker = 0")
    failures = session.fails(f"{line} marker = 1")
    assert list(failures) == names and cause in failures[names[-1]].evalue
    session.ok("-k a,b -o marker")
    assert session.a.marker == session.b.marker == 0


@pytest.mark.parametrize("fate, ename, cause", [
    ("1/0", "ZeroDivisionError", "by zero"), ("os._exit(3)", "DeadKernelError", "exit code 3"),
    ("os.kill(os.getpid(), 9)", "DeadKernelError", "SIGKILL"),
    ("os.kill(os.getpid(), 35)", "DeadKernelError", "-35"),
    ("import ctypes; ctypes.string_at(0)", "DeadKernelError", "SIGSEGV")])
def test_each_alone_after(session, fate, ename, cause):
    """Who fails returns nothing, and takes nothing from the others; who dies starts anew."""
    session.ns["fate"] = {"a": fate, "b": "pass"}
    failures = session.fails("-k a,b -i fate -o x", "x = 2\n{fate}")
    assert list(failures) == ["a"] and session.took < 15
    assert failures["a"].ename == ename and cause in failures["a"].evalue
    assert "x" not in vars(session.a) and session.b.x == 2
    session.ok("-k a -o fresh fresh = 'x' not in dir()")
    assert session.a.fresh == (ename == "DeadKernelError")


# ---- in the background ----------------------------------------------------

def test_background(session):
    """Only what it is to bring is waited for; that it runs is told at once."""
    session.ok("-k a,b -o x,old x, old = 0, 1")
    session.ok("-k a,b -i gate -o x -b {gate}; x = 7")
    assert session.took < 0.6
    assert re.search(r"running since \d\d:\d\d:\d\d.*: old, x>", repr(session.a))
    assert re.search(r"b +python3 +running since \d\d:\d\d:\d\d", session.ok("-l"))
    for namespace in (session.a, copy.copy(session.a), pickle.loads(pickle.dumps(session.a))):
        assert namespace.old == 1 and {"old", "x"} <= set(dir(namespace))
    session.ok("-k c=python3 1")  # others are not held up
    session.open()
    assert session.a.x == session.b.x == 7
    session.ok("-k a,b")
    assert "since" not in repr(session.a) + session.ok("-l")


def test_background_is_collected(session):
    """By the next call, which shows what it printed, and then goes on."""
    session.ok("-k b n = 0")
    session.ok("-k a -b import time; time.sleep(.5); print('first'); n = 1")
    with capture_output() as shown:
        session.shell.run_cell(
            "def run(code):\n    %remote_exec -k a,b -i code -o n -b {code}\n"
            "for _ in range(3): run('n += 1; print(n)')").raise_error()
    shown = shown.stdout + session.ok("-k a,b print('last')")
    assert re.findall(r"\[a\] (.*)", shown) == ["first", "2", "3", "4", "last"]
    assert re.findall(r"\[b\] (.*)", shown) == ["1", "2", "3", "last"]
    assert (session.a.n, session.b.n) == (4, 3)


@pytest.mark.parametrize("code, ename", [
    ("1/0", "ZeroDivisionError"), ("os._exit(3)", "DeadKernelError"), ("y = 1", "NameError")])
def test_background_failure(session, code, ename):
    """Is raised by whoever waits, before anything else is done, and told once."""
    for wait in (lambda: session.ok("-k a marker = 1"), lambda: session.a.nowhere):
        session.ok("-k a marker = 0")
        session.ok(f"-k a -o y,nowhere -b {code}")
        with pytest.raises(rx.RemoteError) as caught:
            wait()
        assert caught.value.failures["a"].ename == ename
        assert ename != "NameError" or session.a.y == 1
        session.ok("-k a -o marker marker = globals().get('marker', 0)")
        assert session.a.marker == 0


def test_background_names(session):
    """Any name may be awaited, set and deleted meanwhile; a widget's move hides no failure."""
    session.ok("-k a -o x,y x = y = 0")
    session.ok("-k a -o x,y,__name__,__dict__,__doc__,__repr__ -b 1/0")
    session.a.y = 3
    del session.a.y
    session.move("a")
    for _ in range(2):
        with pytest.raises(rx.RemoteError, match="ZeroDivisionError"):
            session.a.x  # noqa: B018
    session.ok("-k a 1")
    assert vars(session.a) == {"x": 0} and session.a.x == 0
    session.ok("-k a -o __doc__ -b __doc__ = 'far'")
    session.ok("-k a")
    assert vars(session.a)["__doc__"] == "far" and "python3" in repr(session.a)


def test_background_interrupted(session):
    """Ctrl-C ends the waiting by attribute alone; in a call it interrupts the run."""
    session.ok("-k a -i gate -o pressed,x -b", "class Pressed:\n"  # while it is loaded
               f"    def __reduce__(self): return os.kill, ({os.getpid()}, 2)\n"
               "{gate}\npressed, x = Pressed(), 7")
    with pressing(0.3), pytest.raises(KeyboardInterrupt):
        session.a.x  # noqa: B018
    assert not vars(session.a)
    session.open()
    with pytest.raises(KeyboardInterrupt):
        session.a.x  # noqa: B018
    assert vars(session.a) == {"pressed": None, "x": 7}
    session.ok("-k a -b import time; time.sleep(60)")
    assert session.interrupted("-k a 1", presses=[0.3]) == "a stopped"
    session.ok("-k a -b time.sleep(60)")
    assert session.fails("-k a -t 0.3")["a"].ename == "TimeoutError"
    session.ok("-k a 1")


def test_background_in_threads(session):
    """A variable is waited for, also while a call in another thread collects the run. Who
    waits so holds up no other call, -s neither."""
    seen = []

    def waits(seconds=0):
        def read():
            try:
                seen.append(session.a.x)
            except rx.RemoteError as error:
                seen.append(str(error))
        thread = threading.Timer(seconds, read)
        thread.start()
        return thread
    session.ok("-k a -i gate -o x -b {gate}; x = 7")
    threads = [waits(0.5), threading.Timer(1.5, session.open)]
    threads[1].start()
    session.ok("-k a")
    for each in threads:
        each.join()
    assert seen == [7]
    session.ok("-k a -o x -b [__import__('time').sleep(.1) for _ in range(150)]; x = 1")
    thread = waits()
    time.sleep(0.5)
    for line in ("-k b 1", "-k a -s"):
        session.ok(line)
        assert session.took < 10
    thread.join()
    assert seen == [7, "a: ShutdownError: the kernel was shut down"]


def test_background_shown_in_a_file(session, tmp_path):
    """Which is closed before the run has ended."""
    with open(tmp_path / "shown", "w") as file, contextlib.redirect_stdout(file):
        session.shell.run_line_magic("remote_exec", "-k a -o x -b print('far'); x = 1")
    assert session.a.x == 1
    session.ok("-k a 1")


def test_background_question(session, monkeypatch):
    """Waits until someone waits for the run."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "me")
    session.ok("-k a -o name -b name = input('who? ')")
    session.ok("-k b 1")
    assert not asked and session.a.name == "me" and asked == ["who? "]


def test_background_ended(session):
    """By -s, and by the end of the session; nothing waits for it then."""
    session.ok("-k a,b -o n -b import time; time.sleep(60)")
    session.ok("-k a -s -o n n = 'new'")
    assert session.took < 20 and session.a.n == "new"
    pid = pid_of(session, "a")
    session.ok("-k a -o n -b import time; time.sleep(60)")
    session.shell.extension_manager.reload_extension("remote_exec")
    assert gone(pid)
    with pytest.raises(Exception, match="was shut down") as caught:  # the class is of before
        session.a.n  # noqa: B018
    assert type(caught.value).__name__ == "RemoteError"
    session.ok("-k a=python3,b=python3 -o n n = 'newest'")
    assert session.a.n == session.b.n == "newest"


# ---- errors ---------------------------------------------------------------

def test_errors_are_the_far_traceback(session):
    """Of all kernels, in the order of -k."""
    session.fails("-k a 1/0")
    lines = session.error._render_traceback_()
    assert "ZeroDivisionError" in lines[-1] and "remote_exec" not in "\n".join(lines)
    session.fails("-k b,a 1/0")
    assert str(session.error) == "\n".join(
        f"{name}: ZeroDivisionError: division by zero" for name in "ba")
    lines = session.error._render_traceback_()
    assert lines.index("[b] ") < lines.index("[a] ")


def test_death_between_cells(session):
    pid = pid_of(session, "a")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    session.ok("-k a -o x x = 4")
    assert session.a.x == 4
    assert re.fullmatch(r"a had died \(.*SIGKILL\) and is started anew\n", session.err)


@pytest.mark.parametrize("argv, cause", [
    (["/no/such/program"], "/no/such/program"),
    (["sh", "-c", "echo last words >&2; exit 7"], "exit code 7.*last words"),
    ([sys.executable, "-c", "import os, sys, time\nend = time.time() + .5; size = 0\n"
      "while time.time() < end: size += os.write(2, b'word\\n')\n"  # we read meanwhile
      "sys.exit(7 if os.fstat(2).st_size == size else 8)"], "exit code 7"),
    (["sh", "-c", "trap 'echo > told; exit' TERM; sleep 99 & wait"], "not ready after 1.5 s")])
def test_kernel_that_cannot_start(session, spec, monkeypatch, tmp_path, argv, cause):
    """Nothing of it stays behind; before it is killed, it is told."""
    spec("broken", *argv)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.magics, "startup_timeout", 1.5 if "trap" in argv[-1] else 60)
    session.ns.pop("broken", None)
    before = files()
    assert re.search(cause, session.fails("-k a,broken 1")["broken"].evalue), session.error
    assert "broken" not in session.ns and until(lambda: not files() - before)
    assert "trap" not in argv[-1] or until((tmp_path / "told").exists)


def test_kernel_that_dies_before_it_can_ask(session, spec, tmp_path):
    """It answers, but its stdin is at another port than its connection file has."""
    copy = tmp_path / "copy.json"
    spec("deaf", "sh", "-c", "sed 's/\"stdin_port\": [0-9]*/\"stdin_port\": 0/' "
         f"{{connection_file}} >{copy}; timeout 4 {sys.executable} -m ipykernel_launcher -f {copy}")
    assert "exit code 124" in session.fails("-k deaf 1")["deaf"].evalue and session.took < 30


def test_interrupt(session):
    """Stops who runs, who keeps its state; keeps what the other returned, or shows why not."""
    for other, a, b in (("x = 2", "{press}; {wait}", "pass"),
                        ("x = 3", "time.sleep(60)", "pass"), ("x = 4", "time.sleep(60)", "1/0")):
        session.ns["fate"] = {"a": a.format(**session.ns), "b": f"{other}; {b}"}
        line = session.interrupted("-k a,b -i fate -o x", "import time; state = 'kept'\n{fate}",
                                   presses=[] if "press" in a else [1])
        assert line == "a stopped" or "press" in a and line == "a, b stopped"
    assert session.b.x == 3 and "ZeroDivisionError" in session.err
    session.ok("-k a -o state")
    assert session.a.state == "kept"


STUBBORN = """
import time
for _ in range(9):
    try:
        {press}
        time.sleep(7)
    except KeyboardInterrupt:
        pass
"""


def test_second_interrupt_and_replacement(session):
    assert session.interrupted("-k a -i press", STUBBORN) == "a still busy, -s replaces"
    assert "-s" in session.misused("-k a 1") and "busy" in session.ok("-l")
    session.ok("-k a -s -o x x = 1")
    assert session.a.x == 1


def test_interrupt_that_nobody_answers(session, spec):
    """The code ends by itself: its kernel is idle then, and usable."""
    spec("deaf", sys.executable, "-c", (
        "from ipykernel.kernelbase import Kernel\nasync def deaf(*_): pass\n"
        "Kernel.interrupt_request = deaf\n"
        "from ipykernel.kernelapp import IPKernelApp as App; App.launch_instance()"), *LAUNCH[-2:])
    session.ok("-k deaf import time")
    assert session.interrupted("-k deaf time.sleep(3)", presses=[0.3, 0.2]) == (
        "deaf still busy, -s replaces")
    assert until(lambda: re.search("deaf +deaf +idle", session.ok("-l")))
    session.ok("-k deaf -o x x = 1")
    assert session.deaf.x == 1


@pytest.mark.parametrize("delay", [0, 0.002, 0.005, 0.01, 0.1])
def test_two_interrupts_when_one_kernel_is_done(session, delay):
    """Whatever the moment: it is named as stopped, or what it returned is there."""
    session.ok("-k a import threading, time")
    session.ns["fate"] = {"b": session.wait, "a": (
        "presser = threading.Thread(target=lambda: (time.sleep(%s), %s, %s)); presser.start(); "
        "done = 7" % (delay, session.press, session.press))}
    before = signal.signal(signal.SIGINT, lambda *_: None)  # the second may come when all is over
    try:
        line = session.interrupted("-k a,b -i fate -o done {fate}")
        assert re.search(r"\bb\b", line)
        assert vars(session.a) == {"done": 7} or delay < 0.1 and re.search(
            r"\ba\b", line + session.err), line
        session.run("-k a presser.join()")
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_while_starting(session, spec):
    """What had failed by itself is told."""
    spec("sleeper", "sleep", "1000")
    spec("broken", "sh", "-c", "echo last words >&2; exit 7")
    assert session.interrupted("-k a,sleeper,broken 1", presses=[2]) == "sleeper not started"
    assert "last words" in session.err and not session.magics.kernels["sleeper"].launched
    session.ok("-k a 1")


def test_interrupt_while_stopping(session, monkeypatch):
    """A kernel with a thread that nobody ends; the prompt is back all the same."""
    monkeypatch.setitem(session.shell.config, "KernelManager", Config(shutdown_wait_time=12))
    session.ok("-k b -s 1")
    pid = pid_of(session, "b")
    session.ok("-k b import threading, time; "
               "threading.Thread(target=time.sleep, args=(99,)).start()")
    assert session.interrupted("-k b -s", presses=[0.3]) == "b not waited for"
    assert session.took < 5 and not session.magics.kernels["b"].launched and gone(pid, 30)


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_interrupt_between_phases(session, monkeypatch, phases):
    """When so many of stopping, starting and preparing are over: the code does not run."""
    session.ok("-k a marker = 0")
    status, ends = rx.Screen.status, []

    def press(self, text):
        status(self, text)
        ends.append(text)
        if ends.count("") == phases:
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(rx.Screen, "status", press)
    session.interrupted("-k a:/ marker = 1; import time; time.sleep(60)")
    monkeypatch.undo()
    session.ok("-k a -o marker")
    assert session.a.marker == 0


@pytest.mark.parametrize("reduced, line", [
    ("{press}; {wait}; return int, ()", "a stopped"),
    ("return eval, ('[{press}, {wait}]',)", "a not loaded here")])
def test_interrupt_while_pickling(session, reduced, line):
    """There, or here."""
    session.ns["reduced"] = reduced.format(
        press=session.press.replace("'", '"'), wait=session.wait.replace("'", '"'))
    assert session.interrupted("-k a -i reduced -o slow", (
        "class Slow:\n    def __reduce__(self): {reduced}\nslow = Slow()")) == line
    session.ok("-k a -o x x = 1")


def test_timeout(session):
    session.ns["naps"] = {"a": "60", "b": "0"}
    failures = session.fails("-k a,b -i naps -t 1 -o x x = 1; import time; time.sleep({naps})")
    assert list(failures) == ["a"] and failures["a"].ename == "TimeoutError"
    assert session.error._render_traceback_()[-1] == (
        "TimeoutError: still busy after 1 s; interrupted")
    assert session.b.x == 1
    session.ok("-k a -o x")


@pytest.mark.parametrize("code, evalue", [
    ("try: time.sleep(60)\nexcept KeyboardInterrupt: swallowed = 1", "interrupted"),
    (STUBBORN.replace("{press}", ""), "ignores the interrupt")])
def test_late_code_that_catches_the_interrupt(session, code, evalue):
    pid = pid_of(session, "a")
    failure = session.fails("-k a -t 1 -o swallowed import time", code)["a"]
    assert failure.ename == "TimeoutError" and evalue in failure.evalue
    assert "swallowed" not in vars(session.a) and session.took < 20
    assert "ignores" not in evalue or "still busy" in session.misused("-k a 1")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)


def test_late_interrupt(session):
    """Does not hit the next cell."""
    session.ok("-k a,b import time")
    for i in range(16):
        session.run(f"-k a,b -t 0.15 time.sleep({0.142 + i / 1000})")
        session.ok("-k a,b -o x x = sum(range(300_000))")


def test_code_that_cannot_be_sent(session):
    failures = session.fails("-k a,b print('\ud83d')")
    assert list(failures) == ["a", "b"] and failures["a"].ename == "UnicodeEncodeError"
    session.ok("-k a,b -o x x = 1")


class Line:
    """The network to somebody's kernel, which can be cut, and hold back what is published."""

    def __init__(self, manager, client, folder):
        self.client, self.up, self.ends, self.flows = client, True, [], threading.Event()
        info = json.loads(pathlib.Path(manager.connection_file).read_text())
        for channel in ("shell", "iopub"):
            server = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=self.accept, daemon=True, args=(
                server, info[f"{channel}_port"], channel == "iopub")).start()
            info[f"{channel}_port"] = server.getsockname()[1]
        self.flows.set()
        self.file = folder / "line.json"
        self.file.write_text(json.dumps(info))

    def accept(self, server, port, published):
        while True:
            near, far = server.accept()[0], socket.create_connection(("127.0.0.1", port))
            self.ends += [near, far]
            if not self.up:
                self.cut()
            for args in (near, far, False), (far, near, published):
                threading.Thread(target=self.pump, args=args, daemon=True).start()

    def pump(self, source, target, published):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                if published:
                    self.flows.wait()
                target.sendall(data)

    def cut(self):
        """What is on its way is lost."""
        self.up = False
        while self.ends:
            with contextlib.suppress(OSError):
                self.ends.pop().shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def holding(self, seconds):
        """What the kernel publishes meanwhile comes so late."""
        self.flows.clear()
        timer = threading.Timer(seconds, self.flows.set)
        timer.start()
        yield
        timer.cancel()
        self.flows.set()

    def lose(self, begun, over):
        """Cut it when `begun` is there, and let the kernel go on by `over`; mend it when
        the kernel has answered."""
        until(begun.exists)
        self.cut()
        over.touch()
        self.client.kernel_info(reply=True, timeout=30)
        self.up = True


@pytest.fixture(scope="module")
def the_line(tmp_path_factory):
    with others_kernel() as (manager, client):
        yield Line(manager, client, tmp_path_factory.mktemp("line"))


@pytest.fixture
def line(session, the_line):
    session.ok(f"-k far={the_line.file} 1")
    vars(session.far).clear()
    return the_line


def test_journey_of_the_outputs(session, line):
    """Is not what -t ends; one Ctrl-C waits for it, a second one does not."""
    with line.holding(2):
        session.ok("-k far -t 0.5 -o x x = 5")
        assert session.far.x == 5 and session.took > 1.5
    with line.holding(3):
        session.interrupted("-k far -o x x = 6", presses=[1])
        assert session.far.x == 6
    with line.holding(60):
        session.interrupted("-k far -o x x = 7", presses=[0.5, 0.5])
        assert session.took < 20
    session.ok("-k far -o x x = 8")
    assert session.far.x == 8


def test_reply_that_is_lost(session, line, tmp_path):
    """With its idle status, while the network is away."""
    begun, over = tmp_path / "begun", tmp_path / "over"
    threading.Thread(target=line.lose, args=(begun, over)).start()
    failures = session.fails("-k far -o x", (
        f"import time, os; x = 9; open({str(begun)!r}, 'w').close()\n"
        f"while not os.path.exists({str(over)!r}): time.sleep(.01)"))
    assert failures["far"].ename == "LostReplyError" and session.took < 40
    session.ok("-k far -o x")
    assert session.far.x == 9


def test_outputs_that_are_lost(session, monkeypatch):
    """As when the connection breaks between them and the reply."""
    client = session.magics.kernels["a"].client.session
    recv = client.recv

    def losing(*args, **options):
        found = recv(*args, **options)
        assert found[1]["msg_type"] != "comm_msg"
        return found
    monkeypatch.setattr(client, "recv", losing)
    assert session.fails("-k a -o x x = 1")["a"].ename == "LostReplyError"
    monkeypatch.undo()
    session.ok("-k a -o x")


def test_busy_is_not_dead(session, spec, told):
    """One kernel holds the GIL; the other one's heartbeat is silent, as those of
    other languages are while they work."""
    spec("mute", sys.executable, "-c", (
        "from ipykernel.kernelapp import IPKernelApp as App; "
        "App.init_heartbeat = lambda app: None; App.launch_instance()"), *LAUNCH[-2:])
    session.ns["work"] = {"a": "hold(7)", "mute": "time.sleep(7)"}
    session.ok("-k a,mute -i work -o x", (
        "import ctypes, time\n"
        "def hold(seconds): ctypes.PyDLL(None).usleep(int(seconds * 1e6))\n"
        "x = 1\nbegin = time.time(); {work}; assert time.time() - begin > 6.5"))
    assert any(re.fullmatch(r"waiting for a, mute \(\d s\); mute does not answer since [\d:]{8}",
                            text) for text in told), told
    assert not any("a does not answer" in text for text in told)
    assert session.a.x == session.mute.x == 1 and session.err == ""  # it is no terminal


# ---- what the user sees ---------------------------------------------------

def test_labels_and_last_expression(session):
    """And the text form of a widget, where there is no front end."""
    session.ok("-k a,b", "print('one\\ntwo', end='')\n'expr'")
    assert sorted(re.findall(r"\[[ab]\] (?:one|two)\n", session.out)) == [
        "[a] one\n", "[a] two\n", "[b] one\n", "[b] two\n"]
    assert [d.data["text/plain"] for d in session.displays] == ["'expr'"] * 2
    session.ok("-k a", "print('x', end=''); import sys; print('e', file=sys.stderr)\n7;")
    assert session.out == "x" and session.err == "e\n" and not session.displays
    session.ok("-k a import ipywidgets; display(ipywidgets.IntSlider(7))")
    assert "IntSlider(value=7)" in session.displays[0].data["text/plain"] and session.err == ""


def test_late_output(session):
    shown = session.ok("-k a", "import threading, time\n"
                       "def late(): time.sleep(.5); print('late')\n"
                       "thread = threading.Thread(target=late); thread.start()")
    for code in ("thread.join(); time.sleep(.3)", "1;"):
        shown += session.ok(f"-k a {code}")
    assert shown == "late\n"


def test_floods(session):
    session.ok("-k a,b -o last", "for last in range(100000): print(last)")
    lines = session.out.splitlines()
    assert [line for line in lines if line.startswith("[a]")] == [
        f"[a] {i}" for i in range(100000)]
    assert len(lines) == 200000 and session.b.last == 99999
    session.ok("-k a -o i", "for i in range(5000): display(i)")
    assert [d.data["text/plain"] for d in session.displays] == [str(i) for i in range(5000)]


def test_strange_text(session):
    session.ok("-k a", "print('\\0 \\x1b[31mred\\x1b[0m \\U0001f600', 'x' * 10**6)")
    assert session.out == "\0 \x1b[31mred\x1b[0m \U0001f600 " + "x" * 10**6 + "\n"
    session.run("-k a print('\\ud800')")
    session.ok("-k a -o x x = 1")


def test_slow_start(session, spec, told, tmp_path):
    """Several start at the same time, here each when the other does; who is waited for is
    told, and it costs no CPU."""
    spec("slow", "sh", "-c", f"cd {tmp_path}; touch $$.starts; until [ $(ls *.starts | wc -l) = 2 "
         f"]; do sleep .1; done; sleep 4; exec {' '.join(LAUNCH)}")
    begin = time.process_time()
    session.ok("-k a,s=slow,t=slow 1")
    assert session.took > 4 and session.err == ""
    assert time.process_time() - begin < 0.15 * session.took + 0.2  # the sockets, and a cell
    assert any(re.fullmatch(r"starting s, t \(\d s\); ready: a", text) for text in told), told
    assert told[-1] == ""


# ---- other kernels than Python --------------------------------------------

def test_bash(session, spec, tmp_path):
    spec("shell", sys.executable, "-m", "bash_kernel", "-f", "{connection_file}", language="bash",
         env={"HOME": str(tmp_path)})  # what the shell does at its start there may take long
    assert session.ok("-k shell=shell echo $((6*7))") == "42\n"
    for line in ("-k shell -o x x=1", "-k shell:/tmp ls", "-k shell -p press ls"):
        assert "bash" in session.misused(line)
    assert session.interrupted("-k shell sleep 20", presses=[0.5]) == "shell stopped"
    assert session.fails("-k shell false")["shell"].evalue == "1"
    assert session.error._render_traceback_() == ["Error: 1"]  # it names none


# ---- the wire and its configuration ---------------------------------------

def test_unix_sockets(session):
    """Only the user can enter, and another client can use them, too."""
    pid, kernel = pid_of(session, "a"), session.magics.kernels["a"]
    file = pathlib.Path(kernel.manager.connection_file)
    info = json.loads(file.read_text())
    folder, name = os.path.split(info["ip"])
    assert info["transport"] == "ipc" and os.stat(folder).st_mode & 0o777 == 0o700
    assert str(file.parent) == jupyter_runtime_dir() not in folder
    assert file.stat().st_mode & 0o777 == 0o600
    said = []
    for each in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it may open and close some
            if os.readlink(each).startswith(WORK.name):  # its standard error
                said.append(each.read_text())
    assert said and not any("ncrypt" in text for text in said)
    client = BlockingKernelClient(connection_file=str(file))
    client.load_connection_file()
    client.start_channels()
    client.execute("y = 5", reply=True, timeout=30)
    client.stop_channels()
    session.ok("-k a -o y")
    assert session.a.y == 5 and kernel.protocol == pickle.HIGHEST_PROTOCOL
    session.ok("-k a -s")
    assert not list(pathlib.Path(folder).glob(name + "*"))


def test_question_of_a_new_kernel(session, monkeypatch):
    """Is not lost, though ZMQ connects each socket when it comes to it."""
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for _ in range(3):  # one in 15 was
        session.ok("-k c=python3,d=python3,e=python3,f=python3 -t 60 -o name -s "
                   "name = input('who? ')")
        assert session.c.name == session.d.name == session.e.name == session.f.name == ""


def test_tcp_if_the_user_wants(session, monkeypatch):
    """Encrypted, where jupyter_client can: then strangers hear nothing."""
    monkeypatch.setitem(session.shell.config, "KernelManager", Config(transport="tcp"))
    session.ok("-k c=python3 1")
    client = session.magics.kernels["c"].client
    assert client.transport == "tcp"
    if not hasattr(client, "curve_publickey"):
        pytest.skip("this jupyter_client has no encryption")
    with zmq.Context() as context, context.socket(zmq.SUB) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://{client.ip}:{client.iopub_port}")
        stranger.subscribe(b"")
        assert session.ok("-k c print('secret')") == "secret\n" and not stranger.poll(1000)
    assert client.curve_publickey


@pytest.mark.parametrize("temporary", ["x" * 150, "not/there"])
def test_odd_directories(tmp_path, temporary):
    """Those for sockets and connection files are long, or not there; nothing stays."""
    runtime, folder, before = tmp_path / ("y" * 150), tmp_path / temporary, files()
    if len(temporary) > 100:
        folder.mkdir()
    done = ipython(*script("%remote_exec -k k=python3 print(6 * 7)"),
                   TMPDIR=str(folder), JUPYTER_RUNTIME_DIR=str(runtime))
    assert (done.stdout, done.stderr) == ("42\n", "")
    assert not [*runtime.iterdir(), *folder.glob("*")] and files(done.pid) <= before


TAKEN = """
import json, os, socket, sys
if not os.path.exists({flag!r}):  # the first time, somebody else listens at one of its ports
    open({flag!r}, "w").close()
    port = json.load(open(sys.argv[2]))[{port!r}]
    os.set_inheritable(socket.create_server(("127.0.0.1", port)).detach(), True)
else:  # as ssh may, of a port that is not the kernel's
    print("bind [127.0.0.1]:8888: Address already in use", file=sys.stderr, flush=True)
os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]])
"""


@pytest.mark.parametrize("port", [
    "shell_port", "hb_port",
    pytest.param("iopub_port", marks=newest)])  # before 3.9, Python says it when it ends
def test_port_in_use(session, spec, tmp_path, port):
    """It is started once more, also if it says so, but hangs instead of ending (iopub)."""
    flag = tmp_path / "flag"
    code = TAKEN.format(flag=str(flag), port=port)
    spec("taken", sys.executable, "-c", code, *LAUNCH[-2:])
    session.ok("-k taken -o x x = 1")
    assert flag.exists() and session.taken.x == 1 and session.took < 40


ANEW = """
import os, sys, time
with open(sys.argv[2]) as file:
    info = file.read()
for _ in range(2):
    os.unlink(sys.argv[2])
    time.sleep(.5)
    with open(sys.argv[2], "w") as file:
        file.write(info)
    time.sleep(.5)
os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]])
"""


def test_connection_file_written_anew(session, spec, monkeypatch):
    """As an encrypted ipykernel does: for a moment there is none, then it says the same."""
    left, disconnect = [], rx.Kernel.disconnect
    monkeypatch.setattr(rx.Kernel, "disconnect", lambda kernel, **linger: (
        left.extend(kernel.sockets), disconnect(kernel, **linger)))
    spec("anew", sys.executable, "-c", ANEW, *LAUNCH[-2:])
    session.ok("-k anew -o x x = 1")
    assert session.anew.x == 1 and not left


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_attached_kernel(session, transport, tmp_path):
    """Is used, followed when its owner restarts it, and left alone."""
    options = {"transport": transport, "ip": str(tmp_path / "s")} if transport == "ipc" else {}
    with others_kernel(**options) as (manager, client):
        def restart():
            manager.restart_kernel(now=True)
            client.execute("1", reply=True, timeout=60)
        session.ok(f"-k far={manager.connection_file} -o x x = 11")
        session.ok("-k far -o y y = x")
        assert session.far.x == session.far.y == 11
        restart()
        session.ok("-k far -o fresh fresh = 'x' not in dir()")
        assert session.far.fresh and re.fullmatch("far .*\n", session.err)
        session.ok("-k far -s")
        assert manager.is_alive() and client.kernel_info(reply=True, timeout=30)
        assert "not started here" in session.fails("-k far os._exit(3)")["far"].evalue
        restart()
        session.ok("-k far 1")
        manager.shutdown_kernel(now=True)
        assert "not started here" in session.fails("-k far 1")["far"].evalue
        assert session.took < 20
    file = os.path.basename(session.magics.kernels["a"].manager.connection_file)
    session.ok("-k a x = 12")
    session.ok(f"-k again={file} -o x")  # in Jupyter's runtime directory
    session.ok("-k again -s")
    assert session.again.x == 12 and session.ok("-k a print(x)") == "12\n"


def test_death_that_is_over(session):
    """An attached kernel that was dead when a widget moved lives again."""
    with others_kernel() as (manager, client):
        session.ok(f"-k far={manager.connection_file} 1")
        manager.shutdown_kernel(now=True, restart=True)
        session.move("far")
        manager.restart_kernel(now=True)
        client.execute("1", reply=True, timeout=60)
        for _ in range(2):
            session.ok("-k far import time; time.sleep(1)")


def test_wrong_signature_is_ignored(session):
    client = session.magics.kernels["a"].client.session
    key, client.key = client.key, b"wrong"
    session.interrupted("-k a print(1)", presses=[0.3, 0.3])
    client.key = key
    assert "1\n" not in session.out


def test_one_request_a_cell(session, monkeypatch):
    client, sent, session.ns["y"] = session.magics.kernels["a"].client.session, [], 1
    send = client.send
    monkeypatch.setattr(client, "send", lambda socket, kind, *rest, **more: (
        sent.append(kind), send(socket, kind, *rest, **more))[1])
    session.ok("-k a -o x x = 1")
    assert sent == ["execute_request"]
    session.ok("-k a:/ -p y -o x x = y")
    assert sent == ["execute_request"] * 3


def test_the_file(tmp_path):
    """It is enough; and a kernel that starts after it was edited gets what was loaded."""
    source = (HERE / "remote_exec.py").read_text(encoding="utf-8")
    (tmp_path / "remote_exec.py").write_text(source, encoding="utf-8")
    done = ipython(*script(
        "source = open('remote_exec.py', encoding='utf-8').read()",
        "_ = open('remote_exec.py', 'w', encoding='utf-8').write('# more\\n' * 20 + source)",
        "%remote_exec -k k=python3 -p source -o x x = len(source)", "print(k.x)"), cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"{len(source)}\n", "")


# ---- fleets ---------------------------------------------------------------

def test_starts_and_stops_leak_nothing(session):
    before = settled()
    for _ in range(3):
        session.ok("-k c=python3,d=python3,e=python3,f=python3 1")
        session.ok("-k c,d,e,f -s")
    assert no_more_than(before), (before, opened())


@pytest.mark.parametrize("limit", [(60, 4096), (150, 150)])
def test_few_open_files(limit):
    """The soft limit is raised; where the hard one is too low, that is told at once, and
    the kernels that started are there."""
    done = ipython(*script(
        "import time; begin = time.time(); targets = ['c%d=python3' % i for i in range(14)]",
        "try:", "    %remote_exec -k {targets} -o x x = 1",
        "except Exception as error: print(error)",
        "print(time.time() - begin < 30)", "%remote_exec -l"), limit=limit)
    running = len(re.findall(r"^  c\d+  python3  idle", done.stdout, re.M))
    told = [line for line in done.stdout.lower().split("\n") if "too many open files" in line]
    assert "True\n" in done.stdout and running + len(told) == 14, done
    assert running == 14 if limit[1] > 1000 else 5 < running < 14


@pytest.mark.parametrize("edit", [
    "sed -i s/127.0.0.1/127.0.0.2/ {connection_file}",
    "f={connection_file}; sed s/127.0.0.1/127.0.0.2/ $f >$f.new; head -c 99 $f.new >$f; "
    "sleep .5; cat $f.new >$f; rm $f.new"])
def test_connection_file_is_followed(session, spec, monkeypatch, edit):
    """As a batch job writes where it runs; half-written, it is read again. It is told there
    that it is to end."""
    monkeypatch.setitem(session.shell.config, "KernelManager", Config(shutdown_wait_time=60))
    spec("moved", "sh", "-c", f"sleep .5; {edit}; exec {' '.join(LAUNCH)}")
    session.ok("-k moved -o pid pid = os.getpid()")
    assert session.interrupted("-k moved -i press,wait {press}; {wait}") == "moved stopped"
    session.ok("-k moved -s")
    assert gone(session.moved.pid, 1) and session.took < 20


# ---- batch queues ---------------------------------------------------------

def nodes_of_queue():
    """The names of Slurm's nodes that are up."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return sorted(set(subprocess.run(
            ["sinfo", "-h", "-N", "-r", "-o", "%N"], capture_output=True, text=True, timeout=20,
            check=True).stdout.split()))
    return []


NODES = nodes_of_queue()[:2]
in_queue = pytest.mark.skipif(len(NODES) < 2, reason="no batch queue: Slurm of two nodes")
JOB = f"rexec{os.getpid()}"  # the name of our jobs


def jobs():
    """The ids of our jobs in the queue."""
    return subprocess.run(["squeue", "--me", "-h", "-n", JOB, "-o", "%i"], check=True,
                          capture_output=True, text=True).stdout.split()


def scancel(after=0):
    return subprocess.Popen(["sh", "-c", f"sleep {after}; scancel -n {JOB}"])


def readme_block(language, word):
    """The README's code block in that language where the word stands."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.search(rf"```{language}\n([^`]*{word}[^`]*)```", readme)[1]


@pytest.fixture
def job(spec, monkeypatch):
    """Makes the README's kernelspec for Slurm, with more options of srun, one part of
    the command changed."""
    recipe = json.loads(readme_block("json", "srun"))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=":")

    def make(name, *options, change=("", "")):
        srun, *argv = recipe["argv"]
        spec(name, srun, "-J", JOB, *options, *(part.replace(*change) for part in argv),
             interrupt_mode=recipe["interrupt_mode"])
    make("slurm-one", "-w", *NODES[:1])
    make("slurm-two", "-w", *NODES[1:])
    yield make
    scancel().wait()


@in_queue
@one_after_another
def test_batch_queue(session, job):
    """Jobs on two nodes, one of them at an address that nobody knew before."""
    session.ns["gift"] = np.arange(1e6)
    session.ok("-k a,p=slurm-one:/usr,q=slurm-two:/usr -p gift -o where,node,x", (
        "where, node, x = os.getcwd(), os.environ.get('SLURMD_NODENAME'), gift * 2"))
    assert [session.a.node, session.p.node, session.q.node] == [None, *NODES]
    assert session.p.where == session.q.where == "/usr" and session.q.x[-1] == 1999998
    assert session.interrupted("-k p,q", "import time; y = 3; time.sleep(60)", presses=[1]) == (
        "p, q stopped")
    session.ok("-k p,q -o y")
    assert session.p.y == session.q.y == 3
    # cancelled while a cell runs, and between two cells
    session.ns["nap"] = {"a": 0, "p": 60, "q": 60}
    cancelling = scancel(after=1)
    failures = session.fails("-k a,p,q -i nap -o done import time; time.sleep({nap}); done = 1")
    assert [(name, each.ename) for name, each in failures.items()] == [
        ("p", "DeadKernelError"), ("q", "DeadKernelError")]
    assert session.a.done == 1 and session.took < 20 and cancelling.wait() == 0
    session.ok("-k q -o x x = 5")
    scancel().wait()
    assert until(lambda: not jobs())
    session.ok("-k q -o x x = 6")
    assert "started anew" in session.err and session.q.x == 6
    session.ok("-k p,q -s")
    assert until(lambda: not jobs(), 2)


@in_queue
@one_after_another
def test_waiting_in_the_queue(session, job, monkeypatch, told):
    """A job on hold, for longer than it may; and until Ctrl-C, which leaves the others."""
    magics = session.shell.magics_manager.registry["RemoteExecMagics"]
    job("held", "--hold")
    monkeypatch.setattr(magics, "startup_timeout", 2)
    failures = session.fails("-k a,held 1")
    assert [*failures] == ["held"] and failures["held"].ename == "TimeoutError"
    assert re.search("not ready after 2 s.*queued and waiting", failures["held"].evalue)
    assert until(lambda: not jobs(), 2)
    monkeypatch.setattr(magics, "startup_timeout", 60)
    assert session.interrupted("-k a,held,c=python3 x = 1", presses=[4.5]) == "held not started"
    assert any(re.match(r"starting held \(\d s\).*ready: a, c", text) for text in told), told
    assert until(lambda: not jobs(), 2)
    session.ok("-k a,c -o x x = 2")
    assert session.c.x == 2


@in_queue
@one_after_another
@pytest.mark.parametrize("options, change, cause", [
    (["-p", "nowhere"], ("", ""), "invalid partition"),
    ([], ("{connection_file}", "/not/shared.json"), "/not/shared.json: No such file"),
    ([], ("127.0.0.1", "nothing"), "not ready after 3 s.*127.0.0.1")])  # who knows where it is
def test_job_that_cannot_start(session, job, monkeypatch, options, change, cause):
    magics = session.shell.magics_manager.registry["RemoteExecMagics"]
    monkeypatch.setattr(magics, "startup_timeout", 3)
    job("bad", "-w", NODES[1], *options, change=change)
    assert re.search(cause, session.fails("-k bad 1")["bad"].evalue)
    assert until(lambda: not jobs(), 2)


@in_queue
@one_after_another
def test_end_with_jobs(session, job):
    """Another session's end takes its jobs out of the queue, also a busy one, and not ours."""
    session.ok("-k q=slurm-two -o x x = 1")
    ours = jobs()
    done = ipython(*script(
        "%remote_exec -k p=slurm-one,q=slurm-two 1",
        "try:", "    %remote_exec -k q -t 1 import time; time.sleep(60)",
        "except Exception: pass",
        "import time; print(time.time())"))
    assert time.time() - float(done.stdout.splitlines()[-1]) < 4
    assert until(lambda: jobs() == ours, 2)
    session.ok("-k q -o x x += 1")
    assert session.q.x == 2


@in_queue
@one_after_another
def test_job_that_outlives_the_session(session, job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    subprocess.run(["sh", "-c", readme_block("sh", "sbatch").replace(
        "sbatch", f"sbatch -J {JOB} -w {NODES[1]}")], cwd=tmp_path, check=True)
    assert until((tmp_path / "q.json").exists)
    session.ok("-k q=~/q.json -o node node = os.environ['SLURMD_NODENAME']; x = 7")
    session.ok("-k q -s")
    session.ok("-k q -o x")
    assert session.q.x == 7 and session.q.node == NODES[1]
    scancel(after=1)
    assert session.fails("-k q import time; time.sleep(60)")["q"].ename == "DeadKernelError"
    assert session.took < 20


# ---- a notebook -----------------------------------------------------------

class Notebook:
    """A real local kernel, driven by a client as a notebook does."""

    def __init__(self):
        self.manager, self.client = ready_kernel(  # no port that another one may take
            {"transport": "ipc", "ip": os.path.join(tempfile.mkdtemp(), "s")}, cwd=str(HERE))
        self.log, self.answers = [], []  # all that it published; for its questions
        self.run("%load_ext remote_exec")

    def start(self, code):
        """The id of a cell that is on its way."""
        return self.client.execute(code, allow_stdin=True)

    def until(self, condition):
        """Listen until something holds, a minute at most."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log[-5:]
            if self.client.iopub_channel.socket.poll(50):  # sooner than get_iopub_msg
                self.log.append(self.client.session.recv(self.client.iopub_channel.socket)[1])
            elif self.answers and self.client.stdin_channel.msg_ready():
                self.prompts.append(self.client.get_stdin_msg()["content"]["prompt"])
                self.client.input(self.answers.pop(0))

    def under(self, cell, *kinds):
        """The messages that came under a cell."""
        return [each for each in self.log if each["parent_header"].get("msg_id") == cell
                and (not kinds or each["msg_type"] in kinds)]

    def text(self, cell):
        return "".join(each["content"]["text"] for each in self.under(cell, "stream"))

    def end(self, cell, answers=()):
        """The messages of a cell that runs to its end; `answers` go to its questions."""
        self.prompts, self.answers = [], list(answers)
        self.until(lambda: self.log and self.log[-1]["parent_header"].get("msg_id") == cell and (
            self.log[-1]["content"].get("execution_state") == "idle"))
        self.shown = self.text(cell)
        return self.under(cell)

    def reply(self, cell):
        replies = iter(lambda: self.client.get_shell_msg(timeout=30), None)
        return next(each["content"] for each in replies
                    if each["parent_header"]["msg_id"] == cell)

    def run(self, code, answers=()):
        """(reply, messages) of a cell."""
        cell = self.start(code)
        messages = self.end(cell, answers)
        return self.reply(cell), messages

    def value(self, expression):
        reply, messages = self.run(f"print(repr(({expression})))")
        assert reply["status"] == "ok" and self.shown, (reply, messages)
        return ast.literal_eval(self.shown)

    def interrupt(self, cell):
        """The line of a cell that a Ctrl-C ends."""
        self.manager.interrupt_kernel()
        self.end(cell)
        reply = self.reply(cell)
        assert reply["ename"] == "KeyboardInterrupt"
        return reply["evalue"]

    def move(self, widget, subshell=None, **state):
        """The id of a front end's move of a widget."""
        move = self.client.session.msg("comm_msg", {"comm_id": widget, "data": {
            "method": "update", "state": state, "buffer_paths": []}})
        move["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(move)
        return move["header"]["msg_id"]

    def moved(self, widget, *subshell, **state):
        """What comes of it."""
        return self.end(self.move(widget, *subshell, **state))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@pytest.fixture(scope="module")
def the_notebook():
    notebook = Notebook()
    yield notebook
    notebook.close()


@pytest.fixture
def notebook(the_notebook):
    """The notebook, with the long-lived kernels `k1` and `k2`."""
    the_notebook.log.clear()
    the_notebook.run("%remote_exec -k k1=python3,k2=python3")
    return the_notebook


def contents(messages, *kinds):
    return [each["content"] for each in messages if each["msg_type"] in kinds]


def test_notebook(notebook):
    """Data of displays passes unchanged; %%capture, %tb and %xmode do what they do."""
    reply, messages = notebook.run("%%remote_exec -k k1,k2 -o x\nx = 1\n"
                                   "display({'text/html': '<b>'}, raw=True)\nprint('hi')")
    assert reply["status"] == "ok" and "[k1] hi\n" in notebook.shown
    assert [each["data"] for each in contents(messages, "display_data")] == [
        {"text/html": "<b>"}] * 2
    notebook.run("%%capture caught\n%remote_exec -k k1,k2 print('text'); display(5)")
    assert notebook.shown == ""
    assert notebook.value("sorted(caught.stdout.split()), [o.data for o in caught.outputs]") == (
        ["[k1]", "[k1]", "[k2]", "[k2]", "text", "text"], [{"text/plain": "5"}] * 2)
    reply, _ = notebook.run("%remote_exec -k k1,k2 1/0")
    assert reply["ename"] == "RemoteError" and "ZeroDivisionError" in reply["evalue"]
    for before, after in (("", "%tb"), ("%xmode Minimal", "%remote_exec -k k1 1/0")):
        notebook.run(before)
        _, messages = notebook.run(after)
        assert "ZeroDivisionError" in str(messages) and "remote_exec.py" not in str(messages)
    notebook.run("%xmode Context")


def test_notebook_asks(notebook):
    """Also for passwords, and for the debugger."""
    notebook.run("%remote_exec -k k1 -o name name = input('who? ')", ["me"])
    assert notebook.prompts == ["who? "]
    notebook.run("%remote_exec -k k1,k2 -o name import getpass; name = getpass.getpass('pw? ')",
                 ["me", "you"])
    assert sorted(notebook.prompts) == ["[k1] pw? ", "[k2] pw? "]
    assert notebook.value("{k1.name, k2.name}") == {"me", "you"}
    notebook.run("%remote_exec -k k1 1/0")
    reply, _ = notebook.run("%%remote_exec -k k1\n%debug", ["p 6 * 7", "q"])
    assert reply["status"] == "ok" and "42" in notebook.shown
    assert notebook.prompts == ["ipdb> ", "ipdb> "]


def test_notebook_interrupt(notebook):
    """Of what runs, and of what asks: one for all questions."""
    for code in ("import time; time.sleep(60)", "input('wait ')"):
        cell = notebook.start(f"%remote_exec -k k1,k2 print('on'); {code}")
        if "input" in code:
            notebook.client.get_stdin_msg(timeout=30)
        else:
            notebook.until(lambda: notebook.text(cell).count("on\n") == 2)
        assert notebook.interrupt(cell) == "k1, k2 stopped"
        assert not notebook.client.stdin_channel.msg_ready()
        assert notebook.run("%remote_exec -k k1,k2 print(2)")[0]["status"] == "ok"


def test_notebook_displays(notebook):
    """The same display_id on two kernels means two displays; clearing clears all."""
    code = ("from IPython.display import clear_output\n"
            "h = display(1, display_id='same'); h.update(2)\n"
            "print('gone', end=''); clear_output(); print('there')")
    kinds = ["display_data", "update_display_data", "clear_output"]
    _, messages = notebook.run(f"%%remote_exec -k k1\n{code}")
    assert [each["msg_type"] for each in messages if each["msg_type"] in kinds] == kinds
    _, messages = notebook.run(f"%%remote_exec -k k1,k2\n{code}")
    ids = [each["transient"]["display_id"] for each in contents(messages, *kinds[:2])]
    assert len(ids) == 4 and len(set(ids)) == 2
    assert "gone" not in notebook.shown and "[k1] there\n" in notebook.shown


def test_notebook_help(notebook):
    """One kernel's page is a page; of several, all show."""
    reply, _ = notebook.run("%%remote_exec -k k1\nprint?")
    assert "sys.stdout" in str(reply["payload"])
    _, messages = notebook.run("%%remote_exec -k k1,k2\nprint?")
    assert len(contents(messages, "display_data")) == 2
    assert "[k1]" in notebook.shown and "[k2]" in notebook.shown


def test_notebook_status_line(notebook):
    """Nothing of it remains."""
    _, messages = notebook.run("%%remote_exec -k k1,k2\nimport time; time.sleep(4)")
    told = [each["data"] for each in contents(messages, "display_data", "update_display_data")]
    assert re.fullmatch(r"waiting for k1, k2 \(\d s\)", told[0]["text/plain"])
    assert told[-1] == {}


def test_notebook_slow_front_end(notebook):
    """It reads nothing until all is over."""
    cell = notebook.start("%remote_exec -k k1 -o i for i in range(3000): display(i)")
    assert notebook.reply(cell)["status"] == "ok"
    shown = contents(notebook.end(cell), "display_data")
    assert [each["data"]["text/plain"] for each in shown] == [str(i) for i in range(3000)]
    assert notebook.value("k1.i") == 2999


def test_two_sessions(session, notebook):
    """The same names in two sessions, at the same time, and one of them stops."""
    cell = notebook.start("%remote_exec -k a=python3 -o x import time; time.sleep(2); x = 1")
    session.ok("-k a -o x import time; time.sleep(1); x = 2")
    session.ok("-k a -s")
    assert notebook.reply(cell)["status"] == "ok"
    notebook.run("%remote_exec -k a -o x")
    assert notebook.value("a.x") == 1


@newest  # on ipykernel 6, displays and errors go under the latest cell
def test_notebook_background(notebook):
    """What it prints shows under its own cell, and its failure, which counts as told."""
    cell = notebook.start("%remote_exec -k k1,k2 -o x -b import time; print('on'); time.sleep(1); "
                          "print('off'); x = 7; 1/0")
    notebook.end(cell)
    assert "off" not in notebook.shown and notebook.reply(cell)["status"] == "ok"
    notebook.run("%remote_exec -k k3=python3 -s print('between')")
    notebook.until(lambda: len(notebook.under(cell, "error")) == 2)
    assert sorted(notebook.text(cell).split("\n")) == [
        "", "[k1] off", "[k1] on", "[k2] off", "[k2] on"]
    errors = notebook.under(cell, "error")
    assert {each["content"]["ename"] for each in errors} == {"RemoteError"}
    assert "[k1] " in str(errors) and "remote_exec.py" not in str(errors)
    assert notebook.run("%remote_exec -k k1,k2 1")[0]["status"] == "ok"


@newest  # on ipykernel 6, displays go under the latest cell
def test_notebook_background_display(notebook):
    cell = notebook.start("%remote_exec -k k1 -b import time; time.sleep(1); display(5)")
    notebook.end(cell)
    notebook.run("1")
    notebook.until(lambda: notebook.under(cell, "display_data"))


def test_notebook_background_outputs(notebook):
    """Are loaded when they come; even while it prints, the notebook uses little CPU."""
    cell = notebook.start("%%remote_exec -k k1 -o x,y -b\nimport time\nfor i in range(300):\n"
                          "    print(i); time.sleep(.01)\n"
                          "x = 7; y = b'y' * 10**6; print('over')")
    notebook.end(cell)
    before = notebook.value("sum(__import__('os').times()[:2])")
    notebook.until(lambda: "over" in notebook.text(cell))
    assert notebook.value("sum(__import__('os').times()[:2])") - before < 1
    notebook.run("import time; begin = time.monotonic(); k1.y; took = time.monotonic() - begin")
    assert notebook.value("k1.x, len(k1.y), took < 2, 'since' in repr(k1)") == (
        7, 10**6, True, False)


def test_notebook_background_flood(notebook):
    """None is lost, and the notebook answers meanwhile."""
    cell = notebook.start("%remote_exec -k k1 -o i -b for i in range(200000): print(i)")
    notebook.end(cell)
    for _ in range(5):
        begin = time.monotonic()
        notebook.run("1 + 1")
        assert time.monotonic() - begin < 6
    notebook.until(lambda: notebook.log[-1]["content"].get("text", "").endswith("199999\n"))
    assert notebook.text(cell) == "".join(f"{i}\n" for i in range(200000))
    assert notebook.value("k1.i") == 199999


# ---- widgets --------------------------------------------------------------

def widgets(notebook, kernels, code):
    """The messages of a cell that makes widgets on kernels, and names their `ids`."""
    reply, messages = notebook.run(f"%%remote_exec -k {kernels} -o ids\n"
                                   f"import ipywidgets as w\n{code}")
    assert reply["status"] == "ok", reply
    return messages


def test_widgets(notebook):
    """Here they are as they are there, also what is binary; nothing of ours shows."""
    messages = widgets(notebook, "k1", (
        "slider, image = w.IntSlider(3), w.Image(value=b'\\x00\\xff' * 50000)\n"
        "ids = slider.model_id, image.model_id; display(slider)"))
    slider, image = notebook.value("k1.ids")
    opened = {each["content"]["comm_id"]: each for each in messages
              if each["msg_type"] == "comm_open"}
    assert opened[slider]["content"]["data"]["state"]["value"] == 3
    assert opened[slider]["content"]["target_name"] == "jupyter.widget"
    assert opened[slider]["metadata"]["version"]  # of the widgets' protocol
    assert bytes(opened[image]["buffers"][0]) == b"\x00\xff" * 50000
    view, = contents(messages, "display_data")
    assert view["data"]["application/vnd.jupyter.widget-view+json"]["model_id"] == slider
    assert "remote_exec" not in str(contents(messages, "comm_open", "comm_msg", "comm_close"))
    messages = widgets(notebook, "k1", "slider.close(); ids = 0")
    assert [each["comm_id"] for each in contents(messages, "comm_close")] == [slider]


@pytest.mark.parametrize("callback", [
    "print('now', change.new)", "display(change.new)", "label.value = str(change.new)", "1 / 0"])
def test_widget_moves(notebook, callback):
    """What comes of a move is what would come of it with a local widget."""
    code = ("slider, label = w.IntSlider(), w.Label()\n"
            f"def moved(change): {callback}\n"
            "slider.observe(moved, 'value'); ids = slider.model_id, label.model_id")

    def moved(slider, label):
        kinds = ("stream", "display_data", "comm_msg", "error")
        return [(each["msg_type"], each["content"].get("comm_id") == label, [
            each["content"].get(key) for key in ("text", "ename", "data")])
            for each in notebook.moved(slider, value=5) if each["msg_type"] in kinds]
    widgets(notebook, "k1", code)
    far = moved(*notebook.value("k1.ids"))
    notebook.run(f"import ipywidgets as w\n{code}")
    near = moved(*notebook.value("ids"))
    assert far == near or "ZeroDivisionError" in str(far) and "ZeroDivisionError" in str(near)
    notebook.run("%remote_exec -k k1 -o value value = slider.value")
    assert notebook.value("k1.value") == 5


@newest  # ipykernel 7 has subshells
def test_widget_moves_of_a_subshell(notebook):
    """So JupyterLab sends them: they stay in order, and one without end can be stopped."""
    notebook.client.control_channel.send(
        notebook.client.session.msg("create_subshell_request", {}))
    subshell = notebook.client.get_control_msg(timeout=30)["content"]["subshell_id"]
    widgets(notebook, "k1", (
        "slider, seen = w.IntSlider(), []\n"
        "def moved(change):\n    seen.append(change.new); print('moved')\n"
        "    while change.new == 99: __import__('time').sleep(.1)\n"
        "slider.observe(moved, 'value'); ids = slider.model_id"))
    slider = notebook.value("k1.ids")
    for value in (1, 2):  # the first one after a cell goes another way
        notebook.moved(slider, subshell, value=value)
    cell = notebook.start("%remote_exec -k k2 import time; time.sleep(1.5); print('over')")
    for value in range(3, 20):
        notebook.move(slider, subshell, value=value)
        time.sleep(0.03)
    notebook.until(lambda: notebook.text(cell))
    notebook.moved(slider, subshell, value=20)
    notebook.run("%remote_exec -k k1 -o seen")
    assert notebook.value("k1.seen") == [*range(1, 21)]
    moved = [each["msg_type"] for each in notebook.moved(slider, subshell, value=21)]
    assert "stream" in moved and moved[-1] == "status"  # idle: a front end hears no more
    for value in (1, 2, 99):
        move = notebook.move(slider, subshell, value=value)
    notebook.until(lambda: notebook.text(move))
    notebook.manager.interrupt_kernel()
    assert notebook.run("%remote_exec -k k2 print(1)")[0]["status"] == "ok"
    notebook.run("%remote_exec -k k1 -o seen")
    assert notebook.value("k1.seen[-1]") == 99


def caught(messages):
    """[(line without its label, the widget that catches it or None)] of the streams, as a
    front end sees them."""
    catching, found = None, []
    for each in messages:
        content = each["content"]
        if each["msg_type"] == "comm_msg" and "msg_id" in content["data"].get("state", {}):
            msg_id = content["data"]["state"]["msg_id"]
            assert msg_id in ("", each["parent_header"]["msg_id"])
            catching = content["comm_id"] if msg_id else None
        elif each["msg_type"] == "stream":
            found += [(line.split("] ")[-1], catching) for line in content["text"].splitlines()]
    return found


def test_output_widgets(notebook):
    """They catch what belongs to them: of their own kernel, and nothing beside."""
    found = caught(widgets(notebook, "k1,k2", (
        "import time; out = w.Output(); ids = out.model_id\n"
        "for i in range(3):\n    print('beside')\n    with out: print('in'); time.sleep(.1)\n")))
    one, two = notebook.value("[k1.ids, k2.ids]")
    assert sorted(found, key=str) == sorted(
        [("in", one), ("in", two), ("beside", None), ("beside", None)] * 3, key=str)


def test_interact(notebook):
    messages = widgets(notebook, "k1", "ids = 0\nw.interact(lambda x: print('x =', x), x=(0, 9))")
    models = {each["data"]["state"]["_model_name"]: each["comm_id"]
              for each in contents(messages, "comm_open")}
    assert caught(messages) == [("x = 4", models["OutputModel"])]
    assert caught(notebook.moved(models["IntSliderModel"], value=7)) == [
        ("x = 7", models["OutputModel"])]


def test_linked_widgets(notebook):
    """Follow each other over there, here a slider what a running `Play` says."""
    widgets(notebook, "k1", (
        "play, slider = w.Play(), w.IntSlider(); ids = play.model_id, slider.model_id\n"
        "w.link((play, 'value'), (slider, 'value'))"))
    play, slider = notebook.value("k1.ids")
    for value in (1, 2, 3):
        assert [each["content"]["data"]["state"]["value"] for each in notebook.moved(
            play, value=value) if each["content"].get("comm_id") == slider] == [value]


def test_widgets_of_the_gone(notebook):
    """They raise nothing, whether their kernel died or was shut down."""
    widgets(notebook, "k2", "slider = w.IntSlider(); ids = slider.model_id, os.getpid()")
    slider, pid = notebook.value("k2.ids")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    for _ in range(2):
        assert {each["msg_type"] for each in notebook.moved(slider, value=5)} <= {
            "status", "comm_msg"}  # an echo
        notebook.run("%remote_exec -k k2 -s")


def test_widgets_of_the_busy(notebook):
    """Get the move when they are free."""
    widgets(notebook, "k1", "slider = w.IntSlider(); ids = slider.model_id")
    slider = notebook.value("k1.ids")
    cell = notebook.start("%remote_exec -k k1 -b import time; time.sleep(2); print('free')")
    notebook.end(cell)
    notebook.moved(slider, value=9)
    assert "free" not in notebook.text(cell)
    notebook.run("%remote_exec -k k1 -o value value = slider.value")
    assert notebook.value("k1.value") == 9


@pytest.mark.parametrize("options", ["", "-b"])
def test_progress_bars(notebook, options):
    """Of several kernels move, in the background, too."""
    cell = notebook.start(f"%%remote_exec -k k1,k2 {options}\nimport time\n"
                          "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), mininterval=0):\n"
                          "    time.sleep(.2)\nprint('over')")
    notebook.end(cell)
    notebook.run("1 + 1")
    notebook.until(lambda: notebook.text(cell).count("over") == 2)
    bars = [(each["comm_id"], each["data"].get("state", {}).get("value"))
            for each in contents(notebook.log, "comm_msg")]
    for value in (1.0, 2.0, 3.0):
        assert len({bar for bar, reached in bars if reached == value}) == 2


def test_rich_bars(notebook):
    """Of several kernels, each redrawn in an `Output` of its own."""
    messages = widgets(notebook, "k1,k2", (
        "ids = 0\nfrom rich.progress import track\nfor _ in track(range(3)): pass"))
    outputs = {each["comm_id"] for each in contents(messages, "comm_open")
               if each["data"]["state"]["_model_name"] == "OutputModel"}
    whole = [each for each in contents(messages, "display_data") if "100%" in str(each["data"])]
    assert len(outputs) == 2 <= len(whole)


# ---- notebooks without a front end, scripts, a terminal, and their ends ---

def test_nbclient():
    """Runs a notebook, and saves the state of its widgets."""
    import nbclient
    import nbformat
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (
        "%load_ext remote_exec", "%%remote_exec -k k=python3 -o x\nx = 3\nprint('hi')", "k.x",
        "%remote_exec -k k input()",
        "%remote_exec -k k import ipywidgets; display(ipywidgets.IntSlider(7))")])
    notebook.cells[3].metadata.tags = ["raises-exception"]
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60, resources={
        "metadata": {"path": str(HERE)}}).execute()
    assert notebook.cells[1].outputs[-1].text == "hi\n"  # (the status line, if it was slow)
    assert notebook.cells[2].outputs[0].data["text/plain"] == "3"
    assert "StdinNotImplementedError" in notebook.cells[3].outputs[0].evalue
    view = notebook.cells[4].outputs[0].data["application/vnd.jupyter.widget-view+json"]
    saved = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert saved[view["model_id"]]["state"]["value"] == 7


def test_notebook_unloads(notebook):
    notebook.run("%remote_exec -k k1 -o pid pid = os.getpid()")
    pid = notebook.value("k1.pid")
    reply, _ = notebook.run("%unload_ext remote_exec")
    assert reply["status"] == "ok" and notebook.shown == "" and gone(pid, 3)
    notebook.run("%load_ext remote_exec")


def test_notebook_end():
    """One kernel is idle, one holds a thread, one ignores shutdown, one is busy."""
    before, notebook = files(), Notebook()
    session = notebook.value("__import__('os').getpid()")
    notebook.run("%remote_exec -k k1=python3,k2=python3,k3=python3,k4=python3 -o pid "
                 "import threading, time, signal; pid = os.getpid()")
    pids = notebook.value("[k1.pid, k2.pid, k3.pid, k4.pid]")
    notebook.run("%remote_exec -k k2 threading.Thread(target=time.sleep, args=(99,)).start()")
    notebook.run("%remote_exec -k k3 signal.signal(signal.SIGTERM, lambda *_: 0); "
                 "get_ipython().kernel.do_shutdown = None")
    cell = notebook.start("%%remote_exec -k k4\nprint('on')\nwhile True:\n"
                          "  try: time.sleep(60)\n  except KeyboardInterrupt: print('no')")
    notebook.until(lambda: "on\n" in notebook.text(cell))
    notebook.manager.interrupt_kernel()
    notebook.until(lambda: "no\n" in notebook.text(cell))
    assert notebook.interrupt(cell) == "k4 still busy, -s replaces"
    begin = time.monotonic()
    notebook.close()
    assert time.monotonic() - begin < 3  # a front end grants 2.5, on an idle machine
    assert all(gone(pid, 1) for pid in pids) and files(session) <= before


def test_script_and_its_end(tmp_path):
    """Its kernels, one with a thread, one busy, end soon, and leave no file."""
    before, lines = files(), tmp_path / "script.ipy"
    lines.write_text("%load_ext remote_exec\n%remote_exec -k k=python3,m=python3 -o pid "
                     "pid = os.getpid()\nprint(k.pid, m.pid)\n"
                     "%remote_exec -k k import threading, time; "
                     "threading.Thread(target=time.sleep, args=(100,)).start()\n"
                     "%remote_exec -k m -b import time; time.sleep(100)\n"
                     "import time; print(time.time())\n")
    done = ipython(str(lines))
    ended = time.time()
    pids, last = done.stdout.splitlines()
    assert done.stderr == "" and ended - float(last) < 4
    assert all(gone(int(pid), 1) for pid in pids.split()) and files(done.pid) <= before


def test_forked_child_touches_nothing():
    done = ipython(*script(
        "%remote_exec -k k=python3 x = 8",
        "import atexit, glob, os, sys, time, multiprocessing",
        "%remote_exec -k k -o large -b large = b'x' * 2**25",
        "while not glob.glob(f'/dev/shm/rexec-{os.getpid()}-*/*/0'): time.sleep(.1)",
        "sys.stdout.flush()", "pid = os.fork()",
        "if pid == 0:  # IPython's own exit function empties the namespace",
        "    (lambda run, end: (run(), end(0)))(atexit._run_exitfuncs, os._exit)",
        "_ = os.waitpid(pid, 0)",
        "w = multiprocessing.get_context('fork').Process(target=print, args=('worker',))",
        "w.start(); w.join()", "%remote_exec -k k -o x", "print(k.x, len(k.large))"))
    assert done.stdout == f"worker\n8 {2**25}\n", done


def test_killed_session_leaves_no_kernel():
    """The next one starts cleanly; what fails to start there leaves no file."""
    process = subprocess.Popen([sys.executable, "-m", "IPython", "--no-term-title", *script(
        "%remote_exec -k k=python3 print(os.getpid(), flush=True); import time; time.sleep(99)")],
        stdout=subprocess.PIPE, text=True, cwd=str(HERE))
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert gone(pid)
    for left in pathlib.Path("/dev/shm").glob(f"rexec-{process.pid}-*"):
        shutil.rmtree(left)
    before = files()
    done = ipython(*script(
        "%config RemoteExecMagics.startup_timeout = 5", "%remote_exec -k k=python3 print(6 * 7)",
        "%config RemoteExecMagics.startup_timeout = 0.01", "%remote_exec -k m=python3 print(2)"))
    assert done.stdout.startswith("42\n") and files(done.pid) <= before
    assert "not ready after 0.01 s" in done.stdout + done.stderr


def test_terminal():
    """The prompt, Ctrl-C, questions, the status line in place, mistakes and the exit."""
    import pexpect
    child = pexpect.spawn(sys.executable, [
        "-m", "IPython", "--simple-prompt", "--colors=NoColor", "--no-banner"],
        encoding="utf-8", timeout=30, cwd=str(HERE))
    for number, (code, *dialogue) in enumerate([
        ("%load_ext remote_exec",),
        ("%remote_exec -k k=python3 print('be' + 'gun'); import time; time.sleep(60)", "begun",
         child.sendintr, "KeyboardInterrupt: k stopped\r\n"),
        ("%remote_exec -k k n = input('who' + '? ')", r"\r\nwho\? ", lambda: child.sendline("me")),
        ("%remote_exec -k k,m=python3 print('n' in dir() and n * 2); import time; time.sleep(4); "
         "print('ov' + 'er')", "meme", r"\rwaiting for k, m \(\d s\)\x1b\[K", r"\r\x1b\[K", "over"),
        ("%remote_exec nonsense", "UsageError: -k"),
        ("exit", lambda: child.expect(pexpect.EOF))], 1):
        child.expect(fr"In \[{number}\]: ")
        child.sendline(code)
        for each in dialogue:
            child.expect(each) if each is pexpect.EOF or isinstance(each, str) else each()
            assert "Traceback" not in child.before and "remote_exec.py" not in child.before
    assert "rror" not in child.before


# ---- far kernels ----------------------------------------------------------

def sshpyk(host, **config):
    """The metadata of a kernelspec for an ssh host."""
    return {"kernel_provisioner": {"provisioner_name": "sshpyk-provisioner", "config": {
        "ssh_host_alias": host, "remote_python": sys.executable, "remote_kernel_name": "python3",
        **config}}}


@pytest.fixture
def far_specs(spec):
    """Kernelspecs of the second host: sshpyk's and remote_ikernel's."""
    spec("sshpyk-far", interrupt_mode="message", metadata=sshpyk(SSH_HOST))
    spec("rik-far", sys.executable, "-m", "remote_ikernel", "--interface", "ssh", "--host",
         SSH_HOST, "--workdir", "/tmp", "--kernel_cmd",
         f"{sys.executable} -m ipykernel_launcher -f {{host_connection_file}}",
         "{connection_file}")


@over_ssh
@far
@newest  # sshpyk needs a newer jupyter_client than the floor
@pytest.mark.parametrize("name", ["sshpyk-far", "rik-far"])
def test_far_kernel(session, far_specs, name):
    session.ok(f"-k a,far={name}:/usr -o where,pid,x", (
        "import numpy as np\nwhere, pid, x = os.getcwd(), os.getpid(), np.arange(1e6)"))
    assert session.far.where == "/usr" and session.far.x[-1] == 999999
    session.interrupted("-k far", "import time; y = 3; time.sleep(60)", presses=[1])
    session.ok("-k far -o y")
    # (so long that it is just being asked whether it lives when all has come)
    session.ok("-k far -o x -b import time; time.sleep(1.05); x = 6")
    assert session.far.x == 6
    if name == "sshpyk-far":
        assert session.fails("-k far os.kill(os.getpid(), 9)")["far"].ename == "DeadKernelError"
        pids = session.far.pid, pid_of(session, "far")
        os.kill(pids[1], 9)  # the second host shares this one's process table
        assert all(map(gone, pids))
        assert session.magics.kernels["far"].sockets["monitor"].poll(5000)  # the tunnel tells
        session.ok("-k far -o x x = 5")
        assert "started anew" in session.err
    pid = pid_of(session, "far")
    session.ok("-k far -s")
    assert gone(pid)


@over_ssh
@far
@newest
@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.77"])  # unknown, refused
def test_far_kernel_that_cannot_start(session, spec, host):
    spec("nowhere", metadata=sshpyk(host, raise_on_ssh_config_error=False))
    failures = session.fails("-k nowhere=nowhere 1")
    assert host in failures["nowhere"].evalue and not session.magics.kernels["nowhere"].launched
    session.ok("-k nowhere=python3 1")


@over_ssh
@far
@newest
@pytest.mark.skipif(not SSH_LINK, reason="no link to cut: REMOTE_EXEC_SSH_LINK")
def test_network_outage(session, far_specs, told):
    """Without a network -t and Ctrl-C work, and a result arrives."""
    session.ok("-k far=sshpyk-far,late=sshpyk-far,stopped=sshpyk-far 1")
    def cut(begin, end):
        return subprocess.Popen(["sh", "-c", f"sleep {begin}; ip link set {SSH_LINK} down; "
                                             f"sleep {end}; ip link set {SSH_LINK} up"])
    away = cut(1, 12)
    try:
        failures = session.fails("-k late -t 2 import time; time.sleep(4); x = 7")
        assert failures["late"].ename == "TimeoutError" and session.took < 12
        session.interrupted("-k stopped import time; time.sleep(4); x = 7", presses=[1, 1])
        assert "late is still busy" in session.misused("-k late,far 1")
        session.ok("-k far -o x import time; time.sleep(3); x = 7")
    finally:
        away.wait()
    assert session.far.x == 7
    assert any("late does not answer since" in text for text in told)
    away = cut(0, 3)
    try:
        assert session.interrupted("-k stopped -s", presses=[1]) == "stopped not waited for"
    finally:
        away.wait()


@over_ssh
@far
@newest
def test_end_over_ssh(far_specs):
    done = ipython(*script(
        "%remote_exec -k far=sshpyk-far,near=python3,queue=rik-far -o pid pid = os.getpid()",
        "try:", "    %remote_exec -k far -t 1 import time; time.sleep(60)",
        "except Exception: pass",
        "import time; print(far.pid, near.pid, queue.pid, time.time())"))
    ended = time.time()
    *pids, last = done.stdout.splitlines()[-1].split()
    assert ended - float(last) < 4
    assert all(gone(int(pid)) for pid in pids)


@over_ssh
@far
@newest
def test_killed_tunnel(session, far_specs):
    session.ok("-k far=sshpyk-far -o pid pid = os.getpid()")
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; ssh -O exit {SSH_HOST}"],
                              stderr=subprocess.DEVNULL)
    session.run("-k far -o x -t 60 import time; time.sleep(4); x = 7")
    killer.wait()
    assert session.error is None and session.far.x == 7 or (
        session.error.failures["far"].ename == "LostReplyError"), session.error
    session.ok("-k far -o x")
    assert session.far.x == 7


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    """The kernelspec of gateway-provisioners for the second host. They read none of ssh's
    configuration but keys and known hosts, and refuse the user root."""
    install = shutil.which("jupyter-ssh-spec", path=os.path.dirname(sys.executable))
    if not install:
        pytest.skip("no gateway_provisioners")
    ssh = dict(line.split(" ", 1) for line in reversed(subprocess.run(
        ["ssh", "-G", SSH_HOST], capture_output=True, text=True).stdout.splitlines()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((ssh["hostname"], 9))  # sends nothing
        here = probe.getsockname()[0]
    keys = tmp_path / ".ssh"
    keys.mkdir()
    for kind in ("rsa", "ecdsa", "ed25519"):  # whatever it is
        (keys / f"id_{kind}").write_text(pathlib.Path(ssh["identityfile"]).read_text())
    (keys / "known_hosts").write_bytes(subprocess.run(
        ["ssh-keyscan", "-p", ssh["port"], ssh["hostname"]], capture_output=True).stdout)
    for name, value in dict(HOME=tmp_path, JUPYTER_PATH=tmp_path / "share/jupyter",
                            KERNEL_USERNAME="me", GP_RESPONSE_IP=here, GP_SSH_PORT=ssh["port"],
                            GP_REMOTE_USER=ssh["user"], GP_KERNEL_LOG_DIR=tmp_path).items():
        monkeypatch.setenv(name, str(value))
    subprocess.run([install, "install", f"--prefix={tmp_path}", "--kernel-name=gateway",
                    f"--remote-hosts={ssh['hostname']}"], check=True, capture_output=True)
    spec = tmp_path / "share/jupyter/kernels/gateway/kernel.json"
    spec.write_text(spec.read_text().replace('"python",', f'"{sys.executable}",', 1))


@over_ssh
@far
@newest
def test_gateway_provisioners(session, gateway):
    session.ok("-k a,g=gateway:/usr,h=gateway -o where,ip", (
        "import subprocess\n"
        "where, ip = os.getcwd(), subprocess.check_output(['hostname', '-I'])"))
    assert session.g.where == "/usr" and session.g.ip == session.h.ip != session.a.ip
    assert session.interrupted("-k g,h", "import time; y = 3; time.sleep(60)", presses=[1]) == (
        "g, h stopped")
    session.ok("-k g,h -o y")
    session.ns["fate"] = {"g": "os.kill(os.getpid(), 9)", "h": "x = 4"}
    failures = session.fails("-k g,h -i fate -o x {fate}")
    assert failures["g"].ename == "DeadKernelError" and session.h.x == 4
    session.ok("-k g -o x x = 5")
    session.ok("-k g,h -s -o x x = 6")
    assert session.g.x == session.h.x == 6
    session.ok("-k g,h -s")


# ---- old Pythons ----------------------------------------------------------

OLD = {"2.7": ["ipykernel<5", "numpy"],
       "3.6": ["ipykernel<6", "numpy<1.20", "--python-version=3.6", "--only-binary=:all:"],
       "3.8": ["ipykernel<6.30", "numpy<1.25"]}


@pytest.fixture(scope="module")
def installs(tmp_path_factory):
    """By version: (interpreter, folder of its packages, the pip that fills it)."""
    found, pyenv = {}, pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for version in OLD:
        folder = str(tmp_path_factory.mktemp(f"python{version}"))
        for python in sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")))[-1:]:
            # the pip of 3.6 does not heed which Python a package is for
            found[version] = python, folder, subprocess.Popen(
                [sys.executable if version == "3.6" else python, "-m", "pip", "install", "-q",
                 "--no-compile", "--target", folder, *OLD[version]], stderr=subprocess.DEVNULL)
    yield found
    for _, _, pip in found.values():
        pip.kill()
        pip.wait()


@newest
@pytest.mark.xdist_group("old")
@pytest.mark.parametrize("version", OLD)
def test_old_pythons(session, spec, version, installs):
    if version not in installs:
        pytest.skip(f"no Python {version} (pyenv)")
    python, folder, pip = installs[version]
    assert pip.wait(120) == 0
    spec("old", python, *LAUNCH[1:], env={"PYTHONPATH": folder})
    session.ns.update(text="h\xe9", array=np.arange(3e5), n=[1, 2.5, None])
    session.ok("-k old -p text,array,n -o version,s,array,n,text,one,two", (
        "import sys\nversion = sys.version_info[:2]\ns = 'plain'\narray[0] = 5\nprint(n)\n"
        "one = [n]; two = [n]"))
    old = session.old
    assert ".".join(map(str, old.version)) == version and session.out == "[1, 2.5, None]\n"
    assert (old.s, old.text, old.n) == ("plain", "h\xe9", [1, 2.5, None])
    assert old.array.dtype == float and old.array.flags.writeable and old.array[0] == 5
    assert old.one[0] is old.two[0] is old.n
    session.interrupted("-k old -i press,wait {press}; {wait}")
    session.ok("-k old -o s -s s = 2")


# ---- the documents --------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_documents_agree():
    assert len(re.search(r"```sh\n(.*?)```", README, re.S).group(1).strip().splitlines()) == 2
    for option in ("kernels", "output", "input", "push", "shutdown", "timeout", "background",
                   "list"):
        assert f"--{option}" in README and f"--{option}" in rx.RemoteExecMagics.remote_exec.__doc__


@newest  # tracebacks and numbers looked different
def test_readme_shows_what_happens(tmp_path):
    """Each Python block is run as a cell; what stands below it is what shows under it in
    the end, lines of several kernels in any order."""
    (tmp_path / "a.txt").write_text("1 2\n3 4\n")
    (tmp_path / "b.txt").write_text("5 6\n7 8\n")
    notebook, cells = Notebook(), []
    notebook.run("%unload_ext remote_exec")
    for code, expected in re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", README, re.S):
        code = code.replace("/data/run7", str(tmp_path)).replace("/scratch", str(tmp_path))
        cell = notebook.start(code)
        notebook.end(cell, ["me", "me"])
        cells.append((cell, code, expected, [f"{prompt}me" for prompt in notebook.prompts]))
    for cell, code, expected, shown in cells:
        displays = {}  # updated in place
        for number, content in enumerate(contents(
                notebook.under(cell), "stream", "error", "display_data", "update_display_data",
                "execute_result")):
            displays[content.get("transient", {}).get("display_id", number)] = "\n".join([
                content.get("text", ""), *content.get("traceback", []),
                content.get("data", {}).get("text/plain", "")])
        shown = re.sub(r"\x1b\[[\d;]*m", "", "\n".join([*displays.values(), *shown]))
        shown = re.sub(r"(?s)(kernelspecs:\n).*", r"\1  python3", shown)
        shown = re.sub(r"since \d\d:\d\d:\d\d", "since 12:00:00", shown)
        assert sorted(filter(str.strip, shown.split("\n"))) == sorted(
            filter(str.strip, expected.split("\n"))), code
    notebook.close()


# ---- figures --------------------------------------------------------------

def side_by_side(ours, theirs, times=15, release=lambda: None):
    """(seconds ours takes, how many times as fast as theirs): medians of pairs. What the last
    one made is released first: ipyparallel keeps it, in cycles, and would not pay for that.
    A function may return the seconds to count instead of all that it took."""
    pairs = []
    for _ in range(times):
        spent = []
        for function in (ours, theirs):
            release()
            gc.collect()
            begin = time.perf_counter()
            counted = function()
            spent.append(counted if isinstance(counted, float) else time.perf_counter() - begin)
        pairs.append(spent)
    return (statistics.median(mine for mine, _ in pairs),
            statistics.median(other / mine for mine, other in pairs))


def figure(what, seconds, ratio=None, than="", megabytes=None):
    speed = f"{megabytes / seconds:5.0f} MB/s" if megabytes else f"{seconds * 1e3:5.1f} ms"
    print(f"\n{what:44} {speed:12}", f"{ratio:5.2f} {than}" if ratio else "", end="")


@contextlib.contextmanager
def engine(*arguments):
    """A view of the one engine of an ipyparallel cluster."""
    import ipyparallel
    with ipyparallel.Cluster(n=1, log_level=40, controller_args=list(arguments)) as client:
        client.wait_for_engines(1, timeout=60)
        yield client[0]


ARRAY = "import numpy as np; x = np.random.default_rng(0).random({} * 125_000)"
THINGS = {
    "a frame of 200,000 rows with text": (
        "import pandas as pd, numpy as np; x = pd.DataFrame({'v': np.arange(2e5), "
        "'s': ['row %d' % i for i in range(200000)], "
        "'d': pd.date_range('2020', periods=200000, freq='s')})"),
    "a dict of 10,000 arrays of 100": (
        "import numpy as np; x = {i: np.full(100, i) for i in range(10000)}"),
    "a list of 100,000 records": (
        "x = [{'n': i, 'name': str(i), 'v': i / 7} for i in range(100000)]"),
    "50 MB of bytes": "import os; x = os.urandom(50_000_000)",
    "a matplotlib figure": (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt; "
        "x, axes = plt.subplots(); _ = axes.plot(range(10000)); plt.close()"),
}


@bench
@pytest.mark.parametrize("how, settings, arguments", [
    ("out of the box", {}, []),
    ("nobody can listen in", {}, ["--IPController.enable_curve=True"]),
    ("over encrypted TCP", {"transport": "tcp"}, ["--IPController.enable_curve=True"])])
def test_bench_ipyparallel(session, how, settings, arguments):
    session.shell.config.KernelManager.update(settings)
    session.ok("-k n=python3 1;")
    for name in settings:
        del session.shell.config.KernelManager[name]
    with engine(*arguments) as view:
        def pull():
            session.ns["pulled"] = view["x"]

        def release():
            vars(session.n).clear()
            session.ns["pulled"] = None
            view.client.purge_local_results("all")
        for size in (10, 100, 400) if not arguments else (100,):
            session.ok(f"-k n {ARRAY.format(size)}")
            view.execute(ARRAY.format(size), block=True)
            session.ok("-k n -o x")
            session.ns["x"] = session.ns["n"].x
            seconds, ratio = side_by_side(  # all of it read once: ours is mapped
                lambda: (session.ok("-k n -o x"), session.n.x.sum()),
                lambda: (pull(), session.pulled.sum()), release=release)
            figure(f"-o of {size} MB, {how}", seconds, ratio, "times ipyparallel's speed", size)
            seconds, ratio = side_by_side(
                lambda: session.ok("-k n -p x"),
                lambda: view.push({"x": session.ns["x"]}, block=True))
            figure(f"-p of {size} MB, {how}", seconds, ratio, "times ipyparallel's speed", size)
        for what, code in THINGS.items() if not arguments else ():
            session.ok(f"-k n {code}")
            view.execute(code, block=True)
            seconds, ratio = side_by_side(
                lambda: session.ok("-k n -o x"), pull, release=release)
            figure(f"-o of {what}", seconds, ratio, "times ipyparallel's speed")
    session.ok("-k n -s")


@bench
def test_bench_round_trip(session, tmp_path):
    with others_kernel(transport="ipc", ip=str(tmp_path / "s")) as (_, client):
        def bare():  # until the reply; the kernel is to be idle again when the next one counts
            begin = time.perf_counter()
            client.execute("x = 1", reply=True, timeout=10)
            spent = time.perf_counter() - begin
            while client.get_iopub_msg(timeout=10)["content"].get("execution_state") != "idle":
                pass
            return spent
        seconds, ratio = side_by_side(lambda: session.ok("-k a -o x x = 1"), bare, 100)
    figure("a cell that returns one value", seconds, 1 / ratio, "times a bare client's execute")
    for many in (8, 20, 40):
        session.ns["many"] = [f"n{i}=python3" for i in range(many)]
        session.ok("-k {many}")
        busy = []

        def ours():
            begin = time.process_time()
            session.ok("-k {many} -o x x = 1")
            busy.append((time.process_time() - begin) * 1e3 / many)
        seconds, ratio = side_by_side(ours, lambda: session.ok("-k a -o x x = 1"), 20)
        figure(f"the same on {many} kernels at once", seconds, 1 / ratio, "times one kernel's; "
               f"{statistics.median(busy):.1f} ms of this process's CPU a kernel")
    session.ok("-k {many} -s")


@bench
def test_bench_a_hundred_kernels(session):
    resource.setrlimit(resource.RLIMIT_NOFILE, (  # as is usual
        1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    session.ns["hundred"] = [f"n{i}=python3" for i in range(100)]
    for what, line in (("start 100 kernels", "-k {hundred}"),
                       ("a cell on 100 kernels", "-k {hundred} -o x x = 1"),
                       ("stop 100 kernels", "-k {hundred} -s")):
        begin = time.perf_counter()
        session.ok(line)
        figure(what, time.perf_counter() - begin)


@over_ssh
@far
@bench
def test_bench_ssh(session, far_specs, tmp_path):
    session.ok("-k far=sshpyk-far import numpy as np; "
               "x = np.frombuffer(os.urandom(200_000_000), 'u1').copy()")
    (tmp_path / "x").write_bytes(os.urandom(200_000_000))
    seconds, ratio = side_by_side(lambda: session.ok("-k far -o x"), lambda: subprocess.run(
        ["scp", "-q", f"{SSH_HOST}:{tmp_path}/x", f"{tmp_path}/y"], check=True), 5)
    figure("-o of 200 MB over ssh", seconds, ratio, "times as fast as scp", 200)
    seconds, ratio = side_by_side(lambda: session.ok("-k far -o y y = 1"),
                                  lambda: session.ok("-k a -o y y = 1"), 50)
    figure("a cell that returns one value over ssh", seconds, 1 / ratio, "times a local kernel's")
    session.ok("-k far -s")
