"""The parent's side of an engine process: start it, talk to it, explain its end.

A message is a frame: a four-byte big-endian length, then that many bytes of JSON in UTF-8. Never
pickle, as the engine reads untrusted files. The engine may die at any moment; then everything
under way, and everything asked afterwards, raises one EngineError that says why and what to do.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar, cast

from pydantic import Field, TypeAdapter

from ..errors import EngineError, ModelFileError, RequestError, printable
from . import client
from .protocol import (
    BandwidthsMeasured,
    BufferSizes,
    Cancel,
    Delta,
    Detokenize,
    Detokenized,
    DeviceList,
    Failed,
    FileSpan,
    FromEngine,
    Generate,
    ListDevices,
    Load,
    Loaded,
    LoadProgress,
    MeasureBandwidth,
    Message,
    Placement,
    Probe,
    Probed,
    Request,
    RestoreState,
    SaveState,
    StateRestored,
    StateSaved,
    TextPiece,
    ToEngine,
    Tokenize,
    Tokenized,
    Tune,
    Tuned,
)
from .rates import Bandwidths, Tuning

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")
_codec: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


class ProtocolError(Exception):
    """Bytes that are not a message."""


def encode(message: Message) -> bytes:
    """A message as a frame."""
    payload = _codec.dump_json(message, exclude_defaults=False)
    return _LENGTH.pack(len(payload)) + payload


def read(stream: BinaryIO) -> Message | None:
    """The next message of a blocking stream; None at its end.

    Raises ProtocolError where a frame is cut short, too large or not a message.
    """
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise ProtocolError("a frame was cut short")
    (n_bytes,) = _LENGTH.unpack(head)
    if n_bytes > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {n_bytes} bytes; at most {MAX_FRAME_BYTES} are allowed")
    payload = stream.read(n_bytes)
    if len(payload) < n_bytes:
        raise ProtocolError("a frame was cut short")
    try:
        return _codec.validate_json(payload)
    except ValueError as error:
        raise ProtocolError(f"not a message: {error}") from error


# NTSTATUS values that Windows gives as exit codes, as the signals they correspond to
WINDOWS_STATUS = {
    0xC0000005: "SIGSEGV",
    0xC000001D: "SIGILL",
    0xC0000006: "SIGBUS",
    0xC0000409: "SIGABRT",
    3: "SIGABRT",
}

SENTENCES = {
    "SIGABRT": (
        "llama.cpp gave up",
        "The model file may be damaged, or memory ran out: try another quant or a smaller -c.",
    ),
    "SIGSEGV": (
        "llama.cpp crashed (invalid memory access)",
        "The model file may be damaged: check it against its sha256, or try another file.",
    ),
    "SIGBUS": (
        "llama.cpp could not read the model file any more",
        "The file was cut short or its disk failed while it was in use: check the file.",
    ),
    "SIGILL": (
        "llama.cpp was built for a processor with more features than this one",
        "Rebuild it here: pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python"
        " llama-cpp-python",
    ),
    "SIGKILL": (
        "The engine was killed, most likely because memory ran out",
        "Try a smaller quant, a smaller -c, or close other programs.",
    ),
    "SIGTERM": ("The engine was asked to stop from outside", "Run the command again."),
}

# Lines of a native log that name a cause, the best first
CAUSES = (
    "GGML_ASSERT",
    "CUDA error",
    "out of memory",
    "what():",
    "Assertion",
    "Fatal Python error",
)
BAD_ALLOC = "std::bad_alloc"
"""How C++ says that no memory could be had."""


def engine_died(returncode: int | None, log: Sequence[str]) -> EngineError:
    """The error for an engine that ended with this code; `log` is the end of what it printed."""
    name = signal_name(returncode)
    cause = native_cause(log)
    if name in SENTENCES:
        message, hint = SENTENCES[name]
    else:
        message = f"The engine stopped unexpectedly ({name or f'exit code {returncode}'})"
        hint = "Run again with -v to see llama.cpp's log."
        cause = cause or (log[-1].strip() if log else "")
    return EngineError(f"{message}{f': {cause}' if cause else ''}.", hint)


def engine_unreadable(reason: str) -> EngineError:
    """Returns the error for an engine that ran on but could not be understood any more."""
    why = f"sent what can't be read: {printable(reason)[:160]}" if reason else "fell silent"
    return EngineError(
        f"The engine {why}.",
        "Run it again; if it happens again, reinstall localmoe (pip install --force-reinstall).",
    )


def signal_name(returncode: int | None) -> str:
    """The signal that ended a process, as its POSIX name; empty where none did."""
    if returncode is None:
        return ""
    if sys.platform == "win32":
        return WINDOWS_STATUS.get(returncode & 0xFFFFFFFF, "")
    if returncode >= 0:
        return ""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def native_cause(log: Sequence[str]) -> str:
    """The line of a native log that says why, without the path of its source file."""
    for mark in CAUSES:
        for line in reversed(log):
            if mark in line:
                cause = line[line.index(mark) :].strip().rstrip(".")[:160]
                return "memory ran out" if BAD_ALLOC in cause else cause
    return ""


N_LOG_LINES = 400
STOP_SECONDS = 2.0
WAKE_SECONDS = 0.5
"""A wait without an end can't be interrupted by Ctrl-C on Windows."""
Answer = TypeVar("Answer", bound=FromEngine)
Inbox = queue.SimpleQueue["FromEngine | EngineError"]


