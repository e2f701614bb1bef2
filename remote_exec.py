"""Run a line or a cell on one or many Jupyter kernels, and bring variables back::

    In [1]: %load_ext remote_exec
    In [2]: %remote_exec -k kernel1=python3,kernel2=python3 -o x import os; x = os.getpid()
    In [3]: kernel1.x != kernel2.x
    Out[3]: True

Each kernel has a thread here, which starts it, talks to it and stops it in plain blocking code.
What the user sees and says goes through the thread that called the magic.
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
from IPython.core import page
from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics, line_cell_magic, magics_class, needs_local_scope, no_var_expand)
from IPython.display import display
from IPython.utils.path import filefind
from jupyter_client import AsyncKernelManager, KernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Float
from traitlets.config import Config

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
    """Raised in a kernel's thread to end its job; its arguments make a `Failure`."""


def failure_of(error):
    """Return an exception as a `Failure`."""
    is_ours = type(error).__name__ == "KernelError"  # maybe that of before a reload
    return Failure(*error.args) if is_ours else Failure(type(error).__name__, str(error))


class RemoteError(Exception):
    """What went wrong on the kernels of a call: ``failures`` maps the NAME of each that failed to
    its `Failure`, in the order of ``-k``."""

    def __init__(self, failures, labelled=False):
        super().__init__(failures, labelled)
        self.failures, self.labelled = failures, labelled

    def __str__(self):
        return "\n".join(f"{name}: {failure}" for name, failure in self.failures.items())

    def _render_traceback_(self):
        """Return the lines that IPython shows: the remote traceback, without local frames."""
        texts = []
        for name, failure in self.failures.items():
            text = "\n".join(failure.traceback)
            if failure.ename not in text:
                text = "\n".join([*failure.traceback, str(failure)])
            if str(getattr(get_ipython(), "colors", "")).lower() == "nocolor":
                text = re.sub(r"\x1b\[[\d;]*m", "", text)
            texts.append(encodable(label(name, text, self.labelled) + text, sys.stdout))
        return "\n\n".join(texts).split("\n")


def label(name, text, labelled):
    """Return the label of a kernel, ahead of a text: in its line, or above its lines."""
    return f"[{name}] " + ("\n" if "\n" in text else "") if labelled else ""


def encodable(text, file):
    """Return text with escapes for the characters that the encoding of a file lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ---- the remote side ------------------------------------------------------
# The source of these is sent to every Python kernel, 3.6 or later, as the module `_remote_exec`.
# What pickles and unpickles is used on this side, too.

class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """Find the modules of numpy 2 under the names that they have in numpy 1."""
        return super().find_class(module.replace("numpy._core", "numpy.core", 1), name)


def without_gc(function, *arguments, **options):
    """Call a function while the garbage collector, which many new containers start, is off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return function(*arguments, **options)
    finally:
        if enabled:
            gc.enable()


def dumps(value, protocol):
    """Pickle a value; return [stream, out-of-band buffer, ...] (PEP 574)."""
    try:
        from cloudpickle import CloudPickler as Pickler
    except ImportError:
        Pickler = pickle.Pickler
    stream, buffers = io.BytesIO(), []
    options = {} if protocol < 5 else {  # (copying a small one costs less than a message frame)
        "buffer_callback": lambda each: each.raw().nbytes < 65536 or buffers.append(each.raw())}
    pickler = Pickler(stream, protocol, **options)
    without_gc(pickler.dump, value)
    if Pickler is pickle.Pickler and b"__main__" in stream.getvalue() and any(
            getattr(each, "__module__", None) == "__main__"
            for _, each in pickler.memo.copy().values()):
        # It wrote a reference, which means nothing, or something else, in another session.
        raise pickle.PicklingError(
            "it needs what the session defines; install cloudpickle to send that, too")
    return [stream.getvalue()] + buffers


def loads(frames):
    """Unpickle what `dumps` returned; the buffers are used as they are, without a copy."""
    options = {"buffers": frames[1:]} if frames[1:] else {}
    try:
        return without_gc(pickle.loads, frames[0], **options)
    except ImportError:
        pass  # (in an expression, IPython 7 can't show an error that another one led to)
    return without_gc(Unpickler(io.BytesIO(frames[0]), **options).load)


def error_text(error):
    """Return the message of an error, also of one whose str() fails."""
    text = "".join(traceback.format_exception_only(type(error), error))
    return text.partition(": ")[2].strip()


def prepare(directory, pushed):
    """Change directory, and take the pushed variables from the buffers of the request."""
    if directory:
        if not os.path.isdir(directory):
            directory = os.path.expandvars(os.path.expanduser(directory))
        os.chdir(directory)
    if pushed:
        get_ipython().user_ns.update(loads(get_ipython().get_parent()["buffers"]))


@functools.lru_cache(maxsize=None)
def output_comm():
    """Return the comm whose messages carry the outputs; it is never opened."""
    try:
        from comm import create_comm
    except ImportError:  # ipykernel before 6.18
        from ipykernel.comm import Comm as create_comm
    return create_comm(target_name="remote_exec", primary=False)


def publish(names, protocol, copy, together):
    """Send variables as the buffers of one comm message: as one pickle, so that what they share
    stays shared; where that fails, or not ``together``, each goes alone. ``copy``: another client
    may change them before they are sent."""
    namespace, parts, frames = get_ipython().user_ns, [], []
    there = [name for name in names if name in namespace]
    failures = [["NameError", "name '%s' is not defined" % name]
                for name in names if name not in there]
    for group in [there] if together else [[name] for name in there]:
        try:
            pickled = dumps({name: namespace[name] for name in group}, protocol)
            frames.extend(map(bytes, pickled) if copy else pickled)
            parts.append([group, len(pickled)])
        except (Exception, SystemExit) as error:  # pickling may run any code
            if len(group) > 1:
                return publish(names, protocol, copy, together=False)
            failures.append([type(error).__name__, "%s: %s" % (group[0], error_text(error))])
    output_comm().send({"remote_exec": [parts, failures]}, buffers=frames)


def lift_output_limit(kernel):
    """Let ipykernel queue any number of messages; by default it drops those past 1000."""
    thread = getattr(getattr(kernel, "iopub_socket", None), "io_thread", None)
    if thread is not None:
        thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0))
        kernel._execute_sleep = 0  # a pause for clients that don't wait for the idle status


REMOTE_SOURCE = "\n".join([
    "import functools, gc, io, os, pickle, traceback",
    "from IPython import get_ipython",
    *map(inspect.getsource, [Unpickler, without_gc, dumps, loads, error_text, prepare, output_comm,
                             publish, lift_output_limit]),
    "lift_output_limit(get_ipython().kernel)"])
# Makes the module, and adds `os` and `pickle` to the user's namespace, but nothing else.
SETUP_CODE = (
    "import os, pickle\n"
    f"exec(compile({ascii(REMOTE_SOURCE)}, '<remote_exec>', 'exec'), "
    "__import__('sys').modules.setdefault('_remote_exec', "
    "__import__('types').ModuleType('_remote_exec')).__dict__)")


# ---- the line -------------------------------------------------------------

def parse_line(line):
    """Return ({letter: argument}, code) of the magic's line; lists that are given twice add up."""
    words, options = line.split(), {}
    try:
        pairs, rest = getopt.getopt(words, "k:o:i:p:t:sbl", [
            "kernels=", "output=", "input=", "push=", "timeout=", "shutdown", "background", "list"])
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; `--` ends the options, %remote_exec? shows them all") from None
    for option, argument in pairs:
        letter = option.lstrip("-")[0]
        options[letter] = f"{options[letter]},{argument}" if letter in options else argument
    return options, line.split(None, len(words) - len(rest))[-1] if rest else ""


