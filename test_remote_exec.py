"""Tests of remote_exec, on real kernels, in the order of its contract.

Whoever reads the names of the tests from top to bottom knows what the module promises.
`EXERCISED` names a test for each row of the README's tables.

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
import importlib.util
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
from traitlets.config import Config

import remote_exec as rx

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecat|multi-threaded)")

WORK = tempfile.TemporaryDirectory()  # what appears there is ours, whoever else runs
for variable, folder in (("JUPYTER_RUNTIME_DIR", "r"), ("TMPDIR", "t")):
    os.environ[variable] = tempfile.tempdir = os.path.join(WORK.name, folder)
    os.mkdir(tempfile.tempdir)
_pytest.runner._update_current_test_var = lambda *_: None  # ipykernel behaves otherwise by it
HERE = pathlib.Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
LAUNCH = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
SSH_HOST = os.environ.get("REMOTE_EXEC_SSH_HOST")
SSH_LINK = os.environ.get("REMOTE_EXEC_SSH_LINK")
with warnings.catch_warnings():  # there is no file to register marks in
    warnings.simplefilter("ignore")
    newest, far, marked_bench = pytest.mark.newest, pytest.mark.far, pytest.mark.bench
    one_after_another = pytest.mark.xdist_group("hosts")  # they share the queue


# ---- the module, and the shell under test ---------------------------------

class Inside:
    """All that knows how the module is made."""

    options_and_code = staticmethod(rx.parse_line)  # of a line, the options by letter
    find_kernelspec = staticmethod(rx.find_kernelspec)
    substitute = staticmethod(rx.substitute)
    directories = "rexec-{}-*"  # of a session, by its pid, in /dev/shm
    is_read = staticmethod(lambda namespace: namespace._KernelNamespace__kernel.screen.waiter)


class Session:
    """An in-process IPython with the extension loaded, and what its last call came to.
    Its other attributes are the user's variables."""

    def __init__(self):
        self.shell = InteractiveShell.instance()
        self.ns = self.shell.user_ns
        self.shell.extension_manager.load_extension("remote_exec")

    def __getattr__(self, name):
        if name not in self.ns:
            raise AttributeError(name)
        return self.ns[name]

    def run(self, line, cell=None):
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

    def connection_file(self, name):
        return pathlib.Path(self.there(name, "__import__('ipykernel').get_connection_file()"))

    def in_thread(self, *lines):
        return THREADS.submit(lambda: [
            self.shell.run_line_magic("remote_exec", line) for line in lines])

    def running(self):
        with capture_output() as shown:
            self.shell.run_line_magic("remote_exec", "-l")
        return dict(re.findall(r"(?m)^  (\w+)  \S+  (.+)$", shown.stdout))

    def configure(self, startup_timeout=60, **manager):
        """Set this trait of the magic, and those of the user's `c.KernelManager`."""
        self.shell.run_line_magic("config", f"RemoteExecMagics.startup_timeout = {startup_timeout}")
        self.shell.config.KernelManager = Config(manager)


THREADS = concurrent.futures.ThreadPoolExecutor(8)


@pytest.fixture
def session(tmp_path):
    """The session, with the long-lived kernels `a` and `b`, and no others. Its variables are
    pieces of code: `press` presses Ctrl-C here, `begun` makes the file `session.begun`, `wait`
    takes a minute, `gate` waits for `session.open()`, and `stubborn` too, ignoring interrupts."""
    session = Session()
    session.configure()
    session.run(f"-k {','.join({*session.running()} - {'a', 'b'}) or 'c'} -s")
    session.run("-k a=python3,b=python3 -t 20")
    if session.error:
        session.ok("-k a=python3,b=python3 -s pass")
    vars(session.a).clear()
    vars(session.b).clear()
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
    bench = request.node.get_closest_marker("bench")
    if bench and "bench" not in request.config.option.markexpr:
        pytest.skip("figures: pytest -m bench -s")
    signal.signal(signal.SIGALRM, fail)
    signal.alarm(0 if bench else 120)
    yield
    signal.alarm(0)


# ---- other kernels, notebooks and sessions --------------------------------

class OthersKernel(contextlib.AbstractContextManager):
    """A kernel that somebody else started, and its client."""

    def __init__(self, **options):
        self.manager = KernelManager(kernel_name="python3", **options)
        self.manager.start_kernel(cwd=str(HERE))
        self.file, self.client = self.manager.connection_file, self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def restart(self):
        self.manager.restart_kernel(now=True)
        self.client.execute("1", reply=True, timeout=60)

    def close(self, now=False):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now)

    def __exit__(self, *_):
        self.close(now=True)


@pytest.fixture
def other(session):
    """Such a kernel; `far` is attached to it."""
    with OthersKernel() as other:
        session.ok(f"-k far={other.file} 1")
        yield other


class Line(OthersKernel):
    """Such a kernel, behind a network that can be cut, and hold back what is published."""

    def __init__(self, folder):
        super().__init__()
        self.passes, self.ends = threading.Event(), []
        self.passes.set()
        info = json.loads(pathlib.Path(self.file).read_text())
        for port in ("shell_port", "iopub_port"):
            server = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=self.accept, daemon=True, args=(
                server, info[port], port == "iopub_port")).start()
            info[port] = server.getsockname()[1]
        self.file = folder / "line.json"
        self.file.write_text(json.dumps(info))

    def accept(self, server, port, held):
        with contextlib.suppress(ConnectionRefusedError):  # the kernel has ended
            while True:
                near = server.accept()[0]
                self.passes.wait()
                far = socket.create_connection(("127.0.0.1", port))
                self.ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=(*ends, held), daemon=True).start()

    def pump(self, source, target, held):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                if held:
                    self.passes.wait()
                target.sendall(data)

    def hold(self, seconds):
        """Let what the kernel publishes meanwhile come so late."""
        self.passes.clear()
        threading.Timer(seconds, self.passes.set).start()

    def lose_reply(self, session):
        """Cut it when code has `begun`, losing what is on its way, and let the kernel go on;
        mend it when the kernel has answered."""
        until(session.begun.exists)
        self.passes.clear()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        session.open()
        self.client.kernel_info(reply=True, timeout=30)
        self.passes.set()


@pytest.fixture
def line(session, tmp_path):
    with Line(tmp_path) as line:
        session.ok(f"-k far={line.file} 1")
        vars(session.far).clear()
        yield line


class Notebook(OthersKernel):
    """A real local kernel, driven by a client as a notebook does. A cell, and the move of a
    widget, is known by the id of its request; what comes of it are messages."""

    def __init__(self):
        super().__init__(  # no port that another one may take
            transport="ipc", ip=os.path.join(tempfile.mkdtemp(), "s"))
        self.log, self.answers = [], []  # all that it published; for its questions
        self.start = self.client.execute  # returns the id of the cell
        self.run("%load_ext remote_exec")

    def until(self, condition):
        """Listen until something holds, a minute at most."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log[-5:]
            if self.client.iopub_channel.socket.poll(50):  # sooner than get_iopub_msg
                self.log.append(self.client.session.recv(self.client.iopub_channel.socket)[1])
            elif self.answers and self.client.stdin_channel.msg_ready():
                question = self.client.get_stdin_msg()["content"]
                self.prompts.append(question["prompt"] + "*" * question["password"])
                self.client.input(self.answers.pop(0))

    def under(self, cell):
        return [each for each in self.log if each["parent_header"].get("msg_id") == cell]

    def text(self, cell):
        return "".join(each["text"] for each in contents(self.under(cell), "stream"))

    def end(self, cell, answers=()):
        """Return the messages of a cell that runs to its end; `answers` go to its questions."""
        self.prompts, self.answers = [], list(answers)
        self.until(lambda: self.log and self.log[-1]["parent_header"].get("msg_id") == cell and (
            self.log[-1]["content"].get("execution_state") == "idle"))
        self.shown = self.text(cell)
        return self.under(cell)

    def reply(self, cell):
        replies = iter(lambda: self.client.get_shell_msg(timeout=30), None)
        return next(each["content"] for each in replies if each["parent_header"]["msg_id"] == cell)

    def run(self, code, answers=()):
        cell = self.start(code)
        messages = self.end(cell, answers)
        return self.reply(cell), messages

    def ok(self, code, answers=()):
        reply, messages = self.run(code, answers)
        assert reply["status"] == "ok", reply
        return messages

    def value(self, expression):
        self.ok(f"print(repr(({expression})))")
        return ast.literal_eval(self.shown)

    def there(self, name, expression):
        self.ok(f"%remote_exec -k {name} -o value value = {expression}")
        return self.value(f"{name}.value")

    def background(self, line):
        cell = self.start(f"%remote_exec -b {line}")
        self.end(cell)
        return cell

    def widgets(self, kernels, code):
        """Return the messages of a cell that makes widgets on kernels, and names their `ids`."""
        return self.ok(f"%%remote_exec -k {kernels} -o ids\nimport ipywidgets as w\n{code}")

    def move(self, widget, subshell=None, buffers={}, **state):
        move = self.client.session.msg("comm_msg", {"comm_id": widget, "data": {
            "method": "update", "state": state, "buffer_paths": [[name] for name in buffers]}})
        move["header"]["subshell_id"] = subshell
        self.client.session.send(
            self.client.shell_channel.socket, move, buffers=[*buffers.values()])
        return move["header"]["msg_id"]

    def subshell(self):
        """Return the id of a new one (ipykernel 7), by which JupyterLab sends moves."""
        self.client.control_channel.send(self.client.session.msg("create_subshell_request", {}))
        return self.client.get_control_msg(timeout=30)["content"]["subshell_id"]

    def moved(self, widget, *subshell, **state):
        return self.end(self.move(widget, *subshell, **state))


@pytest.fixture(scope="module")
def the_notebook():
    with contextlib.closing(Notebook()) as notebook:
        yield notebook


@pytest.fixture
def notebook(the_notebook):
    """The notebook, with the long-lived kernels `k1` and `k2`."""
    the_notebook.log.clear()
    if the_notebook.run("%remote_exec -k k1=python3,k2=python3")[0]["status"] == "error":
        the_notebook.ok("%remote_exec -k k1=python3,k2=python3 -s pass")
    return the_notebook


def contents(messages, *kinds):
    return [each["content"] for each in messages if each["msg_type"] in kinds]


def gate(path):
    """Return code that waits, wherever it runs, until there is such a file."""
    return (f"any(__import__('os').path.exists({str(path)!r}) or "
            "__import__('time').sleep(.02) for _ in iter(int, 1))")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    def make(name, *argv, **more):
        folder = tmp_path / "jupyter" / "kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(
            {"argv": argv, "display_name": name, "language": "python", **more}))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return make


class Runs(str):
    """Code that runs where it is unpickled."""

    def __reduce__(self):
        return exec, (str(self),)


def ipython(*lines, load="%load_ext remote_exec", before=None, cwd=HERE, **environment):
    """Return what came of an IPython of its own, which calls `before` when it starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-term-title", "-c",
         "\n".join([load, *lines])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=str(cwd),
        env={**os.environ, **environment}, preexec_fn=before)
    try:
        process.stdout, process.stderr = process.communicate(timeout=90)
    finally:
        process.kill()
    return process


# ---- what tests ask of the machine ----------------------------------------

