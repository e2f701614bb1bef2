"""Run a line or a cell on one or many Jupyter kernels, and bring variables back.

The data stays where it is; one cell computes on every kernel at once, and the
numbers to plot come here as attributes of a variable named after the kernel::

    In [1]: %load_ext remote_exec

    In [2]: %%remote_exec -k kernel1=python3,kernel2=python3 -o x
       ...: import os
       ...: x = os.getpid()

    In [3]: kernel1.x != kernel2.x
    Out[3]: True

All that the far side needs is the Jupyter kernel that it has. ``%remote_exec?``
shows everything.
"""
import asyncio
import atexit
import builtins
import concurrent.futures
import difflib
import getopt
import getpass
import inspect
import json
import keyword
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from typing import NamedTuple

import zmq
import zmq.asyncio
from IPython.core import page
from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics, line_cell_magic, magics_class, needs_local_scope, no_var_expand)
from jupyter_client import AsyncKernelManager, KernelClient
from jupyter_client.connect import find_connection_file
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Float
from traitlets.config import Config

__version__ = "2.0.0"
__all__ = ["Failure", "RemoteError", "RemoteExecMagics"]


# ---- errors ---------------------------------------------------------------

class Failure(NamedTuple):
    """What went wrong on one kernel, in the words of its error message
    (Jupyter messaging protocol, "Execution errors")."""
    ename: str
    evalue: str
    traceback: list = []

    def __str__(self):
        return f"{self.ename}: {self.evalue}" if self.ename else self.evalue


class RemoteError(Exception):
    """Everything that went wrong over there in one call.

    ``failures`` maps kernel NAME to `Failure`, in the order of ``-k``.
    """

    def __init__(self, failures, labelled=False):
        super().__init__(failures, labelled)
        self.failures, self.labelled = failures, labelled

    def __str__(self):
        return "\n".join(f"{name}: {failure}" for name, failure in self.failures.items())

    def _render_traceback_(self):
        """Lines that IPython shows in place of this module's own frames."""
        shown = []
        for name, failure in self.failures.items():
            text = "\n".join(failure.traceback) or str(failure)
            shown += [*(label(name, text) if self.labelled else text).split("\n"), ""]
        return shown[:-1]


def label(name, text):
    """`text` under the name of its kernel: on its line, or above its lines."""
    return f"[{name}] " + ("\n" if "\n" in text else "") + text


# ---- the remote side ------------------------------------------------------
# The source of these functions goes to every Python kernel, from 2.7 on, into
# a module of its own; `pack` and `unpack` serve on this side too.

IN_BAND = 65536  # bytes; a message frame of its own costs more than copying less


class NoMain(pickle.Unpickler):
    """Refuses what pickle wrote as a reference to the sender's session."""

    def find_class(self, module, name):
        if module == "__main__":
            raise pickle.PicklingError("%s is defined in the session; installing "
                                       "cloudpickle on both sides would do it" % name)
        return pickle.Unpickler.find_class(self, module, name)


def pack(values, protocol):
    """Pickle of `values` and its out-of-band buffers (PEP 574), as one list.

    Raises whatever pickling raises; cloudpickle, where it is installed, takes
    what plain pickle can't, and what belongs to the session (`__main__`).
    """
    buffers = []

    def in_band(buffer):
        view = buffer.raw()
        if view.nbytes < IN_BAND:
            return True
        buffers.append(view)

    options = {"buffer_callback": in_band} if protocol >= 5 else {}
    try:
        data = pickler.dumps(values, protocol, **options)
        problem = None
        if b"__main__" not in data:
            return [data] + buffers
    except Exception as error:
        problem = error
    try:
        import cloudpickle
    except ImportError:
        if problem is None:
            NoMain(io.BytesIO(data), **({"buffers": buffers} if buffers else {})).load()
            return [data] + buffers
        if "__main__" in str(problem) or "<locals>" in str(problem):
            raise pickle.PicklingError("%s; installing cloudpickle on both sides "
                                       "would do it" % problem)
        raise problem
    del buffers[:]
    return [cloudpickle.dumps(values, protocol, **options)] + buffers


def load(buffers):
    """The dict that `pack` was given; raises whatever unpickling raises."""
    if sys.version_info < (3,):
        return pickler.loads(memoryview(buffers[0]).tobytes())
    options = {"buffers": buffers[1:]} if len(buffers) > 1 else {}
    return pickle.loads(buffers[0], encoding="latin1", **options)


def unpack(buffers, there):
    """As `load`, across versions too. `there` is the sender's `versions()`."""
    try:
        try:
            return load(buffers)
        except ImportError as error:
            if "_core" not in str(error):
                raise
            import numpy.core.numeric  # noqa: F401  (numpy 2 writes _core for core)
            for part in ("", ".multiarray", ".numeric"):
                sys.modules["numpy._core" + part] = sys.modules["numpy.core" + part]
            return load(buffers)
    except Exception as error:
        if "numpy" in str(error) or "pandas" in str(error):
            raise ValueError("%s (pickled with %s, loaded with %s)" % (
                error, there, versions() or "neither"))
        raise


def versions():
    """Those whose pickles differ between versions, as text."""
    return ", ".join("%s %s" % (name, sys.modules[name].__version__)
                     for name in ("numpy", "pandas") if name in sys.modules)


def prepare(directory, pushed, there):
    """Change directory, take the pushed variables from the request's buffers."""
    shell = get_ipython()  # noqa: F821
    if directory:
        if not os.path.isdir(directory):
            directory = os.path.expandvars(os.path.expanduser(directory))
        os.chdir(directory)
    if pushed:
        try:
            parent = shell.kernel.get_parent("shell")
        except AttributeError:  # before ipykernel 6
            parent = shell.kernel._parent_header
        shell.user_ns.update(unpack(parent["buffers"], there))


def send(names, protocol):
    """Publish the variables `names` as buffers of one comm message.

    One pickle for all, so that what they share stays shared. Those that can't
    go are left out, and named with the reason in the message's data.
    """
    namespace = get_ipython().user_ns  # noqa: F821
    failures, values = [], {}
    for name in names:
        if name in namespace:
            values[str(name)] = namespace[name]
        else:
            failures.append(["NameError", "name '%s' is not defined" % name])
    try:
        parts = pack(values, protocol)
    except Exception:
        for name in list(values):
            try:
                pack({name: values[name]}, protocol)
            except Exception as error:
                failures.append([type(error).__name__, "%s: %s" % (name, error)])
                del values[name]
        parts = pack(values, protocol)
    try:
        from comm import create_comm
    except ImportError:
        from ipykernel.comm import Comm as create_comm
    comm = create_comm(target_name="remote_exec", comm_id="remote_exec", primary=False)
    comm.send({"failures": failures, "versions": versions()}, buffers=parts)


