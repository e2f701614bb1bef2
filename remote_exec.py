"""Run a line or a cell on one or many Jupyter kernels, and bring variables back.

The data stays where it is; one cell computes on every kernel at once, and the
numbers to plot come here as attributes of a variable named after the kernel::

    In [1]: %load_ext remote_exec
    In [2]: %remote_exec -k kernel1=python3,kernel2=python3 -o x import os; x = os.getpid()
    In [3]: kernel1.x != kernel2.x
    Out[3]: True

All that the far side needs is the Jupyter kernel that it has. ``%remote_exec?`` tells more.
"""
import asyncio
import atexit
import builtins
import collections
import concurrent.futures
import contextlib
import functools
import gc
import getopt
import getpass
import io
import json
import keyword
import logging
import mmap
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
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

__version__ = "3.0.0"
__all__ = ["Failure", "RemoteError", "RemoteExecMagics"]


# ---- errors ---------------------------------------------------------------

class Failure(NamedTuple):
    """What went wrong on one kernel (Jupyter messaging protocol, "Execution errors")."""
    ename: str
    evalue: str
    traceback: list = []

    def __str__(self):
        return f"{self.ename}: {self.evalue}"


class RemoteError(Exception):
    """Everything that went wrong over there in one call: ``failures`` maps kernel NAME to
    `Failure`, in the order of ``-k``."""

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
            if failure.ename not in text:
                text = "\n".join([*failure.traceback, str(failure)])
            shown.append(label(name, text, self.labelled) + text)
        return "\n\n".join(shown).split("\n")


class Failed(Exception):
    """Ends what is done with one kernel, or, thrown into that, interrupts it; the arguments
    are those of a `Failure`."""


def label(name, text, labelled=True):
    """The name of its kernel, to stand ahead of `text`: in its line, or above its lines."""
    return f"[{name}] " + ("\n" if "\n" in text else "") if labelled else ""


# ---- the remote side ------------------------------------------------------
# The source of these goes to every Python kernel, from 2.7 on, into a module of
# its own; what packs and unpacks serves on this side, too.

IN_BAND = 65536  # bytes; a message frame of its own costs more than copying less
LARGE = 1 << 25  # bytes; from there on malloc asks for new memory each time: ZMQ is slow then


class Unpickler(pickle.Unpickler):
    """Finds numpy's modules by the names that they had before numpy 2."""

    def find_class(self, module, name):
        return pickle.Unpickler.find_class(
            self, module.replace("numpy._core", "numpy.core", 1), name)


@contextlib.contextmanager
def uncollected():
    """Without the garbage collector, which many small containers would call all the time."""
    restore = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        restore()


class Chunks(list):
    """A file that copies nothing: pickle writes what is large by itself."""
    write = list.append


def pickled(value, protocol, pickler_class):
    """(frames: the pickle and its out-of-band buffers (PEP 574), the pickler's memo). Raises
    whatever pickling raises, also where plain pickle writes a reference to the session."""
    chunks, buffers = Chunks(), []
    pickler = pickler_class(chunks, protocol, **{} if protocol < 5 else {
        "buffer_callback": lambda each: each.raw().nbytes < IN_BAND or buffers.append(each.raw())})
    pickler.dump(value)
    if pickler_class is pickle.Pickler and any(
            b"__main__" in chunk for chunk in chunks if len(chunk) < 2 * IN_BAND):
        if any(getattr(each, "__module__", None) == "__main__"
               for _, each in pickler.memo.copy().values()):
            raise pickle.PicklingError(
                "it needs what the session defines; installing cloudpickle would bring it")
    return [b"".join(chunks)] + buffers, pickler.memo


def said(error):
    """What an error says, also where its str() fails."""
    return "".join(traceback.format_exception_only(type(error), error)).partition(": ")[2].strip()


def pack(names, namespace, protocol):
    """(parts, frames, failures): the variables `names`, pickled.

    Each value is a part of its own, so that one that can't be loaded takes nothing from the
    others; those that share something mutable stand in one more part, together, ahead of
    them. A part is [names, numbers of its frames]; a buffer is one frame for all parts.
    """
    parts, frames, failures, memos = [], {}, [], {}
    numbers = collections.defaultdict(lambda: len(numbers))  # of the frames, by what they show
    try:  # it takes more than plain pickle, and longer
        from cloudpickle import CloudPickler
    except ImportError:
        CloudPickler = pickle.Pickler

    def add(group):
        values = {name: namespace[name] for name in group}
        try:
            own, memo = pickled(values, protocol, pickle.Pickler)
        except Exception:
            own, memo = pickled(values, protocol, CloudPickler)
        places = [numbers[id(getattr(each, "obj", each))] for each in own]
        parts.append([group, places])
        frames.update(zip(places, own))
        return memo.copy() if len(names) > 1 else {}

    def mutable(value):  # what has no hash, or one by identity (torch's tensors: id())
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return False
        try:
            return hash(value) in (id(value), object.__hash__(value))
        except Exception:
            return True

    with uncollected():
        for name in names:
            try:
                if name not in namespace:
                    raise NameError("name '%s' is not defined" % name)
                memos[name] = add([name])
            except (Exception, SystemExit) as error:  # pickling may run anything
                failures.append([type(error).__name__, "%s: %s" % (name, said(error))])
        users = collections.Counter(key for memo in memos.values() for key in memo)
        together = [name for name, memo in memos.items() if any(
            users[key] > 1 and mutable(memo[key][1]) for key in memo)]
        try:
            if together:
                add(together)
                parts.insert(0, parts.pop())
        except Exception:
            pass  # each is there alone, too
    return parts, [frames[number] for number in sorted(frames)], failures


def set_aside(frames, directory):
    """The frames, but empty ones for those that are large: these are files of the directory,
    if there is one."""
    frames = list(frames)
    for number, frame in enumerate(frames):
        if directory and len(frame) >= LARGE:
            with contextlib.suppress(OSError):  # no room: ZMQ takes it, then
                with open(os.path.join(directory, str(number)), "wb") as file:
                    file.write(frame)
                frames[number] = b""
    return frames


def load(frame, options):
    """Unpickle a frame, without a copy of it where the `Unpickler` is not needed."""
    if sys.version_info > (3,):
        with contextlib.suppress(ImportError):
            return pickle.loads(frame, **options)
    return Unpickler(io.BytesIO(frame), **options).load()


def unpack(parts, frames, aside=None):
    """(values, failures) of what `pack` made; what is set aside is mapped, as memory of this
    process alone."""
    values, failures = {}, []
    options = {"encoding": "latin1"} if sys.version_info > (3,) else {}
    untracked = {"trackfd": False} if sys.version_info >= (3, 13) else {}  # holds no open file

    def back(number):
        if len(frames[number]):
            return frames[number]
        with open(os.path.join(aside, str(number)), "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, **untracked))

    with uncollected():
        for names, numbers in parts:
            try:
                if not set(names) <= set(values):
                    if numbers[1:]:
                        options["buffers"] = list(map(back, numbers[1:]))
                    values.update(load(back(numbers[0]), options))
            except (Exception, SystemExit) as error:  # so may unpickling
                text = said(error)
                here = ["%s %s here" % (each, sys.modules[each].__version__)
                        for each in ("numpy", "pandas") if each in text and each in sys.modules]
                if len(names) == 1:
                    failures.append([type(error).__name__, "; ".join(
                        ["%s can't be loaded: %s" % (names[0], text)] + here)])
    return values, failures


def prepare(directory, parts, aside):
    """Change directory, take the pushed variables: from the request's buffers, and, where
    they are large, from the directory `aside`."""
    shell = get_ipython()
    if directory:
        if not os.path.isdir(directory):
            directory = os.path.expandvars(os.path.expanduser(directory))
        os.chdir(directory)
    if parts:
        values, failures = unpack(parts, shell.get_parent()["buffers"], aside)
        if failures:
            raise ValueError("; ".join(text for _, text in failures))
        shell.user_ns.update(values)


def send(names, protocol, copy, aside, comm=[]):
    """Publish the variables `names` as buffers of one message of the one `comm`, the large ones
    in files of `aside`. Those that can't go are named in its data. A `copy`, since another
    client might change them."""
    if not comm:
        try:
            from comm import create_comm
        except ImportError:  # before ipykernel 6
            from ipykernel.comm import Comm as create_comm
        comm.append(create_comm(target_name="remote_exec", primary=False))
    parts, frames, failures = pack(list(map(str, names)), get_ipython().user_ns, protocol)
    frames = set_aside(frames, aside)
    comm[0].send({"remote_exec": [parts, failures]},
                 buffers=list(map(bytes, frames)) if copy else frames)


def publish_all(kernel):
    """Lift ipykernel's limit of 1000 queued messages, past which outputs are dropped; says
    whether it is an ipykernel."""
    thread = getattr(getattr(kernel, "iopub_socket", None), "io_thread", None)
    if thread is not None:
        thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0))
    return thread is not None