def until(condition, seconds=15):
    """Wait until the condition holds; return whether it does within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def took(function, clock=time.perf_counter):
    begin = clock()
    function()
    return clock() - begin


def gone(pid, seconds=15):
    """Return whether the process ends, with all its threads, within so many seconds."""
    def ended():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            return process.status() == "zombie" and process.num_threads() == 1
        return True
    return until(ended, seconds)


def children():
    return {each.pid for each in psutil.Process().children() if each.status() != "zombie"}


def files(pid=os.getpid()):
    """Return the files of kernels, and the directories of that session."""
    return {*pathlib.Path(WORK.name).glob("r/*"),
            *pathlib.Path("/dev/shm").glob(Inside.directories.format(pid))}


def turns_that_leak_nothing(count):
    """Count turns. After the last one there are, soon (ZMQ closes its own beside us), no more open
    files, threads and files on disk than when all had come to rest after the first."""
    seen = []

    def look():
        gc.collect()
        seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len(files())))
        return seen
    yield 0
    assert until(lambda: look()[-25:] == [seen[-1]] * 25)
    rest = seen[-1]
    yield from range(1, count)
    assert until(lambda: all(now <= was for now, was in zip(look()[-1], rest))), (rest, seen[-1])


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


def readme_block(language, word):
    return re.search(rf"```{language}\n([^`]*{word}[^`]*)```", README)[1]


# ---- far hosts, batch queues, old Pythons ---------------------------------

def over_ssh(test):
    """Marks a test that needs the second host; sshpyk needs newer versions than the floor."""
    return pytest.mark.skipif(not SSH_HOST, reason="no second host")(far(newest(test)))


def sshpyk(host, **config):
    return {"kernel_provisioner": {"provisioner_name": "sshpyk-provisioner", "config": {
        "ssh_host_alias": host, "remote_python": sys.executable, "remote_kernel_name": "python3",
        **config}}}


@pytest.fixture
def far_specs(spec):
    spec("sshpyk-far", interrupt_mode="message", metadata=sshpyk(SSH_HOST))
    spec("rik-far", sys.executable, "-m", "remote_ikernel", "--interface", "ssh", "--host",
         SSH_HOST, "--workdir", "/tmp", "--kernel_cmd",
         f"{sys.executable} -m ipykernel_launcher -f {{host_connection_file}}",
         "{connection_file}")


CUT = f"ip link set {SSH_LINK} down; sleep {{}}; ip link set {SSH_LINK} up"  # so many seconds


def later(seconds, command):
    return subprocess.Popen(f"sleep {seconds}; {command}", shell=True)


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    """The kernelspec of gateway-provisioners for the second host. They read none of ssh's
    configuration but keys and known hosts, and refuse the user root."""
    install = shutil.which("jupyter-ssh-spec", path=os.path.dirname(sys.executable))
    if not install:  # (an import would fix the addresses too soon)
        pytest.skip("no gateway_provisioners")
    here, _, host, port, user = subprocess.check_output(
        ["ssh", SSH_HOST, "echo $SSH_CONNECTION $(id -un)"], text=True).split()
    key = re.search("(?m)^identityfile (.*)", subprocess.getoutput(f"ssh -G {SSH_HOST}"))[1]
    keys = tmp_path / ".ssh"
    keys.mkdir()
    for kind in ("rsa", "ecdsa", "ed25519"):  # whatever it is
        shutil.copy(key, keys / f"id_{kind}")
    (keys / "known_hosts").write_text(
        subprocess.getoutput(f"ssh-keyscan -p {port} {host} 2>/dev/null"))
    for name, value in dict(HOME=tmp_path, JUPYTER_PATH=tmp_path / "share/jupyter",
                            KERNEL_USERNAME="me", GP_RESPONSE_IP=here, GP_SSH_PORT=port,
                            GP_REMOTE_USER=user, GP_KERNEL_LOG_DIR=tmp_path).items():
        monkeypatch.setenv(name, str(value))
    subprocess.run([install, "install", f"--prefix={tmp_path}", "--kernel-name=gateway",
                    f"--remote-hosts={host}"], check=True, capture_output=True)
    spec = tmp_path / "share/jupyter/kernels/gateway/kernel.json"
    spec.write_text(spec.read_text().replace('"python",', f'"{sys.executable}",', 1))


NODES = subprocess.getoutput(  # of Slurm, that are up
    "timeout 20 sinfo -h -N -r -o %N 2>/dev/null | sort -u").split()[:2]
JOB = f"rexec{os.getpid()}"  # the name of our jobs
CANCEL = f"scancel -n {JOB}"


def in_queue(test):
    return one_after_another(pytest.mark.skipif(
        len(NODES) < 2, reason="no batch queue: Slurm of two nodes")(test))


def jobs():
    return subprocess.getoutput(f"squeue --me -h -n {JOB} -o %i").split()


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
    later(0, CANCEL).wait()


# ---- Options --------------------------------------------------------------

@pytest.mark.parametrize("line, options, code", [
    ("-k a,b -o x,y -o z  print( 'a  b' )", {"k": "a,b", "o": "x,y,z"}, "print( 'a  b' )"),
    ("-s -k a -- -- -x", {"s": "", "k": "a"}, "-- -x"),
    ("-k a x -- y --k", {"k": "a"}, "x -- y --k"),
    ("-k a 'it''s' \"$HOME\" {x} \\n", {"k": "a"}, "'it''s' \"$HOME\" {x} \\n"),
    ("--kernels=a --output x --input=i --push p", {"k": "a", "o": "x", "i": "i", "p": "p"}, ""),
    ("--background --timeout 3 --shutdown --list", {"b": "", "t": "3", "s": "", "l": ""}, "")])
def test_options_come_first_and_the_rest_is_code(line, options, code):
    assert Inside.options_and_code(line) == (options, code)


@pytest.mark.parametrize("line, culprit", [
    ("x = 1", "-k"), ("-l print(1)", "-l"), ("-k a --nope", "nope"), ("-k {nowhere} 1", "nowhere"),
    ("-k print 1", "my_print"), ("-k partial 1", "partial"), ("-k a, 1", "''"), ("-k 9a", "'9a'"),
    ("-k alias 1", "my_alias"), ("-k class", "class"), ("-k b= 1", "b="), ("-k {grid} 1", "array"),
    ("-k a=/no/such.json", "such"), ("-k n=nosuch", "nosuch"), ("-k a -b", "-b"),
    ("-k q=.json 1", "'.json'"), ("-k a,a", "a2=S"), ("-k a -s -o x", "-s"), ("-k a -t 0 1", "'0'"),
    ("-k a:/ -o x,a.b 1", "'a.b'"), ("-k a -i lock x", "lock"), ("-k a -i nowhere x", "nowhere"),
    ("-k a,b -i partial x", "'b'"), ("-k a -p grid,lock 1", "e lock"), ("-k a -s -p lock", "-s"),
    ("-k a -p nowhere", "nowhere"), ("-k a -b -t 1 1", "-t"), ("-k a -t nan 1", "'nan'")])
def test_a_mistake_is_one_line_before_anything_acts(session, line, culprit):
    session.ns.update(partial={"a": 1}, grid=np.ones((2, 2)), alias=session.a, lock=type(
        "Lock", (), {"__reduce__": sys.exit, "__str__": 0})())
    before = children(), session.running(), dict(session.ns)
    assert culprit in session.misused(line) and before[:2] == (children(), session.running())
    assert all(session.ns[name] is before[2][name] for name in {*session.ns, *before[2]})


CALLS = {  # what holds: (calls, the variables that they bring)
    "code on the line goes ahead of a cell": (["-k a -o s s = 1\ns += 1"], {"s": 2}),
    "code is taken verbatim, but -i puts in text, which is not searched again, by NAME from a dict":
        ([r"-k a -i files,tricky -o s s = r'{files} {tricky} {text} $text \n'"],
         {"s": r"a.txt \1 \g<0> {files} {text} $text \n"}),
    "-p sends copies, which arrive before the code runs": (
        ["-k a -p ones,text -o total,text ones[0] = 5; total = sum(ones)"],
        {"total": 100004, "text": "text"}),
    "names may have any letters": (["-k a -p \xb5 -i \xb5 -o \xb5 \xb5 += {\xb5}"], {"\u03bc": 4}),
    "an entry of a list may name any path": (
        ["-k {odd_path} -o d d = os.path.basename(os.getcwd())"], {"d": "a b'\"{x}:$HOME,c"}),
    "elsewhere variables are expanded over there": (
        ["-k {expanded} -o d d = [os.getcwd(), os.path.expanduser('~')]"],
        {"d": [os.path.realpath(os.path.expanduser("~"))] * 2}),
    "a directory holds for later cells until the restart": (
        ["-k a:/", "-k a -o d d = os.getcwd()", "-k a -s -o e e = os.getcwd() != '/'"],
        {"d": "/", "e": True}),
    "a restart loses the kernel's state but not what came back": (
        ["-k a -o x x = 1", "-k a -s -o fresh fresh = 'x' not in dir()"], {"x": 1, "fresh": True}),
    "a restart ends a run in the background": (
        ["-k a -i wait -o n -b {wait}", "-k a -s -o n n = 'new'", "-k a"], {"n": "new"}),
    "the far namespace gains pickle and os and nothing else": (
        ["-k a -s -p text,usual -o new new = {n for n in dir() if n[0] != '_'} - {*usual}"],
        {"new": {"os", "pickle", "text", "usual"}}),
    "a value may call the magic when it is loaded": (["-k a -p more -o x x = type('Calls', (), {"
        "'__reduce__': lambda _: (eval, (more,))})(); y = 2"], {"x": None, "y": 2}),
    "a shutdown passes over names without a kernel": (
        ["-k a x = 1", "-k never,a -s", "-k a -o gone gone = 'x' not in dir()"], {"gone": True})}


@pytest.mark.parametrize("calls, variables", CALLS.values(), ids=CALLS)
def test_a_call_does_what_its_options_say(session, tmp_path, calls, variables):
    odd = tmp_path / "a b'\"{x}:$HOME,c"
    odd.mkdir()
    session.ns.update({
        "files": type("Files", (dict,), {})(a="a.txt", b="b.txt"), "text": "text",
        "tricky": r"\1 \g<0> {files}", "ones": np.ones(100_000), "odd_path": [f"a:{odd}"],
        "expanded": "a:$HOME, b:~/", "usual": ["In", "Out", "exit", "quit", "get_ipython", "open"],
        "more": "__import__('IPython').get_ipython().run_line_magic('remote_exec', '-k a -o y y')",
        "\u03bc": 2})  # (the micro sign)
    for call in calls:
        session.ok(*call.split("\n"))
    assert vars(session.a) == variables


@given(st.lists(st.sampled_from(["{a}", "{b}", "{other}", "{", "}", "x", r"\1"]), min_size=2))
def test_substitution_is_one_exact_pass(parts):
    a, b = parts[:2]
    expected = "".join({"{a}": a, "{b}": b}.get(part, part) for part in parts)
    assert Inside.substitute("".join(parts), "k", {"a": a, "b": b}) == expected


def test_a_line_in_a_function_takes_its_local_variables(session):
    session.ns.update(local="hidden", text="hidden")
    session.shell.run_cell("def function():\n    local, text = [6], 'y'\n"
                           "    %remote_exec -k a -p local -i text -o y {text} = local\n"
                           "function()").raise_error()
    assert session.a.y == [6]


@pytest.mark.parametrize("code, ignored", [
    ("time.sleep(60)", ""), ("await asyncio.sleep(60)", ""),
    ("try: time.sleep(60)\nexcept KeyboardInterrupt: time.sleep(3)", ""),
    ("{stubborn}; print('late')", ", but ignores the interrupt; -s replaces it")])
def test_a_time_out_interrupts_only_who_is_late_and_tells_who_ignores_it(session, code, ignored):
    session.ns["fate"] = {"a": code.format(**session.ns), "b": "pass"}
    session.fails("-k a,b -i fate -t 1 -o x import asyncio, time; x = 1", "{fate}")
    assert session.took < 20 and str(session.error) == (
        f"a: TimeoutError: still busy after 1 s; interrupted{ignored}")
    assert session.running()["a"] == ("busy" if ignored else "idle")
    session.open()
    assert until(lambda: session.running()["a"] == "idle")
    assert "x" not in vars(session.a) and session.b.x == session.there("a", "x") == 1
    assert session.out == ("[a] late\n" if ignored else "")


def test_a_late_interrupt_does_not_hit_the_next_cell(session):
    session.ok("-k a,b import time")
    for i in range(16):
        session.run(f"-k a,b -t 0.15 time.sleep({0.142 + i / 1000})")
        session.ok("-k a,b -o x x = sum(range(300_000))")


def test_a_time_out_does_not_count_the_journey_of_the_outputs_which_loses_none(session, line):
    threading.Timer(0.3, line.hold, [6]).start()  # when the code runs
    session.ok("-k far -t 4 -o x __import__('time').sleep(.6); x = 5", (
        "for _ in range(3000): display({'text/plain': 'x' * 9999}, raw=True)"))
    assert session.far.x == 5 and session.took > 5.5 and len(session.displays) == 3000


def test_the_list_shows_kernels_and_kernelspecs(session):
    assert re.search(r"(?s)a +python3 +idle.*kernelspecs:.*python3", session.ok("-l"))


# ---- Which kernelspec -----------------------------------------------------

@pytest.mark.parametrize("wanted, found", [
    ("python3", "python3"), ("Python3", "python3"), ("_py", "rik_ssh_r.two_py"),
    ("Julia", "julia-1.9"), ("my_host", "ssh-my.host-py"), ("r_py", "rik_ssh_r.two_py"),
    ("ssh", "one of: rik_ssh_r.two_py, ssh-my.host-py"), ("none", "`pip install ipykernel`"),
    ("my(host", "one of: julia-1.9, python3, python3-b, rik_ssh_r.two_py, ssh-my.host-py, zsh")])
def test_a_spec_is_a_name_or_the_only_part_or_pattern_of_one_or_refused_with_a_hint(wanted, found):
    specs = ["zsh", "python3", "python3-b", "julia-1.9", "ssh-my.host-py", "rik_ssh_r.two_py"]
    try:
        assert Inside.find_kernelspec(wanted, [] if wanted == "none" else specs) == found
    except UsageError as refused:
        assert re.search(f"{re.escape(found)}( brings python3)?$", str(refused))


def test_a_name_keeps_its_spec_until_s_replaces_it_also_by_one_that_does_not_start(session, spec):
    spec("other", "sh", "-c", "exit 7")
    pid = session.there("a", "os.getpid()")
    assert re.search("-s .*other", session.misused("-k a=other 1")) and not gone(pid, 0)
    for line in ("-k a=other -s 1", "-k a 1"):
        assert "exit code 7" in session.fails(line)["a"].evalue and gone(pid)
    session.ok("-k a=python3 1")


def test_a_connection_file_or_its_name_attaches_to_a_kernel_which_stays_when_detached(session):
    file = session.connection_file("a")
    session.ok("-k a x = 12")
    for found in (file, file.name):
        session.ok(f"-k again={found} -o x")
        session.ok("-k again -s")
        assert vars(session.again).pop("x") == session.there("a", "x") == 12


def test_an_attached_kernel_is_set_up_again_when_its_owner_restarted_it(session, other):
    session.ns["three"] = 3
    other.restart()
    session.ok("-k far -p three -o x -b x = three")
    assert session.read("far.x") == 3 and re.search("far .*\n", session.err)


# ---- What comes back ------------------------------------------------------

def test_a_namespace_stays_the_same_object_and_shows_just_the_variables_that_came(session):
    session.ok("-k a -o items,x items, x = [1], 2")
    namespace = session.ns.pop("a")
    session.ok("-k a -o y y = x")
    assert session.a is namespace and dir(namespace) == [*vars(namespace)] == ["items", "x", "y"]
    assert repr(namespace) == "<kernel a (python3): items, x, y>"
    assert copy.copy(namespace).items is namespace.items and copy.deepcopy(namespace).y == 2
    with pytest.raises(AttributeError, match="nothing named 'nope' has come back from a"):
        session.read("a.nope")


def test_reloading_ends_kernels_leaks_nothing_and_knows_its_names_again(session, other, caplog):
    namespace, magic = session.a, session.shell.find_line_magic("remote_exec")
    for _ in turns_that_leak_nothing(3):
        pid = session.there("a", "os.getpid()")
        session.ok("-k a,b -i wait -o n -b {wait}")
        session.ok(f"-k far={other.file} -b __import__('time').sleep(2)")
        time.sleep(1.5)  # since half a second, something looks whether `far` lives
        session.shell.extension_manager.reload_extension("remote_exec")
        assert gone(pid) and gc.collect() >= 0 and "pending" not in caplog.text
        with pytest.raises(Exception, match="a: ShutdownError: "):  # a RemoteError of before
            session.read("a.n")
        with pytest.raises(Exception, match=r"\w+ \w+"):
            magic("-k a 1")
        session.ok("-k a,b -o n n = 3")
        assert session.a is namespace and namespace.n == 3


VALUES = """
import numpy as np, pandas as pd
arrays = dict(
    strided=np.arange(20.)[::3], zero=np.array(3.5), empty=np.zeros((0, 4)),
    fortran=np.asfortranarray(np.arange(12.).reshape(3, 4)), cube=np.ones((60, 60, 60)),
    structured=np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    objects=np.array([1, "x", None], dtype=object))
