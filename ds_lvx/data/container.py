"""Opening a film: a local file, in a container on a list, and the stream that a player shows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ds_lvx.data.limits import Limits
from ds_lvx.data.whole import check_whole

# FFmpeg's names. Not among them: playlists and session descriptions, which name other files and
# addresses to read from.
FILMS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,asf_o,ogg,nut,mxf,gif,apng,"
    "ivf,obu,h264,hevc,vvc,avs2,avs3,cavsvideo,vc1,vc1test,m4v,mjpeg,mjpeg_2000,dirac,dnxhd,h261,"
    "h263,rm,dv,gxf,wtv,swf,nsv,roq,film_cpk,r3d,yuv4mpegpipe,nuv,rpl,flic,vivo,pva,smjpeg,cine"
)
# Demuxers that make a "video" out of a text file or of a single picture: opened to be named.
_NO_FILMS = (
    "tty,image2,ico,png_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,j2k_pipe,webp_pipe,bmp_pipe,"
    "tiff_pipe,gif_pipe,ppm_pipe,pgm_pipe,pbm_pipe,pam_pipe,qoi_pipe,svg_pipe,psd_pipe,exr_pipe"
)
_STILLS = ("attached_pic", "timed_thumbnails", "still_image")


@dataclass(frozen=True)
class Film:
    """An open container and its chosen stream (PyAV's)."""

    container: Any
    stream: Any

    @property
    def codec(self) -> str:
        """FFmpeg's name of what the pictures are coded in."""
        return str(self.stream.codec_context.name)

    @property
    def container_name(self) -> str:
        """FFmpeg's name of the container."""
        return str(self.container.format.name)


@contextmanager
def opened(path: str, limits: Limits) -> Iterator[Film]:
    """A film, ready to be read from its beginning.

    Args:
        path: of a local file; it is never taken for an address, whatever its name is.
        limits: its pictures must keep to.

    Raises:
        ValueError: it is no film, or what is done with it inside of the ``with`` fails; the message
            names the file.
    """
    import av

    cure = "replace it"  # what FFmpeg cannot open it cannot repair
    try:
        check_whole(path)
        # "file:" stops FFmpeg from reading a protocol out of names like "12:30.mp4".
        options = {
            "protocol_whitelist": "file",
            "format_whitelist": f"{FILMS},{_NO_FILMS}",
            "max_pixels": str(limits.max_pixels),
        }
        with av.open("file:" + path, options=options, metadata_errors="replace") as container:
            stream = _stream(container, limits)
            cure = f"replace it, or keep what can be decoded: {reencode(path)}"
            yield Film(container, stream)
    except FileNotFoundError:  # PyAV's errors of this kind are Python's too
        raise ValueError(f"{path}: got no such file; expected a video; check the path") from None
    except av.FFmpegError as error:
        raise ValueError(
            f"{path}: got a file that cannot be decoded ({_reason(error, limits)}); expected a "
            f"video; {cure}"
        ) from None
    except (OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path}: got times or sizes that no film has ({type(error).__name__}); expected a "
            f"video; {cure}"
        ) from None
    except ValueError as error:
        named = str(error).startswith(f"{path}: ")  # by a second opening inside of the first
        raise ValueError(error if named else f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{path}: got a file that cannot be read ({error.strerror}); expected a video; check "
            "its permissions and the disk"
        ) from None


def _stream(container: Any, limits: Limits) -> Any:
    name = container.format.name
    if name in _NO_FILMS.split(","):
        raise ValueError(
            f"got a picture or text ({name}); expected a video; "
            'give a picture as {"type": "image"}'
        )
    stream = _shown(container.streams.video)
    if stream is None:
        raise ValueError("got no video stream; expected a video; replace the file")
    if stream.codec_context is None:
        raise ValueError(
            f"got a video stream in a coding that FFmpeg does not know ({name}, stream "
            f"{stream.index}); expected one that it decodes; convert or replace the file"
        )
    if not stream.time_base:
        raise ValueError(f"got a stream without a unit of time ({name}); expected one; convert it")
    if stream.metadata.get("alpha_mode") == "1":
        raise ValueError(
            f"got a film with transparency beside its pictures ({name}, alpha_mode 1); expected "
            "pictures alone; lay it on the background you mean"
        )
    if not stream.width or not stream.height:
        raise ValueError(
            f"got a video stream of which no picture can be decoded, or none of at most "
            f"{limits.max_pixels:,} pixels ({name}, {stream.codec_context.name}); expected one; "
            "scale it down, raise --max_pixels, or replace the file"
        )
    limits.check_size(stream.width, stream.height)
    # What is damaged is to be an error; decoders make something up where they are let.
    damage = {"err_detect": "explode"}
    stream.codec_context.options = {"max_pixels": str(limits.max_pixels), **damage}
    return stream


def _shown(streams: Any) -> Any:
    """What a player shows: the default stream, or the first; never a cover or a thumbnail."""
    films = [s for s in streams if not any(_is(s, kind) for kind in _STILLS)]
    return next((s for s in films if _is(s, "default")), films[0] if films else None)


def _is(stream: Any, kind: str) -> bool:
    return bool(stream.disposition & getattr(type(stream.disposition), kind))


def _reason(error: Any, limits: Limits) -> str:
    import av

    what = str(error.strerror or type(error).__name__)
    if isinstance(error, av.error.ArgumentError):
        what += f"; FFmpeg says so of frames with more than {limits.max_pixels:,} pixels, too"
    return what


def reencode(path: str, *, options: str = "") -> str:
    """The command that writes what FFmpeg can decode of a film into a new one."""
    words = f" {options}" if options else ""
    return f"ffmpeg -i {shlex.quote(os.fspath(path))} -an{words} fixed.mp4"


def decoded(film: Film) -> Iterator[Any]:
    """Frames from where the container stands, as a player shows them.

    What comes before the first picture may be undecodable: films are cut between keyframes.

    Raises:
        av.FFmpegError: a later packet cannot be decoded, or none can.
    """
    import av

    begun, failure = False, None
    for packet in film.container.demux(film.stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if begun:
                raise
            failure = error
            continue
        begun = begun or bool(frames)
        yield from frames
    if not begun and failure is not None:
        raise failure
