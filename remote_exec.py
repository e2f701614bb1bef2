"""Run a line or a cell on one or many Jupyter kernels, and bring variables back.

A call (`Call.run`) gives jobs to its kernels (`Kernel.submit`), waits for them, and loads the
outputs (`Collector.collect`). Each kernel has two threads here: one runs its jobs (`Kernel`,
`Request`, `Connection`), the other an asyncio loop with the coroutines of `Process`. The user's
thread does the rest: it is the magic's caller, or the notebook's main thread between two cells.
"""
from __future__ import annotations

import asyncio
import atexit
import builtins
import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import getopt
import getpass
import inspect
import io
import json
import keyword
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import uuid
from typing import NamedTuple

import zmq.asyncio
from IPython import get_ipython
from IPython.core import magic, page
from IPython.core.error import UsageError
from IPython.display import display
from IPython.utils.path import filefind
from jupyter_client import AsyncKernelManager, KernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Float, config

__version__ = "4.0.0"
__all__ = ["Failure", "RemoteError", "RemoteExecMagics"]


# ---- errors ---------------------------------------------------------------

class Failure(NamedTuple):
    """What went wrong on one kernel (Jupyter messaging protocol, "Request-Reply")."""
    ename: str
    evalue: str
    traceback: list = []

    def __str__(self):
        return f"{self.ename}: {self.evalue}"


class KernelError(Exception):
    """What a job, or the loading of its outputs, failed with; its arguments make a `Failure`."""


def failure_of(error):
    """Return an exception as a `Failure`."""
    is_ours = type(error).__name__ == "KernelError"  # or the class from before a reload
    return Failure(*error.args) if is_ours else Failure(type(error).__name__, str(error))


class RemoteError(Exception):
    """What went wrong in a call: ``failures`` maps NAME to `Failure`, in the order of ``-k``."""

    def __init__(self, failures, labelled=False):
        super().__init__(failures, labelled)
        self.failures, self.labelled = failures, labelled

    def __str__(self):
        return "\n".join(f"{name}: {failure}" for name, failure in self.failures.items())

    def _render_traceback_(self):
        """Return the lines that IPython shows: the remote traceback, without local frames."""
        texts = []
        for name, failure in self.failures.items():
            is_named = any(failure.ename in line for line in failure.traceback)
            text = "\n".join(failure.traceback if is_named else [*failure.traceback, str(failure)])
            if str(getattr(get_ipython(), "colors", "")).lower() == "nocolor":
                text = re.sub(r"\x1b\[[\d;]*m", "", text)
            texts.append(encodable(label(name, text, self.labelled) + text, sys.stdout))
        return "\n\n".join(texts).split("\n")


def label(name, text, labelled):
    """Return the label to put before a text: on the same line, or above several lines."""
    return f"[{name}] " + ("\n" if "\n" in text else "") if labelled else ""


def encodable(text, file):
    """Return text with escapes for the characters that the encoding of a file lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ---- the remote side ------------------------------------------------------
# Sent to each Python kernel (3.6 or later) as module `_remote_exec`; some serve here, too.

class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """Find the modules of numpy 2 under the names that they have in numpy 1."""
        return super().find_class(module.replace("numpy._core", "numpy.core", 1), name)


def without_gc(function, *arguments, **options):
    """Call a function without garbage collection, which many new objects trigger for nothing."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        return function(*arguments, **options)
    finally:
        if enabled:
            gc.enable()


def dumps_with(pickler_class, value, protocol):
    """Pickle a value; return [stream, out-of-band buffer, ...] (PEP 574)."""
    chunks, buffers = [], []  # (pickle writes a large object as a chunk of its own)
    options = {} if protocol < 5 else {  # (true: small, stays in the stream; a frame costs more)
        "buffer_callback": lambda each: each.raw().nbytes < 65536 or buffers.append(each.raw())}
    pickler = pickler_class(types.SimpleNamespace(write=chunks.append), protocol, **options)
    without_gc(pickler.dump, value)
    if pickler_class is pickle.Pickler and any(
            b"__main__" in each for each in chunks if len(each) < 131072) and any(
            getattr(each, "__module__", None) == "__main__"
            for _, each in pickler.memo.copy().values()):
        # It wrote a name in __main__, which is another thing, or nothing, in another session.
        raise pickle.PicklingError("it needs what this session defines; install cloudpickle")
    return [b"".join(chunks)] + buffers


def dumps(value, protocol):
    """Pickle a value as above: with plain pickle, which is faster, else with cloudpickle."""
    try:
        import cloudpickle
    except ImportError:
        return dumps_with(pickle.Pickler, value, protocol)
    with contextlib.suppress(Exception):
        if not getattr(cloudpickle, "list_registry_pickle_by_value", list)():
            return dumps_with(pickle.Pickler, value, protocol)
    return dumps_with(cloudpickle.CloudPickler, value, protocol)


def loads(frames):
    """Unpickle what `dumps` returned; the buffers are used as they are, without a copy."""
    options = {"buffers": frames[1:]} if frames[1:] else {}
    with contextlib.suppress(ImportError):
        return without_gc(pickle.loads, frames[0], **options)
    return without_gc(Unpickler(io.BytesIO(frames[0]), **options).load)


def error_text(error):
    """Return the message of an error, also of one whose str() fails."""
    return "".join(traceback.format_exception_only(type(error), error)).partition(": ")[2].strip()


def prepare(directory, pushed):
    """Change the kernel's working directory, and take the variables that -p sends."""
    if directory:
        if not os.path.isdir(directory):
            directory = os.path.expandvars(os.path.expanduser(directory))
        os.chdir(directory)
    if pushed:
        get_ipython().user_ns.update(loads(get_ipython().get_parent()["buffers"]))


def publish(names, protocol, copy, together):
    """Send variables as buffers of one comm message: in one pickle, so that what they share stays
    shared, else (not ``together``) one each. ``copy`` them if another client may change them."""
    shell, parts, frames = get_ipython(), [], []
    kernel, namespace = shell.kernel, shell.user_ns
    defined = [name for name in names if name in namespace]
    failures = [["NameError", f"name {n!r} is not defined"] for n in names if n not in namespace]
    for group in [defined] if together else [[name] for name in defined]:
        try:
            pickled = dumps({name: namespace[name] for name in group}, protocol)
            frames += list(map(bytes, pickled)) if copy else pickled
            parts.append([group, len(pickled)])  # names, and how many of the frames are theirs
        except (Exception, SystemExit) as error:  # pickling may run any code
            if len(group) > 1:
                return publish(names, protocol, copy, together=False)
            failures.append([type(error).__name__, f"{group[0]}: {error_text(error)}"])
    content, parent = {"comm_id": "remote_exec", "data": [parts, failures]}, shell.get_parent()
    kernel.session.send(kernel.iopub_socket, "comm_msg", content, parent, buffers=frames)


def lift_output_limit(kernel):
    """Let ipykernel queue any number of messages, not just 1000, and reply without a pause."""
    thread = getattr(getattr(kernel, "iopub_socket", None), "io_thread", None)
    if thread is not None:
        thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0))
        kernel._execute_sleep = 0  # (that is for clients that don't wait for the idle status)


REMOTE_SOURCE = "\n".join([
    "import contextlib, gc, io, os, pickle, traceback, types\nfrom IPython import get_ipython",
    *map(inspect.getsource, [Unpickler, without_gc, dumps_with, dumps, loads, error_text, prepare,
                             publish, lift_output_limit]),
    "lift_output_limit(get_ipython().kernel)"])
# Makes the module; the user's namespace gets `os` and `pickle`, as promised, but nothing else.
SETUP_CODE = f"""import os, pickle
exec({REMOTE_SOURCE!a}, vars(__import__('sys').modules.setdefault(
    '_remote_exec', type(os)('_remote_exec'))))"""


# ---- the line -------------------------------------------------------------

def parse_line(line):
    """Return ({letter: argument}, code) of the magic's line; join lists of a repeated option."""
    words, options = line.split(), {}
    try:
        pairs, rest = getopt.getopt(words, "k:o:i:p:t:sbl", [
            "kernels=", "output=", "input=", "push=", "timeout=", "shutdown", "background", "list"])
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; `--` ends the options, %remote_exec? shows them all") from None
    for option, argument in pairs:
        letter = option.lstrip("-")[0]  # (each long option begins with its letter)
        options[letter] = f"{options[letter]},{argument}" if letter in options else argument
    return options, line.split(None, len(words) - len(rest))[-1] if rest else ""


normalize = functools.partial(unicodedata.normalize, "NFKC")  # as Python stores names (PEP 3131)


def variable_name(option, text, hint="separate names by commas, without blanks"):
    """Return the normalized name of a variable. Raises UsageError if it can't be one."""
    name = normalize(text)
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"-{option}: {text!r} is not a variable's name; {hint}")
    return name


