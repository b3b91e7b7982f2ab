"""Check and convert images, in this process or in several of its own: Python runs one thread at a time in each."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, BinaryIO, Self

from esvit_core.config import DataConfig
from esvit_core.data.ingest.decode import BadImage, StoredImage, to_stored_image
from esvit_core.data.ingest.pixels import PixelSettings
from esvit_core.data.ingest.prefetch import reading_threads
from esvit_core.errors import InfrastructureError

_START = "from esvit_core.data.ingest.decoders import serve; serve()"
_LENGTH = struct.Struct("<Q")
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


class Decoders:
    """Checks and converts images for several threads.

    Args:
        settings: how.
        processes: number of processes; 0: the calling threads do it.
    """

    def __init__(self, settings: DecodeSettings, processes: int) -> None:
        self.processes = processes
        self._settings = settings
        self._slots = threading.BoundedSemaphore(reading_threads())  # decoded images take much memory
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self.processes):
            # Not multiprocessing, which would import the main module of this process again.
            process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._all.append(process)
            _send(process.stdin, self._settings)
            self._idle.put(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()  # ends the process after its image
        for process in self._all:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def decode(self, data: bytes, ending: str) -> StoredImage:
        """Check and convert an image.

        Raises:
            BadImage: it is not usable.
            InfrastructureError: a process died.
        """
        if not self.processes:
            with self._slots:
                return self._settings.decode(data, ending)
        process = self._idle.get()
        try:
            _send(process.stdin, (data, ending))
            found = _receive(process.stdout)
        except (OSError, EOFError):
            raise InfrastructureError(_death(process)) from None
        finally:
            self._idle.put(process)
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
    settings: DecodeSettings = _receive(requests)
    with contextlib.suppress(EOFError, BrokenPipeError):
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
