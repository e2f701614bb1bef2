"""Tests of remote_exec, on real kernels.

``python -m pytest`` runs all that the machine can; ``-m bench -s`` prints the
figures. REMOTE_EXEC_SSH_HOST names a host that ssh reaches without a password
and where this Python stands at the same path: the tests over ssh use it.
REMOTE_EXEC_SSH_LINK is the network device that leads there, to be cut.
"""
import contextlib
import json
import os
import pathlib
import pickle
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel
from jupyter_core.paths import jupyter_runtime_dir

import remote_exec as rx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RUNTIME = tempfile.TemporaryDirectory()  # what appears there is ours, whoever else runs
os.environ["JUPYTER_RUNTIME_DIR"] = RUNTIME.name
HERE = pathlib.Path(__file__).parent
SSH_HOST = os.environ.get("REMOTE_EXEC_SSH_HOST")
SSH_LINK = os.environ.get("REMOTE_EXEC_SSH_LINK")
with warnings.catch_warnings():  # there is no file to register marks in
    warnings.simplefilter("ignore")
    newest, marked_bench = pytest.mark.newest, pytest.mark.bench
over_ssh = pytest.mark.skipif(not SSH_HOST, reason="no second host: REMOTE_EXEC_SSH_HOST")


def bench(test):
    """Marks a benchmark, which runs where it is asked for by its mark."""
    return marked_bench(pytest.mark.skipif(
        "bench" not in sys.argv, reason="figures: pytest -m bench -s")(test))


# ---- the shell under test -------------------------------------------------

class Session:
    """An in-process IPython with the extension loaded."""

    def __init__(self):
        self.shell = InteractiveShell.instance()
        self.shell.extension_manager.load_extension("remote_exec")

    @property
    def magics(self):
        return self.shell.magics_manager.registry["RemoteExecMagics"]

    @property
    def ns(self):
        return self.shell.user_ns

    def run(self, line, cell=None):
        """Run the magic; what it showed, and its exception, if any."""
        os.environ.pop("PYTEST_CURRENT_TEST", None)  # ipykernel changes under it
        error = None
        with capture_output() as shown:
            try:
                if cell is None:
                    self.shell.run_line_magic("remote_exec", line)
                else:
                    self.shell.run_cell_magic("remote_exec", line, cell)
            except (Exception, KeyboardInterrupt) as raised:
                error = raised
        self.out, self.err, self.displays = shown.stdout, shown.stderr, shown.outputs
        self.error = error
        return self

    def ok(self, line, cell=None):
        self.run(line, cell)
        if self.error:
            raise self.error
        return self

    def fails(self, line, cell=None):
        self.run(line, cell)
        assert isinstance(self.error, rx.RemoteError), repr(self.error)
        return self.error.failures

    def misused(self, line, cell=None):
        self.run(line, cell)
        assert isinstance(self.error, UsageError), repr(self.error)
        assert "\n" not in str(self.error)
        return str(self.error)


@pytest.fixture(scope="module")
def everything():
    session = Session()
    yield session
    session.shell.extension_manager.unload_extension("remote_exec")


@pytest.fixture
def session(everything):
    """The session, with the long-lived kernels `a` and `b` started."""
    everything.ok("-k a=python3,b=python3")
    return everything


def pid_of(session, name):
    session.ok(f"-k {name} -o pid pid = os.getpid()")
    return session.ns[name].pid


def gone(pid, seconds=15):
    """Whether the process ends within so many seconds."""
    for _ in range(seconds * 20):
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def install_spec(tmp_path, monkeypatch, name, argv, **more):
    """A kernelspec for this test only."""
    folder = tmp_path / "jupyter" / "kernels" / name
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(
        dict(argv=argv, display_name=name, language="python", **more)))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A kernelspec of this Python that declares no encryption."""
    install_spec(tmp_path, monkeypatch, "plain", [
        sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def memory():
    """Bytes that new processes may take, as far as the system tells."""
    found = re.search(r"MemAvailable: +(\d+)", pathlib.Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024


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
    ("-l", {"l": ""}, ""),
])
def test_line(line, options, code):
    assert rx.parse_line(line) == (options, code)


def test_targets():
    assert rx.parse_targets(["a", "b=py:/x:y", "c:~/d e"]) == [
        ("a", "", ""), ("b", "py", "/x:y"), ("c", "", "~/d e")]


@pytest.mark.parametrize("wanted, found", [
    ("python3", "python3"), ("julia", "julia-1.9"), ("my_host", "ssh-my.host-py"),
    ("Julia", "julia-1.9"), ("r_py", "rik_ssh_r.two_py")])
def test_spec(wanted, found):
    specs = ["python3", "python3-b", "julia-1.9", "ssh-my.host-py", "rik_ssh_r.two_py"]
    assert rx.match_spec(wanted, specs) == found


def test_spec_candidates():
    with pytest.raises(UsageError, match="ssh-a, ssh-b"):
        rx.match_spec("ssh", ["ssh-b", "ssh-a", "python3"])
    with pytest.raises(UsageError, match="python3, "):
        rx.match_spec("pyton3", ["bash", "python3", "zsh"])


@given(st.text(), st.dictionaries(st.sampled_from(["a", "b_1", "xyz"]), st.text()))
def test_substitution_is_one_exact_pass(code, values):
    expected, rest = "", code
    while rest:
        for name, value in values.items():
            if rest.startswith("{%s}" % name):
                expected, rest = expected + value, rest[len(name) + 2:]
                break
        else:
            expected, rest = expected + rest[0], rest[1:]
    assert rx.substitute(code, "k", values) == expected


@given(st.text(min_size=1))
def test_any_line_is_parsed_or_refused(line):
    try:
        options, code = rx.parse_line(line)
    except UsageError as error:
        assert "\n" not in str(error) or "\n" in line
    else:
        assert line.rstrip().endswith(code.rstrip())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["status", "ename", "traceback", "text", "name", "data", "payload",
                         "execution_state", "remote_exec", "prompt", "user_expressions"]),
        inner, max_size=4), max_leaves=8)


class FakeKernel:
    """What `Request.hear` needs to know of a kernel; nothing is waited for."""
    name = "a"
    client = type("Client", (), {"session": type("Session", (), {"session": "me"})})


def request_without_kernel():
    request = rx.Request(FakeKernel(), rx.Screen(InteractiveShell.instance(), True))
    request.msg_id = "mine"
    return request


def message(kind, content, parent="mine"):
    return {"msg_type": kind, "content": content, "buffers": [],
            "parent_header": {"msg_id": parent, "session": "me"}}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(
    st.sampled_from(["shell", "iopub", "stdin", "control"]),
    st.sampled_from(["execute_reply", "status", "stream", "display_data", "error", "comm_msg",
                     "input_request", "clear_output", "interrupt_reply", "what_is_this"]),
    anything, st.sampled_from(["mine", "other", None, 3])), max_size=8))
def test_hostile_messages(stream):
    with capture_output():
        request = request_without_kernel()
        for channel, kind, content, parent in stream:
            request.hear(channel, message(kind, content, parent))
        request.hear("iopub", message("status", {"execution_state": "idle"}))
        request.hear("shell", message("execute_reply", {"status": "ok"}))
    assert request.done
    assert request.failure is None or isinstance(request.failure, rx.Failure)


def test_messages_of_others_change_nothing():
    request = request_without_kernel()
    request.hear("shell", message("execute_reply", {"status": "error"}, "other"))
    request.hear("iopub", message("status", {"execution_state": "idle"}, "other"))
    request.hear("iopub", message("status", {"execution_state": "idle"}, None))
    request.hear("shell", message("execute_reply", {"status": "ok"}, None))
    request.hear("iopub", message("comm_msg", {"data": {"remote_exec": []}}, "other"))
    assert not request.done and request.outputs is None and request.failure is None
    request.hear("iopub", message("comm_msg", {"comm_id": "widget", "data": {"method": "x"}}))
    assert request.outputs is None
    request.hear("iopub", message("status", {"execution_state": "idle"}))
    assert not request.done
    request.hear("shell", message("execute_reply", {"status": "ok"}))
    request.hear("shell", message("execute_reply", {"status": "error", "ename": "again"}))
    assert request.done and request.failure is None


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab\r\n é", max_size=12), max_size=12))
def test_labelled_lines(chunks):
    screen = rx.Screen(InteractiveShell.instance(), True)
    with capture_output() as shown:
        screen.file = sys.stdout
        for chunk in chunks:
            screen.stream("k", "stdout", chunk)
        screen.finish("k")
    text = "".join(chunks)
    assert shown.stdout.replace("[k] ", "").rstrip("\n") == text.rstrip("\n")
    for line in re.split(r"[\r\n]+", shown.stdout):
        assert not line or line.startswith("[k] ")


def test_progress_bars_take_turns():
    """Two bars don't make a line of each of their states, and both ends are there."""
    screen = rx.Screen(InteractiveShell.instance(), True)
    with capture_output() as shown:
        screen.file = sys.stdout
        for percent in range(100):
            for name in "ab":
                screen.stream(name, "stdout", f"\r{percent} %")
        screen.stream("b", "stdout", "\n")
        screen.finish("a")
    assert shown.stdout.count("\n") < 10
    assert "[a] 99 %\n" in shown.stdout and "[b] 99 %\n" in shown.stdout