others = [bytes(range(256)), bytearray(b"x"), {"h\u00e9 \U0001f600": [1, (2, {3}, ..., int)]},
          [{"n": i, "set": {i}} for i in range(1000)]]
frame = pd.DataFrame({"s": ["a", "b"], "d": pd.to_datetime(["2020-01-01", "2021-01-01"])})
"""


def test_values_of_any_kind_arrive_equal_and_writable_and_stay_shared(session):
    session.ok("-k a -o arrays,others,frame,last", f"{VALUES}\nlast = others[-1]")
    session.read(VALUES)
    for name, array in session.arrays.items():
        got = session.a.arrays[name]
        assert got.dtype == array.dtype and got.flags.writeable
        np.testing.assert_array_equal(got, array)
    assert session.a.others == session.others and session.a.frame.equals(session.frame)
    session.a.frame.loc[0, "s"] = "c"
    assert session.a.last is session.a.others[-1]


@newest  # in the pickle of Python 3.8, too, but slower
def test_outputs_are_what_they_were_when_the_code_ended(session, other):
    session.ok(f"-k far,more={other.file} import numpy as np; x = np.zeros(20_000_000)")
    session.ok("-k far,more -o x x += 1")  # the code for `more` changes x at once
    assert all((x == x[0]).all() for x in (session.far.x, session.more.x))


FAILING = """
import sys, threading, types, numpy
sys.modules["only_there"] = only_there = types.ModuleType("only_there")
for module in (only_there, numpy):
    module.Thing = type("Thing", (), {"__module__": module.__name__})
class Reduced:
    def __init__(self, code): self.code = code
    def __reduce__(self): return eval(self.code)
class Ours: __str__ = 0
lock, thing, newer, ours = threading.Lock(), only_there.Thing(), numpy.Thing(), Ours()
here, exits, good = Reduced("(sys.exit, ())"), Reduced("sys.exit(Ours())"), 2
reads, read = Reduced("(exec, (read,))"), "import IPython; IPython.get_ipython().ev('a.reads')"
"""


@pytest.mark.parametrize("outputs, told", [
    ("missing", "NameError: .*'missing'"), ("lock", "TypeError: lock.*pickle"),
    ("exits", "SystemExit: exits"), ("ours", "PicklingError: ours.* install.* cloudpickle"),
    ("thing", "ModuleNotFoundError: thing can't be loaded: .*only_there"),
    ("newer", r"AttributeError: newer can't be loaded: .*Thing.*numpy \d"),
    ("here", "SystemExit: here can't be loaded"),
    ("reads -b", "AttributeError: reads can't be loaded: nothing named 'reads'"),
    ("lock,here,missing", "(?=.*lock)(?=.*here can't be loaded).*missing")])
def test_an_output_that_cannot_come_is_named_and_takes_no_other_along(session, outputs, told):
    session.ok("-k a", FAILING)
    if outputs == "ours":
        session.ok("-k a sys.modules['cloudpickle'] = None")
    session.run(f"-k a -o one,{outputs} -o two one, two = '__main__', [good]")
    if "-b" in outputs:
        session.fails("-k a")
    failed = str(session.error.failures["a"])
    session.ok("-k a sys.modules.pop('cloudpickle', None);")
    assert re.match(told, failed) and not re.search("one|two", failed), failed
    assert vars(session.a) == {"one": "__main__", "two": [2]}
    assert gc.isenabled() and session.there("a", "__import__('gc').isenabled()")


def test_what_a_session_defines_or_registers_by_value_travels_by_cloudpickle(session):
    session.shell.run_cell("def mine(x): return x + 1")
    session.ok("-k a -p mine -o thing,twice,got", (
        "class Thing: size = 3\nthing, twice, got = Thing(), lambda x: 2 * x, mine(1)"))
    assert (session.a.thing.size, session.a.twice(4), session.a.got) == (3, 8, 2)
    session.ok("-k c=python3 -o thing", f"{FAILING}\nimport cloudpickle\n"
               "cloudpickle.register_pickle_by_value(only_there)")
    assert type(session.c.thing).__name__ == "Thing"


@pytest.mark.parametrize("line", ["-o x", "-o x -b"])
def test_a_large_output_comes_without_a_second_copy_and_is_free_when_deleted(session, line):
    process, size = psutil.Process(), 3 * 2 ** 30  # three gigabytes, where there is room
    size //= 1 if psutil.virtual_memory().available > 1e10 else 16
    session.ok(f"-k c=python3 import numpy as np; x = np.zeros({size // 8}, int)")
    before = process.memory_info().rss
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    session.ok(f"-k c {line} x[::2 ** 20] = 2 ** 23")
    assert session.read("c.x.sum(), c.x.flags.writeable") == (size, True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 1.2 * size
    del session.c.x
    assert until(lambda: gc.collect() is None or process.memory_info().rss < before + 5e7)


def test_the_memory_of_a_push_that_failed_is_free(session):
    large = session.ns["large"] = np.ones(25_000_000).view(type("Large", (np.ndarray,), {}))
    session.ns.update(alive=weakref.ref(large), bad=Runs("1 / 0"))
    assert session.fails("-k a,b -p large,bad 1")["a"].ename == "ZeroDivisionError"
    session.error = large = None
    del session.ns["large"]
    assert until(lambda: gc.collect() is None or session.alive() is None)


# ---- Many kernels ---------------------------------------------------------

def test_kernels_start_run_and_stop_at_the_same_time_those_of_threads_too(session, spec, tmp_path):
    """They take 4 s to start, without CPU; each runs until all do, and has a thread that nobody
    ends, so that stopping takes the user's grace."""
    spec("slow", "sh", "-c", f"sleep 4; exec {' '.join(LAUNCH)}")
    session.configure(shutdown_wait_time=7)
    session.ns["meet"] = (
        f"open('{tmp_path}/%d.runs' % os.getpid(), 'w').close(); import threading, time\n"
        f"while str(os.listdir('{tmp_path}')).count('.runs') < 4: time.sleep(.02)")
    call, begin = session.in_thread("-k b -i meet -t 30 {meet}"), time.process_time()
    session.ok("-k a,s=slow,t=slow -i meet -t 4 -o pid {meet}", (  # starting does not count
        "threading.Thread(target=time.sleep, args=(12,)).start(); pid = os.getpid()"))
    call.result(30)
    assert time.process_time() - begin < 0.15 * session.took + 0.2  # the sockets, and a cell
    assert 4 < session.took < 8 and session.err == session.status[-1] == ""
    assert any(re.fullmatch(r"starting s, t \(\d s\); ready: a", text) for text in session.status)
    assert not re.search(r"\([0-2] s\)", str(session.status))
    assert session.interrupted("-k s,t -s", presses=[0.5]) == "s, t not waited for"
    session.ok("-k s,t -s")
    assert 2 < session.took < 7 and gone(session.s.pid, 0.2) and gone(session.t.pid, 0.2)


@pytest.mark.parametrize("line, told", [
    ("-k a:/usr,b:/no/such/dir -p gift", "b: .*/no/such/dir.*"),
    ("-k a,b -p bad", "a: .*by zero\nb: .*by zero"), ("-k a,broken", "broken: .*exit code 7.*")])
def test_no_code_runs_anywhere_if_one_kernel_cannot_be_prepared(session, spec, line, told):
    spec("broken", "sh", "-c", "exit 7")
    session.ns.update(bad=Runs("1 / 0"), gift=[1])
    session.ok("-k a,b marker = 0")
    session.fails(f"{line} marker = 1")
    assert re.fullmatch(told, str(session.error))
    assert session.there("a", "marker") == session.there("b", "marker") == 0
    if "gift" in line:  # what preparation did elsewhere stays
        assert session.there("a", "(gift, os.getcwd())") == ([1], "/usr")


@pytest.mark.parametrize("options, fate, told", [
    ("", "1/0", "ZeroDivisionError: .*by zero"), ("-b", "1/0", "ZeroDivisionError: .*by zero"),
    ("", "os._exit(3)", "DeadKernelError: .*exit code 3.*"),
    ("", "os.kill(os.getpid(), 35)", "DeadKernelError: .*-35.*"),
    ("", "import ctypes; ctypes.string_at(0)", "DeadKernelError: .*SIGSEGV.*")])
def test_a_kernel_that_fails_takes_nothing_from_the_others(session, options, fate, told):
    session.ns["fate"] = {"a": fate, "b": "print(2)"}
    session.run(f"-k a,b -i fate -o x {options}", "x = 2\n{fate}")
    if options:
        assert session.error is None and session.read("b.x") == 2
        assert session.out.startswith("[b] 2\n")
        session.fails("-k a,b")
    assert re.fullmatch(f"a: {told}", str(session.error)) and session.took < 15
    assert "x" not in vars(session.a) and session.b.x == 2
    assert session.there("a", "'x' in dir()") == ("Dead" not in told)  # it starts anew
    assert session.err == ""


def test_calls_of_threads_that_name_the_same_kernel_take_turns_and_start_it_once(session):
    before = children()
    session.ok("-k a seen = []")
    calls = [session.in_thread(
        f"-k {names} seen = globals().get('seen', []); seen.append(1); "
        "__import__('time').sleep(.3); seen.append(2)")
        for names in ("a", *["a,c=python3"] * 5, "c=python3,a")]
    for call in calls:
        call.result(30)
    assert session.there("a", "seen") == session.there("c", "seen + [1, 2]") == [1, 2] * 7
    assert len(children() - before) == 1


def test_the_question_of_one_thread_holds_up_no_other(session, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: str(call.result(10)))
    call = session.in_thread("-k b import time; time.sleep(.5)", "-k b -o x x = 2")
    session.ok("-k a -o name name = input('who? ')")
    assert session.a.name == "[None, None]" and session.b.x == 2


def test_ctrl_c_stops_only_the_kernels_of_the_call_in_the_main_thread(session):
    call = session.in_thread("-k b -i gate -o x {gate}; x = 3")
    line = session.interrupted("-k a -i begun,wait {begun}; {wait}", presses=[session.begun])
    line += session.interrupted("-k b 1", presses=[0.5])
    session.open()
    call.result(20)
    assert line == "a stoppedb is used by another thread" and session.b.x == 3


# ---- In the background ----------------------------------------------------

def test_a_background_call_returns_at_once_and_tells_since_when_it_runs(session):
    session.ok("-k a,b -i gate -o x -b {gate}; x = 7")
    assert session.took < 1 and "running since " in session.running()["b"]
    assert re.search(r"running since \d\d:\d\d:\d", repr(session.a)) and not hasattr(session.a, "y")
    session.open()
    assert until(lambda: "since" not in repr(session.a) and session.running()["b"] == "idle")
    assert session.read("a.x") == session.read("b.x") == 7
    session.ok("-k a,b")


def test_an_attribute_that_a_run_is_to_bring_waits_in_any_thread_and_its_old_value_goes(session):
    session.ok("-k a -o x,old x = old = 0")
    session.ok("-k a -i gate -o x -b {gate}; x = 7")
    assert vars(session.a) == {"old": 0} and dir(session.a) == ["old"]
    call = session.in_thread("-k a")
    readers = [THREADS.submit(lambda: session.a.x) for _ in range(3)]
    session.ok("-k b 1")  # is not held up by them
    opener = threading.Timer(0.5, session.open)
    opener.start()
    assert session.read("a.old, a.x, a.old") == (0, 7, 0) and not opener.is_alive()
    assert [call.result(10), *(each.result(10) for each in readers)] == [[None], 7, 7, 7]


@pytest.mark.parametrize("ask", [
    lambda session: session.shell.complete("", "a.total.", 8),
    lambda session: session.shell.object_inspect_mime("a.total"),
    lambda session: session.shell.run_cell("%whos"), lambda session: pickle.dumps(session.a),
    lambda session: copy.copy(session.a).old], ids=["Tab", "Shift-Tab", "whos", "pickle", "copy"])
def test_nothing_else_waits_for_a_run_or_uses_up_its_failure(session, ask):
    session.ok("-k a -o old old = 1")
    session.ok("-k a -i gate -o total -b {gate}; 1/0")
    with capture_output(), contextlib.suppress(KeyError):  # (Shift-Tab finds nothing)
        ask(session)
    assert "since" in repr(session.a)
    session.open()
    assert session.fails("-k a")["a"].ename == "ZeroDivisionError"


def test_ctrl_c_ends_only_the_waiting_for_an_attribute_but_in_a_call_as_a_time_out_the_run(session):
    session.ok("-k a,b -i begun,wait -o x -b {begun}; {wait}")
    for _ in range(2):
        with pressing(session.begun), pytest.raises(KeyboardInterrupt):
            session.read("a.x")
    for namespace in (session.a, session.b):  # which threads read
        THREADS.submit(getattr, namespace, "x")
        assert until(lambda: Inside.is_read(namespace))
    assert session.fails("-k b -t 1")["b"].ename == "TimeoutError"
    assert session.interrupted("-k a 1", presses=[session.begun]) == "a stopped"


