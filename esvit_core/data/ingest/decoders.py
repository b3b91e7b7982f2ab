"""Check and convert images, in this process or in several of its own: Python runs one thread at a time in each."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from esvit_core.data.ingest.decode import BadImage, StoredImage, to_stored_image
from esvit_core.data.ingest.pixels import PixelSettings
from esvit_core.data.ingest.prefetch import reading_threads
from esvit_core.errors import InfrastructureError

if TYPE_CHECKING:
    from esvit_core.config import DataConfig  # a process that checks images starts without pydantic

_START = "from esvit_core.data.ingest.decoders import serve; serve()"
_LENGTH = struct.Struct("<Q")
_REQUESTS = 4  # of each process, so that it never waits for its next image
_PIPE_BYTES = 2**20  # the most that Linux allows every user
_WORTHWHILE = 1000  # images; with fewer, starting the processes takes longer than they save


@dataclass(frozen=True)
class DecodeSettings:
    """The arguments of :func:`esvit_core.data.ingest.decode.to_stored_image` that are the same for all images."""

    max_megapixels: float
    short_side: int | None
    max_aspect_ratio: float
    pixels: PixelSettings

    @classmethod
    def of(cls, config: DataConfig, pixels: PixelSettings) -> DecodeSettings:
        return cls(config.max_megapixels, config.store_short_side, config.max_aspect_ratio, pixels)

    def decode(self, data: bytes, ending: str) -> StoredImage:
        """Check and convert an image.

        Raises:
            BadImage: it is not usable.
        """
        return to_stored_image(data, self.max_megapixels, self.short_side, self.max_aspect_ratio, self.pixels, ending)


class _Process:
    """A process that checks images, for several threads: it has the next image when it is done with one.

    Attributes:
        popen: the process.
    """

    def __init__(self) -> None:
        # Not multiprocessing, which would import the main module of this process again.
        self.popen = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _widen(self.popen.stdin)
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._unanswered: collections.deque[Future[StoredImage | BadImage]] = collections.deque()

    def configure(self, settings: DecodeSettings) -> None:
        """Send the settings, which come before all images."""
        with contextlib.suppress(OSError):  # it died: its first image says so
            _send(self.popen.stdin, settings)

    def decode(self, data: bytes, ending: str) -> StoredImage | BadImage:
        """Return what the process finds.

        Raises:
            OSError, EOFError: it died.
        """
        answer: Future[StoredImage | BadImage] = Future()
        with self._sending:
            self._unanswered.append(answer)  # answers come in the order of the requests
            _send(self.popen.stdin, (data, ending))
        with self._receiving:
            while not answer.done():
                found = _receive(self.popen.stdout)
                self._unanswered.popleft().set_result(found)
        return answer.result()


class Decoders:
    """Checks and converts images for several threads; :meth:`configure` comes before the first image.

    The processes take a third of a second to start, so they are started before the settings are known.
    """

    def __init__(self) -> None:
        self._settings: DecodeSettings | None = None
        self._slots = threading.BoundedSemaphore(reading_threads())  # decoded images take much memory
        self._all: list[_Process] = []
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def start(self, processes: int) -> None:
        """Start processes, if there are none yet.

        Args:
            processes: their number; 0: the calling threads check the images.
        """
        if not self._all:
            for _ in range(processes):
                self._all.append(_Process())

    def configure(self, settings: DecodeSettings) -> None:
        """Set how images are checked and converted."""
        self._settings = settings
        for process in self._all:
            process.configure(settings)
        for process in _REQUESTS * self._all:
            self._free.put(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = [process.popen for process in self._all]
        for process in processes:
            if self._settings is None:
                process.kill()  # it may still be starting, for nothing
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()  # ends the process after its image
        for process in processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def decode(self, data: bytes, ending: str) -> StoredImage:
        """Check and convert an image.

        Raises:
            BadImage: it is not usable.
            InfrastructureError: a process died.
        """
        assert self._settings is not None
        if not self._all:
            with self._slots:
                return self._settings.decode(data, ending)
        process = self._free.get()
        try:
            found = process.decode(data, ending)
        except (OSError, EOFError):
            raise InfrastructureError(_death(process.popen)) from None
        finally:
            self._free.put(process)
        if isinstance(found, BadImage):
            raise found
        return found if found.data else replace(found, data=data)


def choose_processes(config: DataConfig, images: int) -> int:
    """Return the number of processes that check and convert so many images; 0: this one does it.

    Args:
        config: the ``data`` section of the configuration.
        images: number of images.
    """
    if config.processes != "auto":
        return config.processes
    cores = len(os.sched_getaffinity(0))
    return cores if cores > 1 and images >= _WORTHWHILE else 0


def serve() -> None:
    """Answer the requests of :class:`Decoders` until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the pipe
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # nothing else may be written between the answers
    warnings.filterwarnings("ignore", module="PIL")  # about malformed files; bad files are listed
    with contextlib.suppress(EOFError, BrokenPipeError):
        settings: DecodeSettings = _receive(requests)
        while True:
            data, ending = _receive(requests)
            answer: StoredImage | BadImage
            try:
                answer = settings.decode(data, ending)
                if not answer.reencoded:
                    answer = replace(answer, data=b"")  # the caller has it
            except BadImage as error:
                answer = error
            _send(answers, answer)


def _widen(pipe: BinaryIO | Any) -> None:
    """Let a pipe hold whole images, so that who writes one need not wait; by default, Linux has 64 KiB."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # the user's pipes may have reached their limit
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _send(pipe: BinaryIO | Any, value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> Any:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def _death(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    how = f"exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name
        how = f"{name} (out of memory?)" if name == "SIGKILL" else name
    return f"a process that checks images ended with {how}; run again, with fewer of them: data.processes"
