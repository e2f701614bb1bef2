"""Tests of remote_exec, on real kernels, in the order of its contract.

Whoever reads the names of the tests from top to bottom knows what the module promises.
First the shell under test, what tests ask of it, and what they start; then the contract:
options, kernelspecs, what comes back, many kernels, runs in the background, widgets, errors,
what the user sees, other languages, configuration and security, far kernels and batch queues,
the documents; at last the figures. `EXERCISED` names a test for each row of the README's tables.

``python -m pytest`` runs all that the machine can; ``-m bench -s`` prints the figures.
REMOTE_EXEC_SSH_HOST names a host that ssh reaches without a password and where this Python
stands at the same path: the tests over ssh use it. REMOTE_EXEC_SSH_LINK is the network device
that leads there, to be cut. A Slurm of two nodes (SLURM_CONF) runs the tests of batch queues.
"""
import ast
import concurrent.futures
import contextlib
import copy
import ctypes
import faulthandler
import gc
import importlib.metadata
import importlib.util
import inspect
import io
import json
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
import textwrap
import threading
import time
import warnings
import weakref

import _pytest.runner
import numpy as np
import psutil
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
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
README = (HERE / "README.md").read_text(encoding="utf-8")
LIMIT = 120  # seconds that a test may take
LAUNCH = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
SSH_HOST = os.environ.get("REMOTE_EXEC_SSH_HOST")
SSH_LINK = os.environ.get("REMOTE_EXEC_SSH_LINK")
with warnings.catch_warnings():  # there is no file to register marks in
    warnings.simplefilter("ignore")
    newest, far, marked_bench = pytest.mark.newest, pytest.mark.far, pytest.mark.bench
    one_after_another = pytest.mark.xdist_group("hosts")  # they share the queue


# ---- the module's inside --------------------------------------------------

class Inside:
    """All that knows how the module is made."""

    @staticmethod
    def options_and_code(line):
        """Return the options of a line, by letter, and its code."""
        return rx.parse_line(line)

    @staticmethod
    def find_kernelspec(wanted, names):
        """Return the one of the names that is wanted. Raise UsageError if that is not clear."""
        return rx.find_kernelspec(wanted, names)

    @staticmethod
    def substitute(code, kernel, values):
        """Return the code with the values put in, as the kernel of this name gets it."""
        return rx.substitute(code, kernel, values)

    @staticmethod
    def directories(pid):
        """Return the directories of the session whose process that is."""
        return set(map(str, pathlib.Path("/dev/shm").glob(f"rexec-{pid}-*")))


# ---- the shell under test -------------------------------------------------

class Session:
    """An in-process IPython with the extension loaded, and what its last call came to.
    Its other attributes are the user's variables."""

    def __init__(self):
        self.shell = InteractiveShell.instance()
        self.ns = self.shell.user_ns
        self.shell.extension_manager.load_extension("remote_exec")

    def __getattr__(self, name):
        try:
            return vars(self)["ns"][name]
        except KeyError:
            raise AttributeError(name) from None

    def run(self, line, cell=None):
        """Run the magic; keep what it showed, and its exception, if any."""
        self.error, begin = None, time.monotonic()
        with capture_output() as shown:
            sys.stderr = terminal = io.StringIO()
            terminal.isatty = lambda: True
            try:
                if cell is None:
                    self.shell.run_line_magic("remote_exec", line)
                else:
                    self.shell.run_cell_magic("remote_exec", line, cell)
            except (Exception, KeyboardInterrupt) as raised:
                self.error = raised
        self.took = time.monotonic() - begin
        self.out, self.displays = shown.stdout, shown.outputs
        self.status = re.findall(r"\r([^\r]*)\x1b\[K", terminal.getvalue())
        self.err = re.sub(r"\r[^\r]*\x1b\[K", "", terminal.getvalue())

    def ok(self, line, cell=None):
        """Return what a call prints that succeeds."""
        self.run(line, cell)
        if self.error:
            raise self.error
        return self.out

    def fails(self, line, cell=None):
        """Return the failures of a call, by kernel."""
        self.run(line, cell)
        assert isinstance(self.error, rx.RemoteError), repr(self.error)
        return self.error.failures

    def misused(self, line, cell=None):
        """Return the one line of a call's UsageError."""
        self.run(line, cell)
        assert isinstance(self.error, UsageError), repr(self.error)
        assert "\n" not in str(self.error)
        return str(self.error)

    def interrupted(self, line, cell=None, presses=()):
        """Return the one line of a call that Ctrl-C ends: it is pressed at these moments, or by
        the code, with `-i press` and {press}."""
        with pressing(*presses):
            self.run(line, cell)
        assert isinstance(self.error, KeyboardInterrupt), repr(self.error)
        assert self.took < 25
        assert self.error._render_traceback_() == [f"KeyboardInterrupt: {self.error}"]
        return str(self.error)

    def read(self, expression):
        """Return the value of an expression that a cell evaluates, or raise its error."""
        with capture_output() as shown:
            result = self.shell.run_cell(expression)
        self.out = shown.stdout
        result.raise_error()
        return result.result

    def there(self, name, expression):
        """Return the value that an expression has on a kernel."""
        self.ok(f"-k {name} -o value value = {expression}")
        return vars(self.ns[name]).pop("value")

    def in_thread(self, *lines):
        """Return the future of calls that are made in a thread of their own."""
        return THREADS.submit(lambda: [
            self.shell.run_line_magic("remote_exec", line) for line in lines])

    def running(self):
        """Return {name: state} of the kernels that -l lists."""
        with capture_output() as shown:
            self.shell.run_line_magic("remote_exec", "-l")
        lines = shown.stdout.partition("kernelspecs:")[0]
        return {name: state for name, state in re.findall(r"(?m)^  (\w+)  \S+  (.+)$", lines)}

    def load(self, what):
        """Load, unload or reload the extension."""
        getattr(self.shell.extension_manager, f"{what}_extension")("remote_exec")

    def startup_timeout(self, seconds):
        self.shell.run_line_magic("config", f"RemoteExecMagics.startup_timeout = {seconds}")


THREADS = concurrent.futures.ThreadPoolExecutor(8)


@pytest.fixture(scope="module")
def the_session():
    session = Session()
    yield session
    session.load("unload")


@pytest.fixture
def session(the_session, tmp_path):
    """The session, with the long-lived kernels `a` and `b`, and no others. Its variables are
    pieces of code: `press` presses Ctrl-C here, `begun` makes the file `session.begun`, `wait`
    takes a minute, `gate` waits for `session.open()`, and `stubborn` too, ignoring interrupts."""
    session = the_session
    if not session.shell.find_line_magic("remote_exec"):  # a test's unloading has failed
        rx.load_ipython_extension(session.shell)
    others = ",".join(name for name in session.running() if name not in "ab")
    session.run(f"-k {others or 'c'} -s")
    session.run("-k a=python3,b=python3 -t 20")
    if session.error:
        session.ok("-k a=python3,b=python3 -s pass")
    vars(session.a).clear()
    vars(session.b).clear()
    session.startup_timeout(60)
    session.begun, session.open = tmp_path / "begun", (tmp_path / "open").touch
    before = set(session.ns)
    session.ns.update(
        press=f"__import__('os').kill({os.getpid()}, 2)",
        begun=f"open({str(session.begun)!r}, 'w').close()",
        # (a signal in the moment before one long sleep begins would not end it)
        wait="[__import__('time').sleep(.1) for _ in range(600)]",
        gate=gate(tmp_path / "open"), stubborn="__import__('signal').signal(2, lambda *_: None); "
        + gate(tmp_path / "open"))
    yield session
    session.open()
    for name in set(session.ns) - before:
        del session.ns[name]