def parse_targets(entries):
    """Return {NAME: (SPEC, DIRECTORY)}. Raises UsageError for a bad or repeated NAME."""
    targets = {}
    for entry in entries:
        head, _, directory = entry.partition(":")
        name, equals, spec = head.partition("=")
        name = variable_name("k", name, "write NAME[=SPEC][:DIRECTORY],... without blanks")
        if equals and not spec:
            raise UsageError(f"-k: no kernelspec after {head!r}")
        if name in targets:
            raise UsageError(f"-k: {name} is given twice; write {name}2={spec or 'SPEC'}")
        targets[name] = spec, directory
    return targets


def parse_seconds(text):
    """Return the seconds of a time-out. Raises UsageError unless they are positive and finite."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d\d?)?", text) or not float(text):
        raise UsageError(f"-t: {text!r} is not a positive number of seconds")
    return float(text)


def find_kernelspec(wanted, specs):
    """Return the one kernelspec that has the wanted name, else contains it, else its parts."""
    pattern = re.compile(".*".join(map(re.escape, wanted.split("_"))), re.IGNORECASE)
    found = ([spec for spec in specs if spec == wanted.lower()]
             or sorted(spec for spec in specs if wanted in spec)
             or sorted(spec for spec in specs if pattern.search(spec)))
    if len(found) == 1:
        return found[0]
    if not specs:
        raise UsageError("there are no kernelspecs here; `pip install ipykernel` brings python3")
    problem = "several kernelspecs match" if found else "no kernelspec matches"
    raise UsageError(f"{problem} {wanted!r}; take one of: {', '.join(found or sorted(specs))}")


def substitute(code, name, values):
    """Return the code for one kernel: each ``{variable}`` of ``values`` replaced, in one pass."""
    texts = {}
    for variable, value in values.items():
        try:
            texts[variable] = str(value[name] if isinstance(value, dict) else value)
        except Exception as error:
            raise UsageError(f"-i: {variable} has no value for {name}: {error!r}") from None
    return re.sub(r"\{([^{}]+)\}", lambda match: texts.get(normalize(match[1]), match[0]), code)


# ---- what the user sees and says ------------------------------------------

class Interrupts:
    """Count each Ctrl-C in the main thread; raise KeyboardInterrupt only when the block ends.

    The first has `Collector.wait` interrupt the kernels (`Kernel.check_interrupt` sends that), or,
    called with interrupt=False, wait no more. The second ends the waiting anyway: the kernels stay
    busy, and `Call.run` refuses them until they are done, or -s replaces them."""

    count = 0
    raises: str | None = None  # if set, raise each Ctrl-C at once, with this text

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.on_interrupt)

    def __exit__(self, exception_type, error, _):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.previous)
        if exception_type is KeyboardInterrupt or exception_type is None and self.count:
            final = KeyboardInterrupt(str(error or "too late, all was done"))
            final._render_traceback_ = lambda: [f"KeyboardInterrupt: {final}"]
            raise final from None

    def on_interrupt(self, signum, frame):
        self.count += 1
        if self.raises:
            raise KeyboardInterrupt(self.raises)

    @contextlib.contextmanager
    def raising(self, text):
        """Raise each Ctrl-C at once, with this text, as the user's own code may take any time."""
        try:
            self.raises = text
            yield
        finally:
            self.raises = None


def flush():
    sys.stdout.flush()
    sys.stderr.flush()


class Screen:
    """Shows what the kernels of one call publish, under its cell. Their threads fill a queue; the
    user's thread empties it while it waits, or a notebook's event loop between two cells."""

    def __init__(self, shell, labelled):
        self.shell, self.labelled = shell, labelled
        self.notebook = getattr(shell, "kernel", None)  # the ipykernel of this notebook
        self.context = contextvars.copy_context()  # where ipykernel keeps the parent cell
        self.queue: collections.deque = collections.deque()
        self.waiter: threading.Event | None = None  # set by new items, while a thread waits
        self.file = sys.stdout   # the one last written to
        self.partial_lines = {}  # those that have not ended, by (kernel, stream)
        self.status_display = None  # the status line: its display, or in a terminal its text

    def call_soon(self, function, *arguments):
        """Have a function called in the user's thread, in the context of the call's cell."""
        self.queue.append((function, arguments))
        self.schedule()

    def schedule(self):
        """Have the thread that waits, or else the notebook's event loop, show the queue."""
        waiter = self.waiter  # (which the user's thread may set to None at any time)
        if waiter:
            waiter.set()
        elif self.notebook:
            with contextlib.suppress(RuntimeError):  # its loop is closed, as the session ends
                self.notebook.io_loop.asyncio_loop.call_soon_threadsafe(self.process_queue)

    def process_queue(self):
        """Show at most 100 items of the queue, then let others run."""
        with contextlib.suppress(IndexError):  # the queue is empty
            for _ in range(100):
                function, arguments = self.queue.popleft()
                try:
                    self.context.copy().run(function, *arguments)
                except Exception as error:
                    print(f"remote_exec: an output can't be shown: {error!r}", file=sys.stderr)
        if self.queue:
            self.schedule()

    def move_to(self, screen):
        """Show all later output under the cell of another call, which waits for it."""
        self.context, self.labelled = screen.context, self.labelled or screen.labelled

    def write(self, file, text):
        if not self.notebook:
            self.show_status("")
        if file is not self.file:  # keeps stdout and stderr in order
            flush()
            self.file = file
        file.write(encodable(text, file))

    def show(self, name, kind, content):
        """Show an output of a kernel (protocol, "Messages on the IOPub channel") or a page."""
        if kind == "stream":
            self.show_stream(name, content["name"], content["text"])
        elif kind == "page" and not self.labelled:
            page.page(content["data"]["text/plain"])
        elif kind in ("display_data", "execute_result", "update_display_data", "page"):
            self.show_display(name, content, update=kind == "update_display_data")
        elif kind == "clear_output":
            self.partial_lines = {k: v for k, v in self.partial_lines.items() if k[0] != name}
            self.status_display = None
            self.shell.display_pub.clear_output(wait=bool(content.get("wait")))
        elif kind == "error":
            self.end_partial_lines(name)
            failure = Failure(content["ename"], content["evalue"], content["traceback"])
            lines = RemoteError({name: failure}, self.labelled)._render_traceback_()
            self.shell._showtraceback(type(failure.ename, (Exception,), {}), failure.evalue, lines)

    def show_stream(self, name, stream, text):
        """Write a kernel's text; with several kernels, in whole lines under their labels."""
        if self.labelled:
            text = self.partial_lines.pop((name, stream), "") + text.replace("\r\n", "\n")
            lines = re.findall(r"[^\r\n]*[\r\n]", text)  # a progress bar's line ends in a return
            self.partial_lines[name, stream] = text[sum(map(len, lines)):]
            text = "".join(f"[{name}] {line}" for line in lines if line != "\r")
        self.write(sys.stderr if stream == "stderr" else sys.stdout, text)

    def end_partial_lines(self, name):
        """End the unfinished lines of a kernel: what comes next does not belong to them."""
        for key, text in list(self.partial_lines.items()):
            if key[0] == name and text:
                self.show_stream(*key, "\n")
        self.write(sys.stdout, "")  # flushes the standard error, if that came last

    def show_display(self, name, content, update):
        data = dict(content["data"])
        if "text/plain" in data:
            data["text/plain"] = encodable(str(data["text/plain"]), sys.stdout)
        if not update:
            self.end_partial_lines(name)
            text = "\n" if self.notebook else data.get("text/plain", "\n")
            self.write(sys.stdout, label(name, text, self.labelled))
        transient = dict(content.get("transient") or {})
        if "display_id" in transient:  # two kernels may have chosen the same
            transient["display_id"] = f"{name} {transient['display_id']}"
        self.shell.display_pub.publish(data=data, metadata=content.get("metadata") or {},
                                       transient=transient, update=update)

    def show_status(self, text):
        """Show a status line, or replace its text; remove it if the text is empty."""
        data = {"text/plain": text}
        if self.notebook and self.status_display:
            self.status_display.update(data, raw=True)
        elif self.notebook and text:
            self.status_display = display(data, raw=True, display_id=True)
        elif (text or self.status_display) and sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.status_display = textwrap.shorten(text, width, placeholder=" ...")
            print(f"\r{self.status_display}\x1b[K", end="", file=sys.stderr, flush=True)
        if not text:
            self.status_display = None

    def ask(self, name, prompt, password):
        """Return the user's answer to a kernel's question (protocol, "stdin")."""
        self.end_partial_lines(name)
        flush()
        ask = getpass.getpass if password else input
        try:
            return ask(label(name, prompt, self.labelled) + prompt)
        except EOFError:
            return "\x04"  # an EOFError in the kernel