# what stands above, taken once: this file may change while a session is open
REMOTE_SOURCE = (
    "import collections, contextlib, gc, io, mmap, os, pickle, sys, traceback, types\n"
    "from IPython import get_ipython\n"
    + re.search("(?ms)^IN_BAND.*(?=^REMOTE_SOURCE)", __loader__.get_source(__name__))[0]
    + "if publish_all(get_ipython().kernel):\n"
      "    get_ipython().kernel._execute_sleep = 0")  # made for clients that don't wait for idle
# makes the module, and adds `pickle` and `os` to the user's namespace and nothing else
SETUP_CODE = (
    "import os, pickle\n"
    f"exec(compile({ascii(REMOTE_SOURCE)}, '<remote_exec>', 'exec'), "
    "__import__('sys').modules.setdefault('_remote_exec', "
    "__import__('types').ModuleType('_remote_exec')).__dict__)")


# ---- the line -------------------------------------------------------------

SHORT, LONG = "k:o:i:p:t:sbl", ["kernels=", "output=", "input=", "push=", "timeout=",
                                "shutdown", "background", "list"]


def parse_line(line):
    """({letter: argument}, code) of a magic's line; lists given twice add up."""
    words, options = line.split(), {}
    try:
        pairs, rest = getopt.getopt(words, SHORT, LONG)
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; `--` ends the options, %remote_exec? shows them all") from None
    for option, value in pairs:
        letter = option.lstrip("-")[0]
        adds = letter in options and letter != "t"
        options[letter] = f"{options[letter]},{value}" if adds else value
    return options, line.split(None, len(words) - len(rest))[-1] if rest else ""


def check_name(option, name, way_out):
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"-{option}: {name!r} is not a variable's name; {way_out}")


def parse_names(option, text):
    """The variable names of an option's comma-separated argument."""
    # Python's names are in this form (Language Reference, 2.3); `{name}` stands as written
    names = (text if option == "i" else unicodedata.normalize("NFKC", text)).split(",")
    for name in names:
        check_name(option, name, "separate names by commas, without blanks")
    return list(dict.fromkeys(names))


def parse_targets(entries):
    """{NAME: (SPEC, DIRECTORY)} of the entries; UsageError for a bad or repeated NAME."""
    targets = {}
    for entry in entries:
        head, _, directory = entry.partition(":")
        name, equals, spec = unicodedata.normalize("NFKC", head).partition("=")
        check_name("k", name, "write NAME[=SPEC][:DIRECTORY],... without blanks")
        if equals and not spec:
            raise UsageError(f"-k: no kernelspec after {head!r}")
        if name in targets:
            raise UsageError(f"-k: {name} stands there twice; write {name}2={spec or 'SPEC'}")
        targets[name] = spec, directory
    return targets


def parse_seconds(text):
    """The time-out that `text` gives; UsageError unless it is above 0 and finite."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d\d?)?", text) or not float(text):
        raise UsageError(f"-t: {text!r} is not a positive number of seconds")
    return float(text)


def match_spec(wanted, specs):
    """The one of `specs` that `wanted` means: the exact one, else the only one that contains
    it, else the only one that matches, ignoring case, with ``_`` for anything, or UsageError."""
    pattern = re.compile(".*".join(map(re.escape, wanted.split("_"))), re.IGNORECASE)
    found = ([spec for spec in specs if spec == wanted.lower()]
             or sorted(spec for spec in specs if wanted in spec)
             or sorted(filter(pattern.search, specs)))
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"kernelspec {wanted!r} may be any of: {', '.join(found)}" if found else
        f"no kernelspec matches {wanted!r}; NAME=SPEC takes one of: {', '.join(sorted(specs))}")


def substitute(code, name, values):
    """`code` for kernel `name`, with each ``{variable}`` of `values` replaced in one exact
    pass. UsageError where a dict has no key `name`, or str() fails."""
    texts = {}
    for variable, value in values.items():
        if isinstance(value, dict) and name not in value:
            raise UsageError(f"-i: the dict {variable} has no key {name!r}")
        try:
            texts[variable] = str(value[name] if isinstance(value, dict) else value)
        except Exception as error:
            raise UsageError(f"-i: str({variable}) fails: {error!r}") from None
    return re.sub(r"\{([^{}]+)\}", lambda match: texts.get(match[1], match[0]), code)


# ---- the screen -----------------------------------------------------------

class Screen:
    """Shows here what kernels publish: unlabelled for one, else line by line under `label`."""

    def __init__(self, shell, labelled):
        self.shell, self.labelled, self.notebook = shell, labelled, hasattr(shell, "kernel")
        self.file = sys.stdout
        self.unfinished = {}  # text without a line's end, by (kernel, stream)
        self.bar = 0          # length of the line that a progress bar left open
        self.standing = None  # the status line, while there is one

    def flush(self):
        with contextlib.suppress(ValueError):  # it has been closed since
            self.file.flush()

    def write(self, file, text):
        if not self.notebook:
            self.status("")
        if file is not self.file:
            self.flush()
            self.file = file
        if self.bar:
            self.bar, text = 0, "\n" + text
        encoding = getattr(file, "encoding", None) or "utf-8"  # has no lone surrogates, say
        file.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def stream(self, name, stream, text):
        """Show text of a stream; where there are several kernels, in whole lines, but the
        line that a progress bar redraws (after a carriage return) at once."""
        file = sys.stderr if stream == "stderr" else sys.stdout
        if not self.labelled:
            return self.write(file, text)
        *lines, rest = re.sub(r"(?m)^.*\r(?=[^\r\n])", "\r",  # what is overwritten
                              self.unfinished.pop((name, stream), "") + text).split("\n")
        shown, bar = [(line.strip("\r"), "\n") for line in lines], rest.strip("\r")
        if bar:
            self.unfinished[name, stream] = rest
        if bar and bar != rest:
            shown.append((bar, "\r"))
        for line, end in shown:  # in place of a bar's that may stand there
            line, self.bar = f"[{name}] {line}".ljust(self.bar), 0
            self.write(file, line + end)
            self.bar = len(line) if end == "\r" else 0

    def finish(self, name):
        """Show the unfinished lines of a kernel: what comes next isn't theirs."""
        for key in [key for key in self.unfinished if key[0] == name]:
            self.stream(*key, "\n")

    def display(self, name, kind, content):
        data, update = content["data"], kind == "update_display_data"
        text = str(data.get("text/plain", "\n"))
        if not update:
            self.finish(name)
            self.write(sys.stdout, label(
                name, "\n" if self.notebook else text, self.labelled and text))
        transient = dict(content.get("transient") or {})
        if "display_id" in transient:  # two kernels may choose the same
            transient["display_id"] = f"{name} {transient['display_id']}"
        self.shell.display_pub.publish(data=data, metadata=content.get("metadata") or {},
                                       transient=transient, update=update)

    def error(self, name, content):
        self.finish(name)
        self.write(sys.stdout, "")
        text = "\n".join(content["traceback"])
        self.shell._showtraceback(
            types.SimpleNamespace(__name__=content.get("ename")), content.get("evalue"),
            (label(name, text, self.labelled) + text).split("\n"))

    def clear(self, wait):
        self.unfinished.clear()
        self.bar, self.standing = 0, None  # all of it goes
        self.shell.display_pub.clear_output(wait=wait)

    def status(self, text):
        """One line, updated in place, a display in a notebook; without text, none."""
        data = {"text/plain": text} if text else {}
        if self.notebook and self.standing:
            self.standing.update(data, raw=True)
        elif self.notebook and text:
            self.standing = display(data, raw=True, display_id=True)
        elif (text or self.standing) and sys.stderr.isatty():
            self.standing = text
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        self.standing = text and self.standing