def test_ctrl_c_while_an_attribute_is_loaded_does_not_lose_it(session):
    loading = f"{session.ns['begun']}; {session.gate}"
    session.ok("-k a -o slow,x -b", "class Slow:\n"
               f"    def __reduce__(self): return exec, ({loading!r},)\nslow, x = Slow(), 7")
    with pressing(session.begun), pytest.raises(KeyboardInterrupt):
        session.read("a.x")
    session.open()
    assert session.read("a.x") == 7


def test_the_next_call_waits_shows_what_the_run_prints_and_goes_on(session):
    runs = ["n = 1; print('first')", "n += 1; print(n)", "n += 1; print(n)"]
    shown = "".join(session.ok(f"-k a -o n -b import time; time.sleep(.3); {run}") for run in runs)
    shown += session.ok("-k a,b print('last')").replace("[b] last\n", "")
    assert shown == "first\n2\n[a] 3\n[a] last\n" and session.a.n == 3


def test_a_calls_time_out_counts_for_the_run_that_it_waits_for(session):
    session.ok("-k a,b -i gate -o x -b {gate}; x = 7")
    failure = session.fails("-k b -t 2")["b"]
    assert failure.ename == "TimeoutError" and "exists" in str(failure.traceback)
    threading.Timer(2, session.open).start()
    session.ok("-k a -t 3.5")
    assert session.a.x == 7


@pytest.mark.parametrize("wait", ["%remote_exec -k a marker = 1", "a.nowhere"])
@pytest.mark.parametrize("code, ename", [
    ("1/0", "ZeroDivisionError"), ("os._exit(3)", "DeadKernelError"), ("y = 1", "NameError"),
    ("y = type('Stops', (), {'__reduce__': lambda _: (exec, ('raise KeyboardInterrupt',))})(); "
     "nowhere = 1", "KeyboardInterrupt")])
def test_who_waits_first_raises_a_runs_failure_once_before_all_else(session, wait, code, ename):
    session.ok("-k a marker = 0")
    session.ok(f"-k a -o y,nowhere -b {code}")
    with pytest.raises(rx.RemoteError) as caught:
        session.read(wait)
    assert caught.value.failures["a"].ename == ename
    with pytest.raises(AttributeError, match="'nowhere'"):
        session.read("a.nowhere")
    assert session.there("a", "globals().get('marker', 0)") == 0


@newest  # on ipykernel 6, displays and errors go under the latest cell
def test_a_notebook_shows_a_run_and_its_failure_under_its_own_cell(notebook, tmp_path):
    cell = notebook.background(f"-k k1,k2 -o x print('on'); {gate(tmp_path / 'open')}; "
                               "print('off'); display(5); 1/0")
    assert "off" not in notebook.shown and notebook.reply(cell)["status"] == "ok"
    notebook.ok("%remote_exec -k k3=python3 -s print('between')")
    (tmp_path / "open").touch()
    notebook.until(lambda: len(contents(notebook.under(cell), "error")) == 2)
    assert sorted(re.findall(r"(?m)^.*o\w+$", notebook.text(cell))) == [
        "[k1] off", "[k1] on", "[k2] off", "[k2] on"]
    assert len(contents(notebook.under(cell), "display_data")) == 2
    errors = str(contents(notebook.under(cell), "error"))
    assert errors.count("'RemoteError'") == 2 == len(re.findall(r"\[k\d\] ", errors))
    assert "remote_exec.py" not in errors


@pytest.mark.parametrize("wait", ["%remote_exec -k k1 marker = 1", "k1.x",
                                  "%remote_exec -k k1,k2 -t 9"])
def test_a_failure_that_a_notebook_has_shown_is_raised_all_the_same(notebook, wait):
    notebook.ok("%remote_exec -k k1 marker = 0")
    cell = notebook.background("-k k1 -o y,x y = 1")
    notebook.until(lambda: contents(notebook.under(cell), "error"))
    reply, _ = notebook.run(f"k1.y += 1\n{wait}")
    assert reply["ename"] == "RemoteError" and "NameError" in reply["evalue"]
    assert notebook.there("k1", "marker") == 0 and len(contents(notebook.under(cell), "error")) == 1
    assert notebook.value("k1.y") == 2  # what came is not loaded once more


def test_a_notebook_answers_while_a_run_floods_it_that_stays_when_others_of_its_call_end(notebook):
    notebook.ok("count = {'k1': 200000, 'k2': 0}")
    cell = notebook.background("-k k1,k2 -i count -o i [print(i) for i in range({count})]; i = 5")
    notebook.ok("%remote_exec -k k2")  # leaves the run of k1 alone
    for _ in range(5):
        assert took(lambda: notebook.run("1 + 1")) < 6
    assert until(lambda: notebook.value("'i' in vars(k1)"), 60)
    assert notebook.text(cell) == "".join(f"[k1] {i}\n" for i in range(200000))


@pytest.mark.parametrize("wait", ["%remote_exec -k k1", "k1.name"])
def test_a_question_of_a_run_is_asked_by_who_waits_for_the_run(notebook, wait):
    notebook.background("-k k1 -o name name = input('who? ')")
    for code in ("import time; time.sleep(1)", "%remote_exec -k k2 import time; time.sleep(.5)"):
        notebook.ok(code, ["wrong"])
        assert not notebook.prompts
    notebook.ok(wait, ["me"])
    assert notebook.prompts == ["who? "] and notebook.value("k1.name") == "me"


# ---- Widgets and progress bars --------------------------------------------

def caught(messages):
    """Return [(message, the `Output` that catches it or None)] of what a front end gets."""
    found, output = [], None
    for each in messages:
        state = each["content"].get("data", {}).get("state")
        if state is None or {*state} - {"msg_id"}:
            found.append((each, output))
        elif state:
            assert state["msg_id"] in ("", each["parent_header"]["msg_id"])
            output = each["content"]["comm_id"] if state["msg_id"] else None
    return found


def as_shown(messages):
    """Return what shows under a cell; each widget's id is a number."""
    text = repr([(output, each["msg_type"], each["metadata"], [*map(bytes, each["buffers"])],
                  *map(each["content"].get, ("comm_id", "target_name", "data", "text", "ename")))
                 for each, output in caught(messages)
                 if each["msg_type"] not in ("status", "execute_input")])
    for number, widget in enumerate(dict.fromkeys(re.findall("[0-9a-f]{32}", text))):
        text = text.replace(widget, str(number))
    return text


@pytest.mark.parametrize("callback, shown", [
    ("print('now', change.new)", "now 5"), ("display(change.new)", "{'text/plain': '5'}"),
    ("label.value = str(change.new)", "{'value': '5'}"), ("1 / 0", "ZeroDivisionError"),
    ("with out: print('in'); 1 / 0", r"'in\n'")])
def test_a_widget_and_what_comes_of_a_move_are_as_they_would_be_here(notebook, callback, shown):
    code = ("out, label, image = w.Output(), w.Label(), w.Image(value=b'\\xff' * 9999)\n"
            f"def moved(change):\n    {callback}\n"
            "slider = w.IntSlider(3); w.interact(lambda x: print('x =', x), x=slider)\n"
            "slider.observe(moved, 'value'); image.close(); ids = slider.model_id")
    there = as_shown(notebook.widgets("k1", code))
    assert "xff" in there == as_shown(notebook.ok(f"import ipywidgets as w\n{code}"))
    there, here = (as_shown(notebook.moved(slider, value=5))
                   for slider in notebook.value("[k1.ids, ids]"))
    assert shown in there == here and "x = 5" in here
    assert notebook.there("k1", "slider.value") == 5


@pytest.fixture
def slider(notebook):
    """The id of a slider on `k1`; moves print, and are `seen`; to 50, for 3 s, to 99, for ever."""
    notebook.widgets("k1", (
        "import time; slider, seen = w.IntSlider(), []; ids = slider.model_id\n"
        "def moved(change):\n    seen.append(change.new); print('moved')\n"
        "    for _ in range({50: 30, 99: 10 ** 9}.get(change.new, 0)): time.sleep(.1)\n"
        "slider.observe(moved, 'value')"))
    return notebook.value("k1.ids")


def test_an_output_widget_catches_what_its_kernel_prints_and_raises_and_nothing_beside(notebook):
    messages = notebook.widgets("k1,k2", (
        "import time; out = w.Output(); ids = out.model_id\nfor i in range(3):\n"
        "    print('beside')\n    with out:\n"
        "        with w.Output(): time.sleep(.1)\n        print('in'); time.sleep(.1); 1 / 0"))
    found = [(line.split("] ")[-1], output) for each, output in caught(messages)
             for line in each["content"].get("text", each["content"].get("ename", "")).splitlines()]
    expected = [("beside", None), ("beside", None)]
    for out in notebook.value("[k1.ids, k2.ids]"):
        expected += [("in", out), ("ZeroDivisionError", out)]
    assert sorted(found, key=str) == sorted(expected * 3, key=str)


@pytest.mark.parametrize("options", ["", "-b"])
@pytest.mark.parametrize("bar, steps", [
    ("tqdm.auto import tqdm", ["'value': 1.0", "'value': 2.0", "'value': 3.0"]),
    ("rich.progress import track", ["100%"])], ids=["tqdm", "rich"])
def test_progress_bars_of_several_kernels_move(notebook, options, bar, steps):
    cell = notebook.start(f"%%remote_exec -k k1,k2 {options}\nimport time; from {bar} as bar\n"
                          "for _ in bar(range(3)): time.sleep(.2)\nprint('over')")
    notebook.until(lambda: notebook.text(cell).count("over") == 2)
    shown = [(output or each["content"].get("comm_id"), str(each["content"]))
             for each, output in caught(notebook.log)]
    for step in steps:
        assert len({bar for bar, text in shown if bar and step in text}) == 2


@pytest.mark.parametrize("options, limit", [("-b", 0), ("-t 1", 9)])
def test_a_busy_kernel_gets_moves_when_it_is_free(notebook, slider, tmp_path, options, limit):
    reply, _ = notebook.run(f"%remote_exec -k k1 {options} __import__('signal').signal(2, "
                            f"lambda *_: 0); {gate(tmp_path / 'open')}")
    assert ("ignores the interrupt" in str(reply)) == (options == "-t 1")
    begin = time.monotonic()
    for value in (1, 2):
        notebook.moved(slider, value=value)
    assert time.monotonic() - begin < 5
    (tmp_path / "open").touch()
    assert until(lambda: notebook.run("%remote_exec -k k1 1")[0]["status"] == "ok", limit)
    assert notebook.there("k1", "seen") == [1, 2]


@newest
def test_moves_by_a_subshell_stay_in_order_also_while_a_cell_runs_and_a_later_cell_waits_for_them(
        notebook, slider):
    subshell = notebook.subshell()
    notebook.moved(slider, subshell, value=1)  # (ipykernel has the main thread deal with the first)
    cell = notebook.start("%remote_exec -k k2 import time; time.sleep(1.5); print('over')")
    for value in range(2, 20):
        notebook.move(slider, subshell, value=value)
        time.sleep(0.03)
    notebook.until(lambda: notebook.text(cell))
    notebook.moved(slider, subshell, value=20)
    assert notebook.shown == "moved\n"  # ahead of its idle status: a front end hears no more
    move = notebook.move(slider, subshell, value=50)
    notebook.until(lambda: notebook.text(move))
    assert notebook.there("k1", "seen") == [*range(1, 21), 50]


@pytest.mark.parametrize("endless", ["cell", "callback", pytest.param("subshell", marks=newest)])
def test_ctrl_c_stops_a_cell_or_a_callback_and_no_later_move(notebook, slider, endless):
    notebook.ok("%remote_exec -k k1 slider.observe(lambda change: ("
                "__import__('time').sleep(.5), seen.append('over')), 'value')")
    subshell = [notebook.subshell()] if endless == "subshell" else []
    notebook.moved(slider, *subshell, value=3)
    stopped = notebook.move(slider, *subshell, value=99) if endless != "cell" else notebook.start(
        "%remote_exec -k k1 print(1); __import__('time').sleep(60)")
    notebook.until(lambda: notebook.text(stopped))
    notebook.manager.interrupt_kernel()
    if subshell:
        notebook.run("%remote_exec -k k1 -t 1")
    notebook.until(lambda: "idle" in str(contents(notebook.under(stopped), "status")))
    for value in (1, 2):
        notebook.moved(slider, value=value)
    assert notebook.there("k1", "seen[-4:]") == [1, "over", 2, "over"]


def test_what_a_front_end_sends_may_be_binary(notebook):
    notebook.widgets("k1", "image = w.Image(); ids = image.model_id")
    notebook.end(notebook.move(notebook.value("k1.ids"), buffers={"value": b"\xff"}))
    assert notebook.there("k1", "bytes(image.value)") == b"\xff"


def test_widgets_of_a_kernel_that_is_gone_raise_nothing(notebook):
    notebook.widgets("k2", "slider = w.IntSlider(); ids = slider.model_id\n"
                     "slider.observe(lambda change: os._exit(3), 'value')")
    slider = notebook.value("k2.ids")
    for value in (5, 6):
        kinds = {each["msg_type"] for each in notebook.moved(slider, value=value)}
        assert kinds <= {"status", "comm_msg"}  # an echo
    notebook.ok("%remote_exec -k k2 1")
    assert "k2 had died" in notebook.shown


# ---- Errors ---------------------------------------------------------------

def test_an_error_is_the_far_tracebacks_in_their_order_without_our_frames(session):
    failures = session.fails("-k b,a 1/0")
    assert failures["a"][:2] == ("ZeroDivisionError", "division by zero")
    assert all(isinstance(line, str) for line in failures["a"].traceback)
    assert str(session.error) == "\n".join(
        f"{name}: ZeroDivisionError: division by zero" for name in "ba")
    lines = session.error._render_traceback_()
    assert lines.index("[b] ") < lines.index("[a] ") and "ZeroDivisionError" in lines[-1]
    assert "remote_exec" not in "\n".join(lines)