# ---- the promise ----------------------------------------------------------

def test_readme_story(session, tmp_path):
    for name, numbers in (("a", "1 2\n3 4\n"), ("b", "5 6\n7 8\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(numbers)
    session.ns["filenames"] = {"a": "a.txt", "b": "b.txt"}
    session.ns["factor"] = 10
    session.ok(f"-k a:{tmp_path}/a,b:{tmp_path}/b -i filenames,factor -o x,y",
               "import numpy as np\nx, y = np.loadtxt('{filenames}').T * {factor}")
    assert session.ns["a"].x.tolist() == [10, 30] and session.ns["b"].y.tolist() == [60, 80]
    session.ok("-k a -o where where = os.getcwd(); pickle")
    assert session.ns["a"].where == f"{tmp_path}/a"
    assert repr(session.ns["a"]).startswith("<kernel a (python3):")
    assert set(dir(session.ns["a"])) == set(vars(session.ns["a"])) >= {"x", "y", "where"}
    with pytest.raises(AttributeError, match="no variable 'nope'.*x, y"):
        session.ns["a"].nope  # noqa: B018


def test_far_namespace_gains_nothing_else(session):
    session.ns["gift"] = [1]
    session.ok("-k fresh=python3 -p gift -o names names = sorted(n for n in dir() if n[0] != '_')")
    assert set(session.ns["fresh"].names) - {
        "In", "Out", "exit", "quit", "get_ipython", "open"} == {"gift", "os", "pickle"}
    session.ok("-k fresh -s")


def test_at_the_same_time(session):
    session.ok("-k c=python3,d=python3")
    begin = time.monotonic()
    session.ok("-k a,b,c,d import time; time.sleep(1.5)")
    assert 1.5 <= time.monotonic() - begin < 3
    session.ok("-k c,d -s")


def test_directories_with_any_characters(session, tmp_path):
    odd = tmp_path / "a b'\"{x}:$HOME"
    odd.mkdir()
    session.ns["names"] = [f"a:{odd}", "b:~"]
    session.ok("-k {names} -o d d = os.getcwd()")
    assert session.ns["a"].d == str(odd)
    assert session.ns["b"].d == os.path.expanduser("~")
    session.ok("-k a:$HOME -o d d = os.getcwd()")
    assert session.ns["a"].d == os.path.realpath(os.environ["HOME"])


def test_code_is_verbatim(session):
    session.ns["tricky"] = r"\1 \g<0> {other}"
    session.ok("-k a -i tricky -o s s = r'''{tricky} {not} $HOME \\n'''")
    assert session.ns["a"].s == r"\1 \g<0> {other} {not} $HOME \n"
    session.ok("-k a -o s s = 1", "s += 1")
    assert session.ns["a"].s == 2


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
])
def test_misuse(session, line, culprit):
    import threading
    session.shell.run_cell("class Proxy:\n    def __getattr__(self, name): return 1 / 0")
    session.ns.update(partial={"a": 1}, lock=threading.Lock(), proxy=session.ns["Proxy"]())
    before = dict(session.magics.kernels), set(session.ns)
    assert culprit in session.misused(line)
    assert before == (dict(session.magics.kernels), set(session.ns))


def test_all_or_nothing_before(session):
    session.ok("-k a,b marker = 0")
    failures = session.fails("-k a,b:/no/such/dir marker = 1")
    assert list(failures) == ["b"] and "/no/such/dir" in failures["b"].evalue
    session.ok("-k a -o marker")
    assert session.ns["a"].marker == 0


def test_each_alone_after(session):
    session.ns["fate"] = {"a": "1/0", "b": "pass"}
    failures = session.fails("-k a,b -i fate -o v", "v = 6\n{fate}")
    assert list(failures) == ["a"] and failures["a"].ename == "ZeroDivisionError"
    assert "v" not in vars(session.ns["a"]) and session.ns["b"].v == 6


def test_shutdown_and_restart(session):
    session.ok("-k c=python3")
    first = pid_of(session, "c")
    session.ok("-k c -s -o fresh fresh = 'pid' not in dir()")
    assert session.ns["c"].fresh and gone(first)
    second = pid_of(session, "c")
    session.ok("-k c,never -s")
    assert gone(second) and session.ns["c"].pid == second
    assert pid_of(session, "c") != second
    session.ok("-k c -s")


def test_kept_by_name(session):
    session.ok("-k a keep = 1")
    namespace = session.ns.pop("a")
    session.ok("-k a -o keep")
    assert session.ns["a"] is namespace


def test_labels_and_last_expression(session):
    session.ok("-k a,b", "print('one\\ntwo', end='')\n'expr'")
    assert sorted(re.findall(r"\[[ab]\] (?:one|two)\n", session.out)) == [
        "[a] one\n", "[a] two\n", "[b] one\n", "[b] two\n"]
    assert [d.data["text/plain"] for d in session.displays] == ["'expr'"] * 2
    session.ok("-k a", "print('x', end=''); import sys; print('e', file=sys.stderr)\n7;")
    assert session.out == "x" and session.err == "e\n" and not session.displays


def test_bash(session):
    subprocess.run([sys.executable, "-m", "bash_kernel.install", "--sys-prefix"], check=True)
    session.ok("-k shell=bash echo $((6*7))")
    assert session.out == "42\n"
    assert "bash" in session.misused("-k shell -o x x=1")
    assert "bash" in session.misused("-k shell:/tmp ls")
    assert "-s replaces" in session.misused("-k a=bash 1")
    session.ok("-k shell,a -s")


def test_names_survive_reload(session):
    namespace = session.ns["a"]
    pid = pid_of(session, "a")
    session.shell.extension_manager.reload_extension("remote_exec")
    assert gone(pid)
    session.ok("-k a=python3,b=python3 -o n n = 3")
    assert session.ns["a"] is namespace and namespace.n == 3


# ---- data -----------------------------------------------------------------

CELL_OF_DATA = """
import datetime, decimal, collections
import numpy as np, pandas as pd
Point = collections.namedtuple
values = dict(
    strided=np.arange(20.)[::3], zero=np.array(3.5), empty=np.zeros((0, 4)),
    fortran=np.asfortranarray(np.arange(12.).reshape(3, 4)),
    structured=np.array([(1, 2.5)], dtype=[('a', 'i4'), ('b', 'f8')]),
    objects=np.array([1, 'x', None], dtype=object), cube=np.ones((60, 60, 60)),
    none=None, nan=float('nan'), big=10**50, text='h\\u00e9 \\U0001f600', raw=bytes(range(256)),
    nested={'a': [1, (2, {3})]}, when=datetime.datetime(2020, 1, 2), money=decimal.Decimal('1.1'))
frame = pd.DataFrame({'s': ['a', 'b'], 'd': pd.to_datetime(['2020-01-01', '2021-01-01']),
                      'v': [1.5, 2.5]})
shared = np.zeros(100000); one = [shared]; two = [shared]
locals().update(values)
"""


def test_values(session):
    session.ok("-k a -o values,frame,one,two", CELL_OF_DATA)
    there, expected = session.ns["a"], {}
    exec(CELL_OF_DATA, expected)
    for name, value in expected["values"].items():
        got = there.values[name]
        assert type(got) is type(value)
        if isinstance(value, np.ndarray):
            assert got.dtype == value.dtype and got.flags.writeable
            np.testing.assert_array_equal(got, value)
        elif name != "nan":
            assert got == value
    assert there.frame.equals(expected["frame"])
    there.frame.loc[0, "v"] = 9
    assert there.one[0] is there.two[0]
    there.one[0][0] = 1


def test_push(session):
    session.ns.update(cube=np.arange(1e5), other="text")
    session.ok("-k a,b -p cube,other -o back,other cube[0] = 5; back = cube")
    assert session.ns["b"].back[0] == 5 and session.ns["b"].other == "text"
    assert session.ns["cube"][0] == 0
    session.ns["later"] = [1]
    session.ok("-k a -p later")
    session.ok("-k a -o later")
    assert session.ns["a"].later == [1]


def test_figure_and_records(session):
    session.ok("-k a -o figure,records,kinds", (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt, enum\n"
        "figure, axes = plt.subplots(); axes.plot([1, 2, 4]); plt.close()\n"
        "records = [{'n': i, 'name': str(i), 'set': {i}} for i in range(1000)]\n"
        "kinds = 1 + 2j, range(3), frozenset('ab'), Ellipsis, bytearray(b'x'), int"))
    there = session.ns["a"]
    assert there.figure.axes[0].lines[0].get_ydata().tolist() == [1, 2, 4]
    assert there.records == [{"n": i, "name": str(i), "set": {i}} for i in range(1000)]
    assert there.kinds == (1 + 2j, range(3), frozenset("ab"), Ellipsis, bytearray(b"x"), int)