@pytest.fixture(autouse=True)
def time_limit(request):
    """A test that hangs has failed after two minutes; where each thread stands is printed."""
    def fail(*_):
        faulthandler.dump_traceback(sys.__stderr__)
        pytest.fail("it hangs")
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(0 if "bench" in request.node.name else LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def manager_config(session, monkeypatch):
    """Sets the user's `c.KernelManager` for this test only."""
    return lambda **values: monkeypatch.setitem(
        session.shell.config, "KernelManager", Config(**values))


# ---- a notebook -----------------------------------------------------------

class Notebook:
    """A real local kernel, driven by a client as a notebook does."""

    def __init__(self):
        self.manager, self.client = ready_kernel(  # no port that another one may take
            {"transport": "ipc", "ip": os.path.join(tempfile.mkdtemp(), "s")}, cwd=str(HERE))
        self.log, self.answers = [], []  # all that it published; for its questions
        self.run("%load_ext remote_exec")

    def start(self, code):
        """Return the id of a cell that is on its way."""
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
        """Return the messages that came under a cell."""
        return [each for each in self.log if each["parent_header"].get("msg_id") == cell
                and (not kinds or each["msg_type"] in kinds)]

    def text(self, cell):
        return "".join(each["content"]["text"] for each in self.under(cell, "stream"))

    def end(self, cell, answers=()):
        """Return the messages of a cell that runs to its end; `answers` go to its questions."""
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
        """Return (reply, messages) of a cell."""
        cell = self.start(code)
        messages = self.end(cell, answers)
        return self.reply(cell), messages

    def ok(self, code, answers=()):
        """Return the messages of a cell that succeeds."""
        reply, messages = self.run(code, answers)
        assert reply["status"] == "ok", reply
        return messages

    def value(self, expression):
        self.ok(f"print(repr(({expression})))")
        return ast.literal_eval(self.shown)

    def there(self, name, expression):
        """Return the value that an expression has on a kernel."""
        self.ok(f"%remote_exec -k {name} -o value value = {expression}")
        return self.value(f"{name}.value")

    def background(self, line):
        """Return the id of a cell that starts a run in the background."""
        cell = self.start(f"%remote_exec -b {line}")
        self.end(cell)
        return cell

    def interrupt(self, cell):
        """Return the line of a cell that a Ctrl-C ends."""
        self.manager.interrupt_kernel()
        self.end(cell)
        reply = self.reply(cell)
        assert reply["ename"] == "KeyboardInterrupt"
        return reply["evalue"]

    def widgets(self, kernels, code):
        """Return the messages of a cell that makes widgets on kernels, and names their `ids`."""
        return self.ok(f"%%remote_exec -k {kernels} -o ids\nimport ipywidgets as w\n{code}")

    def move(self, widget, subshell=None, **state):
        """Return the id of a front end's move of a widget."""
        move = self.client.session.msg("comm_msg", {"comm_id": widget, "data": {
            "method": "update", "state": state, "buffer_paths": []}})
        move["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(move)
        return move["header"]["msg_id"]

    def moved(self, widget, *subshell, **state):
        """Return the messages that come of a move."""
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
    if the_notebook.run("%remote_exec -k k1=python3,k2=python3")[0]["status"] == "error":
        the_notebook.ok("%remote_exec -k k1=python3,k2=python3 -s pass")
    return the_notebook


def contents(messages, *kinds):
    return [each["content"] for each in messages if each["msg_type"] in kinds]


# ---- other kernels, other sessions ----------------------------------------

def gate(path):
    """Return code that waits, wherever it runs, until there is such a file."""
    return (f"any(__import__('os').path.exists({str(path)!r}) or "
            "__import__('time').sleep(.02) for _ in iter(int, 1))")



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


class Runs:
    """Runs code where it is unpickled."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def body(function, **values):
    """Return the source of a function's body, as a script in which these names have values."""
    _, _, lines = inspect.getsource(function).partition(":\n")
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + (
        textwrap.dedent(lines))


def ready_kernel(options, **launch):
    """Return (manager, client) of a kernel that has just been started."""
    manager = KernelManager(kernel_name="python3", **options)
    manager.start_kernel(**launch)
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return manager, client


class OthersKernel:
    """A kernel that somebody else started, and its client."""

    def __init__(self, **options):
        self.manager, self.client = ready_kernel(options, stderr=subprocess.DEVNULL)
        self.file = self.manager.connection_file

    def restart(self):
        self.manager.restart_kernel(now=True)
        self.client.execute("1", reply=True, timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def ipython(*arguments, before=None, cwd=HERE, **environment):
    """Return what came of an IPython of its own, which calls `before` when it starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-term-title", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=str(cwd),
        env={**os.environ, **environment}, preexec_fn=before)
    try:
        process.stdout, process.stderr = process.communicate(timeout=90)
    finally:
        process.kill()
    return process


def script(*lines):
    return "-c", "\n".join(["%load_ext remote_exec", *lines])


def run_with_nbclient(*cells):
    """Return the notebook of these cells, run."""
    import nbclient
    import nbformat
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(text) for text in ("%load_ext remote_exec", *cells)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60, resources={
        "metadata": {"path": str(HERE)}}).execute()
    return notebook


class Line:
    """The network to somebody's kernel, which can be cut, and hold back what is published."""

    def __init__(self, kernel, folder):
        self.client, self.up, self.ends, self.flows = kernel.client, True, [], threading.Event()
        info = json.loads(pathlib.Path(kernel.file).read_text())
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
        """Lose what is on its way."""
        self.up = False
        while self.ends:
            with contextlib.suppress(OSError):
                self.ends.pop().shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def holding(self, seconds):
        """Let what the kernel publishes meanwhile come so late."""
        self.flows.clear()
        timer = threading.Timer(seconds, self.flows.set)
        timer.start()
        yield
        timer.cancel()
        self.flows.set()

    def lose_reply(self, begun, over):
        """Cut it when `begun` is there, and let the kernel go on by `over`; mend it when
        the kernel has answered."""
        until(begun.exists)
        self.cut()
        over.touch()
        self.client.kernel_info(reply=True, timeout=30)
        self.up = True


@pytest.fixture(scope="module")
def the_line(tmp_path_factory):
    with OthersKernel() as kernel:
        yield Line(kernel, tmp_path_factory.mktemp("line"))


@pytest.fixture
def line(session, the_line):
    session.ok(f"-k far={the_line.file} 1")
    vars(session.far).clear()
    return the_line


# ---- what tests ask of the machine ----------------------------------------

def until(condition, seconds=15):
    """Wait until the condition holds; return whether it does within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid, seconds=15):
    """Return whether the process ends, with all its threads, within so many seconds."""
    def ended():
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
        except (FileNotFoundError, ProcessLookupError):
            return True
    return until(ended, seconds)


def children():
    """Return the pids of the processes that we started and that live."""
    return {each.pid for each in psutil.Process().children()
            if each.status() != psutil.STATUS_ZOMBIE}


def files(pid=os.getpid()):
    """Return the files of kernels, and the directories of that session."""
    return {*map(str, pathlib.Path(WORK.name).glob("r/*")), *Inside.directories(pid)}


class Opened:
    """The numbers of our open files, threads and files on disk, when they have come to rest."""

    def __init__(self):
        seen = [self.now()]
        until(lambda: seen.append(self.now()) or len(seen) > 25 and len(set(seen[-25:])) == 1)
        self.before = seen[-1]

    def now(self):
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(files())

    def is_no_more(self):
        """Return whether there are, soon, no more than before: ZMQ closes its own beside us."""
        return until(lambda: all(now <= was for now, was in zip(self.now(), self.before)))


@contextlib.contextmanager
def pressing(*moments):
    """Press Ctrl-C at each of these moments: after so many seconds, or when a file is there."""
    steps = "; ".join(
        (f"sleep {each}" if isinstance(each, (int, float)) else
         f"for i in $(seq 1500); do [ -e {each} ] && break; sleep .02; done; sleep .2")
        + f"; kill -INT {os.getpid()}" for each in moments)
    presser, late = subprocess.Popen(["sh", "-c", steps]), 0
    try:
        yield
    finally:  # none is left for the next test
        while presser.returncode is None:
            try:
                presser.wait()
            except KeyboardInterrupt:
                late += 1
        assert not late, "it was over before the Ctrl-C"


@pytest.fixture
def stray_presses_do_nothing():
    """A Ctrl-C that comes before or after a call does nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)


def readme_block(language, word):
    """Return the README's code block in that language where the word stands."""
    return re.search(rf"```{language}\n([^`]*{word}[^`]*)```", README)[1]


# ---- far hosts, batch queues, old Pythons ---------------------------------

def over_ssh(test):
    """Marks a test that needs the second host; sshpyk needs newer versions than the floor."""
    return pytest.mark.skipif(
        not SSH_HOST, reason="no second host: REMOTE_EXEC_SSH_HOST")(far(newest(test)))


def sshpyk(host, **config):
    """Return the metadata of a kernelspec for an ssh host."""
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


def cut_link(begin, seconds):
    """Cut the link to the second host, so many seconds from now, for so many seconds."""
    return subprocess.Popen(["sh", "-c", f"sleep {begin}; ip link set {SSH_LINK} down; "
                                         f"sleep {seconds}; ip link set {SSH_LINK} up"])


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


def nodes_of_queue():
    """Return the names of Slurm's nodes that are up."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return sorted(set(subprocess.run(
            ["sinfo", "-h", "-N", "-r", "-o", "%N"], capture_output=True, text=True, timeout=20,
            check=True).stdout.split()))
    return []


NODES = nodes_of_queue()[:2]
JOB = f"rexec{os.getpid()}"  # the name of our jobs


def in_queue(test):
    """Marks a test that needs the batch queue."""
    return one_after_another(pytest.mark.skipif(
        len(NODES) < 2, reason="no batch queue: Slurm of two nodes")(test))


def jobs():
    """Return the ids of our jobs in the queue."""
    return subprocess.run(["squeue", "--me", "-h", "-n", JOB, "-o", "%i"], check=True,
                          capture_output=True, text=True).stdout.split()


def scancel(after=0):
    """Cancel our jobs, so many seconds from now."""
    return subprocess.Popen(["sh", "-c", f"sleep {after}; scancel -n {JOB}"])


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


OLD = {"3.6": ["ipykernel<6", "numpy<1.20", "--python-version=3.6", "--only-binary=:all:"],
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


# ---- Options --------------------------------------------------------------

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
    ("--shutdown --background --list --input=i --push p",
     {"s": "", "b": "", "l": "", "i": "i", "p": "p"}, "")])
def test_options_come_first_and_the_rest_is_code(line, options, code):
    assert Inside.options_and_code(line) == (options, code)


@given(st.text(min_size=1))
def test_any_line_is_parsed_or_refused(line):
    try:
        assert line.rstrip().endswith(Inside.options_and_code(line)[1].rstrip())
    except UsageError as error:
        assert "\n" not in str(error) or "\n" in line


@pytest.mark.parametrize("line, culprit", [
    ("", "-k"), ("x = 1", "-k"), ("-k ,", "''"), ("-k 9a", "'9a'"), ("-k a,a", "a2=SPEC"),
    ("-k a -o 9x", "'9x'"), ("-k a -o a.b", "'a.b'"), ("-k a -q", "-q"), ("-k a --nope", "nope"),
    ("-k a -i missing_one x", "missing_one"), ("-k a,b -i partial x", "'b'"),
    ("-k a -p missing_one", "missing_one"), ("-k nosuch=nosuch", "nosuch"),
    ("-k a -t 0 1", "'0'"), ("-k a -t nan 1", "'nan'"), ("-k a -s -o x", "-s"),
    ("-k a -s -p press", "-s"), ("-l print(1)", "-l"), ("-k {missing_one} 1", "missing_one"),
    ("-k a=/no/such.json", "/no/such.json"), ("-k class", "class"), ("-k a, -o x", "''"),
    ("-k a -p lock 1", "lock"), ("-k a,b -s -p lock 1", "lock"), ("-k c=python3 -p lock 1", "lock"),
    ("-k a -b", "-b"), ("-k a -b -t 1 1", "-t"), ("-k a:/ -o x,1 1", "'1'"),
    ("-k {grid} 1", "ndarray"), ("-k a -i odd 1", "odd"), ("-k a -p odd 1", "odd"),
    ("-k q=.json 1", "'.json'"), ("-k print=python3 1", "print"),
    ("-k partial=python3 1", "partial"), ("-k proxy=python3 1", "proxy")])  # they mean something
def test_a_mistake_is_one_line_before_anything_acts(session, line, culprit):
    session.shell.run_cell("class Proxy:\n    def __getattr__(self, name): return 1 / 0\n"
                           "class Odd:\n    def __str__(self): raise ValueError('two\\nlines')\n"
                           "    __reduce__ = __str__")
    session.ns.pop("c", None)
    session.ns.update(partial={"a": 1}, lock=threading.Lock(), grid=np.ones((2, 2)),
                      odd=session.Odd(), proxy=session.Proxy())
    before = children(), session.running(), dict(session.ns)
    assert culprit in session.misused(line)
    assert before[:2] == (children(), session.running())
    assert all(session.ns[name] is before[2][name] for name in {*session.ns, *before[2]})


@pytest.mark.parametrize("line, cell, variables", [
    pytest.param("-k a -o s s = r'''{not} $HOME \\n'''", None, {"s": r"{not} $HOME \n"},
                 id="the code is taken verbatim"),
    pytest.param("-k a -o s s = 1", "s += 1", {"s": 2}, id="code on the line goes ahead of a cell"),
    pytest.param("-k a -i filenames,tricky -o s", "s = r'{filenames} {tricky} {other}'",
                 {"s": r"a.txt \1 \g<0> {filenames} {other}"}, id="a dict is looked up by NAME"),
    pytest.param("-k a -p \xb5 -i \xb5 -o \xb5 \xb5 += {\xb5}", None, {"\u03bc": 4},
                 id="names may have any letters"),
    pytest.param("-k {odd_path} -o d d = os.path.basename(os.getcwd())", None,
                 {"d": "a b'\"{x}:$HOME,c"}, id="an entry of a list may name any path"),
    pytest.param("-k {expanded} -o d d = [os.getcwd(), os.path.expanduser('~')]", None,
                 {"d": [os.path.realpath(os.path.expanduser("~"))] * 2},
                 id="elsewhere variables are expanded over there")])
def test_a_call_does_what_its_options_say(session, tmp_path, line, cell, variables):
    odd = tmp_path / "a b'\"{x}:$HOME,c"
    odd.mkdir()
    session.ns.update({
        "filenames": {"a": "a.txt", "b": "b.txt"}, "tricky": r"\1 \g<0> {filenames}",
        "odd_path": [f"a:{odd}"], "expanded": "a:$HOME, b:~/", "\u03bc": 2})  # (the micro sign)
    session.ok(line, cell)
    assert vars(session.a) == variables


@given(st.text(), st.dictionaries(st.sampled_from(["a", "b_1", "xyz"]), st.text()))
def test_substitution_is_one_exact_pass(code, values):
    expected, rest = "", code
    while rest:
        name = next((name for name in values if rest.startswith("{%s}" % name)), None)
        expected += values[name] if name else rest[0]
        rest = rest[len(name) + 2 if name else 1:]
    assert Inside.substitute(code, "k", values) == expected


def test_a_line_in_a_function_takes_its_local_variables(session):
    session.shell.run_cell("def function():\n    local, text = [6], 'y'\n"
                           "    %remote_exec -k a -p local -i text -o y {text} = local\n"
                           "function()").raise_error()
    assert session.a.y == [6]


def test_pushed_objects_are_copies_that_arrive_before_the_code_runs(session):
    session.ns.update(cube=np.arange(1e5), other="text")
    session.ok("-k a,b -p cube,other -o back,other cube[0] = 5; back = cube")
    assert session.b.back[0] == 5 and session.b.other == "text" and session.cube[0] == 0


def test_a_directory_holds_for_later_cells_until_the_restart(session):
    session.ok("-k a:/")
    assert session.there("a", "os.getcwd()") == "/"
    session.ok("-k a -s 1")
    assert session.there("a", "os.getcwd()") != "/"


def test_a_restart_loses_the_kernels_state_but_not_what_came_back(session):
    session.ok("-k a -o pid pid = os.getpid()")
    session.ok("-k a -s -o fresh fresh = 'pid' not in dir()")
    assert session.a.fresh and gone(session.a.pid)


def test_a_shutdown_passes_over_names_without_a_kernel(session):
    pid = session.there("a", "os.getpid()")
    session.ok("-k a,never -s")
    assert gone(pid) and "a" not in session.running()


def test_a_time_out_interrupts_only_who_is_late(session):
    session.ns["naps"] = {"a": "60", "b": "0"}
    failures = session.fails("-k a,b -i naps -t 1 -o x x = 1; import time; time.sleep({naps})")
    assert list(failures) == ["a"] and failures["a"].ename == "TimeoutError"
    assert session.error._render_traceback_()[-1] == (
        "TimeoutError: still busy after 1 s; interrupted")
    assert session.b.x == session.there("a", "x") == 1


@pytest.mark.parametrize("code, evalue", [
    ("try: time.sleep(60)\nexcept KeyboardInterrupt: swallowed = 1", "interrupted"),
    ("{stubborn}", "ignores the interrupt"), ("await asyncio.sleep(30)", "interrupted")])
def test_a_time_out_tells_whether_the_code_heeds_the_interrupt(session, code, evalue):
    failure = session.fails("-k a -i stubborn -t 1 -o swallowed import asyncio, time", code)["a"]
    assert failure.ename == "TimeoutError" and evalue in failure.evalue
    assert "swallowed" not in vars(session.a) and session.took < 20
    if "ignores" in evalue:  # it is left busy
        assert "still busy" in session.misused("-k a 1") and session.running()["a"] == "busy"
        session.open()
        assert until(lambda: session.running()["a"] == "idle")
    session.ok("-k a 1")


def test_a_late_interrupt_does_not_hit_the_next_cell(session):
    session.ok("-k a,b import time")
    for i in range(16):
        session.run(f"-k a,b -t 0.15 time.sleep({0.142 + i / 1000})")
        session.ok("-k a,b -o x x = sum(range(300_000))")


def test_a_time_out_does_not_count_the_journey_of_the_outputs(session, line):
    with line.holding(2):
        session.ok("-k far -t .5 -o x x = 5")
    assert session.far.x == 5 and session.took > 1.5


def test_the_list_shows_kernels_and_kernelspecs(session):
    assert re.search(r"(?s)a +python3 +idle.*kernelspecs:.*python3", session.ok("-l"))


# ---- Which kernelspec -----------------------------------------------------

KERNELSPECS = ["zsh", "python3", "python3-b", "julia-1.9", "ssh-my.host-py", "rik_ssh_r.two_py"]


@pytest.mark.parametrize("wanted, found", [
    ("python3", "python3"), ("julia", "julia-1.9"), ("Julia", "julia-1.9"),
    ("my_host", "ssh-my.host-py"), ("r_py", "rik_ssh_r.two_py")])
def test_a_spec_is_a_name_or_the_only_part_or_pattern_of_one(wanted, found):
    assert Inside.find_kernelspec(wanted, KERNELSPECS) == found


@pytest.mark.parametrize("wanted, candidates", [
    ("ssh", "rik_ssh_r.two_py, ssh-my.host-py"), ("pyton3", "julia-1.9, python3, python3-b, .*")])
def test_a_spec_that_is_none_or_several_is_refused_with_a_list(wanted, candidates):
    with pytest.raises(UsageError, match=candidates):
        Inside.find_kernelspec(wanted, KERNELSPECS)


def test_where_there_is_no_kernelspec_at_all_the_message_says_what_brings_one(
        session, monkeypatch):
    monkeypatch.setitem(session.shell.config, "KernelSpecManager", Config(
        ensure_native_kernel=False, allowed_kernelspecs={"nothing"}))
    assert "`pip install ipykernel`" in session.misused("-k new 1")


def test_a_running_kernel_is_replaced_by_another_spec_only_with_shutdown(session, spec):
    spec("other", *LAUNCH)
    pid = session.there("a", "os.getpid()")
    assert re.search("-s .*other", session.misused("-k a=other 1")) and not gone(pid, 0)
    session.ok("-k a=other -s 1")
    assert gone(pid) and repr(session.a).startswith("<kernel a (other)")
    session.ok("-k a=python3 -s 1")


def test_a_name_keeps_the_spec_it_had_last_also_if_that_did_not_start(session, spec):
    spec("broken", "sh", "-c", "exit 7")
    for target in ("q=broken", "q"):
        assert "exit code 7" in session.fails(f"-k {target} 1")["q"].evalue


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_connection_file_attaches_to_a_kernel_that_runs(session, transport, tmp_path):
    options = {"transport": transport, "ip": str(tmp_path / "s")} if transport == "ipc" else {}
    with OthersKernel(**options) as other:
        other.client.execute("x = 11", reply=True, timeout=30)
        session.ok(f"-k far={other.file} -o x")
        assert session.far.x == session.there("far", "x") == 11
        session.ok("-k far -s")
        assert other.manager.is_alive() and other.client.kernel_info(reply=True, timeout=30)


def test_a_connection_file_is_found_in_the_runtime_directory(session):
    file = session.there("a", "__import__('ipykernel').get_connection_file()")
    assert os.path.dirname(file) == jupyter_runtime_dir()
    session.ok("-k a x = 12")
    session.ok(f"-k again={os.path.basename(file)} -o x")
    session.ok("-k again -s")
    assert session.again.x == 12 and session.ok("-k a print(x)") == "12\n"


def test_an_attached_kernel_is_set_up_again_when_its_owner_restarted_it(session):
    session.ns["three"] = 3
    with OthersKernel() as other:
        for line in ("-o x x = 3", "-p three -o x x = three", "-p three -o x -b x = three"):
            session.ok(f"-k far={other.file} 1")
            other.restart()
            session.ok(f"-k far {line}")
            assert session.read("far.x") == 3 and re.search("far .*\n", session.err)
            session.ok("-k far")
        session.ok("-k far -s")


# ---- What comes back ------------------------------------------------------

def test_the_namespace_of_a_name_is_the_same_object_from_call_to_call(session):
    session.ok("-k a -o x x = 1")
    namespace = session.ns.pop("a")
    session.ok("-k a -o y y = x")
    assert session.a is namespace and vars(namespace) == {"x": 1, "y": 1}


def test_the_namespace_shows_just_the_variables_that_came(session):
    session.ok("-k a -o items,x items, x = [1], 2")
    assert dir(session.a) == sorted(vars(session.a)) == ["items", "x"]
    assert repr(session.a) == "<kernel a (python3): items, x>"
    assert copy.copy(session.a).items is session.a.items and copy.deepcopy(session.a).x == 2


def test_a_variable_that_did_not_come_is_an_attribute_error(session):
    with pytest.raises(AttributeError, match="nothing named 'nope' has come back from a"):
        session.a.nope


def test_reloading_shuts_down_leaks_nothing_and_knows_its_names_again(session):
    namespace = session.a
    for turn, state in enumerate(("1", "-i wait -b {wait}", "os._exit(3)", "1")):
        pid = session.there("a", "os.getpid()")
        session.run(f"-k a,b {state}")
        session.load("reload")
        assert gone(pid)
        session.ok("-k a=python3,b=python3 -o n n = 3")
        assert session.a is namespace and namespace.n == 3
        if not turn:
            opened = Opened()
    assert opened.is_no_more(), (opened.before, opened.now())


def test_the_far_namespace_gains_pickle_and_os_and_nothing_else(session):
    session.ns["gift"] = [1]
    session.ok("-k a -s -p gift -o names names = sorted(n for n in dir() if n[0] != '_')")
    assert set(session.a.names) - {
        "In", "Out", "exit", "quit", "get_ipython", "open"} == {"gift", "os", "pickle"}


@pytest.mark.parametrize("line", ["-o x x = 3", "-p three -o x x = three", "-o x -b x = 3",
                                  ":/usr -o x x = 3 * (os.getcwd() == '/usr')"])
def test_a_kernel_whose_modules_were_dropped_is_set_up_again_and_keeps_its_state(session, line):
    """As a "reload all" snippet does."""
    session.ns["three"] = 3
    session.ok("-k c=python3 import sys; kept = 4; "
               "[sys.modules.pop(name) for name in [*sys.modules] if 'remote_exec' in name]")
    session.ok(f"-k c{'' if line[0] == ':' else ' '}{line}")
    assert session.read("c.x") == 3 and session.there("c", "kept") == 4


def make_values():
    import datetime
    import decimal
    import numpy as np
    import pandas as pd
    values = dict(
        strided=np.arange(20.)[::3], zero=np.array(3.5), empty=np.zeros((0, 4)),
        fortran=np.asfortranarray(np.arange(12.).reshape(3, 4)),
        structured=np.array([(1, 2.5)], dtype=[('a', 'i4'), ('b', 'f8')]),
        objects=np.array([1, 'x', None], dtype=object), cube=np.ones((60, 60, 60)),
        none=None, big=10**50, text='h\u00e9 \U0001f600', raw=bytes(range(256)),
        nested={'a': [1, (2, {3})]}, when=datetime.datetime(2020, 1, 2),
        kinds=(1 + 2j, range(3), frozenset('ab'), Ellipsis, bytearray(b'x'), int),
        money=decimal.Decimal('1.1'),
        records=[{'n': i, 'name': str(i), 'set': {i}} for i in range(1000)])
    frame = pd.DataFrame({'s': ['a', 'b'], 'd': pd.to_datetime(['2020-01-01', '2021-01-01']),
                          'v': [1.5, float('nan')]})
    return values, frame


def test_values_of_any_kind_arrive_equal_and_writable(session):
    session.ok("-k a -o values,frame", body(make_values).rpartition("return")[0])
    values, frame = make_values()
    for name, value in values.items():
        got = session.a.values[name]
        assert type(got) is type(value)
        if isinstance(value, np.ndarray):
            assert got.dtype == value.dtype and got.flags.writeable
            np.testing.assert_array_equal(got, value)
        else:
            assert got == value
    assert session.a.frame.equals(frame)
    session.a.frame.loc[0, "v"] = 9


def test_what_outputs_share_stays_shared(session):
    session.ok("-k a -o figure,axes,one,two", (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt\n"
        "figure, axes = plt.subplots(); axes.plot([1, 2, 4]); plt.close()\n"
        "import numpy as np; shared = np.zeros(100000); one, two = [shared], [shared]"))
    assert session.a.figure.axes[0] is session.a.axes and session.a.one[0] is session.a.two[0]
    assert session.a.axes.lines[0].get_ydata().tolist() == [1, 2, 4]


def make_outputs_that_fail():
    import os
    import sys
    import threading
    with open("only_there.py", "w") as file:
        print("class Thing: pass", file=file)
    sys.path.insert(0, os.getcwd())
    import only_there

    class Mute(Exception):
        def __str__(self):
            raise TypeError

    class Raises:
        def __init__(self, error):
            self.error = error

        def __reduce__(self):
            raise self.error

    class BadHere:
        def __reduce__(self):
            return eval, ("[][1]",)

    values = dict(lock=threading.Lock(), thing=only_there.Thing(), here=BadHere(), good=2,
                  mute=Raises(Mute()), leaves=Raises(SystemExit()))
    globals().update(values)


@pytest.mark.parametrize("outputs, ename, cause", [
    ("missing", "NameError", "'missing'"), ("lock", "TypeError", "lock.*pickle"),
    ("mute", "Mute", "mute"), ("leaves", "SystemExit", "leaves"),
    ("thing", "ModuleNotFoundError", "thing can't be loaded: .*only_there"),
    ("here", "IndexError", "here can't be loaded"),
    ("lock,missing", "", "lock.*missing|missing.*lock"),
    ("lock,thing", "", "lock.*thing can't be loaded")])
def test_an_output_that_cannot_come_is_named_and_takes_no_other_along(
        session, tmp_path, outputs, ename, cause):
    session.ok(f"-k a:{tmp_path} -o good", body(make_outputs_that_fail))
    failure = session.fails(f"-k a -o one,{outputs},two one, two = 1, [good]")["a"]
    assert ename in failure.ename and re.search(cause, failure.evalue), failure
    assert vars(session.a) == {"good": 2, "one": 1, "two": [2]}
    assert "one" not in failure.evalue and "two" not in failure.evalue
    assert gc.isenabled() and session.there("a", "__import__('gc').isenabled()")


def test_all_that_cannot_come_is_named_whatever_the_reason(session):
    failure = session.fails("-k a -o bad,good,missing", (
        "class Bad:\n    def __reduce__(self): return eval, ('1 / 0',)\nbad, good = Bad(), 5"))["a"]
    assert "missing" in failure.evalue and "bad can't be loaded" in failure.evalue
    assert vars(session.a) == {"good": 5}


def test_what_numpy_cannot_load_is_named_with_its_version(session):
    session.ok("-k a", "import numpy\nclass no_such_thing: __module__ = 'numpy'\n"
                       "numpy.no_such_thing = no_such_thing; x = no_such_thing()")
    evalue = session.fails("-k a -o x")["a"].evalue
    assert re.search(r"x can't be loaded: .*no_such_thing.*numpy \d", evalue), evalue


def test_classes_and_functions_of_the_session_travel_by_cloudpickle(session):
    session.ok("-k a -o thing,twice,point", (
        "import dataclasses\nclass Thing:\n    size = 3\nthing = Thing()\n"
        "twice = lambda x: 2 * x\n"
        "Point = dataclasses.make_dataclass('Point', ['x'], namespace={'__module__': '__main__'})\n"
        "point = Point(4)"))
    assert (session.a.thing.size, session.a.twice(4), session.a.point.x) == (3, 8, 4)
    session.shell.run_cell("def mine(x): return x + 1")
    session.ok("-k a -p mine -o got got = mine(1)")
    assert session.a.got == 2


def test_without_cloudpickle_a_class_of_the_session_says_what_it_needs(session):
    failures = session.fails("-k a -s -o thing,fine", (
        "import sys; sys.modules['cloudpickle'] = None\n"
        "class Thing: pass\nthing, fine = Thing(), '__main__'"))
    session.ok("-k a del sys.modules['cloudpickle']")
    assert re.search("thing.* install.* cloudpickle", failures["a"].evalue)
    assert session.a.fine == "__main__"


def peak_memory():
    """Return the most that this process has used since it was last asked."""
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024


@pytest.mark.skipif(psutil.virtual_memory().available < 1e10,
                    reason="less than 10 GB of memory free")
def test_three_gigabytes_arrive_without_a_second_copy(session):
    session.ok("-k c=python3 import numpy as np; x = np.zeros(3 * 2 ** 27, int); "
               "x[::2 ** 20] = range(384)")
    before = peak_memory() and peak_memory()
    session.ok("-k c -o x")
    x = session.c.x
    assert x.nbytes == 3 * 2 ** 30 and peak_memory() - before < 1.2 * x.nbytes
    assert x.flags.writeable and x[::2 ** 20].tolist() == [*range(384)]
    vars(session.c).clear()


@pytest.mark.parametrize("line", ["-o x", "-o x -b"])
def test_the_memory_of_an_output_is_free_when_it_is_deleted(session, line):
    session.ok("-k a import numpy as np")
    before = psutil.Process().memory_info().rss
    session.ok(f"-k a {line} x = np.ones(25_000_000)")
    assert session.read("a.x.sum()") == 25_000_000
    del session.a.x
    assert until(lambda: gc.collect() is None or psutil.Process().memory_info().rss < before + 5e7)


@newest  # in the pickle of Python 3.8, too, but slower
def test_outputs_are_what_they_were_when_the_code_ended(session):
    """Another client's code, queued behind ours, changes the array at once."""
    with OthersKernel() as other:
        session.ok(f"-k one={other.file},two={other.file} "
                   "import numpy as np; x = np.zeros(20_000_000)")
        session.ok("-k one,two -o x x += 1")
        assert all((x == x[0]).all() for x in (session.one.x, session.two.x))
        session.ok("-k one,two -s")


# ---- Many kernels ---------------------------------------------------------

def test_kernels_run_and_stop_at_the_same_time(session, tmp_path, manager_config):
    """Each runs until the other does, and has a thread that nobody ends, so that stopping
    takes the user's grace."""
    manager_config(shutdown_wait_time=7)
    session.ns["flags"] = {"c": ("c", "d"), "d": ("d", "c")}
    session.ok(f"-k c=python3:{tmp_path},d=python3:{tmp_path} -i flags -t 60 -o pid", (
        "import threading, time\nmine, others = {flags}\nopen(mine, 'w').close()\n"
        "while not os.path.exists(others): time.sleep(.02)\n"
        "threading.Thread(target=time.sleep, args=(99,)).start(); pid = os.getpid()"))
    session.ok("-k c,d -s")
    assert 3.5 < session.took < 7 and gone(session.c.pid) and gone(session.d.pid)


def test_kernels_start_at_the_same_time_without_cpu(session, spec, tmp_path):
    """Each starts when the other does."""
    spec("slow", "sh", "-c", f"cd {tmp_path}; touch $$.starts; until [ $(ls *.starts | wc -l) = 2 "
         f"]; do sleep .1; done; sleep 4; exec {' '.join(LAUNCH)}")
    begin = time.process_time()
    session.ok("-k a,s=slow,t=slow 1")
    assert time.process_time() - begin < 0.15 * session.took + 0.2  # the sockets, and a cell
    assert session.took > 4 and session.err == ""
    assert any(re.fullmatch(r"starting s, t \(\d s\); ready: a", text) for text in session.status)
    assert session.status[-1] == ""


@pytest.mark.parametrize("line, names, cause", [
    ("-k a:/usr,b:/no/such/dir -p gift", ["b"], "/no/such/dir"),
    ("-k a,b -p thing", ["a", "b"], "only_here"), ("-k a,broken", ["broken"], "exit code 7")])
def test_no_code_runs_anywhere_if_one_kernel_cannot_be_prepared(
        session, spec, tmp_path, monkeypatch, line, names, cause):
    spec("broken", "sh", "-c", "exit 7")
    (tmp_path / "only_here.py").write_text("class Thing: pass")
    monkeypatch.syspath_prepend(tmp_path)
    session.ns.update(thing=__import__("only_here").Thing(), gift=[1])
    session.ok("-k a,b marker = 0")
    failures = session.fails(f"{line} marker = 1")
    assert list(failures) == names and cause in failures[names[-1]].evalue
    assert session.there("a", "marker") == session.there("b", "marker") == 0
    if "gift" in line:  # what preparation did elsewhere stays
        assert session.there("a", "(gift, os.getcwd())") == ([1], "/usr")


@pytest.mark.parametrize("fate, ename, cause", [
    ("1/0", "ZeroDivisionError", "by zero"), ("os._exit(3)", "DeadKernelError", "exit code 3"),
    ("os.kill(os.getpid(), 9)", "DeadKernelError", "SIGKILL"),
    ("os.kill(os.getpid(), 35)", "DeadKernelError", "-35"),
    ("import ctypes; ctypes.string_at(0)", "DeadKernelError", "SIGSEGV")])
def test_a_kernel_that_fails_takes_nothing_from_the_others(session, fate, ename, cause):
    session.ns["fate"] = {"a": fate, "b": "pass"}
    failures = session.fails("-k a,b -i fate -o x", "x = 2\n{fate}")
    assert list(failures) == ["a"] and session.took < 15
    assert failures["a"].ename == ename and cause in failures["a"].evalue
    assert "x" not in vars(session.a) and session.b.x == 2
    assert session.there("a", "'x' in dir()") == (ename != "DeadKernelError")  # it starts anew


def test_calls_of_threads_run_at_the_same_time(session, tmp_path):
    """Each until the other does."""
    session.ns["meet"] = {name: f"open({str(tmp_path / name)!r}, 'w').close(); "
                                f"{gate(tmp_path / other)}" for name, other in ("ab", "ba")}
    call = session.in_thread("-k b -i meet -t 20 -o x {meet}; x = 1")
    session.ok("-k a -i meet -t 20 -o x {meet}; x = 1")
    call.result(20)
    assert session.a.x == session.b.x == 1


def test_calls_of_threads_that_name_the_same_kernel_take_turns(session):
    session.ok("-k a,b import time; seen = []")
    calls = [session.in_thread(f"-k {names} seen.append(1); time.sleep(.3); seen.append(2)")
             for names in ("a,b", "b,a", "a,b")]
    concurrent.futures.wait(calls, 20)
    assert session.there("a", "seen") == session.there("b", "seen") == [1, 2] * 3


# ---- In the background ----------------------------------------------------

def test_a_background_call_returns_at_once_and_tells_since_when_it_runs(session):
    session.ok("-k a,b -i gate -o x -b {gate}; x = 7")
    assert session.took < 1
    assert re.search(r"running since \d\d:\d\d:\d\d", repr(session.a))
    assert re.search(r"running since \d\d:\d\d:\d\d", session.running()["b"])
    session.open()
    assert session.read("a.x") == session.read("b.x") == 7
    session.ok("-k a,b")
    assert "since" not in repr(session.a) and session.running()["b"] == "idle"


def test_an_attribute_that_a_run_is_to_bring_waits_and_its_old_value_goes(session):
    session.ok("-k a -o x,old x = old = 0")
    session.ok("-k a -i gate -o x -b {gate}; x = 7")
    assert vars(session.a) == {"old": 0} and dir(session.a) == ["old"]
    opener = threading.Timer(0.5, session.open)
    opener.start()
    assert session.read("a.old, a.x, a.old") == (0, 7, 0) and not opener.is_alive()


@pytest.mark.parametrize("ask", [
    lambda session: session.shell.complete("", "a.total.", 8),
    lambda session: session.shell.run_cell("%whos"), lambda session: session.ok("-k c=python3 1"),
    lambda session: pickle.dumps(session.a), lambda session: copy.copy(session.a).old],
    ids=["Tab", "whos", "another kernel", "pickle", "copy"])
def test_nothing_else_waits_for_a_run_or_uses_up_its_failure(session, ask):
    session.ok("-k a -o old old = 1")
    session.ok("-k a -i gate -o total -b {gate}; 1/0")
    with capture_output():
        ask(session)
    assert "since" in repr(session.a)
    session.open()
    assert session.fails("-k a")["a"].ename == "ZeroDivisionError"


@pytest.mark.parametrize("ask", [
    lambda client, **more: client.complete("k1.total.", **more),
    lambda client, **more: client.inspect("k1.total", **more),
    lambda client, **more: client.execute("%whos", **more)], ids=["Tab", "Shift-Tab", "whos"])
def test_nothing_in_a_notebook_waits_for_a_run_or_uses_up_its_failure(notebook, tmp_path, ask):
    notebook.background(f"-k k1 -o total {gate(tmp_path / 'open')}; 1/0")
    try:
        ask(notebook.client, reply=True, timeout=10)
    finally:
        (tmp_path / "open").touch()
        reply, _ = notebook.run("%remote_exec -k k1")
    assert reply["ename"] == "RemoteError"


def test_the_next_call_waits_shows_what_the_run_prints_and_goes_on(session):
    session.ok("-k b n = 0")
    session.ok("-k a -b import time; time.sleep(.5); print('first'); n = 1")
    with capture_output() as shown:
        session.shell.run_cell(
            "def run(code):\n    %remote_exec -k a,b -i code -o n -b {code}\n"
            "for _ in range(3): run('n += 1; print(n)')").raise_error()
    shown = shown.stdout + session.ok("-k a,b print('last')")
    assert shown.count("first\n") == 1, shown
    assert re.findall(r"\[a\] (\d|last)", shown) == ["2", "3", "4", "last"], shown
    assert re.findall(r"\[b\] (.*)", shown) == ["1", "2", "3", "last"]
    assert (session.a.n, session.b.n) == (4, 3)


@pytest.mark.parametrize("wait", ["%remote_exec -k a marker = 1", "a.nowhere"])
@pytest.mark.parametrize("code, ename", [
    ("1/0", "ZeroDivisionError"), ("os._exit(3)", "DeadKernelError"), ("y = 1", "NameError")])
def test_whoever_waits_first_raises_a_runs_failure_once_before_anything_else(
        session, wait, code, ename):
    session.ok("-k a -s marker = 0")
    session.a.nowhere = 0  # of before
    session.ok(f"-k a -o y,nowhere -b {code}")
    with pytest.raises(rx.RemoteError) as caught:
        session.read(wait)
    assert caught.value.failures["a"].ename == ename
    assert ename != "NameError" or session.a.y == 1
    with pytest.raises(AttributeError, match="'nowhere'"):
        session.read("a.nowhere")
    assert session.there("a", "globals().get('marker', 0)") == 0


@pytest.mark.parametrize("wait", ["%remote_exec -k k1 marker = 1", "k1.x",
                                  "%remote_exec -k k1,k2 -t 9"])
def test_a_failure_that_a_notebook_has_shown_is_raised_all_the_same(notebook, wait):
    notebook.ok("%remote_exec -k k1 marker = 0")
    cell = notebook.background("-k k1 -o x 1/0")
    notebook.until(lambda: notebook.under(cell, "error"))
    reply, _ = notebook.run(wait)
    assert reply["ename"] == "RemoteError" and "ZeroDivisionError" in reply["evalue"]
    assert notebook.there("k1", "marker") == 0 and len(notebook.under(cell, "error")) == 1


def test_nbclient_stops_at_a_failure_of_a_run():
    with pytest.raises(Exception, match="-k k\n(?s:.)*ZeroDivisionError"):
        run_with_nbclient("%remote_exec -k k=python3 -b 1/0", "import time; time.sleep(2)",
                          "%remote_exec -k k")


def test_ctrl_c_ends_only_the_waiting_for_an_attribute(session):
    session.ok("-k a -i gate -o x -b {gate}; x = 7")
    for _ in range(2):
        with pressing(0.3), pytest.raises(KeyboardInterrupt):
            session.read("a.x")
    session.open()
    assert session.read("a.x") == 7


def test_ctrl_c_in_a_call_interrupts_the_run_that_it_waits_for(session):
    session.ok("-k a -i begun,wait -b {begun}; {wait}")
    assert session.interrupted("-k a 1", presses=[session.begun]) == "a stopped"


@pytest.mark.parametrize("seconds, fails", [(0.5, True), (60, False)])
def test_a_calls_time_out_counts_for_the_run_that_it_waits_for(session, seconds, fails):
    """From the call on, not from the run's beginning."""
    session.ok("-k a -i gate -o x -b {gate}; x = 7")
    time.sleep(1)
    opener = threading.Timer(3, session.open)
    opener.start()
    session.run(f"-k a -t {seconds}")
    opener.cancel()
    assert ("TimeoutError" in str(session.error)) == fails and ("x" in vars(session.a)) != fails


def test_a_question_of_a_run_is_asked_by_who_waits_for_the_run(session, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "me")
    session.ok("-k a -i begun -o name -b {begun}; name = input('who? ')")
    assert until(session.begun.exists)
    session.ok("-k b import time; time.sleep(.5)")
    assert not asked and session.read("a.name") == "me" and asked == ["who? "]


def test_a_restart_ends_a_run(session):
    session.ok("-k a -i wait -o n -b {wait}")
    session.ok("-k a -s -o n n = 'new'")
    assert session.took < 20 and session.a.n == "new"


def test_the_end_of_the_session_ends_a_run(session):
    pid = session.there("a", "os.getpid()")
    session.ok("-k a,b -i wait -o n -b {wait}")
    session.load("reload")
    assert gone(pid)
    with pytest.raises(Exception, match="was shut down") as caught:  # the class is of before
        session.read("a.n")
    assert type(caught.value).__name__ == "RemoteError"
    session.ok("-k a=python3,b=python3 -o n n = 'newest'")
    assert session.a.n == session.b.n == "newest"


@newest  # on ipykernel 6, displays and errors go under the latest cell
def test_a_notebook_shows_a_run_and_its_failure_under_its_own_cell(notebook, tmp_path):
    cell = notebook.background(f"-k k1,k2 -o x print('on'); {gate(tmp_path / 'open')}; "
                               "print('off'); display(5); 1/0")
    assert "off" not in notebook.shown and notebook.reply(cell)["status"] == "ok"
    notebook.ok("%remote_exec -k k3=python3 -s print('between')")
    (tmp_path / "open").touch()
    notebook.until(lambda: len(notebook.under(cell, "error")) == 2)
    lines = notebook.text(cell).split("\n")
    assert sorted(line for line in lines if line.endswith(("on", "off"))) == [
        "[k1] off", "[k1] on", "[k2] off", "[k2] on"]
    assert len(notebook.under(cell, "display_data")) == 2
    errors = contents(notebook.under(cell), "error")
    assert {each["ename"] for each in errors} == {"RemoteError"}
    assert "[k1] " in str(errors) and "remote_exec.py" not in str(errors)


# ---- Widgets and progress bars --------------------------------------------

def test_a_widget_here_is_as_it_is_there(notebook):
    messages = notebook.widgets("k1", (
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
    messages = notebook.widgets("k1", "slider.close(); ids = 0")
    assert [each["comm_id"] for each in contents(messages, "comm_close")] == [slider]


@pytest.mark.parametrize("callback", [
    "print('now', change.new)", "display(change.new)", "label.value = str(change.new)", "1 / 0"])
def test_what_comes_of_a_move_is_what_would_come_of_a_local_widgets(notebook, callback):
    code = ("slider, label = w.IntSlider(), w.Label()\n"
            f"def moved(change): {callback}\n"
            "slider.observe(moved, 'value'); ids = slider.model_id, label.model_id")

    def moved(slider, label):
        messages = notebook.moved(slider, value=5)
        assert "0" not in callback or "ZeroDivisionError" in str(messages)
        return [(each["msg_type"], each["content"].get("comm_id") == label, [
            each["content"].get(key) for key in ("text", "data")]) for each in messages
            if each["msg_type"] in ("stream", "display_data", "comm_msg", "error")]
    notebook.widgets("k1", code)
    there = moved(*notebook.value("k1.ids"))
    assert notebook.there("k1", "slider.value") == 5
    notebook.ok(f"import ipywidgets as w\n{code}")
    assert there == moved(*notebook.value("ids"))


def a_slider_that_prints():
    slider, seen = w.IntSlider(), []  # noqa: F821

    def moved(change):
        seen.append(change.new)
        print("moved")
        while change.new == 99:
            __import__("time").sleep(.1)
    slider.observe(moved, "value")
    ids = slider.model_id  # noqa: F841


@pytest.fixture
def slider(notebook):
    """The id of a slider on `k1` that prints when it is moved, and `seen` by the kernel."""
    notebook.widgets("k1", body(a_slider_that_prints))
    return notebook.value("k1.ids")


def caught(messages):
    """Return [(line without its label, the `Output` that catches it or None)] of the streams and
    errors, as a front end sees them."""
    catching, found = None, []
    for each in messages:
        content = each["content"]
        if each["msg_type"] == "comm_msg" and "msg_id" in content["data"].get("state", {}):
            msg_id = content["data"]["state"]["msg_id"]
            assert msg_id in ("", each["parent_header"]["msg_id"])
            catching = content["comm_id"] if msg_id else None
        elif each["msg_type"] == "stream":
            found += [(line.split("] ")[-1], catching) for line in content["text"].splitlines()]
        elif each["msg_type"] == "error":
            found.append((content["ename"], catching))
    return found


def test_an_output_widget_catches_what_its_kernel_prints_and_nothing_beside(notebook):
    found = caught(notebook.widgets("k1,k2", (
        "import time; out = w.Output(); ids = out.model_id\n"
        "for i in range(3):\n    print('beside')\n    with out: print('in'); time.sleep(.1)\n")))
    one, two = notebook.value("[k1.ids, k2.ids]")
    assert sorted(found, key=str) == sorted(
        [("in", one), ("in", two), ("beside", None), ("beside", None)] * 3, key=str)


def test_an_error_inside_an_output_widget_shows_inside_and_the_code_goes_on(notebook):
    found = caught(notebook.widgets("k1", (
        "out = w.Output(); ids = out.model_id\nwith out: print('in'); 1 / 0\nprint('beside')")))
    out = notebook.value("k1.ids")
    assert found == [("in", out), ("ZeroDivisionError", out), ("beside", None)]


def test_interact_works(notebook):
    messages = notebook.widgets(
        "k1", "ids = 0\nw.interact(lambda x: print('x =', x), x=(0, 9))")
    models = {each["data"]["state"]["_model_name"]: each["comm_id"]
              for each in contents(messages, "comm_open")}
    assert caught(messages) == [("x = 4", models["OutputModel"])]
    assert caught(notebook.moved(models["IntSliderModel"], value=7)) == [
        ("x = 7", models["OutputModel"])]


@pytest.mark.parametrize("callback", ["None", "os._exit(3)"])
def test_widgets_of_a_kernel_that_is_gone_raise_nothing(notebook, callback):
    """Also if it dies by the move."""
    notebook.widgets("k2", "slider = w.IntSlider(); ids = slider.model_id, os.getpid()\n"
                     f"slider.observe(lambda change: {callback}, 'value')")
    slider, pid = notebook.value("k2.ids")
    if callback == "None":
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
    for value in (5, 6):
        kinds = {each["msg_type"] for each in notebook.moved(slider, value=value)}
        assert kinds <= {"status", "comm_msg"} or callback != "None"  # an echo
    notebook.ok("%remote_exec -k k2 1")


def test_a_kernel_that_runs_in_the_background_gets_moves_when_it_is_free(notebook, slider):
    for value in (1, 2):
        cell = notebook.background("-k k1 import time; time.sleep(1); print('free')")
        notebook.moved(slider, value=value)
        assert "free" not in notebook.text(cell)
        notebook.ok("%remote_exec -k k1 1")
    assert notebook.there("k1", "seen") == [1, 2]


@pytest.mark.parametrize("options", ["", "-b"])
def test_progress_bars_of_several_kernels_move(notebook, options):
    cell = notebook.start(f"%%remote_exec -k k1,k2 {options}\nimport time\n"
                          "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), mininterval=0):\n"
                          "    time.sleep(.2)\nprint('over')")
    notebook.end(cell)
    notebook.until(lambda: notebook.text(cell).count("over") == 2)
    bars = [(each["comm_id"], each["data"].get("state", {}).get("value"))
            for each in contents(notebook.log, "comm_msg")]
    for value in (1.0, 2.0, 3.0):
        assert len({bar for bar, reached in bars if reached == value}) == 2


def test_rich_bars_are_drawn_in_an_output_of_their_own(notebook):
    messages = notebook.widgets("k1,k2", (
        "ids = 0\nfrom rich.progress import track\nfor _ in track(range(3)): pass"))
    outputs = {each["comm_id"] for each in contents(messages, "comm_open")
               if each["data"]["state"]["_model_name"] == "OutputModel"}
    whole = [each for each in contents(messages, "display_data") if "100%" in str(each["data"])]
    assert len(outputs) == 2 <= len(whole)


def test_a_terminal_shows_the_text_of_a_widget(session):
    session.ok("-k a import ipywidgets; display(ipywidgets.IntSlider(7))")
    assert "IntSlider(value=7)" in session.displays[0].data["text/plain"] and session.err == ""


# ---- Errors ---------------------------------------------------------------

def test_an_error_is_the_far_traceback_without_our_frames(session):
    failures = session.fails("-k a 1/0")
    ename, evalue, traceback = failures["a"]
    assert (ename, evalue) == ("ZeroDivisionError", "division by zero")
    assert all(isinstance(line, str) for line in traceback)
    lines = session.error._render_traceback_()
    assert "ZeroDivisionError" in lines[-1] and "remote_exec" not in "\n".join(lines)


def test_an_error_of_several_kernels_is_in_the_order_of_the_targets(session):
    session.fails("-k b,a 1/0")
    assert str(session.error) == "\n".join(
        f"{name}: ZeroDivisionError: division by zero" for name in "ba")
    lines = session.error._render_traceback_()
    assert lines.index("[b] ") < lines.index("[a] ")


SHOWS = "try: 1/0\nexcept Exception: get_ipython().showtraceback()\n"


@pytest.mark.parametrize("before, code, errors, others", [
    ("%matplotlib inline\nimport matplotlib.pyplot as plt", "plt.plot([1, 2]); 1/0", 1,
     ["display_data"]),
    ("get_ipython().events.register('post_run_cell', lambda _: print('hook'))", "1/0", 1,
     ["stream"]),
    ("1;", f"{SHOWS}print('on')", 1, ["stream"]), ("1;", f"{SHOWS}raise KeyError", 2, [])])
def test_a_notebook_shows_each_traceback_once_whatever_comes_after_it(
        notebook, before, code, errors, others):
    notebook.ok(f"%%remote_exec -k k1 -s\n{before}")
    reply, messages = notebook.run(f"%%remote_exec -k k1\n{code}")
    notebook.ok("%remote_exec -k k1 -s")  # the hook goes, too
    shown = [each["msg_type"] for each in messages
             if each["msg_type"] in ("error", "stream", "display_data")]
    assert sorted(shown) == sorted(["error"] * errors + others), shown
    assert (reply["status"] == "ok") == ("print" in code)
    assert "ZeroDivisionError" in str(contents(messages, "error")[0]["traceback"])


@pytest.mark.parametrize("line", ["-k k1 1/0", "-k k1,k2 1/0", "-k k1 -b 1/0"])
def test_where_the_shell_has_no_colours_tracebacks_have_none(notebook, line):
    colours = notebook.value("get_ipython().colors")
    notebook.run("%colors nocolor")
    cell = notebook.start(f"%remote_exec {line}")
    notebook.end(cell)
    notebook.until(lambda: notebook.under(cell, "error"))
    notebook.run("%remote_exec -k k1,k2")
    notebook.run(f"%colors {colours}")
    shown = str(contents(notebook.under(cell), "error"))
    assert "division by zero" in shown and "\\x1b" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("code", [r"'\u4e2d'", r"print('\u4e2d')", r"display('\u4e2d')"])
def test_text_that_a_terminal_lacks_is_escaped_and_takes_nothing_with_it(encoding, code):
    done = ipython(*script(f"%remote_exec -k k=python3 -o y y = 1; {code}", "print(k.y)"),
                   PYTHONIOENCODING=f"{encoding}:strict")
    assert r"\u4e2d" in done.stdout and done.stdout.endswith("1\n") and not done.stderr


def test_code_that_cannot_be_sent_fails_and_the_kernels_go_on(session):
    failures = session.fails("-k a,b print('\ud83d')")
    assert list(failures) == ["a", "b"] and failures["a"].ename == "UnicodeEncodeError"
    session.ok("-k a,b 1")


def test_a_kernel_that_died_between_two_cells_is_started_anew_with_a_line(session):
    pid = session.there("a", "os.getpid()")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    session.ok("-k a -o x x = 4")
    assert session.a.x == 4
    assert re.fullmatch(r"a had died \(.*SIGKILL\) and is started anew\n", session.err)


def write_until_the_end():
    import os
    import sys
    import time
    end, size = time.time() + 0.5, 0
    while time.time() < end:
        size += os.write(2, b"word\n")
    sys.exit(7 if os.fstat(2).st_size == size else 8)


@pytest.mark.parametrize("argv, cause", [
    (["/no/such/program"], "/no/such/program"),
    (["sh", "-c", "echo last words >&2; exit 7"], "DeadKernelError: .*exit code 7.*last words"),
    ([sys.executable, "-c", body(write_until_the_end)], "exit code 7"),  # we read meanwhile
    (["sh", "-c", "trap 'echo > ended; exit' TERM; sleep 99 & wait"],
     "TimeoutError: .*not ready after 1.5 s"),
    (["sh", "-c", "sed 's/\"stdin_port\": [0-9]*/\"stdin_port\": 0/' {connection_file} >copy; "
      f"timeout 4 {sys.executable} -m ipykernel_launcher -f copy"], "exit code 124")])
def test_a_kernel_that_cannot_start_names_the_cause_and_leaves_nothing(
        session, spec, monkeypatch, tmp_path, argv, cause):
    spec("broken", *argv)
    monkeypatch.chdir(tmp_path)
    session.startup_timeout(1.5 if "trap" in argv[-1] else 60)
    session.ns.pop("broken", None)
    before = files()
    failure = session.fails("-k a,broken 1")["broken"]
    assert re.search(cause, f"{failure.ename}: {failure.evalue}"), failure
    assert "broken" not in session.ns and until(lambda: not files() - before)
    assert "trap" not in argv[-1] or until((tmp_path / "ended").exists)  # it was told


@pytest.mark.parametrize("code", ["{press}; {wait}", (
    "import asyncio; asyncio.get_running_loop().call_later(.3, exec, {press!r}); "
    "await asyncio.sleep(30)")])
def test_ctrl_c_stops_the_code_and_keeps_the_state(session, code):
    session.ns["code"] = code.format(**session.ns)
    assert session.interrupted("-k a -i code", "state = 'kept'\n{code}") == "a stopped"
    assert session.there("a", "state") == "kept" and session.out == session.err == ""


@pytest.mark.parametrize("code, shown", [("x = 3", ""), ("1/0", "ZeroDivisionError")])
def test_ctrl_c_keeps_what_the_others_returned_or_shows_why_they_did_not(session, code, shown):
    session.ns["fate"] = {"a": session.wait, "b": code}
    assert session.interrupted("-k a,b -i fate -o x {fate}", presses=[1]) == "a stopped"
    assert shown in session.err and vars(session.b) == ({} if shown else {"x": 3})


@pytest.mark.parametrize("line", [
    "-k a -i begun,stubborn {begun}; {stubborn}", "-k a", "-k a,b -o y y = 1",
    "-k a,b -p late 1", "-k a -o late"],
    ids=["running", "collecting", "collecting with others", "preparing", "fetching"])
def test_a_second_ctrl_c_gives_the_prompt_back_and_the_kernel_stays_busy(session, line):
    """Until it is replaced."""
    session.ns["late"] = Runs(f"{session.ns['begun']}\n{session.ns['stubborn']}")
    if line in ("-k a", "-k a,b -o y y = 1"):
        session.ok("-k a -i begun,stubborn -b {begun}; {stubborn}")
    elif line == "-k a -o late":
        session.ok("-k a -i begun,stubborn", "class Late:\n    def __reduce__(self):\n"
                   "        {begun}; {stubborn}; return int, ()\nlate = Late()")
    assert re.search(r"\ba\b.* still busy",
                     session.interrupted(line, presses=[session.begun, 0.5]))
    assert session.running()["a"] == "busy" and "-s" in session.misused("-k a 1")
    session.ok("-k a -s -o x x = 1")
    assert session.a.x == 1


def test_ctrl_c_ends_a_start_and_what_failed_by_itself_is_told(session, spec):
    spec("sleeper", "sleep", "1000")
    spec("broken", "sh", "-c", "echo last words >&2; exit 7")
    assert session.interrupted("-k a,sleeper,broken 1", presses=[2]) == "sleeper not started"
    assert "last words" in session.err and "sleeper" not in session.running()
    session.ok("-k a 1")


def test_ctrl_c_does_not_wait_for_a_kernel_that_does_not_end(session, manager_config):
    manager_config(shutdown_wait_time=12)
    session.ok("-k b -s 1")
    session.ok("-k b -o pid import threading, time; pid = os.getpid(); "
               "threading.Thread(target=time.sleep, args=(99,)).start()")
    assert session.interrupted("-k b -s", presses=[0.3]) == "b not waited for"
    assert session.took < 5 and "b" not in session.running() and gone(session.b.pid, 30)


@pytest.mark.parametrize("options", ["-k c=pressed", "-k a -s", "-k a -p gift"])
def test_ctrl_c_before_the_code_runs_means_that_it_does_not_run(session, spec, tmp_path, options):
    """While the kernel starts, stops and is prepared."""
    ran = tmp_path / "ran"
    spec("pressed", "sh", "-c", f"kill -2 {os.getpid()}; exec {' '.join(LAUNCH)}")
    session.ns["gift"] = Runs(session.press)
    if "-s" in options:
        session.ok(f"-k a import atexit; atexit.register(lambda: {session.press})")
    session.interrupted(f"{options} open({str(ran)!r}, 'w')")
    session.ok("-k a 1")
    assert not ran.exists()


@pytest.mark.parametrize("reduced, line", [
    ("{press}; {wait}; return int, ()", "a stopped"),
    ("return eval, ('[{press}, {wait}]',)", "a not loaded here")])
def test_ctrl_c_ends_the_pickling_there_and_the_loading_here(session, reduced, line):
    session.ns["reduced"] = reduced.format(
        press=session.press.replace("'", '"'), wait=session.wait.replace("'", '"'))
    assert session.interrupted("-k a -i reduced -o slow", (
        "class Slow:\n    def __reduce__(self): {reduced}\nslow = Slow()")) == line
    session.ok("-k a 1")


def test_one_ctrl_c_waits_for_the_outputs_and_a_second_one_does_not(session, line):
    with line.holding(3):
        session.interrupted("-k far -o x x = 6", presses=[1])
        assert session.far.x == 6
    with line.holding(60):
        session.interrupted("-k far -o x x = 7", presses=[0.5, 0.5])
    assert session.there("far", "8") == 8


def test_a_reply_that_was_lost_with_the_connection_is_told(session, line, tmp_path):
    loser = THREADS.submit(line.lose_reply, session.begun, tmp_path / "over")
    failures = session.fails("-k far -i begun -o x", f"x = 9; {{begun}}\n{gate(tmp_path / 'over')}")
    loser.result(30)
    assert failures["far"].ename == "LostReplyError" and session.took < 40
    assert session.there("far", "x") == 9


def test_what_another_clients_failure_made_the_kernel_drop_is_told(session):
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        for _ in range(20):  # (an ipykernel drops only what it has not yet taken up)
            other.client.execute("__import__('time').sleep(.5); 1/0")
            session.run("-k far x = 1")
            if session.error:
                break
        assert session.error.failures["far"].ename == "AbortedError"
        session.ok("-k far x = 1")


def test_a_kernel_whose_end_cannot_be_made_sure_is_told(session, spec, tmp_path, monkeypatch):
    (tmp_path / "stuck.py").write_text(
        "from jupyter_client.provisioning import LocalProvisioner\n"
        "class Stuck(LocalProvisioner):\n"
        "    async def cleanup(self, restart=False): raise RuntimeError('no way')\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint(
        "stuck", "stuck:Stuck", "jupyter_client.kernel_provisioners")
    monkeypatch.setitem(KernelProvisionerFactory.instance().provisioners, "stuck", entry)
    spec("stuck", *LAUNCH, metadata={"kernel_provisioner": {"provisioner_name": "stuck"}})
    session.ok("-k stuck 1")
    failure = session.fails("-k stuck -s")["stuck"]
    assert failure.ename == "ShutdownError" and "no way" in failure.evalue


def test_an_attached_kernel_that_died_is_told(session):
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        failure = session.fails("-k far os._exit(3)")["far"]
        assert failure.ename == "DeadKernelError" and "not started here" in failure.evalue
        other.restart()
        session.ok("-k far 1")
        other.manager.shutdown_kernel(now=True)
        assert "not started here" in session.fails("-k far 1")["far"].evalue
        assert session.took < 20


MUTE = ("from ipykernel.kernelapp import IPKernelApp as App; "
        "App.init_heartbeat = lambda app: None; App.launch_instance()")


def test_a_busy_or_silent_kernel_is_not_a_dead_one(session, spec):
    """One holds the GIL; the other one's heartbeat is silent, as those of other languages are
    while they work."""
    spec("mute", sys.executable, "-c", MUTE, *LAUNCH[-2:])
    session.ns["work"] = {"a": "hold(7)", "mute": "time.sleep(7)"}
    session.ok("-k a,mute -i work -o x", (
        "import ctypes, time\n"
        "def hold(seconds): ctypes.PyDLL(None).usleep(int(seconds * 1e6))\n"
        "x = 1\nbegin = time.time(); {work}; assert time.time() - begin > 6.5"))
    assert any(re.fullmatch(r"waiting for a, mute \(\d s\); mute does not answer since [\d:]{8}",
                            text) for text in session.status), session.status
    assert not any("a does not answer" in text for text in session.status)
    assert session.a.x == session.mute.x == 1 and session.err == ""


# ---- What the user sees ---------------------------------------------------

def test_one_kernel_shows_as_if_it_ran_here(session):
    session.ok("-k a", "print('x', end=''); import sys; print('e', file=sys.stderr)\n7")
    assert session.out.startswith("x") and "[a]" not in session.out and session.err == "e\n"
    assert [each.data["text/plain"] for each in session.displays] == ["7"]
    assert session.ok("-k a 7;") == "" and not session.displays


def test_several_kernels_show_whole_lines_each_with_its_label(session):
    session.ok("-k a,b", "print('one\\ntwo', end='')\n'expr'")
    assert sorted(re.findall(r"\[[ab]\] (?:one|two)\n", session.out)) == [
        "[a] one\n", "[a] two\n", "[b] one\n", "[b] two\n"]
    assert [each.data["text/plain"] for each in session.displays] == ["'expr'"] * 2


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(alphabet="ab\r\n é", max_size=12), max_size=12))
def test_every_line_of_a_stream_is_labelled_however_it_comes(session, chunks):
    """One that ends in a carriage return, too (a progress bar)."""
    session.ns["chunks"] = {"a": chunks, "b": []}
    session.ok("-k a,b -i chunks", "import sys\nfor chunk in {chunks}:\n"
                                   "    sys.stdout.write(chunk); sys.stdout.flush()")
    expected, lines = (re.findall(r"[^\r\n]+", text) for text in ("".join(chunks), session.out))
    assert [line for line in lines if line != "[a] "] == [f"[a] {line}" for line in expected]


def test_late_output_shows_in_a_terminal_at_the_next_call(session):
    shown = session.ok("-k a -i gate", "import threading\n"
                       "thread = threading.Thread(target=lambda: ({gate}, print('late')))\n"
                       "thread.start()")
    session.open()
    for code in ("thread.join(); import time; time.sleep(.3)", "1;"):
        shown += session.ok(f"-k a {code}")
    assert shown == "late\n"


@newest  # on ipykernel 6, displays go under the latest cell
@pytest.mark.parametrize("code, kernels, between", [
    ("threading.Thread(target=lambda: ({gate}, print('late'))).start()", "k1", "1"),
    ("threading.Thread(target=lambda: ({gate}, print('late'))).start()", "k1,k2", "1"),
    ("subprocess.Popen(['sh', '-c', 'until [ -e {path} ]; do sleep .05; done; echo late'])",
     "k1", "1"),
    # (what a thread prints, ipykernel itself puts under its latest cell)
    ("async def late():\n    while not os.path.exists({path!r}): await asyncio.sleep(.05)\n"
     "    print('late')\ntask = asyncio.ensure_future(late())", "k1", "%remote_exec -k k1 1;")],
    ids=["thread", "several kernels", "subprocess", "task"])
def test_late_output_shows_in_a_notebook_as_it_comes_under_its_cell(
        notebook, tmp_path, code, kernels, between):
    path = str(tmp_path / "open")
    code = code.format(gate=gate(path), path=path)
    cell = notebook.start(f"%%remote_exec -k {kernels}\nimport asyncio, subprocess, threading\n"
                          f"{code};")
    notebook.end(cell)
    notebook.ok(between)
    (tmp_path / "open").touch()
    many = len(kernels.split(","))
    notebook.until(lambda: str(contents(notebook.log, "stream")).count("late") == many)
    assert sorted(notebook.text(cell).splitlines()) == (
        ["late"] if many == 1 else ["[k1] late", "[k2] late"])


def test_floods_of_lines_and_displays_lose_nothing(session):
    session.ok("-k a,b -o last", "for last in range(100000): print(last)")
    lines = session.out.splitlines()
    assert [line for line in lines if line.startswith("[a]")] == [
        f"[a] {i}" for i in range(100000)]
    assert len(lines) == 200000 and session.b.last == 99999
    session.ok("-k a for i in range(5000): display(i)")
    assert [each.data["text/plain"] for each in session.displays] == [
        str(i) for i in range(5000)]


def test_text_passes_unchanged_whatever_is_in_it(session):
    session.ok("-k a", "print('\\0 \\x1b[31mred\\x1b[0m \\U0001f600', 'x' * 10**6)")
    assert session.out == "\0 \x1b[31mred\x1b[0m \U0001f600 " + "x" * 10**6 + "\n"
    session.run("-k a print('\\ud800')")
    session.ok("-k a 1")


def test_a_notebook_shows_the_data_of_displays_unchanged(notebook):
    messages = notebook.ok("%%remote_exec -k k1,k2 -o x\nx = 1\n"
                           "display({'text/html': '<b>'}, raw=True)\nprint('hi')")
    assert "[k1] hi\n" in notebook.shown and "[k2] hi\n" in notebook.shown
    assert [each["data"] for each in contents(messages, "display_data")] == [
        {"text/html": "<b>"}] * 2


def test_only_the_id_of_a_display_is_made_its_kernels_own(notebook):
    messages = notebook.ok("%%remote_exec -k k1\nfrom IPython.display import publish_display_data\n"
                           "publish_display_data({}, transient={'display_id': 'd', 'other': 1})")
    assert [each["transient"] for each in contents(messages, "display_data")] == [
        {"display_id": "k1 d", "other": 1}]


def test_capture_captures_text_and_displays(notebook):
    notebook.ok("%%capture caught\n%remote_exec -k k1,k2 print('text'); display(5)")
    assert notebook.shown == ""
    assert notebook.value("sorted(caught.stdout.split()), [o.data for o in caught.outputs]") == (
        ["[k1]", "[k1]", "[k2]", "[k2]", "text", "text"], [{"text/plain": "5"}] * 2)


def test_tb_and_xmode_show_the_far_traceback(notebook):
    reply, _ = notebook.run("%remote_exec -k k1,k2 1/0")
    assert reply["ename"] == "RemoteError" and "ZeroDivisionError" in reply["evalue"]
    for before, after in (("", "%tb"), ("%xmode Minimal", "%remote_exec -k k1 1/0")):
        notebook.run(before)
        _, messages = notebook.run(after)
        assert "ZeroDivisionError" in str(messages) and "remote_exec.py" not in str(messages)
    notebook.run("%xmode Context")


def test_updates_and_clear_output_work_and_two_kernels_do_not_share_a_display(notebook):
    code = ("from IPython.display import clear_output\n"
            "h = display(1, display_id='same'); h.update(2)\n"
            "print('gone', end=''); clear_output(); print('there')")
    kinds = ["display_data", "update_display_data", "clear_output"]
    messages = notebook.ok(f"%%remote_exec -k k1\n{code}")
    assert [each["msg_type"] for each in messages if each["msg_type"] in kinds] == kinds
    messages = notebook.ok(f"%%remote_exec -k k1,k2\n{code}")
    ids = [each["transient"]["display_id"] for each in contents(messages, *kinds[:2])]
    assert len(ids) == 4 and len(set(ids)) == 2
    assert "gone" not in notebook.shown and "[k1] there\n" in notebook.shown


def test_a_help_page_is_a_page_and_those_of_several_kernels_all_show(notebook):
    reply, _ = notebook.run("%%remote_exec -k k1\nprint?")
    assert "sys.stdout" in str(reply["payload"])
    messages = notebook.ok("%%remote_exec -k k1,k2\nprint?")
    assert len(contents(messages, "display_data")) == 2
    assert "[k1]" in notebook.shown and "[k2]" in notebook.shown


def test_a_notebooks_status_line_is_gone_in_the_end_and_has_data_always(notebook):
    """nbconvert warns of a display without."""
    messages = notebook.ok("%%remote_exec -k k1,k2\nimport time; time.sleep(4)")
    shown = [each["data"] for each in contents(messages, "display_data", "update_display_data")]
    assert re.fullmatch(r"waiting for k1, k2 \(\d s\)", shown[0]["text/plain"])
    assert all(shown) and set(shown[-1].values()) == {""}


def test_a_terminals_status_line_fits_its_width(session, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    targets = ",".join(f"kernel_{number}=python3" for number in ("one", "two", "three"))
    session.ok(f"-k {targets} import time; time.sleep(5)")
    assert session.status[0].startswith("waiting for kernel_") and session.status[-1] == ""
    assert max(map(len, session.status)) <= 40


def test_questions_and_passwords_are_asked_here_with_a_label_for_several(notebook):
    notebook.ok("%remote_exec -k k1 -o name name = input('who? ')", ["me"])
    assert notebook.prompts == ["who? "]
    notebook.ok("%remote_exec -k k1,k2 -o name import getpass; name = getpass.getpass('pw? ')",
                ["me", "you"])
    assert sorted(notebook.prompts) == ["[k1] pw? ", "[k2] pw? "]
    assert notebook.value("{k1.name, k2.name}") == {"me", "you"}


def test_the_debugger_asks_here(notebook):
    notebook.run("%remote_exec -k k1 1/0")
    notebook.ok("%%remote_exec -k k1\n%debug", ["p 6 * 7", "q"])
    assert "42" in notebook.shown and notebook.prompts == ["ipdb> ", "ipdb> "]


@pytest.mark.parametrize("code", ["__import__('time').sleep(60)", "input('wait ')"])
def test_one_ctrl_c_in_a_notebook_ends_all_that_runs_and_asks(notebook, code):
    cell = notebook.start(f"%remote_exec -k k1,k2 print('on'); {code}")
    if "input" in code:  # while one kernel asks, the output of the other one waits
        notebook.client.get_stdin_msg(timeout=30)
    else:
        notebook.until(lambda: notebook.text(cell).count("on\n") == 2)
    assert notebook.interrupt(cell) == "k1, k2 stopped"
    assert not notebook.client.stdin_channel.msg_ready()
    notebook.ok("%remote_exec -k k1,k2 print(2)")


def test_nbclient_runs_a_notebook_and_saves_the_state_of_its_widgets():
    notebook = run_with_nbclient(
        "%%remote_exec -k k=python3 -o x\nx = 3\nprint('hi')",
        "%remote_exec -k k import ipywidgets; display(ipywidgets.IntSlider(7))")
    _, printed, slider = notebook.cells
    assert printed.outputs[-1].text == "hi\n"  # (the status line, if it was slow)
    view = slider.outputs[0].data["application/vnd.jupyter.widget-view+json"]
    saved = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert saved[view["model_id"]]["state"]["value"] == 7


def test_a_question_that_nobody_can_answer_is_an_error():
    with pytest.raises(Exception, match="StdinNotImplementedError"):
        run_with_nbclient("%remote_exec -k k=python3 input()")


def test_a_terminal_shows_the_prompt_ctrl_c_questions_and_the_status_line():
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


# ---- Other kernels than Python --------------------------------------------

@pytest.fixture
def bash(spec, tmp_path):
    spec("shell", sys.executable, "-m", "bash_kernel", "-f", "{connection_file}", language="bash",
         env={"HOME": str(tmp_path)})  # what the shell does at its start there may take long


def test_a_kernel_of_another_language_runs_code_and_shows_its_output(session, bash):
    assert session.ok("-k shell=shell echo $((6*7))") == "42\n"
    assert session.interrupted("-k shell sleep 20", presses=[0.5]) == "shell stopped"
    assert session.fails("-k shell false")["shell"].evalue == "1"
    assert session.error._render_traceback_() == ["Error: 1"]  # it names none


@pytest.mark.parametrize("line", ["-k shell -o x x=1", "-k shell:/tmp ls", "-k shell -p press ls"])
def test_outputs_pushes_and_directories_need_python_and_say_so(session, bash, line):
    assert "bash" in session.misused(line)


@pytest.mark.skipif(not importlib.util.find_spec("xpython"), reason="no xeus-python")
def test_a_python_kernel_without_ipython_runs_code_and_says_what_more_needs(session, spec):
    spec("raw", sys.executable, "-m", "xpython_launcher", "-f", "{connection_file}", "--raw")
    assert session.ok("-k a,raw x = 42; print(x)").count("42\n") == 2
    for line in ("-k raw:/ x = 1", "-k raw -o x x = 1", "-k raw -p gate x = 1"):
        assert re.search("need Python.* with IPython", session.misused(line))
    assert session.fails("-k raw 1/0")["raw"].ename == "ZeroDivisionError"


@newest
@pytest.mark.xdist_group("old")
@pytest.mark.parametrize("version", OLD)
def test_older_pythons_exchange_everything(session, spec, version, installs):
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
    session.ok("-k old -s 1")


# ---- Configuration, fleets, security --------------------------------------

@pytest.fixture
def connection(session):
    """The connection file of the kernel `a`: (path, what it says)."""
    path = pathlib.Path(session.there("a", "__import__('ipykernel').get_connection_file()"))
    return path, json.loads(path.read_text())


def test_local_kernels_use_sockets_where_only_the_user_can_enter(session, connection):
    file, info = connection
    folder, name = os.path.split(info["ip"])
    assert info["transport"] == "ipc" and os.stat(folder).st_mode & 0o777 == 0o700
    assert str(file.parent) == jupyter_runtime_dir() and file.stat().st_mode & 0o777 == 0o600
    session.ok("-k a -s")
    assert not file.exists() and not list(pathlib.Path(folder).glob(name + "*"))


def test_the_users_transport_is_taken_and_encrypted_where_that_is_possible(
        session, manager_config):
    manager_config(transport="tcp")
    session.ok("-k a=python3 -s 1")
    manager_config()
    info = json.loads(session.there(
        "a", "open(__import__('ipykernel').get_connection_file()).read()"))
    assert info.get("transport", "tcp") == "tcp"
    if "curve_publickey" not in info:
        pytest.skip("this jupyter_client has no encryption")
    with zmq.Context() as context, context.socket(zmq.SUB) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://{info['ip']}:{info['iopub_port']}")
        stranger.subscribe(b"")
        assert session.ok("-k a print('secret')") == "secret\n" and not stranger.poll(1000)
    session.ok("-k a -s 1")


def test_a_message_that_is_signed_with_another_key_is_ignored(session):
    session.ok("-k a", (
        "from jupyter_client.session import Session\nkernel = get_ipython().kernel\n"
        "Session(key=b'wrong').send(kernel.iopub_socket, 'stream', "
        "{'name': 'stdout', 'text': 'forged'}, kernel.get_parent())\nprint('true')"))
    assert session.out == "true\n"


def test_one_file_is_enough_and_may_be_edited_while_a_session_is_open(tmp_path):
    source = (HERE / "remote_exec.py").read_text(encoding="utf-8")
    (tmp_path / "remote_exec.py").write_text(source, encoding="utf-8")
    done = ipython(*script(
        "source = open('remote_exec.py', encoding='utf-8').read()",
        "_ = open('remote_exec.py', 'w', encoding='utf-8').write('# more\\n' * 20 + source)",
        "%remote_exec -k k=python3 -p source -o x x = len(source)", "print(k.x)"), cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"{len(source)}\n", "")


def take_port():
    import json
    import os
    import socket
    import sys
    with open(sys.argv[2]) as file:
        taken = socket.create_server(("127.0.0.1", json.load(file)[port]))  # noqa: F821
    os.set_inheritable(taken.detach(), True)
    os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]])