def publish_all(kernel):
    """Lift ZMQ's limit of 1000 queued messages, past which outputs are dropped."""
    thread = getattr(kernel.iopub_socket, "io_thread", None)
    if thread is not None:
        thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0))


REMOTE_IMPORTS = """
import io, os, pickle, sys
from IPython import get_ipython
try:
    import cPickle as pickler
except ImportError:
    pickler = pickle
"""
pickler = pickle
import io  # noqa: E402  (beside the imports of the remote side, which it mirrors)


def setup_code():
    """Code that makes the remote side's module, and adds `pickle` and `os` to
    the user's namespace and nothing else."""
    source = REMOTE_IMPORTS + f"IN_BAND = {IN_BAND}\n" + "\n".join(
        inspect.getsource(part) for part in
        (NoMain, pack, load, unpack, versions, prepare, send, publish_all))
    return (
        "import os, pickle\n"
        f"exec(compile({ascii(source)}, '<remote_exec>', 'exec'), "
        "__import__('sys').modules.setdefault('_remote_exec', "
        "__import__('types').ModuleType('_remote_exec')).__dict__)\n"
        "__import__('_remote_exec').publish_all(get_ipython().kernel)")


def remote_call(function, *arguments):
    """Expression that calls a function of the remote side, in any Python."""
    return (f"__import__('_remote_exec').{function}"
            f"(*__import__('json').loads({json.dumps(arguments)!r}))")


# ---- options and targets --------------------------------------------------

class Target(NamedTuple):
    """One entry of ``-k``: NAME[=SPEC][:DIRECTORY]."""
    name: str
    spec: str
    directory: str


SHORT, LONG = "k:o:i:p:t:sl", [
    "kernels=", "output=", "input=", "push=", "timeout=", "shutdown", "list"]


def parse_line(line):
    """(options, code) of a magic's line; the code verbatim.

    `options` maps the short letter to its argument; one given twice adds up.
    """
    words = line.split()
    try:
        pairs, rest = getopt.getopt(words, SHORT, LONG)
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; `--` ends the options, %remote_exec? shows them all") from None
    options = {}
    for option, value in pairs:
        letter = option.lstrip("-")[0]
        options[letter] = options[letter] + "," + value if options.get(letter) else value
    return options, line.split(None, len(words) - len(rest))[-1] if rest else ""


def parse_names(option, text):
    """The variable names of an option's comma-separated argument."""
    names = text.split(",")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"-{option}: {name!r} is not a variable's name; "
                             "separate names by commas, without blanks")
    return list(dict.fromkeys(names))


def parse_targets(entries):
    """`Target` of each entry; UsageError for a bad or repeated NAME."""
    targets = []
    for entry in entries:
        head, _, directory = entry.partition(":")
        name, equals, spec = head.partition("=")
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"-k: {name!r} is not a variable's name; "
                             "write NAME[=SPEC][:DIRECTORY],... without blanks")
        if equals and not spec:
            raise UsageError(f"-k: no kernelspec after {head!r}")
        if name in [target.name for target in targets]:
            raise UsageError(f"-k: {name} stands there twice; give the second "
                             f"another name, like {name}2={spec or name}")
        targets.append(Target(name, spec, directory))
    return targets


def match_spec(wanted, specs):
    """The one of `specs` that `wanted` means: the exact one, else the only one
    that contains it, else the only one that matches, ignoring case, with ``_``
    for anything. UsageError where there is none or are several."""
    if wanted.lower() in specs:
        return wanted.lower()
    pattern = ".*".join(map(re.escape, wanted.split("_")))
    found = (sorted(spec for spec in specs if wanted in spec)
             or sorted(spec for spec in specs if re.search(pattern, spec, re.IGNORECASE)))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"kernelspec {wanted!r} may be any of: {', '.join(found)}")
    closest = sorted(sorted(specs), reverse=True, key=lambda spec: difflib.SequenceMatcher(
        None, wanted.lower(), spec).ratio())
    raise UsageError(f"no kernelspec matches {wanted!r}; there are: {', '.join(closest)}")


def substitute(code, values):
    """`code` with each ``{name}`` of `values` replaced, in one exact pass."""
    if not values:
        return code
    return re.sub(r"\{(%s)\}" % "|".join(map(re.escape, values)),
                  lambda match: values[match.group(1)], code)


# ---- a kernel -------------------------------------------------------------

def in_thread(coroutine):
    """Future of `coroutine`, which runs in a daemon thread with its own loop.

    No pool: a pool's threads are waited for when the interpreter exits.
    """
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(asyncio.run(coroutine))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True, name="remote_exec").start()
    return future