def test_own_classes(session):
    session.ok("-k a -o thing,twice,point", (
        "import dataclasses\nclass Thing:\n    size = 3\nthing = Thing()\n"
        "twice = lambda x: 2 * x\n"
        "Point = dataclasses.make_dataclass('Point', ['x'], namespace={'__module__': '__main__'})\n"
        "point = Point(4)"))
    assert session.ns["a"].thing.size == 3 and session.ns["a"].twice(4) == 8
    assert session.ns["a"].point.x == 4
    session.shell.run_cell("def mine(x): return x + 1")
    session.ok("-k a -p mine -o got got = mine(1)")
    assert session.ns["a"].got == 2


def test_own_classes_without_cloudpickle(session):
    failures = session.fails("-k a -o thing,fine", "import sys; sys.modules['cloudpickle'] = None\n"
                             "class Thing: pass\nthing = Thing(); fine = '__main__'")
    session.ok("-k a del sys.modules['cloudpickle']")
    assert "thing" in failures["a"].evalue and "installing cloudpickle" in failures["a"].evalue
    assert session.ns["a"].fine == "__main__"


def test_each_output_alone(session):
    failures = session.fails("-k a,b -o good,lock,missing", (
        "import threading\ngood = 1\nlock = threading.Lock()"))
    assert list(failures) == ["a", "b"]
    assert "lock" in failures["a"].evalue and "'missing'" in failures["a"].evalue
    assert session.ns["b"].good == 1