class Widgets:
    """The widgets of one kernel, alive in this notebook: a comm here for each comm over there
    (protocol, "Custom Messages"). What the front end sends back is for `answer`."""

    def __init__(self, shell, answer):
        self.shell, self.answer = shell, answer
        self.comms, self.catching = {}, []  # by id; the `Output`s that catch, the latest last
        self.screen = Screen(shell, False)  # within an `Output`

    def hear(self, kind, content, message):
        """Pass on what a far comm says; what is not a front end's is passed over."""
        comm_id, data = content["comm_id"], content.get("data") or {}
        comm, rest = self.comms.get(comm_id), (message["metadata"], message["buffers"])
        if kind == "comm_open" and self.screen.notebook:
            with contextlib.suppress(ImportError):  # before ipykernel 6
                from comm import create_comm
                comm = create_comm(content["target_name"], data, *rest, comm_id=comm_id)
                self.comms[comm_id] = comm
                comm.on_msg(lambda message: self.answer("comm_msg", message))
                comm.on_close(lambda message: self.answer("comm_close", message))
        elif kind == "comm_msg" and comm:
            if "msg_id" in dict(data.get("state") or {}):
                self.catching = [each for each in self.catching if each is not comm] + [
                    comm] * bool(data["state"].pop("msg_id"))
            comm.send(data, *rest)
        elif kind == "comm_close" and comm:
            self.comms.pop(comm_id).close(data, *rest)

    def catch(self, msg_id):
        """What is shown from now on goes into the `Output` that catches, until there is no
        `msg_id`. A front end tells by that of the parent, which here all kernels share."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.catching[-1].send(
            {"method": "update", "state": {"msg_id": msg_id}, "buffer_paths": []})


# ---- a kernel -------------------------------------------------------------

class KernelNamespace:
    """What came back from one kernel: its attributes are the variables."""

    # the mangled slot leaves every variable's name free; by it, and by this class's name,
    # a namespace from before the module was reloaded is known as ours
    __slots__ = ("__dict__", "__weakref__", "__kernel")

    def __new__(cls, kernel):
        """Each has a class of its own, whose properties wait for a run in the background."""
        self = object.__new__(type(cls.__name__, (cls,), {"__slots__": ()}))
        self.__kernel = kernel
        return self

    def __repr__(self):
        kernel, run = self.__kernel, self.__kernel.run
        state = f", {run.since}" if run.steps and run.since else ""
        return (f"<kernel {kernel.name} ({kernel.spec}){state}: "
                f"{', '.join(dir(self)) or 'no variables yet'}>")

    def __dir__(self):
        return sorted(vars(self))

    def __reduce__(self):
        return types.SimpleNamespace, (), vars(self)


KERNEL = "_KernelNamespace__kernel"


class Run:
    """What is done with a kernel, step by step, and what came of it."""

    def __init__(self, steps=None):
        self.steps, self.waits_for, self.failure = steps, None, None
        self.since = None  # of one in the background, until its end is told

    def step(self, value=None):
        """Go on, with an answer to its question, or with what makes it `Failed`. It yields what
        it waits for: None, a text that is worth telling, the (prompt, is it a password) of a
        question, or the others, at a BARRIER."""
        try:
            if self.steps:
                act = self.steps.throw if isinstance(value, Failed) else self.steps.send
                self.waits_for = act(value)
        except StopIteration:
            self.end()
        except Failed as error:
            self.end(Failure(*error.args))

    def end(self, failure=None):
        """Do no more; this is what it came to."""
        if self.steps:
            self.steps.close()
        self.steps, self.waits_for, self.failure = None, None, failure


class Kernel:
    """What NAME stands for: a process, the sockets to it, and what is done with it now."""

    def __init__(self, magics, name):
        self.magics, self.name, self.spec = magics, name, name
        self.namespace, self.screen = KernelNamespace(self), Screen(magics.shell, False)
        self.run, self.awaited = Run(), []  # what is done with it; attributes that wait for that
        self.reset()

    def reset(self):
        """There is no process."""
        self.manager = self.client = self.launched = None  # attached: no manager
        self.death = self.dying = None          # how it ended, if it did; the future of that
        self.language = self.protocol = None    # pickle's highest over there, if it is Python
        self.sockets, self.unanswered = {}, []  # by channel; the ids of requests, in order
        self.file_seen, self.stderr = None, io.StringIO()  # the connection file that was read
        self.heard = self.broken = 0            # when something came; the connection broke
        self.interrupting = 0                   # until when an interrupt may be answered
        self.given_up = False                   # was what it did left to itself

    # its process

    def later(self, coroutine):
        """Future of `coroutine`, which runs beside us."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self, seconds=2):
        """Future of the end of the process: a shutdown_request, after half of the `seconds`
        (None: c.KernelManager.shutdown_wait_time) SIGTERM, in the end SIGKILL. A busy one gets
        SIGTERM at once, so that srun takes its job along. None for an attached one, left alone."""
        manager, launched, stderr = self.manager, self.launched, self.stderr
        heeds = manager and self.client and not self.unanswered

        async def end():
            await asyncio.gather(asyncio.wrap_future(launched), return_exceptions=True)
            try:
                if heeds:
                    await manager.provisioner.shutdown_requested()
                elif await manager.is_alive():
                    await manager.provisioner.terminate()
                await manager.finish_shutdown(seconds, 0.05)
                if await manager.is_alive():
                    raise TimeoutError("it could not be killed")
            finally:
                stderr.close()
                await manager.cleanup_resources()
        if heeds:
            self.send("control", "shutdown_request", {"restart": False})
        self.disconnect(linger=200)  # milliseconds, for that
        self.reset()
        if launched and manager:
            self.magics.ends = [each for each in self.magics.ends if not each.done()]
            self.magics.ends.append(self.later(end()))
            return self.magics.ends[-1]

    @property
    def exited(self):
        """Whether its local process, where its provisioner has one, has ended."""
        process = getattr(getattr(self.manager, "provisioner", None), "process", None)
        return process is not None and process.poll() is not None

    async def ended(self):
        """How the kernel ended, or None while it runs, as far as is known. May take long."""
        if self.manager:
            code = await self.manager.provisioner.poll()
            if code is None or not self.exited:  # what is far may tell any code
                return None if code is None else "its process is gone"
            names = {-each: f"killed by {each.name}" for each in signal.Signals}
            return names.get(code, f"exit code {code}")
        address = self.client.ip, self.client.shell_port
        for _ in range(3):  # its owner may be restarting it
            try:
                _, writer = await (
                    asyncio.open_unix_connection("%s-%s" % address)
                    if self.client.transport == "ipc" else asyncio.open_connection(*address))
                return writer.close()
            except (ConnectionRefusedError, FileNotFoundError):
                await asyncio.sleep(0.5)
        return "nothing listens at its address"

    @property
    def near(self):
        """Whether it is on this machine, too, so that large buffers may go by files."""
        return bool(self.manager and self.client.transport == "ipc" and self.protocol == 5)

    def last_words(self):
        """What the process said on stderr at the end, in brackets: it explains a failed start."""
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 2000))
        last = collections.deque(filter(None, map(str.strip, self.stderr)), 3)
        return f" [{' | '.join(last)}]" if last else ""

    # its messages

    def connect(self):
        """Open the sockets, unless the connection file says what it said, or is being written.
        (A kernel whose iopub socket loses a peer while its limit is lifted may crash in ZMQ.)"""
        path = self.manager.connection_file if self.manager else self.spec
        try:
            seen = os.stat(path).st_mtime_ns, os.stat(path).st_size
            if seen == self.file_seen:
                return False
            client = KernelClient(context=self.magics.context, connection_file=path)
            client.load_connection_file()
        except (FileNotFoundError, ValueError):  # removed, or half written
            return False
        self.file_seen, before = seen, self.client
        if before and before.get_connection_info() == client.get_connection_info():
            return False
        self.disconnect()
        self.client, self.session = client, client.session.session
        client.session.unpack = lambda part: {  # parsing the date takes half of the time
            key: value for key, value in json.loads(part).items() if key != "date"}
        for channel in ("iopub", "shell", "control", "hb", "stdin"):
            client.context.immediate = channel == "stdin"  # writable only while it is connected
            self.sockets[channel] = getattr(client, f"connect_{channel}")(client.session.bsession)
        self.sockets["hb"].req_relaxed = True  # may ask again
        self.sockets["monitor"] = self.sockets["shell"].get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.widgets = Widgets(self.magics.shell, functools.partial(from_front_end, self))
        return True

    def disconnect(self, linger=0):
        if self.sockets:
            self.sockets["shell"].disable_monitor()
        for each in self.sockets.values():
            each.close(linger=linger)
        self.sockets = {}

    def send(self, channel, kind, content, **more):
        return self.client.session.send(self.sockets[channel], kind, content, **more)

    def ask(self, kind, content, **more):
        """Send a request on the shell channel; its `Answer`, to be heard."""
        try:
            msg_id = self.send("shell", kind, content, **more)["header"]["msg_id"]
        except Exception as error:  # a lone surrogate, say
            raise Failed(type(error).__name__, str(error)) from None
        self.unanswered.append(msg_id)
        return Answer(self, msg_id)

    def listen(self, answer=None):
        """Take in what has come, up to 100 messages a channel; says whether anything did. What
        is not signed by this kernel tells no more than that it beats."""
        answer, came = answer or Answer(self), None
        for channel, each in self.sockets.items():
            for _ in range(100):
                if not each.get(zmq.EVENTS) & zmq.POLLIN:
                    break
                if channel == "monitor":
                    self.broken = time.monotonic()
                else:
                    came = self.heard = time.monotonic()
                with contextlib.suppress(Exception):
                    answer.hear(channel, self.client.session.recv(each, copy=False)[1])
        return came

    def listen_on(self, seconds, answer=None):
        """Take in what comes, until nothing has come for so long; for a second at most."""
        deadline = time.monotonic() + 1
        while self.sockets and time.monotonic() < deadline and (
                self.listen(answer) or self.sockets["iopub"].poll(seconds * 1000)):
            pass
        self.screen.finish(self.name)