# Gives a name the form in which Python knows it (Language Reference, 2.3).
normalize = functools.partial(unicodedata.normalize, "NFKC")


def variable_name(option, text, hint="separate names by commas, without blanks"):
    """Return the name of a variable. Raises UsageError if none may have it."""
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
            raise UsageError(f"-k: {name} is there twice; write {name}2={spec or 'SPEC'}")
        targets[name] = spec, directory
    return targets


def parse_seconds(text):
    """Return the seconds of a time-out. Raises UsageError unless they are positive and finite."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d\d?)?", text) or not float(text):
        raise UsageError(f"-t: {text!r} is not a positive number of seconds")
    return float(text)


def find_kernelspec(wanted, specs):
    """Return the kernelspec that a user means: the exact name, else the only one that contains
    it, else the only one that matches, ignoring case, with ``_`` for anything."""
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
            raise UsageError(f"-i: {variable} has no text for {name}: {error!r}") from None
    return re.sub(r"\{([^{}]+)\}", lambda match: texts.get(normalize(match[1]), match[0]), code)


# ---- what the user sees and says ------------------------------------------

class Interrupts:
    """Counts Ctrl-C (SIGINT) while it is entered, in the main thread, and raises it at the end."""

    count, raises = 0, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.on_interrupt)

    def __exit__(self, exception_type, error, _):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.previous)
        if exception_type is KeyboardInterrupt or exception_type is None and self.count:
            final = KeyboardInterrupt(str(error or "all was done"))
            final._render_traceback_ = lambda: [f"KeyboardInterrupt: {final}"]
            raise final from None

    def on_interrupt(self, signum, frame):
        self.count += 1
        if self.raises:
            raise KeyboardInterrupt("nothing ran")

    @contextlib.contextmanager
    def raising(self):
        """Also raise KeyboardInterrupt meanwhile, since a user's object may take any time."""
        try:
            self.raises = True
            yield
        finally:
            self.raises = False


class Screen:
    """Shows what the kernels of one call publish, under its cell. Their threads fill a queue; the
    user's thread empties it while it waits, or a notebook's event loop between two cells."""

    def __init__(self, shell, labelled):
        self.shell, self.labelled = shell, labelled
        self.notebook = getattr(shell, "kernel", None)  # the ipykernel of this notebook
        self.context = contextvars.copy_context()  # ipykernel keeps there which cell it is
        self.queue: collections.deque = collections.deque()
        self.waiter: threading.Event | None = None  # of who waits, set by new items
        self.file = sys.stdout   # the latest that was written to
        self.partial_lines = {}  # text without the end of its line, by (kernel, stream)
        self.status_display = None  # the status line, while there is one

    def call_soon(self, function, *arguments):
        """Have a function called in the user's thread, in the context of the call's cell."""
        self.queue.append((function, arguments))
        self.schedule()

    def schedule(self):
        """Wake the waiting thread, or else the notebook's event loop, to show the queue."""
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
        """From now on, show where the output of another call belongs, which waits for it."""
        self.context, self.labelled = screen.context, self.labelled or screen.labelled

    def flush(self):
        with contextlib.suppress(ValueError):  # the file has been closed
            self.file.flush()

    def write(self, file, text):
        if not self.notebook:
            self.show_status("")
        if file is not self.file:  # keeps stdout and stderr in order
            self.flush()
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
            self.partial_lines.clear()
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
        self.write(sys.stdout, "")

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
        """Show one line, which is updated in place; without text, take it away."""
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
        self.flush()
        ask = getpass.getpass if password else input
        try:
            return ask(label(name, prompt, self.labelled) + prompt)
        except EOFError:
            return "\x04"  # an EOFError over there


class Widgets:
    """The comms of a kernel's widgets, each with one here (protocol, "Custom Messages")."""

    def __init__(self, kernel):
        self.kernel, self.comms = kernel, {}
        self.active_outputs = []  # the `Output` widgets that capture, the latest last

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
            if "msg_id" in (data.get("state") or {}):
                self.active_outputs = [each for each in self.active_outputs if each is not comm]
                if data["state"].pop("msg_id"):
                    self.active_outputs.append(comm)
            comm.send(data, metadata, buffers)
        elif kind == "comm_close" and comm:
            self.comms.pop(comm_id).close(data, metadata, buffers)

    def capture(self, begins):
        """Begin or end to capture here what an `Output` widget captures over there. Only while one
        output shows: here, the outputs of all kernels have the same parent."""
        if self.active_outputs:
            sys.stdout.flush()
            sys.stderr.flush()
            parent = self.kernel.magics.shell.kernel.get_parent()["header"]["msg_id"]
            self.active_outputs[-1].send({"method": "update", "buffer_paths": [],
                                          "state": {"msg_id": parent if begins else ""}})

    def send_to_kernel(self, kind, message):
        """Pass a message of the front end on to the kernel. A subshell of the notebook has the main
        thread do that, where Ctrl-C comes."""
        screen, done = Screen(self.kernel.magics.shell, labelled=False), threading.Event()
        if threading.current_thread() is threading.main_thread():
            self.send(screen, done, kind, message)
            return
        screen.call_soon(self.send, screen, done, kind, message)
        while screen.notebook.io_loop.asyncio_loop.is_running() and not done.wait(0.1):
            pass

    def send(self, screen, done, kind, message):
        """Wait until the kernel has dealt with it, as a local widget would, unless it is busy."""
        kernel, is_busy = self.kernel, self.kernel.is_busy
        if kernel.widgets is self and kernel.language:  # else that kernel is gone
            collector = Collector(screen, [kernel])
            job = kernel.submit(kernel.screen if is_busy else screen, kernel.call, kind,
                                message["content"], metadata=message["metadata"],
                                buffers=message["buffers"])
            with contextlib.suppress(KeyboardInterrupt), collector.interrupts:
                collector.wait({} if is_busy else {kernel: job})
        done.set()


# ---- a kernel's process ---------------------------------------------------

POLL_AFTER = 1         # seconds without a message after which we ask whether the kernel lives
POLL_INTERVAL = 3      # seconds between two such questions
HEARTBEAT_TIMEOUT = 2  # seconds of silence before we ask for its heartbeat, and before we miss it
INTERRUPT_REPLY_TIMEOUT = 2  # seconds until an interrupt_request without reply becomes a signal
INTERRUPT_TIMEOUT = 5        # seconds that code has to end after its time-out's interrupt
NO_LOG = logging.Logger("remote_exec", logging.CRITICAL + 1)


