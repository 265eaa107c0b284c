"""Open videos as files of photos: ``clip.mp4#3000`` is the frame that is shown three seconds after the first one.

Frames are chosen by their times and never counted, because phones and camera traps change the rate while recording.
Their times are read from the packets, so listing a video decodes nothing.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import open_regular
from retrieval_tip.hooks import option

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpegts,mpeg,asf"
"""Names of FFmpeg's readers. Others read single images, or playlists, which name files of other people."""
MOST_PIXELS = 1 << 25
"""Largest width x height of a frame, which includes 7680 x 4320."""
MOST_FRAMES = 10_000
"""Largest number of photos of a video."""
THREADS = 4
"""Largest number of threads of a decoder, each of which holds frames. Large frames get fewer."""
FAR = 5000
"""A frame that is more milliseconds ahead is searched for from a key frame, instead of decoding all until then."""
MARGIN = 10_000
"""Milliseconds to go back further if a file finds key frames inexactly."""
TAIL = 1000
"""Milliseconds that may be missing at the end, because some recorders round the length."""
OPEN = 2
"""Number of videos whose decoders stay open."""
PASSED = 32 << 20
"""Most bytes of encoded frames that are kept for each open video, because threads ask for them out of order."""
QUALITY = 95


@dataclass(frozen=True)
class Videos:
    """Frames of videos, as :class:`retrieval_tip.data.source.FileOpener` describes.

    Options:
        frame_every: Seconds between the frames of a video that are read.
    """

    joins: ClassVar[bool] = True
    frame_every: float = option(default=1.0, metavar="SECONDS")

    def __post_init__(self) -> None:
        if not 0.001 <= self.frame_every <= 86_400:
            raise UsageError(f"frame_every {self.frame_every:g}: give 0.001 to 86,400 seconds")

    @property
    def step(self) -> int:
        """The milliseconds between frames."""
        return round(1000 * self.frame_every)

    def items(self, file: str) -> Iterator[str]:
        """Yield the time of the first frame at or after each multiple of the step, in milliseconds.

        Raises InputError if the file is not a video, and after the last frame if a part is missing.
        """
        import av

        first: dict[int, int] = {}
        end = 0
        reason = ""
        with closing(_Video(file, self.step)) as video:
            try:
                for packet in video.container.demux(video.stream):
                    time = packet.dts if packet.pts is None else packet.pts
                    if time is None or packet.is_corrupt or packet.is_discard:
                        continue
                    ms = video.milliseconds(time)
                    end = max(end, video.milliseconds(time + (packet.duration or 0)))
                    if ms >= 0:
                        first[ms // self.step] = min(ms, first.get(ms // self.step, ms))
                    if len(first) > MOST_FRAMES:
                        break
            except av.FFmpegError:
                reason = f"is damaged after {end / 1000:.1f} s"
            length = video.length
        yield from map(str, sorted(first.values())[:MOST_FRAMES])
        if len(first) > MOST_FRAMES:
            reason = f"has more than {MOST_FRAMES:,} frames; read fewer with a larger --frame-every"
        elif length - end > TAIL:
            reason = f"ends after {end / 1000:.1f} of {length / 1000:.1f} s"
        if reason:
            raise InputError(reason)

    def read(self, file: str, name: str) -> bytes:
        """Return a frame as a JPEG. Raises InputError if the video has no readable frame at this time."""
        if not name.isascii() or not name.isdigit() or len(name) > len(str(1 << 53)):
            raise InputError("is not a frame of a video; write #MILLISECONDS after its path")
        with _lock:
            return _open_video(file, self.step).read(int(name))


class _Video:
    """An open video, which decodes forwards and returns frames by their time in milliseconds."""

    def __init__(self, file: str, step: int) -> None:
        """Raises InputError if a file is not a video, or if its frames are too large."""
        self._step = step
        self._passed: dict[int, bytes] = {}
        with ExitStack() as stack:
            self._file = stack.enter_context(open_regular(file))
            self._open()
            stack.pop_all()

    def _open(self) -> None:
        """Start at the beginning of the file."""
        import av
        from av.stream import Disposition

        try:
            self.container: Any = av.open(self._file, options={"format_whitelist": FORMATS})
        except (OSError, ValueError):  # all errors of FFmpeg
            raise InputError("is not a video, or its beginning is damaged") from None
        streams = self.container.streams.video
        videos = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
        if not videos:
            raise InputError("has no video stream")
        self.stream = videos[0]
        self._decoder = self.stream.codec_context
        width, height = self._decoder.width, self._decoder.height
        if not 0 < width * height <= MOST_PIXELS:
            raise InputError(f"has {width} x {height} pixels; the limit is {MOST_PIXELS:,} in all")
        self._decoder.options = {"max_pixels": str(MOST_PIXELS)}  # frames may be larger than this
        self._decoder.thread_count = max(1, min(THREADS, MOST_PIXELS // (width * height)))
        self._decoder.thread_type = "AUTO"
        self._start()

    def _start(self) -> None:
        self._time = -1
        self._is_whole = True
        self._first = sys.maxsize
        self._frames = self._decoded()

    def close(self) -> None:
        """Close the file and the decoder."""
        self.container.close()
        self._file.close()

    @property
    def length(self) -> int:
        """The length in milliseconds that the header states, or 0."""
        if self.stream.duration and self.stream.time_base:
            return round(1000 * self.stream.duration * self.stream.time_base)
        return round((self.container.duration or 0) / 1000)

    def milliseconds(self, time: int) -> int:
        """Convert a time of the stream to milliseconds after its first frame."""
        return round(1000 * (time - (self.stream.start_time or 0)) * (self.stream.time_base or 0))

    def read(self, wanted: int) -> bytes:
        """Return the frame at a time in milliseconds as a JPEG. Raises InputError if it cannot be decoded."""
        if wanted in self._passed:
            return self._passed[wanted]
        is_near = self._time < wanted <= self._time + FAR
        for start in (wanted, wanted - MARGIN, 0):
            if not is_near:
                self._seek(start)
            data = self._forward(wanted)
            if data is not None:
                return data
            if is_near or self._first <= wanted:
                break
        raise InputError("no frame can be decoded at this time; the video is damaged there")

    def _forward(self, wanted: int) -> bytes | None:
        """Decode until a frame, and keep the first frame of each step on the way, which other threads may want."""
        for time, frame in self._frames:
            data = None
            self._first = min(self._first, time)
            if time == wanted or time // self._step > self._time // self._step:
                data = self._passed[time] = _jpeg(frame)
                while sum(map(len, self._passed.values())) > PASSED:
                    del self._passed[next(iter(self._passed))]
            self._time = time
            if time >= wanted:
                return data if time == wanted else None
        return None

    def _seek(self, wanted: int) -> None:
        """Continue at the last key frame before a time, or at the beginning of the file."""
        if wanted <= 0:
            self.container.close()
            self._file.seek(0)
            self._open()
        else:
            ticks = int(wanted / (1000 * (self.stream.time_base or 1)))
            self.container.seek((self.stream.start_time or 0) + ticks, stream=self.stream)
            self._start()

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        """Yield the readable frames and their times, in order."""
        import av

        with suppress(av.FFmpegError):  # the rest of the file is damaged
            for packet in self.container.demux(self.stream):
                try:
                    yield from self._timed(packet.decode())
                except av.FFmpegError:
                    self._is_whole = False
        with suppress(av.FFmpegError):
            yield from self._timed(self._decoder.decode(None))

    def _timed(self, frames: list[Any]) -> Iterator[tuple[int, Any]]:
        """Leave out frames that depend on a damaged one, which is all until the next key frame."""
        for frame in frames:
            self._is_whole = self._is_whole or frame.key_frame
            if self._is_whole and frame.pts is not None and not frame.is_corrupt:
                yield self.milliseconds(frame.pts), frame


def _jpeg(frame: Any) -> bytes:
    """Encode an upright frame. Its rotation is counter-clockwise, as in Pillow."""
    picture = frame.to_image().rotate(90 * round(frame.rotation / 90), expand=True)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


_lock = threading.Lock()
"""Held while decoding, since a decoder is not thread-safe, has threads of its own, and takes much memory."""
_videos: dict[tuple[str, int, int, int], _Video] = {}


def _open_video(file: str, step: int) -> _Video:
    """Return an open video, and close the one that was not used for longest if there are too many."""
    state = os.stat(file)  # noqa: PTH116 - any text
    key = (file, step, state.st_mtime_ns, state.st_size)
    video = _videos.pop(key, None) or _Video(file, step)
    _videos[key] = video
    while len(_videos) > OPEN:
        _videos.pop(next(iter(_videos))).close()
    return video