class LastWords(logging.Handler):
    """Keeps what a kernel's manager logs from the terminal, and the end of it
    for the message that tells why the kernel did not start."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        said = re.search(r"stdout/stderr: (.*)", record.getMessage())
        if said and not said.group(1).startswith(("SSHPYK", "debug")):
            self.lines = [*self.lines, said.group(1)][-3:]


class Kernel:
    """A kernel, its manager where it was started here, and the sockets to it."""

    def __init__(self, name, spec, context, config):
        self.name, self.spec, self.config = name, spec, config
        self.attached = spec.endswith(".json")
        self.context = context
        self.manager = self.client = None
        self.sockets = {}
        self.protocol = None  # pickle's highest over there; None: not Python
        self.language = "?"
        self.broken = False   # its connection was closed since we last heard from it
        self.busy = None      # the request that was given up but may run on
        self.stderr = None
        self.log = logging.Logger("remote_exec")
        self.log.addHandler(LastWords())

    async def launch(self):
        """Start the process. Raises what the kernel's provisioner raises."""
        os.makedirs(jupyter_runtime_dir(), mode=0o700, exist_ok=True)
        self.stderr = tempfile.TemporaryFile()
        config = Config()
        if AsyncKernelManager.class_traits().get("transport_encryption") and zmq.has("curve"):
            config.KernelManager.transport_encryption = "auto"
        config.merge(self.config)
        self.manager = AsyncKernelManager(
            kernel_name=self.spec, config=config, log=self.log,
            context=zmq.asyncio.Context.shadow(self.context.underlying),
            connection_file=os.path.join(jupyter_runtime_dir(), f"kernel-{uuid.uuid4()}.json"))
        # here a kernel's own output would show a second time, and unlabelled
        await self.manager.start_kernel(stdout=subprocess.DEVNULL, stderr=self.stderr)

    def connect(self):
        """Open the sockets, by what the connection file says."""
        self.client = KernelClient(
            context=self.context, log=self.log, connection_file=self.spec if self.attached
            else self.manager.connection_file)
        self.client.load_connection_file()
        identity = self.client.session.bsession
        self.sockets = {
            "iopub": self.client.connect_iopub(),
            "shell": self.client.connect_shell(identity=identity),
            "stdin": self.client.connect_stdin(identity=identity),
            "control": self.client.connect_control(identity=identity),
            "hb": self.client.connect_hb()}
        self.sockets["hb"].setsockopt(zmq.REQ_RELAXED, 1)
        for channel in ("iopub", "shell"):
            self.sockets["closed " + channel] = self.sockets[channel].get_monitor_socket(
                zmq.EVENT_DISCONNECTED)

    def send(self, channel, kind, content, buffers=None):
        """Send a request; returns its message id."""
        return self.client.session.send(
            self.sockets[channel], kind, content, buffers=buffers)["header"]["msg_id"]

    def receive(self, channel):
        """The next message, or None. What isn't signed with this kernel's key,
        or isn't a message at all, is as if it had never come."""
        while True:
            try:
                return self.client.session.recv(self.sockets[channel], copy=False)[1]
            except zmq.ZMQError:
                raise
            except Exception:
                continue

    def signal_interrupt(self):
        """Interrupt by the provisioner's signal: for kernels that don't answer
        an interrupt_request (ipykernel before 6)."""
        if not self.attached:
            in_thread(self.manager.signal_kernel(signal.SIGINT))

    @property
    def process(self):
        """The local process, where the kernel's provisioner has one."""
        return getattr(getattr(self.manager, "provisioner", None), "process", None)

    async def end(self):
        """None while the kernel runs, else how it ended. May take long."""
        if self.attached:
            try:
                socket.create_connection((self.client.ip, self.client.shell_port), 5).close()
            except ConnectionRefusedError:
                return "nothing listens at its address"
            except OSError:
                pass
            return None
        process = self.process
        if await self.manager.is_alive():
            return None
        code = getattr(process, "returncode", None)
        if code is None:
            return "its process is gone"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def last_words(self):
        """What the process said on stderr before it ended."""
        lines = []
        if self.stderr:
            self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 2000))
            lines = self.stderr.read().decode(errors="replace").split("\n")
        return " | ".join([line.strip() for line in lines + self.log.handlers[0].lines
                           if line.strip()][-3:])

    def close(self):
        """Close our ends."""
        for channel in ("iopub", "shell"):
            if channel in self.sockets:
                self.sockets[channel].disable_monitor()
        for each in self.sockets.values():
            each.close(linger=0)
        self.sockets = {}

    async def stop(self, grace):
        """Shut the kernel down, by force after `grace` seconds; leave no process
        and no file behind. An attached one runs on."""
        if self.manager is None or self.manager.provisioner is None:
            return
        self.manager.shutting_down = True
        try:
            if self.manager.has_kernel:
                if grace:
                    await self.manager.request_shutdown()
                    await asyncio.wait_for(self.manager.finish_shutdown(waittime=2 * grace), grace)
                else:
                    raise asyncio.TimeoutError
        except asyncio.TimeoutError:
            await asyncio.wait_for(self.manager.provisioner.kill(), 5)
            await asyncio.wait_for(self.manager.provisioner.wait(), 5)
        finally:
            await self.manager.cleanup_resources()
            if self.stderr:
                self.stderr.close()


async def stop_all(kernels, grace, limit=None):
    """Shut `kernels` down at the same time, within `limit` seconds; what fails
    for one stops no other."""
    stops = asyncio.gather(*[kernel.stop(grace) for kernel in kernels], return_exceptions=True)
    try:
        await asyncio.wait_for(stops, limit)
    except asyncio.TimeoutError:
        pass


# ---- a run ----------------------------------------------------------------

class Interrupts:
    """Counts Ctrl-C: the first one is for the kernels, the second for us."""

    def __init__(self):
        self.count, self.asking = 0, False

    def __enter__(self):
        try:
            self.previous = signal.signal(signal.SIGINT, self)
        except ValueError:  # not the main thread: Ctrl-C doesn't come here
            self.previous = None
        return self

    def __exit__(self, *_):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def __call__(self, signum, frame):
        self.count += 1
        if self.count > 1 or self.asking:
            raise KeyboardInterrupt


class Screen:
    """Shows here what kernels publish: unlabelled for one, else line by line
    under `label`."""

    def __init__(self, shell, labelled):
        self.shell, self.labelled = shell, labelled
        self.unfinished = {}
        self.file = sys.stdout
        self.bar = None  # whose line a \r left open
        self.status_id, self.status_text = None, ""

    def write(self, file, text):
        if self.status_text and self.status_id is None:
            sys.stderr.write("\r\x1b[K")
            self.status_text = ""
        if file is not self.file:
            self.file.flush()
            self.file = file
        try:
            file.write(text)
        except UnicodeEncodeError:  # a lone surrogate, say
            encoding = getattr(file, "encoding", None) or "ascii"
            file.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def stream(self, name, stream, text):
        file = sys.stderr if stream == "stderr" else sys.stdout
        if not self.labelled:
            self.write(file, text)
            return
        lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", self.unfinished.pop((name, stream), "") + text)
        self.unfinished[name, stream] = lines.pop()
        for line in lines:
            if self.bar not in (None, name):
                self.write(file, "\n")
            self.write(file, f"[{name}] {line}")
            self.bar = name if line.endswith("\r") else None

    def finish(self, name):
        """Show the unfinished lines of a kernel: what comes next isn't theirs."""
        for key in [key for key in self.unfinished if key[0] == name]:
            if self.unfinished[key]:
                self.stream(*key, "\n")
            self.unfinished.pop(key, None)

    def display(self, name, kind, content):
        data, transient = content["data"], content.get("transient") or {}
        update = kind == "update_display_data"
        if self.labelled and not update:
            self.finish(name)
            text = str(data.get("text/plain", ""))
            self.write(sys.stdout, label(name, text)[:-len(text) or None])
        self.flush()
        self.shell.display_pub.publish(
            data=data, metadata=content.get("metadata") or {}, transient=transient, update=update)

    def clear(self, content):
        self.shell.display_pub.clear_output(wait=bool(content.get("wait")))

    def error(self, name, text):
        self.finish(name)
        self.write(sys.stderr, (label(name, text) if self.labelled else text) + "\n")

    def flush(self):
        self.file.flush()

    def status(self, text):
        """One line, updated in place: a display in a notebook, else a terminal's."""
        if hasattr(self.shell, "kernel"):
            update = self.status_id is not None
            self.status_id = self.status_id or uuid.uuid4().hex
            self.shell.display_pub.publish(data={"text/plain": text}, metadata={}, update=update,
                                           transient={"display_id": self.status_id})
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()
        self.status_text = text

    def end_status(self, text):
        if self.status_text or self.status_id:
            self.status(text)
            if self.status_id is None and sys.stderr.isatty():
                sys.stderr.write("\n")
            self.status_text = ""