class Widgets:
    """Relays messages between each comm of a kernel and one here (protocol, "Custom Messages")."""

    def __init__(self, kernel):
        self.kernel, self.comms = kernel, {}
        self.active_outputs = []  # the `Output` widgets that capture, the latest last

    def show(self, screen, kind, content, metadata, buffers):
        """Show an output, or relay a comm message if there is a front end; in the user's thread."""
        if not kind.startswith("comm_"):
            self.capture(True)
            try:
                screen.show(self.kernel.name, kind, content)
            finally:
                self.capture(False)
        elif screen.notebook:
            self.relay(kind, content, metadata, buffers)

    def relay(self, kind, content, metadata, buffers):
        """Pass a comm message of the kernel on to the front end."""
        comm_id, data = content["comm_id"], content.get("data") or {}
        comm = self.comms.get(comm_id)
        if kind == "comm_open":
            with contextlib.suppress(ImportError):  # ipykernel before 6.18
                from comm import create_comm
                comm = self.comms[comm_id] = create_comm(
                    content["target_name"], data, metadata, buffers, comm_id=comm_id)
                comm.on_msg(functools.partial(self.send_to_kernel, "comm_msg"))
                comm.on_close(functools.partial(self.send_to_kernel, "comm_close"))
        elif kind == "comm_msg" and comm:
            if "msg_id" in (data.get("state") or {}):  # an `Output` begins or ends its capture
                self.active_outputs = [each for each in self.active_outputs if each is not comm]
                if data["state"].pop("msg_id"):
                    self.active_outputs.append(comm)
            comm.send(data, metadata, buffers)
        elif kind == "comm_close" and comm:
            self.comms.pop(comm_id).close(data, metadata, buffers)

    def capture(self, begins):
        """Begin or end the capture of one output, which an `Output` widget of the kernel captures;
        not for longer, since here the outputs of all kernels have the same parent."""
        if self.active_outputs:
            flush()
            parent = self.kernel.magics.shell.kernel.get_parent()["header"]["msg_id"]
            self.active_outputs[-1].send({"method": "update", "buffer_paths": [],
                                          "state": {"msg_id": parent if begins else ""}})

    def send_to_kernel(self, kind, message):
        """Send a front end's message on, in the main thread; wait for that, if it isn't busy."""
        kernel, is_busy = self.kernel, bool(self.kernel.jobs)
        if threading.current_thread() is not threading.main_thread():  # only that one gets Ctrl-C
            loop, done = kernel.screen.notebook.io_loop.asyncio_loop, concurrent.futures.Future()
            loop.call_soon_threadsafe(lambda: done.set_result(self.send_to_kernel(kind, message)))
            return done.result()
        if kernel.widgets is not self or not kernel.language:
            return None  # that kernel is gone
        screen = kernel.screen if is_busy else Screen(kernel.magics.shell, kernel.screen.labelled)
        job = kernel.submit(screen, kernel.call, kind, message["content"],
                            metadata=message["metadata"], buffers=message["buffers"])
        if not is_busy:
            collector = Collector(screen, [])  # (not to empty the screen of the kernel's run)
            with contextlib.suppress(KeyboardInterrupt), collector.interrupts:
                collector.wait({kernel: job})


# ---- a kernel's process ---------------------------------------------------

POLL_AFTER = 1         # seconds of silence until we ask whether the kernel lives
POLL_INTERVAL = 3      # seconds between two such questions
HEARTBEAT_TIMEOUT = 2  # seconds of silence before a ping; then seconds until its answer is missing
REPLY_TIMEOUT = 2      # seconds until an interrupt_request without reply becomes a signal
INTERRUPT_TIMEOUT = 5  # seconds that code has to end after its time-out's interrupt


def raise_open_files_limit():
    """Raise the soft limit towards the hard one: each kernel takes some 20 open files."""
    with contextlib.suppress(ImportError):  # Windows has no such limit
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit
        soft, hard = getrlimit(RLIMIT_NOFILE)
        if 0 <= soft < 65536:  # (a negative one is no limit)
            setrlimit(RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))


class Process:
    """A kernel's process, which a provisioner of jupyter_client launches, watches and ends; or one
    that we attached to, just a connection file. Written by the kernel's thread, and by `poll`."""

    def __init__(self, magics, run_in_loop, spec):
        """Begin the launch; `launched` is done when that is over. Raises what fails at once."""
        self.owns_kernel = not spec.endswith(".json")
        self.exit_reason: str | None = None  # set by `poll`; cleared by `Kernel.call` if not ours
        self.last_poll: float = 0.0  # when `poll` was last called
        runtime_dir = magics.runtime_dir()
        self.stderr = tempfile.TemporaryFile(dir=runtime_dir)  # (on our stderr it would show twice)
        if not self.owns_kernel:
            self.connection_file: str = spec
            self.launched = self.latest_poll = run_in_loop(asyncio.sleep(0))  # soon done
            return
        depth = int(os.environ.get("REMOTE_EXEC_DEPTH", 0)) + 1
        if depth > 2:
            raise RuntimeError("it may not start a third level of kernels; see the start-up files")
        found = magics.kernelspecs.get_kernel_spec(spec)
        self.connection_file = os.path.join(runtime_dir, f"kernel-{uuid.uuid4()}.json")
        self.manager = AsyncKernelManager(
            kernel_name=spec, kernel_spec_manager=magics.kernelspecs,
            config=magics.connection_config(found), connection_file=self.connection_file,
            context=zmq.asyncio.Context.shadow(magics.context.underlying),
            log=logging.Logger("remote_exec", logging.CRITICAL + 1))  # its errors are raised
        self.launched = self.latest_poll = run_in_loop(self.manager.start_kernel(
            stdout=subprocess.DEVNULL, stderr=self.stderr,
            env={**os.environ, "REMOTE_EXEC_DEPTH": str(depth)}))

    @property
    def has_exited(self):
        """Return whether a local process that we launched has ended; in any thread."""
        provisioner = self.manager.provisioner if self.owns_kernel else None
        process = getattr(provisioner, "process", None)
        return process is not None and process.poll() is not None

    async def poll(self, client):
        """Set `exit_reason` if the process has ended; runs in the thread of the asyncio loop."""
        if self.owns_kernel:
            code = await self.manager.provisioner.poll()  # some provisioners return it only once
            if code is not None:
                names = {-each: f"killed by {each.name}" for each in signal.Signals}
                reason = names.get(code, f"exit code {code}")  # a remote code may mean anything
                self.exit_reason = reason if self.has_exited else "its process is gone"
            return
        await asyncio.sleep(1.5)  # its owner may be restarting it
        try:
            _, writer = await (asyncio.open_unix_connection(f"{client.ip}-{client.shell_port}")
                               if client.transport == "ipc" else
                               asyncio.open_connection(client.ip, client.shell_port))
            writer.close()
        except (ConnectionRefusedError, FileNotFoundError):
            self.exit_reason = "nothing listens at its address"

    def last_stderr_lines(self):
        """Return the end of what our process wrote to its standard error, in brackets."""
        file = self.stderr.fileno()  # (a seek would move the place where the process writes)
        text = os.pread(file, 2000, max(0, os.fstat(file).st_size - 2000))
        lines = re.findall(r"\S(?:.*\S)?", text.decode("utf-8", "backslashreplace"))[-3:]
        return f" [{' | '.join(lines)}]" if lines else ""

    async def shutdown(self, requested, seconds):
        """End our process by SIGTERM (srun passes it on): at once, or if a shutdown was requested,
        after half of the seconds (None: `shutdown_wait_time`); by SIGKILL if that does not help."""
        await asyncio.wait([asyncio.wrap_future(self.launched)])
        try:
            if requested:
                await self.manager.provisioner.shutdown_requested()
            elif await self.manager.is_alive():
                await self.manager.provisioner.terminate()
            await self.manager.finish_shutdown(seconds, 0.05)
            if await self.manager.is_alive():
                raise TimeoutError("it could not be killed")
        finally:
            self.stderr.close()
            await self.manager.cleanup_resources()