@pytest.mark.parametrize("code, expected", [
    ("pylab.plot([1, 2]); 1/0", ["display_data", "error"]),
    ("get_ipython().events.register('post_run_cell', lambda _: print('hook')); 1/0",
     ["error", "stream"]),
    ("{shown}\n{gate}\nraise KeyError", ["error", "error"]),
    ("{shown}\ndel __import__('sys').modules['_remote_exec']", ["error", "error", "stream"])],
    ids=["a figure", "a hook's print", "another error", "a lost module"])
def test_a_notebook_shows_each_traceback_once_whatever_comes_after_it(
        notebook, tmp_path, code, expected):
    notebook.ok("%%remote_exec -k k3=python3 -s\n%matplotlib inline\nimport pylab")
    cell = notebook.start("%%remote_exec -k k3 -o x\n" + code.format(
        gate=gate(tmp_path / "open"),
        shown="try: 1/0\nexcept Exception: get_ipython().showtraceback()"))
    notebook.until(lambda: contents(notebook.under(cell), "error"))  # also while its code goes on
    (tmp_path / "open").touch()
    messages = notebook.end(cell)
    shown = [each["msg_type"] for each in messages
             if each["msg_type"] in ("error", "stream", "display_data")]
    assert sorted(shown) == expected
    assert "ZeroDivisionError" in str(contents(messages, "error")[0]["traceback"])


@pytest.mark.parametrize("code", [
    "%tb", "%xmode Minimal\n%remote_exec -k k1 1/0", "%colors nocolor\n%remote_exec -k k1,k2 1/0",
    "%colors nocolor\n%remote_exec -k k1 -b 1/0"])
def test_far_tracebacks_heed_tb_xmode_and_colors(notebook, code):
    colours = notebook.value("get_ipython().colors")
    notebook.run("%remote_exec -k k1,k2 1/0")
    cell = notebook.start(code)
    notebook.until(lambda: "ZeroDivisionError" in str(contents(notebook.under(cell), "error")))
    notebook.run(f"%colors {colours}\n%xmode Context\n%remote_exec -k k1")
    shown = str(contents(notebook.under(cell), "error"))
    assert "remote_exec.py" not in shown and ("\\x1b" in shown) == ("nocolor" not in code)


@pytest.mark.parametrize("ahead", ["1", "-t 1 {stubborn}"], ids=["idle", "left busy"])
def test_a_kernel_that_died_between_two_cells_is_started_anew_with_a_line(session, ahead):
    pid = session.there("a", "os.getpid()")
    session.run(f"-k a -i stubborn {ahead}")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid) and until(lambda: session.running()["a"] == "dead")
    assert session.there("a", "4") == 4
    assert re.fullmatch(r"a had died \(.*SIGKILL\) and is started anew\n", session.err)


def test_an_attached_kernel_that_died_is_told(session, other):
    for code, cause in ("os._exit(3)", "was not started here"), ("1", "nothing listens"):
        failure = session.fails(f"-k far {code}")["far"]
        assert failure.ename == "DeadKernelError" and cause in failure.evalue and session.took < 20


@pytest.mark.parametrize("name, end, told", [
    ("far", lambda _, other: other.restart(), "(?s)far: (?!.*has its state)"),
    ("a", lambda session, _: session.ok("-k a -s"), "a: ShutdownError")], ids=["attached", "here"])
def test_a_restart_or_shutdown_while_code_runs_is_told_as_one(session, other, name, end, told):
    call = session.in_thread(f"-k {name} -i begun,wait {{begun}}; {{wait}}")
    assert until(session.begun.exists)
    end(session, other)
    error = call.exception(40)
    assert isinstance(error, rx.RemoteError) and re.match(told, str(error)), error
    session.ok("-k far 1")


def test_a_busy_or_silent_kernel_is_not_a_dead_one(session, spec):
    """One holds the GIL; the heart of the other one, as in other languages, is silent meanwhile."""
    spec("mute", sys.executable, "-c", "from ipykernel.kernelapp import IPKernelApp as App; "
         "App.init_heartbeat = lambda app: None; App.launch_instance()", *LAUNCH[-2:])
    session.ns["work"] = {"a": "ctypes.PyDLL(None).sleep(7)", "mute": "time.sleep(7)"}
    session.ok("-k a,mute -i work -o x import ctypes, time; {work}; x = 1")
    assert any(re.fullmatch(r"waiting for a, mute \(\d s\); mute has not answered since [\d:]{8}",
                            text) for text in session.status), session.status
    assert not any("a has not answered" in text for text in session.status)
    assert session.a.x == session.mute.x == 1 and session.err == ""


@pytest.mark.parametrize("argv, cause", [
    (["/no/such/program"], "/no/such/program"), (["sleep", "99"], "Timeout.*not ready after 3 s"),
    (["sh", "-c", "echo last words >&2; exit 7"], "DeadKernelError.*exit code 7.*last words")])
def test_a_kernel_that_cannot_start_names_the_cause_and_leaves_nothing(session, spec, argv, cause):
    spec("broken", *argv)
    session.configure(startup_timeout=3)
    before = files()
    assert re.search(cause, str(session.fails("-k a,broken 1")["broken"]))
    assert "broken" not in session.ns and until(lambda: not files() - before)


def test_a_kernel_whose_end_cannot_be_made_sure_is_told(session, monkeypatch):
    async def cleanup(self, restart=False):
        raise RuntimeError("no way")
    session.ok("-k c=python3 1")
    monkeypatch.setattr("jupyter_client.provisioning.LocalProvisioner.cleanup", cleanup)
    failure = session.fails("-k c -s")["c"]
    assert failure.ename == "ShutdownError" and "no way" in failure.evalue


@pytest.mark.parametrize("code", [
    "{begun}; {gate}", "__import__('threading').Timer(1, lambda: {begun}).start()"])
def test_a_reply_or_outputs_lost_with_the_connection_are_told(session, line, code):
    loser = THREADS.submit(line.lose_reply, session)
    if "Timer" in code:  # the reply has come by then
        line.passes.clear()
    failures = session.fails("-k far -i begun,gate -o x", f"x = 9; {code}")
    loser.result(30)
    assert failures["far"].ename == "LostReplyError" and session.took < 40
    assert session.there("far", "x") == 9


def test_what_anothers_failure_made_a_kernel_drop_is_told_and_ours_drops_nothing(session, other):
    while not session.error:  # (an ipykernel drops only what it has not yet taken up)
        other.client.execute("__import__('time').sleep(.5); 1/0")
        session.run("-k far x = 1")
    assert session.error.failures["far"].ename == "AbortedError"
    call = session.in_thread("-k far -i begun {begun}; __import__('time').sleep(1); 1/0")
    assert until(session.begun.exists)
    assert other.client.execute("2", reply=True, timeout=30)["content"]["status"] == "ok"
    assert "ZeroDivisionError" in str(call.exception(30))


@pytest.mark.parametrize("code, line", [
    pytest.param("{press}; {wait}", "a stopped", id="running"),
    pytest.param("import asyncio; asyncio.get_running_loop().call_later(.3, exec, {press!r}); "
                 "await asyncio.sleep(30)", "a stopped", id="awaiting"),
    pytest.param("class Slow:\n    def __reduce__(self): {press}; {wait}; return int, ()\n"
                 "slow = Slow()", "a stopped", id="pickling there"),
    pytest.param("class Slow:\n    def __reduce__(self): return exec, ({press!r}+';'+{wait!r},)\n"
                 "slow = Slow()", "a not loaded here", id="loading here")])
def test_ctrl_c_stops_the_code_and_keeps_the_state(session, code, line):
    session.ns["code"] = code.format(**session.ns)
    assert session.interrupted("-k a -i code -o slow", "state = 'kept'\n{code}") == line
    assert session.there("a", "state") == "kept" and session.out == session.err == ""


@pytest.mark.parametrize("code, shown", [("x = 3", ""), ("1/0", "ZeroDivisionError")])
def test_ctrl_c_keeps_what_the_others_returned_or_shows_why_they_did_not(session, code, shown):
    session.ns["fate"] = {"a": session.wait, "b": code}
    assert session.interrupted("-k a,b -i fate -o x {fate}", presses=[1]) == "a stopped"
    assert shown in session.err and vars(session.b) == ({} if shown else {"x": 3})


@pytest.mark.parametrize("ahead, options, line", [
    ("1", "-k a,c=sleeper", "c not started"), ("1", "-k a -p gift", "(a|no kernel) stopped"),
    ("__import__('atexit').register(lambda: {press})", "-k a -s", "a not .*|no kernel stopped"),
    ("1", "-k a -p slow", "nothing ran")], ids=["starting", "preparing", "stopping", "pickling"])
def test_code_does_not_run_after_a_ctrl_c_that_came_before(session, spec, ahead, options, line):
    spec("sleeper", "sh", "-c", f"sleep 1; kill -2 {os.getpid()}; exec sleep 1000")
    session.ns.update(gift=Runs(session.press), slow=type("Slow", (), {
        "__reduce__": lambda _: (os.kill(os.getpid(), signal.SIGINT), time.sleep(30))})())
    session.ok(f"-k a -i press {ahead}")
    assert re.fullmatch(line, session.interrupted(f"{options} -i begun {{begun}}"))
    session.ok("-k a 1")
    assert not session.begun.exists()


def test_one_ctrl_c_waits_for_the_outputs_and_a_second_one_does_not(session, line):
    line.hold(4.5)
    session.interrupted("-k far -o x x = 6", presses=[1])
    assert session.far.x == 6 and not session.status  # of a single kernel
    line.passes.clear()
    session.interrupted("-k far -o x x = 7", presses=[0.5, 0.5])
    line.passes.set()
    assert session.there("far", "8") == 8


@pytest.mark.parametrize("ahead, line", [
    pytest.param("", "-k a -i begun,stubborn {begun}; {stubborn}", id="running"),
    pytest.param("-b {begun}; {stubborn}", "-k a,b -o y y = 1", id="collecting"),
    pytest.param("", "-k a,b -p late 1", id="preparing")])
def test_a_second_ctrl_c_gives_the_prompt_back_and_the_kernel_stays_busy(session, ahead, line):
    session.ns["late"] = Runs(f"{session.ns['begun']}\n{session.ns['stubborn']}")
    session.ok(f"-k a -i begun,stubborn {ahead}")
    assert re.search(r"\ba\b.* still busy", session.interrupted(line, presses=[session.begun, 0.5]))
    assert session.running()["a"] == "busy" and "-s" in session.misused("-k a 1")
    session.ok("-k a -s -o x x = 1")
    assert session.a.x == 1


def test_one_ctrl_c_in_a_notebook_ends_all_that_runs_and_asks(notebook):
    cell = notebook.start("do = {'k1': 'import time; time.sleep(60)', 'k2': 'input()'}\n"
                          "%remote_exec -k k1,k2 -i do {do}")
    notebook.client.get_stdin_msg(timeout=30)
    notebook.manager.interrupt_kernel()
    notebook.end(cell)
    reply = notebook.reply(cell)
    assert (reply["ename"], reply["evalue"]) == ("KeyboardInterrupt", "k1, k2 stopped")
    assert not notebook.client.stdin_channel.msg_ready()
    notebook.ok("%remote_exec -k k1,k2 print(2)")


@pytest.mark.parametrize("line", [
    "-k a,b:/ -p large -o x x = large[:9]", "-k a,b -s -o x x = 1", "-k c=python3,a -o x x = 1",
    "-k a,b -o big"])
def test_ctrl_c_at_any_moment_leaves_working_kernels(session, line, request):
    before = signal.signal(signal.SIGINT, lambda *_: None)  # one may come when the call is over
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    session.ns["large"] = np.ones(2_000_000)
    session.ok("-k a,b import numpy as np; big = np.ones(2_000_000)")
    for delay in (0.01, 0.03, 0.06, 0.1, 0.2, 0.4):
        with pressing(delay):
            session.run(line)
        assert session.error is None or isinstance(session.error, KeyboardInterrupt) and (
            re.match(r"\w+(, \w+)* \w", str(session.error))), repr(session.error)
        session.ok("-k a=python3,b=python3 -o x x = 3; big = globals().get('big')")
        assert session.a.x == session.b.x == 3


def test_what_another_client_runs_is_neither_shown_nor_interrupted(session, other):
    session.ok(f"-k more={other.file} 1")
    other.client.execute(f"{session.ns['begun']}; {session.gate}; print('theirs'); n = 1")
    assert until(session.begun.exists)
    assert "another client's code goes first" in session.fails("-k more -t 1 1")["more"].evalue
    threading.Timer(1.5, session.open).start()
    session.interrupted("-k far -i wait {wait}", presses=[0.5])
    assert session.out == "" and session.there("far", "n") == 1


@pytest.mark.parametrize("kind", [
    "stream", "display_data", "update_display_data", "error", "clear_output", "comm_open",
    "comm_msg", "comm_close", "status", "execute_reply", "input_request", "unknown"])
def test_whatever_messages_a_kernel_sends_the_call_ends_and_the_next_one_works(session, kind):
    names = "traceback", "name", "text", "data", "transient", "comm_id", "execution_state"
    odd = [dict.fromkeys(names, value) for value in (None, 7, "text", [[]], {"text": {}})]
    session.ns.update(kind=kind, contents=[{}, *odd] * 2)  # some come when the call has failed
    session.run("-k a -p kind,contents kernel = get_ipython().kernel", (
        "kernel.iopub_socket.send_multipart([b'a', b'<IDS|MSG>', b'wrong'])\n"
        "for content in contents:\n"
        "    kernel.session.send(kernel.iopub_socket, kind, content, kernel.get_parent())"))
    assert isinstance(session.error, (rx.RemoteError, type(None))), repr(session.error)
    assert session.there("a", "1") == 1


def test_text_that_a_terminal_lacks_is_escaped_and_takes_nothing_with_it():
    done = ipython(
        r"%remote_exec -k k=python3 -o y y = 1; print('\u4e2d'); display('\u4e2d'); '\u4e2d'",
        "print(k.y)", "%remote_exec -k k raise KeyError(chr(0x4e2d))",
        PYTHONIOENCODING="ascii:strict")
    assert done.stdout.count(r"\u4e2d") == 4 and "\n1\n" in done.stdout and not done.stderr