class Request:
    """One request to one kernel, and what has been heard of it.

    `hear` gives messages their meaning (Jupyter messaging protocol 5.3) and
    waits for nothing; the request is done when both its reply (shell) and the
    idle status after its outputs (iopub) have come, in whatever order.
    """

    def __init__(self, kernel, screen, kind="execute_request", code="", expression="",
                 buffers=None, silent=True, allow_stdin=False):
        self.kernel, self.screen, self.kind, self.buffers = kernel, screen, kind, buffers
        self.content = {} if kind == "kernel_info_request" else {
            "code": code, "silent": silent, "store_history": not silent,
            "user_expressions": {"remote_exec": expression} if expression else {},
            "allow_stdin": allow_stdin, "stop_on_error": False}
        self.msg_id = self.probe = None
        self.reply, self.idle, self.outputs, self.failure = None, False, None, None
        self.errors = []        # tracebacks published; the reply's own is one of them
        self.question = None    # an input_request that waits for its answer
        self.interrupt_answered = self.timed_out = False
        self.interrupted = self.signalled = None
        self.end = None         # future of `Kernel.end`, while that is asked
        self.ended = None       # seconds it took

    def send(self):
        self.sent = self.heard = self.pinged = time.monotonic()
        self.asked, self.ping = 0, None
        self.msg_id = self.kernel.send("shell", self.kind, self.content, self.buffers)
        self.buffers = None

    @property
    def done(self):
        return self.reply is not None and self.idle

    def hear(self, channel, message):
        """Take in a message. A malformed one is a failure, never an exception."""
        try:
            self._hear(channel, message)
        except Exception as error:
            self.failure = self.failure or Failure(
                "ProtocolError", f"{channel} message: {type(error).__name__}: {error}")

    def _hear(self, channel, message):
        kind, content, parent = (
            message["msg_type"], message["content"], message["parent_header"].get("msg_id"))
        ours = parent is not None and parent == self.msg_id
        if channel == "shell":
            if ours and self.reply is None:
                self.reply = {}
                self.reply = self._judge(dict(content))
            elif parent == self.probe and parent is not None:
                self.probe = None
                if self.reply is None:
                    self.reply, self.idle = {}, True
                    self.failure = Failure("LostReplyError", (
                        "the connection broke, and the reply was lost with it; the kernel "
                        "has its state and is free (-o without code fetches variables)"))
        elif channel == "control":
            self.interrupt_answered = self.interrupt_answered or kind == "interrupt_reply"
        elif channel == "stdin":
            if ours and kind == "input_request":
                self.question = (str(content["prompt"]), bool(content.get("password")))
        elif kind == "status":
            if content["execution_state"] == "idle" and parent and parent in (
                    self.msg_id, self.probe):
                self.idle = True
        elif kind == "comm_msg":
            if ours and content["comm_id"] == "remote_exec" and self.outputs is None:
                self.outputs = dict(content["data"]), list(message["buffers"])
        elif message["parent_header"].get("session") == self.kernel.client.session.session:
            self._show(kind, content, ours)

    def _judge(self, reply):
        """Note the failure that a reply or its user_expression tells of."""
        for part in (reply, dict(reply.get("user_expressions") or {}).get("remote_exec") or {}):
            if part.get("status", "ok") == "aborted":
                self.failure = self.failure or Failure(
                    "AbortedError", "the kernel dropped the code, since another client's failed "
                    "before it; nothing ran: run it again")
            elif part.get("status", "ok") != "ok":
                lines = part.get("traceback")
                self.failure = self.failure or Failure(
                    str(part.get("ename") or ""), str(part.get("evalue") or "failed"),
                    [str(line) for line in lines] if isinstance(lines, list) else [])
        for payload in reply.get("payload") or []:
            if payload.get("source") == "page":
                page.page(payload["data"]["text/plain"])
        return reply

    def _show(self, kind, content, ours):
        name = self.kernel.name
        if ours:
            self.show_errors()
        if kind == "stream":
            self.screen.stream(name, content["name"], content["text"])
        elif kind in ("display_data", "execute_result", "update_display_data"):
            self.screen.display(name, kind, content)
        elif kind == "clear_output":
            self.screen.clear(content)
        elif kind == "error" and ours:
            self.errors = [str(line) for line in content["traceback"]]
        elif kind == "error":
            self.screen.error(name, "\n".join(content["traceback"]))

    def show_errors(self):
        if self.errors:
            self.screen.error(self.kernel.name, "\n".join(self.errors))
        self.errors = []

    def listen(self, channel):
        """Take in what one socket has for us."""
        kernel = self.kernel
        if channel.startswith("closed"):
            kernel.sockets[channel].recv_multipart()
            kernel.broken, self.asked = True, 0
        elif channel == "hb":
            kernel.sockets[channel].recv()
            self.ping = None
        else:
            message = kernel.receive(channel)
            if message is not None:
                self.heard = time.monotonic()
                self.hear(channel, message)

    def drain(self, wait=0):
        """Take in all that has come by now, or comes within `wait` ms of it."""
        sockets = self.kernel.sockets
        for channel in sockets:
            # a closed connection is tried again and again: that has no end
            if channel.startswith("closed") and sockets[channel].poll(0):
                self.listen(channel)
        for channel in ("iopub", "shell", "control"):
            while sockets[channel].poll(wait):
                self.listen(channel)

    def interrupt(self):
        self.interrupted = time.monotonic()
        self.kernel.send("control", "interrupt_request", {})

    def watch(self, now):
        """Look after a silent request: is its kernel alive, was a reply lost?"""
        kernel, silent = self.kernel, now - self.heard
        if self.end is None and now - self.asked > 3 and (silent > 1 or kernel.broken):
            self.end, self.asked = in_thread(asyncio.wait_for(kernel.end(), 15)), now
        if self.end is not None and self.end.done():
            how = None if self.end.exception() else self.end.result()
            self.end = None
            if how:
                self.drain(200)
                if not self.done:
                    self.failure = Failure("DeadKernelError", (
                        f"the kernel died ({how}); the next cell that names it starts it anew"))
                    self.reply, self.idle = {}, True
                return
        half = (self.reply is not None) != self.idle
        patience = 1 if self.kind == "execute_request" else 0.3
        if (kernel.broken or half and silent > patience) and (
                self.probe is None or now - self.probed > 10):
            self.probe, self.probed = kernel.send("shell", "kernel_info_request", {}), now
            kernel.broken = False
        if silent > 2 and now - self.pinged > (2 if self.ping is None else 10):
            self.ping, self.pinged = self.ping or now, now
            try:
                kernel.sockets["hb"].send(b"ping", zmq.NOBLOCK)
            except zmq.Again:  # not connected
                pass
        if (self.interrupted and not self.interrupt_answered and not self.signalled
                and now - self.interrupted > 2):
            self.signalled = now
            kernel.signal_interrupt()

    def unanswered(self, now):
        """Seconds for which even the heartbeat has not been answered, if over 4."""
        return now - self.ping if self.ping and now - self.ping > 4 else 0

    def give_up(self, failure):
        self.failure = failure
        self.kernel.busy = self

    def answer(self, interrupts):
        """Ask here what the kernel asks (an input_request)."""
        prompt, password = self.question
        self.question = None
        self.screen.finish(self.kernel.name)
        self.screen.flush()
        prompt = f"[{self.kernel.name}] {prompt}" if self.screen.labelled else prompt
        interrupts.asking = True
        try:
            value = (getpass.getpass if password else builtins.input)(prompt)
        except EOFError:
            value = "\x04"
        except KeyboardInterrupt:
            interrupts.count = max(1, interrupts.count)
            return
        finally:
            interrupts.asking = False
        self.kernel.send("stdin", "input_reply", {"value": value})