class Connection:
    """The sockets to a kernel (protocol, "Introduction"). Written by the kernel's thread."""

    def __init__(self, context, wake_receiver):
        self.context: zmq.Context = zmq.Context.shadow(context.underlying)  # has its own options
        self.context.rcvhwm = self.context.sndhwm = 0  # drop nothing, never block
        self.wake_receiver: socket.socket = wake_receiver
        self.client: KernelClient | None = None   # made from the connection file
        self.address: dict = {}                   # what that file said
        self.sockets: dict[str, zmq.Socket] = {}  # by channel
        self.last_message = self.last_ping = 0.0  # (our requests count as messages, too)
        self.silent_since: str | None = None  # the time of day, while the heartbeat is missing
        self.disconnected: bool = False  # the shell socket lost its peer, and nobody asked since

    def connect_if_changed(self, path):
        """Connect if the connection file names a new address; return whether it does. (The same
        address is no reason to reconnect: an ipykernel may crash in ZMQ when a peer leaves.)"""
        try:
            with open(path, encoding="utf-8") as file:
                info = json.load(file)
        except (FileNotFoundError, ValueError):  # not there yet, or half written
            return False
        address = {key: info[key] for key in info if key.endswith(
            ("_port", "ip", "key", "transport", "signature_scheme"))}
        if address == self.address:
            return False
        self.close()
        self.address = address
        client = self.client = KernelClient(context=self.context, connection_file=path)
        client.load_connection_info(info)
        client.session.unpack = lambda part: {  # (parsing dates takes half the time of receiving)
            key: value for key, value in json.loads(part).items() if key != "date"}
        for channel in ("iopub", "shell", "control", "hb", "stdin"):
            self.context.immediate = channel == "stdin"  # is writable only once it is connected
            self.sockets[channel] = getattr(client, f"connect_{channel}")(client.session.bsession)
        self.sockets["hb"].req_relaxed = True  # the next ping may be sent without an answer
        self.sockets["monitor"] = self.sockets["shell"].get_monitor_socket(zmq.EVENT_DISCONNECTED)
        return True

    def close(self, linger=0):
        """Close the sockets; give them ``linger`` milliseconds to send what is queued."""
        if "monitor" in self.sockets:  # or ZMQ would wait until its last events are read
            self.sockets["shell"].disable_monitor()
        for each in self.sockets.values():
            each.close(linger=linger)
        self.sockets = {}

    def send(self, channel, kind, content, **more):
        """Send a message; return its id."""
        return self.client.session.send(self.sockets[channel], kind, content, **more)["msg_id"]

    def receive(self, seconds):
        """Wait for messages, at most so many seconds (None: no limit); yield (channel, message)."""
        poller = zmq.Poller()
        for each in (self.wake_receiver, *self.sockets.values()):
            poller.register(each, zmq.POLLIN)
        ready = dict(poller.poll(None if seconds is None else seconds * 1000))
        if self.wake_receiver.fileno() in ready:
            self.wake_receiver.recv(4096)
        for channel in [name for name, each in self.sockets.items() if each in ready]:
            if channel == "monitor":
                self.disconnected = True
            else:
                self.last_message = time.monotonic()
            with contextlib.suppress(Exception):  # a pong, an event, or not signed by this kernel
                message = self.client.session.recv(self.sockets[channel], copy=False)[1]
                if message:
                    yield channel, message

    def check_heartbeat(self):
        """Send a ping after a silence; set `silent_since`, to be shown, if no answer comes."""
        now = time.monotonic()
        is_silent = self.sockets and self.last_message < now - HEARTBEAT_TIMEOUT
        if is_silent and self.last_ping < self.last_message:
            self.sockets["hb"].send(b"ping")
            self.last_ping = now
        is_missing = is_silent and self.last_ping < now - HEARTBEAT_TIMEOUT
        since = time.localtime(time.time() - now + self.last_message)
        self.silent_since = time.strftime("%X", since) if is_missing else None


# ---- a kernel -------------------------------------------------------------

class Job(concurrent.futures.Future):
    """Work for a kernel's thread, its outcome, and the reason to interrupt it, if there is one."""

    def __init__(self, screen, function):
        super().__init__()
        self.screen, self.function = screen, function  # where its output shows, what it does
        self.interrupt_reason: Failure | None = None   # set by any thread, like the next line's
        self.interrupted_at, self.deadline, self.timeout_text = 0.0, float("inf"), ""
        self.names, self.since = [], ""  # of a background run: its outputs, its state for -l

    def finish(self, result, error):
        """Set the outcome, unless a time-out has; in the kernel's thread, or by `collect`."""
        self.function = None  # its arguments may be large
        if error and not self.done():
            self.set_exception(error)
        elif not self.done():
            self.set_result(result)

    def interrupt(self, ename, evalue):
        """From any thread: have the kernel's thread interrupt this job; the first reason counts."""
        if self.interrupt_reason is None:
            self.interrupted_at = time.monotonic()
            self.interrupt_reason = Failure(ename, evalue)

    def set_timeout(self, seconds, text=""):
        """Interrupt what it does if that has not ended within so many seconds from now."""
        self.timeout_text = text or f"still busy after {seconds:g} s; interrupted"
        self.deadline = time.monotonic() + seconds  # (last: who sees it passed uses the text)


class Request:
    """A request: `Kernel.call` sends it and feeds it messages (`handle_message`) until it has its
    reply (shell) and is idle (iopub), or a `check_...` ends it. Written by the kernel's thread."""

    def __init__(self, msg_id, has_reply=True):
        self.msg_id: str = msg_id
        self.busy_since: float | None = None
        self.is_idle: bool = False
        self.reply: dict | None = None if has_reply else {}  # its content
        self.outputs: tuple | None = None    # (parts, failures, buffers), see `publish`
        self.failure: Failure | None = None
        self.held: list = []                 # outputs since the latest error: (time, function, ...)
        self.held_ename: str | None = None   # of that error
        self.question: tuple | None = None   # (prompt, whether it asks for a password)
        self.answer: str | None = None       # set by the user's thread, cleared by the kernel's
        self.interrupt_sent: float | None = None
        self.interrupt_answered: bool = True  # or there is no reply to wait for
        self.probe_id: str = "none yet"      # of a later request: its reply shows ours was lost
        self.probe_sent: float = 0.0

    def fail(self, ename, evalue, traceback=()):
        self.failure = self.failure or Failure(str(ename) or "Error", str(evalue), list(traceback))

    def handle_message(self, channel, message):
        """Update this request from a message; return False if it may be an output."""
        kind, content = message["msg_type"], message["content"]
        parent_id = message["parent_header"].get("msg_id")
        is_ours, is_probe = parent_id == self.msg_id, parent_id == self.probe_id
        if kind == "interrupt_reply":
            self.interrupt_answered = True
        elif channel == "shell":
            if is_ours and self.reply is None:
                self.handle_reply(content)
            elif is_probe and self.reply is None:  # kernels answer in order: ours was lost
                self.reply = {}
                self.fail("LostReplyError", "the connection broke; request or reply was lost")
        elif kind == "status" and (is_ours or is_probe):
            self.busy_since = self.busy_since or time.monotonic()
            self.is_idle = content["execution_state"] == "idle"
        elif kind == "input_request" and is_ours:
            self.question = str(content["prompt"]), bool(content.get("password"))
        elif kind == "comm_msg" and content["comm_id"] == "remote_exec":
            if is_ours:
                self.outputs = *content["data"], message["buffers"]
        else:
            return False
        return True

    def handle_reply(self, content):
        """Store the reply; fail if the code did, or the expression that publishes the outputs."""
        self.reply = content
        for part in (content, (content.get("user_expressions") or {}).get("remote_exec") or {}):
            if part.get("status", "ok") != "ok":  # an "aborted" reply has no ename or evalue
                evalue = part.get("evalue", "nothing ran: another client's code failed before it")
                self.fail(part.get("ename", "AbortedError"), evalue, part.get("traceback") or [])