# ---- What the user sees ---------------------------------------------------

def test_one_kernel_shows_as_if_it_ran_here_and_widgets_show_as_text(session):
    session.ok("-k a", "import ipywidgets, sys; print('e', file=sys.stderr); print('x', end='')\n"
                       "print('\\0 \\x1b[31mred\\x1b[0m \\U0001f600', 'x' * 10**6)\n"
                       "ipywidgets.IntSlider(7)")
    assert session.out == "x\0 \x1b[31mred\x1b[0m \U0001f600 " + "x" * 10**6 + "\n"
    assert session.err == "e\n"
    assert [each.data["text/plain"] for each in session.displays] == ["IntSlider(value=7)"]
    assert session.ok("-k a 7;") == "" and not session.displays


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(alphabet="ab\r\n é", max_size=12), max_size=12))
def test_every_line_of_a_stream_is_labelled_however_it_comes(session, chunks):
    session.ns["chunks"] = chunks
    session.ok("-k a,b -i chunks", "import sys\nfor chunk in {chunks}:\n"
                                   "    sys.stdout.write(chunk); sys.stdout.flush()")
    expected, lines = (re.findall(r"[^\r\n]+", text) for text in ("".join(chunks), session.out))
    lines = [line for line in lines if line not in ("[a] ", "[b] ")]
    assert sorted(lines, key=lambda line: line[:4]) == [
        label + line for label in ("[a] ", "[b] ") for line in expected]


def test_late_output_shows_in_a_terminal_at_the_next_call(session):
    shown = session.ok("-k a", "import threading, time\n"
                       "timer = threading.Timer(.5, print, ['late']); timer.start()")
    for code in ("timer.join(); time.sleep(.3)", "1;"):
        shown += session.ok(f"-k a {code}")
    assert shown == "late\n"
    session.interrupted("-k a -i begun,stubborn {begun}; {stubborn}; print('left')",
                        presses=[session.begun, 0.5])
    threading.Timer(0.5, session.open).start()
    assert session.ok("-k a 1;") + session.ok("-k a -s") == "left\n"


@newest  # on ipykernel 6, displays go under the latest cell
def test_late_output_shows_in_a_notebook_as_it_comes_under_its_cell(notebook, tmp_path):
    wait = gate(tmp_path / "open")
    do = {"k1": f"threading.Thread(target=lambda: ({wait}, print('late'))).start()",
          "k2": f"subprocess.Popen([sys.executable, '-c', {wait + '; print(7)'!r}])"}
    cell = notebook.start(f"do = {do}\n%remote_exec -k k1,k2 -i do "
                          "import subprocess, sys, threading; {do};")
    notebook.end(cell)
    notebook.ok("1")
    (tmp_path / "open").touch()
    notebook.until(lambda: len(notebook.text(cell).splitlines()) == 2)
    assert sorted(notebook.text(cell).splitlines()) == ["[k1] late", "[k2] 7"]


def test_displays_updates_and_clear_output_are_unchanged_but_two_kernels_share_none(notebook):
    notebook.ok("wait = {'k1': 1, 'k2': .5}")  # k2 clears what it has shown, not what k1 is to show
    messages = notebook.ok(
        "%%remote_exec -k k1,k2 -i wait\nimport sys, time; from IPython import display as d\n"
        "print(end='ahead', flush=True); time.sleep({wait}); h = display({'text/html': '<b>'}, "
        "raw=True, display_id='d', transient={'more': 1}, metadata={'text/html': {'wide': 1}})\n"
        "h.update(2); print('gone', end=''); d.clear_output(wait=True)\n"
        "for i in range(9): print(i, file=(sys.stdout, sys.stderr)[i % 2], flush=True)")
    shown, updates = contents(messages, "display_data"), contents(messages, "update_display_data")
    assert [each["data"] for each in shown + updates] == (
        [{"text/html": "<b>"}] * 2 + [{"text/plain": "2"}] * 2)
    assert shown[0]["transient"]["more"] == 1 == shown[1]["metadata"]["text/html"]["wide"]
    assert contents(messages, "clear_output") == [{"wait": True}] * 2
    ids = [{each["transient"]["display_id"] for each in kind} for kind in (shown, updates)]
    assert ids[0] == ids[1] and len(ids[0]) == 2
    assert re.findall(r"\[k1\] (.*)", notebook.shown) == ["ahead", "", *"012345678"]


def test_a_front_end_that_reads_nothing_until_all_is_over_loses_nothing(notebook):
    cell = notebook.start("%remote_exec -k k1 for i in range(3000): display(i)")
    assert notebook.reply(cell)["status"] == "ok"
    shown = contents(notebook.end(cell), "display_data")
    assert [each["data"]["text/plain"] for each in shown] == [str(i) for i in range(3000)]


def test_capture_captures_text_and_displays(notebook):
    notebook.ok("%%capture caught\n%remote_exec -k k1,k2 print('text'); display(5)")
    assert notebook.shown == ""
    assert notebook.value("sorted(caught.stdout.split()), [o.data for o in caught.outputs]") == (
        ["[k1]", "[k1]", "[k2]", "[k2]", "text", "text"], [{"text/plain": "5"}] * 2)


def test_a_help_page_is_a_page_and_those_of_several_kernels_all_show(notebook):
    assert "sys.stdout" in str(notebook.run("%%remote_exec -k k1\nprint?")[0]["payload"])
    assert str(notebook.ok("%%remote_exec -k k1,k2\nprint?")).count("sys.stdout") >= 2


def test_a_notebooks_status_line_is_gone_in_the_end_and_has_data_always(notebook):
    messages = notebook.ok("%%remote_exec -k k1,k2\nimport time; time.sleep(4)")
    shown = [each["data"] for each in contents(messages, "display_data", "update_display_data")]
    assert re.fullmatch(r"waiting for k1, k2 \(\d s\)", shown[0]["text/plain"])
    assert all(shown) and set(shown[-1].values()) == {""}  # (nbconvert warns of one without data)


def test_questions_passwords_and_the_debugger_ask_here_with_a_label_for_several(notebook):
    notebook.run("%remote_exec -k k1 1/0")
    notebook.ok("%%remote_exec -k k1\n%debug", ["p 6 * 7", "q"])
    assert "42" in notebook.shown and notebook.prompts == ["ipdb> ", "ipdb> "]
    notebook.ok("%remote_exec -k k1,k2 -o name import getpass; "
                "name = input('who? ') + getpass.getpass('pw? ')", ["a", "b", "c", "d"])
    assert sorted(notebook.prompts) == ["[k1] pw? *", "[k1] who? ", "[k2] pw? *", "[k2] who? "]
    assert sorted(notebook.value("k1.name + k2.name")) == ["a", "b", "c", "d"]


def test_a_question_that_nobody_can_answer_is_an_error(notebook):
    cell = notebook.start("%remote_exec -k k1 input()", allow_stdin=False)
    assert "StdinNotImplementedError" in notebook.reply(cell)["evalue"]


def test_a_question_comes_after_what_was_printed_and_is_not_lost(session, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda ask: ask[:4] + "2999\n" in sys.stdout.getvalue())
    for _ in range(3):  # of new kernels, one in 15 was
        session.ok("-k c=python3,d=python3,e=python3,f=python3 -t 60 -s -o seen", (
            "for i in range(3000): print(end='\\n%d' % i)\nseen = input('who? ')"))
        assert {each.seen for each in (session.c, session.d, session.e, session.f)} == {True}


@pytest.mark.parametrize("call, ename", [
    ("-t 1 input('password? ')", "TimeoutError"),
    ("__import__('threading').Timer(1, os._exit, [3]).start(); input()", "DeadKernelError")],
    ids=["time-out", "death"])
def test_a_question_ends_with_its_request_and_a_late_answer_goes_to_no_other(
        session, monkeypatch, call, ename):
    monkeypatch.setattr("builtins.input", lambda prompt: time.sleep(8) or "secret")
    assert session.fails(f"-k a {call}")["a"].ename == ename and session.took < 15
    monkeypatch.setattr("builtins.input", lambda prompt: "me")
    assert session.there("a", "input('who? ')") == "me"


def test_a_terminal_shows_the_prompt_ctrl_c_questions_and_a_status_line_that_fits_its_width():
    import pexpect
    child = pexpect.spawn(sys.executable, [
        "-m", "IPython", "--simple-prompt", "--colors=NoColor", "--no-banner"],
        encoding="utf-8", timeout=30, cwd=str(HERE), env={**os.environ, "COLUMNS": "20"})
    for number, (code, *dialogue) in enumerate([
        ("%load_ext remote_exec",),
        ("%remote_exec -k k=python3 import time; print('be' + 'gun', end=''); time.sleep(60)",
         "begun", child.sendintr, "KeyboardInterrupt: k stopped\r\n"),
        ("%remote_exec -k k n = input('who' + '? ')", r"\r\nwho\? ", lambda: child.sendline("me")),
        (r"%remote_exec -k k exec('try: input(\'end? \')\nexcept EOFError: print(6 * 7)')",
         r"\nend\? ", child.sendeof, "42"),
        ("%remote_exec -k k,m=python3 print('n' in dir() and n * 2); import time; time.sleep(4); "
         "print('ov' + 'er')", "meme", r"\rwaiting for k.{,6}\x1b\[K", r"\r\x1b\[K", "over"),
        ("%remote_exec nonsense", "UsageError: -k"),
        ("exit", lambda: child.expect(pexpect.EOF))], 1):
        child.expect(fr"In \[{number}\]: ")
        child.sendline(code)
        for each in dialogue:
            each() if callable(each) else child.expect(each)
            assert "Traceback" not in child.before and "remote_exec.py" not in child.before
    assert "rror" not in child.before


# ---- Other kernels than Python --------------------------------------------

def test_kernels_of_other_languages_run_code_and_say_what_needs_python(session, spec, tmp_path):
    spec("shell", sys.executable, "-m", "bash_kernel", "-f", "{connection_file}", language="bash",
         env={"HOME": str(tmp_path)})  # what the shell does at its start there may take long
    assert session.ok("-k shell=shell echo $((6*7))") == "42\n"
    shutil.rmtree(tmp_path / "jupyter")  # the kernelspec, which it needs no more
    for options in (" -o x", ":/tmp", " -p press"):
        assert "bash" in session.misused(f"-k shell{options} ls")
    assert session.interrupted("-k shell sleep 20", presses=[0.5]) == "shell stopped"
    assert session.fails("-k shell false")["shell"].evalue == "1"
    assert session.error._render_traceback_() == ["Error: 1"]  # it names none


@pytest.mark.skipif(not importlib.util.find_spec("xpython"), reason="no xeus-python")
def test_a_python_kernel_without_ipython_runs_code_and_says_what_more_needs(session, spec):
    spec("raw", sys.executable, "-m", "xpython_launcher", "-f", "{connection_file}", "--raw")
    assert session.ok("-k a,raw x = 42; print(x)").count("42\n") == 2
    assert re.search("need Python.* with IPython", session.misused("-k raw -o x x = 1"))
    assert session.fails("-k raw 1/0")["raw"].ename == "ZeroDivisionError"


@newest
@pytest.mark.parametrize("version, packages", [
    ("3.6", ["ipykernel<6", "numpy<1.20", "--python-version=3.6", "--only-binary=:all:"]),
    ("3.8", ["ipykernel<6.30", "numpy<1.25"])])
def test_older_pythons_exchange_everything(session, spec, tmp_path, version, packages):
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    python = max(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), default=None)
    if not python:
        pytest.skip(f"no Python {version} (pyenv)")
    # (the pip of 3.6 does not heed which Python a package is for)
    subprocess.run([sys.executable if version == "3.6" else python, "-m", "pip", "install", "-q",
                    "--no-compile", "--target", tmp_path, *packages], check=True)
    spec("old", python, *LAUNCH[1:], env={"PYTHONPATH": str(tmp_path)})
    session.ns.update(text="h\xe9", array=np.arange(3e5), n=[1, 2.5, None])
    session.ok("-k old -p text,array,n -o version,text,array,one,two", (
        "import sys; version = '%d.%d' % sys.version_info[:2]; array[0] = 5; one = two = n"))
    old = session.old
    assert (old.version, old.text, old.one) == (version, "h\xe9", [1, 2.5, None])
    assert old.array.dtype == float and old.array.flags.writeable and old.array[0] == 5
    assert old.one is old.two
    session.interrupted("-k old -i press,wait {press}; {wait}")


# ---- Configuration, fleets, security --------------------------------------

def test_local_kernels_use_sockets_where_only_the_user_can_enter(session):
    file = session.connection_file("a")
    info = json.loads(file.read_text())
    folder, name = os.path.split(info["ip"])
    assert info["transport"] == "ipc" and os.stat(folder).st_mode & 0o777 == 0o700
    assert str(file.parent) == os.environ["JUPYTER_RUNTIME_DIR"]
    assert file.stat().st_mode & 0o777 == 0o600
    session.ok(f"-k far={file} 1;")
    session.ok("-k a -s")
    assert "nothing listens" in str(session.fails("-k far 1"))
    assert not file.exists() and not list(pathlib.Path(folder).glob(name + "*"))
    shutil.rmtree(folder)  # it is made anew
    session.ok("-k d=python3 1")
    session.ok("-k b,d -s")


@pytest.mark.parametrize("wish", [
    {"ip": "127.0.0.1"}, {"transport": "tcp", "transport_encryption": "disabled"}])
def test_the_users_transport_is_taken_and_encrypted_where_possible(session, wish):
    session.configure(**wish)
    session.ok("-k c=python3 1")
    info = json.loads(session.connection_file("c").read_text())
    with zmq.Context() as context, context.socket(zmq.SUB) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://{info['ip']}:{info['iopub_port']}")
        stranger.subscribe(b"")
        is_heard = until(lambda: session.ok("-k c print('secret')") and stranger.poll(100), 3)
        is_encrypted = "ip" in wish and hasattr(KernelManager, "transport_encryption") and (
            "curve" in str(KernelManager(kernel_name="python3").kernel_spec.metadata))
        assert is_heard != is_encrypted == ("curve_publickey" in info)