class Answer:
    """What is heard of one request, and what it means (Jupyter messaging protocol 5.3).
    It is complete when its reply and its idle status have come, in whatever order."""

    def __init__(self, kernel, msg_id=None):
        self.kernel, self.msg_id = kernel, msg_id
        self.reply = self.outputs = None  # its content; data and buffers of our comm message
        self.question = self.failure = None
        self.error = None    # one that was published; the reply may repeat it
        self.probe = None    # a later request, whose answer tells that this one's was lost
        self.begun = False

    def hear(self, channel, message):
        """Take in a message. A malformed one is a failure, never an exception."""
        try:
            kind, content = message["msg_type"], message["content"]
            parent, unanswered = message["parent_header"] or {}, self.kernel.unanswered
            msg_id = parent.get("msg_id")
            ours = msg_id is not None and msg_id == self.msg_id
            if kind == "interrupt_reply":
                self.kernel.interrupting = 0
            elif kind == "input_request" and ours:
                self.question = str(content["prompt"]), bool(content.get("password"))
            elif channel == "shell" and self.reply is None:
                if ours:
                    self.take(content)
                elif msg_id is not None and msg_id == self.probe:
                    self.reply, self.failure = {}, Failure("LostReplyError", (
                        "the connection broke, the reply was lost; the kernel has its state"))
            elif kind == "status":
                self.begun = self.begun or ours
                if content["execution_state"] == "idle" and msg_id in unanswered:
                    del unanswered[:unanswered.index(msg_id) + 1]  # kernels work in order
            elif kind == "comm_msg" and "remote_exec" in dict(content["data"] or {}):
                if ours and self.outputs is None:
                    self.outputs = content["data"]["remote_exec"], list(message["buffers"])
            elif channel == "iopub" and parent.get("session") == self.kernel.session:
                self.show(kind, content, ours, message)
        except Exception as error:
            self.failure = self.failure or Failure(
                "ProtocolError", f"{channel} message: {type(error).__name__}: {error}")

    def take(self, reply):
        """The reply, and in it that of the expression which sends the outputs."""
        self.reply = reply
        expressions = dict(reply.get("user_expressions") or {})
        for part in (reply, expressions.get("remote_exec") or {}):
            if part.get("status", "ok") != "ok":  # "aborted" has no more to say
                self.failure = self.failure or Failure(
                    str(part.get("ename", "AbortedError")) or "Error", str(part.get(
                        "evalue", "nothing ran, since another client's code failed before it")),
                    [*map(str, part.get("traceback") or [])])
        for payload in reply.get("payload") or []:
            if payload.get("source") == "page":
                if self.kernel.screen.labelled:  # a front end shows the last page only
                    self.kernel.screen.display(self.kernel.name, "display_data", payload)
                else:
                    page.page(payload["data"]["text/plain"])

    def show(self, kind, content, ours, message):
        """An output, in this session's notebook or terminal."""
        name, screen, widgets = self.kernel.name, self.kernel.screen, self.kernel.widgets
        if kind.startswith("comm_"):
            widgets.hear(kind, content, message)
            return
        if widgets.catching:
            screen = widgets.screen
            widgets.catch(widgets.shell.kernel.get_parent()["header"]["msg_id"])
        if ours:
            self.show_error()  # it was not the last: the code went on
        if kind == "stream":
            screen.stream(name, content["name"], content["text"])
        elif kind in ("display_data", "execute_result", "update_display_data"):
            screen.display(name, kind, content)
        elif kind == "clear_output":
            screen.clear(bool(content.get("wait")))
        elif kind == "error":
            self.error = dict(content, traceback=[*map(str, content["traceback"])])
            if not ours:
                self.show_error()
        if widgets.catching:
            widgets.catch("")

    def show_error(self):
        if self.error:
            self.kernel.screen.error(self.kernel.name, self.error)
        self.error = None


# ---- what is done with a kernel -------------------------------------------

BARRIER = "waits for the others"
SILENCE = 1       # seconds without a message after which we ask whether the kernel lives
HALF_SILENCE = 0.3  # seconds to wait for the other half of an answer, before we ask for it
ASK_AGAIN = 3     # seconds between two such questions
HEARTBEAT = 2     # seconds of silence after which its heartbeat is asked for, and then told
NO_MESSAGE = 2    # seconds after which an interrupt that was not answered is sent as a signal
HEEDLESS = 5      # seconds that late code has to heed its interrupt
PORT_TAKEN = "Address already in use"