def raise_open_files_limit():
    """Raise the soft limit towards the hard one: each kernel takes some 15 open files."""
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if 0 <= soft < wanted:  # (a negative one is no limit)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Process:
    """A kernel's process, which a provisioner of jupyter_client launches, watches and ends; or one
    that was attached to, of which just the connection file is known. Written by its thread."""

    def __init__(self, magics, name, spec):
        """Raises what launching raises; `launched` is the future of the rest of it."""
        self.ends: set = magics.ends
        self.owns_kernel = not spec.endswith(".json")
        self.exit_reason: str | None = None  # how the kernel ended, once that is known
        self.exit_poll: concurrent.futures.Future | None = None  # asks for that
        self.last_poll = 0.0
        raise_open_files_limit()
        if not self.owns_kernel:
            self.connection_file, self.loop = spec, magics.loop("")
            self.launched = self.run(asyncio.sleep(0))
            return
        depth = int(os.environ.get("REMOTE_EXEC_DEPTH", 0)) + 1
        if depth > 2:
            raise RuntimeError("a kernel that a kernel started may not start kernels: does a "
                               "start-up file or a line of ipython_config.py start them?")
        found, runtime_dir = magics.kernelspecs.get_kernel_spec(spec), magics.runtime_dir()
        # A provisioner that is not jupyter_client's own may block its loop, so it gets one.
        self.loop = magics.loop(name if "kernel_provisioner" in found.metadata else "")
        self.connection_file = os.path.join(runtime_dir, f"kernel-{uuid.uuid4()}.json")
        self.manager = AsyncKernelManager(
            kernel_name=spec, kernel_spec_manager=magics.kernelspecs, log=NO_LOG,
            config=magics.connection_config(found), connection_file=self.connection_file,
            context=zmq.asyncio.Context.shadow(magics.context.underlying))
        # Not our own standard error, where what the process writes would show a second time.
        self.stderr = tempfile.TemporaryFile(dir=runtime_dir)
        self.launched = self.run(self.manager.start_kernel(
            stdout=subprocess.DEVNULL, stderr=self.stderr,
            env={**os.environ, "REMOTE_EXEC_DEPTH": str(depth)}))

    def run(self, coroutine):
        """Run a coroutine in the loop of the provisioner; return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    @property
    def has_exited(self):
        """Whether a local process of ours has ended."""
        provisioner = self.manager.provisioner if self.owns_kernel else None
        process = getattr(provisioner, "process", None)
        return process is not None and process.poll() is not None

    def find_exit_reason(self, connection):
        """Return how the kernel ended, or None if it is not known to have. The loop asks, only
        after a silence: that may take long while the network is away."""
        now = time.monotonic()
        is_silent = now - connection.last_message > POLL_AFTER or connection.disconnected
        if self.exit_poll is None and (
                self.has_exited or is_silent and now - self.last_poll > POLL_INTERVAL):
            self.last_poll = now
            self.exit_poll = self.run(self.poll(connection.client))
        if self.exit_poll and self.exit_poll.done():
            if not self.exit_poll.exception():  # some provisioners tell it only once
                self.exit_reason = self.exit_reason or self.exit_poll.result()
            self.exit_poll = None
        return self.exit_reason

    async def poll(self, client):
        if self.owns_kernel:
            code = await self.manager.provisioner.poll()
            if code is None or not self.has_exited:  # a remote one's code has no defined meaning
                return None if code is None else "its process is gone"
            names = {-each: f"killed by {each.name}" for each in signal.Signals}
            return names.get(code, f"exit code {code}")
        for _ in range(3):  # its owner may be restarting it
            try:
                _, writer = await (
                    asyncio.open_unix_connection(f"{client.ip}-{client.shell_port}")
                    if client.transport == "ipc" else
                    asyncio.open_connection(client.ip, client.shell_port))
                return writer.close()
            except (ConnectionRefusedError, FileNotFoundError):
                await asyncio.sleep(0.5)
        return "nothing listens at its address"

    def last_stderr_lines(self):
        """Return the end of what our process wrote to its standard error, in brackets."""
        if not self.owns_kernel:
            return ""
        file = self.stderr.fileno()  # (a seek would move the place where the process writes)
        text = os.pread(file, 2000, max(0, os.fstat(file).st_size - 2000))
        lines = re.findall(r"\S(?:.*\S)?", text.decode("utf-8", "backslashreplace"))[-3:]
        return f" [{' | '.join(lines)}]" if lines else ""

    def shutdown(self, requested, seconds):
        """Have our process end; return the future of that. After half of the seconds (None: its
        `shutdown_wait_time`) it gets SIGTERM, in the end SIGKILL. One that could not be requested
        to shut down gets SIGTERM at once, with which srun takes its job along."""
        async def finish():
            await asyncio.gather(asyncio.wrap_future(self.launched), return_exceptions=True)
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

        ended = self.run(finish())
        self.ends.add(ended)
        ended.add_done_callback(self.ends.discard)
        return ended


class Connection:
    """The sockets to a kernel (protocol, "Introduction"). Written by the kernel's thread."""

    def __init__(self, context, wake_receiver):
        self.context = zmq.Context.shadow(context.underlying)  # has socket options of its own
        self.context.rcvhwm = self.context.sndhwm = 0  # drop nothing, never block
        self.wake_receiver: socket.socket = wake_receiver
        self.client: KernelClient | None = None   # knows what the connection file says
        self.address: dict = {}                   # the part of it that counts
        self.sockets: dict[str, zmq.Socket] = {}  # by channel
        self.poller = zmq.Poller()
        self.poller.register(wake_receiver, zmq.POLLIN)
        self.last_message = self.last_ping = 0.0
        self.silent_since: str | None = None  # the time of day, while the heartbeat is missing
        self.disconnected = False             # since the kernel was last seen to work

    def connect_if_changed(self, path):
        """Connect, if the connection file names another address; return if so. (An ipykernel may
        crash in ZMQ when a peer leaves, so a file that says the same is no reason to reconnect.)"""
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
        self.client = KernelClient(context=self.context, connection_file=path)
        self.client.load_connection_info(info)
        # (without the date: parsing that takes half the time of receiving a message)
        self.client.session.unpack = lambda part: {
            key: value for key, value in json.loads(part).items() if key != "date"}
        for channel in ("iopub", "shell", "control", "hb", "stdin"):
            self.context.immediate = channel == "stdin"  # is writable only once it is connected
            connect = getattr(self.client, f"connect_{channel}")
            self.sockets[channel] = connect(self.client.session.bsession)
        self.sockets["hb"].req_relaxed = True  # the next ping may be sent without an answer
        self.sockets["monitor"] = self.sockets["shell"].get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for each in self.sockets.values():
            self.poller.register(each, zmq.POLLIN)
        return True

    def close(self, linger=0):
        """Close the sockets, which have so many milliseconds to send what was given to them."""
        if "monitor" in self.sockets:
            self.sockets["shell"].disable_monitor()
        for each in self.sockets.values():
            if each in self.poller:
                self.poller.unregister(each)
            each.close(linger=linger)
        self.sockets = {}

    def send(self, channel, kind, content, **more):
        """Send a message; return its id."""
        message = self.client.session.send(self.sockets[channel], kind, content, **more)
        return message["header"]["msg_id"]

    @property
    def is_stdin_connected(self):
        return self.sockets["stdin"].poll(0, zmq.POLLOUT) > 0

    def receive(self, seconds):
        """Yield (channel, message) of what comes within so many seconds (None: no limit)."""
        ready = dict(self.poller.poll(None if seconds is None else seconds * 1000))
        if self.wake_receiver.fileno() in ready:
            self.wake_receiver.recv(4096)
        for channel, each in list(self.sockets.items()):
            for _ in range(100 if each in ready else 0):  # then others have their turn
                if each.closed or not each.get(zmq.EVENTS) & zmq.POLLIN:
                    break
                if channel == "monitor":
                    self.disconnected = True
                else:
                    self.last_message = time.monotonic()
                try:
                    message = self.client.session.recv(each, copy=False)[1]
                except Exception:  # an event, a heartbeat, or not signed by this kernel
                    continue
                yield channel, message

    def check_heartbeat(self):
        """Ask for the heartbeat after a silence, and note since when it is missing."""
        now, self.silent_since = time.monotonic(), None
        if self.last_message > now - HEARTBEAT_TIMEOUT or not self.sockets:
            return
        if self.last_ping < self.last_message:
            self.sockets["hb"].send(b"ping")
            self.last_ping = now
        elif self.last_ping < now - HEARTBEAT_TIMEOUT:
            since = time.localtime(time.time() - now + self.last_message)
            self.silent_since = time.strftime("%X", since)


# ---- a kernel -------------------------------------------------------------