PACKAGE_PARENT = Path(__file__).resolve().parents[2]
"""Where this package lies, which the child must find there too."""
# PYTHONSAFEPATH and -P would keep the working directory out, but only from Python 3.11 on; -I would
# leave out packages that a person installed for themselves
CHILD_PROGRAM = """\
import sys
sys.path[:] = [folder for folder in sys.path if folder]
sys.path.append(sys.argv.pop())
from localmoe.engine.worker.server import main
main()
"""
"""Starts the child without the working directory (the empty entry) on its module path."""


def with_absolute_path(env: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment whose PYTHONPATH names no folder by way of the working directory."""
    folders = env.get("PYTHONPATH", "").split(os.pathsep)
    absolute = os.pathsep.join(folder for folder in folders if os.path.isabs(folder))
    others = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    return {**others, "PYTHONPATH": absolute} if absolute else others


class EngineProcess:
    """An engine process. `env` is its whole environment; `on_log` is given its native log lines."""

    def __init__(self, env: Mapping[str, str], on_log: Callable[[str], None] | None = None) -> None:
        self._ids = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._shared: dict[int, Inbox] = {}  # those of submitted requests, until they end
        self._lock = threading.Lock()
        self._on_log = on_log
        self._log: deque[str] = deque(maxlen=N_LOG_LINES)
        self._death: EngineError | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD_PROGRAM, str(PACKAGE_PARENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**with_absolute_path(env), "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,  # a Ctrl-C at the terminal is for this process to interpret
        )
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._listen, self._read_log)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The id of the child process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the child process runs."""
        return self._death is None and self._process.poll() is None

    @property
    def log(self) -> list[str]:
        """The last lines of llama.cpp's log."""
        return list(self._log)

    # ---- what can be asked ----

    def load(
        self,
        path: str,
        placement: Placement,
        *,
        vocab_only: bool = False,
        pinned: Sequence[FileSpan] = (),
        on_progress: Callable[[float], None] | None = None,
    ) -> Loaded:
        """Load a model. Raises EngineError with llama.cpp's own reason."""
        check_path(path)
        with self._ask(lambda id: Load(id, path, placement, vocab_only, tuple(pinned))) as inbox:
            while True:
                answer = self._next(inbox)
                if isinstance(answer, LoadProgress) and on_progress:
                    on_progress(answer.fraction)
                elif isinstance(answer, Failed):
                    reason = f"{os.path.basename(path)} can't be loaded: {answer.message}."
                    raise EngineError(
                        reason, answer.hint or "Run it with -v to see llama.cpp's log."
                    )
                elif not isinstance(answer, LoadProgress):
                    return expect(Loaded, answer, EngineError)

    def probe(self, path: str, placement: Placement) -> BufferSizes:
        """What a placement would take beside the weights; nothing is allocated."""
        check_path(path)
        with self._ask(lambda id: Probe(id, path, placement)) as inbox:
            return expect(Probed, self._next(inbox), EngineError).sizes

    def devices(self) -> DeviceList:
        """Returns the devices that llama.cpp sees. Raises EngineError."""
        with self._ask(ListDevices) as inbox:
            return expect(DeviceList, self._next(inbox), EngineError)

    def bandwidths(self, n_threads: Sequence[int], types: Sequence[str]) -> Bandwidths:
        """How fast this machine's devices are; takes a second, and memory of every GPU."""
        wanted = tuple(n_threads), tuple(types)
        with self._ask(lambda id: MeasureBandwidth(id, *wanted)) as inbox:
            return expect(BandwidthsMeasured, self._next(inbox), EngineError).bandwidths

    def tune(self, path: str, n_threads: Sequence[int], limit_s: float) -> Tuning:
        """What this CPU makes of a model, which is loaded for it; takes seconds and some memory."""
        with self._ask(lambda id: Tune(id, path, tuple(n_threads), limit_s)) as inbox:
            return expect(Tuned, self._next(inbox), EngineError).tuning

    def tokenize(self, pieces: Sequence[TextPiece]) -> list[tuple[int, ...]]:
        """Token ids of each piece apart, with no token added before or after."""
        with self._ask(lambda id: Tokenize(id, tuple(pieces))) as inbox:
            return list(expect(Tokenized, self._next(inbox), RequestError).tokens)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens spelled out."""
        with self._ask(lambda id: Detokenize(id, tuple(tokens))) as inbox:
            return expect(Detokenized, self._next(inbox), RequestError).text

    def generate(self, request: Request) -> Generator[Delta, None, None]:
        """Answer a request, delta by delta; the last one has a finish reason.

        Left before its end (break, Ctrl-C, an exception), the request is cancelled.
        """
        with self._ask(lambda id: Generate(id, request)) as inbox:
            while True:
                delta = expect(Delta, self._next(inbox), RequestError)
                yield delta
                if delta.finish_reason:
                    return

    def save_state(self, path: str, key: str, tokens: Sequence[int], room_bytes: int) -> StateSaved:
        """Write what is held of these tokens to a file, for a model of the same `key`."""
        wanted = path, key, tuple(tokens), room_bytes
        with self._ask(lambda id: SaveState(id, *wanted)) as inbox:
            return expect(StateSaved, self._next(inbox), RequestError)

    def restore_state(self, path: str, key: str) -> StateRestored:
        """Hold again what such a file has."""
        with self._ask(lambda id: RestoreState(id, path, key)) as inbox:
            return expect(StateRestored, self._next(inbox), RequestError)

    def submit(self, request: Request, inbox: Inbox) -> int:
        """Ask for an answer that comes in pieces into `inbox`, which may serve many requests.

        Gives the id that its deltas carry. The last one has a finish reason, or a Failed stands for
        it; once the process is dead, `inbox` is given the EngineError, once for all its requests.
        """
        id = next(self._ids)
        self._shared[id] = inbox
        try:
            self._send(Generate(id, request))
        except EngineError:
            self._shared.pop(id, None)
            raise
        return id

    def cancel(self, id: int, *, only_waiting: bool = False) -> None:
        """End a submitted request; with `only_waiting`, only if it isn't being computed yet.

        Its last delta comes all the same, and says how it ended.
        """
        self._send(Cancel(id, only_waiting))

    def close(self) -> None:
        """End the process: its input ends, and if that isn't enough, it is killed."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.wait()

    # ---- the connection ----

    @contextlib.contextmanager
    def _ask(self, message_of: Callable[[int], ToEngine]) -> Iterator[Inbox]:
        """Send a message under a fresh id; gives the inbox of its answers."""
        id = next(self._ids)
        message = message_of(id)
        inbox: Inbox = queue.SimpleQueue()
        self._inboxes[id] = inbox
        answered = False
        try:
            self._send(message)
            yield inbox
            answered = True
        finally:
            del self._inboxes[id]
            if not answered and isinstance(message, Generate) and self._death is None:
                with contextlib.suppress(EngineError):
                    self._send(Cancel(id))

    def _send(self, message: ToEngine) -> None:
        if self._death:
            raise self._death
        assert self._process.stdin is not None
        frame = client.encode(message)
        try:
            with self._lock:
                self._process.stdin.write(frame)
                self._process.stdin.flush()
        except (OSError, ValueError):
            self._threads[0].join(STOP_SECONDS)
            raise self._death or EngineError("The engine process has been closed.") from None

    def _next(self, inbox: Inbox) -> FromEngine:
        while True:
            death = self._death  # read first: what came before it is still in the inbox
            try:
                answer = inbox.get(timeout=0 if death else WAKE_SECONDS)
            except queue.Empty:
                if death:
                    raise death from None
                continue
            if isinstance(answer, EngineError):
                raise answer
            return answer

    def _listen(self) -> None:
        """Give each message to who asked for it, until there is an end of it."""
        stdout = cast(BinaryIO, self._process.stdout)
        broken = ""
        try:
            while (message := client.read(stdout)) is not None:
                self._deliver(cast(FromEngine, message))
        except client.ProtocolError as error:
            broken = str(error)
        except OSError:  # its end was closed; how the process ended says why
            pass
        returncode, ended_itself = self._wait()
        self._threads[1].join(STOP_SECONDS)  # the last words
        if ended_itself and (returncode or not broken):
            self._death = engine_died(returncode, self.log)
        else:
            self._death = engine_unreadable(broken)
        inboxes = [*self._inboxes.values(), *self._shared.values()]
        for inbox in {id(inbox): inbox for inbox in inboxes}.values():
            inbox.put(self._death)

    def _deliver(self, message: FromEngine) -> None:
        inbox = self._inboxes.get(message.id) or self._shared.get(message.id)
        if inbox is None:
            return
        if isinstance(message, Failed) or (isinstance(message, Delta) and message.finish_reason):
            self._shared.pop(message.id, None)
        inbox.put(message)

    def _wait(self) -> tuple[int, bool]:
        """Returns the exit code of the process, and whether it ended without being killed here."""
        try:
            return self._process.wait(STOP_SECONDS), True
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(), False

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            self._log.append(line)
            if self._on_log:
                try:
                    self._on_log(line)
                except Exception:  # who listened is gone; the pipe must be drained all the same
                    self._on_log = None


def check_path(path: str) -> None:
    """Raises ModelFileError where a path is no text, and could not be told to the engine."""
    try:
        path.encode()
    except UnicodeEncodeError:
        name = ascii(os.path.basename(path))
        raise ModelFileError(
            f"The path of {name} is not UTF-8 text, and llama.cpp can't be told it.", "Rename it."
        ) from None


def expect(kind: type[Answer], answer: FromEngine, error: type[EngineError]) -> Answer:
    """An answer of the kind that was asked for; a refusal becomes an error."""
    if isinstance(answer, Failed):
        raise error(answer.message, answer.hint)
    if not isinstance(answer, kind):
        raise EngineError(f"The engine answered with {answer.type!r} out of turn.")
    return answer