def run(requests, interrupts, screen, timeout=None, grace=5.0, verb="waiting for"):
    """Send all `requests`, and return when each is done, dead or given up.

    After `timeout` seconds, the kernels still busy are interrupted, and given
    up `grace` seconds later; after a Ctrl-C they are interrupted and waited
    for (with no `grace`, given up). The second Ctrl-C gives all up. What came
    of it stands in the requests. Raises nothing.
    """
    poller, owners = zmq.Poller(), {}
    for request in requests:
        for channel, each in request.kernel.sockets.items():
            poller.register(each, zmq.POLLIN)
            owners[each] = request, channel
        request.send()
    begin, told, seen = time.monotonic(), time.monotonic(), interrupts.count
    waiting = list(requests)
    try:
        while waiting:
            for each, _ in poller.poll(100):
                request, channel = owners[each]
                # what was printed before a question stands before it
                if channel != "stdin" or not request.kernel.sockets["iopub"].poll(50):
                    request.listen(channel)
            now = time.monotonic()
            for request in waiting:
                if request.question:
                    request.answer(interrupts)
                if not request.done:
                    request.watch(now)
                if request.done or request.failure and request.kernel.busy is request:
                    request.ended = now - request.sent
                    screen.finish(request.kernel.name)
                    continue
                late = timeout is not None and now - request.sent > timeout
                if (late or interrupts.count > seen) and not request.interrupted:
                    request.timed_out = late
                    if grace:
                        request.interrupt()
                    else:
                        request.give_up(
                            Failure("TimeoutError", f"no answer in {timeout:g} s") if late
                            else Failure("KeyboardInterrupt", "interrupted"))
                elif request.timed_out and now - request.interrupted > grace:
                    request.give_up(Failure("TimeoutError", (
                        f"still busy after {timeout:g} s, and it ignores the interrupt; "
                        "-s replaces the kernel")))
            waiting = [request for request in waiting if request.ended is None]
            if now - told > 1:
                screen.flush()
                told = now
                silent = [f"{request.kernel.name} does not answer since " + time.strftime(
                    "%H:%M:%S", time.localtime(time.time() - request.unanswered(now)))
                    for request in waiting if request.unanswered(now)]
                if now - begin > 3 and waiting and (
                        len(requests) > 1 or silent or verb == "starting"):
                    screen.status(f"{verb} {', '.join(r.kernel.name for r in waiting)} "
                                  f"({now - begin:.0f} s)" + "".join(f"; {s}" for s in silent))
    except KeyboardInterrupt:
        for request in waiting:
            if request.ended is None:
                request.give_up(Failure("KeyboardInterrupt", "left busy; -s replaces the kernel"))
    for request in requests:
        request.ended = request.ended or time.monotonic() - request.sent
        if request.timed_out and request.failure and request.failure.ename == "KeyboardInterrupt":
            request.failure = request.failure._replace(
                ename="TimeoutError", evalue=f"still busy after {timeout:g} s; interrupted")
        if request.failure is None:
            request.show_errors()
        elif not request.failure.traceback:
            request.failure = request.failure._replace(traceback=request.errors)
    screen.end_status("; ".join(f"{r.kernel.name} {r.ended:.1f} s" for r in requests))
    screen.flush()


# ---- the magic ------------------------------------------------------------

class KernelNamespace:
    """What came back from one kernel: its attributes are the variables."""

    # the mangled slots leave every variable's name free
    __slots__ = ("__dict__", "__weakref__", "__name", "__spec")

    def __init__(self, name):
        self.__name, self.__spec = name, name

    def __repr__(self):
        return (f"<kernel {self.__name} ({self.__spec}): "
                f"{', '.join(dir(self)) or 'no variables yet'}>")

    def __dir__(self):
        return sorted(vars(self))

    def __getattr__(self, name):
        raise AttributeError(f"{self.__name} has no variable {name!r} here; "
                             f"there are: {', '.join(dir(self)) or 'none'}")


NAME, SPEC = "_KernelNamespace__name", "_KernelNamespace__spec"