class Job(concurrent.futures.Future):
    """Something that a kernel's thread does, and why it should stop doing it."""

    def __init__(self, screen, function):
        super().__init__()
        self.screen, self.function = screen, function  # where its output shows, what it does
        self.interrupt_reason: Failure | None = None   # written by any thread, see `interrupt`
        self.deadline, self.timeout_text = float("inf"), ""  # see `set_timeout`
        self.is_awaited = False          # this and the rest: written by the user's thread
        self.names, self.since = [], ""  # in the background: what it is to bring, since when
        self.has_failed = False          # there, as was shown

    @property
    def state(self):
        """What to tell of a run in the background."""
        return "failed" if self.has_failed else "ended" if self.done() else self.since

    def interrupt(self, ename, evalue):
        """Interrupt what it does; the first reason will be its failure."""
        self.interrupt_reason = self.interrupt_reason or Failure(ename, evalue)

    def set_timeout(self, seconds, text=""):
        """Interrupt what it does if that has not ended within so many seconds from now."""
        self.timeout_text = text or f"still busy after {seconds:g} s; interrupted"
        self.deadline = time.monotonic() + seconds


class Request:
    """A request on the shell channel, and what came of it. Written by the kernel's thread."""

    def __init__(self, msg_id, has_reply=True):
        self.msg_id: str = msg_id
        self.busy_since: float | None = None
        self.is_idle = False
        self.reply: dict | None = None if has_reply else {}  # its content
        self.outputs: tuple | None = None    # (parts, failures, buffers), see `publish`
        self.failure: Failure | None = None
        self.held: list = []                 # (time, function, ...) from the latest error on
        self.question: tuple | None = None   # (prompt, whether it asks for a password)
        self.answer: str | None = None       # also written by the user's thread
        self.stopping_since: float | None = None  # since when there is a reason to interrupt it
        self.interrupt_sent: float | None = None
        self.interrupt_answered = True       # or there is no reply to wait for
        self.probe_id: str = "none yet"      # of a later request that tells what was lost
        self.probe_sent = 0.0

    @property
    def is_complete(self):
        """Whether all has come, and no interrupt is on its way, which might hit the next one."""
        return self.reply is not None and self.is_idle and self.interrupt_answered

    def fail(self, ename, evalue, traceback=()):
        self.failure = self.failure or Failure(ename, evalue, list(map(str, traceback)))

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
                self.fail("LostReplyError", "the connection broke, and the reply was lost")
        elif kind == "status" and (is_ours or is_probe):
            self.busy_since = self.busy_since or time.monotonic()
            self.is_idle = content["execution_state"] == "idle"
        elif kind == "input_request" and is_ours:
            self.question = str(content["prompt"]), bool(content.get("password"))
        elif kind == "comm_msg" and "remote_exec" in dict(content["data"] or {}):
            if is_ours:
                self.outputs = *content["data"]["remote_exec"], message["buffers"]
        else:
            return False
        return True

    def handle_reply(self, content):
        """Take in the reply, and in it that of the expression which publishes the outputs."""
        self.reply = content
        for part in (content, (content.get("user_expressions") or {}).get("remote_exec") or {}):
            if part.get("status", "ok") != "ok":  # "aborted" has no more to say
                evalue = part.get("evalue", "nothing ran: another client's code failed before it")
                self.fail(str(part.get("ename", "AbortedError")) or "Error", str(evalue),
                          part.get("traceback") or [])