class Kernel:
    """What NAME stands for: a process somewhere, and a thread here that talks to it: it runs all
    methods but submit, wake, abandon_jobs, and writes the fields whose comment names no other."""

    def __init__(self, magics, name):
        raise_open_files_limit()
        self.magics, self.name, self.namespace = magics, name, KernelNamespace(self)
        self.spec: str = name  # also written by `find_kernel`, like the namespace
        self.lock = threading.RLock()  # held by a call or `finish_runs`, which write the next two
        self.background_run: Job | None = None  # until it is collected
        self.screen = Screen(magics.shell, labelled=False)  # of the latest call
        self.jobs: collections.deque[Job] = collections.deque()  # the first runs; any thread adds
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_sender.setblocking(False)
        self.thread = threading.Thread(target=self.run_jobs, daemon=True, name=name)
        self.loop: asyncio.AbstractEventLoop | None = None  # of its provisioner; set by `submit`
        self.ended: concurrent.futures.Future | None = None  # the latest end of its process
        self.reset()

    def reset(self):
        """Forget the process and all that is known of it."""
        self.process: Process | None = None
        self.connection = Connection(self.magics.context, self.wake_receiver)
        self.language: str | None = None     # once it has answered
        self.protocol: int | None = None     # of pickle, if it is a Python with IPython
        self.request: Request | None = None  # the one that it is busy with
        self.widgets: Widgets = Widgets(self)

    def submit(self, screen, function, *arguments, **options):
        """Return the job that calls one of the methods below in the kernel's thread."""
        if not self.thread.is_alive():  # (the loop is made here, where an error reaches the user)
            self.loop = loop = asyncio.new_event_loop()
            loop.set_exception_handler(lambda *_: None)  # of what is pending when it ends
            threading.Thread(target=lambda: (loop.run_forever(), loop.close()), daemon=True).start()
            self.thread.start()
        job = Job(screen, functools.partial(function, *arguments, **options))
        self.jobs.append(job)
        self.wake()
        return job

    def wake(self):
        with contextlib.suppress(OSError):  # it has been woken, or has ended
            self.wake_sender.send(b"x")

    def abandon_jobs(self):
        """Have all jobs fail at once, since the kernel is to be shut down."""
        for job in tuple(self.jobs):  # (also those that have another reason)
            job.interrupt_reason = Failure("ShutdownError", "the kernel was shut down")

    def run_in_loop(self, coroutine):
        """Run a coroutine in the loop of the provisioner; return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run_jobs(self):
        """Run one job after the other; between them, handle what the kernel sends."""
        while self.jobs or not self.magics.is_closed:
            if not self.jobs:
                self.receive(None)
                continue
            job = self.jobs[0]
            try:
                if job.interrupt_reason:
                    raise KernelError(*job.interrupt_reason)
                outcome = job.function(), None
            except BaseException as error:
                outcome = None, error
                if self.process and self.process.exit_reason and not job.interrupt_reason and (
                        self.request is None or self.request.reply != {}):  # (not of a widget)
                    self.end()
            self.jobs.popleft()
            job.finish(*outcome)
            job = outcome = None  # may be large
        self.wake_receiver.close()
        self.wake_sender.close()

    def start(self, spec, timeout):
        """Start or attach to a kernel, unless it already works. Raises KernelError."""
        if process := self.process:
            if not (process.has_exited or process.exit_reason or self.connection.disconnected):
                return
            try:
                self.execute("", *((prepare, "", False) if self.protocol else ()))  # only a test
                return
            except Exception:
                if not process.owns_kernel or not process.exit_reason:
                    raise
            self.notify(f"{self.name} had died ({process.exit_reason}) and is started anew")
            self.end()
        self.spec = spec
        self.jobs[0].set_timeout(timeout, f"not ready after {self.magics.startup_timeout:g} s "
                                          "(c.RemoteExecMagics.startup_timeout)")
        try:
            self.process = Process(self.magics, self.run_in_loop, spec)
            self.connect()
            self.set_up()
        except Exception as error:
            ename, evalue, _ = failure_of(error)
            if ename == "TimeoutError" and self.connection.client:
                evalue += f"; its connection file names {self.connection.client.ip}"
            if self.process:
                evalue = (self.process.exit_reason or evalue) + self.process.last_stderr_lines()
            self.end()
            text = "not started" if ename == "KeyboardInterrupt" else f"could not start: {evalue}"
            raise KernelError(ename, text) from None

    def connect(self):
        """Wait until the kernel answers (protocol, "Kernel info"). Until then, reread its
        connection file: a batch job may write there on which node it runs."""
        process, connection, request = self.process, self.connection, None
        while not (request and request.reply and connection.sockets["stdin"].poll(0, zmq.POLLOUT)):
            self.receive(0.05)
            self.check_interrupt(request)
            if process.launched.done():
                process.launched.result()
                if connection.connect_if_changed(process.connection_file):
                    request = self.send_request("kernel_info_request", {})
                self.check_alive()

    def set_up(self):
        """Install the remote module in a Python with IPython; other kernels just run code."""
        reply = self.call("kernel_info_request", {}).reply  # idle: iopub works, too
        info = dict(reply.get("language_info") or {})
        version = tuple(map(int, re.findall(r"\d+", str(info.get("version")))[:2]))
        self.language = str(info.get("name"))
        try:
            if self.language == "python" and version >= (3, 6):
                self.execute(SETUP_CODE)
                self.protocol = 5 if version >= (3, 8) else 4
        except KernelError as error:
            if error.args[0] not in ("ModuleNotFoundError", "ImportError", "AttributeError"):
                raise

    def run_code(self, code, names, together=True):
        """Execute code, and bring variables back; return (parts, failures, buffers), or None."""
        if not names:
            return self.execute(code, silent=False) if code.strip() else None
        outputs = self.execute(code, publish, names, self.protocol, not self.process.owns_kernel,
                               together, silent=not code.strip())
        if outputs is None:
            raise KernelError("LostReplyError", "the outputs were lost; fetch them without code")
        return outputs

    def end(self, seconds=None):
        """Disconnect, and shut the process down if it is ours; `ended` is the future of its end."""
        process, connection = self.process, self.connection
        if process is None and self.ended and not self.ended.done():
            return
        owns_kernel = process is not None and process.owns_kernel
        requested = owns_kernel and self.language and not (self.request or process.exit_reason)
        if requested:
            connection.send("control", "shutdown_request", {"restart": False})
        connection.close(linger=200)
        self.reset()
        self.ended = self.run_in_loop(
            process.shutdown(requested, seconds) if owns_kernel else asyncio.sleep(0))
        self.magics.ends.append(self.ended)

    def receive(self, seconds):
        """Wait at most so many seconds for messages, and handle them."""
        try:
            for channel, message in self.connection.receive(seconds):
                self.handle_message(channel, message)
        except Exception as error:  # a malformed message is a failure of the request
            if self.request:
                self.request.fail("ProtocolError", f"malformed message: {error!r}")

    def handle_message(self, channel, message):
        """Handle a message: give it to the current request, or show it as an output."""
        kind, content, request = message["msg_type"], message["content"], self.request
        parent = message["parent_header"]
        if kind == "input_request":  # what was printed before may come later, on iopub
            deadline = time.monotonic() + 1
            while time.monotonic() < min(deadline, self.connection.last_message + 0.05):
                self.receive(0.05)
        if request and request.handle_message(channel, message):
            return
        if channel != "iopub" or parent.get("session") != self.connection.client.session.session:
            return  # no output, or another client's
        is_ours = bool(request and self.jobs) and request.msg_id == parent.get("msg_id")
        screen = self.jobs[0].screen if is_ours else self.screen
        item = self.widgets.show, screen, kind, content, message["metadata"], message["buffers"]
        if is_ours and (kind == "error" or request.held):
            if kind == "error":
                self.show_held(request)
                request.held_ename = content["ename"]
            request.held.append((time.monotonic(), *item))
        else:
            screen.call_soon(*item)

    def show_held(self, request):
        """Show an error that was not the end of the code, and what came after it."""
        for _, *item in request.held:
            self.jobs[0].screen.call_soon(*item)
        request.held, request.held_ename = [], None

    def notify(self, text):
        self.jobs[0].screen.call_soon(self.jobs[0].screen.write, sys.stderr, text + "\n")

    def send_request(self, kind, content, **more):
        """Send a request on the shell channel, and make it the current one."""
        msg_id = self.connection.send("shell", kind, content, **more)
        self.request = Request(msg_id, has_reply=not kind.startswith("comm_"))
        self.connection.last_message = time.monotonic()
        return self.request

    def call(self, kind, content, **more):
        """Send a request; return it once replied and idle. Raises KernelError if it failed."""
        screen, connection = self.jobs[0].screen, self.connection
        request = self.send_request(kind, content, **more)
        if not self.process.owns_kernel:
            self.process.exit_reason = None  # its owner may have started it again
        try:
            # (the interrupt's reply, too, or the interrupt might hit the next request)
            while request.reply is None or not (request.is_idle and request.interrupt_answered):
                self.receive(0.1)
                if request.answer is not None and connection.sockets["stdin"].poll(0, zmq.POLLOUT):
                    connection.send("stdin", "input_reply", {"value": request.answer})
                    request.question = request.answer = None
                self.check_interrupt(request)
                self.check_alive()
                self.check_lost(request)
                if request.held and time.monotonic() - request.held[0][0] > 1:
                    self.show_held(request)  # the code goes on
            self.request = None
        finally:
            if request.failure and request.failure.ename == request.held_ename:
                del request.held[0]  # that error is raised
            self.show_held(request)
            screen.call_soon(screen.end_partial_lines, self.name)
        for payload in request.reply.get("payload") or []:
            if payload.get("source") == "page":
                screen.call_soon(screen.show, self.name, "page", payload)
        failure, reason = request.failure, self.jobs[0].interrupt_reason
        if request.interrupt_sent and (
                reason.ename == "TimeoutError" or failure and failure.ename in (
                    "KeyboardInterrupt", "CancelledError", "LostReplyError", "AbortedError")):
            failure = reason._replace(traceback=failure.traceback if failure else [])
        if failure:
            raise KernelError(*failure)
        return request

    def execute(self, code, function=None, *arguments, silent=True, **more):
        """Execute code, then a call of the remote side; return outputs (protocol, "Execute")."""
        call = f"__import__('_remote_exec').{function.__name__}{arguments!r}" if function else ""
        try:
            return self.call("execute_request", {
                "code": code, "silent": silent, "store_history": not silent,
                "user_expressions": {"remote_exec": call} if call else {}, "stop_on_error": False,
                "allow_stdin": getattr(self.jobs[0].screen.notebook, "_allow_stdin", True),
            }, **more).outputs
        except KernelError as error:
            if function is None or error.args[1] != "No module named '_remote_exec'":
                raise
        self.notify(f"{self.name} was restarted, or lost its modules; it is set up again")
        self.execute(SETUP_CODE)
        return self.execute("", function, *arguments, **more)  # the code has run

    def check_interrupt(self, request):
        """Interrupt the code, once begun or after POLL_AFTER (ours): an earlier interrupt would be
        lost, or hit another client's code. Send a signal if no reply comes (ipykernel 5)."""
        now, job, owns_kernel = time.monotonic(), self.jobs[0], self.process.owns_kernel
        if now > job.deadline and not (self.language and request.reply):
            job.interrupt("TimeoutError", job.timeout_text)
        reason = job.interrupt_reason
        if reason is None:
            return
        ename, evalue, _ = reason
        if self.language is None or ename == "ShutdownError":  # (`connect` may have no request)
            raise KernelError(ename, evalue)
        waited = now - job.interrupted_at
        request.question = None
        if request.interrupt_sent is None:
            has_begun = request.busy_since and now - request.busy_since > 0.05
            if has_begun or owns_kernel and waited > POLL_AFTER:  # (its status may be lost)
                self.connection.send("control", "interrupt_request", {})
                request.interrupt_sent, request.interrupt_answered = now, False
        elif not request.interrupt_answered and now - request.interrupt_sent > REPLY_TIMEOUT:
            request.interrupt_answered = True
            if owns_kernel:
                self.run_in_loop(self.process.manager.signal_kernel(signal.SIGINT))
        if ename == "TimeoutError" and waited > INTERRUPT_TIMEOUT:
            cause = "ignores the interrupt; -s replaces it" if request.interrupt_sent else (
                "another client's code goes first")
            job.finish(None, KernelError(ename, f"{evalue}, but {cause}"))  # and stays busy

    def check_alive(self):
        """Raise KernelError if the kernel died; in each round of `call`, `connect` (idle: `start`).
        `Process.poll` (in the loop) asks the provisioner or port, after a silence or local exit."""
        process, connection, now = self.process, self.connection, time.monotonic()
        connection.check_heartbeat()
        is_silent = now - connection.last_message > POLL_AFTER or connection.disconnected
        if process.exit_reason is None and process.latest_poll.done() and (
                process.has_exited or is_silent and now - process.last_poll > POLL_INTERVAL):
            process.last_poll = now
            process.latest_poll = self.run_in_loop(process.poll(connection.client))
        if process.exit_reason and now - connection.last_message > 0.2:  # all messages have come
            hint = "the next cell that names it starts it anew" if process.owns_kernel else (
                "it was not started here")
            text = f"the kernel died ({process.exit_reason}); {hint}{process.last_stderr_lines()}"
            raise KernelError("DeadKernelError", text)

    def check_lost(self, request):
        """Send a second request if the reply or the idle status may be lost: its reply proves it.
        It also wakes an ipykernel whose interrupted `await` would not notice."""
        now, connection = time.monotonic(), self.connection
        is_half = (request.reply is not None) != request.is_idle
        is_stopping = request.interrupt_sent is not None and not request.is_idle
        is_due = (is_half or is_stopping) and now - connection.last_message > 0.3
        if (is_due or connection.disconnected) and now - request.probe_sent > POLL_INTERVAL:
            request.probe_id = connection.send("shell", "kernel_info_request", {})
            request.probe_sent, connection.disconnected = now, False