def request(kernel, kind, content, **more):
    """One request, from its sending to its complete `Answer`, which it returns. Raises
    `Failed` with what went wrong over there, or on the way. Thrown in, that interrupts the
    code (protocol, "Kernel interrupt"); a second Ctrl-C leaves the kernel busy."""
    answer = kernel.ask(kind, content, **more)
    answer.reply = {} if kind.startswith("comm_") else None  # those have none
    sent = kernel.heard = time.monotonic()
    kernel.death = kernel.manager and kernel.death  # an attached one may live again
    asked = probed = pinged = 0   # when it was asked whether it lives, for its answer, its beat
    typed = None                  # the answer to its question
    hurry, interrupted, late = None, 0, False  # why it is interrupted, and since when
    wanted = False                # the interrupt is yet to be sent
    while True:
        if not kernel.sockets:
            raise Failed("ShutdownError", "the kernel was shut down")
        if not kernel.language and kernel.connect():  # it starts, elsewhere than was known
            answer = kernel.ask(kind, content)
        came = kernel.listen(answer)
        replied, idle = answer.reply is not None, not kernel.unanswered
        now = time.monotonic()
        if replied and idle and now > kernel.interrupting:
            break
        silent, broken = now - kernel.heard, kernel.broken > max(sent, probed)

        # does it live?
        if kernel.dying is None and (kernel.exited or now - asked > ASK_AGAIN and (
                silent > SILENCE or broken)):
            kernel.dying, asked = kernel.later(kernel.ended()), now
        if kernel.dying is not None and kernel.dying.done():
            if not kernel.dying.exception():
                kernel.death = kernel.death or kernel.dying.result()  # some tell it once only
            kernel.dying = None
        if not kernel.language and f"ZMQError: {PORT_TAKEN}" in kernel.last_words():
            raise Failed("DeadKernelError", "a port was taken")  # it may hang, or have no heart
        if kernel.death and silent > 0.2:
            # what starts a kernel somewhere else may have told why it ended there
            words = kernel.last_words() if kernel.client.transport != "ipc" else ""
            raise Failed("DeadKernelError", f"the kernel died ({kernel.death}); " + (
                "the next cell that names it starts it anew" if kernel.manager else
                "it was not started here") + words)

        # was the reply lost, or the idle status? The answer to a later request tells
        if (broken or replied != idle and silent > HALF_SILENCE) and now - probed > ASK_AGAIN:
            answer.probe, probed = kernel.ask("kernel_info_request", {}).msg_id, now

        # does the network live? (protocol, "Heartbeat for kernels")
        if silent > HEARTBEAT and pinged < kernel.heard:
            kernel.sockets["hb"].send(b"ping")
            pinged = now
        note = f"does not answer since {time.ctime(time.time() - silent)[11:19]}" if (
            kernel.heard < pinged < now - HEARTBEAT) else None

        # does it heed the interrupt? One that comes before the code has begun would be lost
        if wanted and (answer.begun or now - interrupted > SILENCE):
            kernel.send("control", "interrupt_request", {})
            wanted, kernel.interrupting = False, now + NO_MESSAGE
        if hurry and 0 < kernel.interrupting < now:
            kernel.interrupting = 0  # ipykernel before 6 heeds the signal alone
            if kernel.manager:
                kernel.later(kernel.manager.signal_kernel(signal.SIGINT))
        if late and now - interrupted > HEEDLESS:
            raise Failed("TimeoutError", f"{hurry.args[1]}, ignores the interrupt; -s replaces it")
        if typed is not None and kernel.sockets["stdin"].poll(0, zmq.POLLOUT):
            kernel.send("stdin", "input_reply", {"value": typed})
            typed, kernel.heard = None, now
        if answer.question and came:
            kernel.listen_on(0.05, answer)  # what was printed before stands before
        try:
            value = yield answer.question or note
            if value is not None:
                typed, answer.question = value, None
        except Failed as error:
            if kind == "kernel_info_request":
                if replied and idle:  # nobody answers the interrupt
                    break
                raise
            if hurry and not late:
                kernel.given_up = True
                raise Failed("KeyboardInterrupt", "still busy, -s replaces") from None
            if answer.reply is None or error.args[0] == "KeyboardInterrupt":
                # the limit is one for the code, not for the journey of the outputs
                hurry, interrupted, late = error, now, error.args[0] == "TimeoutError"
                wanted, answer.question = True, None

    kernel.interrupting = 0
    kernel.screen.finish(kernel.name)
    ename, evalue, lines = answer.failure or (None, "", [])
    if late:
        ename, evalue = "TimeoutError", f"{hurry.args[1]}; interrupted"
    elif hurry and ename in ("LostReplyError", "AbortedError"):  # the kernel never sent it
        ename, evalue = "KeyboardInterrupt", "stopped"
    if ename is not None:
        raise Failed(ename, evalue, lines or (answer.error or {}).get("traceback", []))
    answer.show_error()
    return answer


def execute(kernel, code, function=None, *arguments, silent=True, **more):
    """A request that executes code and then calls a function of the remote side, as an
    expression that any Python reads (protocol, "Execute")."""
    call = function and f"__import__('_remote_exec').{function.__name__}{arguments!r}"
    return request(kernel, "execute_request", {
        "code": code, "silent": silent, "store_history": not silent,
        "user_expressions": {"remote_exec": call} if call else {},
        "allow_stdin": getattr(getattr(kernel.magics.shell, "kernel", None), "_allow_stdin", True),
        "stop_on_error": False}, **more)


def start(kernel):
    """Have a kernel started, and learn what it is (protocol, "Kernel info"). Until it answers,
    its connection file is followed: a batch job may write there on which node it runs."""
    magics = kernel.magics
    kernel.loop = magics.loops["local"]
    try:
        magics.check_open_files()
        if kernel.spec.endswith(".json"):  # it runs already
            kernel.launched = kernel.later(asyncio.sleep(0))
        else:
            spec = magics.kernelspecs.get_kernel_spec(kernel.spec)
            if "kernel_provisioner" in spec.metadata:  # not jupyter_client's own, it may block
                kernel.loop = magics.loops[kernel.name]
            kernel.manager = AsyncKernelManager(
                kernel_name=kernel.spec, kernel_spec_manager=magics.kernelspecs,
                config=magics.connection_config(spec),
                log=logging.Logger("remote_exec", logging.CRITICAL + 1),  # to nowhere
                context=zmq.asyncio.Context.shadow(magics.context.underlying),
                connection_file=tempfile.mktemp(".json", "kernel-", jupyter_runtime_dir()))
            # here a kernel's own output would show a second time, and unlabelled; it is
            # appended, since reading moves the place where the process would write
            kernel.stderr = open(tempfile.mktemp("", "stderr-", jupyter_runtime_dir()), "a+",
                                 errors="backslashreplace")
            with contextlib.suppress(PermissionError):  # Windows
                os.unlink(kernel.stderr.name)
            kernel.launched = kernel.later(kernel.manager.start_kernel(
                stdout=subprocess.DEVNULL, stderr=kernel.stderr))
        while not kernel.launched.done():
            yield
        kernel.launched.result()
        while not kernel.connect():
            yield
        answer = yield from request(kernel, "kernel_info_request", {})
        while not kernel.sockets["stdin"].poll(0, zmq.POLLOUT):  # a question would be lost
            yield from request(kernel, "kernel_info_request", {})
        language = dict(answer.reply.get("language_info") or {})
        version = tuple(map(int, re.findall(r"\d+", str(language.get("version")))[:2]))
        if language.get("name") == "python":
            kernel.protocol = 5 if version >= (3, 8) else 4 if version >= (3, 4) else 2
            yield from execute(kernel, SETUP_CODE)
        kernel.language, kernel.broken = str(language.get("name")), 0
    except Exception as error:
        ename, cause = error.args[:2] if isinstance(error, Failed) else (
            type(error).__name__, str(error))
        if ename == "TimeoutError" and kernel.client:
            cause += f"; nothing answers at {kernel.client.ip}, as its connection file has it"
        if ename != "KeyboardInterrupt":
            cause = f"could not start: {kernel.death or cause}{kernel.last_words()}"
        raise Failed(ename, cause) from None
    finally:
        if not kernel.language:
            kernel.stop()


def fetch(kernel, code, names):
    """Execute code and bring variables back; returns ({name: value}, failures)."""
    with kernel.magics.aside(kernel.near) as aside:
        answer = yield from execute(kernel, code, send, names, kernel.protocol,
                                    not kernel.manager, aside, silent=not code.strip())
        if answer.outputs is None:
            raise Failed("LostReplyError", "the outputs were lost; fetch them without code")
        (parts, failures), frames = answer.outputs
        try:
            values, more = unpack(parts, frames, aside)
        except KeyboardInterrupt:
            raise Failed("KeyboardInterrupt", "not loaded here") from None
    return {name: values[name] for name in names if name in values}, failures + more