@pytest.mark.parametrize("port", [
    "shell_port", pytest.param("iopub_port", marks=newest)])  # before 3.9, it is said at the end
def test_a_port_that_somebody_took_is_named(session, spec, port):
    session.startup_timeout(8)  # with its iopub port taken, ipykernel hangs
    spec("taken", sys.executable, "-c", body(take_port, port=port), *LAUNCH[-2:])
    assert re.search("(?i)address already in use", session.fails("-k taken 1")["taken"].evalue)


def write_file_anew():
    import os
    import sys
    import time
    with open(sys.argv[2]) as file:
        info = file.read()
    for _ in range(2):
        os.unlink(sys.argv[2])
        time.sleep(.5)
        with open(sys.argv[2], "w") as file:
            file.write(info)
        time.sleep(.5)
    os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]])


@pytest.mark.parametrize("argv", [
    [sys.executable, "-c", body(write_file_anew), *LAUNCH[-2:]],  # as an encrypted ipykernel does
    ["sh", "-c", "sleep .5; sed -i s/127.0.0.1/127.0.0.2/ {connection_file}; exec %s" % (
        " ".join(LAUNCH))],
    ["sh", "-c", "sleep .5; f={connection_file}; sed s/127.0.0.1/127.0.0.2/ $f >$f.new; "
     "head -c 99 $f.new >$f; sleep .5; cat $f.new >$f; rm $f.new; exec %s" % " ".join(LAUNCH)]])