class Kernel:
    """What NAME stands for: a process somewhere, and a thread here that talks to it, which writes
    the fields, unless they say otherwise."""

    def __init__(self, magics, name):
        self.magics, self.name, self.namespace = magics, name, KernelNamespace(self)
        self.spec: str = name
        self.lock = threading.RLock()  # held by a call, which also writes the next two fields
        self.run: Job | None = None    # what runs in the background, until it is collected
        self.screen = Screen(magics.shell, labelled=False)  # of the latest call
        self.screens: dict[str, Screen] = {}  # of the latest requests, by their ids
        self.jobs: collections.deque[Job] = collections.deque()  # the first is being done
        self.is_closed = False         # written by who ends the session
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_sender.setblocking(False)
        self.thread = threading.Thread(target=self.run_jobs, daemon=True, name=name)
        self.reset()

    def reset(self):
        """There is no process."""
        self.process: Process | None = None
        self.connection = Connection(self.magics.context, self.wake_receiver)
        self.language: str | None = None     # once it has answered
        self.protocol: int | None = None     # of pickle, if it is a Python with IPython
        self.request: Request | None = None  # the current one
        self.not_idle: list[str] = []        # ids of requests that are not done, in order
        self.widgets = Widgets(self)

    # called by other threads

    def submit(self, screen, function, *arguments, **options):
        """Return the job that calls one of the methods below in the kernel's thread."""
        job = Job(screen, functools.partial(function, *arguments, **options))
        self.jobs.append(job)
        if not self.thread.is_alive():
            self.thread.start()
        self.wake()
        return job

    def wake(self):
        with contextlib.suppress(OSError):  # it has been woken, or has ended
            self.wake_sender.send(b"x")

    def abandon_jobs(self):
        """End the jobs at once: the kernel is to be shut down."""
        for job in tuple(self.jobs):
            job.interrupt_reason = Failure("ShutdownError", "the kernel was shut down")

    @property
    def is_busy(self):
        return bool(self.not_idle) or not all(job.done() for job in tuple(self.jobs))

    @property
    def is_suspect(self):
        """Whether its process may have ended since it was last seen to work."""
        process, disconnected = self.process, self.connection.disconnected
        return bool(process and (process.has_exited or process.exit_reason or disconnected))

    # the thread and its jobs

    def run_jobs(self):
        """Do one job after the other; listen in between."""
        while self.jobs or not self.is_closed:
            if not self.jobs:
                self.receive(None)
                continue
            job = self.jobs[0]
            try:
                if job.interrupt_reason:
                    raise KernelError(*job.interrupt_reason)
                job.set_result(job.function())
            except BaseException as error:
                if self.process and self.process.exit_reason:
                    self.end()
                job.set_exception(error)
            job.function = job = None  # what it took, or brought, may be large
            self.jobs.popleft()
        self.wake_receiver.close()
        self.wake_sender.close()

    def start(self, spec, timeout):
        """Start a kernel, or attach to one, unless it is there and works. Raises KernelError."""
        if self.process:
            try:
                self.execute("", *((prepare, "", False) if self.protocol else ()))  # does nothing
                self.connection.disconnected = False
                return
            except Exception:
                if not self.process.owns_kernel or not self.process.exit_reason:
                    raise
            self.notify(f"{self.name} had died ({self.process.exit_reason}) and is started anew")
            self.end()
        self.spec = spec
        self.jobs[0].set_timeout(timeout, f"not ready after {self.magics.startup_timeout:g} s "
                                          "(c.RemoteExecMagics.startup_timeout)")
        try:
            self.process = Process(self.magics, self.name, spec)
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
        """Wait until the kernel answers (protocol, "Kernel info"). Until then, its connection file
        is followed: a batch job may write into it on which node it runs."""
        process, connection, request = self.process, self.connection, None
        process.launched.add_done_callback(lambda _: self.wake())
        while not (request and request.reply and connection.is_stdin_connected):
            self.receive(0.02 if request and request.reply else 0.1)
            self.check_interrupt(request)
            if process.launched.done():
                process.launched.result()
                if connection.connect_if_changed(process.connection_file):
                    request = self.send_request("kernel_info_request", {})
                self.check_alive()

    def set_up(self):
        """Make the module of the remote side. A Python without IPython just runs code."""
        reply = self.call("kernel_info_request", {}).reply  # its idle status: iopub works, too
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

    def prepare(self, directory, buffers):
        """Change directory, and send the pushed variables."""
        self.execute("", prepare, directory, bool(buffers), buffers=buffers)

    def run_code(self, code, names, together=True):
        """Execute code, and bring variables back; return (parts, failures, buffers), or None."""
        if not names:
            return self.execute(code, silent=False).outputs if code.strip() else None
        outputs = self.execute(code, publish, names, self.protocol, not self.process.owns_kernel,
                               together, silent=not code.strip()).outputs
        if outputs is None:
            raise KernelError("LostReplyError", "the outputs were lost; fetch them without code")
        return outputs

    def end(self, seconds=None):
        """Let the kernel go, and have its process end if it is ours; return the future of that."""
        process, connection = self.process, self.connection
        owns_kernel = process is not None and process.owns_kernel
        requested = owns_kernel and bool(self.language) and not (
            self.not_idle or process.exit_reason)
        if requested:
            connection.send("control", "shutdown_request", {"restart": False})
        connection.close(linger=200)
        self.reset()
        return process.shutdown(requested, seconds) if owns_kernel else None

    # messages and requests

    def receive(self, seconds):
        """Handle the messages that come within so many seconds; return whether any did."""
        came = False
        try:
            for channel, message in self.connection.receive(seconds):
                came = True
                self.handle_message(channel, message)
        except zmq.ZMQError as error:  # costs the connection, but not the thread
            self.connection.close()
            if self.process:
                self.process.exit_reason = f"its connection failed: {error!r}"
        except Exception as error:  # a malformed message is a failure of the request
            if self.request:
                self.request.fail("ProtocolError", f"malformed message: {error!r}")
        return came

    def handle_message(self, channel, message):
        """Handle a message: give it to the current request, or show it as an output."""
        kind, content, request = message["msg_type"], message["content"], self.request
        message["parent_header"] = parent = message["parent_header"] or {}
        parent_id = parent.get("msg_id")
        if kind == "status" and content["execution_state"] == "idle":
            while parent_id in self.not_idle:  # kernels work in order
                self.not_idle.pop(0)
        if kind == "input_request":  # what was printed before may come later, on iopub
            deadline = time.monotonic() + 1
            while self.receive(0.05) and time.monotonic() < deadline:
                pass
        if request and request.handle_message(channel, message):
            return
        if channel != "iopub" or parent.get("session") != self.connection.client.session.session:
            return  # an output of another client
        screen = self.screens.get(parent_id, self.screen)  # what is late belongs to its own cell
        if not kind.startswith("comm_"):
            call = self.show, screen, kind, content
        elif screen.notebook:
            call = self.widgets.relay, kind, content, message["metadata"], message["buffers"]
        else:
            return
        if request and request.msg_id == parent_id and (kind == "error" or request.held):
            if kind == "error":
                self.show_held(request)
            request.held.append((time.monotonic(), *call))
        else:
            screen.call_soon(*call)

    def show_held(self, request):
        """Show an error that was not the end of the code, and what came after it."""
        for _, *call in request.held:
            self.jobs[0].screen.call_soon(*call)
        request.held = []

    def show(self, screen, kind, content):
        """Show an output. Called in the user's thread."""
        self.widgets.capture(True)
        try:
            screen.show(self.name, kind, content)
        finally:
            self.widgets.capture(False)

    def notify(self, text):
        self.jobs[0].screen.call_soon(self.jobs[0].screen.write, sys.stderr, text + "\n")

    def send_request(self, kind, content, **more):
        """Send a request on the shell channel, and make it the current one."""
        msg_id = self.connection.send("shell", kind, content, **more)
        self.not_idle.append(msg_id)
        if self.screen.notebook:
            self.screens[msg_id] = self.jobs[0].screen
        if len(self.screens) > 1000:
            del self.screens[next(iter(self.screens))]
        self.request = Request(msg_id, has_reply=not kind.startswith("comm_"))
        self.connection.last_message = time.monotonic()
        return self.request

    def call(self, kind, content, **more):
        """Send a request; return it when it is complete. Raises KernelError if it failed."""
        screen, request = self.jobs[0].screen, self.send_request(kind, content, **more)
        if not self.process.owns_kernel:
            self.process.exit_reason = None  # its owner may have started it again
        try:
            while not request.is_complete:
                self.receive(0.1)
                if request.answer is not None and self.connection.is_stdin_connected:
                    self.connection.send("stdin", "input_reply", {"value": request.answer})
                    request.question = request.answer = None
                self.check_interrupt(request)
                self.check_alive()
                self.check_lost(request)
                if request.held and time.monotonic() - request.held[0][0] > 1:
                    self.show_held(request)  # the code goes on
        except KernelError:
            self.show_held(request)
            raise
        finally:
            self.request = None
            screen.call_soon(screen.end_partial_lines, self.name)
        for payload in request.reply.get("payload") or []:
            if payload.get("source") == "page":
                screen.call_soon(screen.show, self.name, "page", payload)
        failure, reason = request.failure, self.jobs[0].interrupt_reason
        traceback = failure.traceback if failure else []
        if failure and request.held:
            error = request.held.pop(0)[-1]
            traceback = traceback or list(map(str, error["traceback"]))
        self.show_held(request)
        if request.interrupt_sent and (
                reason.ename == "TimeoutError" or failure and failure.ename in (
                    "KeyboardInterrupt", "CancelledError", "LostReplyError", "AbortedError")):
            failure = reason
        if failure:
            raise KernelError(failure.ename, failure.evalue, traceback)
        return request

    def execute(self, code, function=None, *arguments, silent=True, **more):
        """Execute code, and then call a function of the remote side (protocol, "Execute")."""
        call = f"__import__('_remote_exec').{function.__name__}{arguments!r}" if function else ""
        try:
            return self.call("execute_request", {
                "code": code, "silent": silent, "store_history": not silent,
                "user_expressions": {"remote_exec": call} if call else {}, "stop_on_error": False,
                "allow_stdin": getattr(self.jobs[0].screen.notebook, "_allow_stdin", True)}, **more)
        except KernelError as error:
            if function is None or error.args[1] != "No module named '_remote_exec'":
                raise
        self.notify(f"{self.name} was restarted, or lost its modules; it is set up again")
        self.execute(SETUP_CODE)
        return self.execute("", function, *arguments, **more)

    # what may happen while a request is on

    def check_interrupt(self, request):
        """Interrupt the code if there is a reason to; not before it has begun, which would be lost,
        or hit another client's code. Send a signal if no reply comes, as ipykernel 5 needs it."""
        now, job, owns_kernel = time.monotonic(), self.jobs[0], self.process.owns_kernel
        if now > job.deadline and not (self.language and request.reply):
            job.interrupt("TimeoutError", job.timeout_text)
        reason = job.interrupt_reason
        if reason is None:
            return
        ename, evalue, _ = reason
        if self.language is None or ename == "ShutdownError":
            raise KernelError(ename, evalue)
        request.stopping_since = request.stopping_since or now
        waited, request.question = now - request.stopping_since, None
        if request.interrupt_sent is None:
            has_begun = request.busy_since and now - request.busy_since > 0.05
            if has_begun or owns_kernel and waited > POLL_AFTER:
                self.connection.send("control", "interrupt_request", {})
                request.interrupt_sent, request.interrupt_answered = now, False
        elif not request.interrupt_answered and (
                now - request.interrupt_sent > INTERRUPT_REPLY_TIMEOUT):
            request.interrupt_answered = True
            if owns_kernel:
                self.process.run(self.process.manager.signal_kernel(signal.SIGINT))
        if ename == "TimeoutError" and waited > INTERRUPT_TIMEOUT:
            raise KernelError(ename, f"{evalue}, but ignores the interrupt; -s replaces it")

    def check_alive(self):
        """Raise KernelError if the kernel has died. Silence is no death: a network may be away."""
        process, connection = self.process, self.connection
        reason = process.find_exit_reason(connection)
        connection.check_heartbeat()
        if reason is None or time.monotonic() - connection.last_message < 0.2:
            return  # its last messages may still come
        hint = ("the next cell that names it starts it anew" if process.owns_kernel else
                "it was not started here")
        is_local = connection.client and connection.client.transport == "ipc"
        words = "" if is_local else process.last_stderr_lines()
        raise KernelError("DeadKernelError", f"the kernel died ({reason}); {hint}{words}")

    def check_lost(self, request):
        """Find out by a later request whether reply or idle status was lost with the connection.
        It also wakes an ipykernel whose interrupted `await` would go on."""
        now, connection = time.monotonic(), self.connection
        is_half = (request.reply is not None) != request.is_idle
        is_stopping = request.interrupt_sent is not None and not request.is_idle
        is_due = (is_half and now - connection.last_message > 0.3
                  or is_stopping and now - request.interrupt_sent > 0.3
                  or connection.disconnected)
        if is_due and now - request.probe_sent > POLL_INTERVAL:
            request.probe_id = connection.send("shell", "kernel_info_request", {})
            request.probe_sent, connection.disconnected = now, False