class KernelNamespace:
    """What came back from one kernel: its attributes are the variables."""

    __slots__ = ("__dict__", "__weakref__", "__kernel")  # (mangled: variables may have any name)

    def __init__(self, kernel):
        self.__kernel = kernel

    def __getattr__(self, name):
        kernel, run = self.__kernel, self.__kernel.background_run
        if run and name in run.names and os.getpid() == kernel.magics.pid and not any(
                frame.f_globals.get("__name__") == "IPython.core.completer"
                or frame.f_code.co_name == "object_inspect_mime"  # Tab and tooltips don't wait
                for frame, _ in traceback.walk_stack(None)):
            Collector(Screen(kernel.magics.shell, labelled=False), [kernel]).finish_runs()
            return getattr(self, name)
        raise AttributeError(f"nothing named {name!r} has come back from {kernel.name}")

    def __repr__(self):
        kernel, run = self.__kernel, self.__kernel.background_run
        state = f", {run.since}" if run and not run.done() else ""
        names = ", ".join(dir(self)) or "no variables yet"
        return f"<kernel {kernel.name} ({kernel.spec}){state}: {names}>"

    def __dir__(self):
        return sorted(vars(self))

    def __reduce__(self):
        return types.SimpleNamespace, (), vars(self)


# ---- a call ---------------------------------------------------------------

class Collector:
    """Waits for kernels in the user's thread, and loads the outputs that they send."""

    def __init__(self, screen, kernels):
        self.screen, self.kernels, self.interrupts = screen, kernels, Interrupts()

    def wait(self, jobs, doing="waiting for", interrupt=True):
        """Wait for jobs; meanwhile show what their kernels publish, and ask what they ask. Handle
        Ctrl-C as `Interrupts` says; if not ``interrupt``, raise the first one instead."""
        begin = last_status = time.monotonic()
        news = threading.Event()
        screens = {self.screen, *(kernel.screen for kernel in self.kernels)}  # with late output
        for screen in screens:
            screen.waiter = news
        for job in jobs.values():
            job.add_done_callback(lambda _: news.set())
        try:
            while True:
                # (first the jobs: a job is done after its outputs are queued)
                waiting = [kernel for kernel, job in jobs.items() if not job.done()]
                for screen in screens:
                    screen.process_queue()
                if self.interrupts.count and waiting and not interrupt:
                    raise KeyboardInterrupt(f"{short_list(waiting)} not waited for")
                if self.interrupts.count:  # (a widget's job may be ahead of ours)
                    for job in [job for kernel in waiting for job in tuple(kernel.jobs)]:
                        job.interrupt("KeyboardInterrupt", "stopped")
                if self.interrupts.count > 1:
                    break
                if any(screen.queue for screen in screens):
                    continue
                if not waiting:
                    break
                for kernel in waiting:
                    self.answer_question(kernel)
                if time.monotonic() - last_status > 1:
                    last_status = time.monotonic()
                    self.show_status(waiting, doing, last_status - begin)
                news.wait(0.1)
                news.clear()
        finally:
            for screen in screens:
                screen.waiter = None
                if screen.queue:
                    screen.schedule()
            self.screen.show_status("")
            flush()

    def answer_question(self, kernel):
        """Ask the user for the input that a kernel requests, if any. (`wait` handles a Ctrl-C.)"""
        request = kernel.request
        question = request and request.answer is None and request.question  # (in this order)
        if question and not self.interrupts.count:
            with contextlib.suppress(KeyboardInterrupt), self.interrupts.raising("asked"):
                request.answer = self.screen.ask(kernel.name, *question)
            kernel.wake()

    def show_status(self, waiting, doing, seconds):
        """Show after 3 s which kernels are waited for, which are ready, and which don't answer."""
        flush()
        silent = [f"; {kernel.name} has not answered since {since}" for kernel in waiting
                  if (since := kernel.connection.silent_since)]
        if seconds > 3 and (len(self.kernels) > 1 or silent or not waiting[0].language):
            ready = short_list(kernel for kernel in self.kernels if kernel not in waiting)
            text = f"{doing} {short_list(waiting)} ({seconds:.0f} s)" + "".join(silent[:3])
            self.screen.show_status(text + (f"; ready: {ready}" if ready else ""))

    def collect(self, jobs, doing="waiting for", interrupt=True, keep_failures=False):
        """Wait for jobs, load their outputs. Raises RemoteError, or, after Ctrl-C, shows it."""
        self.wait(jobs, doing, interrupt)
        failures, stopped = {}, {}
        for kernel, job in jobs.items():
            is_run = kernel.background_run is job
            if is_run:  # (or loading what reads these attributes would wait for the run)
                kernel.background_run = None
            try:
                if not job.done():
                    raise KernelError("KeyboardInterrupt", "still busy, -s replaces it")
                if job.result():
                    self.load(kernel, *job.result())
            except (Exception, KeyboardInterrupt) as error:
                failure = failure_of(error)
                if doing == "stopping":
                    failure = Failure("ShutdownError", f"may still run: {failure}")
                if self.interrupts.count and failure.ename == "KeyboardInterrupt":
                    stopped.setdefault(failure.evalue, []).append(kernel.name)
                else:
                    failures[kernel.name] = failure
                if is_run and isinstance(error, KeyboardInterrupt) and self.interrupts.count:
                    kernel.background_run = job  # what was not loaded can be collected again
                elif is_run and keep_failures:
                    kernel.background_run = Job(self.screen, None)
                    kernel.background_run.names = job.names
                    kernel.background_run.finish(None, KernelError(*failure))
        error = RemoteError(failures, self.screen.labelled)
        if failures and not self.interrupts.count:
            raise error
        if failures:
            self.screen.write(sys.stderr, "\n".join([*error._render_traceback_(), ""]))
        if self.interrupts.count:
            texts = [f"{', '.join(names)} {what}" for what, names in stopped.items()]
            raise KeyboardInterrupt("; ".join(texts) or "no kernel stopped")

    def load(self, kernel, parts, failures, buffers):
        """Load outputs into a namespace: together, or else fetched anew and loaded each alone.
        Raises KernelError for those that did not come or can't be loaded; the others are there."""
        for names, count in parts:
            pickled, buffers = buffers[:count], buffers[count:]
            try:
                with self.interrupts.raising("not loaded here"):
                    values = loads(pickled)
                vars(kernel.namespace).update(values)
            except (Exception, SystemExit) as error:  # unpickling may run any code
                if len(names) > 1:
                    job = kernel.submit(self.screen, kernel.run_code, "", names, together=False)
                    self.wait({kernel: job})
                    if self.interrupts.count:
                        raise KeyboardInterrupt("not loaded here") from None
                    parts, more, buffers = job.result()
                    return self.load(kernel, parts, failures + more, buffers)
                text = f"{names[0]} can't be loaded: {error_text(error)}"
                text += "".join(f"; {library} {sys.modules[library].__version__} here"
                                for library in ("numpy", "pandas")  # theirs may be newer
                                if library in text and library in sys.modules)
                failures = [*failures, [type(error).__name__, text]]
        if failures:
            (ename, evalue), *rest = failures
            raise KernelError(ename, "; ".join([evalue, *map(": ".join, rest)]))

    def lock_kernels(self, stack, restart=False):
        """Lock the kernels, as soon as no other thread's call uses them; -s ends such a call."""
        for kernel in sorted(self.kernels, key=lambda kernel: kernel.name):  # prevents a deadlock
            while not kernel.lock.acquire(timeout=0.1):
                if restart:
                    kernel.abandon_jobs()
                if self.interrupts.count:
                    raise KeyboardInterrupt(f"{kernel.name} is used by another thread")
            stack.callback(kernel.lock.release)

    def finish_runs(self, keep_failures=False):
        """Wait for the background runs, and load their outputs. Ctrl-C only ends the waiting."""
        runs = {each: run for each in self.kernels if (run := each.background_run)}
        with self.interrupts, contextlib.ExitStack() as stack:
            for kernel in runs:
                kernel.screen.move_to(self.screen)
            self.wait(runs, interrupt=False)  # without the locks: a call may end the runs
            self.lock_kernels(stack)
            self.collect({each: run for each, run in runs.items() if each.background_run is run},
                         keep_failures=keep_failures)

    def finish_between_cells(self, kernel, run):
        """Load the outputs of a background run, unless a call does; show its failure, and keep it:
        the next call that names the kernel raises it again."""
        if self.screen.waiter or kernel.background_run is not run:
            return
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self.finish_runs(keep_failures=True)
        except RemoteError as error:
            self.screen.shell.showtraceback((RemoteError, error, None))