class Driver:
    """Goes on with what is done with kernels, with one limit, and one Ctrl-C, for all of them,
    which is counted while this is entered."""

    def __init__(self, kernels, screen):
        self.kernels, self.screen, self.previous = kernels, screen, None
        self.presses = self.heeded = 0
        self.stopped = "stopped"  # what Ctrl-C does to them; None: it ends the waiting alone

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not the main thread: Ctrl-C doesn't come here
            self.previous = signal.signal(signal.SIGINT, self.on_interrupt)
        return self

    def __exit__(self, kind, error, _):
        for kernel in self.kernels:
            if kernel.run.steps and not kernel.run.since:
                kernel.run.end()
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
        if kind is KeyboardInterrupt or kind is None and self.presses > self.heeded:
            final = KeyboardInterrupt(str(error or "all was done"))
            final._render_traceback_ = lambda: [f"KeyboardInterrupt: {final}"]
            raise final from None

    def on_interrupt(self, signum, frame):
        self.presses += 1
        work = WORK_HERE & {each.f_code for each, _ in traceback.walk_stack(frame)}
        if work and (self.stopped or unpack.__code__ not in work):
            raise KeyboardInterrupt

    def drive(self, limit=None, late=None, doing="waiting for", stopped="stopped"):
        """Go on with the kernels until each is at the BARRIER, or done. Those that are not
        after `limit` seconds are thrown `late`, and at each Ctrl-C a failure that says
        `stopped`."""
        self.stopped = stopped
        begin = told = stepped = time.monotonic()
        waiting = [kernel for kernel in self.kernels if kernel.run.steps]
        ready = waiting if self.presses == self.heeded else ()  # it came between two phases
        while waiting:
            for kernel in ready:
                kernel.run.step()
            now, hurries = time.monotonic(), []
            if limit and now - begin > limit:
                limit, hurries = None, [late]
            while self.presses > self.heeded:
                if not stopped:
                    raise KeyboardInterrupt(f"{some(waiting)} not waited for")
                self.heeded += 1
                hurries.append(Failed("KeyboardInterrupt", stopped))
            for kernel in waiting:
                for hurry in hurries:
                    kernel.run.step(hurry)
                if isinstance(kernel.run.waits_for, tuple) and self.presses == self.heeded:
                    kernel.run.step(self.answer(kernel))
            waiting = [each for each in waiting if each.run.steps and each.run.waits_for != BARRIER]
            if waiting and now - told > 1:
                told = now
                self.tell(waiting, doing, now - begin)
            ready = self.poll(waiting)
            if not ready or time.monotonic() - stepped > 0.1:
                stepped, ready = time.monotonic(), waiting
        self.screen.status("")
        self.screen.flush()

    def tell(self, waiting, doing, seconds):
        """Show what has been printed, and, after 3 s, who is waited for."""
        self.screen.flush()
        notes = [f"; {each.name} {each.run.waits_for}" for each in waiting
                 if isinstance(each.run.waits_for, str)]
        if seconds > 3 and (len(self.kernels) > 1 or notes or not waiting[0].language):
            ready = some(kernel for kernel in self.kernels if kernel not in waiting)
            self.screen.status(f"{doing} {some(waiting)} ({seconds:.0f} s)" + "".join(notes[:3])
                               + (ready and f"; ready: {ready}"))

    def poll(self, kernels):
        """Those from which something has come, within 0.1 s; None if some have no sockets yet."""
        if not all(kernel.sockets for kernel in kernels):
            return time.sleep(0.02)
        owners = {each: kernel for kernel in kernels for each in kernel.sockets.values()}
        return {owners[each] for each, _ in zmq.zmq_poll(
            [(each, zmq.POLLIN) for each in owners], 100)}

    def answer(self, kernel):
        """What the user says to what the kernel asks; None at Ctrl-C."""
        prompt, password = kernel.run.waits_for
        ask = getpass.getpass if password else builtins.input
        try:
            self.screen.finish(kernel.name)
            self.screen.flush()
            return ask(label(kernel.name, prompt, self.screen.labelled) + prompt)
        except EOFError:
            return "\x04"
        except KeyboardInterrupt:
            self.presses = max(self.presses, self.heeded + 1)

    def phase(self, *arguments, **options):
        """`drive` them, and raise what they, taken together, came to."""
        self.drive(*arguments, **options)
        failures = {each.name: each.run.failure for each in self.kernels if each.run.failure}
        for kernel in self.kernels:
            kernel.run.since = None  # it is told now
            if kernel.run.failure and kernel.death:
                kernel.stop()
        if self.heeded:
            stopped = {}
            for name in [*failures]:
                if failures[name].ename == "KeyboardInterrupt":
                    _, what, lines = failures.pop(name)
                    stopped.setdefault("stopped" if lines else what, []).append(name)
            if failures:
                self.say("\n".join(RemoteError(
                    failures, self.screen.labelled)._render_traceback_()))
            raise KeyboardInterrupt("; ".join(
                f"{', '.join(names)} {what}" for what, names in stopped.items())
                or "no kernel stopped")
        if failures:
            raise RemoteError(failures, self.screen.labelled)

    def say(self, text):
        self.screen.write(sys.stderr, text + "\n")


WORK_HERE = {work.__code__ for work in (pack, unpack, Driver.answer)}  # that Ctrl-C ends at once


def some(kernels):
    """Their names, but not a hundred of them."""
    return textwrap.shorten(", ".join(kernel.name for kernel in kernels), 90, placeholder=" ...")


# ---- between the calls ----------------------------------------------------

def tend(kernel):
    """Go on with a run in the background: in a notebook between the cells, with its output
    under this one; elsewhere, whoever waits for it does so."""
    async def go_on(run, heard=0):
        while run.steps and kernel.run is run:
            if kernel.magics.lock.acquire(blocking=False):
                try:
                    run.step()
                finally:
                    kernel.magics.lock.release()
            came, heard = kernel.heard > heard, kernel.heard
            await asyncio.sleep(0 if came else 0.05)
        if kernel.run is run and run.since and run.failure:  # nobody has dealt with it
            run.since = None
            error = RemoteError({kernel.name: run.failure}, kernel.screen.labelled)
            kernel.magics.shell.showtraceback((RemoteError, error, None))
    if kernel.screen.notebook:
        with contextlib.suppress(RuntimeError):  # a thread has no running loop
            kernel.task = asyncio.get_running_loop().create_task(go_on(kernel.run))


def wait_for(kernel, names):
    """Have these attributes, and no others, wait for the run in the background."""
    for name in kernel.awaited:
        delattr(type(kernel.namespace), name)
    # (`__doc__`, `__dict__`: what each object has can't be replaced, and answers at once)
    kernel.awaited = [name for name in names if not hasattr(KernelNamespace, name)]
    for name in kernel.awaited:
        setattr(type(kernel.namespace), name, property(
            lambda _, name=name: collect(kernel, name),
            lambda own, value, name=name: vars(own).update({name: value}),
            lambda own, name=name: vars(own).pop(name, None)))


def collect(kernel, name):
    """The variable, when it has come, or the run's RemoteError. Ctrl-C ends just the wait,
    and another thread's wait holds up no call."""
    run, main = kernel.run, threading.current_thread() is threading.main_thread()
    while run.steps and not main and not isinstance(run.waits_for, tuple):
        with kernel.magics.lock:
            run.step()
        time.sleep(0.05)
    with kernel.magics.lock:
        if kernel.run is run:
            with Driver([kernel], kernel.screen) as driver:
                driver.phase(stopped=None)
        elif run.failure:
            raise RemoteError({kernel.name: run.failure})
    return getattr(kernel.namespace, name)


def from_front_end(kernel, kind, message):
    """What the front end says to a widget goes to the kernel. As with a local widget,
    the notebook waits until it has dealt with that, but not for one that is busy."""
    lock, run = kernel.magics.lock, kernel.run
    more = {key: message[key] for key in ("buffers", "metadata")}
    if threading.current_thread() is not threading.main_thread():  # a subshell's
        async def in_main_thread():
            from_front_end(kernel, kind, message)
        loop = kernel.magics.shell.kernel.io_loop.asyncio_loop
        moved = asyncio.run_coroutine_threadsafe(in_main_thread(), loop)
        while loop.is_running() and not moved.done():  # a front end hears nothing after idle
            time.sleep(0.005)
    elif kernel.sockets and not lock.acquire(blocking=False):  # a call is on, in another thread
        asyncio.get_running_loop().call_later(0.1, from_front_end, kernel, kind, message)
    elif kernel.sockets:
        try:
            if kernel.run.steps or kernel.unanswered:
                kernel.ask(kind, message["content"], **more)
            else:
                kernel.run = Run(request(kernel, kind, message["content"], **more))
                with contextlib.suppress(KeyboardInterrupt), Driver(
                        [kernel], kernel.screen) as driver:
                    driver.drive()
        finally:
            kernel.run = run  # its failure may not have been told
            lock.release()


# ---- a call ---------------------------------------------------------------