class KernelNamespace:
    """What came back from one kernel: its attributes are the variables."""

    # (the mangled name of the slot leaves every other name to the variables)
    __slots__ = ("__dict__", "__weakref__", "__kernel")

    def __init__(self, kernel):
        self.__kernel = kernel

    def __getattr__(self, name):
        kernel, run = self.__kernel, self.__kernel.run
        if run and name in run.names and not is_completing():
            screen = Screen(kernel.magics.shell, labelled=False)
            Collector(screen, [kernel]).finish_when_read(kernel, run, name)
            if name in vars(self):
                return vars(self)[name]
        raise AttributeError(f"nothing named {name!r} has come back from {kernel.name}")

    def __repr__(self):
        kernel = self.__kernel
        state = f", {kernel.run.state}" if kernel.run else ""
        return (f"<kernel {kernel.name} ({kernel.spec}){state}: "
                f"{', '.join(dir(self)) or 'no variables yet'}>")

    def __dir__(self):
        return sorted(vars(self))

    def __reduce__(self):
        return types.SimpleNamespace, (), vars(self)


def is_completing():
    """Return whether Tab or a tooltip looks something up, rather than the user's code."""
    return any(frame.f_globals.get("__name__") == "IPython.core.completer"
               or frame.f_code.co_name == "object_inspect_mime"
               for frame, _ in traceback.walk_stack(None))


# ---- a call ---------------------------------------------------------------

class Collector:
    """Waits for kernels in the user's thread, and takes in what they bring."""
    restart = False  # whether it is to end what they do

    def __init__(self, screen, kernels):
        self.screen, self.kernels, self.interrupts = screen, kernels, Interrupts()
        self.screens = {screen}  # also of earlier calls, which may have late output to show

    def wait(self, jobs, doing="waiting for", interrupt=True):
        """Wait for jobs; show and ask what their kernels publish and ask. The first Ctrl-C
        interrupts the kernels, the second one ends the waiting; without ``interrupt``, the first
        one ends it and raises KeyboardInterrupt."""
        begin = last_status = time.monotonic()
        news = threading.Event()
        self.screens.update(kernel.screen for kernel in self.kernels)
        for screen in self.screens:
            screen.waiter = news
        for job in jobs.values():
            job.is_awaited = True
            job.add_done_callback(lambda _: news.set())
        try:
            while True:
                # (first the jobs: a job is done after its outputs are queued)
                waiting = [kernel for kernel, job in jobs.items() if not job.done()]
                for screen in self.screens:
                    screen.process_queue()
                if self.interrupts.count and waiting and not interrupt:
                    raise KeyboardInterrupt(f"{short_list(waiting)} not waited for")
                for kernel in waiting if self.interrupts.count else ():
                    jobs[kernel].interrupt("KeyboardInterrupt", "stopped")
                if self.interrupts.count > 1:
                    break
                if any(screen.queue for screen in self.screens):
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
            for job in jobs.values():
                job.is_awaited = False
            for screen in self.screens:
                screen.waiter = None
                if screen.queue:
                    screen.schedule()
            self.screen.show_status("")
            self.screen.flush()

    def answer_question(self, kernel):
        """Ask the user what the code of a kernel asks, if it does."""
        request = kernel.request
        if request and request.question and request.answer is None and not self.interrupts.count:
            # (a Ctrl-C is counted, and passed on by `wait`)
            with contextlib.suppress(KeyboardInterrupt), self.interrupts.raising():
                request.answer = self.screen.ask(kernel.name, *request.question)
            kernel.wake()

    def show_status(self, waiting, doing, seconds):
        """Tell after 3 s who is waited for, who is ready, and who does not answer."""
        self.screen.flush()
        silent = [f"; {kernel.name} does not answer since {since}" for kernel in waiting
                  if (since := kernel.connection.silent_since)]
        is_starting = not all(kernel.language for kernel in waiting)
        if seconds > 3 and (len(self.kernels) > 1 or silent or is_starting):
            ready = short_list(kernel for kernel in self.kernels if kernel not in waiting)
            text = f"{doing} {short_list(waiting)} ({seconds:.0f} s)" + "".join(silent[:3])
            self.screen.show_status(text + (f"; ready: {ready}" if ready else ""))

    def collect(self, jobs, doing="waiting for", interrupt=True):
        """Wait for jobs and load what they bring. Raises RemoteError with what failed; after a
        Ctrl-C it shows that, and raises KeyboardInterrupt."""
        self.wait(jobs, doing, interrupt)
        failures, stopped = {}, {}
        for kernel, job in jobs.items():
            try:
                if not job.done():
                    raise KernelError("KeyboardInterrupt", "still busy, -s replaces it")
                if job.result():
                    self.load(kernel, *job.result(), interrupt)
            except Exception as error:
                failure = failure_of(error)
                if doing == "stopping":
                    failure = Failure("ShutdownError", f"may still run: {failure}")
                if self.interrupts.count and failure.ename == "KeyboardInterrupt":
                    stopped.setdefault(failure.evalue, []).append(kernel.name)
                else:
                    failures[kernel.name] = failure
            if kernel.run is job:  # it ran in the background, and is collected now
                kernel.run = None
        error = RemoteError(failures, self.screen.labelled)
        if failures and not self.interrupts.count:
            raise error
        if failures:
            self.screen.write(sys.stderr, "\n".join([*error._render_traceback_(), ""]))
        if self.interrupts.count:
            texts = [f"{', '.join(names)} {what}" for what, names in stopped.items()]
            raise KeyboardInterrupt("; ".join(texts) or "no kernel stopped")

    def load(self, kernel, parts, failures, buffers, interrupt):
        """Load what came back into the kernel's namespace. Raises KernelError."""
        failures = list(failures)
        for names, count in parts:
            pickled, buffers = buffers[:count], buffers[count:]
            try:
                with self.interrupts.raising() if interrupt else contextlib.nullcontext():
                    values = loads(pickled)
                vars(kernel.namespace).update(values)
            except KeyboardInterrupt:
                raise KernelError("KeyboardInterrupt", "not loaded here") from None
            except (Exception, SystemExit) as error:  # unpickling may run any code
                if len(names) > 1:
                    job = kernel.submit(self.screen, kernel.run_code, "", names, together=False)
                    self.wait({kernel: job}, interrupt=interrupt)
                    if not job.done():
                        raise KernelError("KeyboardInterrupt", "not loaded here") from None
                    parts, more, buffers = job.result()
                    return self.load(kernel, parts, failures + more, buffers, interrupt)
                text = f"{names[0]} can't be loaded: {error_text(error)}"
                text += "".join(f"; {library} {sys.modules[library].__version__} here"
                                for library in ("numpy", "pandas")  # theirs may be newer
                                if library in text and library in sys.modules)
                failures.append([type(error).__name__, text])
        if failures:
            (ename, evalue), *rest = failures
            raise KernelError(ename, "; ".join([evalue, *map(": ".join, rest)]))

    def lock_kernels(self, stack):
        """Wait until no other thread's call uses these kernels; -s ends what does."""
        for kernel in sorted(self.kernels, key=lambda kernel: kernel.name):  # never in a circle
            while True:
                if self.restart:
                    kernel.run = None
                    kernel.abandon_jobs()
                if kernel.lock.acquire(timeout=0.1):
                    break
                if self.interrupts.count:
                    raise KeyboardInterrupt(f"{kernel.name} is used by another thread")
            stack.callback(kernel.lock.release)

    def finish_when_read(self, kernel, run, name):
        """Wait for a run of which an attribute is read. Ctrl-C ends just the waiting."""
        with self.interrupts:
            kernel.screen.move_to(self.screen)
            self.wait({kernel: run}, interrupt=False)
            with contextlib.ExitStack() as stack:
                self.lock_kernels(stack)
                # (another thread may have collected it, and got its failure)
                if kernel.run is run or name not in vars(kernel.namespace):
                    self.collect({kernel: run}, interrupt=False)

    def finish_between_cells(self, kernel, run):
        """Load what a run brought, unless somebody waits for it; show its failure, which is raised
        all the same by who names the kernel next."""
        if kernel.run is not run or run.is_awaited or not kernel.lock.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(KeyboardInterrupt), self.interrupts:
                self.collect({kernel: run}, interrupt=False)
        except RemoteError as error:
            kernel.run, run.has_failed = run, True
            self.screen.shell.showtraceback((RemoteError, error, None))
        finally:
            kernel.lock.release()