def test_a_connection_file_is_followed_until_the_kernel_answers(
        session, spec, manager_config, argv):
    """As a batch job writes where it runs; half-written, it is read again."""
    manager_config(shutdown_wait_time=60)
    spec("moved", *argv)
    session.ok("-k moved -o pid pid = os.getpid()")
    assert session.interrupted("-k moved -i press,wait {press}; {wait}") == "moved stopped"
    session.ok("-k moved -s")
    assert gone(session.moved.pid, 1) and session.took < 20


@pytest.mark.parametrize("limit", [(60, 4096), (150, 150)])
def test_the_limit_of_open_files_is_raised_or_who_cannot_start_is_told(limit):
    done = ipython(*script(
        "import time; begin = time.time(); targets = ['c%d=python3' % i for i in range(14)]",
        "try:", "    %remote_exec -k {targets} -o x x = 1",
        "except Exception as error: print(error)",
        "print(time.time() - begin < 30)", "%remote_exec -l"),
        before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
    running = len(re.findall(r"^  c\d+  python3  idle", done.stdout, re.M))
    failed = [line for line in done.stdout.lower().split("\n") if "too many open files" in line]
    assert "True\n" in done.stdout, done
    assert (running == 14 and not failed) if limit[1] > 1000 else (0 < running < 14 and failed)


def test_a_notebooks_end_takes_two_seconds_and_leaves_nothing():
    """One kernel is idle, one holds a thread, one ignores shutdown, one is busy."""
    before, notebook = files(), Notebook()
    session = notebook.value("__import__('os').getpid()")
    notebook.ok("%remote_exec -k k1=python3,k2=python3,k3=python3,k4=python3 -o pid "
                "import threading, time, signal; pid = os.getpid()")
    pids = notebook.value("[k1.pid, k2.pid, k3.pid, k4.pid]")
    notebook.ok("%remote_exec -k k2 threading.Thread(target=time.sleep, args=(99,)).start()")
    notebook.ok("%remote_exec -k k3 signal.signal(signal.SIGTERM, lambda *_: 0); "
                "get_ipython().kernel.do_shutdown = None")
    cell = notebook.start("%%remote_exec -k k4\nprint('on')\nwhile True:\n"
                          "  try: time.sleep(60)\n  except KeyboardInterrupt: print('no')")
    notebook.until(lambda: "on\n" in notebook.text(cell))
    notebook.manager.interrupt_kernel()
    notebook.until(lambda: "no\n" in notebook.text(cell))
    assert "k4 still busy" in notebook.interrupt(cell)
    begin = time.monotonic()
    notebook.close()
    assert time.monotonic() - begin < 3  # a front end grants 2.5, on an idle machine
    assert all(gone(pid, 1) for pid in pids) and files(session) <= before


def test_a_scripts_end_is_silent_and_leaves_nothing(tmp_path):
    """One kernel has a thread, one is busy."""
    before = files()
    done = ipython(*script(
        "%remote_exec -k k=python3,m=python3 -o pid pid = os.getpid()", "print(k.pid, m.pid)",
        "%remote_exec -k k import threading, time; "
        "threading.Thread(target=time.sleep, args=(100,)).start()",
        "%remote_exec -k m -b import time; time.sleep(100)", "import time; print(time.time())"))
    ended = time.time()
    pids, last = done.stdout.splitlines()
    assert done.stderr == "" and ended - float(last) < 10
    assert all(gone(int(pid), 1) for pid in pids.split()) and files(done.pid) <= before


@pytest.mark.parametrize("seconds, line", [
    (0.8, "pass"), (4, "get_ipython().config.KernelManager.shutdown_wait_time = 20")])
def test_a_far_exit_handler_finishes_when_a_terminal_session_ends(tmp_path, seconds, line):
    done = ipython(*script(
        line, "%remote_exec -k k=python3,m=python3 import atexit, pathlib, time; "
        f"atexit.register(lambda: (time.sleep({seconds}), "
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()));"))
    assert len(list(tmp_path.iterdir())) == 2 and (done.stdout, done.stderr) == ("", "")


def test_what_started_a_kernel_is_told_to_end(session, spec, tmp_path, manager_config):
    manager_config(shutdown_wait_time=4)
    spec("wrapped", "sh", "-c", f"trap 'touch {tmp_path}/ended; exit' TERM; {' '.join(LAUNCH)}; "
                                "while :; do sleep .1; done")
    pid = session.ok("-k wrapped 1") or session.there("wrapped", "os.getppid()")
    session.ok("-k wrapped -s")
    assert (tmp_path / "ended").exists() and gone(pid)


@pytest.mark.parametrize("runtime_dir_is_there", [False, True])
def test_where_the_home_cannot_be_written_files_are_in_the_sessions_own_directory(
        tmp_path, runtime_dir_is_there):
    home, runtime = tmp_path / "home", tmp_path / "home" / "runtime"
    (runtime if runtime_dir_is_there else home).mkdir(mode=0o500, parents=True)
    home.chmod(0o500)
    # root may write anywhere, unless it gives up CAP_DAC_OVERRIDE (prctl(2): 24, 1)
    done = ipython(*script(
        "%remote_exec -k k=python3 import ipykernel; f = ipykernel.get_connection_file(); "
        "print(*[oct(os.stat(each).st_mode & 0o777) for each in (f, os.path.dirname(f))], f)"),
        before=lambda: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0),
        HOME=str(home), JUPYTER_RUNTIME_DIR=str(runtime))
    home.chmod(0o700)
    file, directory, path = done.stdout.split()[-3:]
    assert (file, directory) == ("0o600", "0o700"), done
    assert str(home) not in path and not os.path.exists(os.path.dirname(path))