class Call(Driver):
    """One call of the magic: what its line says, and its steps in their order."""

    def __init__(self, magics, options, code, local_ns):
        """Raises UsageError before anything is done."""
        self.magics, self.locals = magics, collections.ChainMap(local_ns, magics.shell.user_ns)
        self.replace, self.background = "s" in options, "b" in options
        self.only_stops = self.replace and not code.strip()
        targets = parse_targets(self.entries(options.get("k")))
        super().__init__({}, Screen(magics.shell, len(targets) > 1))
        self.outputs, inputs, pushes = (
            parse_names(option, options[option]) if option in options else [] for option in "oip")
        self.timeout = parse_seconds(options["t"]) if "t" in options else None
        if self.only_stops and (self.outputs or pushes):
            raise UsageError("-s leaves no kernel for -o or -p, unless there is code to run")
        if self.background and (self.timeout or not code.strip()):
            raise UsageError("-b needs code, and no -t; -t in a call without code waits for it")
        values = {name: self.local(name, "i") for name in inputs}
        self.push = {name: self.local(name, "p") for name in pushes}
        self.packed = functools.lru_cache(None)(self.pack)
        for name, (spec, directory) in targets.items():
            kernel = magics.kernel(name, spec)
            spec = self.only_stops or magics.spec(kernel, spec, self.replace)
            self.kernels[kernel] = spec, directory, substitute(code, name, values)

    def entries(self, text):
        """The entries of -k, or of the local variable that it names in braces."""
        if not text:
            raise UsageError("-k NAME[=SPEC][:DIRECTORY],... is missing; see %remote_exec?")
        value = self.local(text[1:-1], "k") if re.fullmatch(r"\{\w+\}", text) else text
        if isinstance(value, str):
            return re.split(r"\s*,\s*|\s+", value.strip())
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
            return value
        raise UsageError(f"-k {text}: needs a string or a list of strings, "
                         f"not {type(value).__name__}")

    def local(self, name, option):
        """The value of a local variable: the caller's, else the user's."""
        try:
            return self.locals[unicodedata.normalize("NFKC", name)]
        except KeyError:
            raise UsageError(f"-{option}: there is no local variable {name!r}") from None

    def run(self):
        """All steps. Raises UsageError, RemoteError, KeyboardInterrupt."""
        patience = self.magics.startup_timeout
        late = Failed("TimeoutError", f"still busy after {self.timeout or 0:g} s")
        with self, contextlib.ExitStack() as self.files:
            self.packed(pickle.HIGHEST_PROTOCOL, False)  # what can't go is told first
            for kernel in self.kernels:
                self.magics.kernels[kernel.name] = kernel
                kernel.screen = self.screen
                if self.replace and kernel.run.steps:
                    kernel.run.end(Failure("ShutdownError", "the kernel was shut down"))
                if self.replace or not kernel.run.since:
                    kernel.run = Run()
            try:
                self.phase(self.timeout, late)  # what runs in the background
            finally:
                for kernel in self.kernels:
                    wait_for(kernel, [])
            for kernel, plan in self.kernels.items():
                kernel.run = Run(self.serve(kernel, *plan))
            self.phase(15 if self.replace else 1, Failed(
                "ShutdownError", "may still run: it does not answer"), "stopping", "not waited for")
            self.phase(patience + (len(self.kernels) - 1) / 2, Failed(  # on few cores
                "TimeoutError", f"not ready after {patience:g} s "
                "(c.RemoteExecMagics.startup_timeout)"), "starting", "not started")
            self.phase(self.timeout and max(self.timeout, patience), late, "preparing")
            self.files.close()
            self.packed = self.push = None  # the run keeps none of these alive
            if not self.background:
                return self.phase(self.timeout, late)
            for kernel in self.kernels:
                kernel.run.since = time.strftime("running since %H:%M:%S")
                wait_for(kernel, self.outputs)
                kernel.run.step()
                tend(kernel)

    def serve(self, kernel, spec, directory, code):
        """All that one kernel goes through; at each BARRIER it waits for the others."""
        kernel.listen_on(0)  # what it printed since the last call
        # it may have ended, or been restarted by its owner, since it was seen to work
        suspect = kernel.launched and (kernel.exited or kernel.broken or kernel.death)
        if self.replace:
            end = kernel.stop(seconds=None)
            while end and not end.done():
                yield
            if end and end.exception():
                raise Failed("ShutdownError", f"may still run: {end.exception()!r}")
        elif (kernel.unanswered or kernel.given_up) and not suspect:  # it must have ended by now
            try:
                yield from request(kernel, "kernel_info_request", {})
            except Failed as error:
                if error.args[0] != "LostReplyError":  # an interrupt may garble what is sent
                    raise UsageError(
                        f"{kernel.name} is still busy; wait, or replace it with -s") from None
            kernel.given_up = False
        yield BARRIER

        if self.only_stops:
            return
        if suspect and not self.replace:
            try:
                yield from execute(kernel, "__import__('_remote_exec')" if kernel.protocol else "")
            except Failed as error:
                if "_remote_exec" in error.args[1]:
                    self.say(f"{kernel.name} was restarted by others; what it held is gone")
                    yield from execute(kernel, SETUP_CODE)
                elif kernel.manager and kernel.death:
                    self.say(f"{kernel.name} had died ({kernel.death}) and is started anew")
                    kernel.stop()
                else:
                    raise
            kernel.broken = 0
        kernel.spec = spec
        if not kernel.launched:
            try:
                yield from start(kernel)
            except Failed as error:  # over TCP, a stranger may take a port before it does
                if PORT_TAKEN not in error.args[1]:
                    raise
                yield from start(kernel)
        self.magics.shell.user_ns[kernel.name] = kernel.namespace
        yield BARRIER

        if kernel.protocol is None and (directory or self.push or self.outputs):
            raise UsageError(f"{kernel.name} runs {kernel.language}: -o, -p and :DIRECTORY need a "
                             "Python kernel")
        if directory or self.push:
            parts, frames, aside = self.packed(kernel.protocol, kernel.near)
            yield from execute(kernel, "", prepare, directory, parts, aside, buffers=frames)
        yield BARRIER

        if self.outputs:
            values, failures = yield from fetch(kernel, code, self.outputs)
            vars(kernel.namespace).update(values)
            wait_for(kernel, [name for name in kernel.awaited if name not in values])
            if failures:
                (ename, evalue), *rest = map(tuple, failures)
                raise Failed(ename, "; ".join([evalue, *map("{0[0]}: {0[1]}".format, rest)]))
        elif code.strip():
            yield from execute(kernel, code, silent=False)

    def pack(self, protocol, near):
        """(parts, frames, directory of those that are large, for who is near) of what is
        pushed."""
        if near:
            parts, frames, _ = self.packed(protocol, False)
            aside = self.files.enter_context(self.magics.aside(near))
            return parts, set_aside(frames, aside), aside
        parts, frames, failures = pack(list(self.push), self.push, protocol)
        if failures:
            raise UsageError(f"-p: can't pickle {' '.join(failures[0][1].split())}")
        return parts, frames, None


# ---- the magic ------------------------------------------------------------