class Call(Collector):
    """One call of the magic: what its line asks for, and its phases in their order."""

    def __init__(self, magics, options, code, local_ns):
        """Raises UsageError before anything is done."""
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
            raise UsageError("-b needs code, and no -t; -t in a call without code waits for it")
        values = {name: self.local_value("i", name) for name in inputs}
        self.pushed = {name: self.local_value("p", name) for name in pushes}
        self.pickled: dict[int, list] = {}  # what is pushed, by pickle's protocol
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
        try:
            return self.locals[normalize(name)]
        except KeyError:
            raise UsageError(f"-{option}: there is no local variable {name!r}") from None

    def run(self):
        """Go through all phases. Raises UsageError, RemoteError, KeyboardInterrupt."""
        kernels, screen, plans = self.kernels, self.screen, self.plans
        with self.interrupts, contextlib.ExitStack() as stack:
            self.pickle_pushed(pickle.HIGHEST_PROTOCOL)  # fails before anything is done
            self.lock_kernels(stack)
            if self.restart:
                jobs = {kernel: kernel.submit(screen, kernel.end) for kernel in kernels}
                self.wait(jobs, "stopping", interrupt=False)
                ends = {kernel: job.result() for kernel, job in jobs.items()
                        if not job.exception() and job.result()}
                self.collect(ends, "stopping", interrupt=False)
            else:
                for kernel in kernels:
                    if kernel.run:
                        kernel.screen.move_to(screen)
                        kernel.run.set_timeout(self.timeout)
                self.collect({kernel: kernel.run for kernel in kernels if kernel.run})
                self.refuse_busy()
            for kernel in kernels:
                kernel.screen = screen
            if self.shutdown_only:
                return
            timeout = self.magics.startup_timeout + (len(kernels) - 1) / 2  # on few processors
            self.collect({
                kernel: kernel.submit(screen, kernel.start, spec, timeout)
                for kernel, (spec, _, _) in plans.items()
                if kernel.process is None or kernel.is_suspect}, "starting")
            for kernel in kernels:
                self.magics.shell.user_ns[kernel.name] = kernel.namespace
            self.refuse_other_languages()
            self.collect({
                kernel: kernel.submit(screen, kernel.prepare, directory,
                                      self.pickle_pushed(kernel.protocol))
                for kernel, (_, directory, _) in plans.items()
                if directory or self.pushed}, "preparing")
            self.pickled.clear()
            jobs = {kernel: kernel.submit(screen, kernel.run_code, code, self.outputs)
                    for kernel, (_, _, code) in plans.items()}
            if self.background:
                return self.leave_in_background(jobs)
            for job in jobs.values():
                job.set_timeout(self.timeout)
            self.collect(jobs)

    def pickle_pushed(self, protocol):
        """Return what is pushed, pickled. Raises UsageError that names what can't be."""
        if self.pushed and protocol not in self.pickled:
            with self.interrupts.raising():
                self.pickled[protocol] = pickle_variables(self.pushed, protocol)
        return self.pickled.get(protocol)

    def refuse_busy(self):
        """Raise UsageError if a kernel is still busy with what nobody waits for any more."""
        jobs = {kernel: kernel.submit(self.screen, kernel.call, "kernel_info_request", {})
                for kernel in self.kernels if kernel.process and kernel.is_busy}
        concurrent.futures.wait(jobs.values(), timeout=1)
        busy = [kernel for kernel, job in jobs.items() if not job.done()]
        for kernel in busy:
            jobs[kernel].interrupt("ShutdownError", "nobody waits for it any more")
        if busy:
            raise UsageError(f"{busy[0].name} is still busy; wait, or replace it with -s")

    def refuse_other_languages(self):
        """Raise UsageError if a kernel can't do what the options ask for."""
        for kernel, (_, directory, _) in self.plans.items():
            if kernel.protocol is None and (self.outputs or self.pushed or directory):
                raise UsageError(f"{kernel.name} runs {kernel.language}: -o, -p and :DIRECTORY "
                                 "need Python 3.6 or later with IPython")

    def leave_in_background(self, jobs):
        """Have the kernels run; in a notebook, what they bring is loaded when it comes."""
        for kernel, job in jobs.items():
            for name in self.outputs:
                vars(kernel.namespace).pop(name, None)
            job.names, job.since = self.outputs, time.strftime("running since %X")
            kernel.run = job
            if self.screen.notebook:
                finish = Collector(self.screen, [kernel]).finish_between_cells
                job.add_done_callback(functools.partial(self.screen.call_soon, finish, kernel))


def pickle_variables(values, protocol):
    """Return variables pickled. Raises UsageError that names one that can't be."""
    try:
        return dumps(values, protocol)
    except (Exception, SystemExit) as error:  # pickling may run any code
        for name in values if len(values) > 1 else ():
            pickle_variables({name: values[name]}, protocol)
        text = " ".join(error_text(error).split())
        raise UsageError(f"-p: can't pickle {', '.join(values)}: {text}") from None


def short_list(kernels):
    """Return the names of kernels, but not a hundred of them."""
    return textwrap.shorten(", ".join(kernel.name for kernel in kernels), 90, placeholder=" ...")


# ---- the magic ------------------------------------------------------------