def start_a_kernel():
    import os
    with open(folder + "/starts", "a+") as file:  # noqa: F821
        print(os.getpid(), file=file, flush=True)
        file.seek(0)
        if len(file.readlines()) <= 10:  # the brake
            try:
                get_ipython().run_line_magic("remote_exec", "-k gpu=python3 x = 1")  # noqa: F821
            except BaseException as error:
                with open(folder + "/refused", "a") as refused:  # noqa: F821
                    print(error, file=refused)


def test_start_up_files_that_start_kernels_make_no_endless_chain(tmp_path):
    """At the third level the start is refused, with a line that says why."""
    profile = tmp_path / "ipython" / "profile_default"
    (profile / "startup").mkdir(parents=True)
    (profile / "ipython_config.py").write_text(
        "c.InteractiveShellApp.extensions = ['remote_exec']\n")
    (profile / "startup" / "10.py").write_text(body(start_a_kernel, folder=str(tmp_path)))
    done = ipython("-c", "%remote_exec -k gpu print(6 * x)",
                   IPYTHONDIR=str(tmp_path / "ipython"), PYTHONPATH=str(HERE))
    starts = (tmp_path / "starts").read_text().split()
    assert all(gone(int(pid)) for pid in starts) and len(starts) == 3
    refused, = (tmp_path / "refused").read_text().splitlines()
    assert re.search("start-?up", refused) and done.stdout == "6\n"


