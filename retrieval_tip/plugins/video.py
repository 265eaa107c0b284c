"""Open videos as files of photos: ``clip.mp4#3000`` is the frame that is shown three seconds after the first one.

Frames are chosen by their times and never counted, because phones and camera traps change the rate while recording.
Their times are read from the packets, so listing a video decodes nothing.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Generator, Iterator
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
"""Most bytes of encoded frames that are kept for each open video, because threads ask for them out of order.

It is also the most bytes of packets that wait to be decoded.
"""
WORK = 1 << 34
"""Most pixels to decode for a frame: half a minute of work, or a minute between key frames in 4K."""
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
                    if packet.is_corrupt or packet.is_discard:
                        continue
                    ms = video.time_of(packet)
                    end = max(end, video.time_of(packet, packet.duration or 0))
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
        self._wanted = 0
        self._passed: dict[int, bytes] = {}
        with ExitStack() as stack:
            self._file = stack.enter_context(open_regular(file))
            self._open()
            stack.pop_all()

    def _open(self) -> None:
        """Start at the beginning of the file."""
        import av
        from av.stream import Disposition

        options = {"format_whitelist": FORMATS, "max_pixels": str(MOST_PIXELS)}
        try:  # which decodes frames if the header does not describe them
            self.container: Any = av.open(self._file, options=options)
        except (OSError, ValueError):  # all errors of FFmpeg
            raise InputError("is not a video, or its beginning is damaged") from None
        streams = self.container.streams.video
        videos = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
        if not videos:
            raise InputError("has no video stream")
        self.stream = videos[0]
        self._decoder = self.stream.codec_context
        pixels = self._decoder.width * self._decoder.height
        if not 0 < pixels <= MOST_PIXELS:  # 0 if a decoder refuses its frames
            raise InputError(f"has frames of more than {MOST_PIXELS:,} pixels, or of none")
        self._decoder.options = {
            "max_pixels": options["max_pixels"]
        }  # frames may be larger than stated
        self._decoder.thread_count = max(1, min(THREADS, MOST_PIXELS // pixels))
        self._decoder.thread_type = "AUTO"
        self._start()

    def _start(self) -> None:
        self._time = -1
        self._is_whole = True
        self._first = sys.maxsize
        self._steps: dict[int, int] = {}
        self._frames = self._decoded()

    def close(self) -> None:
        """Close the file and the decoder."""
        self._frames.close()  # else the garbage collector would have to free the decoder
        self.container.close()
        self._file.close()

    @property
    def length(self) -> int:
        """The length in milliseconds that the header states, or 0."""
        if self.stream.duration and self.stream.time_base:
            return round(1000 * self.stream.duration * self.stream.time_base)
        return round((self.container.duration or 0) / 1000)

    def time_of(self, shown: Any, later: int = 0) -> int:
        """Return the milliseconds from the first frame to a packet or frame, or -1 if it has no time."""
        time = shown.dts if shown.pts is None else shown.pts
        if time is None:
            return -1
        ticks = time + later - (self.stream.start_time or 0)
        milliseconds: int = round(1000 * ticks * (self.stream.time_base or 0))
        return milliseconds

    def read(self, wanted: int) -> bytes:
        """Return the frame at a time in milliseconds as a JPEG. Raises InputError if it cannot be decoded."""
        if wanted in self._passed:
            return self._passed[wanted]
        self._wanted = wanted
        self._work = WORK
        if self._time < wanted <= self._time + FAR:
            data = self._forward(wanted)
            if data is not None:
                return data
        for start in (wanted, wanted - MARGIN, 0):
            self._seek(start)
            data = self._forward(wanted)
            if data is not None:
                return data
            if self._first <= wanted:
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

    def _decoded(self) -> Generator[tuple[int, Any], None, None]:
        """Yield readable frames and their times, in order: all that show the first frame of a step, or depend on it.

        Packets wait until such a frame needs them. If the next key frame comes first, they are not decoded.
        """
        import av

        waiting: list[Any] = []
        held = 0
        is_needed = False
        with suppress(av.FFmpegError):  # the rest of the file is damaged
            for packet in self.container.demux(self.stream):
                if len(waiting) > 1 and self._starts_anew(waiting[-1], packet):
                    yield from self._rest()
                    self._decoder.flush_buffers()
                    del waiting[:-1]
                    held = waiting[0].size
                if is_needed or held > PASSED:
                    for one in waiting:
                        yield from self._frames_of(one)
                    waiting.clear()
                    held = 0
                waiting.append(packet)
                held += packet.size
                is_needed = self._is_needed(packet)
        for one in waiting if is_needed else ():
            yield from self._frames_of(one)
        yield from self._rest()

    def _starts_anew(self, packet: Any, following: Any) -> bool:
        """Return whether no later frame depends on frames before a packet."""
        return packet.is_keyframe and self.time_of(following) > self.time_of(packet)

    def _is_needed(self, packet: Any) -> bool:
        """Return whether a packet has the wanted frame, or so far the first one of its step."""
        ms = self.time_of(packet)
        step = ms // self._step
        is_first = ms < self._steps.get(step, sys.maxsize)
        if is_first:
            self._steps[step] = ms
        return is_first or ms == self._wanted

    def _frames_of(self, packet: Any) -> Iterator[tuple[int, Any]]:
        import av

        self._work -= self._decoder.width * self._decoder.height
        if self._work < 0:
            raise InputError("this frame is too far from a key frame")
        try:
            yield from self._timed(packet.decode())
        except av.FFmpegError:
            self._is_whole = False

    def _rest(self) -> Iterator[tuple[int, Any]]:
        """Yield the frames that the decoder still holds."""
        import av

        with suppress(av.FFmpegError):
            yield from self._timed(self._decoder.decode(None))

    def _timed(self, frames: list[Any]) -> Iterator[tuple[int, Any]]:
        """Leave out frames that depend on a damaged one, which is all until the next key frame."""
        for frame in frames:
            self._is_whole = self._is_whole or frame.key_frame
            if self._is_whole and frame.pts is not None and not frame.is_corrupt:
                yield self.time_of(frame), frame


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