class Call(Collector):
    """One call of the magic: what its line asks for; `run` has its phases in their order."""

    def __init__(self, magics, options, code, local_ns):
        """Check the options. Raises UsageError before anything is done."""
        self.magics = magics
        self.locals = collections.ChainMap(local_ns, magics.shell.user_ns)
        self.restart, self.background = "s" in options, "b" in options
        self.shutdown_only = self.restart and not code.strip()
        targets = parse_targets(self.target_entries(options.get("k")))
        self.outputs, inputs, pushes = (
            list(dict.fromkeys(variable_name(option, name) for name in options[option].split(",")))
            if option in options else [] for option in "oip")
        self.timeout = parse_seconds(options["t"]) if "t" in options else float("inf")
        if self.shutdown_only and (self.outputs or pushes):
            raise UsageError("-s leaves no kernel for -o or -p, unless there is code to run")
        if self.background and ("t" in options or not code.strip()):
            raise UsageError("-b needs code, and no -t; a later call without code can wait with -t")
        values = {name: self.local_value("i", name) for name in inputs}
        self.pushed = {name: self.local_value("p", name) for name in pushes}
        self.plans: dict[Kernel, tuple[str, str, str]] = {}  # (spec, directory, code)
        for name, (spec, directory) in targets.items():
            kernel = magics.find_kernel(name, spec)
            spec = "" if self.shutdown_only else magics.find_spec(kernel, spec, self.restart)
            self.plans[kernel] = spec, directory, substitute(code, name, values)
        super().__init__(Screen(magics.shell, labelled=len(targets) > 1), list(self.plans))

    def target_entries(self, text):
        """Return the entries of -k, or of the local variable that it names in braces."""
        if not text:
            raise UsageError("-k NAME[=SPEC][:DIRECTORY],... is missing; see %remote_exec?")
        value = self.local_value("k", text[1:-1]) if re.fullmatch(r"\{\w+\}", text) else text
        if isinstance(value, str):
            return re.split(r"\s*,\s*|\s+", value.strip())
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
            return value
        raise UsageError(f"-k {text}: {type(value).__name__} is not a string or a list of strings")

    def local_value(self, option, name):
        """Return the value of a local variable: the caller's, else the user's."""
        if normalize(name) not in self.locals:
            raise UsageError(f"-{option}: there is no local variable {name!r}")
        return self.locals[normalize(name)]

    def run(self):
        """Go through all phases. Raises UsageError, RemoteError, KeyboardInterrupt."""
        kernels, screen, plans = self.kernels, self.screen, self.plans
        with self.interrupts, contextlib.ExitStack() as stack:
            pushed = self.pickle(self.pushed, 5)
            self.lock_kernels(stack, self.restart)
            if self.restart:
                for kernel in kernels:
                    kernel.background_run = None
                    kernel.abandon_jobs()
                self.collect({kernel: kernel.submit(screen, kernel.end) for kernel in kernels},
                             "stopping", interrupt=False)
                self.collect({each: each.ended for each in kernels}, "stopping", interrupt=False)
            else:
                runs = {each: each.background_run for each in kernels if each.background_run}
                for kernel, run in runs.items():
                    kernel.screen.move_to(screen)
                    run.set_timeout(self.timeout)
                left = [job for each in kernels for job in tuple(each.jobs) if job.interrupt_reason]
                concurrent.futures.wait(left, timeout=1)  # of an earlier call, which waits no more
                self.collect(runs)  # shows what those print, too
                for each in kernels:
                    is_left = any(job.interrupt_reason for job in tuple(each.jobs))
                    if is_left and not getattr(each.process, "has_exited", False):
                        raise UsageError(f"{each.name} is still busy; wait, or replace it with -s")
            for kernel in kernels:  # (each background run has a screen of its own, for `move_to`)
                kernel.screen = Screen(screen.shell, screen.labelled) if self.background else screen
            if self.shutdown_only:
                return
            timeout = self.magics.startup_timeout + (len(kernels) - 1) / 2  # they share processors
            self.collect({kernel: kernel.submit(screen, kernel.start, spec, timeout)
                          for kernel, (spec, _, _) in plans.items()}, "starting")
            self.magics.shell.user_ns.update({each.name: each.namespace for each in kernels})
            self.refuse_other_languages()
            self.collect({
                kernel: kernel.submit(
                    screen, kernel.execute, "", prepare, directory, bool(pushed),
                    buffers=pushed if kernel.protocol == 5 else self.pickle(self.pushed, 4))
                for kernel, (_, directory, _) in plans.items() if directory or pushed}, "preparing")
            pushed = None  # may be large
            jobs = {kernel: kernel.submit(kernel.screen, kernel.run_code, code, self.outputs)
                    for kernel, (_, _, code) in plans.items()}
            if self.background:
                return self.leave_in_background(jobs)
            for job in jobs.values():
                job.set_timeout(self.timeout)
            self.collect(jobs)

    def pickle(self, values, protocol):
        """Pickle variables. Raises UsageError that names the first that can't be pickled."""
        try:
            with self.interrupts.raising("nothing ran"):
                return dumps(values, protocol) if values else []
        except (Exception, SystemExit) as error:  # pickling may run any code
            for name in values if len(values) > 1 else ():
                self.pickle({name: values[name]}, protocol)
            text = " ".join(error_text(error).split())
            raise UsageError(f"-p: can't pickle {', '.join(values)}: {text}") from None

    def refuse_other_languages(self):
        """Raise UsageError if a kernel can't do what the options ask for."""
        for kernel, (_, directory, _) in self.plans.items():
            if kernel.protocol is None and (self.outputs or self.pushed or directory):
                raise UsageError(f"{kernel.name} runs {kernel.language}: -o, -p and :DIRECTORY "
                                 "need Python 3.6 or later with IPython")

    def leave_in_background(self, jobs):
        """Leave the jobs to run; in a notebook, load their outputs as soon as they are done."""
        for kernel, job in jobs.items():
            for name in self.outputs:
                vars(kernel.namespace).pop(name, None)  # reading it waits
            job.names, job.since = self.outputs, time.strftime("running since %X")
            kernel.background_run = job
            if self.screen.notebook:
                finish = Collector(kernel.screen, [kernel]).finish_between_cells
                job.add_done_callback(functools.partial(kernel.screen.call_soon, finish, kernel))