# ---- What is hard to break --------------------------------------------------

def test_the_memory_of_a_push_that_failed_is_free(session):
    large = session.ns["large"] = np.ones(25_000_000).view(type("Large", (np.ndarray,), {}))
    session.ns.update(alive=weakref.ref(large), bad=Runs("1 / 0"))
    assert session.fails("-k a,b -p large,bad 1")["a"].ename == "ZeroDivisionError"
    session.error = large = None
    del session.ns["large"]
    assert until(lambda: gc.collect() is None or session.alive() is None)


def test_threads_that_name_a_new_kernel_get_the_same_one(session):
    before = children()
    calls = [session.in_thread(f"-k c=python3 x{i} = {i}") for i in range(4)]
    assert not concurrent.futures.wait(calls, 30).not_done and len(children() - before) == 1
    assert session.there("c", "[x0, x1, x2, x3]") == [0, 1, 2, 3]


def test_the_question_of_one_thread_holds_up_no_other(session, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: str(call.result(10)))
    call = session.in_thread("-k b import time; time.sleep(.5)", "-k b -o x x = 2")
    session.ok("-k a -o name name = input('who? ')")
    assert session.a.name == "[None, None]" and session.b.x == 2


def test_ctrl_c_stops_only_the_kernels_of_the_call_in_the_main_thread(session):
    call = session.in_thread("-k b -i gate -o x {gate}; x = 3")
    assert session.interrupted("-k a -i begun,wait {begun}; {wait}", presses=[session.begun]) == (
        "a stopped")
    session.open()
    call.result(20)
    assert session.b.x == 3


def test_a_failed_run_takes_nothing_from_the_others(session):
    session.ns["fate"] = {"a": "os._exit(3)", "b": "x = 1", "c": "1/0"}
    session.ok("-k a,b,c=python3 -i fate -o x -b {fate}")
    assert session.read("b.x") == 1
    failures = session.fails("-k a,b,c")
    assert [each.ename for each in failures.values()] == ["DeadKernelError", "ZeroDivisionError"]
    session.ok("-k a,b,c 1")


def test_any_name_may_be_awaited_set_and_deleted_meanwhile(session):
    session.ok("-k a -i gate -o x,y,__doc__,__repr__ -b {gate}; x = y = 1; __doc__ = 'far'; "
               "__repr__ = 2")
    session.a.y = 3
    del session.a.y
    session.open()
    session.ok("-k a")
    assert vars(session.a) == {"x": 1, "y": 1, "__doc__": "far", "__repr__": 2}
    assert repr(session.a).startswith("<kernel a (python3): ")


def test_ctrl_c_while_an_attribute_is_loaded_does_not_lose_it(session):
    session.ok("-k a -o pressed,x -b", "class Pressed:\n"
               f"    def __reduce__(self): return os.kill, ({os.getpid()}, 2)\n"
               "pressed, x = Pressed(), 7")
    with pytest.raises(KeyboardInterrupt):
        session.read("a.x")
    assert session.read("a.x") == 7


def test_a_run_may_be_awaited_by_threads_and_a_call_at_once(session):
    """Who waits so holds up no other call, -s neither."""
    session.ok("-k a -i gate -o x -b {gate}; x = 7")
    readers = [THREADS.submit(lambda: session.a.x) for _ in range(3)]
    opener = threading.Timer(1, session.open)
    opener.start()
    session.ok("-k a")
    assert [each.result(10) for each in readers] == [7, 7, 7]
    session.ok("-k a -i wait -o x -b {wait}; x = 1")
    reader = THREADS.submit(lambda: session.a.x)
    for call in ("-k b 1", "-k a -s"):
        session.ok(call)
        assert session.took < 10
    assert "a: ShutdownError: the kernel was shut down" in str(reader.exception(10))


def test_a_question_of_a_run_in_a_notebook_waits(notebook, tmp_path):
    notebook.background(f"-k k1 -o name open({str(tmp_path / 'begun')!r}, 'w').close(); "
                        "name = input('who? ')")
    assert until((tmp_path / "begun").exists)
    for code in ("import time; time.sleep(.5)", "%remote_exec -k k2 1;"):
        notebook.ok(code, ["wrong"])
        assert not notebook.prompts
    notebook.ok("%remote_exec -k k1", ["me"])
    assert notebook.value("k1.name") == "me"


def test_a_notebook_loads_a_runs_outputs_when_they_come_and_uses_little_cpu(notebook):
    cell = notebook.start("%%remote_exec -k k1 -o x,y -b\nimport time\nfor i in range(300):\n"
                          "    print(i); time.sleep(.01)\n"
                          "x = 7; y = b'y' * 10**6; print('over')")
    notebook.end(cell)
    before = notebook.value("sum(__import__('os').times()[:2])")
    notebook.until(lambda: "over" in notebook.text(cell))
    assert notebook.value("sum(__import__('os').times()[:2])") - before < 1
    assert notebook.value("k1.x, len(k1.y), 'since' in repr(k1)") == (7, 10**6, False)


def test_a_notebook_answers_while_a_run_floods_it(notebook):
    cell = notebook.background("-k k1 -o i for i in range(200000): print(i)")
    for _ in range(5):
        begin = time.monotonic()
        notebook.run("1 + 1")
        assert time.monotonic() - begin < 6
    notebook.until(lambda: notebook.log[-1]["content"].get("text", "").endswith("199999\n"))
    assert notebook.text(cell) == "".join(f"{i}\n" for i in range(200000))
    assert notebook.value("k1.i") == 199999


@pytest.fixture
def subshell(notebook):
    """The id of a subshell, by which JupyterLab sends the moves of widgets."""
    notebook.client.control_channel.send(
        notebook.client.session.msg("create_subshell_request", {}))
    return notebook.client.get_control_msg(timeout=30)["content"]["subshell_id"]


@newest  # ipykernel 7 has subshells
def test_moves_by_a_subshell_stay_in_order_also_while_a_cell_runs(notebook, subshell, slider):
    for value in (1, 2):  # the first one after a cell goes another way
        notebook.moved(slider, subshell, value=value)
    cell = notebook.start("%remote_exec -k k2 import time; time.sleep(1.5); print('over')")
    for value in range(3, 20):
        notebook.move(slider, subshell, value=value)
        time.sleep(0.03)
    notebook.until(lambda: notebook.text(cell))
    notebook.moved(slider, subshell, value=20)
    assert notebook.there("k1", "seen") == [*range(1, 21)]
    kinds = [each["msg_type"] for each in notebook.moved(slider, subshell, value=21)]
    assert "stream" in kinds and kinds[-1] == "status"  # idle: a front end hears no more


@newest
def test_an_endless_callback_can_be_stopped(notebook, subshell, slider):
    for value in (1, 2, 99):
        move = notebook.move(slider, subshell, value=value)
    notebook.until(lambda: notebook.text(move))
    notebook.manager.interrupt_kernel()
    notebook.ok("%remote_exec -k k2 print(1)")
    assert notebook.there("k1", "seen[-1]") == 99


@pytest.mark.parametrize("line", ["-k k1", "-k k1 -t 1"])
def test_widgets_work_after_code_was_stopped(notebook, slider, line):
    cell = notebook.start(f"%remote_exec {line} print('on'); __import__('time').sleep(60)")
    notebook.until(lambda: "on" in notebook.text(cell))
    notebook.end(cell) if "-t" in line else notebook.interrupt(cell)
    for value in (1, 2):
        notebook.moved(slider, value=value)
    assert notebook.there("k1", "seen") == [1, 2]


def test_linked_widgets_follow_each_other(notebook):
    notebook.widgets("k1", (
        "play, slider = w.Play(), w.IntSlider(); ids = play.model_id, slider.model_id\n"
        "w.link((play, 'value'), (slider, 'value'))"))
    play, slider = notebook.value("k1.ids")
    for value in (1, 2, 3):
        assert [each["content"]["data"]["state"]["value"] for each in notebook.moved(
            play, value=value) if each["content"].get("comm_id") == slider] == [value]