@magics_class
class RemoteExecMagics(Magics):
    """The magic ``%remote_exec``, and the kernels that it started."""

    startup_timeout = Float(60, help="Seconds that a kernel may take to start.").tag(config=True)

    def __init__(self, shell, **options):
        super().__init__(shell, **options)
        self.kernels: dict[str, Kernel] = {}  # by NAME; also those that were shut down
        self.ends: set = set()   # futures of processes that are to end
        self.loops: dict = {}    # asyncio loops of the provisioners, each in a thread of its own
        self.lock = threading.Lock()  # kernels that start together share a loop and a directory
        self.own_dir = None      # for Unix sockets
        self.context = zmq.Context(io_threads=2)
        self.context.max_sockets = self.context.get(zmq.SOCKET_LIMIT)
        self.pid, self.is_closed = os.getpid(), False

    @no_var_expand
    @needs_local_scope
    @line_cell_magic
    def remote_exec(self, line, cell=None, local_ns=None):
        """Run code on one or many Jupyter kernels, and bring variables back.

        A cell runs on two kernels at the same time, each reads a file of its own, and what comes
        back is plotted. One of them then gets an object and returns another; both are shut down::

            In [1]: filenames = {"kernel1": "a.txt", "kernel2": "b.txt"}
            In [2]: %%remote_exec -k kernel1=far:/data,kernel2=python3:/tmp -i filenames -o x,y
               ...: import numpy as np
               ...: x, y = np.loadtxt("{filenames}").T
            In [3]: plt.plot(kernel1.x, kernel1.y); plt.plot(kernel2.x, kernel2.y)
            In [4]: %remote_exec -k kernel1 -p threshold -o above -- above = x > threshold
            In [5]: %remote_exec -k kernel1,kernel2 -s

        Kernels start when they are first named, and keep their state. Options come first; the rest
        of the line is code, taken verbatim, ahead of the cell.

        -k, --kernels NAME[=SPEC][:DIRECTORY],...
            NAME is the variable that has what comes back. SPEC picks the kernelspec (a part of its
            name is enough, _ stands for anything), or is the .json connection file of a kernel that
            runs already; the default is what NAME had last, else NAME. DIRECTORY is the working
            directory over there from now on. `-k {names}` takes a string, or a list of strings.
        -o, --output NAMES     Variables to bring back, as attributes of NAME; needs no code.
        -i, --input NAMES      Local variables to put into the code, as str() writes them, wherever
                               {variable} stands. A dict is looked up by kernel NAME.
        -p, --push NAMES       Local variables to send as objects, before the code runs.
        -s, --shutdown         Shut the kernels down; with code, restart them and run it.
        -t, --timeout SECONDS  Interrupt the kernels that are still busy then.
        -b, --background       Return when the code is on its way. Reading an attribute that it
                               brings waits for it, as does the next call that names the kernel.
        -l, --list             List the kernels that run, and the kernelspecs that there are.
        --                     End the options.

        Ctrl-C interrupts the kernels; a second one gives the prompt back at once. What goes wrong
        over there is a `RemoteError`, whose ``failures`` maps each NAME to (ename, evalue,
        traceback); your own mistakes are a `UsageError`, before any code runs.
        """
        if self.is_closed or os.getpid() != self.pid:
            raise UsageError("its kernels belong to another process, or were shut down; "
                             "%reload_ext remote_exec")
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
        running = [(kernel, kernel.process) for kernel in list(self.kernels.values())
                   if kernel.process]
        yield "running kernels:" if running else "running kernels:\n  none"
        for kernel, process in running:
            state = "dead" if process.has_exited else kernel.run.state if kernel.run else (
                "busy" if kernel.is_busy else "idle")
            yield f"  {kernel.name}  {kernel.spec}  {state}"
        yield "\n  ".join(["kernelspecs:", *sorted(self.kernelspecs.find_kernel_specs())])

    @property
    def kernelspecs(self):
        return KernelSpecManager(config=self.shell.config)

    def find_kernel(self, name, spec):
        """Return the kernel that NAME stands for. Raises UsageError if it means something else."""
        kernel = self.kernels.get(name) or Kernel(self, name)
        value = self.shell.user_ns.get(name, getattr(builtins, name, kernel.namespace))
        slot, is_ours = "_KernelNamespace__kernel", type(value).__name__ == "KernelNamespace"
        ours = object.__getattribute__(value, slot) if is_ours else None
        if not ours or ours.name != name:
            raise UsageError(f"{name} is something else here; try my_{name}={spec or kernel.spec}")
        kernel = self.kernels.setdefault(name, kernel)  # another thread may have been first
        if ours.magics is not self:  # from before this module was reloaded
            kernel.namespace, kernel.spec = value, ours.spec
            object.__setattr__(value, slot, kernel)
        return kernel

    def find_spec(self, kernel, spec, replace):
        """Return the kernelspec or connection file that SPEC means. Raises UsageError if NAME runs
        another one, which is not to be replaced."""
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

    def loop(self, name):
        """Return an asyncio loop, which runs until the extension is unloaded."""
        with self.lock:
            if name not in self.loops:
                loop = self.loops[name] = asyncio.new_event_loop()
                threading.Thread(
                    target=lambda: (loop.run_forever(), loop.close()), daemon=True).start()
            return self.loops[name]

    def runtime_dir(self):
        """Return Jupyter's runtime directory, or our own where that can't be written."""
        path = jupyter_runtime_dir()
        with contextlib.suppress(OSError):
            os.makedirs(path, mode=0o700, exist_ok=True)
        return path if os.access(path, os.W_OK) else self.session_dir()

    def session_dir(self):
        """Return a directory of our own; its name is short, as a socket's must be (unix(7))."""
        with self.lock:
            if not os.path.isdir(self.own_dir or ""):  # there is none, or it was cleaned up
                parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
                self.own_dir = tempfile.mkdtemp("", f"rexec-{self.pid}-", parent)
            return self.own_dir

    def connection_config(self, kernelspec):
        """Return how a kernel is reached: local ipykernels over Unix sockets, where only the user
        can enter; others over TCP, encrypted where they can. The user's settings come first."""
        ours, users = {}, self.shell.config.get("KernelManager", {})
        is_local_ipykernel = "kernel_provisioner" not in kernelspec.metadata and (
            kernelspec.argv[1:3] in (["-m", "ipykernel_launcher"], ["-m", "ipykernel"]))
        if is_local_ipykernel and zmq.has("ipc") and not {"transport", "ip"} & set(users):
            ours = {"transport": "ipc", "ip": f"{self.session_dir()}/{uuid.uuid4().hex[:8]}"}
        elif zmq.has("curve"):
            ours = {"transport_encryption": "auto"}  # ignored by older versions of jupyter_client
        return Config(self.shell.config, KernelManager={**ours, **users})

    def close(self):
        """Shut all kernels down, as the session ends."""
        self.is_closed, kernels = True, list(self.kernels.values())
        if os.getpid() != self.pid:  # a forked child: the files are its parent's
            for kernel in kernels:
                if kernel.process and kernel.process.owns_kernel:
                    kernel.process.manager.connection_file = ""
            return
        # A front end grants a notebook some 2.5 s.
        wait_time = AsyncKernelManager(config=self.shell.config).shutdown_wait_time
        limit, seconds = (2, 1.2) if hasattr(self.shell, "kernel") else (wait_time + 3, None)
        deadline = time.monotonic() + limit
        with contextlib.suppress(KeyboardInterrupt), Interrupts():
            kernels = [kernel for kernel in kernels if kernel.thread.is_alive()]
            for kernel in kernels:
                kernel.abandon_jobs()
                kernel.submit(kernel.screen, kernel.end, seconds)
                kernel.is_closed = True  # its thread ends after that job
                kernel.wake()
            for kernel in kernels:
                kernel.thread.join(max(0, deadline - time.monotonic()))
            concurrent.futures.wait(list(self.ends), max(0, deadline - time.monotonic()))
            if self.own_dir:
                shutil.rmtree(self.own_dir, ignore_errors=True)
            if not self.ends:
                for loop in self.loops.values():
                    loop.call_soon_threadsafe(loop.stop)
                # (not in this thread: it waits for ever for a socket that somebody left open)
                threading.Thread(target=self.context.term, daemon=True).start()


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
