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
import contextlib
import difflib
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
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import uuid
from typing import NamedTuple

import zmq
import zmq.asyncio
from IPython import get_ipython
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
            text = "\n".join(failure.traceback)
            if not text or failure.ename not in text:
                text += ("\n" if text else "") + str(failure)
            shown += [*(label(name, text) if self.labelled else text).split("\n"), ""]
        return shown[:-1]


def label(name, text):
    """`text` under the name of its kernel: on its line, or above its lines."""
    return f"[{name}] " + ("\n" if "\n" in text else "") + text


# ---- the remote side ------------------------------------------------------
# The source of these functions goes to every Python kernel, from 2.7 on, into
# a module of its own; those that pickle serve on this side too.

REMOTE_IMPORTS = "import io, os, pickle, sys\nfrom IPython import get_ipython\n"
IN_BAND = 65536  # bytes; a message frame of its own costs more than copying less


class NoMain(pickle.Unpickler):
    """Refuses what pickle wrote as a reference to the sender's session."""

    def find_class(self, module, name):
        if module == "__main__":
            raise pickle.PicklingError("%s is defined in __main__" % name)
        return pickle.Unpickler.find_class(self, module, name)


def pack(values, protocol):
    """A list: the pickle of `values`, and its out-of-band buffers (PEP 574).

    What plain pickle can't take, or writes as a reference to the session, is
    for cloudpickle, where that is installed. Raises whatever pickling raises.
    """
    buffers = []

    def in_band(buffer):
        view = buffer.raw()
        if view.nbytes >= IN_BAND:
            buffers.append(view)
        return view.nbytes < IN_BAND

    options = {"buffer_callback": in_band} if protocol >= 5 else {}
    try:
        data = pickle.dumps(values, protocol, **options)
        if b"__main__" in data:
            NoMain(io.BytesIO(data), **({"buffers": buffers} if buffers else {})).load()
    except Exception as error:
        try:
            import cloudpickle
        except ImportError:
            if "__main__" in str(error) or "<locals>" in str(error):
                raise pickle.PicklingError(
                    "%s; installing cloudpickle on both sides would do it" % error)
            raise error
        del buffers[:]
        data = cloudpickle.dumps(values, protocol, **options)
    return [data] + buffers


def pack_each(values, protocol):
    """(what `pack` returns, failures): all of the dict `values` that can be
    pickled, in one pickle, so that what they share stays shared."""
    try:
        return pack(values, protocol), []
    except Exception:
        good, failures = {}, []
        for name in values:
            try:
                pack({name: values[name]}, protocol)
                good[name] = values[name]
            except Exception as error:
                failures.append([type(error).__name__, "%s: %s" % (name, error)])
        return pack(good, protocol), failures


def unpack(buffers, there):
    """The dict that `pack` was given; `there` is the sender's `versions`.
    Raises whatever unpickling raises."""
    def load():
        if sys.version_info < (3,):
            return pickle.loads(memoryview(buffers[0]).tobytes())
        options = {"buffers": buffers[1:]} if len(buffers) > 1 else {}
        return pickle.loads(buffers[0], encoding="latin1", **options)

    try:
        try:
            return load()
        except ImportError as error:
            if "No module named _core" not in str(error).replace("'", "").replace("numpy.", ""):
                raise
            import numpy.core.numeric  # noqa: F401  (numpy 2 writes _core for core)
            for part in ("", ".multiarray", ".numeric"):
                sys.modules["numpy._core" + part] = sys.modules["numpy.core" + part]
            return load()
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
    shell = get_ipython()
    if directory:
        if not os.path.isdir(directory):
            directory = os.path.expandvars(os.path.expanduser(directory))
        os.chdir(directory)
    if pushed:
        try:
            parent = shell.kernel.get_parent()
        except AttributeError:  # before ipykernel 6
            parent = shell.kernel._parent_header
        shell.user_ns.update(unpack(parent["buffers"], there))


def send(names, protocol, copy):
    """Publish the variables `names` as buffers of one comm message. Those that
    can't go are named, with the reason, in the message's data. A `copy` is for
    kernels whose other clients may change them before ZMQ has sent them."""
    namespace = get_ipython().user_ns
    parts, failures = pack_each(
        {str(name): namespace[name] for name in names if name in namespace}, protocol)
    failures += [["NameError", "name '%s' is not defined" % name]
                 for name in names if name not in namespace]
    if copy:
        parts = [bytes(part) for part in parts]
    try:
        from comm import create_comm
    except ImportError:  # before ipykernel 6
        from ipykernel.comm import Comm as create_comm
    comm = create_comm(target_name="remote_exec", primary=False)
    comm.send({"remote_exec": failures, "versions": versions()}, buffers=parts)


def publish_all(kernel):
    """Lift ZMQ's limit of 1000 queued messages, past which outputs are dropped."""
    thread = getattr(getattr(kernel, "iopub_socket", None), "io_thread", None)
    if thread is not None:
        thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0))


def setup_code():
    """Code that makes the remote side's module, and adds `pickle` and `os` to
    the user's namespace and nothing else."""
    source = REMOTE_IMPORTS + f"IN_BAND = {IN_BAND}\n" + "\n".join(map(inspect.getsource, (
        NoMain, pack, pack_each, unpack, versions, prepare, send, publish_all)))
    return (
        "import os, pickle\n"
        f"exec(compile({ascii(source)}, '<remote_exec>', 'exec'), "
        "__import__('sys').modules.setdefault('_remote_exec', "
        "__import__('types').ModuleType('_remote_exec')).__dict__)\n"
        "__import__('_remote_exec').publish_all(get_ipython().kernel)")