def test_widgets_of_a_dead_attached_kernel_do_not_hide_that_it_lives_again(notebook):
    with OthersKernel() as other:
        notebook.ok(f"%remote_exec -k far={other.file} 1")
        notebook.widgets("far", "slider = w.IntSlider(); ids = slider.model_id")
        slider = notebook.value("far.ids")
        other.manager.shutdown_kernel(now=True, restart=True)
        notebook.moved(slider, value=5)
        other.restart()
        for _ in range(2):
            notebook.ok("%remote_exec -k far import time; time.sleep(1)")
        notebook.ok("%remote_exec -k far -s")


def test_a_kernel_that_was_left_busy_gets_moves_when_it_is_free(notebook, slider, tmp_path):
    reply, _ = notebook.run("%remote_exec -k k1 -t 1 __import__('signal').signal(2, lambda *_: 0); "
                            + gate(tmp_path / "open"))
    assert "ignores the interrupt" in reply["evalue"]
    begin = time.monotonic()
    notebook.moved(slider, value=5)
    assert time.monotonic() - begin < 5
    (tmp_path / "open").touch()
    assert until(lambda: notebook.run("%remote_exec -k k1 1")[0]["status"] == "ok")
    assert notebook.there("k1", "seen") == [5]


DEAF = ("from ipykernel.kernelbase import Kernel\nasync def deaf(*_): pass\n"
        "Kernel.interrupt_request = deaf\n"
        "from ipykernel.kernelapp import IPKernelApp as App; App.launch_instance()")


def test_a_kernel_that_ignored_the_interrupt_is_idle_when_its_code_ends(session, spec):
    spec("deaf", sys.executable, "-c", DEAF, *LAUNCH[-2:])
    session.ok("-k deaf import time")
    assert "still busy" in session.interrupted("-k deaf time.sleep(3)", presses=[0.3, 0.2])
    assert until(lambda: session.running()["deaf"] == "idle")
    session.ok("-k deaf 1")


@pytest.mark.parametrize("delay", [0, 0.002, 0.005, 0.01, 0.1])
def test_whenever_ctrl_c_comes_a_kernel_is_named_or_what_it_returned_is_there(
        session, delay, stray_presses_do_nothing):
    session.ok("-k a import threading, time")
    session.ns["fate"] = {"b": session.wait, "a": (
        "presser = threading.Thread(target=lambda: (time.sleep(%s), %s, %s)); presser.start(); "
        "done = 7" % (delay, session.press, session.press))}
    line = session.interrupted("-k a,b -i fate -o done {fate}")
    assert re.search(r"\bb\b", line)
    assert vars(session.a) == {"done": 7} or delay < 0.1 and re.search(
        r"\ba\b", line + session.err), line
    session.run("-k a presser.join()")


@pytest.mark.parametrize("line", [
    "-k a,b:/ -p large -o x x = large[:9]", "-k a,b -s -o x x = 1", "-k c=python3,a -o x x = 1",
    "-k a,b -o big"])
def test_ctrl_c_at_any_moment_leaves_working_kernels(session, line, stray_presses_do_nothing):
    session.ns["large"] = np.ones(2_000_000)
    session.ok("-k a,b import numpy as np; big = np.ones(2_000_000)")
    for delay in (0.01, 0.03, 0.06, 0.1, 0.2, 0.4):
        with pressing(delay):
            session.run(line)
        assert session.error is None or isinstance(session.error, KeyboardInterrupt)
        assert session.error is None or re.match(r"\w+(, \w+)* \w", str(session.error))
        session.ok("-k a=python3,b=python3 -o x x = 3; big = globals().get('big')")
        assert session.a.x == session.b.x == 3


def test_ctrl_c_does_not_interrupt_the_code_of_another_client(session):
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        theirs = other.client.execute(f"{session.ns['begun']}; {session.gate}; through = 1")
        assert until(session.begun.exists)
        opener = threading.Timer(1.5, session.open)
        opener.start()
        session.interrupted("-k far -i wait n = 1; {wait}", presses=[0.5])
        assert theirs and session.there("far", "through") == 1


def test_outputs_that_were_lost_while_the_reply_came_are_told(session):
    session.ok("-k a session = get_ipython().kernel.session; send = session.send")
    failures = session.fails("-k a -o x", (
        "x = 1\ndef send_all_but_comms(stream, kind, *rest, **more):\n"
        "    if not str(kind).startswith('comm'): return send(stream, kind, *rest, **more)\n"
        "session.send = send_all_but_comms"))
    assert failures["a"].ename == "LostReplyError"
    session.ok("-k a session.send = send")
    assert session.there("a", "x") == 1


def test_a_restart_by_the_owner_while_code_runs_is_not_told_as_a_kernel_with_its_state(session):
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        call = session.in_thread("-k far -i begun,wait -o x x = 1; {begun}; {wait}")
        assert until(session.begun.exists)
        other.restart()
        error = call.exception(40)
        assert isinstance(error, rx.RemoteError) and "has its state" not in str(error), error
        session.ok("-k far 1")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["status", "ename", "traceback", "text", "name", "data", "payload",
                         "execution_state", "remote_exec", "prompt", "user_expressions"]),
        inner, max_size=4), max_leaves=8)


def send_as_told():
    kernel = get_ipython().kernel  # noqa: F821
    parent, send = kernel.get_parent("shell"), kernel.session.send
    for frames in [b"junk"], [b""], [b"a", b"<IDS|MSG>", b"wrong"]:
        kernel.iopub_socket.send_multipart(frames)
    for kind, content, ours in messages:  # noqa: F821
        send(kernel.iopub_socket, kind, content, parent if ours else {})
    if reply is not None:  # noqa: F821
        def send_another_reply(stream, kind, *rest, **more):
            if kind != "execute_reply":
                return send(stream, kind, *rest, **more)
            kernel.session.send = send
            return send(stream, kind, reply, *rest[1:], **more)  # noqa: F821
        kernel.session.send = send_another_reply


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(
    st.sampled_from(["status", "stream", "display_data", "update_display_data", "error",
                     "comm_open", "comm_msg", "comm_close", "clear_output", "execute_reply",
                     "input_request", "what_is_this"]),
    st.dictionaries(st.sampled_from(["name", "text", "data", "comm_id", "traceback"]), anything)
    | anything, st.booleans()), max_size=8), st.none() | anything)
def test_whatever_messages_a_kernel_sends_the_call_ends_and_the_next_one_works(
        session, messages, reply):
    session.ns.update(messages=messages, reply=reply)
    session.run("-k a -p messages,reply", body(send_as_told))
    assert isinstance(session.error, (rx.RemoteError, type(None))), repr(session.error)
    assert session.there("a", "1") == 1


def test_what_other_clients_do_changes_nothing(session):
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        for code in ("print('theirs'); y = 1", "y"):
            other.client.execute(code)
        assert session.ok("-k far -o x print('ours'); x = 2") == "ours\n" and session.far.x == 2
        assert not session.displays


def test_a_slow_front_end_loses_nothing(notebook):
    """It reads nothing until all is over."""
    cell = notebook.start("%remote_exec -k k1 -o i for i in range(3000): display(i)")
    assert notebook.reply(cell)["status"] == "ok"
    shown = contents(notebook.end(cell), "display_data")
    assert [each["data"]["text/plain"] for each in shown] == [str(i) for i in range(3000)]


def test_the_question_of_a_new_kernel_is_not_lost(session, monkeypatch):
    """Though ZMQ connects each socket when it comes to it."""
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for _ in range(3):  # one in 15 was
        session.ok("-k c=python3,d=python3,e=python3,f=python3 -t 60 -o name -s "
                   "name = input('who? ')")
        assert session.c.name == session.d.name == session.e.name == session.f.name == ""


@pytest.mark.parametrize("end, ename", [
    ("-t 1", "TimeoutError"), ("", "DeadKernelError")], ids=["time-out", "death"])
def test_a_question_ends_with_its_request_and_a_late_answer_goes_to_no_other(
        session, monkeypatch, end, ename):
    pid = session.there("a", "os.getpid()")

    def answer_late(prompt):
        if not end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(8)
        return "secret"
    monkeypatch.setattr("builtins.input", answer_late)
    assert session.fails(f"-k a {end} input('password? ')")["a"].ename == ename
    assert session.took < 15
    monkeypatch.setattr("builtins.input", lambda prompt: "me")
    assert session.there("a", "input('who? ')") == "me"


def test_another_client_can_use_the_connection_file(session, connection):
    client = BlockingKernelClient(connection_file=str(connection[0]))
    client.load_connection_file()
    client.start_channels()
    client.execute("y = 5", reply=True, timeout=30)
    client.stop_channels()
    assert session.there("a", "y") == 5


@pytest.mark.parametrize("line, requests", [
    ("-k far -o x x = 1", 1), ("-k far:/ -p press -o x x = 1", 2)])
def test_a_cell_takes_one_request_and_its_preparation_another(session, line, requests):
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        before = other.client.execute("1", reply=True, timeout=30)["parent_header"]["msg_id"]
        session.ok(line)
        seen = {}  # in the order in which their requests came
        while other.client.iopub_channel.socket.poll(1000):
            seen[other.client.get_iopub_msg(timeout=10)["parent_header"]["msg_id"]] = True
        assert len(list(seen)[list(seen).index(before) + 1:]) == requests


@pytest.mark.parametrize("temporary", ["x" * 150, "not/there"])
def test_directories_may_be_long_or_not_there_and_nothing_stays(tmp_path, temporary):
    runtime, folder, before = tmp_path / ("y" * 150), tmp_path / temporary, files()
    if len(temporary) > 100:
        folder.mkdir()
    done = ipython(*script("%remote_exec -k k=python3 print(6 * 7)"),
                   TMPDIR=str(folder), JUPYTER_RUNTIME_DIR=str(runtime))
    assert (done.stdout, done.stderr) == ("42\n", "")
    assert not [*runtime.iterdir(), *folder.glob("*")] and files(done.pid) <= before


def test_a_sessions_directory_that_somebody_removed_is_made_anew(session, connection):
    shutil.rmtree(os.path.dirname(connection[1]["ip"]))
    session.ok("-k d=python3 -o x x = 1")
    assert session.d.x == 1
    session.ok("-k a,b,d -s")  # the sockets of the older ones are gone, too


def test_starts_runs_failures_and_stops_leak_nothing(session):
    for turn in range(4):
        session.ok("-k c=python3,d=python3 -s -o x x = 1")
        session.ok("-k c -o x -b x = 2")
        session.ok("-k c,d 1;")
        session.fails("-k c,d 1/0")
        session.fails("-k c,d os._exit(3)")
        session.interrupted("-k c,d -i press,wait {press}; {wait}")
        session.ok("-k c,d -s")
        if not turn:
            opened = Opened()
    assert opened.is_no_more(), (opened.before, opened.now())


def test_unloading_in_a_notebook_is_silent_and_leaves_no_kernel(notebook):
    notebook.ok("%remote_exec -k k1 -o pid pid = os.getpid()")
    pid = notebook.value("k1.pid")
    notebook.ok("%unload_ext remote_exec")
    assert notebook.shown == "" and gone(pid, 3)
    notebook.ok("%load_ext remote_exec")


def fork():
    import atexit
    import multiprocessing
    import os
    import sys
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:  # IPython's own exit function empties the namespace
        (lambda run, end: (run(), end(0)))(atexit._run_exitfuncs, os._exit)
    os.waitpid(pid, 0)
    worker = multiprocessing.get_context("fork").Process(target=print, args=("worker",))
    worker.start()
    worker.join()


def test_a_forked_child_touches_nothing():
    done = ipython(*script("%remote_exec -k k=python3 x = 8", body(fork),
                           "%remote_exec -k k -o x", "print(k.x)"))
    assert done.stdout == "worker\n8\n", done


def test_the_magic_in_a_forked_child_is_refused():
    done = ipython(*script(
        "%remote_exec -k k=python3 x = 8", "import os, threading", "pid = os.fork()",
        "if pid == 0:", "    threading.Timer(15, os._exit, [3]).start()",
        "    try: get_ipython().run_line_magic('remote_exec', '-k k 1')",
        "    except BaseException as error: os._exit(0 if str(error) else 4)", "    os._exit(5)",
        "%remote_exec -k k -o x", "print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), k.x)"))
    assert done.stdout == "0 8\n", done


def test_the_magic_of_before_an_unload_is_refused_in_plain_words(session):
    magic = session.shell.find_line_magic("remote_exec")
    session.load("reload")
    with pytest.raises(Exception, match=r"\w+ \w+"):
        magic("-k a 1")


SLEEPER = "echo $$ >begun.new; mv begun.new {begun}; exec sleep 1000"


@pytest.mark.parametrize("end", ["%unload_ext remote_exec", ""])
def test_a_session_may_end_while_a_thread_starts_a_kernel(spec, tmp_path, end):
    begun = tmp_path / "begun"
    spec("sleeper", "sh", "-c", f"cd {tmp_path}; {SLEEPER.format(begun=begun)}")
    done = ipython(*script(
        "import os, threading, time", "def start():",
        "    try: get_ipython().run_line_magic('remote_exec', '-k s=sleeper 1')",
        "    except BaseException: pass",
        "threading.Thread(target=start, daemon=True).start()", gate(begun), "time.sleep(.5)",
        end, "print(time.time())"))
    assert time.time() - float(done.stdout.splitlines()[-1]) < 10 and done.stderr == "", done
    assert gone(int(begun.read_text()), 5) and not files(done.pid) - files()


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_during_the_exit_leaves_nothing(tmp_path, presses):
    """One kernel holds a thread, one is busy and ignores interrupts."""
    ending = tmp_path / "ending"
    press = f"until [ -e {ending} ]; do sleep .02; done" + "; sleep .2; kill -2 %d" * presses
    done = ipython(*script(
        "%remote_exec -k k=python3,m=python3 -o pid pid = os.getpid()", "print(k.pid, m.pid)",
        "%remote_exec -k k import threading, time; "
        "threading.Thread(target=time.sleep, args=(100,)).start()",
        "%remote_exec -k m -b import signal, time; signal.signal(2, lambda *_: 0); time.sleep(100)",
        "import atexit, os, subprocess",
        f"_ = subprocess.Popen(['sh', '-c', {press!r} % ((os.getpid(),) * {presses})], "
        "stdout=-3, stderr=-3)", f"_ = atexit.register(open, {str(ending)!r}, 'w')"))
    assert ending.exists() and all(gone(int(pid), 8) for pid in done.stdout.split()), done
    assert until(lambda: not Inside.directories(done.pid), 5)


def test_a_killed_session_leaves_no_kernel_and_the_next_one_starts_cleanly():
    process = subprocess.Popen([sys.executable, "-m", "IPython", "--no-term-title", *script(
        "%remote_exec -k k=python3 print(os.getpid(), flush=True); import time; time.sleep(99)")],
        stdout=subprocess.PIPE, text=True, cwd=str(HERE))
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert gone(pid)
    for left in Inside.directories(process.pid):
        shutil.rmtree(left)
    before = files()
    done = ipython(*script(
        "%config RemoteExecMagics.startup_timeout = 5", "%remote_exec -k k=python3 print(6 * 7)",
        "%config RemoteExecMagics.startup_timeout = 0.01", "%remote_exec -k m=python3 print(2)"))
    assert done.stdout.startswith("42\n") and files(done.pid) <= before
    assert "not ready after 0.01 s" in done.stdout + done.stderr


# ---- Far kernels and batch queues -----------------------------------------

@over_ssh
@pytest.mark.parametrize("name", ["sshpyk-far", "rik-far"])
def test_a_kernel_over_ssh_does_what_a_local_one_does(session, far_specs, name):
    session.ok(f"-k a,far={name}:/usr -o where,pid,x", (
        "import numpy as np\nwhere, pid, x = os.getcwd(), os.getpid(), np.arange(1e6)"))
    assert session.far.where == "/usr" and session.far.x[-1] == 999999
    session.interrupted("-k far", "import time; y = 3; time.sleep(60)", presses=[1])
    session.ok("-k far -o y")
    # (so long that it is just being asked whether it lives when all has come)
    session.ok("-k far -o x -b import time; time.sleep(1.05); x = 6")
    assert session.read("far.x") == 6
    session.ok("-k far -s")
    assert gone(session.far.pid)


@over_ssh
def test_a_kernel_over_ssh_that_died_is_told_and_started_anew(session, far_specs):
    session.ok("-k far=sshpyk-far 1")
    assert session.fails("-k far os.kill(os.getpid(), 9)")["far"].ename == "DeadKernelError"
    pid = session.there("far", "os.getpid()")
    os.kill(pid, 9)  # the second host shares this one's process table
    assert gone(pid)
    session.ok("-k far -o x x = 5")
    assert "started anew" in session.err and session.far.x == 5


@over_ssh
@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.77"])  # unknown, refused
def test_a_host_that_cannot_be_reached_is_named(session, spec, host):
    spec("nowhere", metadata=sshpyk(host, raise_on_ssh_config_error=False))
    assert host in session.fails("-k nowhere=nowhere 1")["nowhere"].evalue
    assert "nowhere" not in session.running()
    session.ok("-k nowhere=python3 1")


