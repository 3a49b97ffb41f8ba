"""What a file says about its pictures is applied as players apply it, or it is a note of the clip."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from conclugen_jax.extract.media import decoding as media
from tests import clips

CORNERS = {"R": (200, 30, 30), "G": (30, 200, 30), "B": (30, 30, 200), "W": (230, 230, 230)}
ORIENTATIONS = {  # matrix a, b, c, d -> colours of the corners: top left, top right, bottom left, bottom right
    (1, 0, 0, 1): "RGBW",
    (-1, 0, 0, 1): "GRWB",  # mirrored, as front cameras do
    (1, 0, 0, -1): "BWRG",
    (-1, 0, 0, -1): "WBGR",
    (0, 1, -1, 0): "BRWG",
    (0, -1, 1, 0): "GWRB",
    (0, 1, 1, 0): "RBGW",
    (0, -1, -1, 0): "WGBR",
}


PICTURE = np.array(
    [[CORNERS["RG"[x // 32] if y < 24 else "BW"[x // 32]] for x in range(64)] for y in range(48)], np.uint8
)


def write(path, *, change=lambda stream: None, bsf=None, codec="libx264", pix_fmt="yuv420p", start=0, title=""):
    """Write ten frames of four coloured quarters; ``change`` sets attributes of the stream, ``bsf`` changes its packets."""
    with av.open(str(path), "w") as container:
        container.metadata.update({"title": title} if title else {})
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        stream.codec_context.max_b_frames = 0
        change(stream)
        changed = av.BitStreamFilterContext(bsf, stream) if bsf else None
        for i in range(11):
            frame = None
            if i < 10:
                frame = av.VideoFrame.from_ndarray(PICTURE, format="rgb24").reformat(format=pix_fmt)
                frame.pts, frame.time_base = start + i, Fraction(1, 25)
            for packet in stream.encode(frame):
                container.mux(changed.filter(packet) if changed else packet)
    return path


def corners(frame):
    height, width = frame.shape[:2]
    seen = [frame[y, x].astype(int) for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]
    return "".join(min(CORNERS, key=lambda name: abs(colour - CORNERS[name]).sum()) for colour in seen)


def matrix(a, b, c, d):
    return lambda stream: stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(("turn", "expected"), ORIENTATIONS.items())
def test_clips_are_upright_in_all_eight_orientations(tmp_path, ending, turn, expected):
    clip = media.decode(write(tmp_path / f"a{ending}", change=matrix(*turn)))
    assert {corners(frame) for frame in clip.frames} == {expected}
    assert clip.frames[0].shape == ((64, 48, 3) if turn[1] else (48, 64, 3))
    assert clip.notes == ()


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [("rotate=90", "GWRB"), ("rotate=180", "WBGR"), ("flip=horizontal", "GRWB"), ("flip=vertical", "BWRG")],
)
def test_an_orientation_in_the_coded_pictures_holds_for_all_of_them(tmp_path, orientation, expected):
    bsf = f"h264_metadata=display_orientation=insert:{orientation}"
    clip = media.decode(write(tmp_path / "a.ts", bsf=bsf), rates=(25.0,))
    assert [corners(frame) for frame in clip.frames] == [expected] * 10


@pytest.mark.parametrize(("exif", "expected"), [(1, "RGBW"), (3, "WBGR"), (6, "BRWG"), (8, "GWRB")])
def test_an_orientation_in_exif_holds(tmp_path, exif, expected):
    facts, content = Image.Exif(), io.BytesIO()
    facts[0x112] = exif
    Image.fromarray(PICTURE).save(content, "JPEG", exif=facts)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(3):
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
            container.mux(packet)
    clip = media.decode(tmp_path / "a.mkv")
    assert corners(clip.frames[0]) == expected
    unknown = "the pictures are turned, and whether they are mirrored is unknown"  # PyAV gives the angle alone
    assert clip.notes == ((unknown,) if exif > 1 else ())


def test_other_angles_are_rounded_and_noted(tmp_path):
    clip = media.decode(write(tmp_path / "a.ts", bsf="h264_metadata=display_orientation=insert:rotate=75"))
    assert corners(clip.frames[0]) == "GWRB"
    assert clip.notes == (
        "the pictures are to be turned by an angle that is no multiple of 90 degrees, which is rounded to one",
    )


def aspect(ratio):
    return lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", ratio)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".ts", ".avi"])
@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(1, 2), Fraction(16, 11)])
def test_pixels_are_square_whatever_says_their_shape(tmp_path, ending, ratio):
    clip = media.decode(write(tmp_path / f"a{ending}", change=aspect(ratio)))
    assert clip.frames[0].shape == (48, round(64 * ratio), 3)


def test_an_impossible_shape_of_pixels_is_noted(tmp_path):
    clip = media.decode(write(tmp_path / "a.mkv", change=aspect(20)))
    assert clip.frames[0].shape == (48, 64, 3)
    assert clip.notes == ("the aspect ratio of the pixels is ignored, as no camera has it",)


def test_the_container_overrules_the_shape_of_coded_pixels(tmp_path):
    path = write(tmp_path / "a.mp4", change=aspect(2))
    content = bytearray(path.read_bytes())
    at = content.index(b"pasp") + 4
    content[at : at + 8] = (1).to_bytes(4, "big") + (2).to_bytes(4, "big")
    path.write_bytes(content)
    assert media.decode(path).frames[0].shape == (48, 32, 3)


@pytest.mark.parametrize(("codec", "ratio"), [("libx264", Fraction(2)), ("mpeg2video", Fraction(4, 3))])
def test_a_shape_of_pixels_that_changes_is_followed_and_noted(tmp_path, codec, ratio):
    """As in recordings of broadcasts, where containers do not say it."""
    parts = [(aspect(ratio), 0), (aspect(1), 10)]
    whole = tmp_path / "a.ts"
    whole.write_bytes(b"".join(write(tmp_path / "b.ts", change=c, codec=codec, start=s).read_bytes() for c, s in parts))
    clip = media.decode(whole, rates=(25.0,))
    assert [frame.shape[1] for frame in clip.frames[:8]] == [round(64 * ratio)] * 8
    assert [frame.shape[1] for frame in clip.frames[-8:]] == [64] * 8
    assert clip.notes == ("the aspect ratio of the pixels changes within the clip",)


RGB = {  # range, matrix -> what y = 120, u = 100, v = 160 is by their standards; unknown ones are limited and BT.601
    (0, 2): (172, 106, 65),
    (1, 2): (172, 106, 65),
    (2, 2): (165, 107, 70),
    (1, 1): (178, 110, 62),  # BT.709
    (2, 1): (170, 110, 68),
    (1, 5): (172, 106, 65),
    (1, 9): (175, 106, 61),  # BT.2020
    (2, 9): (167, 106, 67),
}


@pytest.mark.parametrize(
    ("ending", "codec", "bits"), [(".mp4", "libx264", 8), (".mp4", "libx264", 10), (".mkv", "ffv1", 8)]
)
@pytest.mark.parametrize(("said", "expected"), RGB.items())
def test_colours_have_the_range_and_the_matrix_that_the_file_says(tmp_path, said, expected, ending, codec, bits):
    path, form = tmp_path / f"a{ending}", "yuv420p" if bits == 8 else "yuv420p10le"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"qp": "0"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, form
        stream.codec_context.color_range, stream.codec_context.colorspace = said
        for i in range(5):
            frame = av.VideoFrame(64, 48, form)
            for plane, value in zip(frame.planes, (120, 100, 160), strict=True):
                kind = np.dtype(np.uint8 if bits == 8 else np.uint16)
                plane.update(np.full(plane.buffer_size // kind.itemsize, value << (bits - 8), kind).tobytes())
            frame.pts, frame.time_base = i, Fraction(1, 25)
            frame.color_range, frame.colorspace = said
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(media.decode(path).frames[0][24, 32].astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("change", "codec", "form", "note"),
    [
        (lambda s: None, "libx264", "yuv420p", ()),
        (lambda s: None, "ffv1", "bgr0", ()),
        (lambda s: None, "ffv1", "bgra", ("the pictures have an alpha channel, which is ignored",)),
        (
            lambda s: setattr(s.codec_context, "color_trc", 16),  # PQ
            "libx264",
            "yuv420p10le",
            ("the pictures are HDR, and their colours are paler than players show them",),
        ),
        (
            lambda s: setattr(s, "options", {"x264-params": "interlaced=1"}),
            "libx264",
            "yuv420p",
            ("the pictures are interlaced (ffmpeg -i CLIP -vf bwdif deinterlaces them)",),
        ),
    ],
    ids=["plain", "unused", "alpha", "hdr", "interlaced"],
)
def test_what_is_not_done_to_pictures_is_noted(tmp_path, change, codec, form, note):
    clip = media.decode(write(tmp_path / "a.mkv", change=change, codec=codec, pix_fmt=form))
    assert clip.notes == note
    assert corners(clip.frames[0]) == "RGBW"


def test_an_edit_list_cuts_pictures_and_sound(tmp_path):
    ramp = np.linspace(-0.9, 0.9, 32_000).astype(np.float32)
    images = [clips.image(i % 15 * 4) for i in range(50)]
    path = clips.write(tmp_path / "a.mp4", clips.steady(2.0), codec="mpeg4", gop=50, images=images, sound=ramp)
    content, at = bytearray(path.read_bytes()), -1
    for ticks in (
        12_800 * 4 // 5,
        16_000 * 4 // 5 + 1024,
    ):  # 0.8 s of each time base; the encoder's delay is cut as well
        at = content.index(b"elst", at + 1)
        content[at + 12 : at + 20] = (1000).to_bytes(4, "big") + ticks.to_bytes(4, "big")
    path.write_bytes(content)
    clip = media.decode(path, rates=(25.0,))
    assert [clips.number_of(frame) // 4 for frame in clip.frames[:25]] == [i % 15 for i in range(20, 45)]
    np.testing.assert_allclose(clip.sound[1000:15_000], ramp[13_800:27_800], atol=0.03)


def test_a_title_need_not_be_utf8(tmp_path):
    path = write(tmp_path / "a.mkv", title="d\u00e9j\u00e0")
    path.write_bytes(path.read_bytes().replace("d\u00e9j\u00e0".encode(), b"d\xe9\xe9j\xe0\xe0"))
    assert b"d\xe9\xe9" in path.read_bytes()
    assert corners(media.decode(path).frames[0]) == "RGBW"
    assert media.seconds(path) == pytest.approx(0.4)