def remote_call(function, *arguments):
    """Expression that calls a function of the remote side, in any Python."""
    return (f"__import__('_remote_exec').{function.__name__}"
            f"(*__import__('json').loads({json.dumps(arguments)!r}))")


# ---- options and targets --------------------------------------------------

SHORT, LONG = "k:o:i:p:t:sl", [
    "kernels=", "output=", "input=", "push=", "timeout=", "shutdown", "list"]


def parse_line(line):
    """(options, code) of a magic's line; the code verbatim.

    `options` maps the short letter to its argument; lists given twice add up.
    """
    words = line.split()
    try:
        pairs, rest = getopt.getopt(words, SHORT, LONG)
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; `--` ends the options, %remote_exec? shows them all") from None
    options = {}
    for option, value in pairs:
        letter = option.lstrip("-")[0]
        adds_up = letter in "koip" and letter in options
        options[letter] = options[letter] + "," + value if adds_up else value
    return options, line.split(None, len(words) - len(rest))[-1] if rest else ""


def parse_names(option, text):
    """The variable names of an option's comma-separated argument."""
    # Python's names are in this form (Language Reference, 2.3); `{name}` stands as written
    names = (text if option == "i" else unicodedata.normalize("NFKC", text)).split(",")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"-{option}: {name!r} is not a variable's name; "
                             "separate names by commas, without blanks")
    return list(dict.fromkeys(names))


def parse_targets(entries):
    """(NAME, SPEC, DIRECTORY) of each entry; UsageError for a bad or repeated NAME."""
    targets = {}
    for entry in entries:
        head, _, directory = entry.partition(":")
        name, equals, spec = unicodedata.normalize("NFKC", head).partition("=")
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"-k: {name!r} is not a variable's name; "
                             "write NAME[=SPEC][:DIRECTORY],... without blanks")
        if equals and not spec:
            raise UsageError(f"-k: no kernelspec after {head!r}")
        if name in targets:
            raise UsageError(f"-k: {name} stands there twice; give the second "
                             f"another name, like {name}2={spec or 'SPEC'}")
        targets[name] = name, spec, directory
    return list(targets.values())