def test_a_message_that_is_signed_with_another_key_is_ignored(session):
    session.ok("-k a", (
        "from jupyter_client.session import Session\nkernel = get_ipython().kernel\n"
        "Session(key=b'wrong').send(kernel.iopub_socket, 'stream', "
        "{'name': 'stdout', 'text': 'forged'}, kernel.get_parent())\nprint('true')"))
    assert session.out == "true\n"


def test_a_connection_file_is_followed_until_the_kernel_answers(session, spec):
    """As a batch job writes where it runs; meanwhile it may be missing or half-written."""
    session.configure(shutdown_wait_time=60)
    spec("moved", "sh", "-c", "sleep .5; f={connection_file}; mv $f $f.old; sleep .5; "
         "sed s/127.0.0.1/127.0.0.2/ $f.old >$f.new; head -c 99 $f.new >$f; sleep .5; "
         f"mv $f.new $f; rm $f.old; exec {' '.join(LAUNCH)}")
    session.ok("-k moved -o pid pid = os.getpid()")
    assert session.interrupted("-k moved -i press,wait {press}; {wait}") == "moved stopped"
    session.ok("-k moved -s")
    assert gone(session.moved.pid, 1) and session.took < 20


def test_one_file_is_enough_and_may_be_edited_while_a_session_is_open(tmp_path):
    shutil.copy(HERE / "remote_exec.py", tmp_path)
    done = ipython("_ = open('remote_exec.py', 'w').write('# no more')",
                   "%remote_exec -k k=python3 -p _ -o x x = _ * 2", "print(k.x)", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("18\n", "")


def test_the_limit_of_open_files_is_raised():
    done = ipython("targets = ['c%d=python3' % i for i in range(14)]",
                   "%remote_exec -k {targets} -o x x = 1", "print(c0.x + c13.x)",
                   before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 4096)))
    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.parametrize("name, mode", [("x" * 150, 0o700), ("runtime", 0o500)])
def test_directories_may_be_long_not_there_or_read_only_and_nothing_stays(tmp_path, name, mode):
    """Where the home can't be written, files are in the session's own directory."""
    tmp_path.chmod(mode)
    before = files()
    # root may write anywhere, unless it gives up CAP_DAC_OVERRIDE (prctl(2): 24, 1)
    done = ipython(
        "%remote_exec -k k=python3 import ipykernel; f = ipykernel.get_connection_file(); "
        "print(*[oct(os.stat(each).st_mode & 0o777) for each in (f, os.path.dirname(f))], f)",
        before=lambda: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0), IPYTHONDIR=WORK.name,
        HOME=str(tmp_path), TMPDIR=str(tmp_path / "nowhere"),
        JUPYTER_RUNTIME_DIR=str(tmp_path / name))
    file, directory, path = done.stdout.split()[-3:]
    assert (file, directory, done.stderr) == ("0o600", "0o700", ""), done
    assert (str(tmp_path) in path) == (mode == 0o700) and files(done.pid) <= before
    assert not [*(tmp_path / name).glob("*")] and not os.path.exists(path)


def test_restarts_runs_failures_and_interrupts_leak_nothing(session):
    for _ in turns_that_leak_nothing(4):
        session.ok("-k c=python3,d=python3 -s -o x -b x = 1")
        session.fails("-k c,d os._exit(3)")
        session.interrupted("-k c,d -i press,wait {press}; {wait}")


def test_start_up_files_that_start_kernels_make_no_endless_chain(tmp_path):
    profile = tmp_path / "profile_default"
    (profile / "startup").mkdir(parents=True)
    (profile / "ipython_config.py").write_text(
        "c.InteractiveShellApp.extensions = ['remote_exec']\n")
    (profile / "startup" / "10.py").write_text(
        f"import os, pathlib\nfile = pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid')\n"
        "file.touch()\nif len(list(file.parent.glob('*.pid'))) <= 10:  # the brake\n"
        "    try: get_ipython().run_line_magic('remote_exec', '-k gpu=python3 x = 1')\n"
        "    except BaseException as error: file.write_text(str(error))\n")
    done = ipython("%remote_exec -k gpu print(6 * x)", load="",
                   IPYTHONDIR=str(tmp_path), PYTHONPATH=str(HERE))
    said = {int(file.stem): file.read_text() for file in tmp_path.glob("*.pid")}
    assert all(map(gone, said)) and len(said) == 3
    refused, = filter(None, said.values())
    assert re.fullmatch(".*start-?up.*", refused) and done.stdout == "6\n"


@pytest.mark.parametrize("run", ["1", "-b -i wait {wait}"], ids=["idle", "busy"])
def test_what_started_a_kernel_is_told_to_end(session, spec, tmp_path, run):
    session.configure(shutdown_wait_time=4)
    spec("wrapped", "sh", "-c", f"trap 'touch {tmp_path}/ended; kill -9 $!; exit' TERM; "
         f"{' '.join(LAUNCH)} & wait; while :; do sleep .1; done")
    pid = session.ok("-k wrapped 1") or session.there("wrapped", "os.getppid()")
    session.ok(f"-k wrapped {run}")
    session.ok("-k wrapped -s")
    assert (tmp_path / "ended").exists() and gone(pid)


def test_a_notebooks_end_takes_two_seconds_and_leaves_nothing():
    before, notebook = files(), Notebook()
    session = notebook.value("__import__('os').getpid()")
    notebook.ok("%remote_exec -k k1=python3,k2=python3,k3=python3 -o pid "
                "import threading, time, signal; pid = os.getpid()")
    pids = notebook.value("[k1.pid, k2.pid, k3.pid]")
    notebook.ok("%remote_exec -k k1 threading.Thread(target=time.sleep, args=(99,)).start()")
    notebook.ok("%remote_exec -k k2 signal.signal(signal.SIGTERM, lambda *_: 0); "
                "get_ipython().kernel.do_shutdown = None")
    cell = notebook.background("-k k3 signal.signal(2, lambda *_: 0); print('on'); time.sleep(99)")
    notebook.until(lambda: "on\n" in notebook.text(cell))
    assert took(notebook.close) < 3  # a front end grants 2.5, on an idle machine
    assert all(gone(pid, 1) for pid in pids) and files(session) <= before


@pytest.mark.parametrize("presses", [0, 1, 3])  # of Ctrl-C, meanwhile
def test_a_scripts_end_is_silent_lets_far_exit_handlers_end_and_leaves_nothing(tmp_path, presses):
    before = files()
    done = ipython(
        "get_ipython().config.KernelManager.shutdown_wait_time = 20",
        "%remote_exec -k k=python3,m=python3 -o pid import atexit, time; pid = os.getpid()",
        "%remote_exec -k k atexit.register(lambda: "
        f"(time.sleep({4 if presses else 9}), open({str(tmp_path / 'ended')!r}, 'w')));",
        "%remote_exec -k m -b import signal, threading; threading.Timer(99, print).start(); "
        "signal.signal(2, lambda *_: 0); time.sleep(99)",
        "import atexit, subprocess, time; print(k.pid, m.pid, time.time())",
        f"_ = atexit.register(subprocess.Popen, 'sleep .2; kill -2 $PPID; ' * {presses}, shell=1)")
    ended = time.time()
    *pids, last = done.stdout.split()
    assert done.stderr == "" and ended - float(last) < 15 and (tmp_path / "ended").exists()
    assert all(gone(int(pid), 1) for pid in pids) and files(done.pid) <= before


@pytest.mark.parametrize("end", ["%unload_ext remote_exec", ""])
def test_a_session_may_end_while_a_thread_starts_a_kernel(spec, tmp_path, end):
    begun = tmp_path / "begun"
    spec("sleeper", "sh", "-c", f"echo $$ >{begun}; exec sleep 1000")
    done = ipython(
        "import threading, time; threading.excepthook = lambda _: None",
        "start = lambda: get_ipython().run_line_magic('remote_exec', '-k s=sleeper 1')",
        "threading.Thread(target=start, daemon=True).start()", gate(begun), "time.sleep(.5)",
        end, "print(time.time())")
    assert time.time() - float(done.stdout.splitlines()[-1]) < 10 and done.stderr == "", done
    assert gone(int(begun.read_text()), 5) and not files(done.pid) - files()


def test_in_a_forked_child_the_magic_is_refused_and_its_end_touches_nothing():
    done = ipython(
        "%remote_exec -k k=python3 -o late -b import time; time.sleep(3); x = late = 8",
        "import atexit, os", "if not os.fork():",
        "    try: get_ipython().run_line_magic('remote_exec', '-k k 1')",
        "    except Exception as error: print(error, hasattr(k, 'late'), flush=True)",
        "    atexit._run_exitfuncs(); __import__('os')._exit(0)", "status = os.wait()[1]",
        "%remote_exec -k k -o f f = __import__('ipykernel').get_connection_file()",
        "more = 'again=' + k.f", "%remote_exec -k {more} -o x", "print(status, again.x)")
    assert re.fullmatch(r"\w+ .* False\n0 8\n", done.stdout), done


# ---- Far kernels and batch queues -----------------------------------------

def check_far_kernels(session, targets):
    names = re.findall(r"(\w+)=", targets)
    session.ns.update(gift=np.arange(1e6), names=names)
    session.ok(f"-k a,{targets} -p gift -o directory,host,pid,x", (
        "directory, pid, x = os.getcwd(), os.getpid(), gift * 2\n"
        "host = os.environ.get('SLURMD_NODENAME') or os.popen('hostname -I').read()"))
    for each in map(session.ns.get, names):
        assert each.directory == "/usr" and each.x[-1] == 1999998 and each.host != session.a.host
    assert session.interrupted("-k {names}", "import time; y = 3; time.sleep(60)", presses=[1]) == (
        ", ".join(names) + " stopped")
    # (so long that it is just being asked whether it lives when all has come)
    session.ok("-k {names} -o y,z -b import time; time.sleep(1.05); z = 4")
    assert all(session.read(f"[{name}.y, {name}.z]") == [3, 4] for name in names)
    session.ok("-k {names} -s")


def check_the_end_of_a_session(*specs):
    done = ipython(
        f"%remote_exec -k k=python3,m={specs[0]},n={specs[1]} -o pid pid = os.getpid()",
        "%remote_exec -k n -b import time; time.sleep(60)",
        "import time; print(k.pid, m.pid, n.pid, time.time())")
    *pids, last = done.stdout.split()
    assert time.time() - float(last) < 4 and all(gone(int(pid)) for pid in pids)


@over_ssh
@pytest.mark.parametrize("name", ["sshpyk-far", "rik-far"])
def test_kernels_over_ssh_do_what_local_ones_do(session, far_specs, name):
    check_far_kernels(session, f"far={name}:/usr")
    assert gone(session.far.pid)  # the second host shares this one's process table


@over_ssh
def test_kernels_of_gateway_provisioners_do_what_local_ones_do(session, gateway):
    check_far_kernels(session, "g=gateway:/usr,h=gateway:/usr")
    assert session.fails("-k g os.kill(os.getpid(), 9)")["g"].ename == "DeadKernelError"


@over_ssh
def test_a_kernel_over_ssh_that_died_is_told_and_started_anew(session, far_specs):
    failures = session.fails("-k far=sshpyk-far os.kill(os.getpid(), 9)")
    assert failures["far"].ename == "DeadKernelError" and session.took < 20
    pid = session.there("far", "os.getpid()")
    os.kill(pid, 9)
    assert gone(pid)
    session.ok("-k far 1")
    assert "started anew" in session.err


@over_ssh
@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.77"])  # unknown, refused
def test_a_host_that_cannot_be_reached_is_named(session, spec, host):
    spec("nowhere", metadata=sshpyk(host, raise_on_ssh_config_error=False))
    assert host in session.fails("-k nowhere=nowhere 1")["nowhere"].evalue
    assert "nowhere" not in session.running()


@over_ssh
@pytest.mark.skipif(not SSH_LINK, reason="no link to cut: REMOTE_EXEC_SSH_LINK")
def test_without_a_network_limits_and_ctrl_c_work_and_a_result_still_arrives(session, far_specs):
    session.ok("-k far=sshpyk-far,late=sshpyk-far,stopped=sshpyk-far 1")
    with later(1, CUT.format(12)):
        failures = session.fails("-k late -t 2 import time; time.sleep(4); x = 7")
        assert failures["late"].ename == "TimeoutError" and session.took < 12
        assert any("late has not answered since" in text for text in session.status)
        session.interrupted("-k stopped import time; time.sleep(4); x = 7", presses=[1, 1])
        assert "late is still busy" in session.misused("-k late,far 1")
        session.ok("-k far -o x import time; time.sleep(3); x = 7")
    assert session.far.x == 7
    with later(0, CUT.format(3)):
        assert session.interrupted("-k stopped -s", presses=[1]) == "stopped not waited for"


@over_ssh
def test_the_end_of_a_session_leaves_no_kernel_over_ssh(far_specs):
    check_the_end_of_a_session("rik-far", "sshpyk-far")


@over_ssh
def test_a_tunnel_that_was_killed_loses_at_most_the_reply(session, far_specs):
    session.ok("-k far=sshpyk-far 1")
    with later(1, f"ssh -q -O exit {SSH_HOST}"):
        session.run("-k far -o x -t 60 import time; time.sleep(4); x = 7")
    assert session.error is None and session.far.x == 7 or (
        session.error.failures["far"].ename == "LostReplyError"), session.error
    assert session.there("far", "x") == 7


@in_queue
def test_jobs_on_two_nodes_do_what_local_kernels_do(session, job):
    check_far_kernels(session, "p=slurm-one:/usr,q=slurm-two:/usr")
    assert [session.p.host, session.q.host] == NODES and until(lambda: not jobs(), 2)