def short_list(kernels):
    """Return the names of kernels, as many as fit into a line."""
    return textwrap.shorten(", ".join(kernel.name for kernel in kernels), 40, placeholder=" ...")


# ---- the magic ------------------------------------------------------------

@magic.magics_class
class RemoteExecMagics(magic.Magics):
    """The magic ``%remote_exec``, and the kernels that it started."""

    startup_timeout = Float(60, help="Seconds that a kernel may take to start.").tag(config=True)

    def __init__(self, shell, **options):
        super().__init__(shell, **options)
        self.kernels: dict[str, Kernel] = {}  # by NAME; also those that were shut down
        self.ends: list = []     # futures of processes that have ended, or are to
        parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
        self.session_dir = f"{parent}/rexec-{os.getpid()}-{uuid.uuid4().hex[:12]}"  # short: unix(7)
        self.context = zmq.Context(io_threads=2)
        self.context.max_sockets = self.context.get(zmq.SOCKET_LIMIT)
        self.pid, self.is_closed = os.getpid(), False

    @magic.no_var_expand
    @magic.needs_local_scope
    @magic.line_cell_magic
    def remote_exec(self, line, cell=None, local_ns=None):
        """Run code on one or many Jupyter kernels, and bring variables back::

            In [1]: filenames = {"far": "a.txt", "near": "b.txt"}
            In [2]: %%remote_exec -k far:/data,near=python3:/tmp -i filenames -o x,y
               ...: import numpy as np
               ...: x, y = np.loadtxt("{filenames}").T
            In [3]: plt.plot(far.x, far.y); plt.plot(near.x, near.y)
            In [4]: %remote_exec -k far -p threshold -o above -- above = x > threshold
            In [5]: %remote_exec -k far,near -s

        Kernels start when first named, run at the same time, and keep their state. What
        follows the options (-- ends them) is code, taken verbatim, ahead of the cell.

        -k, --kernels NAME[=SPEC][:DIRECTORY],...
            NAME becomes a variable; what comes back is its attributes. SPEC picks the
            kernelspec (a part is enough, _ means anything), or is the connection file
            (.json) of a running kernel; the default is what NAME had last, else NAME.
            DIRECTORY is its working directory. `-k {names}` takes a string or a list.
        -o, --output NAMES     Variables to bring back; needs no code.
        -i, --input NAMES      Local variables to put into the code where {variable}
                               stands, as str(); dicts are looked up by kernel NAME.
        -p, --push NAMES       Local variables to send as objects, before the code runs.
        -s, --shutdown         Shut the kernels down; with code, restart them first.
        -t, --timeout SECONDS  Interrupt the kernels that are busy for longer.
        -b, --background       Return when the code is on its way. Reading what it
                               brings waits, as does the next call on that kernel.
        -l, --list             List the kernels that run, and all kernelspecs.

        Ctrl-C interrupts the kernels; a second one gives the prompt back. What goes
        wrong on a kernel is a `RemoteError`, whose ``failures`` maps NAME to (ename,
        evalue, traceback); your own mistakes are a `UsageError`, before any code runs.
        """
        if self.is_closed or os.getpid() != self.pid:
            raise UsageError("the kernels are gone, or another process's; %reload_ext remote_exec")
        options, code = parse_line(line)
        code = "\n".join(part for part in (code, cell) if part)
        if "l" not in options:
            Call(self, options, code, local_ns or {}).run()
        elif code.strip():
            raise UsageError("-l runs no code")
        else:
            print("\n".join(self.listing()))

    def listing(self):
        """Yield the lines of -l."""
        running = [(each, each.process) for each in list(self.kernels.values()) if each.process]
        yield "running kernels:" if running else "running kernels:\n  none"
        for kernel, process in running:
            run, is_dead = kernel.background_run, process.has_exited or process.exit_reason
            state = run.since if run and not run.done() else "busy" if kernel.jobs else "idle"
            yield f"  {kernel.name}  {kernel.spec}  {'dead' if is_dead else state}"
        yield "\n  ".join(["kernelspecs:", *sorted(self.kernelspecs.find_kernel_specs())])

    @property
    def kernelspecs(self):
        return KernelSpecManager(config=self.shell.config)

    def find_kernel(self, name, spec):
        """Return the kernel that NAME stands for. Raises UsageError if it means something else."""
        kernel = self.kernels.get(name) or Kernel(self, name)
        value = self.shell.user_ns.get(name, getattr(builtins, name, kernel.namespace))
        ours = value._KernelNamespace__kernel if type(value).__name__ == "KernelNamespace" else None
        if ours is None or ours.name != name:
            raise UsageError(f"{name} is something else here; try my_{name}={spec or kernel.spec}")
        kernel = self.kernels.setdefault(name, kernel)  # another thread may have been first
        if ours.magics is not self:  # from before this module was reloaded
            kernel.namespace, kernel.spec = value, ours.spec
            value._KernelNamespace__kernel = kernel
        return kernel

    def find_spec(self, kernel, spec, replace):
        """Return the kernelspec or connection file that SPEC means. Raises UsageError."""
        wanted = spec or kernel.spec
        if kernel.process and wanted == kernel.spec:
            return kernel.spec
        if wanted.endswith(".json"):
            try:
                found = filefind(os.path.expanduser(wanted), [".", jupyter_runtime_dir()])
            except OSError:
                raise UsageError(f"-k: there is no connection file {wanted!r}") from None
        else:
            found = find_kernelspec(wanted, list(self.kernelspecs.find_kernel_specs()))
        if kernel.process and found != kernel.spec and not replace:
            raise UsageError(f"{kernel.name} runs {kernel.spec}; -s replaces it by {found}")
        return found

    def runtime_dir(self):
        """Return Jupyter's runtime directory, or the session's if that is not writable."""
        for path in (self.session_dir, jupyter_runtime_dir()):
            with contextlib.suppress(OSError):
                os.makedirs(path, mode=0o700, exist_ok=True)
        return path if os.access(path, os.W_OK) else self.session_dir

    def connection_config(self, kernelspec):
        """Return how a kernel is reached: local ipykernels over Unix sockets, where only the user
        can enter; others over TCP, encrypted where they can. The user's settings come first."""
        ours, users = {}, self.shell.config.get("KernelManager", {})
        is_local_ipykernel = "kernel_provisioner" not in kernelspec.metadata and (
            kernelspec.argv[1:3] in (["-m", "ipykernel_launcher"], ["-m", "ipykernel"]))
        if is_local_ipykernel and zmq.has("ipc") and not {"transport", "ip"} & set(users):
            ours = {"transport": "ipc", "ip": f"{self.session_dir}/{uuid.uuid4().hex[:8]}"}
        elif zmq.has("curve"):
            ours = {"transport_encryption": "auto"}  # ignored by older versions of jupyter_client
        return config.Config(self.shell.config, KernelManager={**ours, **users})

    def close(self):
        """Shut all kernels down, as the session ends; a front end grants a notebook some 2.5 s."""
        if os.getpid() != self.pid:
            return  # a forked child: the kernels are its parent's
        wait_time = AsyncKernelManager(config=self.shell.config).shutdown_wait_time
        limit, seconds = (2, 1.2) if hasattr(self.shell, "kernel") else (wait_time + 3, None)
        deadline = time.monotonic() + limit
        with contextlib.suppress(KeyboardInterrupt), Interrupts():
            kernels = [each for each in list(self.kernels.values()) if each.thread.is_alive()]
            for kernel in kernels:
                kernel.abandon_jobs()
                kernel.submit(kernel.screen, kernel.end, seconds)
            self.is_closed = True  # each thread ends after that job
            for kernel in kernels:
                kernel.wake()
                kernel.thread.join(max(0, deadline - time.monotonic()))
            ends = concurrent.futures.wait(self.ends, max(0, deadline - time.monotonic()))
            shutil.rmtree(self.session_dir, ignore_errors=True)
            if not ends.not_done:
                if kernels:  # (in a thread, as this would wait for ever for a socket left open)
                    kernels[0].loop.call_soon_threadsafe(self.context.term)
                for kernel in kernels:
                    kernel.loop.call_soon_threadsafe(kernel.loop.stop)


def load_ipython_extension(ipython):
    """Register the magic; its kernels end with the session."""
    magics = RemoteExecMagics(ipython)
    ipython.register_magics(magics)
    atexit.register(magics.close)
    lift_output_limit(getattr(ipython, "kernel", None))


def unload_ipython_extension(ipython):
    """Shut the kernels down, and take the magic away."""
    magics = ipython.magics_manager.registry.pop("RemoteExecMagics")
    for kind in ipython.magics_manager.magics.values():
        kind.pop("remote_exec", None)
    atexit.unregister(magics.close)
    magics.close()