def parse_seconds(text):
    """The time-out that `text` gives; UsageError unless it is above 0 and finite."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"-t: {text!r} is not a positive number of seconds")
    return seconds


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
    closest = difflib.get_close_matches(wanted.lower(), sorted(specs), len(specs) + 1, cutoff=0)
    raise UsageError(f"no kernelspec matches {wanted!r}; NAME=SPEC takes one of: "
                     f"{', '.join(closest)}")


def substitute(code, name, values):
    """`code` for kernel `name`, with each ``{variable}`` of `values` replaced in
    one exact pass. UsageError where a dict has no key `name`, or str() fails."""
    texts = {}
    for variable, value in values.items():
        if isinstance(value, dict) and name not in value:
            raise UsageError(f"-i: the dict {variable} has no key {name!r}")
        try:
            texts[variable] = str(value[name] if isinstance(value, dict) else value)
        except Exception as error:
            raise UsageError(f"-i: str({variable}) fails: {error}") from None
    return re.sub(r"\{(%s)\}" % "|".join(map(re.escape, texts)),
                  lambda match: texts[match.group(1)], code) if texts else code


# ---- a kernel -------------------------------------------------------------

class Kernel:
    """A kernel: its manager, where it was started here, and the sockets to it."""

    def __init__(self, name, spec, context, config):
        self.name, self.spec, self.context, self.config = name, spec, context, config
        self.attached = spec.endswith(".json")
        self.manager = self.client = self.language = None
        self.protocol = None  # pickle's highest over there; None: not Python
        self.ready = False    # the remote side is there
        self.sockets = {}
        self.request = None   # the last one
        self.broken = False   # its connection was closed since we last heard from it
        self.end = None       # future of `ended`, while that is asked
        self.stderr = tempfile.TemporaryFile("w+", errors="backslashreplace")
        # a loop of its own, in a thread of its own: a provisioner may block for long
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.serve, daemon=True, name=f"remote_exec {name}").start()
        self.launched = self.later(self.launch())

    def serve(self):
        self.loop.run_forever()
        self.loop.close()

    def later(self, coroutine):
        """Future of `coroutine`, which runs in the kernel's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def launch(self):
        """Start the process. Raises what the kernel's provisioner raises."""
        if self.attached:
            return
        os.makedirs(jupyter_runtime_dir(), mode=0o700, exist_ok=True)
        config = Config()
        if zmq.has("curve"):  # what an older jupyter_client has no use for, it ignores
            config.KernelManager.transport_encryption = "auto"
        config.merge(self.config)
        log = logging.Logger("remote_exec", logging.CRITICAL + 1)  # the terminal is the user's
        self.manager = AsyncKernelManager(
            kernel_name=self.spec, config=config, log=log,
            context=zmq.asyncio.Context.shadow(self.context.underlying),
            connection_file=os.path.join(jupyter_runtime_dir(), f"kernel-{uuid.uuid4()}.json"))
        # here a kernel's own output would show a second time, and unlabelled
        await self.manager.start_kernel(stdout=subprocess.DEVNULL, stderr=self.stderr)

    def connect(self):
        """Open the sockets, by what the connection file says."""
        self.client = KernelClient(context=self.context, connection_file=(
            self.spec if self.attached else self.manager.connection_file))
        self.client.load_connection_file()
        self.sockets = {channel: getattr(self.client, "connect_" + channel)(
            identity=self.client.session.bsession)
            for channel in ("iopub", "shell", "stdin", "control", "hb")}
        self.sockets["hb"].setsockopt(zmq.REQ_RELAXED, 1)
        self.sockets["closed"] = self.sockets["shell"].get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def send(self, channel, kind, content, buffers=None):
        """Send a message; returns its id."""
        return self.client.session.send(
            self.sockets[channel], kind, content, buffers=buffers)["header"]["msg_id"]

    def sending(self, names):
        """Expression that has the variables `names` sent."""
        return remote_call(send, names, self.protocol, self.attached)

    def submit(self, request):
        """Send a request; the messages are for it from now on. It fails at once
        where the kernel could not be launched, or the request can't be encoded."""
        self.request = request
        request.heard = request.pinged = time.monotonic()
        try:
            self.launched.result()
            if not self.sockets:
                self.connect()
            request.msg_id = self.send("shell", request.kind, request.content, request.buffers)
            request.buffers = None
        except Exception as error:
            request.give_up(type(error).__name__, str(error))

    def listen(self, channel):
        """Take in what a socket has, up to 100 messages. What isn't signed with
        this kernel's key, or isn't a message, is as if it had never come."""
        if channel == "closed":
            self.sockets[channel].recv_multipart()
            self.broken, self.request.asked = True, 0
            return
        self.request.heard = time.monotonic()
        if channel == "hb":
            self.sockets[channel].recv()
            self.request.ping = None
            return
        for _ in range(100):
            try:
                message = self.client.session.recv(self.sockets[channel], copy=False)[1]
            except Exception:
                continue
            if message is None:
                return
            self.request.hear(channel, message)

    def drain(self, wait=0):
        """Take in all that has come by now, or comes within `wait` ms of it."""
        if self.sockets["closed"].poll(0):  # may be opened and closed for ever
            self.listen("closed")
        for channel in ("iopub", "shell", "control"):
            while self.sockets[channel].poll(wait):
                self.listen(channel)

    def catch_up(self, screen):
        """Show what an earlier request printed late."""
        self.request.screen = screen
        self.drain()
        screen.finish(self.name)

    def watch(self, now):
        """Look after a kernel whose request is not done: does it live, does the
        network, was a reply lost?"""
        request = self.request
        silent = now - request.heard
        if self.end is None and now - request.asked > 3 and (silent > 1 or self.broken):
            self.end, request.asked = self.later(self.ended()), now
        if self.end is not None and self.end.done():
            how = None if self.end.exception() else self.end.result()
            self.end = None
            if how:
                self.drain(200)
                request.die(how)
                return
        # replies come in order: that of a later request tells that ours was lost
        half = (request.reply is not None) != request.idle
        patience = 1 if request.kind == "execute_request" else 0.3
        if (self.broken or half and silent > patience) and now - request.probed > 10:
            request.probe, request.probed = self.send("shell", "kernel_info_request", {}), now
            self.broken = False
        if silent > 2 and now - request.pinged > (2 if request.ping is None else 10):
            request.ping, request.pinged = request.ping or now, now
            try:
                self.sockets["hb"].send(b"ping", zmq.NOBLOCK)
            except zmq.Again:  # not connected
                pass
        if request.interrupted and not request.interrupt_answered and now - request.interrupted > 2:
            request.interrupt_answered = True  # ipykernel before 6 heeds the signal alone
            if not self.attached:
                self.later(self.manager.signal_kernel(signal.SIGINT))

    @property
    def busy(self):
        """Whether it may still run a request that was given up."""
        return self.request.msg_id is not None and not self.request.done

    @property
    def process(self):
        """The local process, where the kernel's provisioner has one."""
        return getattr(getattr(self.manager, "provisioner", None), "process", None)

    @property
    def exited(self):
        """Whether its local process has ended."""
        return self.process is not None and self.process.poll() is not None

    async def ended(self):
        """How the kernel ended, or None while it runs. May take long."""
        if self.attached:
            try:
                socket.create_connection((self.client.ip, self.client.shell_port), 5).close()
            except ConnectionRefusedError:
                return "nothing listens at its address"
            except OSError:
                pass
            return None
        process = self.process  # the provisioner may forget it once it has ended
        if await self.manager.is_alive():
            return None
        code = getattr(process, "returncode", None)
        if code is None:
            return "its process is gone"
        names = {-each: f"killed by {each.name}" for each in signal.Signals}
        return names.get(code, f"exit code {code}")

    def last_words(self):
        """What the process said on stderr at the end: it explains a failed start."""
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 2000))
        return " | ".join([line.strip() for line in self.stderr if line.strip()][-3:])

    def stop(self, grace):
        """Future of the kernel's end, which takes up to `grace` seconds if it
        heeds the request, and leaves no process and no file behind."""
        if self.sockets:
            self.sockets["shell"].disable_monitor()
        for each in self.sockets.values():
            each.close(linger=0)
        self.sockets = {}
        future = self.later(self.shut_down(grace))
        future.add_done_callback(lambda _: self.loop.call_soon_threadsafe(self.loop.stop))
        return future

    async def shut_down(self, grace):
        """Shut the kernel down, by force after `grace` seconds; an attached one
        runs on."""
        await asyncio.gather(asyncio.wrap_future(self.launched), return_exceptions=True)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        provisioner = getattr(self.manager, "provisioner", None)
        if provisioner is None:
            return
        self.manager.shutting_down = True
        try:
            if grace:
                await self.manager.request_shutdown()
            ended = asyncio.ensure_future(provisioner.wait())
            if not (await asyncio.wait([ended], timeout=grace))[0]:
                await asyncio.wait_for(provisioner.kill(), 5)
                await asyncio.wait_for(ended, 5)
        finally:
            await self.manager.cleanup_resources()
            self.stderr.close()