def test_output_that_fails_here(session, tmp_path):
    (tmp_path / "only_there.py").write_text("class Thing: pass")
    failures = session.fails("-k a -o good,thing", (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import only_there; thing = only_there.Thing(); good = 2"))
    assert "thing" in failures["a"].evalue and "only_there" in failures["a"].evalue
    assert session.ns["a"].good == 2


def test_push_that_fails_there(session, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("class Thing: pass")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here
    session.ok("-k a,b marker = 0")
    session.ns["thing"] = only_here.Thing()
    failures = session.fails("-k a,b -p thing marker = 1")
    assert list(failures) == ["a", "b"] and "only_here" in failures["a"].evalue
    session.ok("-k a,b -o marker")
    assert session.ns["a"].marker == session.ns["b"].marker == 0


def test_versions_are_named():
    with pytest.raises(ValueError, match=r"with numpy 0\.1, loaded with .*numpy \d"):
        rx.unpack([b"cnumpy\nno_such_thing\n."], "numpy 0.1")


@pytest.mark.skipif(memory() < 10e9, reason="less than 10 GB of memory free")
def test_three_gigabytes(plain):
    """Whole, and no second copy of it in the local process."""
    done = ipython("-c", "\n".join([
        "%load_ext remote_exec",
        "def peak(): return int(re.findall('VmHWM:.*?([0-9]+)', open(status).read())[0]) * 1024",
        "import re; status = '/proc/self/status'",
        "%remote_exec -k k=plain -o small import numpy as np; small = np.ones(9)",
        "%remote_exec -k k x = np.zeros(3 * 2 ** 27, int); x[::2 ** 20] = range(384)",
        "before = peak()", "%remote_exec -k k -o x", "print((peak() - before) / k.x.nbytes)",
        "print(k.x.nbytes, k.x.flags.writeable, k.x[::2 ** 20].tolist() == list(range(384)))",
        "print(int(k.x.sum()))"]))
    used, size, writable, equal, total = done.stdout.split()
    assert (int(size), writable, equal) == (3 * 2 ** 30, "True", "True") and float(used) < 1.2
    assert int(total) == 384 * 383 // 2


def test_many(session):
    begin = time.monotonic()
    session.ok("-k a -o arrays," + ",".join(f"v{i}" for i in range(200)),
               "import numpy as np\narrays = [np.arange(10) for _ in range(20000)]\n"
               "for i in range(200): globals()['v%d' % i] = i")
    assert len(session.ns["a"].arrays) == 20000 and session.ns["a"].v199 == 199
    assert time.monotonic() - begin < 5


def test_one_request_a_cell(session):
    kernel = session.magics.kernels["a"]
    sent, original = [], kernel.send
    kernel.send = lambda channel, *rest, **more: (sent.append((channel, rest[0])),
                                                  original(channel, *rest, **more))[1]
    try:
        session.ok("-k a -o x x = 1")
        assert sent == [("shell", "execute_request")]
        session.ns["y"] = 1
        session.ok("-k a:/ -p y -o x x = y")
        assert sent == [("shell", "execute_request")] * 3
    finally:
        del kernel.send


# ---- faults ---------------------------------------------------------------

def interrupting(session, line, cell, *delays):
    """Run with a Ctrl-C after each of `delays` seconds."""
    script = "; ".join(f"sleep {delay}; kill -INT {os.getpid()}" for delay in delays)
    presser = subprocess.Popen(["sh", "-c", script])
    begin = time.monotonic()
    session.run(line, cell)
    took = time.monotonic() - begin
    try:
        presser.wait()
    except KeyboardInterrupt:
        pytest.fail(f"it was over before the Ctrl-C: {session.error!r}")
    return took


def test_interrupt(session):
    first, second = pid_of(session, "a"), pid_of(session, "b")
    slow, quick = ("a", "b") if first > second else ("b", "a")
    session.ns["slow"] = max(first, second)
    vars(session.ns[quick]).pop("fast", None)
    took = interrupting(session, "-k a,b -i slow -o fast", (
        "fast = 1; import time; state = 'kept'\nif os.getpid() == {slow}: time.sleep(60)"), 1)
    assert isinstance(session.error, KeyboardInterrupt) and took < 8
    assert slow in str(session.error)
    assert session.error._render_traceback_() == [f"KeyboardInterrupt: {session.error}"]
    assert session.ns[quick].fast == 1
    session.ok(f"-k {slow} -o state")
    assert session.ns[slow].state == "kept"


def test_second_interrupt_and_replacement(session):
    stubborn = "import time\nwhile True:\n  try: time.sleep(60)\n  except KeyboardInterrupt: pass"
    took = interrupting(session, "-k a", stubborn, 1, 2)
    assert isinstance(session.error, KeyboardInterrupt) and took < 8
    assert str(session.error) == "no kernel stopped; a still busy, -s replaces"
    assert "-s" in session.misused("-k a 1")
    session.ok("-k a -s -o x x = 1")
    assert session.ns["a"].x == 1


def test_interrupt_while_starting(session, tmp_path, monkeypatch):
    install_spec(tmp_path, monkeypatch, "sleeper", ["sleep", "1000"])
    took = interrupting(session, "-k sleeper", "1", 1)
    assert isinstance(session.error, KeyboardInterrupt) and took < 8
    assert "sleeper" not in session.magics.kernels


def test_interrupt_while_stopping(session):
    """A busy kernel with a thread that nobody ends; the prompt is back all the same."""
    session.ok("-k c=python3")
    pid = pid_of(session, "c")
    session.ok("-k c import threading, time; "
               "threading.Thread(target=time.sleep, args=(99,)).start()")
    took = interrupting(session, "-k c -s", None, 0.3)
    assert took < 4 and str(session.error) == "c not waited for"
    assert "c" not in session.magics.kernels and gone(pid)


def test_interrupt_while_outputs_travel(session, monkeypatch):
    """Ctrl-C when a reply has come, and its outputs have not."""
    session.ok("-k a,b import numpy as np; big = np.ones(30_000_000)")
    hear, travelling = rx.Request.hear_shell, []

    def press(request, *message):
        hear(request, *message)
        if not travelling:
            travelling.append(request.outputs is None)
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(rx.Request, "hear_shell", press)
    session.run("-k a,b -o big")
    monkeypatch.undo()
    assert travelling == [True] and isinstance(session.error, KeyboardInterrupt)
    session.ok("-k a,b -o small small = 1")
    assert session.ns["a"].small == session.ns["b"].small == 1


def test_two_interrupts_when_one_kernel_is_done(session, monkeypatch):
    """What the finished kernel returned, stays, though both come at that moment."""
    session.ns["nap"] = {"a": 0, "b": 60}
    vars(session.ns["a"]).pop("done", None)
    conclude, pressed = rx.Request.conclude, []

    def press(request, *rest):
        conclude(request, *rest)
        if request.outputs and not pressed:
            for _ in range(2):
                pressed.append(request.kernel.name)
                os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(rx.Request, "conclude", press)
    session.run("-k a,b -i nap -o done import time; time.sleep({nap}); done = 7")
    monkeypatch.undo()
    assert pressed == ["a", "a"] and str(session.error) == (
        "no kernel stopped; b still busy, -s replaces")
    assert session.ns["a"].done == 7
    session.ok("-k b -s")


def test_interrupt_while_loading_here(session):
    """Ctrl-C ends slow unpickling at once, and what is fetched one by one."""
    session.ok("-k a", "class Slow:\n"
               "    def __reduce__(self): return __import__('time').sleep, (60,)")
    took = interrupting(session, "-k a -o slow slow = Slow()", None, 1)
    assert isinstance(session.error, KeyboardInterrupt) and took < 8
    session.ok("-k a", "class Bad:\n    def __reduce__(self): return eval, ('[][1]',)\n"
               "class Late:\n"
               "    def __reduce__(self): import time; time.sleep(.4); return int, ()\n"
               "bad = Bad()\nfor i in range(10): globals()['late%d' % i] = Late()")
    names = ",".join(f"late{i}" for i in range(10))
    took = interrupting(session, f"-k a -o bad,{names}", None, 5.2)  # of 8
    assert isinstance(session.error, KeyboardInterrupt) and took < 7.5
    session.ok("-k a -o x x = 1")


def test_timeout(session):
    session.ns["naps"] = {"a": "60", "b": "0"}
    failures = session.fails("-k a,b -i naps -t 1 -o x x = 1; import time; time.sleep({naps})")
    assert list(failures) == ["a"] and failures["a"].ename == "TimeoutError"
    assert session.error._render_traceback_()[-1] == (
        "TimeoutError: still busy after 1 s; interrupted")
    assert session.ns["b"].x == 1
    session.ok("-k a -o x")


def test_late_code_that_swallows_the_interrupt(session):
    failures = session.fails("-k a -t 1 -o swallowed", "import time\ntry: time.sleep(60)\n"
                             "except KeyboardInterrupt: swallowed = 1")
    assert failures["a"].ename == "TimeoutError" and "swallowed" not in vars(session.ns["a"])


def test_outputs_that_are_lost(session):
    """As when the connection breaks between them and the reply."""
    kernel = session.magics.kernels["a"]
    original = kernel.client.session.recv
    kernel.client.session.recv = lambda *args, **options: next(
        found for found in iter(lambda: original(*args, **options), 0)
        if found[1] is None or found[1]["msg_type"] != "comm_msg")
    try:
        failures = session.fails("-k a -o x x = 1")
    finally:
        del kernel.client.session.recv
    assert failures["a"].ename == "LostReplyError"
    session.ok("-k a -o x")


def test_namespace_can_be_copied(session):
    import copy
    session.ok("-k a -o x x = [1]")
    assert copy.copy(session.ns["a"]).x is session.ns["a"].x
    assert copy.deepcopy(session.ns["a"]).x == [1]


@pytest.mark.parametrize("death, cause", [
    ("os.kill(os.getpid(), 35)", "-35"),
    ("os._exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ("import ctypes; ctypes.string_at(0)", "SIGSEGV")])
def test_death(session, death, cause):
    session.ns["fate"] = {"a": death, "b": "pass"}
    begin = time.monotonic()
    failures = session.fails("-k a,b -i fate -o x", "x = 2\n{fate}")
    assert time.monotonic() - begin < 5
    assert failures["a"].ename == "DeadKernelError" and cause in failures["a"].evalue
    assert session.ns["b"].x == 2
    session.ok("-k a -o fresh fresh = 'x' not in dir()")
    assert session.ns["a"].fresh


def test_death_between_cells(session):
    pid = pid_of(session, "a")
    closed = session.magics.kernels["a"].sockets["closed"]
    os.kill(pid, signal.SIGKILL)
    assert gone(pid) and closed.poll(5000)
    session.ok("-k a -o x x = 4")
    assert session.ns["a"].x == 4
    assert re.fullmatch(r"a had died \(.*SIGKILL\) and is started anew\n", session.err)


@pytest.mark.parametrize("argv, cause", [
    (["/no/such/program"], "/no/such/program"),
    (["sh", "-c", "echo last words >&2; exit 7"], "exit code 7.*last words"),
    (["sleep", "1000"], "not ready after 4.5 s")])
def test_kernel_that_cannot_start(session, tmp_path, monkeypatch, argv, cause):
    install_spec(tmp_path, monkeypatch, "broken", argv)
    monkeypatch.setattr(session.magics, "startup_timeout", 4.5)
    told = []
    monkeypatch.setattr(rx.Screen, "status", lambda self, text, last=False: told.append(text))
    files = set(os.listdir(jupyter_runtime_dir()))
    failures = session.fails("-k a,broken -o x x = 1")
    assert list(failures) == ["broken"]
    assert re.search(cause, failures["broken"].evalue), failures
    assert argv[0] != "sleep" or told[1].startswith("starting broken ("), told
    assert "broken" not in session.magics.kernels and "broken" not in session.ns
    deadline = time.monotonic() + 10
    while set(os.listdir(jupyter_runtime_dir())) - files and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(os.listdir(jupyter_runtime_dir())) - files


def test_busy_is_not_dead(session, tmp_path, monkeypatch):
    """One kernel holds the GIL; the other one's heartbeat is silent, as those of
    other languages are while they work."""
    install_spec(tmp_path, monkeypatch, "mute", [sys.executable, "-c", (
        "from ipykernel.kernelapp import IPKernelApp as App; "
        "App.init_heartbeat = lambda app: None; App.launch_instance()"),
        "-f", "{connection_file}"])
    session.ns["work"] = {"a": "hold(12.5)", "mute": "time.sleep(12.5)"}
    told = []
    monkeypatch.setattr(rx.Screen, "status", lambda self, text, last=False: told.append(text))
    session.ok("-k a,mute -i work -o x", (
        "import ctypes, time\n"
        "def hold(seconds): ctypes.PyDLL(None).usleep(int(seconds * 1e6))\n"
        "x = 1\nbegin = time.time(); {work}; assert time.time() - begin > 12"))
    assert any("mute does not answer" in text for text in told)
    assert not any("a does not answer" in text for text in told)
    assert session.ns["a"].x == session.ns["mute"].x == 1
    session.ok("-k mute -s")


def test_floods(session):
    session.ok("-k a,b -o last", "for last in range(100000): print(last)")
    lines = session.out.splitlines()
    assert [line for line in lines if line.startswith("[a]")] == [
        f"[a] {i}" for i in range(100000)]
    assert len(lines) == 200000 and session.ns["b"].last == 99999
    session.ok("-k a -o i", "for i in range(5000): display(i)")
    assert [d.data["text/plain"] for d in session.displays] == [str(i) for i in range(5000)]


def test_code_that_cannot_be_sent(session):
    failures = session.fails("-k a,b print('\ud83d')")
    assert list(failures) == ["a", "b"] and failures["a"].ename == "UnicodeEncodeError"
    session.ok("-k a,b -o x x = 1")


def test_names_in_any_letters(session):
    session.ns["\u03bc"] = 2  # what Python makes of the micro sign
    session.ok("-k \xb5m=python3 -p \xb5 -i \xb5 -o \xb5 \xb5 += {\xb5}")
    assert vars(session.ns["\u03bcm"]) == {"\u03bc": 4}
    session.ok("-k \xb5m -s")


def test_strange_text(session):
    session.ok("-k a", "print('\\0 \\x1b[31mred\\x1b[0m \\U0001f600', 'x' * 10**6)")
    assert session.out == "\0 \x1b[31mred\x1b[0m \U0001f600 " + "x" * 10**6 + "\n"
    session.run("-k a print('\\ud800')")
    session.ok("-k a -o x x = 1")


@newest  # fifty kernels of Python 3.8 take a minute to start
def test_starts_and_stops_leak_nothing(session):
    import threading

    def state():
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(
            os.listdir(jupyter_runtime_dir()))
    names = ",".join(f"c{i}" for i in range(10))
    session.ns["targets"] = [f"c{i}=python3" for i in range(10)]
    states = []
    for _ in range(5):
        session.ok("-k {targets} 1")
        session.ok(f"-k {names} -s")
        states.append(state())
    assert all(last < first + 10 for first, last in zip(states[0], states[-1])), states


def test_connection_files_are_private(session):
    name = session.magics.kernels["a"].manager.connection_file
    assert os.stat(name).st_mode & 0o777 == 0o600
    assert os.path.dirname(name) == jupyter_runtime_dir()


@newest  # jupyter_client has no encryption on the floor
def test_strangers_hear_nothing(session):
    client = session.magics.kernels["a"].client
    assert client.curve_publickey
    with zmq.Context() as context, context.socket(zmq.SUB) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://{client.ip}:{client.iopub_port}")
        stranger.subscribe(b"")
        session.ok("-k a print('secret')")
        assert session.out == "secret\n" and not stranger.poll(1500)


def test_wrong_signature_is_ignored(session):
    kernel = session.magics.kernels["a"]
    key, kernel.client.session.key = kernel.client.session.key, b"wrong"
    interrupting(session, "-k a print(1)", None, 0.3, 0.3)
    kernel.client.session.key = key
    assert "1\n" not in session.out
    session.ok("-k a -s")


# ---- the feel -------------------------------------------------------------

def test_errors_are_the_far_traceback(session):
    session.fails("-k a 1/0")
    lines = session.error._render_traceback_()
    assert "ZeroDivisionError" in lines[-1] and "remote_exec" not in "\n".join(lines)
    session.fails("-k b,a 1/0")
    assert str(session.error) == "\n".join(
        f"{name}: ZeroDivisionError: division by zero" for name in "ba")
    lines = session.error._render_traceback_()
    assert lines.index("[b] ") < lines.index("[a] ")


def test_listing_and_completion(session):
    session.ok("-l")
    assert re.search(r"a +python3 +idle", session.out) and "kernelspecs:" in session.out
    for text, expected in (("-k ", "python3"), ("-k a,pyth", "python3"), ("-k z=pyth", "python3"),
                           ("--ker", "--kernels")):
        text = "%remote_exec " + text
        matches = session.shell.Completer.complete(line_buffer=text, cursor_pos=len(text))[1]
        assert expected in matches, (text, matches)


def test_attached_kernel(session):
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        file = os.path.basename(session.magics.kernels["a"].manager.connection_file)
        session.ok(f"-k far={manager.connection_file},again={file} -o x x = 11")
        assert session.ns["far"].x == session.ns["again"].x == 11
        session.ok("-k far,again -s")
        assert manager.is_alive()
        session.ok("-k far 1")
        manager.shutdown_kernel(now=True)
        assert session.magics.kernels["far"].sockets["closed"].poll(5000)
        assert "not started here" in session.fails("-k far 1")["far"].evalue
        assert "far" not in session.magics.kernels
        session.ok("-k a -o x")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@newest  # in the pickle of Python 3.8, too, but slower
def test_outputs_are_what_they_were(plain, session):
    """Another client's code, queued behind ours, changes the array at once."""
    manager, client = start_new_kernel(kernel_name="plain")
    try:
        file = manager.connection_file
        session.ok(f"-k one={file},two={file} import numpy as np; x = np.zeros(20_000_000)")
        session.ok("-k one,two -o x x += 1")
        for name in ("one", "two"):
            assert (session.ns[name].x == session.ns[name].x[0]).all()
        session.ok("-k one,two -s")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_function_locals(session):
    session.shell.run_cell(textwrap.dedent("""
        def function():
            local, text = [5], 'y'
            get_ipython().run_line_magic('remote_exec', '-k a -p local -i text -o {} y = local'
                                         .format('y'))
        def direct():
            local = [6]
            %remote_exec -k a -p local -o y y = local
        direct()
    """)).raise_error()
    assert session.ns["a"].y == [6]


def test_late_output(session):
    session.ok("-k a", "import threading, time\ndef late(): time.sleep(.5); print('late')\n"
               "thread = threading.Thread(target=late); thread.start()")
    shown = session.out
    for code in ("thread.join(); time.sleep(.3)", "1;"):
        shown += session.ok(f"-k a {code}").out
    assert shown == "late\n"


# ---- a notebook, a terminal, a script --------------------------------------

class Notebook:
    """A real local kernel, driven by a client as a notebook does."""

    def __init__(self):
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", extra_arguments=[], cwd=str(HERE))
        self.run("%load_ext remote_exec")

    def run(self, code, answers=()):
        """(reply, messages) of a cell; `answers` go to its questions."""
        messages, self.prompts, answers = [], [], list(answers)

        def stdin(message):
            self.prompts.append(message["content"]["prompt"])
            self.client.input(answers.pop(0))
        reply = self.client.execute_interactive(
            code, allow_stdin=True, timeout=30, output_hook=messages.append, stdin_hook=stdin)
        self.text = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
        return reply["content"], messages

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@pytest.fixture(scope="module")
def notebook():
    notebook = Notebook()
    notebook.run("%remote_exec -k k1=python3,k2=python3 1")
    yield notebook
    notebook.close()


def test_notebook(notebook):
    reply, messages = notebook.run("%%remote_exec -k k1=python3,k2=python3 -o x\nx = 1\n"
                                   "display({'text/html': '<b>'}, raw=True)\nprint('hi')")
    assert reply["status"] == "ok" and "[k1] hi\n" in notebook.text
    assert [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"] == [
        {"text/html": "<b>"}] * 2
    reply, _ = notebook.run("%remote_exec -k k1 1/0")
    assert reply["ename"] == "RemoteError" and "ZeroDivisionError" in reply["evalue"]


def test_notebook_input(notebook):
    notebook.run("%remote_exec -k k1 -o name name = input('who? ')", ["me"])
    assert notebook.prompts == ["who? "]
    notebook.run("%remote_exec -k k1,k2 -o name name = input('who? ')", ["me", "you"])
    assert sorted(notebook.prompts) == ["[k1] who? ", "[k2] who? "]
    notebook.run("print(sorted([k1.name, k2.name]))")
    assert notebook.text == "['me', 'you']\n"


def test_notebook_interrupt(notebook):
    notebook.client.execute("%remote_exec -k k1,k2 print('on'); import time; time.sleep(60)")
    begun = ""
    while begun.count("on\n") < 2:
        message = notebook.client.get_iopub_msg(timeout=30)
        begun += message["content"].get("text", "")
    notebook.manager.interrupt_kernel()
    reply = notebook.client.get_shell_msg(timeout=15)["content"]
    assert reply["ename"] == "KeyboardInterrupt" and "k1, k2 stopped" in reply["evalue"]
    assert notebook.run("%remote_exec -k k1 print(2)")[0]["status"] == "ok"


def test_notebook_displays(notebook):
    _, messages = notebook.run("%%remote_exec -k k1\nh = display(1, display_id=True)\nh.update(2)\n"
                               "from IPython.display import clear_output; clear_output()")
    assert [m["msg_type"] for m in messages if m["msg_type"] in (
        "display_data", "update_display_data", "clear_output")] == [
        "display_data", "update_display_data", "clear_output"]


def test_notebook_status_line(notebook):
    _, messages = notebook.run("%%remote_exec -k k1,k2\nimport time; time.sleep(4)")
    told = [m["content"]["data"]["text/plain"] for m in messages if "display" in m["msg_type"]]
    assert told[0].startswith("waiting for k1, k2 (") and re.fullmatch(
        r"k1 4\.\d s; k2 4\.\d s", told[-1])


def test_notebook_asks(notebook):
    notebook.run("%%remote_exec -k k1 -o secret\nimport getpass; secret = getpass.getpass('pw? ')",
                 ["xyz"])
    assert notebook.prompts == ["pw? "]
    notebook.run("%remote_exec -k k1 1/0")
    reply, _ = notebook.run("%%remote_exec -k k1\n%debug", ["p 6 * 7", "q"])
    assert reply["status"] == "ok" and "42" in notebook.text
    assert notebook.prompts == ["ipdb> ", "ipdb> "]


def test_notebook_interrupt_while_asking(notebook):
    notebook.client.execute("%remote_exec -k k1 input('wait ')", allow_stdin=True)
    assert notebook.client.get_stdin_msg(timeout=30)["content"]["prompt"] == "wait "
    notebook.manager.interrupt_kernel()
    reply = notebook.client.get_shell_msg(timeout=15)["content"]
    assert reply["ename"] == "KeyboardInterrupt" and "k1 stopped" in reply["evalue"]
    assert notebook.run("%remote_exec -k k1 print(2)")[0]["status"] == "ok"


def test_notebook_one_interrupt_for_all_questions(notebook):
    notebook.client.execute("%remote_exec -k k1=python3,k2=python3 input('wait ')",
                            allow_stdin=True)
    notebook.client.get_stdin_msg(timeout=30)
    time.sleep(0.5)  # the other one's question is there, too
    notebook.manager.interrupt_kernel()
    reply = notebook.client.get_shell_msg(timeout=15)["content"]
    assert reply["ename"] == "KeyboardInterrupt" and "k1, k2 stopped" in reply["evalue"]
    assert not notebook.client.stdin_channel.msg_ready()
    assert notebook.run("%remote_exec -k k1,k2 print(2)")[0]["status"] == "ok"


def test_notebook_displays_of_two(notebook):
    """The same display_id on two kernels means two displays; clearing clears all."""
    _, messages = notebook.run("%%remote_exec -k k1,k2 \nfrom IPython.display import clear_output\n"
                               "h = display(1, display_id='same'); h.update(2)\n"
                               "print('gone', end=''); clear_output(); print('there')")
    ids = [m["content"]["transient"]["display_id"] for m in messages if "display" in m["msg_type"]]
    assert len(ids) == 4 and len(set(ids)) == 2
    assert "gone" not in notebook.text and "[k1] there\n" in notebook.text


def test_notebook_slow_front_end(notebook):
    """The front end reads nothing until all is over."""
    notebook.client.execute(
        "%remote_exec -k k1=python3 -o i for i in range(5000): display(i)")
    assert notebook.client.get_shell_msg(timeout=90)["content"]["status"] == "ok"
    shown, state = [], "busy"
    while state != "idle":
        message = notebook.client.get_iopub_msg(timeout=30)
        state = message["content"].get("execution_state", "busy")
        text = message["content"].get("data", {}).get("text/plain", "")
        if message["msg_type"] == "display_data" and text.isdigit():
            shown.append(text)
    assert list(map(int, shown)) == [*range(5000)]
    notebook.run("print(k1.i)")
    assert notebook.text == "4999\n"


def test_two_sessions(session, notebook):
    """The same names in two sessions, at the same time, and one of them stops."""
    notebook.client.execute("%remote_exec -k a=python3 -o x import time; time.sleep(2); x = 1")
    session.ok("-k a -o x import time; time.sleep(1); x = 2")
    session.ok("-k a -s")
    assert notebook.client.get_shell_msg(timeout=30)["content"]["status"] == "ok"
    notebook.run("%remote_exec -k a -o x")
    notebook.run("print(a.x)")
    assert notebook.text == "1\n"


def test_notebook_captures(notebook):
    notebook.run("%%capture caught\n%remote_exec -k k1,k2 print('text'); display(5)")
    assert notebook.text == ""
    notebook.run("print(sorted(caught.stdout.split()), [o.data for o in caught.outputs])")
    assert notebook.text == ("['[k1]', '[k1]', '[k2]', '[k2]', 'text', 'text'] "
                             "[{'text/plain': '5'}, {'text/plain': '5'}]\n")


def test_notebook_tb_and_xmode(notebook):
    notebook.run("%remote_exec -k k1,k2 1/0")
    _, messages = notebook.run("%tb")
    shown = "".join(str(m["content"]) for m in messages)
    assert "ZeroDivisionError" in shown and "remote_exec.py" not in shown
    notebook.run("%xmode Minimal")
    reply, messages = notebook.run("%remote_exec -k k1 1/0")
    notebook.run("%xmode Context")
    assert "remote_exec.py" not in str(messages)


def test_notebook_unloads(notebook):
    notebook.run("%remote_exec -k k1 -o pid pid = os.getpid()")
    notebook.run("print(k1.pid)")
    pid = int(notebook.text)
    reply, _ = notebook.run("%unload_ext remote_exec")
    assert reply["status"] == "ok" and notebook.text == "" and gone(pid, 3)
    notebook.run("%load_ext remote_exec")


def test_notebook_end():
    """One kernel is idle, one holds a thread, one ignores shutdown, one is busy."""
    files = set(os.listdir(jupyter_runtime_dir()))
    notebook = Notebook()
    notebook.run("%remote_exec -k k1=python3,k2=python3,k3=python3,k4=python3 -o pid "
                 "pid = os.getpid()")
    notebook.run("print(k1.pid, k2.pid, k3.pid, k4.pid)")
    pids = list(map(int, notebook.text.split()))
    notebook.run("%remote_exec -k k2 import threading, time; "
                 "threading.Thread(target=time.sleep, args=(99,)).start()")
    notebook.run("%remote_exec -k k3 import signal; signal.signal(signal.SIGTERM, lambda *_: 0); "
                 "get_ipython().kernel.do_shutdown = None")
    notebook.client.execute("%%remote_exec -k k4\nimport time\nprint('on')\nwhile True:\n"
                            "  try: time.sleep(60)\n  except KeyboardInterrupt: print('no')")
    shown = ""
    for word in ("on\n", "no\n"):  # the second Ctrl-C gives the prompt back
        while word not in shown:
            shown += notebook.client.get_iopub_msg(timeout=30)["content"].get("text", "")
        notebook.manager.interrupt_kernel()
    assert "k4 still busy" in notebook.client.get_shell_msg(timeout=30)["content"]["evalue"]
    begin = time.monotonic()
    notebook.close()
    assert time.monotonic() - begin < 2.5  # what a front end grants
    assert all(gone(pid, 1) for pid in pids)
    assert not set(os.listdir(jupyter_runtime_dir())) - files


def test_nbclient():
    import nbclient
    import nbformat
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (
        "%load_ext remote_exec", "%%remote_exec -k k=python3 -o x\nx = 3\nprint('hi')", "k.x",
        "%remote_exec -k k input()")])
    notebook.cells[-1].metadata.tags = ["raises-exception"]
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60, resources={
        "metadata": {"path": str(HERE)}}).execute()
    assert notebook.cells[1].outputs[0].text == "hi\n"
    assert notebook.cells[2].outputs[0].data["text/plain"] == "3"
    assert "StdinNotImplementedError" in notebook.cells[3].outputs[0].evalue


def ipython(*arguments, env=None):
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return subprocess.run(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-term-title", *arguments],
        capture_output=True, text=True, timeout=60, cwd=str(HERE),
        env={**environment, **(env or {})})


def test_script_and_its_end(tmp_path):
    script = tmp_path / "script.ipy"
    script.write_text("%load_ext remote_exec\n%remote_exec -k k=python3,m=python3 -o pid "
                      "pid = os.getpid()\nprint(k.pid, m.pid)\n"
                      "%remote_exec -k k import threading, time; "
                      "threading.Thread(target=time.sleep, args=(100,)).start()\n"
                      "import time; print(time.time())\n")
    files = set(os.listdir(jupyter_runtime_dir()))
    done = ipython(str(script))
    ended = time.time()
    pids, last = done.stdout.splitlines()
    assert done.stderr == "" and ended - float(last) < 4
    assert all(gone(int(pid), 1) for pid in pids.split())
    assert not set(os.listdir(jupyter_runtime_dir())) - files


def test_failed_start_leaves_no_file():
    files = set(os.listdir(jupyter_runtime_dir()))
    os.makedirs(f"{RUNTIME.name}/data/kernels/broken", exist_ok=True)
    spec = pathlib.Path(f"{RUNTIME.name}/data/kernels/broken/kernel.json")
    spec.write_text(json.dumps({"argv": ["sleep", "99"], "display_name": "", "language": ""}))
    files.add("data")
    done = ipython("-c", "%load_ext remote_exec\n%config RemoteExecMagics.startup_timeout = 0.5\n"
                   "%remote_exec -k broken 1", env={"JUPYTER_PATH": f"{RUNTIME.name}/data"})
    assert "not ready after 0.5 s" in done.stdout + done.stderr
    assert set(os.listdir(jupyter_runtime_dir())) <= files


def test_command_line_and_config(tmp_path):
    done = ipython("--ext", "remote_exec", "-c", "%remote_exec -k k=python3 print(6 * 7)")
    assert (done.stdout, done.stderr) == ("42\n", "")


def test_forked_child_touches_nothing():
    done = ipython("-c", "\n".join([
        "%load_ext remote_exec", "%remote_exec -k k=python3 x = 8",
        "import atexit, os, sys, multiprocessing", "sys.stdout.flush()", "pid = os.fork()",
        "if pid == 0:  # IPython's own exit function empties the namespace",
        "    (lambda run, end: (run(), end(0)))(atexit._run_exitfuncs, os._exit)",
        "_ = os.waitpid(pid, 0)",
        "w = multiprocessing.get_context('fork').Process(target=print, args=('worker',))",
        "w.start(); w.join()", "%remote_exec -k k -o x", "print(k.x)"]))
    assert done.stdout == "worker\n8\n", done


def test_killed_session_leaves_no_kernel(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    process = subprocess.Popen(
        [sys.executable, "-m", "IPython", "--no-term-title", "-c", "%load_ext remote_exec\n"
         "%remote_exec -k k=python3 print(os.getpid(), flush=True); import time; time.sleep(100)"],
        stdout=subprocess.PIPE, text=True, cwd=str(HERE), env=environment)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(pid)


def test_terminal():
    import pexpect
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    child = pexpect.spawn(sys.executable, [
        "-m", "IPython", "--simple-prompt", "--colors=NoColor", "--no-banner"],
        encoding="utf-8", timeout=30, cwd=str(HERE), env=environment)
    child.expect(r"In \[1\]: ")
    child.sendline("%load_ext remote_exec")
    child.expect(r"In \[2\]: ")
    child.sendline("%remote_exec -k k=python3 print('be' + 'gun'); import time; time.sleep(60)")
    child.expect("begun")
    child.sendintr()
    child.expect("KeyboardInterrupt: k stopped\r\n")
    child.expect(r"In \[3\]: ")
    assert "Traceback" not in child.before and "remote_exec.py" not in child.before
    child.sendline("%remote_exec -k k n = input('who' + '? ')")
    child.expect(r"\r\nwho\? ")
    child.sendline("me")
    child.expect(r"In \[4\]: ")
    child.sendline("%remote_exec -k k print(n * 2)")
    child.expect("meme")
    child.expect(r"In \[5\]: ")
    child.sendline("%remote_exec nonsense")
    child.expect("UsageError: -k")
    child.expect(r"In \[6\]: ")
    child.sendline("exit")
    child.expect(pexpect.EOF)
    assert "rror" not in child.before


# ---- far kernels ----------------------------------------------------------

@pytest.fixture
def far_specs(tmp_path, monkeypatch):
    """Kernelspecs of the second host: sshpyk's and remote_ikernel's."""
    install_spec(tmp_path, monkeypatch, "sshpyk-far", [], interrupt_mode="message", metadata={
        "kernel_provisioner": {"provisioner_name": "sshpyk-provisioner", "config": {
            "ssh_host_alias": SSH_HOST, "remote_python": sys.executable,
            "remote_kernel_name": "python3"}}})
    install_spec(tmp_path, monkeypatch, "rik-far", [
        sys.executable, "-m", "remote_ikernel", "--interface", "ssh", "--host", SSH_HOST,
        "--workdir", "/tmp", "--kernel_cmd",
        f"{sys.executable} -m ipykernel_launcher -f {{host_connection_file}}",
        "{connection_file}"])


@over_ssh
@newest  # sshpyk needs a newer jupyter_client than the floor
def test_far_kernel(session, far_specs):
    far_pid = None
    try:
        session.ok("-k near=python3,far=sshpyk-far:/usr -o where,pid,x", (
            "import numpy as np\nwhere, pid, x = os.getcwd(), os.getpid(), np.arange(1e6)"))
        assert session.ns["far"].where == "/usr" and session.ns["far"].x[-1] == 999999
        far_pid = session.ns["far"].pid
        took = interrupting(session, "-k far", "import time; y = 3; time.sleep(60)", 1)
        assert isinstance(session.error, KeyboardInterrupt) and took < 8
        session.ok("-k far -o y")
        failures = session.fails("-k far os.kill(os.getpid(), 9)")
        assert failures["far"].ename == "DeadKernelError"
        pid = pid_of(session, "far")
        closed = session.magics.kernels["far"].sockets["closed"]
        os.kill(pid, 9)  # the second host shares this one's process table
        assert gone(pid) and closed.poll(5000)  # the tunnel tells a moment later
        session.ok("-k far -o x x = 5")
        assert "started anew" in session.err
    finally:
        session.ok("-k near,far -s")
        assert far_pid is None or gone(far_pid)


@over_ssh
@newest
def test_far_kernel_through_remote_ikernel(session, far_specs):
    try:
        session.ok("-k near=python3,far=rik:/usr -o where where = os.getcwd()")
        assert session.ns["far"].where == "/usr"
        interrupting(session, "-k far", "import time; y = 3; time.sleep(60)", 1)
        assert isinstance(session.error, KeyboardInterrupt)
        session.ok("-k far -o y")
        pid = pid_of(session, "far")
    finally:
        session.ok("-k near,far -s")
    assert gone(pid)


@over_ssh
@newest  # sshpyk needs a newer jupyter_client than the floor
@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.77"])  # unknown, refused
def test_far_kernel_that_cannot_start(session, tmp_path, monkeypatch, host):
    install_spec(tmp_path, monkeypatch, "nowhere", [], metadata={"kernel_provisioner": {
        "provisioner_name": "sshpyk-provisioner", "config": {
            "ssh_host_alias": host, "remote_python": sys.executable,
            "remote_kernel_name": "python3", "raise_on_ssh_config_error": False}}})
    failures = session.fails("-k nowhere=nowhere 1")
    assert host in failures["nowhere"].evalue and "nowhere" not in session.magics.kernels
    session.ok("-k nowhere=python3 1")
    session.ok("-k nowhere -s")


@over_ssh
@newest
@pytest.mark.skipif(not SSH_LINK, reason="no link to cut: REMOTE_EXEC_SSH_LINK")
def test_network_outage(session, far_specs):
    """Twenty seconds without a network: -t and Ctrl-C work, and a result arrives."""
    session.ok("-k far=sshpyk-far,late=sshpyk-far,stopped=sshpyk-far 1")
    cut = subprocess.Popen(["sh", "-c", f"sleep 1; ip link set {SSH_LINK} down; sleep 20; "
                                        f"ip link set {SSH_LINK} up"])
    told = []
    status, rx.Screen.status = rx.Screen.status, lambda self, text, last=False: told.append(text)
    try:
        begin = time.monotonic()
        failures = session.fails("-k late -t 2 import time; time.sleep(4); x = 7")
        assert failures["late"].ename == "TimeoutError" and time.monotonic() - begin < 12
        took = interrupting(session, "-k stopped import time; time.sleep(4); x = 7", None, 1, 2)
        assert isinstance(session.error, KeyboardInterrupt) and took < 8
        assert "late is still busy" in session.misused("-k late,far 1")
        took = interrupting(session, "-k stopped -s", None, 1)
        assert took < 5 and str(session.error) == "stopped not waited for"
        session.ok("-k far -o x import time; time.sleep(5); x = 7")
    finally:
        rx.Screen.status = status
        cut.wait()
    assert session.ns["far"].x == 7
    assert any("far does not answer since" in text for text in told)
    session.ok("-k late,far -s")


@over_ssh
@newest
def test_end_over_ssh(far_specs):
    done = ipython("-c", "\n".join([
        "%load_ext remote_exec",
        "%remote_exec -k far=sshpyk-far,near=python3,queue=rik-far -o pid pid = os.getpid()",
        "try:", "    %remote_exec -k far -t 1 import time; time.sleep(60)",
        "except Exception: pass",
        "import time; print(far.pid, near.pid, queue.pid, time.time())"]))
    ended = time.time()
    *pids, last = done.stdout.splitlines()[-1].split()
    assert ended - float(last) < 4
    assert all(gone(int(pid)) for pid in pids)


@over_ssh
@newest  # sshpyk needs a newer jupyter_client than the floor
def test_killed_tunnel(session, far_specs):
    session.ok("-k far=sshpyk-far -o pid pid = os.getpid()")
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; ssh -O exit {SSH_HOST}"],
                              stderr=subprocess.DEVNULL)
    session.run("-k far -o x -t 60 import time; time.sleep(4); x = 7")
    killer.wait()
    assert session.error is None and session.ns["far"].x == 7 or (
        session.error.failures["far"].ename == "LostReplyError"), session.error
    session.ok("-k far -o x")
    assert session.ns["far"].x == 7
    session.ok("-k far -s")


# ---- other Pythons --------------------------------------------------------

OLD = {"2.7": ["ipykernel<5", "numpy"],
       "3.6": ["ipykernel<6", "numpy<1.20", "--python-version=3.6", "--only-binary=:all:"],
       "3.8": ["ipykernel<6.30", "numpy<1.25"]}


def old_python(version):
    found = sorted(pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob(
        f"versions/{version}.*/bin/python"))
    return found and str(found[-1])


@pytest.fixture(scope="session", autouse=True)
def installs(request, tmp_path_factory):
    """By version: (interpreter, folder of its packages, the pip that fills it), for
    those that are tested; the pips work while the other tests run."""
    found = {}
    for version in OLD if any("old_pythons" in item.name for item in request.session.items) else ():
        python, folder = old_python(version), str(tmp_path_factory.mktemp(f"python{version}"))
        if python:
            # the pip of 3.6 does not heed which Python a package is for
            found[version] = python, folder, subprocess.Popen(
                [sys.executable if version == "3.6" else python, "-m", "pip", "install", "-q",
                 "--target", folder, *OLD[version]], stderr=subprocess.DEVNULL)
    yield found
    for _, _, pip in found.values():
        pip.kill()
        pip.wait()


@newest
@pytest.mark.parametrize("version", OLD)
def test_old_pythons(session, tmp_path, monkeypatch, version, installs):
    if version not in installs:
        pytest.skip(f"no Python {version} (pyenv)")
    python, folder, pip = installs[version]
    assert pip.wait(120) == 0
    install_spec(tmp_path, monkeypatch, "old", [
        python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        env={"PYTHONPATH": folder})
    session.ns.update(text="h\xe9", array=np.arange(3e5), n=[1, 2.5, None])
    session.ok("-k old -p text,array,n -o version,s,array,n,text", (
        "import sys\nversion = sys.version_info[:2]\ns = 'plain'\narray[0] = 5\nprint(n)"))
    old = session.ns["old"]
    assert ".".join(map(str, old.version)) == version and session.out == "[1, 2.5, None]\n"
    assert (old.s, old.text, old.n) == ("plain", "h\xe9", [1, 2.5, None])
    assert old.array.dtype == float and old.array.flags.writeable and old.array[0] == 5
    interrupting(session, "-k old", "import time; time.sleep(60)", 1)
    assert isinstance(session.error, KeyboardInterrupt)
    session.ok("-k old -o s -s s = 2")
    session.ok("-k old -s")


# ---- the documents --------------------------------------------------------

def test_documents_agree():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert len(re.search(r"```sh\n(.*?)```", readme, re.S).group(1).strip().splitlines()) == 2
    for option in ("kernels", "output", "input", "push", "shutdown", "timeout", "list"):
        assert f"--{option}" in readme and f"--{option}" in rx.RemoteExecMagics.remote_exec.__doc__


@newest  # tracebacks and numbers looked different
def test_readme_shows_what_happens(tmp_path):
    """Each Python block is run as a cell; what stands below it is what it shows,
    lines of several kernels in any order."""
    (tmp_path / "a.txt").write_text("1 2\n3 4\n")
    (tmp_path / "b.txt").write_text("5 6\n7 8\n")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    notebook = Notebook()
    notebook.run("%unload_ext remote_exec")
    for code, expected in re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", readme, re.S):
        code = code.replace("/data/run7", str(tmp_path)).replace("/scratch", str(tmp_path))
        _, messages = notebook.run(code, ["me", "me"])
        shown = {}
        for number, message in enumerate(messages):
            content = message["content"]
            place = content.get("transient", {}).get("display_id", number)  # updated in place
            shown[place] = "\n".join([content.get("text", ""), *content.get("traceback", []),
                                      content.get("data", {}).get("text/plain", "")])
        shown = "\n".join([*shown.values(), *(f"{prompt}me" for prompt in notebook.prompts)])
        shown = re.sub(r"\x1b\[[\d;]*m", "", shown)
        shown = re.sub(r"(?s)(kernelspecs:\n).*", r"\1  python3", shown)
        shown = re.sub(r"4\.\d s", "4.0 s", shown)
        assert sorted(filter(str.strip, shown.split("\n"))) == sorted(
            filter(str.strip, expected.split("\n"))), code
    notebook.close()


def test_one_file_is_enough(tmp_path):
    (tmp_path / "remote_exec.py").write_text((HERE / "remote_exec.py").read_text())
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-term-title", "--ext", "remote_exec", "-c",
         "%remote_exec -k k=python3 print(1)"], cwd=str(tmp_path), capture_output=True,
        text=True, env=environment, timeout=60)
    assert done.stdout == "1\n"


# ---- figures --------------------------------------------------------------

def side_by_side(ours, theirs, times=7):
    """(seconds ours takes, how many times as fast as theirs): medians of pairs.
    A function may return the seconds to count instead of all that it took."""
    pairs = []
    for _ in range(times):
        spent = []
        for function in (ours, theirs):
            begin = time.perf_counter()
            counted = function()
            spent.append(counted if isinstance(counted, float) else time.perf_counter() - begin)
        pairs.append(spent)
    return (statistics.median(mine for mine, _ in pairs),
            statistics.median(other / mine for mine, other in pairs))


def figure(what, seconds, ratio, than, megabytes=None):
    speed = f"{megabytes / seconds:5.0f} MB/s" if megabytes else f"{seconds * 1e3:5.1f} ms"
    print(f"\n{what:44} {speed:12} {ratio:5.2f} {than}", end="")


@contextlib.contextmanager
def engine(*arguments):
    """A view of the one engine of an ipyparallel cluster."""
    import ipyparallel
    with ipyparallel.Cluster(n=1, log_level=40, controller_args=list(arguments)) as client:
        client.wait_for_engines(1, timeout=60)
        yield client[0]


BIG = "import numpy as np; x = np.random.default_rng(0).random(100_000_000 // 8)"


@bench
@pytest.mark.parametrize("encrypted", [False, True])
def test_bench_ipyparallel(session, plain, encrypted):
    session.ok(f"-k n={'python3' if encrypted else 'plain'} {BIG}")
    assert bool(session.magics.kernels["n"].client.curve_publickey) == encrypted
    exec(BIG, session.ns)
    how = "encrypted" if encrypted else "plain"
    with engine(f"--IPController.enable_curve={encrypted}") as view:
        view.execute(BIG, block=True)
        assert (view["x"] == session.ns["x"]).all()
        seconds, ratio = side_by_side(lambda: session.ok("-k n -o x"), lambda: view["x"])
        figure(f"-o of 100 MB, {how}", seconds, ratio, "times as fast as ipyparallel", 100)
        seconds, ratio = side_by_side(
            lambda: session.ok("-k n -p x"),
            lambda: view.push({"x": session.ns["x"]}, block=True))
        figure(f"-p of 100 MB, {how}", seconds, ratio, "times as fast as ipyparallel", 100)
        for what, code in REAL.items() if not encrypted else ():
            session.ok(f"-k n {code}")
            view.execute(code, block=True)
            seconds, ratio = side_by_side(lambda: session.ok("-k n -o x"), lambda: view["x"])
            figure(f"-o of {what}", seconds, ratio, "times as fast as ipyparallel")
    if not encrypted:
        session.ok(f"-k n {BIG}")
        seconds, ratio = side_by_side(lambda: session.ok("-k n -o x"), raw_socket)
        figure("-o of 100 MB, plain", seconds, ratio, "of a raw loopback socket", 100)
    session.ok("-k n -s")


REAL = {
    "a float64 cube of 64 MB": "import numpy as np; x = np.ones((200, 200, 200))",
    "a frame of 200,000 rows": (
        "import pandas as pd, numpy as np; x = pd.DataFrame({'v': np.arange(2e5), "
        "'s': ['row %d' % i for i in range(200000)], "
        "'d': pd.date_range('2020', periods=200000, freq='s')})"),
    "a dict of 1,000 arrays of 1,000": (
        "import numpy as np; x = {i: np.full(1000, i) for i in range(1000)}"),
    "a list of 100,000 records": (
        "x = [{'n': i, 'name': str(i), 'v': i / 7} for i in range(100000)]"),
    "a matplotlib figure": (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt; "
        "x, axes = plt.subplots(); _ = axes.plot(range(10000)); plt.close()"),
}


def raw_socket():
    """Receive 100 MB from another process on a loopback socket."""
    sender = subprocess.Popen([sys.executable, "-S", "-c", (
        "import socket; server = socket.create_server(('127.0.0.1', 0)); "
        "print(server.getsockname()[1], flush=True); data = bytes(100_000_000); "
        "connection, _ = server.accept(); connection.recv(1); connection.sendall(data)")],
        stdout=subprocess.PIPE)
    client = socket.create_connection(("127.0.0.1", int(sender.stdout.readline())))
    begin = time.perf_counter()
    client.sendall(b"!")
    buffer, got = memoryview(bytearray(100_000_000)), 0
    while got < 100_000_000:
        got += client.recv_into(buffer[got:])
    seconds = time.perf_counter() - begin
    client.close()
    sender.communicate()
    return seconds


@bench
def test_bench_round_trip(session):
    manager, client = start_new_kernel(kernel_name="python3")
    seconds, ratio = side_by_side(
        lambda: session.ok("-k a -o x x = 1"),
        lambda: client.execute("x = 1", reply=True, timeout=10), 100)
    figure("a cell that returns one value", seconds, 1 / ratio, "times a bare client's execute")
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    names = ",".join(f"n{i}=python3" for i in range(8))
    session.ok(f"-k {names}")
    seconds, ratio = side_by_side(lambda: session.ok(f"-k {names} -o x x = 1"),
                                  lambda: session.ok("-k a -o x x = 1"), 50)
    figure("the same on eight kernels at once", seconds, 1 / ratio, "times one kernel's")
    session.ok(f"-k {names} -s")


@over_ssh
@bench
def test_bench_ssh(session, far_specs, tmp_path):
    session.ok("-k far=sshpyk-far import numpy as np; "
               "x = np.frombuffer(os.urandom(200_000_000), 'u1').copy()")
    (tmp_path / "x").write_bytes(os.urandom(200_000_000))
    seconds, ratio = side_by_side(lambda: session.ok("-k far -o x"), lambda: subprocess.run(
        ["scp", "-q", f"{SSH_HOST}:{tmp_path}/x", f"{tmp_path}/y"], check=True), 5)
    figure("-o of 200 MB over ssh", seconds, ratio, "times as fast as scp", 200)
    client = BlockingKernelClient(
        connection_file=session.magics.kernels["far"].manager.connection_file)
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready()
    seconds, ratio = side_by_side(
        lambda: session.ok("-k far -o y y = 1"),
        lambda: client.execute("y = 1", reply=True, timeout=10), 50)
    figure("a cell that returns one value over ssh", seconds, 1 / ratio,
           "times a bare client's execute")
    client.stop_channels()
    session.ok("-k far -s")


def test_pickle_protocol(session):
    assert session.magics.kernels["a"].protocol == pickle.HIGHEST_PROTOCOL