def new_loop():
    """An asyncio loop that runs in a thread of its own, until it is stopped."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=lambda: (loop.run_forever(), loop.close()), daemon=True).start()
    return loop


@magics_class
class RemoteExecMagics(Magics):
    """The magic ``%remote_exec``, and the kernels that it started."""

    startup_timeout = Float(60, help="Seconds that a kernel may take to start.").tag(config=True)
    begins = r"\s*%{0,2}remote_exec\s"  # a line that is completed

    def __init__(self, shell, **options):
        super().__init__(shell, **options)
        self.kernels = {}    # by NAME; also those that were shut down
        self.ends = []       # futures, which the session's end waits for
        self.loops = collections.defaultdict(new_loop)  # their processes are looked after there
        self.directory = None  # of Unix sockets and large buffers: in memory, if there is such
        self.context = zmq.Context(io_threads=2)
        self.context.rcvhwm = self.context.sndhwm = 0  # drop nothing, never block
        self.context.max_sockets = self.context.get(zmq.SOCKET_LIMIT)
        self.lock = threading.RLock()
        self.pid = os.getpid()

    @no_var_expand
    @needs_local_scope
    @line_cell_magic
    def remote_exec(self, line, cell=None, local_ns=None):
        """Run code on one or many Jupyter kernels, and bring variables back.

            %remote_exec [options] code

            %%remote_exec -k kernel1=py3:/data/run7,kernel2=far:/scratch -i filenames -o x,y
            x, y = __import__("numpy").loadtxt("{filenames}").T

            plt.plot(kernel1.x, kernel1.y); plt.plot(kernel2.x, kernel2.y)

        Options come first, `--` ends them; the rest is code, taken verbatim.

        -k, --kernels NAME[=SPEC][:DIRECTORY],...
                               NAME is the variable that has what comes back. SPEC picks the
                               kernelspec (a part of its name will do, _ stands for anything), or
                               is the .json connection file of a kernel that runs, which is never
                               shut down. DIRECTORY is where it works from now on. `-k {names}`
                               takes a string, or a list of strings, which may have blanks.
        -o, --output NAMES     Variables to bring back, as NAME.variable.
        -i, --input NAMES      Local variables put into the code wherever {variable} stands, as
                               str() writes them; a dict is looked up by kernel NAME.
        -p, --push NAMES       Local variables sent as objects, before the code runs.
        -s, --shutdown         Shut the kernels down; with code, restart them and run it.
        -t, --timeout SECONDS  Interrupt what is still busy then.
        -b, --background       Return at once. What -o names is waited for where it is used,
                               and all of it by the next call that names the kernel.
        -l, --list             List the running kernels, and the kernelspecs there are.

        Kernels start when first named, work at the same time, and keep their state.
        Ctrl-C interrupts them; a second one gives the prompt back at once. What went
        wrong is a `RemoteError`, whose `.failures` maps NAME to (ename, evalue, traceback).
        """
        options, code = parse_line(line)
        code = "\n".join(part for part in (code, cell) if part)
        if "l" in options and code.strip():
            raise UsageError("-l runs no code")
        with self.lock:
            if "l" in options:
                print("\n".join(self.listing()))
            else:
                Call(self, options, code, local_ns or {}).run()

    # NAMEs and kernelspecs

    @property
    def kernelspecs(self):
        return KernelSpecManager(config=self.shell.config)

    def kernel(self, name, spec):
        """The kernel that NAME stands for, or will; UsageError if it means something else."""
        kernel = self.kernels.get(name) or Kernel(self, name)
        value = self.shell.user_ns.get(name, getattr(builtins, name, kernel.namespace))
        ours = type(value).__name__ == "KernelNamespace" and object.__getattribute__(value, KERNEL)
        if not ours or ours.name != name:
            raise UsageError(f"{name} is something else here; try my_{name}={spec or kernel.spec}")
        if ours is not kernel:  # from before this module was reloaded
            wait_for(ours, [])
            kernel.namespace, kernel.spec = value, ours.spec
            object.__setattr__(value, KERNEL, kernel)
        return kernel

    def spec(self, kernel, spec, replace):
        """The full kernelspec name, or connection file, that NAME=SPEC means; UsageError if
        NAME runs another, which is not to be replaced."""
        wanted = spec or kernel.spec
        if kernel.launched and wanted == kernel.spec:
            return kernel.spec
        if wanted.endswith(".json"):
            try:
                found = filefind(os.path.expanduser(wanted), [".", jupyter_runtime_dir()])
            except OSError:
                raise UsageError(f"-k: there is no connection file {wanted!r}") from None
        else:
            found = match_spec(wanted, list(self.kernelspecs.find_kernel_specs()))
        if kernel.launched and found != kernel.spec and not replace:
            raise UsageError(f"{kernel.name} runs {kernel.spec}; -s replaces it by {found}")
        return found

    # the kernels there are

    def check_open_files(self):
        """Raise OSError where one kernel more, with those that start, would open too many: ZMQ
        would wait for ever for what it lacks. The limit is raised as far as it goes."""
        with contextlib.suppress(ImportError, FileNotFoundError):  # Windows has no such limit
            import resource
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            soft = max(soft, 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            starting = [1 for each in self.kernels.values() if each.launched and not each.language]
            if len(os.listdir("/dev/fd")) + 15 * len(starting) + 25 > soft:
                raise OSError("too many open files")

    def connection_config(self, spec):
        """How a kernel is reached: a local ipykernel over Unix sockets, where only the user can
        enter, others over TCP, encrypted where they can; or as the user's own settings say."""
        os.makedirs(jupyter_runtime_dir(), mode=0o700, exist_ok=True)
        ours, users = {}, self.shell.config.get("KernelManager", {})
        ipykernel = "kernel_provisioner" not in spec.metadata and spec.argv[1:3] in (
            ["-m", "ipykernel_launcher"], ["-m", "ipykernel"])
        if ipykernel and zmq.has("ipc") and not {"transport", "ip"} & set(users):
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"  # unix(7): short
            if not os.path.isdir(self.directory or ""):  # or somebody has cleaned up there
                self.directory = tempfile.mkdtemp("", f"rexec-{self.pid}-", folder)
            ours = {"transport": "ipc", "ip": tempfile.mktemp(prefix="", dir=self.directory)}
        elif zmq.has("curve"):  # what an older jupyter_client has no use for, it ignores
            ours = {"transport_encryption": "auto"}
        return Config(self.shell.config, KernelManager={**ours, **users})

    @contextlib.contextmanager
    def aside(self, near):
        """A directory for the large buffers of a kernel that is near."""
        directory = None
        with contextlib.suppress(OSError):  # somebody has cleaned up there
            directory = tempfile.mkdtemp(dir=self.directory) if near else None
        try:
            yield directory
        finally:
            if directory and os.getpid() == self.pid:  # not a forked child
                shutil.rmtree(directory, ignore_errors=True)

    def close(self):
        """Shut everything down, within two seconds: the end of the session."""
        running = [kernel for kernel in self.kernels.values() if kernel.launched]
        if os.getpid() != self.pid:  # a forked child: the files are its parent's
            for kernel in running:
                if kernel.manager:
                    kernel.manager.connection_file = ""
            return
        for kernel in running:
            kernel.stop(seconds=1.2)
            kernel.run.since = None
        unfinished = concurrent.futures.wait(self.ends, timeout=2).not_done
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        if not unfinished:
            for loop in self.loops.values():
                loop.call_soon_threadsafe(loop.stop)
            self.context.term()

    # what helps the user

    def listing(self):
        """The lines of -l."""
        running = [kernel for kernel in self.kernels.values() if kernel.launched]
        yield "running kernels:" if running else "running kernels:\n  none"
        for kernel in running:
            kernel.run.step() if kernel.run.steps else kernel.listen_on(0)
            state = "dead" if kernel.exited else kernel.run.since if kernel.run.steps else (
                "busy" if kernel.unanswered else "idle")
            yield f"  {kernel.name}  {kernel.spec}  {state}"
        yield "\n  ".join(["kernelspecs:", *sorted(self.kernelspecs.find_kernel_specs())])

    def complete(self, shell, event):
        """Options, or after -k the names of kernels and kernelspecs; IPython takes what fits."""
        if re.search(r"\s-\S*$", event.text_until_cursor):
            return ["-" + letter for letter in SHORT.replace(":", "")] + [
                "--" + name.rstrip("=") for name in LONG]
        if re.search(r"\s(-k|--kernels)\s+\S*$", event.text_until_cursor):
            return [*self.kernels, *self.kernelspecs.find_kernel_specs()]


def load_ipython_extension(ipython):
    """Register the magic; its kernels end with the session."""
    magics = RemoteExecMagics(ipython)
    ipython.register_magics(magics)
    ipython.set_hook("complete_command", magics.complete, re_key=magics.begins)
    atexit.register(magics.close)
    publish_all(getattr(ipython, "kernel", None))


def unload_ipython_extension(ipython):
    """Shut the kernels down, and take the magic away."""
    magics = ipython.magics_manager.registry.pop("RemoteExecMagics")
    for kind in ipython.magics_manager.magics.values():
        kind.pop("remote_exec", None)
    ipython.strdispatchers["complete_command"].regexs.pop(re.compile(magics.begins), None)
    atexit.unregister(magics.close)
    magics.close()