@over_ssh
@pytest.mark.skipif(not SSH_LINK, reason="no link to cut: REMOTE_EXEC_SSH_LINK")
def test_without_a_network_limits_and_ctrl_c_work_and_a_result_still_arrives(session, far_specs):
    session.ok("-k far=sshpyk-far,late=sshpyk-far,stopped=sshpyk-far 1")
    away = cut_link(1, 12)
    try:
        failures = session.fails("-k late -t 2 import time; time.sleep(4); x = 7")
        assert failures["late"].ename == "TimeoutError" and session.took < 12
        assert any("late does not answer since" in text for text in session.status)
        session.interrupted("-k stopped import time; time.sleep(4); x = 7", presses=[1, 1])
        assert "late is still busy" in session.misused("-k late,far 1")
        session.ok("-k far -o x import time; time.sleep(3); x = 7")
    finally:
        away.wait()
    assert session.far.x == 7
    away = cut_link(0, 3)
    try:
        assert session.interrupted("-k stopped -s", presses=[1]) == "stopped not waited for"
    finally:
        away.wait()


@over_ssh
def test_the_end_of_a_session_leaves_no_kernel_over_ssh(far_specs):
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
def test_a_tunnel_that_was_killed_loses_at_most_the_reply(session, far_specs):
    session.ok("-k far=sshpyk-far 1")
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; ssh -O exit {SSH_HOST}"],
                              stderr=subprocess.DEVNULL)
    session.run("-k far -o x -t 60 import time; time.sleep(4); x = 7")
    killer.wait()
    assert session.error is None and session.far.x == 7 or (
        session.error.failures["far"].ename == "LostReplyError"), session.error
    session.ok("-k far -o x")
    assert session.far.x == 7


@over_ssh
def test_kernels_of_gateway_provisioners_do_what_others_do(session, gateway):
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


@in_queue
def test_jobs_on_two_nodes_do_what_local_kernels_do(session, job):
    session.ns["gift"] = np.arange(1e6)
    session.ok("-k a,p=slurm-one:/usr,q=slurm-two:/usr -p gift -o where,node,x", (
        "where, node, x = os.getcwd(), os.environ.get('SLURMD_NODENAME'), gift * 2"))
    assert [session.a.node, session.p.node, session.q.node] == [None, *NODES]
    assert session.p.where == session.q.where == "/usr" and session.q.x[-1] == 1999998
    assert session.interrupted("-k p,q", "import time; y = 3; time.sleep(60)", presses=[1]) == (
        "p, q stopped")
    session.ok("-k p,q -o y")
    assert session.p.y == session.q.y == 3
    session.ok("-k p,q -s")
    assert until(lambda: not jobs(), 2)


@in_queue
def test_a_job_that_is_cancelled_is_dead_and_started_anew(session, job):
    session.ok("-k p=slurm-one,q=slurm-two 1")
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


@in_queue
def test_a_job_that_waits_in_the_queue_is_told_and_taken_out_by_ctrl_c(session, job):
    job("held", "--hold")
    session.startup_timeout(2)
    failures = session.fails("-k a,held 1")
    assert [*failures] == ["held"] and failures["held"].ename == "TimeoutError"
    assert re.search("not ready after 2.*queued and waiting", failures["held"].evalue)
    assert until(lambda: not jobs(), 2)
    session.startup_timeout(60)
    assert session.interrupted("-k a,held,c=python3 x = 1", presses=[4.5]) == "held not started"
    assert any(re.match(r"starting held \(\d s\).*ready: a, c", text) for text in session.status)
    assert until(lambda: not jobs(), 2)
    session.ok("-k a,c -o x x = 2")
    assert session.c.x == 2


@in_queue
@pytest.mark.parametrize("options, change, cause", [
    (["-p", "nowhere"], ("", ""), "invalid partition"),
    ([], ("{connection_file}", "/not/shared.json"), "/not/shared.json: No such file"),
    ([], ("127.0.0.1", "nothing"), "not ready after 3.*127.0.0.1")])  # who knows where it is
def test_a_job_that_cannot_start_names_the_cause(session, job, options, change, cause):
    session.startup_timeout(3)
    job("bad", "-w", NODES[1], *options, change=change)
    assert re.search(cause, session.fails("-k bad 1")["bad"].evalue)
    assert until(lambda: not jobs(), 2)


@in_queue
def test_the_end_of_a_session_takes_its_jobs_out_of_the_queue(session, job):
    """Also a busy one, and not ours."""
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
def test_a_job_may_outlive_the_session(session, job, tmp_path, monkeypatch):
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


# ---- The documents --------------------------------------------------------

FIRST_SESSION = re.search(r"(?s)\n## A second machine\n(.*?)\n## ", README)[1]


def blocks(language, text=README):
    """Return the code blocks of a language."""
    return re.findall(rf"(?sm)^```{language}\n(.*?)^```$", text)


def test_the_quick_start_is_two_commands():
    first, second = blocks("sh")[0].splitlines()
    assert "pip install -q . ipykernel" in first and "pytest" in second


def test_the_contents_lead_to_each_section():
    titles = re.findall(r"(?m)^## (.*)", README)
    links = re.findall(r"\(#([\w-]+)\)", README)
    assert links == [re.sub(r"[^\w ]", "", title).lower().replace(" ", "-")
                     for title in titles[1:]]


def test_the_help_and_the_readme_name_all_options():
    options = re.findall(r"(?m)^\| `-(\w)`, `--(\w+)", README)
    assert len(options) == 8
    for short, name in options:
        assert f"-{short}, --{name}" in rx.RemoteExecMagics.remote_exec.__doc__
        assert Inside.options_and_code(f"--{name} 1")[0].keys() == {short}


EXERCISED = {  # a test for each row of the README's tables, by what the row begins with
    "-k": "test_a_call_does_what_its_options_say",
    "-o, --output": "test_values_of_any_kind_arrive_equal_and_writable",
    "-i": "test_substitution_is_one_exact_pass",
    "-p, --push": "test_pushed_objects_are_copies_that_arrive_before_the_code_runs",
    "-s": "test_a_restart_loses_the_kernels_state_but_not_what_came_back",
    "-t": "test_a_time_out_interrupts_only_who_is_late",
    "-b": "test_a_background_call_returns_at_once_and_tells_since_when_it_runs",
    "-l": "test_the_list_shows_kernels_and_kernelspecs",
    "that of the": "test_an_error_is_the_far_traceback_without_our_frames",
    "DeadKernelError": "test_a_kernel_that_fails_takes_nothing_from_the_others",
    "TimeoutError": "test_a_time_out_tells_whether_the_code_heeds_the_interrupt",
    "LostReplyError": "test_a_reply_that_was_lost_with_the_connection_is_told",
    "ShutdownError": "test_a_kernel_whose_end_cannot_be_made_sure_is_told",
    "AbortedError": "test_what_another_clients_failure_made_the_kernel_drop_is_told",
    "-[op](, -p)? of .*ssh|a cell over ssh": "test_bench_ssh",
    "-[op](, -p)? of": "test_bench_ipyparallel",
    "a cell that|200,000 lines|5,000 displays": "test_bench_a_bare_client",
    "a cell on .* kernels": "test_bench_kernels_at_once",
    "100 kernels": "test_bench_a_hundred_kernels",
    "CPU": "test_bench_cpu_while_nothing_happens"}


def test_each_row_of_the_readmes_tables_is_exercised():
    rows = re.findall(r"(?m)^\|(?!-)(?! option | ename | what | side by) (.*?) \|", README)
    assert len(rows) > 30
    for row in rows:
        assert any(re.match(begin, row.replace("`", "")) for begin in EXERCISED), row
    assert set(EXERCISED.values()) <= set(globals())


def shown_under(notebook, cell):
    """Return the lines that show under a cell in the end, in alphabetical order: those of several
    kernels come in any order."""
    displays = {}  # updated in place
    for number, content in enumerate(contents(
            notebook.under(cell), "stream", "error", "display_data", "update_display_data",
            "execute_result")):
        displays[content.get("transient", {}).get("display_id", number)] = "\n".join([
            content.get("text", ""), *content.get("traceback", []),
            content.get("data", {}).get("text/plain", "")])
    text = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(displays.values()))
    # (this machine may have more kernelspecs)
    text = re.sub(r"(kernelspecs:\n)(  .*\n)*", r"\1  far\n  python3\n", text)
    return sorted(filter(str.strip, text.split("\n")))


def check_cells(text, folders):
    """Run each Python block as a cell of a notebook. The block below it is what shows under it in
    the end. ``folders`` take the place of those that the text names."""
    notebook, cells = Notebook(), []
    try:
        notebook.run("%unload_ext remote_exec")
        for code, expected in re.findall(
                r"(?sm)^```python\n(.*?)^```\n(?:```\n(.*?)^```$)?", text):
            for folder, path in folders.items():
                code = code.replace(folder, path)
            cells.append((notebook.start(code), code, expected))
            notebook.end(cells[-1][0])
        assert cells
        for cell, code, expected in cells:  # now, since some output comes after a cell's end
            assert shown_under(notebook, cell) == sorted(
                filter(str.strip, expected.split("\n"))), code
    finally:
        notebook.close()


@newest  # tracebacks and numbers looked different
def test_the_readme_shows_what_happens(tmp_path, spec):
    """With a kernelspec `far` that runs here."""
    spec("far", *LAUNCH)
    (tmp_path / "a.txt").write_text("1 2\n3 4\n")
    (tmp_path / "b.txt").write_text("5 6\n7 8\n")
    check_cells(README, {"~/run7": str(tmp_path), "~/scratch": str(tmp_path)})


@pytest.fixture
def second_machine(monkeypatch, tmp_path):
    """The shell and the notebook of a user whose `~/.ssh/config` is the README's, with the address
    and the key of the second host. Returns (function that runs shell commands, folder over there).
    """
    ssh = {}  # the options that ssh has for that host, by name
    for line in subprocess.run(["ssh", "-G", SSH_HOST], check=True, capture_output=True,
                               text=True).stdout.splitlines():
        name, _, value = line.partition(" ")
        ssh.setdefault(name, []).append(value)
    config = blocks("sshconfig", FIRST_SESSION)[0].replace("far.example.org", ssh["hostname"][0])
    config = config.replace("User me", f"User {ssh['user'][0]}")
    # (ssh takes ~ from the password file; the path of a socket is short)
    config = config.replace("~/.ssh/", f"{WORK.name}/")
    for name in ("port", "identityfile", "userknownhostsfile", "stricthostkeychecking", "loglevel"):
        config += "".join(f"    {name} {value}\n" for value in ssh[name])
    home, tools = tmp_path / "home", tmp_path / "bin"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "config").write_text(config)
    tools.mkdir()
    (tools / "ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F {home}/.ssh/config \"$@\"\n")
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(
        [str(tools), os.path.dirname(sys.executable), os.environ["PATH"]]))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))

    def run(commands):
        return subprocess.run(["sh", "-ec", commands], check=True, stdout=subprocess.PIPE,
                              text=True, timeout=100, env={**os.environ, "HOME": str(home)}).stdout
    folder = run("ssh far mktemp -d").strip()
    yield run, folder
    run(f"ssh far rm -r {folder}")
    subprocess.run(["ssh", "-q", "-O", "exit", "far"], timeout=20)


@over_ssh
def test_the_session_with_a_second_machine_works_as_it_stands(second_machine, tmp_path):
    run, folder = second_machine
    for commands in blocks("sh", FIRST_SESSION):
        commands = commands.replace("/home/me/venv/bin/python", sys.executable)
        run(commands.replace("~/run7", folder).replace("~/scratch", str(tmp_path)))
    assert "far" in run("jupyter kernelspec list")
    where = ("```python\n%remote_exec -k kernel1,kernel2 -- 'SSH_CONNECTION' in os.environ\n```\n"
             "```\n[kernel1] \nTrue\n[kernel2] \nFalse\n```\n")
    check_cells(FIRST_SESSION + where, {"~/run7": folder, "~/scratch": str(tmp_path)})


# ---- Figures --------------------------------------------------------------

def bench(test):
    """Marks a benchmark, which runs where the -m expression asks for it."""
    return marked_bench(pytest.mark.skipif(
        "'bench' not in config.option.markexpr", reason="figures: pytest -m bench -s")(test))


def side_by_side(ours, theirs, times=15, release=lambda: None):
    """Return (seconds ours takes, how many times as fast as theirs): medians of pairs. What the
    last one made is released first: ipyparallel keeps it, in cycles, and would not pay for that.
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
@pytest.mark.parametrize("how, config, arguments, sizes, things", [
    ("out of the box", {}, [], (10, 100, 400), THINGS),
    ("over TCP", {"transport": "tcp", "transport_encryption": "disabled"}, [], (100,), {}),
    ("nobody can listen in", {}, ["--IPController.enable_curve=True"], (100,), {}),
    ("over encrypted TCP", {"transport": "tcp"}, ["--IPController.enable_curve=True"], (100,), {})])
def test_bench_ipyparallel(session, manager_config, how, config, arguments, sizes, things):
    import ipyparallel
    manager_config(**config)
    session.ok("-k n=python3 1;")
    with ipyparallel.Cluster(n=1, log_level=40, controller_args=arguments) as client:
        client.wait_for_engines(1, timeout=60)
        view, than = client[0], "times ipyparallel's speed"

        def pull():
            session.ns["pulled"] = view["x"]

        def release():
            vars(session.n).clear()
            session.ns["pulled"] = None
            client.purge_local_results("all")
        for size in sizes:
            session.ok(f"-k n {ARRAY.format(size)}")
            view.execute(ARRAY.format(size), block=True)
            session.ok("-k n -o x")
            session.ns["x"] = session.ns["n"].x
            figure(f"-o of {size} MB, {how}", *side_by_side(  # all of it read once
                lambda: (session.ok("-k n -o x"), session.n.x.sum()),
                lambda: (pull(), session.pulled.sum()), release=release), than, size)
            figure(f"-p of {size} MB, {how}", *side_by_side(
                lambda: session.ok("-k n -p x"),
                lambda: view.push({"x": session.ns["x"]}, block=True)), than, size)
        for what, code in things.items():
            session.ok(f"-k n {code}")
            view.execute(code, block=True)
            figure(f"-o of {what}", *side_by_side(
                lambda: session.ok("-k n -o x"), pull, release=release), than)


@pytest.fixture
def bare_client(session):
    """A client of the kernel `a` that loses nothing."""
    context = zmq.Context()
    context.rcvhwm = 0
    client = BlockingKernelClient(
        context=context, connection_file=session.there(
            "a", "__import__('ipykernel').get_connection_file()"))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield client
    client.stop_channels()
    context.term()


@bench
@pytest.mark.parametrize("what, ours, theirs, times", [
    ("a cell that returns one value", "-o x x = 1", "x = 1", 100),
    ("200,000 lines", "for i in range(200000): print(i)", "", 5),
    ("5,000 displays", "for i in range(5000): display(i)", "", 5)])
def test_bench_a_bare_client(session, bare_client, what, ours, theirs, times):
    def bare():  # until the reply and all output; the next one counts when the kernel is idle
        begin = time.perf_counter()
        msg_id = bare_client.execute(theirs or ours)
        if theirs:
            bare_client.get_shell_msg(timeout=60)
        replied = time.perf_counter()
        idle, iopub = False, bare_client.iopub_channel.socket
        while not idle:
            message = bare_client.session.recv(iopub, 0)[1]
            idle = message["parent_header"].get("msg_id") == msg_id and (
                message["content"].get("execution_state") == "idle")
        if not theirs:
            bare_client.get_shell_msg(timeout=60)
            replied = time.perf_counter()
        return replied - begin
    figure(what, *side_by_side(lambda: session.ok(f"-k a {ours}"), bare, times),
           "times as fast as a bare client")


@bench
@pytest.mark.parametrize("many", [8, 20, 40])
def test_bench_kernels_at_once(session, many):
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


@bench
def test_bench_cpu_while_nothing_happens(session, spec):
    spec("slow", "sh", "-c", f"sleep 5; exec {' '.join(LAUNCH)}")
    for what, wait in (("idle, of 5 s", lambda: time.sleep(5)),
                       ("a kernel that takes 5 s to launch", lambda: session.ok("-k slow 1;"))):
        begin = time.process_time()
        wait()
        figure(f"CPU while {what}", time.process_time() - begin)


@over_ssh
@bench
def test_bench_ssh(session, far_specs, tmp_path):
    session.ok("-k far=sshpyk-far import numpy as np; "
               "x = np.frombuffer(os.urandom(100_000_000), 'u1').copy()")
    session.ok("-k far -o x")
    session.ns["y"] = session.far.x
    (tmp_path / "x").write_bytes(session.far.x)
    for what, line, paths in (
            ("-o", "-k far -o x", [f"{SSH_HOST}:{tmp_path}/x", f"{tmp_path}/y"]),
            ("-p", "-k far -p y", [f"{tmp_path}/x", f"{SSH_HOST}:{tmp_path}/y"])):
        figure(f"{what} of 100 MB over ssh", *side_by_side(
            lambda: session.ok(line), lambda: subprocess.run(["scp", "-q", *paths], check=True),
            5), "times as fast as scp", 100)
    seconds, ratio = side_by_side(lambda: session.ok("-k far -o y y = 1"),
                                  lambda: session.ok("-k a -o y y = 1"), 50)
    figure("a cell that returns one value over ssh", seconds, 1 / ratio, "times a local kernel's")