# ---- a run ----------------------------------------------------------------

class Screen:
    """Shows here what kernels publish: unlabelled for one, else line by line
    under `label`."""

    def __init__(self, shell, labelled):
        self.shell, self.labelled = shell, labelled
        self.file = sys.stdout
        self.unfinished = {}         # text without a line's end, by (kernel, stream)
        self.bar, self.since = None, 0  # whose line a \r left open, and when it got its turn
        self.status_id = self.status_text = None

    def write(self, file, text):
        if self.status_text and not self.status_id:
            sys.stderr.write("\r\x1b[K")
            self.status_text = None
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
        text = self.unfinished.pop((name, stream), "") + text
        lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
        rest, now = lines.pop(), time.monotonic()
        if lines and lines[-1].endswith("\r") and self.bar not in (None, name) and (
                now - self.since < 1):
            # progress bars take turns; what one does meanwhile, it would overwrite
            rest = lines.pop() + rest
            lines = [line for line in lines if not line.endswith("\r")]
        self.unfinished[name, stream] = rest
        for line in lines:
            bar = name if line.endswith("\r") else None
            if self.bar not in (None, name):
                self.write(self.file, "\n")
            if bar != self.bar:
                self.since = now
            self.write(file, f"[{name}] {line}")
            self.bar = bar

    def finish(self, name):
        """Show the unfinished lines of a kernel: what comes next isn't theirs."""
        self.since = 0
        for key in [key for key in self.unfinished if key[0] == name]:
            if self.unfinished[key]:
                self.stream(*key, "\n")
            del self.unfinished[key]

    def display(self, name, kind, content):
        data, update = content["data"], kind == "update_display_data"
        if self.labelled and not update:
            self.finish(name)
            one_line = "\n" not in str(data.get("text/plain", "\n"))
            self.write(sys.stdout, f"[{name}]" + (
                " " if one_line and not hasattr(self.shell, "kernel") else "\n"))
        self.file.flush()
        transient = dict(content.get("transient") or {})
        if "display_id" in transient:  # two kernels may choose the same
            transient["display_id"] = f"{name} {transient['display_id']}"
        self.shell.display_pub.publish(data=data, metadata=content.get("metadata") or {},
                                       transient=transient, update=update)

    def clear(self, wait):
        self.unfinished.clear()
        self.status_id = self.status_text = None  # the line of a notebook goes with the rest
        self.shell.display_pub.clear_output(wait=wait)

    def error(self, name, lines):
        self.finish(name)
        text = "\n".join(lines)
        self.write(sys.stderr, (label(name, text) if self.labelled else text) + "\n")

    def status(self, text, last=False):
        """One line, updated in place: a display in a notebook, else a terminal's.
        The `last` one is for where there was one before."""
        if last and not self.status_text:
            return
        if hasattr(self.shell, "kernel"):
            update, self.status_id = bool(self.status_id), self.status_id or uuid.uuid4().hex
            self.shell.display_pub.publish(data={"text/plain": text}, metadata={}, update=update,
                                           transient={"display_id": self.status_id})
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{text}\x1b[K" + ("\n" if last else ""))
            sys.stderr.flush()
        self.status_text = None if last else text


class Request:
    """One request to one kernel, and what is heard of it.

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
        self.errors = []       # a traceback that was published; the reply may repeat it
        self.question = None   # an input_request that waits for its answer
        self.heard = self.pinged = 0  # when a message last came, and a heartbeat was sent
        self.asked = self.probed = 0  # when we asked for the kernel's end, and sent a probe
        self.ping = None              # when the heartbeat that was not answered was sent
        self.interrupted = None       # when an interrupt was due
        self.interrupt_answered = self.late = self.given_up = False
        self.died = None       # how the kernel did
        self.took = None       # seconds

    @property
    def done(self):
        return self.reply is not None and self.idle

    def fail(self, ename, evalue, traceback=()):
        self.failure = self.failure or Failure(ename, evalue, list(traceback))

    def give_up(self, ename, evalue):
        """Wait no longer; the kernel may stay busy with it."""
        self.fail(ename, evalue)
        self.given_up = True

    def die(self, how):
        """There is no kernel any more that could answer."""
        if not self.done:
            self.died, self.reply, self.idle = how, {}, True
            self.failure = Failure("DeadKernelError", f"the kernel died ({how}); " + (
                "it was not started here" if self.kernel.attached else
                "the next cell that names it starts it anew"))

    def hear(self, channel, message):
        """Take in a message. A malformed one is a failure, never an exception."""
        try:
            kind, content = message["msg_type"], message["content"]
            parent = message["parent_header"] or {}
            if channel == "shell":
                self.hear_shell(content, parent.get("msg_id"))
            elif channel == "iopub":
                self.hear_iopub(kind, content, parent, message["buffers"])
            elif kind == "interrupt_reply":
                self.interrupt_answered = True
            elif kind == "input_request" and parent.get("msg_id") == self.msg_id:
                self.question = str(content["prompt"]), bool(content.get("password"))
        except Exception as error:
            self.fail("ProtocolError", f"{channel} message: {type(error).__name__}: {error}")

    def hear_shell(self, content, msg_id):
        """A reply: to the request, or to a probe that was sent after it."""
        if msg_id and msg_id == self.msg_id and self.reply is None:
            self.reply = {}
            expressions = dict(content.get("user_expressions") or {})
            for part in (content, expressions.get("remote_exec") or {}):
                if part.get("status", "ok") == "aborted":
                    self.fail("AbortedError", "the kernel dropped the code, since another client's "
                              "failed before it; nothing ran: run it again")
                elif part.get("status", "ok") != "ok":
                    self.fail(str(part.get("ename") or ""), str(part.get("evalue") or "failed"),
                              map(str, part.get("traceback") or []))
            for payload in content.get("payload") or []:
                if payload.get("source") == "page":
                    page.page(payload["data"]["text/plain"])
            self.reply = dict(content)
        elif msg_id and msg_id == self.probe and self.reply is None:
            self.reply, self.idle = {}, True
            self.fail("LostReplyError", "the connection broke, and the reply was lost with it; the "
                      "kernel has its state and is free (-o without code fetches variables)")

    def hear_iopub(self, kind, content, parent, buffers):
        """An output, a status, or our comm message; that of others is not shown."""
        msg_id, name = parent.get("msg_id"), self.kernel.name
        ours = msg_id is not None and msg_id == self.msg_id
        if kind == "status":
            if content["execution_state"] == "idle" and msg_id and msg_id in (
                    self.msg_id, self.probe):
                self.idle = True
        elif kind == "comm_msg":
            if ours and self.outputs is None and "remote_exec" in dict(content["data"] or {}):
                self.outputs = content["data"], list(buffers)
        elif parent.get("session") == self.kernel.client.session.session:
            if ours:
                self.show_errors()
            if kind == "stream":
                self.screen.stream(name, content["name"], content["text"])
            elif kind in ("display_data", "execute_result", "update_display_data"):
                self.screen.display(name, kind, content)
            elif kind == "clear_output":
                self.screen.clear(bool(content.get("wait")))
            elif kind == "error":
                self.errors = [str(line) for line in content["traceback"]]
                if not ours:
                    self.show_errors()

    def show_errors(self):
        if self.errors:
            self.screen.error(self.kernel.name, self.errors)
        self.errors = []

    def conclude(self, seconds, timeout):
        """What remains to be told once the waiting is over."""
        self.took = seconds
        if self.late and not (self.died or self.given_up):
            self.failure = Failure("TimeoutError", f"still busy after {timeout:g} s; interrupted",
                                   self.failure.traceback if self.failure else [])
        if self.failure is None:
            self.show_errors()
        elif not self.failure.traceback:
            self.failure = self.failure._replace(traceback=self.errors)
        self.screen.finish(self.kernel.name)


class Call:
    """One call of the magic: its screen, and its Ctrl-C, which is counted while
    the call is entered: the first is for the kernels, the second for us."""

    def __init__(self, shell, labelled):
        self.screen = Screen(shell, labelled)
        self.interrupts, self.local = 0, False

    def __enter__(self):
        try:
            self.previous = signal.signal(signal.SIGINT, self.on_interrupt)
        except ValueError:  # not the main thread: Ctrl-C doesn't come here
            self.previous = None
        return self

    def __exit__(self, *_):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def on_interrupt(self, signum, frame):
        self.interrupts += 1
        if self.interrupts > 1 or self.local:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self):
        """What is done here, and not over there, a Ctrl-C ends at once."""
        self.local = True
        try:
            yield
        finally:
            self.local = False

    def run(self, requests, timeout=None, verb="waiting for"):
        """Send all `requests`, each once its kernel is launched, and return when
        each is done, dead or given up.

        After `timeout` seconds, the kernels still busy are interrupted, and given
        up 5 s later; after a Ctrl-C they are interrupted and waited for. The
        second Ctrl-C gives all up. What came of it stands in the requests. Raises
        nothing.
        """
        poller, owners = zmq.Poller(), {}
        begin = told = time.monotonic()
        seen, waiting, unsent = self.interrupts, list(requests), list(requests)
        try:
            while waiting:
                for request in [each for each in unsent if each.kernel.launched.done()]:
                    unsent.remove(request)
                    request.kernel.submit(request)
                    for channel, each in request.kernel.sockets.items():
                        poller.register(each, zmq.POLLIN)
                        owners[each] = request.kernel, channel
                for each, _ in poller.poll(20 if unsent else 100):
                    kernel, channel = owners[each]
                    # what was printed before a question stands before it
                    if channel != "stdin" or not kernel.sockets["iopub"].poll(50):
                        kernel.listen(channel)
                now = time.monotonic()
                for request in waiting:
                    if request.msg_id and not request.done:
                        request.kernel.watch(now)
                    late = timeout is not None and now - begin > timeout
                    if (late or self.interrupts > seen) and not request.done:
                        self.hurry(request, now, late, timeout)
                    if request.question:
                        self.ask(request)
                    if request.done or request.given_up:
                        request.conclude(now - begin, timeout)
                waiting = [request for request in waiting if request.took is None]
                if now - told > 1:
                    told = now
                    self.screen.file.flush()
                    self.tell(waiting, len(requests), now, now - begin, verb)
        except KeyboardInterrupt:
            for request in waiting:
                if request.took is None:  # those that were done by then, stay
                    request.give_up("KeyboardInterrupt", "left busy; -s replaces the kernel")
                    request.conclude(time.monotonic() - begin, timeout)
        self.screen.status("; ".join(f"{r.kernel.name} {r.took:.1f} s" for r in requests),
                           last=True)
        self.screen.file.flush()

    def hurry(self, request, now, late, timeout):
        """Interrupt a request that is late or was interrupted; give up what has no
        code to interrupt, or ignores a time-out's interrupt for 5 s."""
        if request.interrupted is None:
            request.interrupted, request.late = now, late
            if request.kind == "execute_request":  # protocol 5.3, "Kernel interrupt"
                request.kernel.listen("stdin")
                request.question = None  # what was asked by now
                request.kernel.send("control", "interrupt_request", {})
            elif late:
                request.give_up("TimeoutError", f"not ready after {timeout:g} s "
                                "(c.RemoteExecMagics.startup_timeout)")
            else:
                request.give_up("KeyboardInterrupt", "interrupted")
        elif request.late and now - request.interrupted > 5:
            request.give_up("TimeoutError", f"still busy after {timeout:g} s, and it ignores the "
                            "interrupt; -s replaces the kernel")

    def tell(self, waiting, total, now, spent, verb):
        """After 3 s, say who is waited for, and who has not answered since when."""
        pings = [(request.kernel.name, request.ping) for request in waiting]
        silent = [f"; {name} does not answer since " + time.strftime(
            "%H:%M:%S", time.localtime(time.time() - (now - ping)))
            for name, ping in pings if ping and now - ping > 4]
        if waiting and spent > 3 and (total > 1 or silent or verb == "starting"):
            self.screen.status(f"{verb} {', '.join(name for name, _ in pings)} ({spent:.0f} s)"
                               + "".join(silent))

    def ask(self, request):
        """Ask here what the kernel asks (an input_request)."""
        (prompt, password), request.question = request.question, None
        name = request.kernel.name
        self.screen.finish(name)
        self.screen.file.flush()
        try:
            with self.at_once():
                value = (getpass.getpass if password else builtins.input)(
                    f"[{name}] {prompt}" if self.screen.labelled else prompt)
        except EOFError:
            value = "\x04"
        except KeyboardInterrupt:
            self.interrupts = max(1, self.interrupts)
            return
        request.kernel.send("stdin", "input_reply", {"value": value})


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
        if name.startswith("_"):  # copy and pickle look for theirs before there is a name
            raise AttributeError(name)
        raise AttributeError(f"{self.__name} has no variable {name!r} here; "
                             f"there are: {', '.join(dir(self)) or 'none'}")


NAME, SPEC = "_KernelNamespace__name", "_KernelNamespace__spec"


@magics_class
class RemoteExecMagics(Magics):
    """The magic ``%remote_exec``, and the kernels that it started."""

    startup_timeout = Float(60, help="Seconds that a kernel may take to start.").tag(config=True)

    def __init__(self, shell, **options):
        super().__init__(shell, **options)
        self.kernels, self.namespaces = {}, {}  # by NAME
        self.ending = []  # futures of the stops, which the session's end waits for
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
            directory there, until it restarts. `-k {names}` takes the targets from
            a variable: a string, or a list of strings, which may have blanks.
        -o, --output NAMES
            Variables to bring back, as NAME.variable.
        -i, --input NAMES
            Local variables put into the code wherever {variable} stands, as str()
            writes them; a dict is looked up by kernel NAME.
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

            In [3]: %%remote_exec -k kernel1=py3:/data/run7,kernel2=far:/scratch -i filenames -o x,y
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
            self.call(line, cell, local_ns or {})
        except KeyboardInterrupt as error:
            final = KeyboardInterrupt(*error.args)
            final._render_traceback_ = lambda: [f"KeyboardInterrupt: {final}".rstrip(": ")]
            raise final from None
        finally:
            self.lock.release()

    def call(self, line, cell, local_ns):
        """What the magic does. Raises UsageError before anything runs."""
        options, code = parse_line(line)
        code = "\n".join(part for part in (code, cell) if part)
        if "l" in options:
            if code.strip():
                raise UsageError("-l runs no code")
            print(self.listing())
            return
        outputs, inputs, pushes = (
            parse_names(option, options[option]) if option in options else [] for option in "oip")
        if "s" in options and (outputs or pushes) and not code.strip():
            raise UsageError("-s leaves no kernel for -o or -p, unless there is code to run")
        timeout = parse_seconds(options["t"]) if "t" in options else None
        targets = parse_targets(self.entries(options, local_ns))
        values = {name: self.local(name, "i", local_ns) for name in inputs}
        push = {name: self.local(name, "p", local_ns) for name in pushes}
        codes = {name: substitute(code, name, values) for name, _, _ in targets}
        only_stop = "s" in options and not code.strip()
        specs = {} if only_stop else {
            name: self.spec(name, spec, "s" in options) for name, spec, _ in targets}

        with Call(self.shell, len(targets) > 1) as call:
            if "s" in options:
                self.shut_down([name for name in codes if name in self.kernels], call)
            if only_stop:
                return
            self.start(specs, call)
            self.prepare(targets, push, outputs, timeout, call)
            self.shell.user_ns.update({name: self.namespaces[name] for name in specs})
            if code.strip() or outputs:
                self.execute(codes, outputs, timeout, call)

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
        """The value of a local variable: the caller's, else the user's."""
        name = unicodedata.normalize("NFKC", name)
        for namespace in (local_ns, self.shell.user_ns):
            if name in namespace:
                return namespace[name]
        raise UsageError(f"-{option}: there is no local variable {name!r}")

    def spec(self, name, spec, replace):
        """The full kernelspec name, or connection file, that NAME=SPEC means.
        UsageError if NAME runs another, or means something else to the user."""
        running, namespace = self.kernels.get(name), self.namespace(name, spec)
        wanted = spec or getattr(namespace, SPEC)
        if running and (not spec or wanted == running.spec):
            return running.spec
        if wanted.endswith(".json"):
            try:
                found = find_connection_file(os.path.expanduser(wanted))
            except OSError:
                raise UsageError(f"-k: there is no connection file {wanted!r}, neither here nor "
                                 f"in {jupyter_runtime_dir()}") from None
        else:
            found = match_spec(wanted, self.find_specs())
        if running and running.spec != found and not replace:
            raise UsageError(f"{name} runs {running.spec}; -s replaces it by {found}, or choose "
                             "another name for that")
        return found

    def find_specs(self):
        return sorted(KernelSpecManager(config=self.shell.config).find_kernel_specs())

    def namespace(self, name, spec=""):
        """What NAME stands for, or will: the same object as ever. UsageError if it
        means something else to the user."""
        ours = self.namespaces.get(name) or KernelNamespace(name)
        value = self.shell.user_ns.get(name, getattr(builtins, name, ours))
        if type(value).__name__ != "KernelNamespace" or getattr(value, NAME) != name:
            raise UsageError(f"{name} is already something else here ({type(value).__name__}); "
                             f"choose another name, like my_{name}={spec or getattr(ours, SPEC)}")
        return value

    # what happens to kernels

    def shut_down(self, names, call):
        """Shut the kernels down, all at once, and wait for it, but 15 s at most."""
        ends = {name: self.stop(self.kernels[name], grace=2.5) for name in names}
        begin = time.monotonic()
        while concurrent.futures.wait(ends.values(), timeout=0.1).not_done and not (
                call.interrupts or time.monotonic() - begin > 15):
            pass
        lost = {name: Failure("ShutdownError", "may still run: " + (
            repr(end.exception()) if end.done() else "it does not answer"))
            for name, end in ends.items() if not end.done() or end.exception()}
        if call.interrupts:
            raise KeyboardInterrupt(f"{', '.join(lost) or 'nothing'} not waited for")
        if lost:
            raise RemoteError(lost, call.screen.labelled)

    def start(self, specs, call):
        """Have the kernels that `specs` gives by NAME at work, all at once: show what
        they printed since the last call, start the missing, and anew those that
        died. RemoteError names those that can't be; the others stay."""
        kernels = [self.kernels[name] for name in specs if name in self.kernels]
        for kernel in kernels:
            kernel.catch_up(call.screen)
            if kernel.busy and not (kernel.broken or kernel.exited):
                raise UsageError(f"{kernel.name} is still busy with an earlier cell; wait for it, "
                                 "or replace the kernel with -s")
        new = [Kernel(name, spec, self.context, self.shell.config)
               for name, spec in specs.items() if name not in self.kernels]
        failures, dead = {}, {}
        try:
            requests = [Request(kernel, call.screen, "kernel_info_request")
                        for kernel in kernels + new
                        if kernel in new or kernel.broken or kernel.exited]
            call.run(requests, self.startup_timeout, verb="starting")
            for request in requests:
                kernel, failure, name = request.kernel, request.failure, request.kernel.name
                if not failure:
                    self.adopt(kernel, dict(request.reply.get("language_info") or {}))
                elif kernel in new:
                    failures[name] = failure._replace(evalue=": ".join(filter(None, (
                        "could not start", request.died or failure.evalue, kernel.last_words()))))
                elif request.died and not kernel.attached:
                    call.screen.write(
                        sys.stderr, f"{name} had died ({request.died}) and is started anew\n")
                    dead[name] = kernel.spec
                else:
                    failures[name] = failure
                if request.died and kernel in kernels:
                    self.stop(kernel)
        finally:
            for kernel in new:
                if self.kernels.get(kernel.name) is not kernel:
                    self.stop(kernel)
        if call.interrupts:
            raise KeyboardInterrupt(f"{', '.join(failures) or 'kernels'} not started")
        if failures:
            raise RemoteError({name: failures[name] for name in specs if name in failures},
                              call.screen.labelled)
        if dead:
            self.start(dead, call)

    def adopt(self, kernel, language):
        """Keep a kernel that has answered; `language` is its language_info."""
        kernel.language = str(language.get("name"))
        if kernel.language == "python":
            version = tuple(map(int, re.findall(r"\d+", str(language.get("version")))[:2]))
            kernel.protocol = 5 if version >= (3, 8) else 4 if version >= (3, 4) else 2
        self.kernels[kernel.name] = kernel
        self.namespaces[kernel.name] = self.namespace(kernel.name)
        setattr(self.namespaces[kernel.name], SPEC, kernel.spec)

    def prepare(self, targets, push, outputs, timeout, call):
        """Set new kernels up, change directories, push variables; RemoteError
        if any can't be."""
        packed, requests = {}, []
        for name, _, directory in targets:
            kernel = self.kernels[name]
            if kernel.protocol is None and (directory or push or outputs):
                raise UsageError(f"{name} runs {kernel.language}: -o, -p and :DIRECTORY need a "
                                 "Python kernel")
            if push and kernel.protocol not in packed:
                with call.at_once():
                    packed[kernel.protocol], failures = pack_each(push, kernel.protocol)
                if failures:
                    raise UsageError(f"-p: can't pickle {failures[0][1]}")
            if kernel.protocol and (directory or push or not kernel.ready):
                requests.append(Request(
                    kernel, call.screen, code="" if kernel.ready else setup_code(),
                    expression=remote_call(prepare, directory, bool(push), versions()),
                    buffers=packed.get(kernel.protocol)))
        call.run(requests, timeout and max(timeout, self.startup_timeout))
        for request in requests:
            request.kernel.ready = request.kernel.ready or request.failure is None
        self.judge(requests, call)

    def execute(self, codes, outputs, timeout, call):
        """Run each kernel's code, and bring the outputs into its namespace."""
        frontend = getattr(self.shell, "kernel", None)
        requests = [Request(
            self.kernels[name], call.screen, code=code, silent=not code.strip(),
            expression=self.kernels[name].sending(outputs) if outputs else "",
            allow_stdin=getattr(frontend, "_allow_stdin", True)) for name, code in codes.items()]
        call.run(requests, timeout)
        for request in requests:
            if outputs and not request.failure:
                problems = self.load(request, outputs, timeout, call)
                if problems:
                    request.fail(problems[0].ename, "; ".join(
                        [problems[0].evalue, *map(str, problems[1:])]))
        self.judge(requests, call)

    def load(self, request, names, timeout, call):
        """Unpickle a request's outputs; returns the failures. What can't be
        loaded together is fetched again one by one."""
        kernel = request.kernel
        if request.outputs is None:
            return [Failure("LostReplyError", "the connection broke, and the outputs were lost "
                            "with it; -o without code fetches them")]
        try:
            (data, buffers), request.outputs = request.outputs, None
            with call.at_once():
                values = unpack(buffers, data.get("versions"))
            vars(self.namespaces[kernel.name]).update(
                {name: values[name] for name in names if name in values})
            return [Failure(str(ename), str(evalue)) for ename, evalue in data["remote_exec"]]
        except BaseException as error:  # unpickling may run anything
            if len(names) == 1 or call.interrupts:
                return [Failure(type(error).__name__,
                                f"{', '.join(names)} can't be loaded here: {error}")]
        problems = []
        for name in names:
            if call.interrupts or request.died:
                break
            again = Request(kernel, call.screen, expression=kernel.sending([name]))
            call.run([again], timeout)
            request.died = again.died
            problems += [again.failure] if again.failure else self.load(
                again, [name], timeout, call)
        return problems

    def judge(self, requests, call):
        """Raise what the requests, taken together, come to."""
        failures = {r.kernel.name: r.failure for r in requests if r.failure}
        for request in requests:
            if request.died:
                self.stop(request.kernel)
        if call.interrupts:
            busy = [r.kernel.name for r in requests if r.kernel.busy]
            stopped = [n for n, f in failures.items()
                       if f.ename == "KeyboardInterrupt" and n not in busy]
            others = {n: f for n, f in failures.items() if f.ename != "KeyboardInterrupt"}
            if others:
                error = RemoteError(others, call.screen.labelled)
                call.screen.write(sys.stderr, "\n".join(error._render_traceback_()) + "\n")
            raise KeyboardInterrupt(
                f"{', '.join(stopped) or 'no kernel'} stopped" + (
                    f"; {', '.join(busy)} still busy, -s replaces" if busy else ""))
        if failures:
            raise RemoteError(failures, call.screen.labelled)

    def stop(self, kernel, grace=0):
        """Future of a kernel's end."""
        self.kernels.pop(kernel.name, None)
        future = kernel.stop(grace)
        self.ending = [each for each in self.ending if not each.done()] + [future]
        return future

    def close(self):
        """Shut everything down, within two seconds: the end of the session."""
        for kernel in list(self.kernels.values()):
            if os.getpid() == self.pid:
                self.stop(kernel, grace=1)
            elif kernel.manager:  # a forked child: the file is its parent's
                kernel.manager.connection_file = ""
        if os.getpid() == self.pid:
            concurrent.futures.wait(self.ending, timeout=2)

    # what helps the user

    def listing(self):
        """The text of -l."""
        lines = ["running kernels:"]
        for name, kernel in self.kernels.items():
            kernel.catch_up(Screen(self.shell, labelled=True))
            state = "dead" if kernel.exited else "busy" if kernel.busy else "idle"
            lines.append(f"  {name}  {kernel.spec}  {state}")
        return "\n".join(lines + ["  none"] * (not self.kernels) + [
            "kernelspecs:", *(f"  {spec}" for spec in self.find_specs())])

    def complete(self, event):
        """Options, and after -k the names of kernels and kernelspecs."""
        before = getattr(event, "text_until_cursor", event.line)
        words = before.split()
        last = words[-1] if before[-1:].strip() else ""
        previous = words[-2] if last and len(words) > 1 else words[-1]
        if last.startswith("-"):
            return ["-" + letter for letter in SHORT.replace(":", "")] + [
                "--" + name.rstrip("=") for name in LONG]
        if previous in ("-k", "--kernels"):
            return ([] if "=" in last.rpartition(",")[2] else [*self.kernels]) + self.find_specs()
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
    for kind, magic in (("line", "%remote_exec"), ("cell", "%%remote_exec")):
        ipython.magics_manager.magics[kind].pop("remote_exec", None)
        ipython.strdispatchers["complete_command"].strs.pop(magic, None)
    atexit.unregister(magics.close)
    magics.close()