@magics_class
class RemoteExecMagics(Magics):
    """The magic ``%remote_exec``, and the kernels that it started."""

    startup_timeout = Float(60, help="Seconds that a kernel may take to start.").tag(config=True)

    def __init__(self, shell, **options):
        super().__init__(shell, **options)
        self.kernels, self.namespaces, self.specs = {}, {}, {}
        self.context = zmq.Context(io_threads=2)
        self.context.rcvhwm = self.context.sndhwm = 0  # drop nothing, never block
        self.lock = threading.Lock()
        self.pid = os.getpid()

    @no_var_expand
    @needs_local_scope
    @line_cell_magic
    def remote_exec(self, line, cell=None, local_ns=None):
        """Run code on one or many Jupyter kernels, and bring variables back.

        ::

            %remote_exec [options] code
            %%remote_exec [options] [code]
            cell

        Options come first, `--` ends them; the rest is code, taken verbatim.

        -k, --kernels NAME[=SPEC][:DIRECTORY],...
            The kernels. NAME is the variable that will hold what comes back.
            SPEC picks the kernelspec: its name, a part of it that no other has,
            or with _ for anything; without SPEC, the last one that NAME had, or
            NAME itself. SPEC ending in .json is the connection file of a running
            kernel, which is used and never shut down. DIRECTORY is the working
            directory there, from now on. `-k {names}` takes the targets from a
            variable: a string, or a list of strings with any characters.
        -o, --output NAMES
            Variables to bring back, as NAME.variable.
        -i, --input NAMES
            Local variables put into the code wherever {variable} stands; one
            that is a dict is looked up by kernel NAME.
        -p, --push NAMES
            Local variables sent as objects, before the code runs.
        -s, --shutdown
            Shut the kernels down; with code, restart them and run it.
        -t, --timeout SECONDS
            Interrupt what is still busy then.
        -l, --list
            List the running kernels, and the kernelspecs there are.

        Kernels start when first named, work at the same time, and keep their
        state from cell to cell. Ctrl-C interrupts them; a second one gives the
        prompt back at once. What went wrong over there is a `RemoteError`,
        whose `.failures` maps NAME to (ename, evalue, traceback).

        Examples
        --------
        ::

            In [1]: %load_ext remote_exec

            In [2]: filenames = {'kernel1': 'a.txt', 'kernel2': 'b.txt'}

            In [3]: %%remote_exec -k kernel1:/data/run7,kernel2:/scratch -i filenames -o x,y
               ...: import numpy as np
               ...: x, y = np.loadtxt("{filenames}").T

            In [4]: plt.plot(kernel1.x, kernel1.y); plt.plot(kernel2.x, kernel2.y)

            In [5]: %remote_exec -k kernel1 -o total total = x.sum()

            In [6]: %remote_exec -k gpu=kernel-1234.json -p data -t 60 fit(data)

            In [7]: %remote_exec -k kernel1,kernel2 -s
        """
        if not self.lock.acquire(blocking=False):
            raise UsageError("another %remote_exec is still running in this session")
        try:
            with Interrupts() as interrupts:
                self._remote_exec(line, cell, local_ns or {}, interrupts)
        except KeyboardInterrupt as error:
            stopped = f"KeyboardInterrupt: {error}".rstrip(": ")
            final = KeyboardInterrupt(*error.args)
            final._render_traceback_ = lambda: [stopped]
            raise final from None
        finally:
            self.lock.release()

    def _remote_exec(self, line, cell, local_ns, interrupts):
        options, code = parse_line(line)
        code = "\n".join(part for part in (code, cell) if part)
        if "l" in options:
            print(self.listing())
            return
        targets = parse_targets(self.entries(options, local_ns))
        outputs, inputs, pushed = (
            parse_names(option, options[option]) if option in options else [] for option in "oip")
        runs = bool(code.strip())
        if "s" in options and (outputs or pushed) and not runs:
            raise UsageError("-s leaves no kernel for -o or -p, unless there is code to run")
        timeout = self.seconds(options["t"]) if "t" in options else None
        codes = self.codes(code, targets, {n: self.local(n, "i", local_ns) for n in inputs})
        push = {name: self.local(name, "p", local_ns) for name in pushed}
        only_stop = "s" in options and not runs
        specs = {} if only_stop else {
            target.name: self.spec(target, "s" in options) for target in targets}
        for target in targets:
            if not only_stop:
                self.check_name(target.name)

        screen = Screen(self.shell, len(targets) > 1)
        if "s" in options:
            self.stop([self.kernels.pop(t.name) for t in targets if t.name in self.kernels])
        if only_stop:
            return
        self.refresh(targets, screen, interrupts)
        self.start({name: spec for name, spec in specs.items() if name not in self.kernels},
                   screen, interrupts)
        kernels = [self.kernels[target.name] for target in targets]
        self.prepare(kernels, targets, push, outputs, screen, interrupts, timeout)
        for kernel in kernels:
            self.bind(kernel)
        if not (runs or outputs):
            return
        frontend = getattr(self.shell, "kernel", None)
        requests = [Request(
            kernel, screen, code=codes[kernel.name], silent=not runs,
            expression=remote_call("send", outputs, kernel.protocol) if outputs else "",
            allow_stdin=getattr(frontend, "_allow_stdin", True)) for kernel in kernels]
        run(requests, interrupts, screen, timeout)
        self.finish(requests, outputs, screen, interrupts, timeout)

    # what the options say

    def entries(self, options, local_ns):
        """The entries of -k, or of the local variable that it names in braces."""
        text = options.get("k")
        if not text:
            raise UsageError("-k NAME[=SPEC][:DIRECTORY],... says which kernels; %remote_exec? "
                             "shows all options")
        if not re.fullmatch(r"\{\w+\}", text):
            return text.split(",")
        value = self.local(text[1:-1], "k", local_ns)
        if isinstance(value, str):
            return re.split(r"[,\s]+", value.strip())
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
            return list(value)
        raise UsageError(f"-k {text}: needs a string or a list of strings, not {value!r:.60}")

    def local(self, name, option, local_ns):
        for namespace in (local_ns, self.shell.user_ns):
            if name in namespace:
                return namespace[name]
        raise UsageError(f"-{option}: there is no local variable {name!r}")

    @staticmethod
    def seconds(text):
        try:
            value = float(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise UsageError(f"-t: {text!r} is not a positive number of seconds")
        return value

    @staticmethod
    def codes(code, targets, values):
        """The code for each kernel, by NAME, with its inputs put in."""
        codes = {}
        for name in (target.name for target in targets):
            mine = {}
            for variable, value in values.items():
                if isinstance(value, dict):
                    if name not in value:
                        raise UsageError(f"-i: the dict {variable} has no key {name!r}")
                    value = value[name]
                try:
                    mine[variable] = str(value)
                except Exception as error:
                    raise UsageError(f"-i: str({variable}) fails: {error}") from None
            codes[name] = substitute(code, mine)
        return codes

    def spec(self, target, replace):
        """The full kernelspec name, or connection file, that a target means."""
        running = self.kernels.get(target.name)
        wanted = target.spec or self.specs.get(target.name, target.name)
        if running and (not target.spec or target.spec == running.spec):
            return running.spec
        if wanted.endswith(".json"):
            try:
                found = find_connection_file(os.path.expanduser(wanted))
            except OSError:
                raise UsageError(f"-k: there is no connection file {wanted!r}, neither here nor "
                                 f"in {jupyter_runtime_dir()}") from None
        else:
            found = match_spec(wanted, KernelSpecManager(config=self.shell.config)
                               .find_kernel_specs())
        if running and running.spec != found and not replace:
            raise UsageError(f"{target.name} runs {running.spec}; -s replaces it by {found}, or "
                             f"choose another name for that")
        return found

    def check_name(self, name):
        """UsageError if `name` means something else to the user."""
        value = self.shell.user_ns.get(name, getattr(builtins, name, None))
        known = name in self.shell.user_ns or hasattr(builtins, name)
        if known and getattr(value, NAME, None) != name:
            raise UsageError(f"{name} is already something else here ({type(value).__name__}); "
                             f"choose another name, like my_{name}={name}")

    def bind(self, kernel):
        """Make NAME the kernel's namespace, the same object as ever."""
        namespace = self.shell.user_ns.get(kernel.name) or self.namespaces.get(
            kernel.name) or KernelNamespace(kernel.name)
        setattr(namespace, SPEC, kernel.spec)
        self.namespaces[kernel.name] = self.shell.user_ns[kernel.name] = namespace

    # what happens to kernels

    def refresh(self, targets, screen, interrupts):
        """Show late output, and forget kernels that died since the last call."""
        known = [self.kernels[t.name] for t in targets if t.name in self.kernels]
        suspects = []
        for kernel in known:
            past = kernel.busy or Request(kernel, screen)
            past.screen, past.failure, past.heard, past.asked = screen, None, 0, 0
            past.question = None
            past.drain()
            screen.finish(kernel.name)
            if kernel.broken or kernel.process and kernel.process.poll() is not None:
                kernel.busy = None
                suspects.append(Request(kernel, screen, "kernel_info_request"))
            elif kernel.busy and not kernel.busy.done:
                raise UsageError(f"{kernel.name} is still busy with an earlier cell; wait for it, "
                                 "or replace the kernel with -s")
            kernel.busy = None
        run(suspects, interrupts, screen, self.startup_timeout, grace=0, verb="reconnecting")
        for request in suspects:
            kernel = request.kernel
            if request.failure and request.failure.ename == "DeadKernelError":
                why = request.failure.evalue.partition("(")[2].partition(")")[0]
                screen.write(sys.stderr, f"{kernel.name} had died ({why}) and is started anew\n")
                self.discard(kernel)
            elif request.failure:
                self.fail({kernel.name: request.failure}, screen)

    def start(self, specs, screen, interrupts):
        """Start the kernels that `specs` gives by NAME, all at once; RemoteError
        names those that can't be, the others stay."""
        begin, kernels, launches, failures = time.monotonic(), {}, {}, {}
        for name, spec in specs.items():
            kernels[name] = Kernel(name, spec, self.context, self.shell.config)
            if not kernels[name].attached:
                launches[name] = in_thread(kernels[name].launch())
        while not all(launch.done() for launch in launches.values()):
            concurrent.futures.wait(launches.values(), timeout=0.1)
            spent = time.monotonic() - begin
            if interrupts.count or spent > self.startup_timeout:
                break
            if spent > 3:
                screen.status(f"starting {', '.join(n for n in launches if not launches[n].done())}"
                              f" ({spent:.0f} s)")
        requests = []
        for name, kernel in kernels.items():
            launch = launches.get(name)
            try:
                if launch:
                    launch.result(timeout=0)
                kernel.connect()
                requests.append(Request(kernel, screen, "kernel_info_request"))
            except concurrent.futures.TimeoutError:
                failures[name] = self.start_failure()
                launch.add_done_callback(lambda _, kernel=kernel: asyncio.run(kernel.stop(0)))
            except Exception as error:
                failures[name] = Failure(type(error).__name__, ": ".join(
                    part for part in (f"could not start: {error}", kernel.last_words()) if part))
        left = max(0.1, self.startup_timeout - (time.monotonic() - begin))
        run(requests, interrupts, screen, left, grace=0, verb="starting")
        ready = []
        for request in requests:
            info = (request.reply or {}).get("language_info")
            request.kernel.language = str((info or {}).get("name", "?"))
            if not request.failure and request.kernel.language == "python":
                ready.append(Request(request.kernel, screen, code=setup_code(),
                                     expression="__import__('_remote_exec').pickle.HIGHEST_PROTOCOL"))
        run(ready, interrupts, screen, left, grace=0, verb="starting")
        for request in ready:
            expression = ((request.reply or {}).get("user_expressions") or {}).get("remote_exec")
            if not request.failure and expression:
                request.kernel.protocol = min(
                    int(expression["data"]["text/plain"]), pickle.HIGHEST_PROTOCOL)
        for request in requests + ready:
            if request.failure and request.failure.ename == "DeadKernelError":
                time.sleep(0.05)  # its last words may still be on their way to the file
                how = request.failure.evalue.partition("(")[2].rpartition(")")[0]
                words = request.kernel.last_words()
                failures[request.kernel.name] = Failure("DeadKernelError", (
                    f"could not start: {how}" + (f": {words}" if words else "")))
            elif request.failure:
                failures[request.kernel.name] = (
                    self.start_failure() if request.failure.ename == "TimeoutError"
                    else request.failure)
        for name, kernel in kernels.items():
            kernel.busy = None
            if name in failures:
                self.discard(kernel)
            else:
                self.kernels[name], self.specs[name] = kernel, kernel.spec
        if interrupts.count:
            raise KeyboardInterrupt(f"{', '.join(failures) or 'kernels'} not started")
        self.fail({name: failures[name] for name in specs if name in failures}, screen)

    def start_failure(self):
        return Failure("TimeoutError", f"could not start: not ready after {self.startup_timeout:g}"
                                       " s (c.RemoteExecMagics.startup_timeout)")

    def prepare(self, kernels, targets, push, outputs, screen, interrupts, timeout):
        """Directories and pushed variables; RemoteError if any can't be."""
        wanted = [(kernel, target.directory) for kernel, target in zip(kernels, targets)
                  if target.directory or push]
        for kernel, target in zip(kernels, targets):
            if kernel.protocol is None and (target.directory or push or outputs):
                raise UsageError(f"{kernel.name} runs {kernel.language}: -o, -p and :DIRECTORY "
                                 "need a Python kernel")
        packed = {}
        for kernel, _ in wanted:
            if push and kernel.protocol not in packed:
                packed[kernel.protocol] = self.pack(push, kernel.protocol)
        requests = [Request(kernel, screen, buffers=packed.get(kernel.protocol), expression=(
            remote_call("prepare", directory, bool(push), versions())))
            for kernel, directory in wanted]
        run(requests, interrupts, screen, timeout)
        self.conclude(requests, screen, interrupts)

    @staticmethod
    def pack(push, protocol):
        try:
            return pack(push, protocol)
        except Exception as failed:
            for name, value in push.items():
                try:
                    pack({name: value}, protocol)
                except Exception as error:
                    raise UsageError(f"-p: {name} can't be pickled: {error}") from None
            raise UsageError(f"-p: {failed}") from None

    def finish(self, requests, outputs, screen, interrupts, timeout):
        """Bring the outputs into the namespaces, then tell what went wrong."""
        for request in requests:
            if outputs and not request.failure:
                problems = self.load(request, outputs, screen, interrupts, timeout)
                if problems:
                    first, *others = problems
                    request.failure = Failure(first.ename, "; ".join(
                        [first.evalue, *map(str, others)]))
        self.conclude(requests, screen, interrupts)

    def load(self, request, names, screen, interrupts, timeout):
        """Unpickle a request's outputs; returns the failures. What can't be
        loaded together is fetched again one by one."""
        kernel = request.kernel
        try:
            data, buffers = request.outputs
            request.outputs = None
            values = unpack(buffers, data.get("versions"))
            vars(self.namespaces[kernel.name]).update(
                {name: values[name] for name in names if name in values})
            return [Failure(str(ename), str(evalue)) for ename, evalue in data["failures"]]
        except Exception as error:
            if len(names) == 1:
                return [Failure(type(error).__name__, f"{names[0]} can't be loaded here: {error}")]
        problems = []
        for name in names:
            again = Request(kernel, screen, expression=remote_call("send", [name], kernel.protocol))
            run([again], interrupts, screen, timeout)
            problems += [again.failure] if again.failure else self.load(
                again, [name], screen, interrupts, timeout)
        return problems

    def conclude(self, requests, screen, interrupts):
        """Raise what the requests, taken together, come to."""
        failures = {r.kernel.name: r.failure for r in requests if r.failure}
        for request in requests:
            if request.failure and request.failure.ename == "DeadKernelError":
                self.discard(request.kernel)
        if interrupts.count:
            stopped = [n for n, f in failures.items() if f.ename == "KeyboardInterrupt"]
            others = {n: f for n, f in failures.items() if n not in stopped}
            if others:
                error = RemoteError(others, screen.labelled)
                screen.write(sys.stderr, "\n".join(error._render_traceback_()) + "\n")
            busy = [r.kernel.name for r in requests if r.kernel.busy]
            raise KeyboardInterrupt(
                f"{', '.join(stopped) or 'no kernel'} stopped" + (
                    f"; {', '.join(busy)} still busy, -s replaces" if busy else ""))
        self.fail(failures, screen)

    @staticmethod
    def fail(failures, screen):
        if failures:
            raise RemoteError(failures, screen.labelled)

    def discard(self, kernel):
        """Forget a dead kernel; what is left of it is cleared away meanwhile."""
        self.kernels.pop(kernel.name, None)
        kernel.close()
        in_thread(kernel.stop(0))

    @staticmethod
    def stop(kernels, grace=2.5):
        """Shut `kernels` down, and wait for it."""
        for kernel in kernels:
            kernel.close()
        if kernels:
            ending = in_thread(stop_all(kernels, grace))
            while not ending.done():
                concurrent.futures.wait([ending], timeout=0.1)

    def close(self):
        """Shut everything down, within two seconds: the end of the session."""
        kernels, self.kernels = list(self.kernels.values()), {}
        if os.getpid() != self.pid:  # a forked child: these are its parent's
            for kernel in kernels:
                if kernel.manager:
                    kernel.manager.connection_file = ""
            return
        for kernel in kernels:
            kernel.close()
        if kernels:
            try:
                asyncio.get_running_loop()
            except RuntimeError:  # the end of the process, which may refuse new threads
                asyncio.run(stop_all(kernels, 1, limit=2))
            else:
                self.stop(kernels, 1)

    # what helps the user

    def listing(self):
        lines = ["running kernels:"]
        for name, kernel in self.kernels.items():
            past = kernel.busy
            if past:
                past.drain()
            state = ("dead" if kernel.process and kernel.process.poll() is not None else
                     "busy" if past and not past.done else "idle")
            lines.append(f"  {name}  {kernel.spec}  {state}")
        if not self.kernels:
            lines.append("  none")
        specs = KernelSpecManager(config=self.shell.config).find_kernel_specs()
        return "\n".join([*lines, "kernelspecs:", *(f"  {spec}" for spec in sorted(specs))])

    def complete(self, event):
        """Options, and after -k the names of kernels and kernelspecs."""
        before = event.text_until_cursor if hasattr(event, "text_until_cursor") else event.line
        words = before.split()
        last = words[-1] if before[-1:].strip() else ""
        previous = words[-2] if last and len(words) > 1 else words[-1]
        if last.startswith("-"):
            letters = ["-" + letter for letter in SHORT.replace(":", "")]
            return letters + ["--" + name.rstrip("=") for name in LONG]
        if previous in ("-k", "--kernels"):
            specs = sorted(KernelSpecManager(config=self.shell.config).find_kernel_specs())
            return specs if "=" in last.rpartition(",")[2] else [*self.kernels, *specs]
        return []


def load_ipython_extension(ipython):
    """Register the magic; its kernels end with the session."""
    magics = RemoteExecMagics(ipython)
    ipython.register_magics(magics)
    for magic in ("%remote_exec", "%%remote_exec"):
        ipython.set_hook("complete_command", lambda _, event: magics.complete(event), str_key=magic)
    atexit.register(magics.close)
    if hasattr(ipython, "kernel"):
        publish_all(ipython.kernel)


def unload_ipython_extension(ipython):
    """Shut the kernels down, and take the magic away."""
    magics = ipython.magics_manager.registry.pop("RemoteExecMagics")
    for kind in ("line", "cell"):
        ipython.magics_manager.magics[kind].pop("remote_exec", None)
    for magic in ("%remote_exec", "%%remote_exec"):
        ipython.strdispatchers["complete_command"].strs.pop(magic, None)
    atexit.unregister(magics.close)
    magics.close()