@in_queue
def test_a_job_that_is_cancelled_is_dead_and_started_anew(session, job):
    session.ok("-k p=slurm-one 1")
    with later(1, CANCEL):
        failures = session.fails("-k p import time; time.sleep(60)")
    assert failures["p"].ename == "DeadKernelError" and session.took < 20
    session.ok("-k p 1")
    later(0, CANCEL).wait()
    assert until(lambda: not jobs())
    session.ok("-k p 1")
    assert "started anew" in session.err


@in_queue
def test_a_job_that_waits_in_the_queue_is_told_and_taken_out_by_ctrl_c(session, job):
    job("held", "--hold")
    assert session.interrupted("-k a,held,c=python3 1", presses=[4.5]) == "held not started"
    assert any(re.match(r"starting held \(\d s\).*ready: a, c", text) for text in session.status)
    assert until(lambda: not jobs(), 2)


@in_queue
@pytest.mark.parametrize("options, change, cause", [
    (["--hold"], ("", ""), "TimeoutError: .*not ready after 3.*queued and waiting"),
    (["-p", "nowhere"], ("", ""), "invalid partition"),
    ([], ("{connection_file}", "/not/shared.json"), "/not/shared.json: No such file"),
    ([], ("127.0.0.1", "nothing"), "not ready after 3.*127.0.0.1")])  # who knows where it is
def test_a_job_that_cannot_start_names_the_cause(session, job, options, change, cause):
    session.configure(startup_timeout=3)
    job("bad", "-w", NODES[1], *options, change=change)
    session.fails("-k bad 1")
    assert re.search(cause, str(session.error)) and until(lambda: not jobs(), 2)


@in_queue
def test_the_end_of_a_session_takes_only_its_jobs_out_of_the_queue(session, job):
    session.ok("-k q=slurm-two x = 1")
    ours = jobs()
    check_the_end_of_a_session("slurm-one", "slurm-two")
    assert until(lambda: jobs() == ours, 2) and session.there("q", "x") == 1


@in_queue
def test_a_job_may_outlive_the_session(session, job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    subprocess.run(["sh", "-c", readme_block("sh", "sbatch").replace(
        "sbatch", f"sbatch -J {JOB} -w {NODES[1]}")], cwd=tmp_path, check=True)
    assert until((tmp_path / "q.json").exists)
    session.ok("-k q=~/q.json -o node node = os.environ['SLURMD_NODENAME']; x = 7")
    session.ok("-k q -s")
    assert session.there("q", "x") == 7 and session.q.node == NODES[1]


# ---- The documents --------------------------------------------------------

def test_the_help_and_the_readme_name_all_options():
    options = re.findall(r"(?m)^\| `-(\w)`, `--(\w+)", README)
    assert len(options) == 8
    for short, name in options:
        assert f"-{short}, --{name}" in rx.RemoteExecMagics.remote_exec.__doc__
        assert Inside.options_and_code(f"--{name} 1")[0].keys() == {short}


EXERCISED = {  # a test for each row of the README's tables, by what the row begins with
    "-[kps], --": "test_a_call_does_what_its_options_say",
    "-o, --output": "test_values_of_any_kind_arrive_equal_and_writable_and_stay_shared",
    "-i": "test_substitution_is_one_exact_pass",
    "-t|TimeoutError": "test_a_time_out_interrupts_only_who_is_late_and_tells_who_ignores_it",
    "-b": "test_a_background_call_returns_at_once_and_tells_since_when_it_runs",
    "-l": "test_the_list_shows_kernels_and_kernelspecs",
    "that of the": "test_an_error_is_the_far_tracebacks_in_their_order_without_our_frames",
    "DeadKernelError": "test_a_kernel_that_fails_takes_nothing_from_the_others",
    "LostReplyError": "test_a_reply_or_outputs_lost_with_the_connection_are_told",
    "ShutdownError": "test_a_kernel_whose_end_cannot_be_made_sure_is_told",
    "AbortedError": "test_what_anothers_failure_made_a_kernel_drop_is_told_and_ours_drops_nothing",
    "-[op](, -p)? of .*ssh|a cell over ssh": "test_bench_ssh",
    "-[op](, -p)? of": "test_bench_ipyparallel",
    "a cell that|200,000 lines": "test_bench_a_bare_client",
    "a cell on .* kernels|100 kernels": "test_bench_kernels_at_once",
    "CPU": "test_bench_cpu_while_nothing_happens"}


def test_each_row_of_the_readmes_tables_is_exercised():
    rows = re.findall(r"(?m)^\|(?!-| option | ename | what ) (.*?) \|", README)
    assert len(rows) > 30
    for row in rows:
        assert any(re.match(begin, row.replace("`", "")) for begin in EXERCISED), row
    assert set(EXERCISED.values()) <= set(globals())


def check_cells(text, **folders):
    """Run each Python block as a cell of a notebook. The block below it is what shows, lines of
    several kernels in any order. These folders take the place of those that the text names."""
    import nbclient
    import nbformat
    cells = re.findall(r"(?sm)^```python\n(.*?)^```\n(?:```\n(.*?)^```$)?", text)
    assert cells
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (
        "%colors nocolor",  # and this machine may have more kernelspecs:
        "get_ipython().config.KernelSpecManager.allowed_kernelspecs = {'far', 'python3'}",
        *(re.sub(r"~/(\w+)", lambda match: str(folders[match[1]]), code) for code, _ in cells))])
    nbclient.execute(notebook, str(HERE), kernel_name="python3", timeout=60, allow_errors=True)
    for (code, expected), cell in zip(cells, notebook.cells[2:]):
        shown = "\n".join(text for each in cell.outputs for text in (
            each.get("text", ""), *each.get("traceback", []),
            each.get("data", {}).get("text/plain", "")))
        lines, expected = shown.split("\n"), expected.split("\n")
        assert sorted(filter(str.strip, lines)) == sorted(filter(str.strip, expected)), code


@newest  # tracebacks and numbers looked different
def test_the_readme_shows_what_happens(tmp_path, spec):
    spec("far", *LAUNCH)
    (tmp_path / "a.txt").write_text("1 2\n3 4\n")
    (tmp_path / "b.txt").write_text("5 6\n7 8\n")
    check_cells(README, run7=tmp_path, scratch=tmp_path)


@over_ssh
def test_the_session_with_a_second_machine_works_as_it_stands(monkeypatch, tmp_path):
    config = re.sub(r"(?m)^ *(HostName|User) .*\n", "", readme_block("sshconfig", "Host far"))
    config += re.sub(r"(?m)^(host|control\w+) .*\n", "", subprocess.getoutput(f"ssh -G {SSH_HOST}"))
    (tmp_path / ".ssh").mkdir()  # (for sshpyk; ssh itself finds no ~ by HOME)
    (tmp_path / ".ssh" / "config").write_text(config.replace("~/.ssh", WORK.name))
    (tmp_path / "ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F {tmp_path}/.ssh/config \"$@\"\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.path.dirname(sys.executable)}", prepend=":")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    far = f"/tmp/{JOB}"
    commands = readme_block("sh", "sshpyk add").replace("/home/me/venv/bin/python", sys.executable)
    commands = commands.replace("~/run7", far).replace("~/scratch", str(tmp_path))
    section = README.partition("\n## A second machine\n")[2].partition("\n## ")[0]
    where = ("```python\n%remote_exec -k kernel1,kernel2 -- print('SSH_CONNECTION' in os.environ)\n"
             "```\n```\n[kernel1] True\n[kernel2] False\n```\n")
    try:
        subprocess.run(
            ["sh", "-ec", commands], check=True, env={**os.environ, "HOME": str(tmp_path)})
        check_cells(section + where, run7=far, scratch=tmp_path)
    finally:
        subprocess.run(f"ssh far rm -r {far}; ssh -q -O exit far", shell=True, timeout=20)


# ---- Figures --------------------------------------------------------------

def side_by_side(ours, theirs, times=15, release=lambda: None):
    """Return (seconds ours takes, how many times as fast as theirs): medians of pairs. What the
    last one made is released first: ipyparallel keeps it, in cycles, and would not pay for that."""
    seconds = {ours: [], theirs: []}
    for _ in range(times):
        for function in seconds:
            release()
            gc.collect()
            seconds[function].append(took(function))
    ratios = [other / mine for mine, other in zip(*seconds.values())]
    return statistics.median(seconds[ours]), statistics.median(ratios)


def figure(what, seconds, ratio=None, than="", megabytes=None):
    speed = f"{megabytes / seconds:5.0f} MB/s" if megabytes else f"{seconds * 1e3:5.1f} ms"
    print(f"\n{what:55} {speed:12}", f"{ratio:5.2f} {than}" if ratio else "", end="")


ARRAY = "import numpy as np; x = np.random.default_rng(0).random({} * 125_000)"
THINGS = {
    "10 MB": ARRAY.format(10), "100 MB": ARRAY.format(100), "400 MB": ARRAY.format(400),
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
        "x, axes = plt.subplots(); _ = axes.plot(range(10000)); plt.close()")}
CURVE = ["--IPController.enable_curve=True"]


@marked_bench
@pytest.mark.parametrize("how, config, arguments, things", [
    ("out of the box", {}, [], THINGS), ("nobody can listen in", {}, CURVE, ["100 MB"]),
    ("over TCP", {"transport": "tcp", "transport_encryption": "disabled"}, [], ["100 MB"]),
    ("over encrypted TCP", {"transport": "tcp"}, CURVE, ["100 MB"])])
def test_bench_ipyparallel(session, how, config, arguments, things):
    import ipyparallel
    session.configure(**config)
    session.ok("-k n=python3 1;")
    with ipyparallel.Cluster(n=1, log_level=40, controller_args=arguments) as client:
        client.wait_for_engines(1, timeout=60)
        view, than = client[0], "times ipyparallel's speed"

        def ours():
            session.ok("-k n -o x")
            read(session.n.x)

        def theirs():
            session.ns["pulled"] = view["x"]
            read(session.pulled)

        def release():
            vars(session.n).clear()
            session.ns["pulled"] = None
            client.purge_local_results("all")
        for what in things:
            size = int(what[:-3]) if what.endswith(" MB") else None
            read = np.sum if size else id  # all of it, once
            session.ok(f"-k n {THINGS[what]}")
            view.execute(THINGS[what], block=True)
            figure(f"-o of {what}, {how}", *side_by_side(ours, theirs, release=release), than, size)
            if size:
                session.ns["x"] = session.there("n", "x")
                figure(f"-p of {what}, {how}", *side_by_side(
                    lambda: session.ok("-k n -p x"),
                    lambda: view.push({"x": session.x}, block=True)), than, size)


@marked_bench
@pytest.mark.parametrize("what, ours, theirs, times", [
    ("a cell that returns one value", "-o x x = 1", "x = 1", 100),
    ("200,000 lines", *["for i in range(200000): print(i)"] * 2, 5),
    ("5,000 displays", *["for i in range(5000): display(i)"] * 2, 5)])
def test_bench_a_bare_client(session, what, ours, theirs, times):
    context = zmq.Context()
    context.rcvhwm = 0  # it loses nothing
    client = BlockingKernelClient(
        context=context, connection_file=str(session.connection_file("a")))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    iopub = client.iopub_channel.socket

    def release():
        while iopub.poll(0):
            iopub.recv_multipart()

    def bare():  # until the reply and all output
        msg_id = client.execute(theirs)
        idle = ours != theirs
        while not idle:
            message = client.session.recv(iopub, 0)[1]
            idle = message["parent_header"].get("msg_id") == msg_id and (
                message["content"].get("execution_state") == "idle")
        client.get_shell_msg(timeout=60)
    figure(what, *side_by_side(lambda: session.ok(f"-k a {ours}"), bare, times, release),
           "times as fast as a bare client")
    client.stop_channels()


@marked_bench
@pytest.mark.parametrize("many", [8, 20, 40, 100])
def test_bench_kernels_at_once(session, many):
    resource.setrlimit(resource.RLIMIT_NOFILE, (  # as is usual
        1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    session.ns["many"] = [f"n{i}=python3" for i in range(many)]
    figure(f"start {many} kernels", took(lambda: session.ok("-k {many}")))
    seconds, ratio = side_by_side(lambda: session.ok("-k {many} -o x x = 1"),
                                  lambda: session.ok("-k a -o x x = 1"), 20)
    figure(f"a cell on {many} kernels at once", seconds, 1 / ratio, "times one kernel's")
    figure(f"stop {many} kernels", took(lambda: session.ok("-k {many} -s")))


@marked_bench
def test_bench_cpu_while_nothing_happens(session, spec):
    spec("slow", "sh", "-c", f"sleep 5; exec {' '.join(LAUNCH)}")
    for what, wait in (("idle, of 5 s", lambda: time.sleep(5)),
                       ("a kernel that takes 5 s to launch", lambda: session.ok("-k slow 1;"))):
        figure(f"CPU while {what}", took(wait, time.process_time))


@over_ssh
@marked_bench
def test_bench_ssh(session, far_specs, tmp_path):
    session.ok("-k far=sshpyk-far -o x import numpy as np; "
               "x = np.frombuffer(os.urandom(100_000_000), 'u1').copy()")
    session.ns["y"] = session.far.x
    (tmp_path / "x").write_bytes(session.far.x)
    for line, *paths in (("-o x", f"{SSH_HOST}:{tmp_path}/x", f"{tmp_path}/y"),
                         ("-p y", f"{tmp_path}/x", f"{SSH_HOST}:{tmp_path}/y")):
        figure(f"{line[:2]} of 100 MB over ssh", *side_by_side(
            lambda: session.ok(f"-k far {line}"),
            lambda: subprocess.run(["scp", "-q", *paths], check=True), 5),
            "times as fast as scp", 100)
    seconds, ratio = side_by_side(lambda: session.ok("-k far -o y y = 1"),
                                  lambda: session.ok("-k a -o y y = 1"), 50)
    figure("a cell that returns one value over ssh", seconds, 1 / ratio, "times a local kernel's")
